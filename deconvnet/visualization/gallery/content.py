"""What a survey found as the pages of a gallery.

Everything here is put together from what lies in files and memory already, but for the images that
are explored: those go through the network once more.
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
from deconvnet.visualization.projection.pixel_features import signed_rgb
from deconvnet.visualization.projection.projection import LayerInfo, tile_boxes
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.top_activations import Progress

# Of each image that is explored, and each layer.
SHOWN_PARTS = 12
SHOWN_MAPS = 12
# Larger maps are reduced to this side, the strongest of each window.
MAP_SIDE = 120


def write_result_gallery(
    folder: Path,
    state: VisualizationResult,
    *,
    explored: int = 8,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """The path of the gallery's page; explored: how many of the images can be looked into."""
    subject = state.subject
    count = min(explored, len(state.images))
    numbers = np.linspace(0, len(state.images) - 1, count).round().astype(int).tolist()
    steps = itertools.count(1)
    total = sum(len(found.maps) for found in state.found.values()) + count

    def step() -> None:
        if progress:
            progress(next(steps), total)

    figures = {name: picture for name, picture in state.pictures.items() if name not in state.found}
    facts = {
        "network": subject.name,
        "weights": subject.weights,
        "sha256 of its parameters": subject.digest,
        "images searched": len(state.images),
        "way down": state.projector.method,
    }
    return write_gallery(
        folder,
        title=subject.name,
        facts=facts,
        layers=(_gallery_layer(state, layer, step) for layer in state.found),
        images=(_explored(state, number, step) for number in numbers),
        figures=figures,
        notes=[*(f"{layer}: {found.report}" for layer, found in state.found.items()), *notes],
    )


def _gallery_layer(
    state: VisualizationResult, layer: str, step: Callable[[], None]
) -> GalleryLayer:
    info, top, found = state.infos[layer], state.tops[layer], state.found[layer]
    first = pixel_filters(state.projector)
    on_pixels = first is not None and first[0] == layer.partition("#")[0]
    filters = shade_signed(first[1]) if on_pixels else None
    facts: dict[str, str | float] = {
        "dead maps": int(top.dead.sum()),
        "maps shown": len(found.maps),
        "active places": f"{top.density_sum.mean() / top.num_images:.2%}",
    }
    boards = found.checkerboard[np.isfinite(found.checkerboard)]
    if len(boards):
        facts["checkerboard (median)"] = f"{np.median(boards):.2f}"
    return GalleryLayer(
        layer,
        layer,
        (_gallery_map(state, layer, row, filters, step) for row in range(len(found.maps))),
        kind=_kind(state, info),
        shape=info.shape,
        field=info.field,
        stride=info.stride,
        facts=facts,
    )


def _kind(state: VisualizationResult, info: LayerInfo) -> str:
    if not state.projector.is_deconvnet:
        return info.kind
    settings = state.projector.model.layer(int(info.name.removeprefix("layer"))).settings
    return f"deconvolution, {settings.filter_size}x{settings.filter_size} filters"


def _gallery_map(
    state: VisualizationResult,
    layer: str,
    row: int,
    filters: Tensor | None,
    step: Callable[[], None],
) -> GalleryMap:
    found, top, names = state.found[layer], state.tops[layer], state.images.names
    count, number = found.count(row), int(found.maps[row])
    contrast = state.contrast
    captions = []
    for (image, _, i, j), value in zip(
        found.units[row, :count].tolist(), found.values[row, :count].tolist(), strict=True
    ):
        captions.append(Caption(Path(names[image]).name, value, f"unit at row {i}, column {j}"))
    control = state.control.get(layer)
    statistics = {
        "strongest activation": float(np.abs(found.values[row, 0])),
        "mean of the images' strongest": float(top.peak_sum[number] / top.num_images),
        "active in images, %": 100 * float(top.active_images[number] / top.num_images),
        "active places, %": 100 * float(top.density_sum[number] / top.num_images),
    }
    e = state.evolutions.get(layer)
    strip = e is not None and number in e.maps
    step()
    return GalleryMap(
        number,
        shade_projections(found.tiles[row, :count], contrast=contrast),
        torch.from_numpy(found.patches[row, :count]).float() / 255,
        captions,
        statistics,
        filter=None if filters is None else filters[number],
        control=(
            shade_projections(control.tiles[row, : control.count(row)], contrast=contrast)
            if control is not None and control.count(row)
            else None
        ),
        evolution=_strip(e, e.maps.index(number)) if strip else None,
        epochs=e.epochs if strip else (),
    )


