"""The units of a layer that respond most strongly to some images, projected: the first look into a
network.

    strongest(load_model("torchvision/resnet18"), "photo.jpg", "layer3")

`find_top_activations` searches whole data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deconvnet.images.decoding import read_image
from deconvnet.images.files import image_files
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.projection.projection import Projection, unknown_layer
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.search_region import searched_units

Images = Tensor | str | Path | Sequence[str | Path]


def strongest(
    model: nn.Module | LoadedModel | Projector,
    images: Images,
    layer: str,
    k: int = 9,
    *,
    map_index: int | None = None,
    normalization: Normalization | None = None,
    method: str | None = None,
) -> Projection:
    """The k maps of a layer that respond most strongly to some images, each by its strongest unit.

    images: RGB pixels (N, 3, H, W) or (3, H, W) in [0, 1], or a file, a folder, a text file (.txt)
    with one path per line, or a list of these.
    map_index: instead, this map in the k images that it responds to most strongly. normalization:
    how the model takes pixels; by default that of a model of `load_model` or of a `Projector`, and
    otherwise none. A model of `load_model` sees files as it was trained to: resized and cropped.
    method: see `Projector`.

    Units are sorted by their responses, and only those that respond at all are projected, so there
    may be fewer than k. Units at the border, which see padding, are left out, or in a layer with
    few others, those far from the middle. In a notebook, the result shows its picture, and `save`
    writes it to a file.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    projector = _projector(model, normalization, method)
    x = projector.prepare(_pixels(images, model))
    units = strongest_units(projector, x, layer, k, map_index=map_index)
    if len(units) == 0:
        what = "map" if map_index is not None else "layer"
        raise ValueError(f"layer {layer!r}: no unit of this {what} responds to these images")
    return projector(x, layer, units)


def strongest_units(
    projector: Projector, x: Tensor, layer: str, k: int, *, map_index: int | None = None
) -> Tensor:
    """(U, 4): image, map, row, column of the units that `strongest` projects; x: (N, C, H, W)."""
    infos = {info.name: info for info in projector.layers(x[:1])}
    if layer not in infos:
        raise unknown_layer(layer, list(infos))
    K, _, W = infos[layer].shape
    if map_index is not None and not 0 <= map_index < K:
        raise ValueError(f"map_index={map_index}: {layer} has {K} maps, numbered from 0")
    searched = searched_units(infos[layer], tuple(x.shape[2:]))

    def strongest_of_maps(_: str, maps: Tensor) -> tuple[Tensor, Tensor]:
        values, positions = maps.masked_fill(~searched.to(maps.device), 0).flatten(2).max(2)
        return values.cpu(), positions.cpu()

    found = [
        projector.responses(chunk, [layer], strongest_of_maps)[layer]
        for chunk in x.split(projector.batch)
    ]
    values, positions = (torch.cat(part) for part in zip(*found, strict=True))  # (N, K) each
    if map_index is None:
        maps = torch.arange(K)
        values, images = values.max(0)
    else:
        images = torch.arange(len(x))
        maps, values = torch.full_like(images, map_index), values[:, map_index]
    order = values.argsort(descending=True, stable=True)[:k]
    order = order[values[order] > 0]
    images, maps = images[order], maps[order]
    place = positions[images, maps]
    return torch.stack([images, maps, place // W, place % W], 1)


def _projector(
    model: nn.Module | LoadedModel | Projector,
    normalization: Normalization | None,
    method: str | None,
) -> Projector:
    if isinstance(model, Projector):
        if normalization is not None or method is not None:
            raise ValueError("normalization and method: those of the Projector; leave them out")
        return model
    if isinstance(model, LoadedModel):
        return Projector(
            model.module, normalization=normalization or model.normalization, method=method
        )
    return Projector(model, normalization=normalization, method=method)


def _pixels(images: Images, model: object) -> Tensor:
    """Pixels (N, 3, H, W) in [0, 1]."""
    if isinstance(images, Tensor):
        pixels = images[None] if images.dim() == 3 else images
        if pixels.dim() != 4 or not pixels.is_floating_point() or len(pixels) == 0:
            use = "; use images / 255" if images.dtype == torch.uint8 else ""
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}: expected pixels (N, 3, H, W) "
                f"in [0, 1]{use}"
            )
        low, high = (float(bound) for bound in pixels.aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"images from {low:.3g} to {high:.3g}: expected pixels in [0, 1]; normalization= "
                "says how the model takes them"
            )
        return pixels
    if not isinstance(images, (str, Path, Sequence)):
        raise ValueError(
            f"images are {type(images).__name__}: expected a file, a folder, a list of both, or a "
            "tensor of pixels (N, 3, H, W) in [0, 1]; torchvision.transforms.functional.to_tensor "
            "converts a PIL image or an array (H, W, 3)"
        )
    paths = image_files(images)
    read = [read_image(path) for path in paths]
    if isinstance(model, LoadedModel) and model.crop is not None:
        read = [model.crop(image) for image in read]
    for path, image in zip(paths, read, strict=True):
        if image.shape != read[0].shape:
            (a, b), (c, d) = read[0].shape[1:], image.shape[1:]
            raise ValueError(
                f"images of several sizes: {paths[0]} has {a}x{b} pixels and {path} {c}x{d}; give "
                "one at a time, or pixels (N, 3, H, W) of one size"
            )
    return torch.stack(read)
