"""The content of the gallery: the result of a visualization as layers, maps, images and captions.

What the search has kept is in the result (`layer_content`). One more pass over a sample of the
images surveys what the maps do elsewhere (`survey`), and the images of the explorer pass the
network again (`explorer`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from deconvnet.visualization.gallery.exhibits import Figure, GalleryImage
from deconvnet.visualization.gallery.explorer import explorer_image
from deconvnet.visualization.gallery.gallery import write_gallery
from deconvnet.visualization.gallery.layer_content import layer_content
from deconvnet.visualization.gallery.photographs import Photographs
from deconvnet.visualization.gallery.survey import survey_layers
from deconvnet.visualization.gallery.wording import (
    figure_caption,
    how_projected,
    subtitle_of,
    title_of,
    words_of,
)
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.search_region import searched_units
from deconvnet.visualization.search.top_activations import Progress

# Images in the explorer, spread evenly over all.
EXPLORER = 8
# The first images of the explorer can be repainted.
REPAINTED = 3


def write_result_gallery(
    folder: Path,
    result: VisualizationResult,
    *,
    explorer_images: int = EXPLORER,
    inside: bool = True,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Write the gallery of a result and return the path of its page.

    explorer_images: images in the explorer, spread evenly over all; inside: whether the search left
    out units at the border; notes: further paragraphs.
    """
    count = min(explorer_images, len(result.images))
    numbers = np.linspace(0, len(result.images) - 1, count).round().astype(int).tolist()
    steps = itertools.count(1)
    total = sum(len(p.maps) for p in result.projections.values()) + count

    def step() -> None:
        if progress:
            progress(next(steps), total)

    def images() -> Iterator[GalleryImage]:
        for number in numbers:
            repainted = number in numbers[:REPAINTED]
            yield explorer_image(result, number, repainted=repainted)
            step()

    layers = list(result.projections)
    masks = partial(_searched, result) if inside else lambda image: {}
    surveys = survey_layers(result.projector, result.images, masks, layers)
    names = _short_names(result.images.names)
    return write_gallery(
        folder,
        title=title_of(result),
        subtitle=subtitle_of(result),
        facts=_facts(result),
        layers=(
            layer_content(result, layer, surveys[layer], names, step)
            for layer in result.projections
        ),
        images=images(),
        photographs=Photographs(names, result.shown_images),
        words=words_of(result),
        figures=[
            Figure(picture, figure_caption(name, result.projections, words_of(result)))
            for name, picture in result.pictures.items()
            if name not in result.projections
        ],
        notes=[
            *(
                sentence
                for layer, projections in result.projections.items()
                for sentence in how_projected(layer, projections)
            ),
            *notes,
        ],
    )


def _short_names(names: Sequence[str]) -> list[str]:
    """The names of images, with their folders if these differ, as folders are often classes."""
    folders = {Path(name).parent for name in names}
    return ["/".join(Path(name).parts[-1 if len(folders) == 1 else -2 :]) for name in names]


def _facts(result: VisualizationResult) -> dict[str, str | int]:
    model = result.model
    return {
        "network": model.name,
        "weights": model.weights,
        f"{words_of(result)['images']} searched": len(result.images),
        "sha256 of its parameters": model.digest,
    }


def _searched(result: VisualizationResult, image: Tensor) -> dict[str, Tensor]:
    """By layer, the positions (H, W) that a search of an image (3, H, W) looks at."""
    projector, size = result.projector, tuple(image.shape[1:])
    infos = projector.layers(projector.prepare(image[None]))
    return {info.name: searched_units(info, size) for info in infos}
