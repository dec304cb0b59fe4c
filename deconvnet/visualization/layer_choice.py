"""The layers of a network that can be visualized, and the default choice among them."""

from __future__ import annotations

import re

from torch import Tensor

from deconvnet.visualization.projection.projection import LayerInfo
from deconvnet.visualization.projection.projector import Projector

# Modules without their own features: their units are those of the previous layer.
PASS_THROUGH = re.compile(r"pool|dropout|identity|flatten", re.IGNORECASE)
MOST_LAYERS = 6


def projectable_layers(projector: Projector, image: Tensor) -> list[LayerInfo]:
    """`Projector.layers` for an image (3, H, W) in [0, 1]; ValueError if the model fails on it."""
    return projector.layers(projector.prepare(image[None]))


def default_layers(infos: list[LayerInfo]) -> list[str]:
    """All layers of a deconvolutional network; of a CNN, the last layer of each size of maps.

    Modules that only pass on features, modules that end with one of these, and vectors are ignored.
    """
    if all(info.kind == "Layer" for info in infos):
        return [info.name for info in infos]
    last: dict[tuple[int, ...], str] = {}
    previous: LayerInfo | None = None  # the previous module, if it passes on features
    for info in infos:
        is_part = previous and previous.name.startswith(f"{info.name}.")
        ends = is_part and previous.shape == info.shape
        previous = info if ends or PASS_THROUGH.search(info.kind) else None
        if previous is None and min(info.shape[1:]) > 1:
            last[info.shape[1:]] = info.name
    return list(last.values())[:MOST_LAYERS]
