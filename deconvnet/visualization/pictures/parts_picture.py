"""The picture of the parts of an image, and of what the first of them are made of (Zeiler et al.
2011, figure 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.drawing.canvas import (
    FONT,
    GAP,
    LINE,
    PAGE,
    PAPER,
    hstack,
    paragraph,
    text_block,
    text_width,
    vstack,
)
from deconvnet.visualization.drawing.charts import COLORS
from deconvnet.visualization.drawing.letters import font_for
from deconvnet.visualization.pictures.image_decomposition import only_image, strongest_activations
from deconvnet.visualization.pictures.image_parts import (
    SHARE,
    ImageParts,
    count_explaining,
    cut_fields,
    energy_boxes,
    image_parts,
    percent,
    square_boxes,
    together,
)
from deconvnet.visualization.pictures.parts_tree import (
    as_image,
    as_picture,
    resized,
    shaded,
    tree_picture,
)
from deconvnet.visualization.projection.feature_projection import signed_rgb

PANELS = 4
# Parts in a row; if there are fewer, they are larger, up to this width in pixels.
ROW = 12
LARGEST = 300
# Parts that fill more of the image than this are not shown with crops of it.
LOCAL = 0.25
# The first parts have frames in the image, as long as these cover at most this share of it.
FRAMED = 0.5


def image_parts_picture(net: DeconvNet, codes: Codes, image: Tensor, layer: int) -> Tensor:
    """The parts of one image in a layer, and the activations of lower layers that make up a part.

    codes: of this image only; image: (1 or 3, H, W) in [0, 1]. From the top: the image with a
    numbered frame around each part, or around the first if they are large; its preprocessed
    version; its reconstruction from the layer; and that from the fewest strongest activations that
    have half of the energy of the reconstruction.
    Then the parts (`image_parts`), each alone, next to what the image shows there. Then the
    activations in the layers below that support the first parts, with lines from each to its own.
    """
    return draw_parts(net, codes, image, layer, image_parts(net, codes, layer))


@plain
def draw_parts(
    net: DeconvNet,
    codes: Codes,
    image: Tensor,
    layer: int,
    parts: ImageParts,
    *,
    page: int = PAGE,
) -> Tensor:
    """`image_parts_picture` of parts that are known already; page: its width in pixels."""
    boxes = energy_boxes(parts.fields, tuple(image.shape[1:]))
    rows = [_panels(net, codes, image, layer, boxes, page)]
    if len(parts):
        rows.append(_parts_row(net, image, layer, parts, boxes, page))
        tree = tree_picture(net, codes, layer, parts, page=page)
        rows += [] if tree is None else [tree]
    return vstack(rows, 5 * GAP)


def _panels(
    net: DeconvNet, codes: Codes, image: Tensor, layer: int, boxes: Tensor, page: int
) -> Tensor:
    """The first row: image, preprocessed, reconstructed, reconstructed from few activations."""
    y = only_image(codes).y
    whole, total = net.synthesize(codes, layer), torch.count_nonzero(codes.layer(layer).z)
    half = count_explaining(net, codes, layer)
    few = together(net, codes, layer, strongest_activations(codes, layer, half))
    white = 3 * y.std().clamp(min=1e-12)
    width = (page - (PANELS - 1) * GAP) // PANELS
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    count = int((areas.cumsum(0) <= FRAMED * y.shape[2] * y.shape[3]).sum())
    framed = _framed(resized(image[None].expand(-1, 3, -1, -1), width)[0], image, boxes[:count])
    title = _noun(image)
    if count:
        first = f"the first {count} of " if count < len(boxes) else ""
        title += f", and where {first}its parts are"
    panels = [(title, framed)]
    for title, signed in (
        ("preprocessed: what the network explains", y),
        (f"from layer {layer}: {total} activations, {snr(y, whole):.1f} dB", whole),
        (f"from the {half} strongest, with {SHARE:.0%} of its energy: {snr(y, few):.1f} dB", few),
    ):
        panels.append((title, shaded(signed_rgb(net, signed), width, white)[0]))
    heads = [_heading(title, width) for title, _ in panels]
    high = max(head.shape[1] for head in heads)
    columns = [
        vstack([F.pad(head, (0, 0, 0, high - head.shape[1]), value=PAPER), panel])
        for head, (_, panel) in zip(heads, panels, strict=True)
    ]
    return hstack(columns, GAP)


def _heading(text: str, width: int) -> Tensor:
    """A line of text, or several if it is wider than that."""
    one = text_width(text) <= width
    return text_block(text, width, LINE) if one else paragraph(text, width)


def _parts_row(
    net: DeconvNet, image: Tensor, layer: int, parts: ImageParts, boxes: Tensor, page: int
) -> Tensor:
    """The parts, each above the image in the same place."""
    squares = square_boxes(boxes, tuple(image.shape[1:]))
    tiles = signed_rgb(net, cut_fields(parts.fields, squares))
    columns = min(ROW * page // PAGE, len(parts))
    width = min(LARGEST, (page - (columns - 1) * GAP) // columns)
    before = torch.cat([parts.shares.new_zeros(1), parts.shares[:-1]])
    cells = []
    for n, share in enumerate((parts.shares - before).tolist()):
        caption = f"{n + 1}  map {parts.units.maps[n]}: {percent(share)}"
        cell = [text_block(caption, width, LINE), shaded(tiles[n : n + 1], width)[0]]
        if _are_local(boxes, image):
            top, left, bottom, right = squares[n].tolist()
            patch = image[None, :, top:bottom, left:right].expand(-1, 3, -1, -1)
            cell.append(resized(patch, width)[0])
        cells.append(vstack(cell, GAP))
    number = f"{len(parts)} parts" if len(parts) > 1 else "1 part"
    where = f", above {_noun(image)} in the same place" if _are_local(boxes, image) else ""
    title = (
        f"{number}, each alone{where}: one activation of a map, and what it adds to the energy of "
        f"the reconstruction. Together: {percent(float(parts.shares[-1]))}"
    )
    lines = [hstack(cells[n : n + columns], GAP) for n in range(0, len(cells), columns)]
    return vstack([_heading(title, page), *lines], GAP)


def _noun(image: Tensor) -> str:
    """What an image (C, H, W) is called: one of a single row is a signal."""
    return "the signal" if image.shape[1] == 1 else "the image"


def _are_local(boxes: Tensor, image: Tensor) -> bool:
    """Whether boxes (M, 4) are much smaller than the image (C, H, W)."""
    if len(boxes) == 0:
        return False
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return bool(areas.median() <= LOCAL * image.shape[1] * image.shape[2])


def _framed(picture: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
    """A picture (3, h, w) of an image (C, H, W) with numbered frames around boxes of its pixels."""
    canvas = as_image(picture)
    draw, font = ImageDraw.Draw(canvas), font_for("0", FONT)
    vertical, horizontal = canvas.height / image.shape[1], canvas.width / image.shape[2]
    scaled = (boxes * torch.tensor([vertical, horizontal] * 2, device=boxes.device)).round()
    scaled = scaled.long().tolist()
    colors = [COLORS[number % len(COLORS)] for number in range(len(scaled))]
    for (top, left, bottom, right), color in zip(scaled, colors, strict=True):
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline="black")
        draw.rectangle((left - 1, top - 1, right, bottom), outline=color, width=3)
    for number, ((top, left, bottom, _), color) in enumerate(zip(scaled, colors, strict=True), 1):
        # The number stands above its frame, or below it at the upper edge.
        width = round(font.getlength(str(number))) + 5
        left = min(left - 1, canvas.width - width)
        top = top - FONT - 5 if top > FONT + 5 else bottom + 1
        draw.rectangle((left, top, left + width, top + FONT + 3), fill=color)
        draw.text((left + 3, top), str(number), fill="black", font=font)
    return as_picture(canvas)
