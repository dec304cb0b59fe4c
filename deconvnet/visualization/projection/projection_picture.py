"""The picture of a projection: what each unit shows by every method, and the image there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from deconvnet.visualization.drawing.canvas import (
    GAP,
    LINE,
    hstack,
    paragraph,
    plain_number,
    resize_tiles,
    shade_projections,
    text_block,
    vstack,
)
from deconvnet.visualization.drawing.charts import COLORS
from deconvnet.visualization.projection.boxes import crop
from deconvnet.visualization.projection.effective_field import effective_field, windows_of

if TYPE_CHECKING:
    from deconvnet.visualization.projection.projection import Projection, Source

# The least width of a tile, in pixels.
TILE = 112
# Grey of the heads of rows and columns, and the colour of units at the border.
PALE = "#666666"
BORDER = COLORS[1]
# Units next to each other, and the most that are drawn.
COLUMNS = 9
MOST = 90
LABEL = 74


def projection_picture(projection: Projection) -> Tensor:
    """(3, H, W): a column for each unit, with its projection, the same by the layer's other method,
    and the image in the same place.

    All tiles show the part of the receptive field that has most of the energy. Projections of
    negative activations are shown with the opposite sign.
    """
    if projection.source is None:
        raise ValueError("this projection was not made by a Projector, which knows its images")
    if len(projection) == 0:
        raise ValueError("this projection has no units to draw")
    shown = slice(0, MOST)
    units, x = projection.units[shown], projection.source.x
    projections = _by_method(projection, units)
    effective = effective_field(
        [(found.images[shown], projection.fields[shown]) for found in projections.values()]
    )
    windows = windows_of(projection.fields[shown], tuple(x.shape[2:]), effective)
    rows = _rows(projection, projections, windows)
    captions = _captions(projection, units)
    bands = []
    columns = -(-len(units) // -(-len(units) // COLUMNS))
    for start in range(0, len(units), columns):
        band = slice(start, start + columns)
        bands.append(_band({name: tiles[band] for name, tiles in rows.items()}, captions[band]))
    width = max(band.shape[2] for band in bands)
    heading = paragraph(_heading(projection, projections, windows), max(width, 4 * TILE))
    return vstack([heading, *bands], 2 * GAP)


def _by_method(projection: Projection, units: Tensor) -> dict[str, Projection]:
    """The projection, and the same units by the other method of the layer."""
    source, own = projection.source, projection.report.method
    methods = source.projector.methods_of(source.x, source.layer)
    others = [method for method in methods if method != own] if own in methods else []
    found = source.projector.by_method(source.x, source.layer, units, methods=others)
    return {own: projection, **found}


def _rows(
    projection: Projection, projections: dict[str, Projection], windows: Tensor
) -> dict[str, Tensor]:
    """The tiles (U, 3, h, w) of each method, and of the image, resized."""
    source: Source = projection.source
    signs = projection.values[: len(windows)].sign().view(-1, 1, 1, 1)
    rows = {}
    for method, found in projections.items():
        tiles = crop(found.images[: len(windows)] * signs.to(found.images), windows)
        signed = source.projector.signed_rgb(tiles).detach().float().cpu()
        rows[method] = shade_projections(signed, width=TILE)
    units = projection.units[: len(windows)]
    pixels = source.projector.pixels(source.x[units[:, 0].to(source.x.device)])
    rows["image"] = resize_tiles(crop(pixels.detach().float(), windows, fill=0.5), TILE)
    return rows


def _captions(projection: Projection, units: Tensor) -> list[tuple[str, str]]:
    """Two lines for each unit, and their colour."""
    several = bool((units[:, 0] != units[0, 0]).any())
    border = (projection.boxes != projection.fields).any(1).tolist()
    captions = []
    for n, (image, map_index, _, _) in enumerate(units.tolist()):
        value = float(projection.values[n])
        sign = "-" if value < 0 else ""
        text = f"map {map_index}\n{sign}{plain_number(abs(value))}"
        text += f"  image {image}" if several else ""
        captions.append((text, BORDER if border[n] else "black"))
    return captions


def _band(rows: dict[str, Tensor], captions: list[tuple[str, str]]) -> Tensor:
    """Units next to each other, with the names of the rows on their left."""
    width = next(iter(rows.values())).shape[3]
    columns = []
    for n, (text, color) in enumerate(captions):
        head = text_block(text, width, 2 * LINE, color=color)
        columns.append(vstack([head, *(tiles[n] for tiles in rows.values())], GAP))
    names = [text_block("", LABEL, 2 * LINE)] + [
        text_block(name, LABEL, tiles.shape[2], color=PALE) for name, tiles in rows.items()
    ]
    return hstack([vstack(names, GAP), *columns], GAP)


def _heading(projection: Projection, projections: dict[str, Projection], windows: Tensor) -> str:
    """What is shown, in sentences."""
    number, shown = len(projection), len(windows)
    units = "1 unit" if number == 1 else f"{number} units"
    layer = projection.source.layer
    sentences = [f"{f'layer {layer}' if layer.isdigit() else layer}: {units}"]
    if shown < number:
        sentences[0] += f", the first {shown}"
    sizes = [
        "{}x{}".format(*(boxes[0, 2:] - boxes[0, :2]).tolist())
        for boxes in (projection.fields, windows)
    ]
    if sizes[0] != sizes[1]:
        sentences.append(f"Tiles show {sizes[1]} pixels of the receptive field of {sizes[0]}")
    else:
        sentences.append(f"Tiles show the receptive field, {sizes[0]} pixels")
    if (projection.boxes != projection.fields).any():
        sentences.append("Orange: the receptive field reaches beyond the image")
    if (projection.values < 0).any():
        sentences.append("Projections of negative activations have the opposite sign")
    for method, found in projections.items():
        if found.report.rectified and not found.report.depends_on_image:
            sentences.append(f"No max pooling lies below: {method} shows the same for every image")
    return ". ".join(sentences) + "."
