"""The tree of the first parts of an image: below each stand the activations that support it (Zeiler
et al. 2011, figure 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.visualization.drawing.canvas import (
    GAP,
    LINE,
    PAGE,
    as_curves,
    hstack,
    quantile_magnitude,
    shade_signed,
    text_block,
    thickened,
    vstack,
)
from deconvnet.visualization.pictures.image_parts import (
    CHILDREN,
    Generation,
    ImageParts,
    cut_fields,
    energy_boxes,
    explained,
    family_tree,
    select_features,
    separate_fields,
    square_boxes,
    together,
)
from deconvnet.visualization.projection.feature_projection import signed_rgb

# From this layer on, the tree has one root, so that its last generation has at most 125 tiles.
SINGLE = 4
# Tiles next to each other, at most; those of a later generation are stacked below their parents.
ACROSS = 25
# In pixels: the widest tile, the gap between tiles and between generations, the column of labels.
LARGEST = 400
MARGIN = 6
STEP = 28
LABEL = 70
BRANCH = "#888888"


def tree_picture(
    net: DeconvNet, codes: Codes, layer: int, parts: ImageParts, *, page: int = PAGE
) -> Tensor | None:
    """The first parts of an image, and below each what supports it in the lower layers.

    Next to each part is the sum of its supporting activations in a layer, with the fraction of its
    energy that they explain. None in layer 1, below which there is only the image. page: the width
    in pixels.
    """
    count = min(len(parts), 1 if layer >= SINGLE else CHILDREN)
    generations = family_tree(net, codes, layer, parts.units[:count])
    if not generations:
        return None
    size = tuple(codes.y.shape[2:])
    rows = [_top_row(net, codes, layer, parts, count, generations, page)]
    across = count
    for generation in generations:
        across *= CHILDREN if across * CHILDREN <= ACROSS else 1
        features = separate_fields(net, codes, generation.layer, generation.units)
        tiles = cut_fields(features, square_boxes(energy_boxes(features, size), size))
        width = min(LARGEST, (page - LABEL) // across - MARGIN)
        tiles = shaded(signed_rgb(net, tiles), width)
        rows.append(
            _Row(f"layer {generation.layer}", list(tiles), generation.places.tolist(), width)
        )
    return _drawn(rows, page)


@dataclass(frozen=True)
class _Row:
    """A generation in the picture: tiles (3, h, w) and their places, see `Generation`.

    stem: the width of the left part of each tile, from the middle of which branches start.
    """

    label: str
    tiles: list[Tensor]
    places: list[int]
    stem: int


def _top_row(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    parts: ImageParts,
    count: int,
    generations: list[Generation],
    page: int,
) -> _Row:
    """The first parts, each with the sums of the activations that support it."""
    size = tuple(codes.y.shape[2:])
    squares = square_boxes(energy_boxes(parts.fields, size), size)[:count]
    tiles = cut_fields(select_features(parts.fields, slice(0, count)), squares)
    summed = generations if count == 1 else generations[:1]
    width = ((page - LABEL) // count - MARGIN - len(summed) * GAP) // (1 + len(summed))
    width = min(width, LARGEST)
    blocks = []
    for n, (top, left, bottom, right) in enumerate(squares.tolist()):
        unit = parts.units[n : n + 1]
        shown = [(f"{n + 1}  map {int(unit.maps)}", tiles[n : n + 1])]
        for generation in summed:
            own = generation.units[generation.roots == n]
            signed = together(net, codes, generation.layer, own)
            share = explained(together(net, codes, layer, unit), signed)
            title = f"{len(own)} of layer {generation.layer}: {share:.0%}"
            shown.append((title, signed[:, :, top:bottom, left:right]))
        panels = [
            vstack([text_block(title, width, LINE), shaded(signed_rgb(net, tile), width)[0]])
            for title, tile in shown
        ]
        blocks.append(hstack(panels, GAP))
    return _Row(f"layer {layer}", blocks, list(range(count)), width)


def _drawn(rows: list[_Row], page: int) -> Tensor:
    """Rows of tiles below each other, with lines from each tile to those that support it."""
    pasted, lines, top = [], [], 0
    across, stems = len(rows[0].tiles), {}
    for depth, row in enumerate(rows):
        stacked = depth > 0 and CHILDREN * across > ACROSS
        across *= CHILDREN if depth > 0 and not stacked else 1
        slot, new_stems = (page - LABEL) / across, {}
        pasted.append((text_block(row.label, LABEL - GAP, LINE), 0, top))
        for tile, place in zip(row.tiles, row.places, strict=True):
            column, level = divmod(place, CHILDREN) if stacked else (place, 0)
            left, upper = LABEL + int(column * slot), top + level * (tile.shape[1] + MARGIN)
            middle = left + row.stem // 2
            pasted.append((tile, left, upper))
            if depth and level:
                lines.append(((middle, upper - MARGIN), (middle, upper)))
            elif depth:
                x, y = stems[place // CHILDREN]
                bend = y + STEP // 2
                lines.append(((x, y), (x, bend), (middle, bend), (middle, upper)))
            new_stems[place] = (middle, upper + tile.shape[1])
        stems = new_stems
        top = max(y for _, y in stems.values()) + STEP
    canvas = Image.new("RGB", (page, top - STEP), "white")
    draw = ImageDraw.Draw(canvas)
    for line in lines:
        draw.line(line, fill=BRANCH, width=2)
    for tile, left, upper in pasted:
        canvas.paste(as_image(tile), (left, upper))
    return as_picture(canvas)


def shaded(signed: Tensor, width: int, white: float | Tensor | None = None) -> Tensor:
    """Signed tiles (M, 3, h, w) resized to a width, then shaded; those of one row are curves.
    white: by default of each tile."""
    if signed.shape[2] == 1:
        white = quantile_magnitude(signed) if white is None else white
        return resized(shade_signed(signed, white), width)
    tiles = resized(signed, width)
    if white is None:
        # The fine structure of a reduced tile averages to less; the pixels of an enlarged one stay.
        white = quantile_magnitude(tiles if width < signed.shape[3] else signed).cpu()
    return shade_signed(tiles, white)


def resized(pictures: Tensor, width: int) -> Tensor:
    """Pictures (N, C, h, w) at this width; pixels that are much enlarged stay squares, and pictures
    of one row become curves."""
    pictures = thickened(as_curves(pictures.cpu().float()))
    h, w = pictures.shape[2:]
    size = max(1, round(h * width / w)), width
    if size == (h, w):
        return pictures
    if width >= 3 * w:
        return F.interpolate(pictures, size, mode="nearest-exact")
    return F.interpolate(pictures, size, mode="bilinear", antialias=True)


def as_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def as_picture(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
