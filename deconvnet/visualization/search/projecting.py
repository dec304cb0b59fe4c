"""Projects the strongest activations of a layer, and cuts out the image patches at their positions.

The search stores positions, not pictures: the images are read again here, and memory holds only
tiles. The tiles of a layer show its effective field.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deconvnet.visualization.projection.boxes import crop
from deconvnet.visualization.projection.effective_field import (
    EffectiveField,
    effective_field,
    windows_of,
)
from deconvnet.visualization.projection.projection import Projection
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.near_duplicates import SIDE, surroundings
from deconvnet.visualization.search.projection_table import (
    ProjectedUnits,
    RankedUnit,
    Table,
    drop_repetitions,
    empty_table,
    fill_in,
    finished,
)
from deconvnet.visualization.search.top_activations import (
    Progress,
    TopActivations,
    get_image,
    group_by_size,
)
from deconvnet.visualization.search.top_projections import TopProjections

# Units to project at a time: each projection is as large as the input.
CHUNK = 32
# An activation must equal that of the search, up to this fraction of the largest value.
TOLERANCE = 1e-2
# Units whose projections measure the effective field.
MEASURED = 32
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
    full_size: bool = True,
    near_duplicates: bool = False,
    progress: Progress | None = None,
) -> TopProjections:
    """Project the strongest activations of these maps (by default all), each separately.

    images: the data set that was searched. k: activations of each map, by default as many as the
    table has; an activation whose patch looks like that of a stronger one (`near_duplicates`) is
    replaced by the next in the table, unless near_duplicates=True. counts: the same for each map,
    if they differ; at most k. window: what tiles show: effective, the box that holds 95% of the
    mean energy of the projections of the layer; field, the whole receptive field; or a box that was
    measured before. full_size: whether to keep projections that are larger than tiles in their full
    size.

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
    table, done = None, 0
    around = np.zeros((len(maps), k, SIDE, SIDE), np.float32)
    while True:
        missing = [count - _count(table, row) for row, count in enumerate(wanted)]
        units = [
            RankedUnit(row, _count(table, row) + place, *candidates[row].pop(0))
            for row, count in enumerate(missing)
            for place in range(min(count, len(candidates[row])))
        ]
        if not units:
            return finished(table)
        total = done + len(units)
        for part in _project(task, units, table):
            _check_values(part, expected)
            table = table or empty_table(layer, maps, k, part, task.effective, full_size)
            fill_in(table, part)
            around[[r.row for r in part.units], [r.rank for r in part.units]] = part.around
            done += len(part.units)
            if progress:
                progress(done, total)
        if near_duplicates:
            return finished(table)
        drop_repetitions(table, around)


class _Task(NamedTuple):
    """What units are projected from, and the box that tiles show; None: the receptive field."""

    projector: Projector
    images: Sequence
    layer: str
    effective: EffectiveField | None


def _project(task: _Task, units: list[RankedUnit], table: Table | None) -> Iterator[ProjectedUnits]:
    """Project units, some images and some units at a time; table: for the shape of its tiles."""
    units = sorted(units, key=lambda ranked: ranked.unit[0])
    shape = None if table is None else table.result.patches.shape[3:]
    for chunk, projections, pixels in _projections(task.projector, task.images, task.layer, units):
        first = next(iter(projections.values()))
        windows = _windows(first.fields, tuple(first.images.shape[2:]), task.effective, shape)
        top, left, bottom, right = windows[0].tolist()
        shape = shape or (bottom - top, right - left)
        tiles = {
            # One plane is enough for grey pictures.
            method: task.projector.signed_rgb(crop(projection.images, windows))[
                :, : 1 if projection.images.shape[1] == 1 else 3
            ]
            for method, projection in projections.items()
        }
        shown = task.projector.shown(pixels)
        shown = shown[first.units[:, 0]]
        patches = crop(shown, windows, fill=0.5)
        around = surroundings(shown, windows)
        yield ProjectedUnits(chunk, projections, windows, tiles, patches, around)


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


def _count(table: Table | None, row: int) -> int:
    return 0 if table is None else table.count(row)


def _check_values(part: ProjectedUnits, expected: np.ndarray) -> None:
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
