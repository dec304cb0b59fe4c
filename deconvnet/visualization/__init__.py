"""Pictures of what a network has learned: of ours, and of any other."""

from deconvnet.visualization.control import randomised
from deconvnet.visualization.correspondence import correspondence
from deconvnet.visualization.evolution import evolution
from deconvnet.visualization.exemplars import collect
from deconvnet.visualization.features import Features, pixel_features
from deconvnet.visualization.figures import filter_grid, layer_pictures
from deconvnet.visualization.grids import exemplar_grid
from deconvnet.visualization.invariance import invariance
from deconvnet.visualization.mining import mine
from deconvnet.visualization.models import load_model
from deconvnet.visualization.normalization import Normalization
from deconvnet.visualization.occlusion import occlusion
from deconvnet.visualization.parts import Units, parts_picture, project, strongest, supporters
from deconvnet.visualization.projector import Projector

__all__ = [
    "Features",
    "Normalization",
    "Projector",
    "Units",
    "collect",
    "correspondence",
    "evolution",
    "exemplar_grid",
    "filter_grid",
    "invariance",
    "layer_pictures",
    "load_model",
    "mine",
    "occlusion",
    "parts_picture",
    "pixel_features",
    "project",
    "randomised",
    "strongest",
    "supporters",
]
