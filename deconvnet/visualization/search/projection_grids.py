"""The grids of the papers: for each map, its projections next to the patches of the images.

Every projection is shaded about grey, which is zero, by a magnitude that almost all of its pixels
do not exceed: the contrast of a tile has no meaning, only its shape. Projections of negative
activations are shown with the opposite sign, and marked, so that a feature does not turn black and
white within a map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from deconvnet.visualization.drawing.canvas import (
    CONTRAST,
    GAP,
    PAGE,
    PAPER,
    arrange_tiles,
    hstack,
    paragraph,
    plain_number,
    resize_tiles,
    shade_projections,
    text_block,
    vstack,
)
from deconvnet.visualization.models.concept_model import ConceptModel
from deconvnet.visualization.projection.feature_projection import signed_filters
from deconvnet.visualization.projection.projection import CONCEPTS, LayerInfo
from deconvnet.visualization.projection.projection_picture import BORDER, PALE, TILE
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.checkerboard import averaged_period

if TYPE_CHECKING:
    from deconvnet.visualization.search.top_projections import TopProjections

# In pixels: the largest width of a tile, the sizes of letters, and of a mark.
LARGEST_TILE = 140
TITLE, TEXT = 20, 15
MARK = 13
# Between two maps.
BETWEEN = 8 * GAP
# Maps of the control below a grid, and what its reader has to know.
CONTROL_MAPS = 3
CONTROL = (
    "What looks alike here and above comes from the images, not from what the network has learned."
)


def tiles_to_show(projections: TopProjections, row: int) -> dict[str, Tensor]:
    """By method, the tiles (k, C, h, w) of a map as pictures show them, before they are shaded:
    multiplied by the signs of the activations."""
    signs = projections.signs[row, :, None, None, None]
    return {
        method: torch.from_numpy(tiles[row] * signs).float()
        for method, tiles in projections.tiles.items()
    }


def layer_grid(
    projections: TopProjections,
    rows: Sequence[int] | None = None,
    *,
    info: LayerInfo | None = None,
    num_images: int | None = None,
    control: TopProjections | None = None,
    control_maps: int = CONTROL_MAPS,
    contrast: float = CONTRAST,
) -> Tensor:
    """The page (3, H, W) of a layer: what it shows, the grid of its maps, and that of the control.

    rows: of the maps to show, by default all. info: the layer; num_images: the number of images
    that were searched. control: projections of the same network with shuffled weights, of which
    the first `control_maps` of these maps are shown, whether or not they are ever active.
    """
    grid = projection_grid(projections, rows, contrast=contrast)
    width = max(grid.shape[2], PAGE // 2)
    title, caption = grid_caption(projections, rows, info=info, num_images=num_images)
    parts = [paragraph(title, width, size=TITLE), paragraph(caption, width, size=TEXT), grid]
    page = vstack(parts, 2 * GAP)
    if control is None:
        return page
    maps = projections.maps if rows is None else projections.maps[list(rows)]
    shown = [n for m in maps for n in np.flatnonzero(control.maps == m).tolist()][:control_maps]
    dead = "dead in the control: no image activates it"
    parts = [
        paragraph("Control: the same network with shuffled weights", width, size=TITLE),
        paragraph(CONTROL, width, size=TEXT),
        projection_grid(control, shown, contrast=contrast, dead=dead),
    ]
    return vstack([page, vstack(parts, 2 * GAP)], BETWEEN)


def grid_caption(
    projections: TopProjections,
    rows: Sequence[int] | None = None,
    *,
    info: LayerInfo | None = None,
    num_images: int | None = None,
) -> tuple[str, str]:
    """The title of the grid of a layer, and what its reader has to know, as sentences."""
    shown = len(projections.maps) if rows is None else len(rows)
    name = projections.layer
    title = [f"layer {name}" if name.isdigit() else name]
    word = "concept" if info is not None and info.kind == CONCEPTS else "map"
    count = f"{shown} {word}s"
    if info is not None:
        title.append("deconvolution" if "generative" in projections.tiles else info.kind)
        count = f"{shown} of {info.shape[0]} {word}s" if shown < info.shape[0] else count
    k = projections.values.shape[1]
    images = f" in {num_images} images" if num_images else ""
    sentences = [
        f"The {k} strongest activations of each {word}{images}, projected to pixels (grey is "
        "zero), and the image there.",
        _size_sentence(projections, info),
    ]
    report = projections.reports.get("deconv")
    if report is not None and report.rectified and not report.depends_on_image:
        sentences.append(
            "No max pooling lies below this layer, so deconv shows the same for every image; only "
            "guided depends on it."
        )
    window = [side / projections.scale for side in projections.patches.shape[3:]]
    periods = {averaged_period(report, window) for report in projections.reports.values()}
    periods -= {(1, 1)}
    if periods:
        period = "{}x{}".format(*max(periods))
        sentences.append(
            f"Projections are averaged over {period} pixels, the period of the checkerboard of "
            "strided convolutions."
        )
    if (projections.values < 0).any():
        sentences.append(
            "A minus marks a negative activation, whose projection is shown with the opposite sign."
        )
    if projections.all_at_border:
        sentences.append("All receptive fields reach beyond the image.")
    elif projections.border.any():
        sentences.append(
            "Units at the border are included; an orange corner marks a receptive field that "
            "reaches beyond the image."
        )
    return "  ·  ".join([*title, count]), " ".join(sentences)


def projection_grid(
    projections: TopProjections,
    rows: Sequence[int] | None = None,
    *,
    columns: int | None = None,
    tile_width: int | None = None,
    contrast: float = CONTRAST,
    dead: str = "no image activates it",
) -> Tensor:
    """A picture (3, H, W): for each map, its projections by every method next to the patches, in
    the same order.

    rows: the rows of the maps in `projections`, by default all. columns: maps next to each other,
    by default as many as fit on a page if tiles are 112 pixels wide. tile_width: the largest width
    of a tile in pixels, by default what the page has room for, from 112 to 140. dead: the text in
    place of the tiles of a map that has none.

    Tiles are hatched if a map has fewer activations. A minus marks a negative activation, whose
    projection is shown with the opposite sign; an orange corner marks a unit whose field reaches
    beyond the image.
    """
    rows = range(len(projections.maps)) if rows is None else rows
    sheets, k = len(projections.tiles) + 1, projections.values.shape[1]
    side = math.ceil(math.sqrt(k))
    around = sheets * GAP + (sheets - 1) * 2 * GAP  # of a block, beside its tiles
    narrowest = sheets * side * (TILE + GAP) + around
    columns = columns or max(1, (PAGE + BETWEEN) // (narrowest + BETWEEN))
    room = ((PAGE + BETWEEN) // columns - BETWEEN - around) // (sheets * side) - GAP
    width = tile_width or min(LARGEST_TILE, max(room, TILE))
    blocks = [_block(projections, row, width, contrast, dead) for row in rows]
    lines = [hstack(blocks[n : n + columns], BETWEEN) for n in range(0, len(blocks), columns)]
    return vstack(lines, 4 * GAP)


def pixel_filters(projector: Projector) -> tuple[str, Tensor] | None:
    """The name of the layer whose filters see pixels, and these filters (K, 3, h, w) as signed RGB.

    In a torch module, this is the first convolution with as many input channels as an image; None
    if there is none. The filters of concepts do not see pixels.
    """
    if projector.is_deconvnet:
        return "layer1", signed_filters(projector.model).expand(-1, 3, -1, -1).cpu()
    if isinstance(projector.model, ConceptModel):
        return None
    planes = 1 if projector.normalization.order == "grey" else 3
    for name, module in projector.model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == planes and module.groups == 1:
            return name, projector.signed_rgb(module.weight.detach().float()).cpu()
    return None


def sample_maps(dead: np.ndarray, count: int | None, *, seed: int = 0) -> list[int]:
    """A random sample of `count` of the maps that are not dead, in ascending order; None: all."""
    alive = np.flatnonzero(~dead)
    if count is None or len(alive) <= count:
        return alive.tolist()
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    return sorted(alive[order[:count].numpy()].tolist())


def _size_sentence(projections: TopProjections, info: LayerInfo | None) -> str:
    """The receptive field of a layer and what the tiles show of it, in pixels."""
    top, left, bottom, right = projections.windows[np.isfinite(projections.values)][0]
    window = f"{bottom - top}x{right - left} pixels"
    if info is None or info.field is None:
        return f"A unit sees the whole image; tiles show {window}."
    field = "{}x{}".format(*info.field)
    if window == f"{field} pixels":
        return f"Tiles show the whole receptive field, {window}."
    return f"Receptive field: {field} pixels; tiles show the {window} that matter."


def _block(
    projections: TopProjections, row: int, tile_width: int, contrast: float, dead: str
) -> Tensor:
    """A map: its caption, and a sheet of tiles for each method and for the patches."""
    count, k = projections.count(row), projections.values.shape[1]
    side = math.ceil(math.sqrt(k))
    shown = min(k, max(1, -(-count // side)) * side)  # whole lines
    patches = torch.from_numpy(projections.patches[row, :shown]).float() / 255
    least = min(TILE, tile_width)
    sheets = {
        method: shade_projections(tiles[:shown], width=tile_width, least=least, contrast=contrast)
        for method, tiles in tiles_to_show(projections, row).items()
    }
    sheets["image"] = resize_tiles(patches, tile_width, least=least)
    for rank in np.flatnonzero(projections.border_marks[row, :count]).tolist():
        _mark_border(sheets["image"][rank])
    columns = []
    for name, tiles in sheets.items():
        tiles = tiles.clone()  # the three planes of a grey tile share their memory
        tiles[count:] = _hatched(tiles.shape[2:])
        for rank in np.flatnonzero(projections.signs[row] < 0).tolist():
            _mark_negative(tiles[rank])
        page = arrange_tiles(tiles, side)
        head = text_block(name, page.shape[2], TEXT + 7, size=TEXT, color=PALE)
        columns.append(vstack([head, page]))
    sheet = hstack(columns, 2 * GAP)
    title = f"map {projections.maps[row]}   {_strengths(projections.values[row, :count]) or dead}"
    head = text_block(title, sheet.shape[2], TEXT + 7, size=TEXT)
    return vstack([head, sheet]) if count else head


def _strengths(values: np.ndarray) -> str:
    """The magnitudes of the activations of a map, strongest first, in words."""
    if len(values) == 0:
        return ""
    name = "|activation|" if (values < 0).any() else "activation"
    first, last = (plain_number(abs(float(value))) for value in (values[0], values[-1]))
    return f"{name} {first}" if first == last else f"{name} {first} to {last}"


def _mark_negative(tile: Tensor) -> None:
    """Draw a white minus on black into the top left corner of a tile (3, h, w)."""
    tile[:, :MARK, :MARK] = 0
    tile[:, MARK // 2 - 1 : MARK // 2 + 1, 3 : MARK - 3] = 1


def _mark_border(tile: Tensor) -> None:
    """Draw an orange triangle into the top right corner of a tile (3, h, w)."""
    paint = torch.tensor(list(bytes.fromhex(BORDER[1:]))) / 255
    for row in range(MARK):
        tile[:, row : row + 1, row - MARK :] = paint[:, None, None]


def _hatched(size: tuple[int, int]) -> Tensor:
    """A tile for a missing activation."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    return torch.where((rows + columns) % 8 < 1, 0.75, PAPER).expand(3, -1, -1)
