"""The evolution of a layer of a deconvolutional network, recorded while the layer learns.

Recording needs no inference beyond that of learning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.monitoring.strongest_activations import Snapshot, SnapshotPlan
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.convolution import deconvolve, map_size
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.evolution.evolution import (
    Evolution,
    bounding_region,
    crop_boxes,
    evolution_of_epoch,
    field_boxes,
)
from deconvnet.visualization.projection.feature_projection import (
    layer_field,
    signed_rgb,
    tile_size,
)

# The columns of figure 4.
EPOCHS = (1, 2, 5, 10, 20, 30, 40, 64)
# Filters to project at a time.
CHUNK = 8


def shown_epochs(epochs: int) -> tuple[int, ...]:
    """The epochs of a layer to show: those of figure 4 that it reaches, and its last."""
    return (*(epoch for epoch in EPOCHS if epoch < epochs), epochs)


def plan_snapshots(net: DeconvNet, codes: Codes, layer: int) -> SnapshotPlan:
    """Plan the snapshots of a layer that learns on these codes: after `shown_epochs`, preferring
    activations whose receptive field lies inside the image.

    At the border most of a feature is cut off, and activations are large to compensate.
    """
    rows, columns = (
        torch.tensor([a >= 0 and b <= size for a, b in map(field.pixels, range(length))])
        for field, length, size in zip(
            (layer_field(net, layer, axis) for axis in (0, 1)),
            _map_size(net, codes, layer),
            codes.y.shape[2:],
            strict=True,
        )
    )
    epochs = shown_epochs(net.layer(layer).settings.learning.epochs)
    return SnapshotPlan(epochs, bounding_region(rows[:, None] & columns))


@plain
def project_snapshot(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    snapshot: Snapshot,
    images: Tensor | None = None,
) -> Evolution:
    """Project a snapshot: the strongest activation of every map, with sign and unit magnitude.

    codes: of the layers below. images: the indices of the images of the codes, in ascending order,
    which include those of the snapshot; None if the codes are of all images. Each activation is
    projected with the switches of its own image. The result has one epoch.
    """
    peaks, f = snapshot.peaks, snapshot.filters
    boundary, shape = net.layer(layer).settings.boundary, _map_size(net, codes, layer)
    rows, columns = (layer_field(net, layer, axis) for axis in (0, 1))
    top, left = (
        rows.offset + rows.stride * peaks.rows,
        columns.offset + columns.stride * peaks.columns,
    )
    field = tile_size(rows.size, columns.size)
    boxes, size = field_boxes(peaks.images, top, left, field, codes.y.shape[2:])
    # The projection of a map that was not active is zero, whatever the switches.
    images = torch.arange(len(codes.y)) if images is None else images
    indices = torch.searchsorted(images.to(f.device), peaks.images).clamp(max=len(images) - 1)
    tiles = []
    for maps in torch.arange(len(f), device=f.device).split(CHUNK):
        reconstructed = []
        for k in maps:
            z = f.new_zeros(1, 1, *shape)
            z[..., peaks.rows[k], peaks.columns[k]] = peaks.values[k].sign()
            reconstructed.append(deconvolve(z, f[k : k + 1], boundary=boundary))
        y = net.decoder(codes, layer, indices[maps])(torch.cat(reconstructed))
        tiles += crop_boxes(y, boxes[maps], size)
    return evolution_of_epoch(
        snapshot.epoch, range(len(f)), signed_rgb(net, torch.stack(tiles)), boxes, peaks.values
    )


def _map_size(net: DeconvNet, codes: Codes, layer: int) -> tuple[int, int]:
    """(H, W) of the maps of a layer on top of these codes."""
    below = codes.y if layer == 1 else codes.layer(layer - 1).pooled
    settings = net.layer(layer).settings
    return map_size(tuple(below.shape[2:]), settings.filter_shape, settings.boundary)
