"""deconvnet: learn a hierarchy of visual features from unlabelled images, and see what they are."""

from deconvnet.learning import LearningSettings
from deconvnet.network import Codes, DeconvNet, LayerSettings, load
from deconvnet.preprocessing import PreprocessingSettings
from deconvnet.solvers import Solution, SolverSettings, sparse_code
from deconvnet.trainer import learn_filters

__all__ = [
    "Codes",
    "DeconvNet",
    "LayerSettings",
    "LearningSettings",
    "PreprocessingSettings",
    "Solution",
    "SolverSettings",
    "learn_filters",
    "load",
    "sparse_code",
]
