"""deconvnet: learn a hierarchy of visual features from unlabelled images, and see what they are."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# The module of each name above, which is imported when one of its names is first asked for. So the
# command line answers --help without torch, and sets the environment of torch's threads in time.
_MODULES = {
    "deconvnet.dictionary": ("Learned", "learn_filters", "learn_online"),
    "deconvnet.filters.update": ("LearningSettings",),
    "deconvnet.images.preprocessing": ("PreprocessingSettings",),
    "deconvnet.network.network": ("Codes", "DeconvNet", "LayerSettings", "load"),
    "deconvnet.sparse_coding.solvers": ("Solution", "SolverSettings", "sparse_code"),
}


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'deconvnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
