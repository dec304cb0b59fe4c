"""The content of the gallery: the result of a visualization as layers, maps, images and captions.

What the search has kept is in the result. One more pass over a sample of the images surveys what
the maps do elsewhere (`survey`), and the images of the explorer pass the network again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.evolution.evolution import Evolution
from deconvnet.visualization.gallery.exhibits import (
    Control,
    Example,
    Figure,
    GalleryLayer,
    GalleryMap,
    Source,
)
from deconvnet.visualization.gallery.explorer import explorer_image
from deconvnet.visualization.gallery.gallery import write_gallery
from deconvnet.visualization.gallery.layer_files import TILE
from deconvnet.visualization.gallery.photographs import Photographs
from deconvnet.visualization.gallery.relatives import (
    SOURCES,
    closest,
    filter_weights,
    pooled_maps,
    separate_sources,
    similarities,
)
from deconvnet.visualization.gallery.survey import Survey, survey_layers
from deconvnet.visualization.gallery.wording import (
    border_sentence,
    figure_caption,
    report_sentences,
    subtitle_of,
    title_of,
)
from deconvnet.visualization.pictures.canvas import quantile_magnitude, shade_signed
from deconvnet.visualization.pictures.projection_grids import pixel_filters, shade_projections
from deconvnet.visualization.projection.projection import LayerInfo, crop
from deconvnet.visualization.result import VisualizationResult
from deconvnet.visualization.search.top_activations import Progress, get_image
from deconvnet.visualization.search.top_projections import TopProjections
