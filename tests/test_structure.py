"""The package is a list of modules and folders, each of which knows only those before it, and an
import loads no more of it, and of other packages, than it needs.
"""

import ast
import functools
import json
import os
import subprocess
import sys
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
    "nn",
    "images",
    "monitoring",
    "network",
    "visualization",
    "activations",
    "training",
    "dictionary",
    "stability",
    "num_maps_choice",
    "signals",
    "recordings",
    "applications",
    "sklearn",
    "cli",
]
# The folders and modules of `visualization`, lowest first; a module knows only those before it.
VISUALIZATION = [
    "drawing",
    "models",
    "projection",
    "search",
    "evolution",
    "pictures",
    "experiments",
    "result",
    "settings",
    "cache_keys",
    "layer_choice",
    "manifest",
    "event_page",
    "searched_network",
    "gallery",
    "report",
]
# The package itself and the command line see everything; nothing sees them.
ABOVE = {"__init__", "__main__"}
# No module, but a name that the package itself defines.
LITERALS = {"__version__"}

SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def module_of(path):
    """The place in the order that a file belongs to: its folder, or its own name."""
    return path.parts[0].removesuffix(".py")


@functools.cache
def imports(source):
    """The import statements of a source, also inside functions."""
    tree = ast.parse(source)
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_modules(source, folder=(), parent="deconvnet"):
    """The modules and folders of a parent that a source in this folder imports from, also inside
    functions."""
    modules = set()
    for node in imports(source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            here = ("deconvnet", *folder)
            origin = here[: len(here) - node.level + 1] if node.level else ()
            origin = ".".join((*origin, *filter(None, [node.module])))
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for name in names:
            if f"{name}.".startswith(f"{parent}."):
                modules.add(name[len(parent) + 1 :].partition(".")[0] or "__init__")
    return modules


def test_imports_of_every_form_are_recognised():
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


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parts[0] == "visualization"], ids=str
)
def test_a_module_of_visualization_imports_only_those_before_it(path):
    module = path.parts[1].removesuffix(".py")
    if module == "__init__":
        return
    assert module in VISUALIZATION, f"{module} has no place in the order of visualization"
    allowed = set(VISUALIZATION[: VISUALIZATION.index(module)])
    if len(path.parts) > 2:
        allowed.add(module)
    source = (PACKAGE / path).read_text(encoding="utf-8")
    imported = imported_modules(source, path.parts[:-1], "deconvnet.visualization")
    assert imported <= allowed, f"{path} imports {sorted(imported - allowed)}"


def test_there_are_modules_to_check():
    assert {"operators", "network", "visualization", "dictionary"} <= set(map(module_of, SOURCES))


CODE = "deconvnet.sparse_code(torch.ones(1, 1, 8, 8), torch.ones(2, 1, 3, 3), lam=1.0"
CODING = {"support", "operators", "sparse_coding"}
NETWORK = {*CODING, "storage", "filters", "images", "network"}
LEARNING = {*NETWORK, "monitoring", "training"}
FILES = {"filelock", "safetensors"}
# What coordinate descent loads, which alone is compiled (the last by numpy, where it is installed).
NUMBA = {"numba", "llvmlite", "yaml", "scipy", "charset_normalizer"}


STATEMENTS = {
    "import": "import deconvnet",
    "sparse_code": f"import deconvnet; {CODE}, settings=deconvnet.SolverSettings())",
    "coordinate descent": f"import deconvnet; {CODE})",
    "load": "import deconvnet; deconvnet.load",
    "learn_filters": "import deconvnet; deconvnet.learn_filters",
    "sklearn": "import deconvnet.sklearn",
}
# Importing torch takes seconds: each statement runs in a fork of one process that has imported it.
PROGRAM = """
import json, os, sys
import torch, numpy

for name, statement in json.loads(sys.argv[1]).items():
    if os.fork():
        os.wait()
        continue
    if name == "sklearn":
        import sklearn.pipeline
    before = set(sys.modules)
    exec(statement)
    loaded = [module.split(".") for module in set(sys.modules) - before]
    modules = {parts[1] for parts in loaded if parts[0] == "deconvnet" and len(parts) > 1}
    packages = {parts[0] for parts in loaded if not parts[0].endswith("__mypyc")}
    packages -= {module.split(".")[0] for module in before}
    packages -= set(sys.stdlib_module_names)
    print(json.dumps([name, sorted(modules), sorted(packages)]), flush=True)
    os._exit(0)
"""


@functools.cache
def loaded():
    """For each statement (places in the order of the modules, packages): what it adds to torch and
    numpy in a new process, and deconvnet.sklearn to scikit-learn.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(STATEMENTS)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    # Cython registers its runtime under names of its own.
    return {
        name: (set(modules), {package for package in packages if not package.startswith("_")})
        for name, modules, packages in map(json.loads, done.stdout.splitlines())
    }


@pytest.mark.parametrize(
    ("name", "modules", "packages"),
    [
        ("import", set(), set()),
        ("sparse_code", CODING, set()),
        ("coordinate descent", CODING, NUMBA),
        ("load", NETWORK, FILES),
        ("learn_filters", {*LEARNING, "dictionary"}, {*FILES, "PIL"}),
        (
            "sklearn",
            {*LEARNING, "dictionary", "signals", "applications", "sklearn"},
            {*FILES, "PIL"},
        ),
    ],
)
def test_an_import_loads_no_more_than_it_needs(name, modules, packages):
    loaded_modules, loaded_packages = loaded()[name]
    assert loaded_modules == modules
    assert loaded_packages <= {"deconvnet", *packages}


def test_every_public_name_is_there_and_is_listed():
    for name in deconvnet.__all__:
        assert getattr(deconvnet, name).__name__ == name
        assert name in dir(deconvnet)
    assert "__version__" in dir(deconvnet)


def test_type_checkers_see_the_public_names_where_they_are_loaded_from():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("deconvnet")
        for alias in node.names
    }
    assert imported == deconvnet._MODULES
    assert sorted(imported) == sorted(deconvnet.__all__)


def test_an_unknown_name_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match="module 'deconvnet' has no attribute 'no_such_name'"):
        deconvnet.no_such_name  # noqa: B018
