"""Projects the strongest activations of a layer, and cuts out the image patches at their positions.

The search stores positions, not pictures: the images are read again here, and memory holds only
tiles. The tiles of a layer show its effective field. Of activations whose patches look the same,
only the strongest is shown: overlapping crops of one photograph would otherwise fill a map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.boxes import crop
from deconvnet.visualization.projection.effective_field import (
    EffectiveField,
    effective_field,
    windows_of,
)
from deconvnet.visualization.projection.projection import Projection
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import (
    Progress,
    TopActivations,
    get_image,
    group_by_size,
)
from deconvnet.visualization.search.top_projections import EMPTY, TopProjections

# Units to project at a time: each projection is as large as the input.
CHUNK = 32
# Larger tiles are reduced to this side, in pixels.
LARGEST = 112
# The share of the non-zero values of a tile that may exceed the range of its bytes.
CLIPPED = 1e-3
# An activation must equal that of the search, up to this fraction of the largest value.
TOLERANCE = 1e-2
# Units whose projections measure the effective field.
MEASURED = 32
# The mean difference of two patches that look the same, in 255ths.
SAME = 2.0
WINDOWS = ("effective", "field")


def project_top_activations(
    projector: Projector,
    images: Sequence,
    layer: str,
    top: TopActivations,
    *,
    maps: Sequence[int] | None = None,
    k: int | None = None,
    counts: Sequence[int] | None = None,
    window: str | EffectiveField = "effective",
    progress: Progress | None = None,
) -> TopProjections:
    """Project the strongest activations of these maps (by default all), each separately.

    images: the data set that was searched. k: activations of each map, by default as many as the
    table has; an activation whose patch looks like that of a stronger one is replaced by the next
    in the table. counts: the same for each map, if they differ; at most k. window: what tiles show:
    effective, the box that holds 95% of the mean energy of the projections of the layer; field,
    the whole receptive field; or a box that was measured before.

    Raises ValueError if an image does not give the activation that the table lists, because the
    data set is then shuffled or augmented.
    """
    if isinstance(window, str) and window not in WINDOWS:
        raise ValueError(f"window={window}: choose one of {', '.join(WINDOWS)}")
    maps = list(range(len(top.values))) if maps is None else list(maps)
    k = top.values.shape[1] if k is None else k
    wanted = [k] * len(maps) if counts is None else [min(count, k) for count in counts]
    # Of each map, the units that are not projected yet.
    candidates = [list(enumerate(top.units(m))) for m in maps]
    if not any(candidates):
        raise ValueError(f"layer {layer!r}: none of its {len(maps)} maps is ever active")
    expected = top.values[maps]
    if window == "effective":
        window = _measure(projector, images, layer, [units[0][1] for units in candidates if units])
    task = _Task(projector, images, layer, window if isinstance(window, EffectiveField) else None)
    result, done = None, 0
    while True:
        missing = [count - _count(result, row) for row, count in enumerate(wanted)]
        units = [
            RankedUnit(row, _count(result, row) + place, *candidates[row].pop(0))
            for row, count in enumerate(missing)
            for place in range(min(count, len(candidates[row])))
        ]
        if not units:
            return result
        total = done + len(units)
        for part in _project(task, units, result):
            _check_values(part, expected)
            result = result or _empty(layer, maps, k, part, task.effective)
            _fill(result, part)
            done += len(part.units)
            if progress:
                progress(done, total)
        _drop_repetitions(result)


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
    """A unit (image, map, row, column), the row and rank of its projection in the result, and its
    rank in the table of activations."""

    row: int
    rank: int
    place: int
    unit: tuple[int, int, int, int]


class _Task(NamedTuple):
    """What units are projected from, and the box that tiles show; None: the receptive field."""

    projector: Projector
    images: Sequence
    layer: str
    effective: EffectiveField | None


class _Part(NamedTuple):
    """Some units with their projections by method, and their windows (U, 4), tiles and patches."""

    units: list[RankedUnit]
    projections: dict[str, Projection]
    windows: Tensor
    tiles: dict[str, Tensor]
    patches: Tensor

    @property
    def first(self) -> Projection:
        """The projection by the method to show first."""
        return next(iter(self.projections.values()))


def _project(
    task: _Task, units: list[RankedUnit], result: TopProjections | None
) -> Iterator[_Part]:
    """Project units, some images and some units at a time; result: for the shape of its tiles."""
    units = sorted(units, key=lambda ranked: ranked.unit[0])
    shape = None if result is None else result.patches.shape[3:]
    for chunk, projections, pixels in _projections(task.projector, task.images, task.layer, units):
        first = next(iter(projections.values()))
        windows = _windows(first.fields, tuple(first.images.shape[2:]), task.effective, shape)
        top, left, bottom, right = windows[0].tolist()
        shape = shape or (bottom - top, right - left)
        tiles = {
            # One plane is enough for grey pictures.
            method: task.projector.signed_rgb(crop(projection.images, windows))[
                :, : projection.images.shape[1]
            ]
            for method, projection in projections.items()
        }
        patches = crop(pixels[first.units[:, 0]], windows, fill=0.5)
        yield _Part(chunk, projections, windows, tiles, patches)


def _projections(
    projector: Projector, images: Sequence, layer: str, units: list[RankedUnit]
) -> Iterator[tuple[list[RankedUnit], dict[str, Projection], Tensor]]:
    """Units, sorted by image, with their projections by method and the pixels of their images."""
    for group, pixels in _with_images(units, images, projector.batch):
        numbers = sorted({ranked.unit[0] for ranked in group})
        x = projector.prepare(pixels)
        for start in range(0, len(group), CHUNK):
            chunk = group[start : start + CHUNK]
            local = [(numbers.index(image), *rest) for image, *rest in (r.unit for r in chunk)]
            yield chunk, projector.by_method(x, layer, local), pixels


def _measure(
    projector: Projector, images: Sequence, layer: str, units: list[tuple[int, int, int, int]]
) -> EffectiveField | None:
    """The effective field of a layer, from some of these units, if possible those that see no
    padding."""
    chosen = np.linspace(0, len(units) - 1, min(MEASURED, len(units))).round().astype(int)
    ranked = [RankedUnit(0, 0, 0, units[index]) for index in chosen.tolist()]
    ranked.sort(key=lambda one: one.unit)
    everywhere, inside = [], []
    for _, projections, _ in _projections(projector, images, layer, ranked):
        for projection in projections.values():
            everywhere.append((projection.images, projection.fields))
            whole = (projection.boxes == projection.fields).all(1)
            if whole.any():
                inside.append((projection.images[whole], projection.fields[whole]))
    return effective_field(inside or everywhere)


def _windows(
    fields: Tensor,
    image: tuple[int, int],
    effective: EffectiveField | None,
    shape: tuple[int, int] | None,
) -> Tensor:
    """(U, 4): the `windows_of` units, in the proportions of the other tiles of the layer.

    shape: (h, w) of these. A box of other proportions, in an image of another size, is widened,
    since tiles must not be squashed.
    """
    boxes = windows_of(fields, image, effective)
    if shape is None or not len(boxes):
        return boxes
    sides = boxes[0, 2:] - boxes[0, :2]
    scale = float((sides.double() / torch.tensor(shape)).max())
    wider = (torch.tensor(shape).double() * scale).round().long().maximum(sides)
    corners = boxes[:, :2] - (wider - sides) // 2
    # The tiles themselves may have been reduced to whole pixels.
    fits = (wider - sides).abs().max() <= 1
    return boxes if fits else torch.cat([corners, corners + wider], 1)


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
    layer: str, maps: list[int], k: int, part: _Part, effective: EffectiveField | None
) -> TopProjections:
    """Arrays for k projections of each map; part: some of them, for their size."""
    planes, *tile = next(iter(part.tiles.values())).shape[1:]
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
        tiles={method: np.zeros((*shape, planes, *size), dtype=np.int8) for method in part.tiles},
        patches=np.full((*shape, 3, *size), 128, dtype=np.uint8),
        checkerboard=numbers.copy(),
        scale=scale,
        effective=effective,
        reports={method: projection.report for method, projection in part.projections.items()},
    )


def _fill(result: TopProjections, part: _Part) -> None:
    """Write the projections of some units into the result."""
    size, first = result.patches.shape[3:], part.first
    pixels = 255 * _reduced(part.patches.float().cpu(), size)
    patches = pixels.round().clamp(0, 255).byte().numpy()
    tiles = {
        method: _as_bytes(_reduced(tile.float().cpu(), size)) for method, tile in part.tiles.items()
    }
    uneven = [overlap for overlap in first.report.uneven if all(overlap.period)]
    # Among several patterns, the finest is the most visible.
    boards = checkerboard(first.tiles(), uneven[-1].period) if uneven else None
    border = (first.boxes != first.fields).any(1)
    for index, ranked in enumerate(part.units):
        at = ranked.row, ranked.rank
        for method in tiles:
            result.tiles[method][at] = tiles[method][index]
        result.patches[at] = patches[index]
        result.units[at] = ranked.unit
        result.boxes[at] = first.boxes[index].numpy()
        result.windows[at] = part.windows[index].numpy()
        result.border[at] = bool(border[index])
        result.values[at] = float(first.values[index])
        if boards is not None:
            result.checkerboard[at] = float(boards[index])


def _as_bytes(tiles: Tensor) -> np.ndarray:
    """Tiles (U, C, h, w) in int8: 127 is the magnitude that at most one in a thousand of the
    non-zero values of the tile exceeds."""
    parts = []
    for tile in tiles:
        magnitudes = tile[tile != 0].abs().sort().values
        last = math.ceil((1 - CLIPPED) * len(magnitudes)) - 1
        scale = magnitudes[last] if len(magnitudes) else tile.new_ones(())
        parts.append((127 * (tile / scale).clamp(-1, 1)).round().to(torch.int8))
    return torch.stack(parts).numpy()


def _count(result: TopProjections | None, row: int) -> int:
    return 0 if result is None else result.count(row)


def _drop_repetitions(result: TopProjections) -> None:
    """Drop activations whose patches look like that of a stronger one of the map."""
    for row in range(len(result.maps)):
        kept = _distinct(result.patches[row, : result.count(row)])
        if len(kept) == result.count(row):
            continue
        for name, value in EMPTY.items():
            _keep(getattr(result, name)[row], kept, value)
        for tiles in result.tiles.values():
            _keep(tiles[row], kept, 0)


def _distinct(patches: np.ndarray) -> list[int]:
    """The indices of patches (n, 3, h, w) that look like none before them."""
    kept: list[int] = []
    # Every second pixel is enough.
    pixels = patches[..., ::2, ::2].astype(np.int16)
    for index in range(len(patches)):
        differences = np.abs(pixels[kept] - pixels[index]).mean((1, 2, 3))
        if not (differences < SAME).any():
            kept.append(index)
    return kept


def _keep(array: np.ndarray, kept: list[int], empty: float) -> None:
    """Move the kept entries of an array (k, ...) to its front."""
    array[: len(kept)] = array[kept]
    array[len(kept) :] = empty


def _reduced(tiles: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(tiles.shape[2:]) == tuple(size):
        return tiles
    return F.interpolate(tiles, size, mode="bilinear", antialias=True)


def _check_values(part: _Part, expected: np.ndarray) -> None:
    """Raise ValueError unless the activations have the magnitudes of the search.

    expected: (M, places), the table of activations.
    """
    magnitudes = part.first.values.detach().cpu().abs().double()
    values = torch.tensor([float(expected[ranked.row, ranked.place]) for ranked in part.units])
    error = (magnitudes - values.double().abs()).abs()
    wrong = error > TOLERANCE * magnitudes.max()
    if wrong.any():
        index = int(wrong.nonzero()[0, 0])
        image, map, *_ = part.units[index].unit
        raise ValueError(
            f"image {image}: map {map} responds with {float(magnitudes[index]):.4g}, but with "
            f"{float(values[index]):.4g} in the search: the data set must return the same images "
            "again, neither shuffled nor augmented"
        )
