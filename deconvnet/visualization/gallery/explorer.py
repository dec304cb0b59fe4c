"""The images of the explorer: what each layer makes of one image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.decoding import shown_name
from deconvnet.network.metrics import snr
from deconvnet.operators.pooling import max_pool
from deconvnet.visualization.drawing.canvas import (
    quantile_magnitude,
    shade_projections,
    shade_signed,
)
from deconvnet.visualization.gallery.exhibits import GalleryImage, ImageLayer, Part
from deconvnet.visualization.gallery.repainting import repainting
from deconvnet.visualization.projection.boxes import crop
from deconvnet.visualization.projection.effective_field import windows_of
from deconvnet.visualization.projection.feature_projection import signed_rgb
from deconvnet.visualization.result import VisualizationResult

# For each image, and each layer.
SHOWN_PARTS = 12
SHOWN_MAPS = 12
# Larger maps are reduced to this side by max pooling.
MAP_SIDE = 120


def explorer_image(
    result: VisualizationResult, number: int, *, repainted: bool = True
) -> GalleryImage:
    """One image of the data set in all layers of a result.

    repainted: whether the reconstructions of a deconvolutional network can be repainted.
    """
    pixels = result.images[number]
    layers = [_image_layer(result, pixels, layer, repainted) for layer in result.projections]
    name = shown_name(Path(result.images.names[number]).name)
    return GalleryImage(name, result.shown_images[number], layers, photograph=number)


def _image_layer(
    result: VisualizationResult, pixels: Tensor, layer: str, repainted: bool
) -> ImageLayer:
    """One image in one layer: reconstruction, strongest maps, strongest activations."""
    projector = result.projector
    x = projector.prepare(pixels[None])
    strength = projector.responses(x, [layer])[layer][0].cpu().float()
    peaks, positions = strength.flatten(1).max(1)
    order = peaks.argsort(descending=True, stable=True)[:SHOWN_MAPS]
    order = order[peaks[order] > 0]
    if projector.is_deconvnet:
        units = _strongest_units(strength)
    else:
        # Neighbours in one map would look almost the same: take the strongest of each map.
        W = strength.shape[2]
        units = [(0, k, int(positions[k]) // W, int(positions[k]) % W) for k in order.tolist()]
    parts = []
    if units:
        projection = projector(x, layer, units)
        effective = result.projections[layer].effective
        boxes = windows_of(projection.fields, tuple(x.shape[2:]), effective)
        tiles = projector.signed_rgb(crop(projection.images, boxes)).cpu()
        parts = [
            Part(unit[1], float(value), picture, box=box.tolist())
            for unit, value, picture, box in zip(
                units,
                projection.values,
                shade_projections(tiles, contrast=result.contrast),
                boxes,
                strict=True,
            )
        ]
    # Nine in ten of the active positions in the shown maps are below white.
    white = float(quantile_magnitude(strength[order].clamp(min=0)[None], 0.9))
    maps = [(k, _map_picture(strength[k], white)) for k in order.tolist()]
    if not projector.is_deconvnet:
        return ImageLayer(layer, maps=maps, parts=parts)
    return _with_reconstruction(result, x, ImageLayer(layer, maps=maps, parts=parts), repainted)


def _strongest_units(strength: Tensor) -> list[tuple[int, int, int, int]]:
    _, H, W = strength.shape
    values, order = strength.flatten().sort(descending=True, stable=True)
    order = order[:SHOWN_PARTS][values[:SHOWN_PARTS] > 0].tolist()
    return [(0, n // (H * W), n // W % H, n % W) for n in order]


def _map_picture(z: Tensor, white: float) -> Tensor:
    """A map (H, W) as a picture (3, h, w): black is zero or below; large maps are max-pooled."""
    z = z[None, None].clamp(min=0)
    while max(z.shape[2:]) > MAP_SIDE:
        z = max_pool(z, (1, 2, 2))[0]
    return (z[0] / max(white, 1e-12)).clamp(0, 1).expand(3, -1, -1)


def _with_reconstruction(
    result: VisualizationResult, x: Tensor, shown: ImageLayer, repainted: bool
) -> ImageLayer:
    """The same with the reconstruction by a layer of a deconvolutional network."""
    net, number = result.projector.model, int(shown.name.removeprefix("layer"))
    codes = result.projector.backend.codes(x, number)
    reconstruction = net.synthesize(codes, number)
    white = 3 * codes.y.std().clamp(min=1e-12)
    facts = {
        "SNR": f"{snr(codes.y, reconstruction):.1f} dB",
        "non-zero": f"{codes.layer(number).density:.2%} of z",
    }
    picture = shade_signed(signed_rgb(net, reconstruction), white)[0].cpu()
    # In low layers, too many activations paint too little each.
    repainted = repainted and number >= net.depth - 1 and (number > 1 or net.depth == 1)
    repainted = repainted and bool(torch.count_nonzero(codes.layer(number).z))
    return ImageLayer(
        shown.name,
        picture,
        facts,
        shown.maps,
        shown.parts,
        repainting(net, codes, number) if repainted else None,
    )