def _strip(e: Evolution, row: int) -> Tensor:
    tiles = e.tiles[:, row].float()
    return shade_signed(tiles, quantile_magnitude(tiles))


def _explored(state: VisualizationResult, number: int, step: Callable[[], None]) -> GalleryImage:
    pixels = state.images[number]
    layers = [_image_layer(state, pixels, layer) for layer in state.found]
    step()
    return GalleryImage(shown_name(Path(state.images.names[number]).name), pixels, layers)


def _image_layer(state: VisualizationResult, pixels: Tensor, layer: str) -> ImageLayer:
    """What a layer makes of one image: reconstruction, strongest maps, strongest activations."""
    projector = state.projector
    x = projector.prepare(pixels[None])
    strength = projector.responses(x, [layer])[layer][0].cpu().float()
    peaks, places = strength.flatten(1).max(1)
    order = peaks.argsort(descending=True, stable=True)[:SHOWN_MAPS]
    order = order[peaks[order] > 0]
    if projector.is_deconvnet:
        units = _strongest_units(strength)
    else:
        # Neighbours of one map would be next to the same: the strongest of each map.
        W = strength.shape[2]
        units = [(0, k, int(places[k]) // W, int(places[k]) % W) for k in order.tolist()]
    parts = []
    if units:
        found = projector(x, layer, units)
        shown = shade_projections(
            projector.signed_rgb(found.tiles()).cpu(), contrast=state.contrast
        )
        parts = [
            Part(unit[1], float(value), picture, box=box.tolist())
            for unit, value, picture, box in zip(
                units,
                found.values,
                shown,
                tile_boxes(found.fields, tuple(x.shape[2:])),
                strict=True,
            )
        ]
    # Nine in ten of what is active in the maps that are shown is short of white.
    white = float(quantile_magnitude(strength[order].clamp(min=0)[None], 0.9))
    maps = [(k, _map_picture(strength[k], white)) for k in order.tolist()]
    reconstruction, facts = _reconstruction(state, x, layer)
    return ImageLayer(layer, reconstruction, facts, maps, parts)


def _strongest_units(strength: Tensor) -> list[tuple[int, int, int, int]]:
    _, H, W = strength.shape
    values, order = strength.flatten().sort(descending=True, stable=True)
    order = order[:SHOWN_PARTS][values[:SHOWN_PARTS] > 0].tolist()
    return [(0, n // (H * W), n // W % H, n % W) for n in order]


def _map_picture(z: Tensor, white: float) -> Tensor:
    """A map (H, W), zero and below black: the strongest of each 2x2 where it is large."""
    z = z[None, None].clamp(min=0)
    while max(z.shape[2:]) > MAP_SIDE:
        z = max_pool(z, (1, 2, 2))[0]
    return (z[0] / max(white, 1e-12)).clamp(0, 1).expand(3, -1, -1)


def _reconstruction(
    state: VisualizationResult, x: Tensor, layer: str
) -> tuple[Tensor | None, dict]:
    """What a layer of a deconvolutional network makes of an image, in the preprocessed domain."""
    projector = state.projector
    if not projector.is_deconvnet:
        return None, {}
    net, number = projector.model, int(layer.removeprefix("layer"))
    codes = projector.backend.codes(x, number)
    made, white = net.synthesize(codes, number), 3 * codes.y.std().clamp(min=1e-12)
    facts = {
        "SNR": f"{snr(codes.y, made):.1f} dB",
        "not zero": f"{codes.layer(number).density:.2%} of z",
    }
    return shade_signed(signed_rgb(net, made), white)[0].cpu(), facts
