"""Visualization of the features of deconvolutional networks and of any convolutional network.

The names below are loaded when they are first used, so that importing this package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deconvnet.visualization.evolution.from_checkpoints import project_checkpoints
    from deconvnet.visualization.experiments.correspondence import (
        correspondence,
        correspondence_picture,
        correspondence_table,
    )
    from deconvnet.visualization.experiments.faithfulness import Faithfulness, faithfulness
    from deconvnet.visualization.experiments.invariance import invariance, invariance_picture
    from deconvnet.visualization.experiments.occlusion import occlusion
    from deconvnet.visualization.experiments.occlusion_picture import occlusion_picture
    from deconvnet.visualization.models.normalization import Normalization
    from deconvnet.visualization.models.zoo import load_model
    from deconvnet.visualization.pictures.image_decomposition import (
        Activations,
        project_activations,
        strongest_activations,
        supporting_activations,
    )
    from deconvnet.visualization.pictures.image_parts import ImageParts, image_parts
    from deconvnet.visualization.pictures.layer_pictures import filter_grid, layer_pictures
    from deconvnet.visualization.pictures.parts_picture import image_parts_picture
    from deconvnet.visualization.projection.feature_projection import PixelFeatures, pixel_features
    from deconvnet.visualization.projection.projector import Projector
    from deconvnet.visualization.report import visualize_network
    from deconvnet.visualization.search.projecting import project_top_activations
    from deconvnet.visualization.search.projection_grids import layer_grid, projection_grid
    from deconvnet.visualization.search.randomization import shuffle_weights, shuffled_control
    from deconvnet.visualization.search.strongest_units import strongest
    from deconvnet.visualization.search.top_activations import find_top_activations
    from deconvnet.visualization.settings import VisualizationSettings

# The module that defines each public name, below this package.
MODULES = {
    "Activations": "pictures.image_decomposition",
    "Faithfulness": "experiments.faithfulness",
    "ImageParts": "pictures.image_parts",
    "Normalization": "models.normalization",
    "PixelFeatures": "projection.feature_projection",
    "Projector": "projection.projector",
    "VisualizationSettings": "settings",
    "correspondence": "experiments.correspondence",
    "correspondence_picture": "experiments.correspondence",
    "correspondence_table": "experiments.correspondence",
    "faithfulness": "experiments.faithfulness",
    "filter_grid": "pictures.layer_pictures",
    "find_top_activations": "search.top_activations",
    "image_parts": "pictures.image_parts",
    "image_parts_picture": "pictures.parts_picture",
    "invariance": "experiments.invariance",
    "invariance_picture": "experiments.invariance",
    "layer_grid": "search.projection_grids",
    "layer_pictures": "pictures.layer_pictures",
    "load_model": "models.zoo",
    "occlusion": "experiments.occlusion",
    "occlusion_picture": "experiments.occlusion_picture",
    "pixel_features": "projection.feature_projection",
    "project_activations": "pictures.image_decomposition",
    "project_checkpoints": "evolution.from_checkpoints",
    "project_top_activations": "search.projecting",
    "projection_grid": "search.projection_grids",
    "shuffle_weights": "search.randomization",
    "shuffled_control": "search.randomization",
    "strongest": "search.strongest_units",
    "strongest_activations": "pictures.image_decomposition",
    "supporting_activations": "pictures.image_decomposition",
    "visualize_network": "report",
}
__all__ = [
    "Activations",
    "Faithfulness",
    "ImageParts",
    "Normalization",
    "PixelFeatures",
    "Projector",
    "VisualizationSettings",
    "correspondence",
    "correspondence_picture",
    "correspondence_table",
    "faithfulness",
    "filter_grid",
    "find_top_activations",
    "image_parts",
    "image_parts_picture",
    "invariance",
    "invariance_picture",
    "layer_grid",
    "layer_pictures",
    "load_model",
    "occlusion",
    "occlusion_picture",
    "pixel_features",
    "project_activations",
    "project_checkpoints",
    "project_top_activations",
    "projection_grid",
    "shuffle_weights",
    "shuffled_control",
    "strongest",
    "strongest_activations",
    "supporting_activations",
    "visualize_network",
]


def __getattr__(name: str) -> object:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
