"""The package is a list of modules, each of which knows only those before it."""

import ast
from pathlib import Path

import pytest

import deconvnet.convolution

PACKAGE = Path(deconvnet.convolution.__file__).parent

ORDER = [
    "convolution",
    "pooling",
    "sparsity",
    "arithmetic",
    "operators",
    "solvers",
    "learning",
    "preprocessing",
    "data",
    "checkpoint",
    "network",
    "visualization",
    "monitor",
    "training",
    "config",
]
# The package itself and the command line see everything; nothing sees them.
ABOVE = {"__init__", "__main__"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imported_modules(source):
    """Names of the modules of this package that a source imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "deconvnet" if node.level else ""
            origin = ".".join(part for part in (origin, node.module) if part)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "deconvnet":
                found.add(rest.partition(".")[0] or "__init__")
    return found


def test_imports_of_every_form_are_seen():
    source = """
import torch, deconvnet.data
import deconvnet.pooling as p
from deconvnet import network, sparsity as s
from deconvnet.solvers import solve
from . import monitor
from .config import read
def later():
    import deconvnet
    from deconvnet.training import train
"""
    assert imported_modules(source) == {
        "data",
        "pooling",
        "network",
        "sparsity",
        "solvers",
        "monitor",
        "config",
        "training",
        "__init__",
    }


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ABOVE])
def test_a_module_imports_only_modules_before_it(module):
    assert module in ORDER, f"{module}.py has no place in the order of the modules"
    allowed = set(ORDER[: ORDER.index(module)])
    imported = imported_modules((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    assert imported <= allowed, f"{module}.py imports {sorted(imported - allowed)}"


def test_there_are_modules_to_check():
    assert {"convolution", "pooling", "sparsity", "operators", "solvers"} <= set(MODULES)
