"""The evolution of a layer of any network, from several checkpoints of its training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from deconvnet.monitoring.strongest_activations import Peaks
from deconvnet.visualization.evolution.evolution import (
    Evolution,
    bounding_region,
    crop_boxes,
    evenly_spaced,
    evolution_of_epoch,
    field_boxes,
    join_evolutions,
)
from deconvnet.visualization.projection.feature_projection import tile_size
from deconvnet.visualization.projection.projector import Projector

# Images at a time: more are slower because their maps no longer fit into the cache.
CHUNK = 8
# Maps by default.
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
    """Project the strongest activations of a layer on these images, at several checkpoints.

    projectors: one per checkpoint, in order; a generator keeps only one of them in memory. x:
    images (N, C, H, W) in the input space of the networks, or a data set of images (3, H, W) in
    [0, 1] or pairs (image, label). maps: numbers of maps, by default 16 evenly spaced ones. epochs:
    the number of each checkpoint, by default 1, 2, ... inside: prefer units whose receptive field
    lies inside the image; always true for deconvolutional networks (`plan_snapshots`).
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
    """The evolution of one epoch, for the network of this projector."""
    peaks = None
    for images in torch.arange(len(x)).split(CHUNK):
        batch = _images(projector, x, images)
        # A unit below zero is not active: a rectifier may follow.
        z = projector.responses(batch, [layer])[layer].clamp(min=0)
        if z.isnan().any():
            raise ValueError(f"layer {layer}: its responses at checkpoint {epoch} are not numbers")
        if peaks is None:
            numbers = _map_numbers(maps, z.shape[1], layer)
            peaks, preferred = Peaks.none(z[:, numbers]), (0, z.shape[2], 0, z.shape[3])
            if inside or projector.is_deconvnet:
                (info,) = (info for info in projector.layers(batch) if info.name == layer)
                preferred = bounding_region(info.inside(tuple(batch.shape[2:])))
        peaks = peaks.updated(z[:, numbers], images.to(z.device), preferred)
    alive = (peaks.images >= 0).cpu()
    units = torch.stack(
        [peaks.images.cpu(), torch.tensor(numbers), peaks.rows.cpu(), peaks.columns.cpu()], 1
    )
    tiles, boxes, values = [], [], []
    for part in units.clamp(min=0).split(CHUNK):
        images, n = part[:, 0].unique(return_inverse=True)
        batch = _images(projector, x, images)
        projection = projector(batch, layer, torch.cat([n[:, None], part[:, 1:]], 1))
        top, left, bottom, right = projection.fields.cpu().unbind(1)
        field = tile_size(int((bottom - top).max()), int((right - left).max()))
        part_boxes, size = field_boxes(part[:, 0], top, left, field, projection.images.shape[2:])
        tiles += crop_boxes(projector.signed_rgb(projection.images).cpu(), part_boxes, size)
        boxes.append(part_boxes)
        values.append(projection.values.cpu())
    tiles, boxes, values = torch.stack(tiles), torch.cat(boxes), torch.cat(values)
    boxes[~alive, 0] = -1
    return evolution_of_epoch(
        epoch, numbers, tiles * alive.view(-1, 1, 1, 1), boxes, values * alive
    )


def _images(projector: Projector, x: Tensor | Sequence, indices: Tensor) -> Tensor:
    """Images by their indices, in the input space of the network."""
    if isinstance(x, Tensor):
        return x[indices.to(x.device)].to(projector.device)
    items = (x[index] for index in indices.tolist())
    images = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            "x: images of different sizes; expected one size, such as lazy_images with a crop"
        )
    return projector.prepare(torch.stack(images))


def _map_numbers(maps: Sequence[int] | None, count: int, layer: str) -> list[int]:
    if maps is None:
        return evenly_spaced(count, MAPS)
    invalid = [k for k in maps if not 0 <= k < count]
    if invalid or not len(maps):
        raise ValueError(f"maps={list(maps)}: layer {layer} has maps 0 to {count - 1}")
    return list(maps)
