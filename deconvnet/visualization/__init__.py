"""Pictures of what a network has learned: of ours, and of any other."""

from deconvnet.visualization.experiments.correspondence import correspondence
from deconvnet.visualization.experiments.invariance import invariance
from deconvnet.visualization.experiments.occlusion import occlusion
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.zoo import load_model
from deconvnet.visualization.pictures.evolution import evolution
from deconvnet.visualization.pictures.features import Features, pixel_features
from deconvnet.visualization.pictures.figures import filter_grid, layer_pictures
from deconvnet.visualization.pictures.grids import projection_grid
from deconvnet.visualization.pictures.parts import (
    Units,
    parts_picture,
    project,
    strongest,
    supporters,
)
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.randomization import shuffle_weights
from deconvnet.visualization.search.top_activations import find_top_activations
from deconvnet.visualization.search.top_projections import project_top_activations

__all__ = [
    "Features",
    "Normalization",
    "Projector",
    "Units",
    "project_top_activations",
    "correspondence",
    "evolution",
    "projection_grid",
    "filter_grid",
    "invariance",
    "layer_pictures",
    "load_model",
    "find_top_activations",
    "occlusion",
    "parts_picture",
    "pixel_features",
    "project",
    "shuffle_weights",
    "strongest",
    "supporters",
]
