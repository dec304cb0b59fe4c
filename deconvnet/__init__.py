"""deconvnet: learn a hierarchy of visual features from unlabelled images, and see what they are."""

from deconvnet.dictionary import Learned, learn_filters, learn_online
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.network.network import Codes, DeconvNet, LayerSettings, load
from deconvnet.sparse_coding.solvers import Solution, SolverSettings, sparse_code

__version__ = "0.1.0"

__all__ = [
    "Codes",
    "DeconvNet",
    "LayerSettings",
    "Learned",
    "LearningSettings",
    "PreprocessingSettings",
    "Solution",
    "SolverSettings",
    "learn_filters",
    "learn_online",
    "load",
    "sparse_code",
]
