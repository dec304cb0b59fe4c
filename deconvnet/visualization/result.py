"""What a visualization has found out about a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from deconvnet.images.datasets import LazyImages
from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.models.zoo import LoadedModel
from deconvnet.visualization.pictures.projection_grids import CONTRAST
from deconvnet.visualization.projection.projection import LayerInfo
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import TopActivations
from deconvnet.visualization.search.top_projections import TopProjections


@dataclass
class VisualizationResult:
    """What is known of a network: who drives its maps, in which images, and the pictures of it.

    infos: the layers that were looked at; tops, found, control: of each the strongest activations,
    their projections, and those of the network with its weights shuffled; evolutions: of some
    layers, in the course of training; pictures: by name, those of a layer under its own.
    """

    subject: LoadedModel
    projector: Projector
    images: LazyImages
    infos: dict[str, LayerInfo]
    contrast: float = CONTRAST
    evolutions: Mapping[str, Evolution] = field(default_factory=dict)
    tops: dict[str, TopActivations] = field(default_factory=dict)
    found: dict[str, TopProjections] = field(default_factory=dict)
    control: dict[str, TopProjections] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)
