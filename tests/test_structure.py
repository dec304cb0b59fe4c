"""The package is a list of modules and folders, each of which knows only those before it."""

import ast
from pathlib import Path

import pytest

import deconvnet

PACKAGE = Path(deconvnet.__file__).parent

ORDER = [
    "support",
    "storage",
    "operators",
    "sparse_coding",
    "filters",
    "images",
    "monitoring",
    "network",
    "visualization",
    "training",
    "dictionary",
    "applications",
    "cli",
    "sklearn",
]
# The package itself and the command line see everything; nothing sees them.
ABOVE = {"__init__", "__main__"}
# No module, but a name that the package itself defines.
LITERALS = {"__version__"}

SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def module_of(path):
    """The place in the order that a file belongs to: its folder, or its own name."""
    return path.parts[0].removesuffix(".py")


def imported_modules(source, folder=()):
    """Places in the order that a source in this folder imports from, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ("deconvnet", *folder)
            origin = here[: len(here) - node.level + 1] if node.level else ()
            origin = ".".join((*origin, *filter(None, [node.module])))
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


def test_imports_inside_a_folder_are_relative_to_it():
    source = "from . import a\nfrom .b import c\nfrom ..learning import d\nfrom .. import data"
    assert imported_modules(source, ("visualization",)) == {"visualization", "learning", "data"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_module_imports_only_modules_before_it(path):
    module = module_of(path)
    if module in ABOVE:
        return
    assert module in ORDER, f"{module} has no place in the order of the modules"
    allowed = set(ORDER[: ORDER.index(module)])
    if len(path.parts) > 1:
        allowed.add(module)
    source = (PACKAGE / path).read_text(encoding="utf-8")
    imported = imported_modules(source, path.parts[:-1])
    assert imported <= allowed | LITERALS, f"{path} imports {sorted(imported - allowed)}"


def test_there_are_modules_to_check():
    assert {"operators", "network", "visualization", "dictionary"} <= set(map(module_of, SOURCES))
