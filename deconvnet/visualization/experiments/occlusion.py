"""The occlusion experiment: the effect of covering a part of the image (Zeiler and Fergus 2014,
section 4.2).

A grey square slides over the image. For each of its positions: how active is the map that responds
most strongly to the whole image, how likely is the correct class, and which class is most likely?
If a map represents the object that its projection shows, covering this object silences the map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.visualization.experiments.perturbation import (
    check_images,
    chunks,
    class_indices,
    class_probabilities,
    cover_boxes,
    fill_values,
)
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.search_region import searched_units

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Occlusion:
    """An image of (H, W) pixels under a grey square at each of P x Q positions.

    corners: (P,) and (Q,), the first rows and columns of the square. occluder_size: its rows and
    columns; at the bottom and on the right it may reach beyond the image. layer, unit: the
    strongest activation (map, row, column) in the whole image. field: (4,), its receptive field:
    top, left, bottom, right, clipped to the image. activity: (P, Q), the sum of the positive values
    of its map; base_activity: the same for the whole image. projection: (3, H, W), of the unit, as
    signed RGB. tiles: (1 + M, 3, h, w), the same cropped to the field, and those of the strongest
    activation of the map in each of M other images.

    None if the model has no classes: class_index, the correct class; probability: (P, Q), its
    probability; label: (P, Q), the most likely class; base_probabilities: (classes,), those for the
    whole image.
    """

    image: tuple[int, int]
    occluder_size: tuple[int, int]
    corners: tuple[Tensor, Tensor]
    layer: str
    unit: tuple[int, int, int]
    field: Tensor
    activity: Tensor
    base_activity: float
    projection: Tensor
    tiles: Tensor
    class_index: int | None = None
    probability: Tensor | None = None
    label: Tensor | None = None
    base_probabilities: Tensor | None = None

    @property
    def boxes(self) -> Tensor:
        """(P, Q, 4): the squares, clipped to the image."""
        return _boxes(self.corners, self.occluder_size, self.image)

    @property
    def worst(self) -> tuple[int, int]:
        """The position (p, q) of the square at which the map is least active."""
        return divmod(int(self.activity.argmin()), self.activity.shape[1])

    @property
    def activity_drop(self) -> Tensor:
        """(H, W): the loss of activity, averaged over the squares that cover a pixel."""
        return self.drop(self.activity, self.base_activity)

    @property
    def probability_drop(self) -> Tensor | None:
        """(H, W): the loss of probability, averaged over the squares that cover a pixel."""
        if self.probability is None:
            return None
        return self.drop(self.probability, float(self.base_probabilities[self.class_index]))

    def drop(self, values: Tensor, base: float) -> Tensor:
        """(H, W): base - values (P, Q), averaged over the squares that cover a pixel.

        This is known as attribution by occlusion. A square covers a pixel if it covers both its row
        and its column.
        """
        rows, columns = (
            ((first[:, None] <= pixel) & (pixel < first[:, None] + size)).double()
            for first, size, pixel in zip(
                self.corners, self.occluder_size, map(torch.arange, self.image), strict=True
            )
        )
        loss = base - values.double()
        return rows.T @ loss @ columns / torch.outer(rows.sum(0), columns.sum(0))


def occlusion(
    projector: Projector,
    x: Tensor,
    *,
    layer: str,
    map_index: int | None = None,
    class_index: int | None = None,
    classes: bool = True,
    occluder_size: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    fill: float | Tensor | None = None,
    others: Tensor | None = None,
    progress: Progress | None = None,
) -> Occlusion:
    """Measure a map and the class of image x (1, C, H, W) while a grey square covers parts of it.

    map_index: the map; by default, the one with the strongest activation in the whole image (the
    paper's "strongest response"). At the border, units depend mostly on padding, so only the units
    of `search_region.searched_units` are considered. class_index: the correct class; by default,
    the most likely one. classes=False ignores classes, for a model whose output is something else.

    The square moves to 0, stride, 2 stride, ... until it reaches the border. occluder_size, stride:
    in pixels, or as rows and columns. The paper does not state them; the defaults are a quarter of
    the shorter side, and a quarter of the square. fill: its colour, see `perturbation.fill_values`.

    others: (M, C, H, W), images for further projections of the map. progress: a function of the
    number of positions done, and of all positions.
    """
    check_images(x)
    if len(x) > 1:
        raise ValueError(f"{len(x)} images: occlusion takes one image, as x[:1]")
    if others is not None and others.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"others of shape {tuple(others.shape)}: expected images of {tuple(x.shape[1:])} as x"
        )
    image = (x.shape[2], x.shape[3])
    occluder_size = _checked_size(occluder_size, image)
    corners = _corners(image, occluder_size, _checked_stride(stride, occluder_size))
    boxes = _boxes(corners, occluder_size, image).flatten(0, 1)
    fill = fill_values(projector, x, fill)

    images = x if others is None else torch.cat([x, others])
    responses = [projector.responses(single, [layer])[layer][0] for single in images.split(1)]
    info = {info.name: info for info in projector.layers(x)}[layer]
    inside = searched_units(info, image).to(x.device)
    unit = _strongest(responses[0], map_index, inside)
    units = [(n, *_strongest(maps, unit[0], inside)) for n, maps in enumerate(responses)]
    projection = projector(images, layer, units)

    base = class_probabilities(projector, x) if classes else None
    if base is None and class_index is not None:
        raise ValueError(f"class_index {class_index}: this model has no classes")
    if base is not None:
        class_index = int(class_indices(base, None if class_index is None else [class_index]))

    activity, probability, label = [], [], []
    for chunk in chunks(len(boxes), projector.batch):
        covered = cover_boxes(x.expand(len(boxes[chunk]), -1, -1, -1), boxes[chunk], fill)
        maps = projector.responses(covered, [layer])[layer]
        activity.append(_activity(maps, unit[0]).cpu())
        if base is not None:
            probabilities = class_probabilities(projector, covered).cpu()
            probability.append(probabilities[:, class_index])
            label.append(probabilities.argmax(1))
        if progress:
            progress(chunk.stop, len(boxes))

    def positions(parts: list[Tensor]) -> Tensor | None:
        return torch.cat(parts).view(len(corners[0]), len(corners[1])) if parts else None

    return Occlusion(
        image=image,
        occluder_size=occluder_size,
        corners=corners,
        layer=layer,
        unit=unit,
        field=projection.boxes[0].cpu(),
        activity=positions(activity),
        base_activity=float(_activity(responses[0][None], unit[0])),
        projection=projector.signed_rgb(projection.images[:1])[0].cpu(),
        tiles=projector.signed_rgb(projection.tiles()).cpu(),
        class_index=class_index,
        probability=positions(probability),
        label=positions(label),
        base_probabilities=None if base is None else base[0].cpu(),
    )


def _strongest(maps: Tensor, map_index: int | None, inside: Tensor) -> tuple[int, int, int]:
    """(map, row, column) of the largest of responses (K, H, W), or of those of one map.

    inside: (H, W), the positions to search.
    """
    K, H, W = maps.shape
    maps = maps.masked_fill(~inside, -torch.inf)
    if map_index is not None and not 0 <= map_index < K:
        raise ValueError(f"map_index {map_index}: the layer has {K} maps, numbered from 0")
    if map_index is None:
        index = int(maps.argmax())
    else:
        index = int(maps[map_index].argmax() + map_index * H * W)
    return index // (H * W), index // W % H, index % W


def _activity(maps: Tensor, map_index: int) -> Tensor:
    """(N,): the sum of the positive values of one map of responses (N, K, H, W).

    In a layer without a rectifier, negative values would outweigh the few strong ones.
    """
    return maps[:, map_index].double().clamp(min=0).sum((1, 2))


def _checked_size(
    occluder_size: int | tuple[int, int] | None, image: tuple[int, int]
) -> tuple[int, int]:
    default = max(1, round(min(image) / 4))
    rows, columns = _pair(default if occluder_size is None else occluder_size)
    if not (1 <= rows <= image[0] and 1 <= columns <= image[1]):
        raise ValueError(
            f"occluder_size {rows} x {columns}: expected 1 to {image[0]} x {image[1]} pixels"
        )
    return rows, columns


def _checked_stride(
    stride: int | tuple[int, int] | None, occluder_size: tuple[int, int]
) -> tuple[int, int]:
    default = tuple(max(1, size // 4) for size in occluder_size)
    rows, columns = _pair(default if stride is None else stride)
    if not (1 <= rows <= occluder_size[0] and 1 <= columns <= occluder_size[1]):
        raise ValueError(
            f"stride {rows} x {columns}: expected 1 to {occluder_size[0]} x {occluder_size[1]}, "
            "the size of the square, or pixels between the squares are never covered"
        )
    return rows, columns


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _corners(
    image: tuple[int, int], occluder_size: tuple[int, int], stride: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The first rows (P,) and columns (Q,) of the squares; the last one reaches the border."""
    rows, columns = (
        step * torch.arange(-(-(size - length) // step) + 1)
        for size, length, step in zip(image, occluder_size, stride, strict=True)
    )
    return rows, columns


def _boxes(
    corners: tuple[Tensor, Tensor], occluder_size: tuple[int, int], image: tuple[int, int]
) -> Tensor:
    """(P, Q, 4): top, left, bottom, right of each square, clipped to the image."""
    top, left = torch.meshgrid(*corners, indexing="ij")
    bottom = (top + occluder_size[0]).clamp(max=image[0])
    right = (left + occluder_size[1]).clamp(max=image[1])
    return torch.stack([top, left, bottom, right], 2)
