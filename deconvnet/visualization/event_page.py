"""The TensorBoard page of a visualization: its pictures in readable sizes, and their methods."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from deconvnet.monitoring.event_files import event_writer
from deconvnet.monitoring.summaries import image_summary, text_summary
from deconvnet.storage import ownership
from deconvnet.visualization.pictures.canvas import shade_signed
from deconvnet.visualization.pictures.evolution_picture import evolution_cards
from deconvnet.visualization.pictures.layer_pictures import filter_sheet
from deconvnet.visualization.pictures.projection_grids import pixel_filters
from deconvnet.visualization.pictures.sheet import cut_into_cards
from deconvnet.visualization.result import VisualizationResult

# The groups of pictures, in the order of the page, and what they show.
GROUPS = {
    "filters": (
        "0 filters",
        "The filters that see pixels, with the number of the map below. Grey is zero; every "
        "filter has its own scale.",
    ),
    "layers": (
        "1 strongest activations",
        "For some maps: their strongest activations in these images, projected to pixels, next to "
        "the part of the image that the units see. Every tile has its own scale, so only its "
        "shape has a meaning. Control: the same for random weights, which shows what the images "
        "alone produce.",
    ),
    "evolution": (
        "2 evolution",
        "A row for each map, a column for each epoch: the strongest activation, projected to "
        "pixels. The number of the image is below a tile if it differs from that of the tile "
        "before.",
    ),
    "occlusion": (
        "3 occlusion",
        "What changes in the network when a grey square covers a part of the image.",
    ),
    "invariance": (
        "4 invariance",
        "How far the features move when the image is shifted, scaled or rotated.",
    ),
}


def write_event_page(result: VisualizationResult, folder: Path) -> None:
    """Write all pictures and reports of a visualization to an event file; older ones are removed.

    A tag has the same picture as the file of that name, cut into cards.
    """
    for old in folder.glob("events.out.tfevents.*"):
        ownership.remove(old)
    with event_writer(folder) as writer:
        for name, picture in result.pictures.items():
            group, description = GROUPS[_group(name)]
            summary = image_summary(f"{group}/{name}", _cards(result, name, picture), description)
            writer.file_writer.add_summary(summary, 0)
        rows = [
            f"| {name} | {report} |"
            for name, projections in result.projections.items()
            for report in projections.reports.values()
        ]
        table = "\n".join(["| layer | how |", "|---|---|", *rows])
        how = "How the projections of each layer were made."
        writer.file_writer.add_summary(text_summary("visualization", table, how), 0)


def _group(name: str) -> str:
    for kind in ("occlusion", "invariance"):
        if name.startswith(kind):
            return kind
    for kind in ("filters", "evolution"):
        if name.endswith(f"-{kind}"):
            return kind
    return "layers"


def _cards(result: VisualizationResult, name: str, picture: Tensor) -> list[Tensor]:
    layer = name.rpartition("-")[0]
    if _group(name) == "evolution" and layer in result.evolutions:
        return evolution_cards(result.evolutions[layer])
    if _group(name) == "filters":
        return filter_sheet(shade_signed(pixel_filters(result.projector)[1])).cards()
    return cut_into_cards(picture)
