"""Projections of the strongest activations of a layer, with the image patches at their positions.

The search stores positions, not pictures: the images are read again here, and memory holds only
tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.visualization.projection.projection import (
    Projection,
    ProjectionReport,
    UnevenOverlap,
    tile_boxes,
)
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import (
    Progress,
    TopActivations,
    get_image,
    group_by_size,
)

FORMAT = "deconvnet top projections"
# Files of this format hold one method, and are recomputed.
OLD_FORMAT = "deconvnet exemplars"
# Units to project at a time: each projection is as large as the input.
CHUNK = 32
# Larger tiles are reduced to this side, in pixels.
LARGEST = 112
# An activation must equal that of the search, up to this fraction of the largest value.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class TopProjections:
    """The projections of the k strongest activations of M maps of a layer.

    maps: (M,), the numbers of the maps. units: (M, k, 4), image, map, row, column. values: (M, k),
    the signed activations, NaN where a map has fewer than k. boxes: (M, k, 4), the receptive fields
    as top, left, bottom, right, clipped to the image. windows: (M, k, 4), what tiles and patches
    show, which may reach beyond the image. border: (M, k), whether the receptive field reaches
    beyond the image, so that padding contributes to the activation.

    tiles: by method, the one to show first comes first: (M, k, C, h, w) int8, the projections of
    the activations as signed RGB, or as one plane if the network sees grey, as fractions of the
    largest magnitude of each tile in 127ths; zero beyond the image. patches: (M, k, 3, h, w) uint8,
    the image in the same window, grey beyond its border. scale: the factor by which tiles were
    reduced, 1 if they are as large as the window. reports: of the projections, by method.
    checkerboard: (M, k), see the function of this name, for the first method; NaN if no convolution
    on the way down has an uneven overlap.
    """

    layer: str
    maps: np.ndarray
    units: np.ndarray
    values: np.ndarray
    boxes: np.ndarray
    windows: np.ndarray
    border: np.ndarray
    tiles: dict[str, np.ndarray]
    patches: np.ndarray
    checkerboard: np.ndarray
    scale: float
    reports: dict[str, ProjectionReport]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, the one to show first comes first."""
        return tuple(self.tiles)

    @property
    def report(self) -> ProjectionReport:
        """The report of the first method."""
        return self.reports[self.methods[0]]

    @property
    def signs(self) -> np.ndarray:
        """(M, k) int8: the signs of the activations, 0 where there is none."""
        return np.sign(np.nan_to_num(self.values)).astype(np.int8)

    def count(self, row: int) -> int:
        """The number of activations of the map in this row; 0 if it is dead."""
        return int(np.isfinite(self.values[row]).sum())

    def save(self, path: Path, key: dict[str, object] | None = None) -> None:
        """Write the projections to an .npz file, atomically; key: what they depend on."""
        header = {
            "format": FORMAT,
            "layer": self.layer,
            "scale": self.scale,
            "reports": {method: asdict(report) for method, report in self.reports.items()},
            "key": key or {},
        }
        arrays = {name: getattr(self, name) for name in ARRAYS}
        arrays |= {f"tiles/{method}": tiles for method, tiles in self.tiles.items()}
        arrays["header"] = np.array(json.dumps(header))
        save_arrays(path, arrays, compressed=True)


# The fields of `TopProjections` that are arrays.
ARRAYS = ("maps", "units", "values", "boxes", "windows", "border", "patches", "checkerboard")


