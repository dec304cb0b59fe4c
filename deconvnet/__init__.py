"""deconvnet: learn a hierarchy of visual features from unlabelled images, and see what they are.

Importing the package loads none of its modules. A public name loads its module when it is first
used, so that a program which only codes images does not wait for training or for charts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers and editors; __getattr__ imports the same names
    from deconvnet.activations.source import ActivationSource
    from deconvnet.applications.restoration.restorer import Restorer
    from deconvnet.dictionary import Learned, learn_filters, learn_online
    from deconvnet.filters.update import Diverged, LearningSettings
    from deconvnet.images.datasets import load_images, sample_photographs
    from deconvnet.images.decoding import read_image
    from deconvnet.images.preprocessing import PreprocessingSettings
    from deconvnet.images.sources import DataSettings
    from deconvnet.network.codes import Codes
    from deconvnet.network.layer import LayerSettings
    from deconvnet.network.network import DeconvNet, load
    from deconvnet.num_maps_choice import NumMapsChoice, choose_num_maps
    from deconvnet.sparse_coding.events import Events
    from deconvnet.sparse_coding.lambda_choice import LamChoice, choose_lam
    from deconvnet.sparse_coding.problem import Solution, SolverSettings
    from deconvnet.sparse_coding.regularization_path import RegularizationPath, regularization_path
    from deconvnet.sparse_coding.solve import sparse_code
    from deconvnet.stability import measure_stability
    from deconvnet.training.loop import train
    from deconvnet.visualization.projection.patching import patch

__version__ = "0.1.0"

__all__ = [
    "ActivationSource",
    "Codes",
    "DataSettings",
    "DeconvNet",
    "Diverged",
    "Events",
    "LamChoice",
    "LayerSettings",
    "Learned",
    "LearningSettings",
    "NumMapsChoice",
    "PreprocessingSettings",
    "RegularizationPath",
    "Restorer",
    "Solution",
    "SolverSettings",
    "choose_lam",
    "choose_num_maps",
    "learn_filters",
    "learn_online",
    "load",
    "load_images",
    "measure_stability",
    "patch",
    "read_image",
    "regularization_path",
    "sample_photographs",
    "sparse_code",
    "train",
]

_MODULES = {
    "ActivationSource": "deconvnet.activations.source",
    "Codes": "deconvnet.network.codes",
    "DataSettings": "deconvnet.images.sources",
    "DeconvNet": "deconvnet.network.network",
    "Diverged": "deconvnet.filters.update",
    "Events": "deconvnet.sparse_coding.events",
    "LamChoice": "deconvnet.sparse_coding.lambda_choice",
    "LayerSettings": "deconvnet.network.layer",
    "Learned": "deconvnet.dictionary",
    "LearningSettings": "deconvnet.filters.update",
    "NumMapsChoice": "deconvnet.num_maps_choice",
    "PreprocessingSettings": "deconvnet.images.preprocessing",
    "RegularizationPath": "deconvnet.sparse_coding.regularization_path",
    "Restorer": "deconvnet.applications.restoration.restorer",
    "Solution": "deconvnet.sparse_coding.problem",
    "SolverSettings": "deconvnet.sparse_coding.problem",
    "choose_lam": "deconvnet.sparse_coding.lambda_choice",
    "choose_num_maps": "deconvnet.num_maps_choice",
    "learn_filters": "deconvnet.dictionary",
    "learn_online": "deconvnet.dictionary",
    "load": "deconvnet.network.network",
    "load_images": "deconvnet.images.datasets",
    "measure_stability": "deconvnet.stability",
    "patch": "deconvnet.visualization.projection.patching",
    "read_image": "deconvnet.images.decoding",
    "regularization_path": "deconvnet.sparse_coding.regularization_path",
    "sample_photographs": "deconvnet.images.datasets",
    "sparse_code": "deconvnet.sparse_coding.solve",
    "train": "deconvnet.training.loop",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
