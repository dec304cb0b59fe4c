"""What is built and installed is whole: it works without a checkout, and without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import deconvnet

ROOT = Path(__file__).resolve().parents[1]
# What a checkout may hold in addition to its files.
IGNORED = shutil.ignore_patterns(
    *(".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"),
    *("build", "dist", "runs", "outputs", "multirun", "data"),
)
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, source distribution), built from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("built") / "copy"
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: kept_out(folder, names))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (source,) = copy.glob("dist/*.whl"), copy.glob("dist/*.tar.gz")
    return wheel, source


def kept_out(folder, names):
    """configs/data is part of the project; a data folder next to it is not."""
    return set(IGNORED(folder, names)) - ({"data"} if Path(folder).name == "configs" else set())


def files_below(*folders):
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_wheel_has_every_module_and_every_file_of_settings(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        info = f"deconvnet-{deconvnet.__version__}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
    expected = files_below("deconvnet")
    expected |= {f"deconvnet/{path}" for path in files_below("configs")}
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names and "deconvnet/py.typed" in names
    assert "License-Expression: BSD-3-Clause" in metadata
    assert f"Version: {deconvnet.__version__}\n" in metadata
    # Links to files of the repository lead nowhere on an index.
    assert not re.search(r"\]\((?!https?:|#)", metadata) and "<img" not in metadata
    assert "docs/coding.md" in metadata


def test_a_source_distribution_has_all_that_the_tests_and_guides_need(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    tree = ("deconvnet", "configs", "scripts", "tests", "benchmarks", "docs", "examples")
    expected = {path for path in files_below(*tree) if Path(path).suffix != ".pyc"}
    # What building the site has written.
    expected -= {
        path for path in expected if path.startswith(("docs/examples/", "docs/notebooks/"))
    }
    expected |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"}
    expected |= {"pyproject.toml", "setup.py", "MANIFEST.in", ".ci/run"}
    assert expected <= names, sorted(expected - names)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """run(*command): what a user sees who has the wheel and no checkout, in an empty folder."""
    place, work = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("work")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(place), str(built[0])], check=True)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        # Before an editable installation of the checkout, where there is one.
        "PYTHONPATH": str(place),
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }

    def run(*command):
        return subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=300
        )

    return run, place, work


def test_an_installed_command_lists_the_commands(installed):
    done = installed[0]("deconvnet", "--help")
    assert done.returncode == 0 and done.stderr == "", done
    assert "deconvnet COMMAND key=value" in done.stdout and "train-cnn" in done.stdout


# Runs the program sys.argv[1] with each list of arguments in a process of its own, all of which are
# forks of one that has imported torch. Prints the code, the output and the files there are then.
ONE_BY_ONE = """
import ast, json, os, runpy, sys, tempfile
import deconvnet.cli.launch, deconvnet.training.loop

_, program, *orders = sys.argv
for order in map(ast.literal_eval, orders):
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            sys.argv = [program, *order]
            runpy.run_path(program, run_name="__main__")
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        print(json.dumps({"code": code, "out": out.read(), "left": os.listdir()}), flush=True)
"""


def test_an_installed_command_trains_and_reconstructs_in_an_empty_folder(installed):
    run, place, work = installed
    small = ["progress=false", "device=cpu", "data.size=24", "data.max_images=2"]
    small += ["model.layer1.num_maps=3", "model.layer1.filter_size=3"]
    small += ["model.layer1.learning.epochs=1", "model.layer1.solver.iterations=3"]
    picture = "runs/photographs/pictures/layer1-filters.png"
    orders = [
        ["train", "+layers=1", "preprocessing=mean", *small],
        ["reconstruct", "run=runs/photographs", f"images={picture}", "output=out"],
    ]
    program = str(place / "bin" / "deconvnet")
    done = run(sys.executable, "-c", ONE_BY_ONE, program, *map(str, orders))
    assert done.returncode == 0 and done.stderr == "", done
    train, reconstruct = map(json.loads, done.stdout.splitlines())
    assert train["code"] == reconstruct["code"] == 0, done
    assert "deconvnet reconstruct run=runs/photographs layer=1" in train["out"]
    assert train["left"] == ["runs"]
    assert (work / "out" / "layer1-filters-layer1.png").is_file()


def test_an_installed_package_does_not_read_the_checkout(installed):
    run, place, _ = installed
    program = (
        "import deconvnet, sys\n"
        "print(deconvnet.__file__)\n"
        f"print([path for path in sys.path if path.rstrip('/') == {str(ROOT)!r}])"
    )
    lines = run(sys.executable, "-c", program).stdout.splitlines()
    assert lines == [f"{place}/deconvnet/__init__.py", "[]"]


def test_the_citation_names_the_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {deconvnet.__version__}\n" in text
