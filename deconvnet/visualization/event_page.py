"""The TensorBoard page of a visualization: its pictures in readable sizes, and their methods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.monitoring.event_files import event_writer
from deconvnet.monitoring.picture_files import png, png_or_jpeg
from deconvnet.monitoring.summaries import image_summary, text_summary
from deconvnet.storage import ownership
from deconvnet.visualization.drawing.canvas import (
    CONTRAST,
    GAP,
    LINE,
    as_curves,
    hstack,
    plain_number,
    resize_tiles,
    shade_projections,
    shade_signed,
    text_block,
    vstack,
    with_title,
)
from deconvnet.visualization.drawing.sheet import CARD, MOST_CARDS, cut_into_cards
from deconvnet.visualization.manifest import control_rows, rows_in_grid
from deconvnet.visualization.pictures.evolution_picture import evolution_cards
from deconvnet.visualization.pictures.layer_pictures import filter_cards
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.projection_grids import pixel_filters, tiles_to_show
from deconvnet.visualization.search.top_projections import TopProjections
from deconvnet.visualization.settings import VisualizationSettings

# The groups of the page, in their order, and what they show; those of a training run lie between.
STRONGEST = (
    "For some maps: the strongest activations in these images, the strongest first, projected to "
    "pixels by each method, and the part of the image that the units see (image). Every tile has "
    "its own scale, so only its shape has a meaning. A negative activation is shown with the "
    "opposite sign."
)
GROUPS = {
    "filters": (
        "0 filters",
        "The filters that see pixels, with the number of the map below. Grey is zero; every "
        "filter has its own scale, so only its shape has a meaning.",
    ),
    "layers": ("2 strongest activations", STRONGEST),
    "control": (
        "3 control",
        "The same for the network with shuffled weights. What looks alike here and there comes "
        "from the images, not from what the network has learned.",
    ),
    "evolution": (
        "4 evolution",
        "A row for each map, a column for each epoch: the strongest activation, projected to "
        "pixels as if it were positive. The number of the image is below a tile if it differs from "
        "that of the tile before.",
    ),
    "occlusion": (
        "8 occlusion",
        "What changes in the network when a grey square covers a part of the image.",
    ),
    "invariance": (
        "9 invariance",
        "How far the features move when the image is shifted, scaled or rotated.",
    ),
}
# On the card of a map: its activations, and in pixels the width of a tile and of a label.
SHOWN = 5
TILE, LABEL = 78, 74


def write_event_page(
    result: VisualizationResult, settings: VisualizationSettings, folder: Path
) -> None:
    """Write the pictures and reports of a visualization to an event file; older ones are removed.

    Each picture is drawn or cut such that it can be read on a card.
    """
    for old in folder.glob("events.out.tfevents.*"):
        ownership.remove(old)
    with event_writer(folder) as writer:
        for kind, name, cards in _pages(result, settings):
            group, description = GROUPS[kind]
            # Tiles of photographs and of what projections make of them.
            encode = png_or_jpeg if kind in ("layers", "control", "evolution") else png
            summary = image_summary(f"{group}/{name}", cards, description, encode=encode)
            writer.file_writer.add_summary(summary, 0)
        rows = [
            f"| {name} | {report} |"
            for name, projections in result.projections.items()
            for report in projections.reports.values()
        ]
        table = "\n".join(["| layer | how |", "|---|---|", *rows])
        how = "How the projections of each layer were made."
        writer.file_writer.add_summary(text_summary("visualization", table, how), 0)


def _pages(
    result: VisualizationResult, settings: VisualizationSettings
) -> Iterator[tuple[str, str, list[Tensor]]]:
    """Yield the group, the name and the cards of every picture."""
    filters = pixel_filters(result.projector)
    if filters is not None:
        yield "filters", filters[0], filter_cards(as_curves(shade_signed(filters[1])))
    for layer, projections in result.projections.items():
        rows = rows_in_grid(projections, settings)[:MOST_CARDS]
        yield "layers", layer, [map_card(projections, row, settings.contrast) for row in rows]
    for layer, projections in result.control.items():
        rows = control_rows(projections, settings)
        yield "control", layer, [map_card(projections, row, settings.contrast) for row in rows]
    for layer, e in result.evolutions.items():
        yield "evolution", layer, evolution_cards(e)
    for name, picture in result.pictures.items():
        for kind in ("occlusion", "invariance"):
            if name.startswith(kind):
                yield kind, name, cut_into_cards(picture)


def map_card(projections: TopProjections, row: int, contrast: float = CONTRAST) -> Tensor:
    """The strongest activations of a map on one card: a row for each method, and the image."""
    count = min(projections.count(row), SHOWN)
    title = f"map {projections.maps[row]}"
    if count == 0:
        return text_block(f"{title}: no image activates it", CARD, LINE)
    values = [plain_number(float(value)) for value in projections.values[row, :count]]
    tiles = {
        method: shade_projections(shown[:count], width=TILE, contrast=contrast)
        for method, shown in tiles_to_show(projections, row).items()
    }
    patches = torch.from_numpy(projections.patches[row, :count]).float() / 255
    tiles["image"] = resize_tiles(patches, TILE)
    labels = [text_block(name, LABEL, shown.shape[2]) for name, shown in tiles.items()]
    columns = [vstack(list(column), GAP) for column in zip(*tiles.values(), strict=True)]
    page = hstack([vstack(labels, GAP), *columns], GAP)
    return with_title(f"{title}: activations {', '.join(values)}", page)
