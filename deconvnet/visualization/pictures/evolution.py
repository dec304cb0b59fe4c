"""Features in the course of training: what every map looked like after some of the epochs.

A row for every map, a column for every epoch, and in each place the strongest activation that the
map then had over all images, projected to pixel space (Zeiler and Fergus 2014, figure 4). A sudden
jump in a row need not be a change of the feature: another image may have won, which is recorded.

A layer of our own is followed while it learns, at no inference beyond that of learning (`Peaks`,
`project_snapshot`); of any network there are its checkpoints (`evolution`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deconvnet.monitoring.peaks import Peaks, Region, Snapshot, Watch
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.storage import formats
from deconvnet.storage.ownership import NotOurs
from deconvnet.support.modes import plain
from deconvnet.visualization.pictures.canvas import (
    GAP,
    LINE,
    PAGE,
    below,
    beside,
    reach,
    resized,
    sheet,
    signed_rgb,
    symmetric,
    text,
    titled,
)
from deconvnet.visualization.pictures.features import cut_square, layer_field

if TYPE_CHECKING:
    from deconvnet.visualization.projection.projector import Projector

log = logging.getLogger(__name__)

# The columns of figure 4.
EPOCHS = (1, 2, 5, 10, 20, 30, 40, 64)
# Images at a time: more are slower, their maps no longer being in the cache.
CHUNK = 8
SHOWN_MAPS = 16
# The picture: rows in a block, about the width of a tile and the most, width of a map's name.
BLOCK = 8
TILE = 84
LARGEST = 112
LABEL = 62


@dataclass(frozen=True)
class Evolution:
    """The strongest activations of some maps after some epochs, in pixel space.

    tiles: (E, K, C, S, S) the projections, each cut to its field or to the image if that is
    smaller; signed, grey (C = 1) or red, green, blue; zeros where the map was not active.
    epochs: (E,). maps: (K,) their numbers, from 0. boxes: (E, K, 4) image, top, left, side S in
    pixels, as in `Features`; image -1 where the map was not active. values: (E, K) the activations.
    """

    tiles: Tensor
    epochs: tuple[int, ...]
    maps: tuple[int, ...]
    boxes: Tensor
    values: Tensor

    @property
    def images(self) -> Tensor:
        """(E, K): the image of each tile, -1 for none."""
        return self.boxes[..., 0]

    def head(self, count: int) -> Evolution:
        """The first columns alone."""
        chosen = {key: value[:count] for key, value in vars(self).items() if key != "maps"}
        return replace(self, **chosen)

    def save(self, path: Path) -> None:
        """Write it to an .npz file, whole or not at all: tiles with eleven bits of precision, the
        rest exactly."""
        # Projections of deep networks can be beyond the range of float16: each in units of its own.
        units = self.tiles.float().flatten(2).abs().amax(2)
        units[units == 0] = 1
        arrays = {
            "tiles": (self.tiles.float() / units[..., None, None, None]).half().cpu().numpy(),
            "units": units.cpu().numpy(),
            "epochs": np.array(self.epochs),
            "maps": np.array(self.maps),
            "boxes": self.boxes.cpu().numpy(),
            "values": self.values.cpu().numpy(),
        }
        formats.save_arrays(path, arrays)


def load_evolution(path: str | Path) -> Evolution:
    """What `Evolution.save` wrote; ValueError where the file is anything else."""
    try:
        found = formats.load_arrays(path)
        tiles, units, boxes, values = (
            torch.from_numpy(found[name]) for name in ("tiles", "units", "boxes", "values")
        )
        epochs, maps = (tuple(found[name].tolist()) for name in ("epochs", "maps"))
        if not tiles.shape[:2] == values.shape == boxes.shape[:2] == (len(epochs), len(maps)):
            raise ValueError("its arrays do not fit together")
        return Evolution(tiles.float() * units[..., None, None, None], epochs, maps, boxes, values)
    except OSError as error:
        reason = error.strerror or "damaged"
        raise ValueError(f"{path}: {reason}; choose a file of features over epochs") from error
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds
        raise ValueError(
            f"{path}: damaged or not a file of features over epochs ({error})"
        ) from error


def joined(parts: Sequence[Evolution]) -> Evolution:
    """The columns of several evolutions of the same maps as one."""
    maps, shape = parts[0].maps, parts[0].tiles.shape[1:]
    for part in parts:
        if (part.maps, part.tiles.shape[1:]) != (maps, shape):
            raise ValueError(
                f"epoch {part.epochs[0]} has {len(part.maps)} maps in tiles of "
                f"{tuple(part.tiles.shape[2:])}, epoch {parts[0].epochs[0]} {len(maps)} in tiles "
                f"of {tuple(shape[1:])}: expected checkpoints of one network and images of one size"
            )
    tiles, boxes, values = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("tiles", "boxes", "values")
    )
    return Evolution(tiles, tuple(e for part in parts for e in part.epochs), maps, boxes, values)


# A layer of our own, while it learns


def shown_epochs(epochs: int) -> tuple[int, ...]:
    """Which epochs of a layer are shown: those of figure 4 that it reaches, and its last."""
    return (*(epoch for epoch in EPOCHS if epoch < epochs), epochs)


def layer_watch(net: DeconvNet, codes: Codes, layer: int) -> Watch:
    """The watch for a layer that is to learn on top of these codes: in `shown_epochs`, and first
    where the whole field of an activation lies inside the image.

    At the border most of a feature is cut off, and activations are large to make up for it.
    """
    rows, columns = (
        torch.tensor([a >= 0 and b <= size for a, b in map(field.pixels, range(places))])
        for field, places, size in zip(
            (layer_field(net, layer, axis) for axis in (0, 1)),
            _map_size(net, codes, layer),
            codes.y.shape[2:],
            strict=True,
        )
    )
    epochs = shown_epochs(net.layer(layer).settings.learning.epochs)
    return Watch(epochs, _region(rows[:, None] & columns))


@plain
def project_snapshot(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    snapshot: Snapshot,
    images: Tensor | None = None,
) -> Evolution:
    """One column: the strongest activation of every map, with sign and unit value, in pixel space.

    codes: of the layers below, for the images of these numbers, ascending, among which those of
    the snapshot are; None: for all images. Each activation goes through them with the switches of
    its own image.
    """
    peaks, f = snapshot.peaks, snapshot.filters
    boundary, shape = net.layer(layer).settings.boundary, _map_size(net, codes, layer)
    rows, columns = (layer_field(net, layer, axis) for axis in (0, 1))
    top, left = (
        rows.offset + rows.stride * peaks.rows,
        columns.offset + columns.stride * peaks.columns,
    )
    boxes = _boxes(peaks.images, top, left, max(rows.size, columns.size), codes.y.shape[2:])
    # A map that was not active paints nothing, through whatever switches.
    images = torch.arange(len(codes.y)) if images is None else images
    places = torch.searchsorted(images.to(f.device), peaks.images).clamp(max=len(images) - 1)
    tiles = []
    for maps in torch.arange(len(f), device=f.device).split(CHUNK):
        painted = []
        for k in maps:
            one = f.new_zeros(1, 1, *shape)
            one[..., peaks.rows[k], peaks.columns[k]] = peaks.values[k].sign()
            painted.append(deconvolve(one, f[k : k + 1], boundary=boundary))
        y = net.decoder(codes, layer, places[maps])(torch.cat(painted))
        tiles += _tiles(y, boxes[maps])
    return _column(
        snapshot.epoch, range(len(f)), signed_rgb(net, torch.stack(tiles)), boxes, peaks.values
    )


def append(path: Path, column: Evolution) -> None:
    """Write one more column to the file of a layer.

    From its epoch on the file is forgotten: that was left by a run which then went back. A file
    that is damaged, or somebody else's, stays as it is, with a warning.
    """
    known = recorded(path)
    kept = sum(epoch < column.epochs[0] for epoch in known.epochs) if known else 0
    try:
        (joined([known.head(kept), column]) if kept else column).save(path)
    except NotOurs as error:
        log.warning("%s (epoch %s is left out)", error, column.epochs[0])


def recorded(path: Path) -> Evolution | None:
    """What is in the file of a layer; None if there is none or, with a warning, a damaged one."""
    try:
        return load_evolution(path) if path.exists() else None
    except ValueError as error:
        # Some columns of a picture are no reason to stop a training.
        log.warning("%s (its columns are left out)", error)
        return None


def _map_size(net: DeconvNet, codes: Codes, layer: int) -> tuple[int, int]:
    """(H, W) of the maps of a layer on top of these codes."""
    below = codes.y if layer == 1 else codes.layer(layer - 1).pooled
    settings = net.layer(layer).settings
    size = (settings.filter_size, settings.filter_size)
    return map_size(tuple(below.shape[2:]), size, settings.boundary)


# Any network, over its checkpoints


def evolution(
    projectors: Iterable[Projector],
    x: Tensor | Sequence,
    layer: str,
    *,
    maps: Sequence[int] | None = None,
    epochs: Sequence[int] | None = None,
    inside: bool = False,
) -> Evolution:
    """The strongest activations of a layer on some images, at several checkpoints.

    projectors: one for each checkpoint, in their order. Of a generator that loads one after the
    other only one is in memory. x: the images, as the networks take them (N, C, H, W), or a data
    set of images (3, H, W) in [0, 1], alone or as (image, label). maps: which maps, by default 16
    evenly among all. epochs: the number of each checkpoint, by default 1, 2, ... inside: look
    first where the whole field of a unit lies inside the image, as is always done in networks
    learned by deconvolution (`layer_watch`).
    """
    if len(x) == 0:
        raise ValueError("x: no images; expected at least one")
    columns = []
    for number, projector in enumerate(projectors):
        if epochs is not None and number >= len(epochs):
            raise ValueError(f"epochs={list(epochs)}: fewer than there are projectors")
        epoch = number + 1 if epochs is None else epochs[number]
        columns.append(_project_checkpoint(projector, x, layer, maps, epoch, inside))
    if not columns or (epochs is not None and len(columns) < len(epochs)):
        expected = "at least one" if epochs is None else f"one for each of epochs={list(epochs)}"
        raise ValueError(f"{len(columns)} projectors: expected {expected}")
    return joined(columns)


def _project_checkpoint(
    projector: Projector,
    x: Tensor | Sequence,
    layer: str,
    maps: Sequence[int] | None,
    epoch: int,
    inside: bool,
) -> Evolution:
    """One column, of the network as it is in this projector."""
    peaks = None
    for images in torch.arange(len(x)).split(CHUNK):
        some = _images(projector, x, images)
        # Before a rectifier a unit below zero is not active.
        z = projector.responses(some, [layer])[layer].clamp(min=0)
        if z.isnan().any():
            raise ValueError(f"layer {layer}: its responses at checkpoint {epoch} are not numbers")
        if peaks is None:
            chosen = _chosen(maps, z.shape[1], layer)
            peaks, first = Peaks.none(z[:, chosen]), (0, z.shape[2], 0, z.shape[3])
            if inside or projector.is_deconvnet:
                (info,) = (info for info in projector.layers(some) if info.name == layer)
                first = _region(info.inside(tuple(some.shape[2:])))
        peaks = peaks.updated(z[:, chosen], images.to(z.device), first)
    alive = (peaks.images >= 0).cpu()
    units = torch.stack(
        [peaks.images.cpu(), torch.tensor(chosen), peaks.rows.cpu(), peaks.columns.cpu()], 1
    )
    tiles, boxes, values = [], [], []
    for part in units.clamp(min=0).split(CHUNK):
        images, which = part[:, 0].unique(return_inverse=True)
        found = projector(
            _images(projector, x, images), layer, torch.cat([which[:, None], part[:, 1:]], 1)
        )
        top, left, bottom, right = found.fields.cpu().unbind(1)
        side = int(torch.maximum(bottom - top, right - left).max())
        boxes.append(_boxes(part[:, 0], top, left, side, found.images.shape[2:]))
        tiles += _tiles(projector.signed_rgb(found.images).cpu(), boxes[-1])
        values.append(found.values.cpu())
    tiles, boxes, values = torch.stack(tiles), torch.cat(boxes), torch.cat(values)
    boxes[~alive, 0] = -1
    return _column(epoch, chosen, tiles * alive.view(-1, 1, 1, 1), boxes, values * alive)


def _images(projector: Projector, x: Tensor | Sequence, chosen: Tensor) -> Tensor:
    """Some of the images, as the network takes them."""
    if isinstance(x, Tensor):
        return x[chosen.to(x.device)].to(projector.device)
    items = (x[index] for index in chosen.tolist())
    images = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
    if len({image.shape for image in images}) > 1:
        raise ValueError("x: images of different sizes; expected one, as lazy_images with a crop")
    return projector.prepare(torch.stack(images))


def _chosen(maps: Sequence[int] | None, count: int, layer: str) -> list[int]:
    if maps is None:
        return _evenly(count, SHOWN_MAPS)
    wrong = [k for k in maps if not 0 <= k < count]
    if wrong or not len(maps):
        raise ValueError(f"maps={list(maps)}: layer {layer} has maps 0 to {count - 1}")
    return list(maps)


# Pictures


def evolution_picture(e: Evolution, *, maps: int = SHOWN_MAPS) -> Tensor:
    """A picture (3, H, W) in [0, 1]: a row for each map, a column for each epoch.

    Of more maps than `maps` some evenly among all. Each tile is symmetric about grey and in a scale
    of its own. A black line stands where another image won than in the column before.
    """
    if maps < 1:
        raise ValueError(f"maps={maps}: must be at least 1")
    rows = _evenly(len(e.maps), maps)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    page = PAGE // len(blocks) - 4 * GAP
    room = min(LARGEST, (page - LABEL) // len(e.epochs) - GAP)
    count = f"{len(rows)} of {len(e.maps)} maps" if len(rows) < len(e.maps) else f"{len(rows)} maps"
    title = f"{count}, the strongest activation of each epoch; black line: another image won"
    return titled(title, beside([_block(e, some, room) for some in blocks], 4 * GAP))


def _block(e: Evolution, rows: list[int], room: int) -> Tensor:
    """Some rows of the picture, with their maps at the left and the epochs above."""
    tiles, images = e.tiles[:, rows].transpose(0, 1).flatten(0, 1).float(), e.images[:, rows]
    side = tiles.shape[-1]
    width = min(max(1, round(TILE / side)) * side, max(room, 1))
    tiles = resized(symmetric(tiles, reach(tiles)), width)
    page, step = sheet(tiles, len(e.epochs)), tiles.shape[-1] + GAP
    for column, row in (images[1:] != images[:-1]).nonzero().tolist():
        page[:, GAP + row * step : (row + 1) * step, (column + 1) * step + GAP // 2] = 0
    names = [text(f"map {e.maps[row]}", LABEL, step) for row in rows]
    heads = [text(str(epoch), step, LINE) for epoch in e.epochs]
    return beside([below([text("epoch", LABEL, LINE), *names]), below([beside(heads), page])])


# Shared


def _column(
    epoch: int, maps: Iterable[int], tiles: Tensor, boxes: Tensor, values: Tensor
) -> Evolution:
    """An evolution of one epoch, tiles (K, C, S, S), boxes (K, 4), values (K,)."""
    parts = (part.cpu()[None] for part in (boxes, values))
    return Evolution(tiles.cpu()[None], (epoch,), tuple(maps), *parts)


def _boxes(images: Tensor, top: Tensor, left: Tensor, side: int, image: Sequence[int]) -> Tensor:
    """(K, 4) squares around fields of this side, or around the whole image if it is smaller."""
    if side >= max(image):
        top, left, side = torch.zeros_like(top), torch.zeros_like(left), max(image)
    return torch.stack([images, top, left, torch.full_like(top, side)], 1)


def _tiles(images: Tensor, boxes: Tensor) -> list[Tensor]:
    """(C, S, S) each: the box of each image."""
    return [cut_square(y, *box) for y, (_, *box) in zip(images, boxes.tolist(), strict=True)]


def _region(allowed: Tensor) -> Region:
    """The rectangle of the places (H, W) that are allowed; all if none is."""
    ends = []
    for axis in (1, 0):
        inside = allowed.any(axis).nonzero()[:, 0]
        ends += (
            [int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, allowed.shape[1 - axis]]
        )
    return tuple(ends)


def _evenly(count: int, most: int) -> list[int]:
    """Up to `most` of `count` numbers, the same distance apart."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
