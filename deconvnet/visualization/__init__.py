"""Pictures of what a network has learned."""

from deconvnet.visualization.features import Features, pixel_features
from deconvnet.visualization.figures import filter_grid, layer_pictures

__all__ = ["Features", "filter_grid", "layer_pictures", "pixel_features"]
