"""Projections of the strongest activations of a layer, with the image patches at their positions.

The search stores positions, not pictures: the images are read again here, and memory holds only
tiles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
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
)
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import (
    Progress,
    TopActivations,
    get_image,
    group_by_size,
)

FORMAT = "deconvnet exemplars"
# Units to project at a time: each projection is as large as the input.
CHUNK = 32
# Larger tiles are reduced to this side, in pixels.
LARGEST = 96
# An activation must equal that of the search, up to this fraction of the largest value.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class TopProjections:
    """The projections of the k strongest activations of M maps of a layer.

    maps: (M,), the numbers of the maps. tiles: (M, k, C, h, w) float16, the projections as signed
    RGB, or as one plane if the network sees grey, cropped to the receptive field and divided by
    their largest magnitude. patches: (M, k, 3, h, w) uint8, the image at the same position, grey
    beyond its border. units: (M, k, 4), image, map, row, column. boxes: (M, k, 4), the receptive
    fields as top, left, bottom, right, clipped to the image. values: (M, k), the signed
    activations, NaN where a map has fewer than k. checkerboard: (M, k), see the function of this
    name; NaN if no convolution on the way down has an uneven overlap. scale: the factor by which
    tiles were reduced, 1 if they are as large as the field. report: of the projections.
    """

    layer: str
    maps: np.ndarray
    tiles: np.ndarray
    patches: np.ndarray
    units: np.ndarray
    boxes: np.ndarray
    values: np.ndarray
    checkerboard: np.ndarray
    scale: float
    report: ProjectionReport

    def count(self, row: int) -> int:
        """The number of activations of the map in this row."""
        return int(np.isfinite(self.values[row]).sum())

    def save(self, path: Path, key: dict[str, object] | None = None) -> None:
        """Write the projections to an .npz file, atomically; key: what they depend on."""
        header = {
            "format": FORMAT,
            "layer": self.layer,
            "scale": self.scale,
            "report": asdict(self.report),
            "key": key or {},
        }
        arrays = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        arrays = {name: value for name, value in arrays.items() if isinstance(value, np.ndarray)}
        arrays["header"] = np.array(json.dumps(header))
        save_arrays(path, arrays, compressed=True)


def load_top_projections(path: Path, key: dict[str, object] | None = None) -> TopProjections | None:
    """Load a file of `TopProjections.save`; None if there is no file, or if its key differs."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        arrays = load_arrays(path)
        header = json.loads(str(arrays.pop("header")))
        if header.get("format") != FORMAT:
            raise ValueError("it has another format")
        if key is not None and header["key"] != json.loads(json.dumps(key)):
            return None
        report = dict(header["report"])
        pairs = ("kernel", "stride", "period")
        report["uneven"] = tuple(
            UnevenOverlap(uneven["layer"], *(tuple(uneven[name]) for name in pairs))
            for uneven in report["uneven"]
        )
        report = ProjectionReport(**report)
        return TopProjections(**arrays, layer=header["layer"], scale=header["scale"], report=report)
    except Exception as error:  # zipfile, zlib, json and numpy have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: damaged or not a file of top projections ({reason}); remove it"
        ) from error


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
            projection = projector(x, layer, local)
            expected = [float(top.values[maps[ranked.row], ranked.rank]) for ranked in chunk]
            _check_values(projection.values, expected, chunk)
            # One plane is enough for grey pictures.
            tiles = projector.signed_rgb(projection.tiles())[:, : projection.images.shape[1]]
            result = result or _empty(layer, maps, top.values.shape[1], tiles, projection.report)
            _fill(result, chunk, projection, tiles, projection.patches(pixels))
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
    """A unit (image, map, row, column) whose projection belongs into `result.tiles[row, rank]`."""

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


def _empty(
    layer: str, maps: list[int], k: int, tiles: Tensor, report: ProjectionReport
) -> TopProjections:
    """Arrays for k projections of each map; tiles: some of them, for their size."""
    planes, *tile = tiles.shape[1:]
    scale = min(1.0, LARGEST / max(tile))
    size = tuple(max(1, round(side * scale)) for side in tile)
    shape = (len(maps), k)
    units = np.full((*shape, 4), -1, dtype=np.int64)
    return TopProjections(
        layer,
        np.array(maps),
        np.zeros((*shape, planes, *size), dtype=np.float16),
        np.full((*shape, 3, *size), 128, dtype=np.uint8),
        units,
        units.copy(),
        np.full(shape, np.nan, dtype=np.float32),
        np.full(shape, np.nan, dtype=np.float32),
        scale,
        report,
    )


def _fill(
    result: TopProjections,
    chunk: list[RankedUnit],
    projection: Projection,
    tiles: Tensor,
    patches: Tensor,
) -> None:
    """Write the projections of some units into the result."""
    size = result.tiles.shape[3:]
    tiles, patches = (_reduced(t.float().cpu(), size) for t in (tiles, patches))
    uneven = [overlap for overlap in projection.report.uneven if all(overlap.period)]
    # Among several patterns, the finest is the most visible.
    boards = checkerboard(projection.tiles(), uneven[-1].period) if uneven else None
    for index, (row, rank, unit) in enumerate(chunk):
        result.tiles[row, rank] = _normalised_half(tiles[index])
        result.patches[row, rank] = (patches[index] * 255).round().clamp(0, 255).byte().numpy()
        result.units[row, rank] = unit
        result.boxes[row, rank] = projection.boxes[index].numpy()
        result.values[row, rank] = float(projection.values[index])
        if boards is not None:
            result.checkerboard[row, rank] = float(boards[index])


def _normalised_half(tile: Tensor) -> np.ndarray:
    """A tile in float16, divided by its largest magnitude: only its shape has a meaning."""
    peak = float(tile.abs().max())
    return (tile / peak if peak > 0 else tile).half().numpy()


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
