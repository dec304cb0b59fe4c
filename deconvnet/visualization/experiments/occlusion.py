"""The occlusion experiment: the effect of covering a part of the image (Zeiler and Fergus 2014,
section 4.2).

A grey square slides over the image. For each of its positions: how active is the map that responds
most strongly to the whole image, how likely is the correct class, and which class is most likely?
If a map represents the object that its projection shows, covering this object silences the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.drawing.canvas import (
    GAP,
    LINE,
    PAPER,
    hstack,
    paragraph,
    quantile_magnitude,
    resize_tiles,
    shade_signed,
    text_block,
    vstack,
)
from deconvnet.visualization.drawing.charts import (
    LEGEND,
    SCALE,
    Cells,
    color,
    heat_map,
    label_map,
    shortened,
)
from deconvnet.visualization.experiments.perturbation import (
    check_images,
    chunks,
    class_indices,
    class_probabilities,
    cover_boxes,
    fill_values,
    layer_title,
)
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.search_region import searched_units

PANEL = 240
FRAME = 2
BLUE, RED = 0, 5  # indices of colours in `charts`
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


def occlusion_picture(
    result: Occlusion, pixels: Tensor, *, names: Sequence[str] | dict[int, str] | None = None
) -> Tensor:
    """The panels (a) to (e) of figure 7 in a row; (a) to (c) if the model has no classes.

    pixels: (1 or 3, H, W) in [0, 1], the image; names: of the classes.

    (a) The image, with the square in mid-grey and in a red frame where it reduces the map the most,
    and a blue frame around the receptive field of the strongest activation. (b) The sum of the
    map's positive values and (d) the probability of the correct class, over the dimmed image, and
    (e) the most likely class, for every position of the square. These maps have the frame of the
    image, with positions at the centre of the square; a triangle at a scale marks the value for the
    whole image. (c) The projection of the strongest activation, with the same frames; if there are
    projections from other images, all are cropped to their fields, and that of this image has a
    blue frame.
    """
    H, W = result.image
    if pixels.shape not in ((1, H, W), (3, H, W)):
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}: expected (1 or 3, {H}, {W})")
    box = result.boxes[result.worst]
    example = pixels[None].detach().cpu().float().clamp(0, 1).expand(-1, 3, -1, -1)
    whole_image = _panel(example)
    example = _panel(cover_boxes(example, box[None], example.new_full((1, 1, 1, 1), 0.5)))
    example = framed(example, result.field, result.image, color(BLUE))
    example = framed(example, box, result.image, color(RED))
    cells, size = _cells(result), (example.shape[1], example.shape[2])
    number, whole = result.unit[0], result.base_activity
    activity = heat_map(
        result.activity,
        cells,
        size=size,
        limits=_limits(result.activity, whole),
        marked=whole,
        image=whole_image,
    )
    panels = [
        (f"(a) grey square where map {number}\nloses the most", example, 0),
        (f"(b) sum of map {number}\nby centre of the square", activity, SCALE),
        (
            f"(c) projection of the strongest\nactivation of map {number}",
            _projected(result, box),
            0,
        ),
    ]
    if result.probability is not None:
        names = _named(names)
        correct, first = (
            shortened(str(names.get(label, f"class {label}")), 26)
            for label in (result.class_index, int(result.base_probabilities.argmax()))
        )
        base = float(result.base_probabilities[result.class_index])
        limits = (0.0, _limits(result.probability, base)[1])
        probability = heat_map(
            result.probability, cells, size=size, limits=limits, marked=base, image=whole_image
        )
        labels = label_map(result.label, cells, names, size=size)
        panels += [
            (f"(d) probability of\n{correct}", probability, SCALE),
            (f"(e) most likely class;\nwhole image: {first}", labels, LEGEND),
        ]
    # Columns have fixed widths, so that rows of several images line up.
    row = hstack([_column(title, panel, PANEL + more) for title, panel, more in panels], 2 * GAP)
    heading = paragraph(_heading(result), 3 * PANEL + SCALE + 4 * GAP)
    return vstack([heading, row], GAP)


def _heading(result: Occlusion) -> str:
    """What was occluded, in pixels, and the meaning of the frames and triangles."""
    image, square = ("{}x{}".format(*size) for size in (result.image, result.occluder_size))
    steps = [int(first[1] - first[0]) for first in result.corners if len(first) > 1]
    step = f" in steps of {'x'.join(map(str, dict.fromkeys(steps)))} pixels" if steps else ""
    return (
        f"Map {result.unit[0]} of {layer_title(result.layer)} while a grey square of {square} "
        f"pixels moves over an image of {image} pixels{step}. Blue: receptive field of the "
        "strongest activation; red: the square that reduces the map the most; triangle: value of "
        "the whole image."
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


def _cells(result: Occlusion) -> Cells:
    """A cell for every position, centred in its square, without gaps to the next."""
    strides = tuple(
        float(first[1] - first[0]) if len(first) > 1 else float(size)
        for first, size in zip(result.corners, result.occluder_size, strict=True)
    )
    return Cells(result.image, (result.occluder_size[0] / 2, result.occluder_size[1] / 2), strides)


def _projected(result: Occlusion, box: Tensor) -> Tensor:
    """Panel (c): the projection with the square as a frame, or tiles if there are other images."""
    if len(result.tiles) == 1:
        whole = _panel(result.projection[None], signed=True)
        whole = framed(whole, result.field, result.image, color(BLUE))
        return framed(whole, box, result.image, color(RED))
    columns = math.ceil(math.sqrt(len(result.tiles)))
    shown = [_panel(tile[None], columns, signed=True) for tile in result.tiles]
    h, w = shown[0].shape[1:]
    shown[0] = framed(shown[0], torch.tensor([0, 0, h, w]), (h, w), color(BLUE))
    return vstack([hstack(shown[n : n + columns], GAP) for n in range(0, len(shown), columns)], GAP)


def framed(picture: Tensor, box: Tensor, image: tuple[int, int], paint: Tensor) -> Tensor:
    """A picture (3, h, w) of an image of (H, W) pixels, with a frame around a box of its pixels."""
    scale = torch.tensor([n / size for n, size in zip(picture.shape[1:], image, strict=True)])
    top, left, bottom, right = (box * scale.repeat(2)).round().long().tolist()
    rows, columns = (torch.arange(n) for n in picture.shape[1:])

    def inside(width: int) -> Tensor:
        across = (rows >= top + width) & (rows < bottom - width)
        return across[:, None] & (columns >= left + width) & (columns < right - width)

    return torch.where(inside(0) & ~inside(FRAME), paint[:, None, None], picture)


def _panel(tile: Tensor, columns: int = 1, *, signed: bool = False) -> Tensor:
    """(3, h, w): a tile (1, 3, h, w) resized for one of `columns` columns of a panel.

    signed: whether it is a projection, which is then shaded.
    """
    h, w = tile.shape[2:]
    side = (PANEL - (columns - 1) * GAP) // columns
    tile = resize_tiles(tile, max(1, side * w // max(h, w)))
    return (shade_signed(tile, quantile_magnitude(tile)) if signed else tile)[0]


def _column(title: str, panel: Tensor, width: int) -> Tensor:
    """A panel below two lines of text, padded to `width` pixels."""
    panel = F.pad(panel, (0, width - panel.shape[2]), value=PAPER)
    return vstack([text_block(title, width, 2 * LINE), panel])


def _limits(values: Tensor, base: float) -> tuple[float, float]:
    """The smallest and the largest value, including that of the whole image."""
    return min(float(values.min()), base), max(float(values.max()), base)


def _named(names: Sequence[str] | dict[int, str] | None) -> dict[int, str]:
    return names if isinstance(names, dict) else dict(enumerate(names or ()))
