"""Pictures of what a network has learned."""

from deconvnet.visualization.features import Features, pixel_features
from deconvnet.visualization.figures import filter_grid, layer_pictures
from deconvnet.visualization.parts import Units, parts_picture, project, strongest, supporters

__all__ = [
    "Features",
    "Units",
    "filter_grid",
    "layer_pictures",
    "parts_picture",
    "pixel_features",
    "project",
    "strongest",
    "supporters",
]
