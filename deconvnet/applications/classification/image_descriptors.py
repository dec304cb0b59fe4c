"""The patch descriptors of one image in one layer of a network.

The maps of layer 1 have the same meaning in all images, so their patches are described directly.
The maps of upper layers depend on switches, which differ from image to image, so they cannot be
compared. Instead, the strongest activations of an image are projected separately to the maps of
layer 1, and the patches of each projection are described (Zeiler et al. 2011).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.applications.classification.descriptors import descriptors
from deconvnet.applications.classification.picture_maps import (
    crop_to_frame,
    picture_frame,
    picture_maps,
)
from deconvnet.applications.classification.settings import FeatureSettings
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.linear import LinearOperator, Scaling
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.projection.feature_projection import layer_field

# Activations projected at a time, which bounds memory.
ACTIVATIONS_AT_A_TIME = 16


@dataclass(frozen=True)
class PatchDescriptors:
    """Patches of one size of one image.

    patch: their side in pixels. d: (P, D) descriptors. positions: (P, 2) centres, row and column in
    [0, 1) of the picture. weights: (P,); those of the patches of one activation sum to 1.
    """

    patch: int
    d: Tensor
    positions: Tensor
    weights: Tensor


def image_descriptors(
    net: DeconvNet, codes: Codes, image: int, layer: int, settings: FeatureSettings
) -> Iterator[PatchDescriptors]:
    """The descriptors of one image of the codes in a layer, for each patch size in turn.

    Layer 1, and upper layers with upper="maps": all patches over the picture, of weight 1 in total.
    patch and step are in pixels; in maps of stride s they are rounded to positions s pixels apart.
    Upper layers with upper="project": only the patches in which a projected activation is non-zero,
    for several batches of activations.
    """
    if layer == 1 or settings.upper == "maps":
        z, stride = picture_maps(net, codes, image, layer), _stride(net, layer)
        yield from (_describe_all(z, patch, settings, stride) for patch in settings.patch)
        return
    frame = picture_frame(codes, image)
    for z in project_strongest(net, codes, image, layer, settings.strongest):
        z = crop_to_frame(z, net, 1, frame)
        yield from (_describe_non_zero(z, patch, settings) for patch in settings.patch)


@plain
def project_strongest(
    net: DeconvNet, codes: Codes, image: int, layer: int, count: int
) -> Iterator[Tensor]:
    """The strongest |z_l| of an image, each projected separately to the maps of layer 1.

    Yields (up to ACTIVATIONS_AT_A_TIME, K, H, W), strongest first, `count` in total or as many as
    are non-zero (Zeiler et al. 2011, classification).
    """
    z = codes.layer(layer).select(slice(image, image + 1)).z[0]
    values = z.flatten()
    order = values.abs().topk(min(count, values.numel())).indices
    order = order[values[order] != 0]
    for indices in order.split(ACTIVATIONS_AT_A_TIME) if len(order) else ():
        isolated = z.new_zeros(len(indices), *z.shape)
        rows = torch.arange(len(indices), device=z.device)
        isolated.flatten(1)[rows, indices] = values[indices]
        yield projection_to_layer_1(net, codes, layer, torch.full_like(indices, image))(isolated)


def projection_to_layer_1(
    net: DeconvNet, codes: Codes, layer: int, images: Tensor
) -> LinearOperator:
    """U_1 S_2 F_2 U_2 ... S_l F_l: maps of layer l >= 2 -> maps of layer 1, R_l without F_1.

    images: (M,), for each of M maps the image of the codes whose switches are used.
    """
    if layer < 2:
        raise ValueError(f"layer={layer}: only layers from 2 up are projected to layer 1")
    operator = net.layer(1).unpooling(codes.layer(1), images)
    for level in range(2, layer + 1):
        painting = net.layer(level).painting(codes.layer(level), images)
        operator = operator @ Scaling(float(net.layer(level).scale)) @ painting
        if level < layer:
            unpooling = net.layer(level).unpooling(codes.layer(level), images)
            operator = operator @ unpooling
    return operator


def _describe_all(
    z: Tensor, patch: int, settings: FeatureSettings, stride: int
) -> PatchDescriptors:
    """All patches over maps (1, K, H, W) that are cropped to the picture.

    stride: pixels from one position of the maps to the next.
    """
    cells = settings.cells
    side = max(1, round(patch / cells / stride)) * cells
    step = max(1, round(settings.step / stride))
    d, positions = _describe(z, side, step, settings)
    return _chosen(patch, d, positions, torch.ones_like(d[..., 0], dtype=torch.bool))


def _describe_non_zero(z: Tensor, patch: int, settings: FeatureSettings) -> PatchDescriptors:
    """The non-zero patches over projected activations (M, K, H, W)."""
    d, positions = _describe(z, patch, settings.projected_step, settings)
    return _chosen(patch, d, positions, (d != 0).any(2))


def _describe(z: Tensor, side: int, step: int, settings: FeatureSettings) -> tuple[Tensor, Tensor]:
    """Descriptors (M, P, D) of all patches of maps (M, K, H, W), and their positions (M, P, 2)."""
    d = descriptors(z, patch=side, cells=settings.cells, step=step, strength=settings.strength)
    M, rows, columns, _ = d.shape
    i, j = (
        ((torch.arange(n, device=z.device) * step + side / 2) / max(length, side))
        for n, length in ((rows, z.shape[2]), (columns, z.shape[3]))
    )
    positions = torch.stack(torch.meshgrid(i, j, indexing="ij"), -1).flatten(0, 1)
    return d.flatten(1, 2), positions.expand(M, -1, -1)


def _chosen(patch: int, d: Tensor, positions: Tensor, mask: Tensor) -> PatchDescriptors:
    """The patches of a mask (M, P), weighted such that each of M maps has the same total weight."""
    weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
    return PatchDescriptors(patch, d[mask], positions[mask], weights[mask])


def _stride(net: DeconvNet, layer: int) -> int:
    return max(layer_field(net, layer, axis).stride for axis in (0, 1))