def load_top_projections(path: Path, key: dict[str, object] | None = None) -> TopProjections | None:
    """Load a file of `TopProjections.save`; None if there is no file, or if its key differs."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        arrays = load_arrays(path)
        header = json.loads(str(arrays.pop("header")))
        if header.get("format") == OLD_FORMAT:
            return None
        if header.get("format") != FORMAT:
            raise ValueError("it has another format")
        if key is not None and header["key"] != json.loads(json.dumps(key)):
            return None
        reports = {method: _report(values) for method, values in header["reports"].items()}
        return TopProjections(
            **{name: arrays[name] for name in ARRAYS},
            layer=header["layer"],
            tiles={method: arrays[f"tiles/{method}"] for method in reports},
            scale=header["scale"],
            reports=reports,
        )
    except Exception as error:  # zipfile, zlib, json and numpy have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: damaged or not a file of top projections ({reason}); remove it"
        ) from error


def _report(values: dict) -> ProjectionReport:
    """The inverse of `asdict` and JSON."""
    pairs = ("kernel", "stride", "period")
    uneven = tuple(
        UnevenOverlap(overlap["layer"], *(tuple(overlap[name]) for name in pairs))
        for overlap in values["uneven"]
    )
    return ProjectionReport(**{**values, "uneven": uneven})


def project_top_activations(
    projector: Projector,
    images: Sequence,
    layer: str,
    top: TopActivations,
    *,
    maps: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> TopProjections:
    """Project the strongest activations of these maps (by default all), each separately.

    images: the data set that was searched. Raises ValueError if an image does not give the
    activation that the table lists, because the data set is then shuffled or augmented.
    """
    maps = list(range(len(top.values))) if maps is None else list(maps)
    units = [
        RankedUnit(row, rank, unit)
        for row, m in enumerate(maps)
        for rank, unit in enumerate(top.units(m))
    ]
    units.sort(key=lambda ranked: ranked.unit[0])
    result = None
    done = 0
    for group, pixels in _with_images(units, images, projector.batch):
        numbers = sorted({ranked.unit[0] for ranked in group})
        x = projector.prepare(pixels)
        for start in range(0, len(group), CHUNK):
            chunk = group[start : start + CHUNK]
            local = [(numbers.index(image), *rest) for image, *rest in (r.unit for r in chunk)]
            projections = _by_method(projector, x, layer, local)
            first = next(iter(projections.values()))
            expected = [float(top.values[maps[ranked.row], ranked.rank]) for ranked in chunk]
            _check_values(first.values, expected, chunk)
            # One plane is enough for grey pictures.
            tiles = {
                method: projector.signed_rgb(projection.tiles())[:, : projection.images.shape[1]]
                for method, projection in projections.items()
            }
            result = result or _empty(layer, maps, top.values.shape[1], tiles, projections)
            windows = tile_boxes(first.fields, tuple(first.images.shape[2:]))
            _fill(result, chunk, first, windows, tiles, first.patches(pixels))
            done += len(chunk)
            if progress:
                progress(done, len(units))
    if result is None:
        raise ValueError(f"layer {layer!r}: none of its {len(maps)} maps is ever active")
    return result


def checkerboard(images: Tensor, period: tuple[int, int]) -> Tensor:
    """(U,): how much the magnitude of projections (U, C, H, W) varies with the phase of a pattern.

    period: of the pattern, in pixels. The result is the standard deviation of the mean magnitude of
    each phase, divided by the mean over all phases; it is 0 if magnitudes do not depend on the
    phase. Fine structure in the image also varies with the phase, so only what exceeds the value
    for `overlap="normalised"` is a checkerboard.
    """
    magnitude = images.abs().double().mean(1)
    rows, columns = (
        torch.arange(size, device=images.device) % max(1, step)
        for size, step in zip(magnitude.shape[1:], period, strict=True)
    )
    # The last period may be incomplete: its phases have fewer pixels.
    phase = (rows[:, None] * (columns.max() + 1) + columns).flatten()
    sums = magnitude.new_zeros(len(images), int(phase.max()) + 1)
    phases = sums.index_add(1, phase, magnitude.flatten(1)) / phase.bincount()
    mean = phases.mean(1)
    return torch.where(mean > 0, phases.std(1, correction=0) / mean.clamp(min=1e-300), 0)


class RankedUnit(NamedTuple):
    """A unit (image, map, row, column), and the row and rank of its projection in the result."""

    row: int
    rank: int
    unit: tuple[int, int, int, int]


def _with_images(
    units: list[RankedUnit], images: Sequence, count: int
) -> Iterator[tuple[list[RankedUnit], Tensor]]:
    """Units, sorted by image, in groups of at most `count` images, with these (n, 3, H, W)."""
    for group in _by_image(units, count):
        numbers = sorted({ranked.unit[0] for ranked in group})
        pixels = [get_image(images[number]) for number in numbers]
        for indices in group_by_size(pixels):
            same_size = {numbers[index] for index in indices}
            members = [ranked for ranked in group if ranked.unit[0] in same_size]
            yield members, torch.stack([pixels[index] for index in indices])


def _by_image(units: list[RankedUnit], count: int) -> Iterator[list[RankedUnit]]:
    """Units, sorted by image, in groups of at most `count` images."""
    group: list[RankedUnit] = []
    for ranked in units:
        numbers = {other.unit[0] for other in group}
        if ranked.unit[0] not in numbers and len(numbers) == count:
            yield group
            group = []
        group.append(ranked)
    if group:
        yield group


def _by_method(
    projector: Projector, x: Tensor, layer: str, units: list[tuple[int, int, int, int]]
) -> dict[str, Projection]:
    if hasattr(projector, "by_method"):
        return projector.by_method(x, layer, units)
    return {projector.method: projector(x, layer, units)}


def _empty(
    layer: str,
    maps: list[int],
    k: int,
    tiles: dict[str, Tensor],
    projections: dict[str, Projection],
) -> TopProjections:
    """Arrays for k projections of each map; tiles: some of them, for their size."""
    planes, *tile = next(iter(tiles.values())).shape[1:]
    scale = min(1.0, LARGEST / max(tile))
    size = tuple(max(1, round(side * scale)) for side in tile)
    shape = (len(maps), k)
    rows = np.full((*shape, 4), -1, dtype=np.int64)
    numbers = np.full(shape, np.nan, dtype=np.float32)
    return TopProjections(
        layer,
        np.array(maps),
        units=rows,
        values=numbers,
        boxes=rows.copy(),
        windows=rows.copy(),
        border=np.zeros(shape, dtype=bool),
        tiles={method: np.zeros((*shape, planes, *size), dtype=np.int8) for method in tiles},
        patches=np.full((*shape, 3, *size), 128, dtype=np.uint8),
        checkerboard=numbers.copy(),
        scale=scale,
        reports={method: projection.report for method, projection in projections.items()},
    )


def _fill(
    result: TopProjections,
    chunk: list[RankedUnit],
    projection: Projection,
    windows: Tensor,
    tiles: dict[str, Tensor],
    patches: Tensor,
) -> None:
    """Write the projections of some units into the result; projection: by the first method."""
    size = result.patches.shape[3:]
    patches = (_reduced(patches.float().cpu(), size) * 255).round().clamp(0, 255).byte().numpy()
    reduced = {method: _as_bytes(_reduced(t.float().cpu(), size)) for method, t in tiles.items()}
    uneven = [overlap for overlap in projection.report.uneven if all(overlap.period)]
    # Among several patterns, the finest is the most visible.
    boards = checkerboard(projection.tiles(), uneven[-1].period) if uneven else None
    border = (projection.boxes != projection.fields).any(1)
    for index, (row, rank, unit) in enumerate(chunk):
        at = row, rank
        for method in result.tiles:
            result.tiles[method][at] = reduced[method][index]
        result.patches[at] = patches[index]
        result.units[at] = unit
        result.boxes[at] = projection.boxes[index].numpy()
        result.windows[at] = windows[index].numpy()
        result.border[at] = bool(border[index])
        result.values[at] = float(projection.values[index])
        if boards is not None:
            result.checkerboard[at] = float(boards[index])


def _as_bytes(tiles: Tensor) -> np.ndarray:
    """Tiles (U, C, h, w) in int8: 127 is the largest magnitude of each, since only its shape has a
    meaning."""
    peaks = tiles.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
    return (
        (127 * tiles / peaks.clamp(min=torch.finfo(tiles.dtype).tiny))
        .round()
        .to(torch.int8)
        .numpy()
    )


def _reduced(tiles: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(tiles.shape[2:]) == tuple(size):
        return tiles
    return F.interpolate(tiles, size, mode="bilinear", antialias=True)


def _check_values(values: Tensor, expected: list[float], chunk: list[RankedUnit]) -> None:
    """Raise ValueError unless the activations have the magnitudes of the search."""
    magnitudes = values.detach().cpu().abs().double()
    error = (magnitudes - torch.tensor(expected).double().abs()).abs()
    wrong = error > TOLERANCE * magnitudes.max()
    if wrong.any():
        index = int(wrong.nonzero()[0, 0])
        image, map, *_ = chunk[index].unit
        raise ValueError(
            f"image {image}: map {map} responds with {float(magnitudes[index]):.4g}, but with "
            f"{expected[index]:.4g} in the search: the data set must return the same images again, "
            "neither shuffled nor augmented"
        )
