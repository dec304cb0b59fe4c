"""The result of a visualization, as far as it has been computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from deconvnet.images.datasets import LazyImages
from deconvnet.visualization.drawing.canvas import CONTRAST
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.projection.projection import LayerInfo
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import TopActivations
from deconvnet.visualization.search.top_projections import TopProjections


@dataclass(frozen=True)
class LayerMeasurements:
    """What was measured of a layer on its own: facts about it, and values (K,) of all its maps by
    name, by which they can be sorted; NaN where there is none."""

    facts: Mapping[str, str | float] = field(default_factory=dict)
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class VisualizationResult:
    """What drives the maps of a network, in which images, and the pictures of it.

    infos: of the layers that were searched. By layer: top_activations, the strongest activations;
    projections, their projections; control, the projections of the same network with shuffled
    weights; evolutions, features over the epochs of training, and measurements, for some layers.
    pictures: (3, H, W) in [0, 1] by name; the grid of a layer has the name of the layer.
    """

    model: LoadedModel
    projector: Projector
    images: LazyImages
    infos: dict[str, LayerInfo]
    contrast: float = CONTRAST
    evolutions: Mapping[str, Evolution] = field(default_factory=dict)
    top_activations: dict[str, TopActivations] = field(default_factory=dict)
    projections: dict[str, TopProjections] = field(default_factory=dict)
    control: dict[str, TopProjections] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
    measurements: Mapping[str, LayerMeasurements] = field(default_factory=dict)

    @property
    def shown_images(self) -> ShownImages:
        """The images as RGB pixels for pictures."""
        return ShownImages(self.images, self.projector)


@dataclass(frozen=True)
class ShownImages:
    """The images that a projector prepares, each (3, H, W) in [0, 1], for pictures."""

    images: LazyImages
    projector: Projector

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return self.projector.shown(self.images[number][None])[0]
