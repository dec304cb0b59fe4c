"""The content of the gallery: the result of a visualization as layers, maps, images and captions.

Only the images of the explorer are passed through the network again; everything else is in the
result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.images.decoding import shown_name
from deconvnet.network.metrics import snr
from deconvnet.operators.pooling import max_pool
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.gallery.gallery import (
    Caption,
    GalleryImage,
    GalleryLayer,
    GalleryMap,
    ImageLayer,
    Part,
    write_gallery,
)
from deconvnet.visualization.pictures.canvas import quantile_magnitude, shade_signed
from deconvnet.visualization.pictures.projection_grids import (
    pixel_filters,
    shade_projections,
)
from deconvnet.visualization.projection.feature_projection import signed_rgb
from deconvnet.visualization.projection.projection import LayerInfo, tile_boxes
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.top_activations import Progress

# For each image of the explorer, and each layer.
SHOWN_PARTS = 12
SHOWN_MAPS = 12
# Larger maps are reduced to this side by max pooling.
MAP_SIDE = 120


def write_result_gallery(
    folder: Path,
    result: VisualizationResult,
    *,
    explorer_images: int = 8,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Write the gallery of a result and return the path of its page.

    explorer_images: images in the explorer, spread evenly over all; notes: further paragraphs.
    """
    model, projections = result.model, result.projections
    count = min(explorer_images, len(result.images))
    numbers = np.linspace(0, len(result.images) - 1, count).round().astype(int).tolist()
    steps = itertools.count(1)
    total = sum(len(p.maps) for p in projections.values()) + count

    def step() -> None:
        if progress:
            progress(next(steps), total)

    figures = {
        name: picture for name, picture in result.pictures.items() if name not in projections
    }
    facts = {
        "network": model.name,
        "weights": model.weights,
        "sha256 of its parameters": model.digest,
        "images searched": len(result.images),
        "projection method": result.projector.method,
    }
    return write_gallery(
        folder,
        title=model.name,
        facts=facts,
        layers=(_gallery_layer(result, layer, step) for layer in projections),
        images=(_explorer_image(result, number, step) for number in numbers),
        figures=figures,
        notes=[*(f"{layer}: {p.report}" for layer, p in projections.items()), *notes],
    )


def _gallery_layer(
    result: VisualizationResult, layer: str, step: Callable[[], None]
) -> GalleryLayer:
    info, top = result.infos[layer], result.top_activations[layer]
    projections = result.projections[layer]
    filters = pixel_filters(result.projector)
    is_first = filters is not None and filters[0] == layer.partition("#")[0]
    tiles = shade_signed(filters[1]) if is_first else None
    facts: dict[str, str | float] = {
        "dead maps": int(top.dead.sum()),
        "maps shown": len(projections.maps),
        "active positions": f"{top.density_sum.mean() / top.num_images:.2%}",
    }
    boards = projections.checkerboard[np.isfinite(projections.checkerboard)]
    if len(boards):
        facts["checkerboard (median)"] = f"{np.median(boards):.2f}"
    return GalleryLayer(
        layer,
        layer,
        (_gallery_map(result, layer, row, tiles, step) for row in range(len(projections.maps))),
        kind=_kind(result, info),
        shape=info.shape,
        field=info.field,
        stride=info.stride,
        facts=facts,
    )


def _kind(result: VisualizationResult, info: LayerInfo) -> str:
    if not result.projector.is_deconvnet:
        return info.kind
    number = int(info.name.removeprefix("layer"))
    size = result.projector.model.layer(number).settings.filter_size
    return f"deconvolution, {size}x{size} filters"


def _gallery_map(
    result: VisualizationResult,
    layer: str,
    row: int,
    filters: Tensor | None,
    step: Callable[[], None],
) -> GalleryMap:
    projections, top = result.projections[layer], result.top_activations[layer]
    names, contrast = result.images.names, result.contrast
    count, number = projections.count(row), int(projections.maps[row])
    tiles = projections.tiles[projections.methods[0]]
    captions = []
    for (image, _, i, j), value in zip(
        projections.units[row, :count].tolist(),
        projections.values[row, :count].tolist(),
        strict=True,
    ):
        captions.append(Caption(Path(names[image]).name, value, f"unit at row {i}, column {j}"))
    control = result.control.get(layer)
    statistics = {
        "strongest activation": float(np.abs(projections.values[row, 0])),
        "mean of the strongest per image": float(top.peak_sum[number] / top.num_images),
        "active in images, %": 100 * float(top.active_images[number] / top.num_images),
        "active positions, %": 100 * float(top.density_sum[number] / top.num_images),
    }
    e = result.evolutions.get(layer)
    has_evolution = e is not None and number in e.maps
    step()
    return GalleryMap(
        number,
        shade_projections(tiles[row, :count], contrast=contrast),
        torch.from_numpy(projections.patches[row, :count]).float() / 255,
        captions,
        statistics,
        filter=None if filters is None else filters[number],
        control=(
            shade_projections(
                control.tiles[control.methods[0]][row, : control.count(row)], contrast=contrast
            )
            if control is not None and control.count(row)
            else None
        ),
        evolution=_evolution_tiles(e, e.maps.index(number)) if has_evolution else None,
        epochs=e.epochs if has_evolution else (),
    )


def _evolution_tiles(e: Evolution, row: int) -> Tensor:
    tiles = e.tiles[:, row].float()
    return shade_signed(tiles, quantile_magnitude(tiles))


def _explorer_image(
    result: VisualizationResult, number: int, step: Callable[[], None]
) -> GalleryImage:
    pixels = result.images[number]
    layers = [_image_layer(result, pixels, layer) for layer in result.projections]
    step()
    return GalleryImage(shown_name(Path(result.images.names[number]).name), pixels, layers)


def _image_layer(result: VisualizationResult, pixels: Tensor, layer: str) -> ImageLayer:
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
        tiles = projector.signed_rgb(projection.tiles()).cpu()
        boxes = tile_boxes(projection.fields, tuple(x.shape[2:]))
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
    reconstruction, facts = _reconstruction(result, x, layer)
    return ImageLayer(layer, reconstruction, facts, maps, parts)


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


def _reconstruction(
    result: VisualizationResult, x: Tensor, layer: str
) -> tuple[Tensor | None, dict]:
    """The reconstruction of an image by a layer of a deconvolutional network, and its facts."""
    projector = result.projector
    if not projector.is_deconvnet:
        return None, {}
    net, number = projector.model, int(layer.removeprefix("layer"))
    codes = projector.backend.codes(x, number)
    reconstruction = net.synthesize(codes, number)
    white = 3 * codes.y.std().clamp(min=1e-12)
    facts = {
        "SNR": f"{snr(codes.y, reconstruction):.1f} dB",
        "non-zero": f"{codes.layer(number).density:.2%} of z",
    }
    return shade_signed(signed_rgb(net, reconstruction), white)[0].cpu(), facts
