"""The figure of the occlusion experiment (Zeiler and Fergus 2014, figure 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.drawing.canvas import (
    GAP,
    LINE,
    PAPER,
    hstack,
    paragraph,
    resize_tiles,
    shade_projections,
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
from deconvnet.visualization.experiments.occlusion import Occlusion
from deconvnet.visualization.experiments.perturbation import cover_boxes, layer_title

PANEL = 240
FRAME = 2
BLUE, RED = 0, 5  # indices of colours in `charts`


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
        most_likely = int(result.base_probabilities.argmax())
        names = _named(names, [result.class_index, most_likely, *result.label.unique().tolist()])
        correct, first = (
            shortened(names[label], 26) for label in (result.class_index, most_likely)
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
    width = max(1, side * w // max(h, w))
    if signed:
        return shade_projections(tile, width=width, contrast=0.99)[0]
    return resize_tiles(tile, width)[0]


def _column(title: str, panel: Tensor, width: int) -> Tensor:
    """A panel below two lines of text, padded to `width` pixels."""
    panel = F.pad(panel, (0, width - panel.shape[2]), value=PAPER)
    return vstack([text_block(title, width, 2 * LINE), panel])


def _limits(values: Tensor, base: float) -> tuple[float, float]:
    """The smallest and the largest value, including that of the whole image."""
    return min(float(values.min()), base), max(float(values.max()), base)


def _named(names: Sequence[str] | dict[int, str] | None, labels: Sequence[int]) -> dict[int, str]:
    """The names of these labels; "class 285" if a label has no name."""
    known = names if isinstance(names, dict) else dict(enumerate(names or ()))
    return {label: str(known.get(label, f"class {label}")) for label in labels}
