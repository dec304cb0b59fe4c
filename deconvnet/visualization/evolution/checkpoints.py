"""The features of a layer of any network, at several checkpoints of its training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from deconvnet.monitoring.peaks import Peaks
from deconvnet.visualization.evolution.evolution import (
    Evolution,
    bounding_region,
    crop_boxes,
    evenly_spaced,
    evolution_of_epoch,
    join_evolutions,
    square_boxes,
)
from deconvnet.visualization.projection.projector import Projector

# Images at a time: more are slower because their maps no longer fit into the cache.
CHUNK = 8
MAPS = 16


def project_checkpoints(
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
    return join_evolutions(columns)


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
                first = bounding_region(info.inside(tuple(some.shape[2:])))
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
        boxes.append(square_boxes(part[:, 0], top, left, side, found.images.shape[2:]))
        tiles += crop_boxes(projector.signed_rgb(found.images).cpu(), boxes[-1])
        values.append(found.values.cpu())
    tiles, boxes, values = torch.stack(tiles), torch.cat(boxes), torch.cat(values)
    boxes[~alive, 0] = -1
    return evolution_of_epoch(epoch, chosen, tiles * alive.view(-1, 1, 1, 1), boxes, values * alive)


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
        return evenly_spaced(count, MAPS)
    wrong = [k for k in maps if not 0 <= k < count]
    if wrong or not len(maps):
        raise ValueError(f"maps={list(maps)}: layer {layer} has maps 0 to {count - 1}")
    return list(maps)
