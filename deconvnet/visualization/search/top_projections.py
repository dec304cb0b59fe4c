"""What drives some maps of a layer: their strongest activations, projected, and the image there.

The images are read again for this, so that only tiles are ever held in memory: the pass over the
data has kept places, not pictures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

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
# Units that are projected at a time: their images are as large as the input.
CHUNK = 32
# Larger tiles are reduced to this side.
LARGEST = 96
# An activation must come again as it was when the data set was searched, up to rounding.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class TopProjections:
    """The strongest activations of M maps of a layer, k each.

    maps: (M,); tiles: (M, k, C, h, w) float16, the projections as signed RGB, or grey where the
    network sees grey, each divided by its largest magnitude, cut to the receptive field of the
    layer; patches: (M, k, 3, h, w) uint8, the image in the same place, grey beyond it; units:
    (M, k, 4) image, map, row, column; boxes: (M, k, 4) top, left, bottom, right of the fields,
    clipped to the image; values: (M, k) the activations with their signs, NaN where there were
    fewer; checkerboard: (M, k), of the function of this name, NaN where no convolution leaves one;
    scale: by which tiles were reduced, 1 if they have the size of the field; report: of the
    projections.
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
        """How many activations the map in this row has."""
        return int(np.isfinite(self.values[row]).sum())

    def save(self, path: Path, key: dict[str, object] | None = None) -> None:
        """Write it to an .npz file, whole or not at all."""
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
    """What `Exemplars.save` wrote; None if there is no file, or one with another key."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        arrays = load_arrays(path)
        header = json.loads(str(arrays.pop("header")))
        if header.get("format") != FORMAT:
            raise ValueError("of another kind")
        if key is not None and header["key"] != json.loads(json.dumps(key)):
            return None
        report = dict(header["report"])
        pairs = ("kernel", "stride", "period")
        report["uneven"] = tuple(
            UnevenOverlap(each["layer"], *(tuple(each[name]) for name in pairs))
            for each in report["uneven"]
        )
        report = ProjectionReport(**report)
        return TopProjections(**arrays, layer=header["layer"], scale=header["scale"], report=report)
    except Exception as error:  # zipfile, zlib, json and numpy have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: damaged or not a file of exemplars ({reason}); remove it"
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
    """The kept activations of some maps (by default all), projected each alone.

    images: the data set that was searched. Raises ValueError where an image no longer gives the
    activation that the table has: then the data set is shuffled or augmented.
    """
    maps = list(range(len(top.values))) if maps is None else list(maps)
    units = [
        (row, column, unit)
        for row, m in enumerate(maps)
        for column, unit in enumerate(top.units(m))
    ]
    units.sort(key=lambda entry: entry[2][0])
    result = None
    done = 0
    for some, pixels in _with_images(units, images, projector.batch):
        numbers = sorted({unit[0] for _, _, unit in some})
        x = projector.prepare(pixels)
        for start in range(0, len(some), CHUNK):
            part = some[start : start + CHUNK]
            local = [(numbers.index(unit[0]), *unit[1:]) for _, _, unit in part]
            found = projector(x, layer, local)
            _check(
                found.values,
                [float(top.values[maps[row], column]) for row, column, _ in part],
                part,
            )
            # Of what is grey one plane is enough.
            tiles = projector.signed_rgb(found.tiles())[:, : found.images.shape[1]]
            result = result or _empty(layer, maps, top.values.shape[1], tiles, found.report)
            _put(result, part, found, tiles, found.patches(pixels))
            done += len(part)
            if progress:
                progress(done, len(units))
    if result is None:
        raise ValueError(f"layer {layer!r}: none of its {len(maps)} maps is ever active")
    return result


def checkerboard(images: Tensor, period: tuple[int, int]) -> Tensor:
    """(U,): how uneven projections (U, C, H, W) are over the phases of a pattern of this period.

    The standard deviation of the mean magnitude in each phase over their mean: 0 where magnitudes
    do not depend on the phase. Fine structure of the image has some unevenness of its own; take it
    for what is above that of `overlap="normalised"`.
    """
    magnitude = images.abs().double().mean(1)
    rows, columns = (
        torch.arange(size, device=images.device) % max(1, step)
        for size, step in zip(magnitude.shape[1:], period, strict=True)
    )
    # The last period may be cut off: its phases have fewer pixels.
    phase = (rows[:, None] * (columns.max() + 1) + columns).flatten()
    sums = magnitude.new_zeros(len(images), int(phase.max()) + 1)
    phases = sums.index_add(1, phase, magnitude.flatten(1)) / phase.bincount()
    mean = phases.mean(1)
    return torch.where(mean > 0, phases.std(1, correction=0) / mean.clamp(min=1e-300), 0)


RankedUnit = tuple[int, int, tuple[int, int, int, int]]


def _with_images(
    units: list[RankedUnit], images: Sequence, count: int
) -> Iterator[tuple[list[RankedUnit], Tensor]]:
    """Units, sorted by image, in parts of a few images each, with these (n, 3, H, W)."""
    for some in _by_image(units, count):
        numbers = sorted({unit[0] for _, _, unit in some})
        read = [get_image(images[number]) for number in numbers]
        for places in group_by_size(read):
            here = {numbers[place] for place in places}
            together = [entry for entry in some if entry[2][0] in here]
            yield together, torch.stack([read[place] for place in places])


def _by_image(units: list[RankedUnit], images: int) -> Iterator[list[RankedUnit]]:
    """Units, sorted by image, in parts of a few images each."""
    some: list[RankedUnit] = []
    for entry in units:
        numbers = {unit[0] for _, _, unit in some}
        if entry[2][0] not in numbers and len(numbers) == images:
            yield some
            some = []
        some.append(entry)
    if some:
        yield some


def _empty(
    layer: str, maps: list[int], k: int, tiles: Tensor, report: ProjectionReport
) -> TopProjections:
    planes, *tile = tiles.shape[1:]
    scale = min(1.0, LARGEST / max(tile))
    size = tuple(max(1, round(side * scale)) for side in tile)
    places = (len(maps), k)
    units = np.full((*places, 4), -1, dtype=np.int64)
    return TopProjections(
        layer,
        np.array(maps),
        np.zeros((*places, planes, *size), dtype=np.float16),
        np.full((*places, 3, *size), 128, dtype=np.uint8),
        units,
        units.copy(),
        np.full(places, np.nan, dtype=np.float32),
        np.full(places, np.nan, dtype=np.float32),
        scale,
        report,
    )


def _put(
    result: TopProjections,
    part: list[RankedUnit],
    found: Projection,
    tiles: Tensor,
    patches: Tensor,
) -> None:
    """Write projections into their places."""
    size = result.tiles.shape[3:]
    tiles, patches = (_reduced(each.float().cpu(), size) for each in (tiles, patches))
    uneven = [each for each in found.report.uneven if all(each.period)]
    # Of several patterns the finest is the one that the eye sees.
    board = checkerboard(found.tiles(), uneven[-1].period) if uneven else None
    for place, (row, column, unit) in enumerate(part):
        at = row, column
        result.tiles[at] = _half(tiles[place])
        result.patches[at] = (patches[place] * 255).round().clamp(0, 255).byte().numpy()
        result.units[at] = unit
        result.boxes[at] = found.boxes[place].numpy()
        result.values[at] = float(found.values[place])
        if board is not None:
            result.checkerboard[at] = float(board[place])


def _half(tile: Tensor) -> np.ndarray:
    """In float16, divided by what keeps it in range: only the shape of a projection means much."""
    peak = float(tile.abs().max())
    return (tile / peak if peak > 0 else tile).half().numpy()


def _reduced(tiles: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(tiles.shape[2:]) == tuple(size):
        return tiles
    return F.interpolate(tiles, size, mode="bilinear", antialias=True)


def _check(values: Tensor, expected: list[float], part: list[RankedUnit]) -> None:
    found = values.detach().cpu().abs().double()
    wrong = (found - torch.tensor(expected).double().abs()).abs() > TOLERANCE * found.max()
    if wrong.any():
        place = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"image {part[place][2][0]}: map {part[place][2][1]} gives {float(found[place]):.4g}, "
            f"and gave {expected[place]:.4g} when the data set was searched: it must give the same "
            "images again, not shuffled, not augmented"
        )
