"""Check the installation: versions, devices, caches, and solves of known answer.

deconvnet doctor
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig

from deconvnet import __version__
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.read_settings import read_settings
from deconvnet.sparse_coding import kernels
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.sparse_coding.solve import sparse_code
from deconvnet.support.compiling import cache_folder
from deconvnet.support.devices import torch_device

PACKAGES = ("torchvision", "numpy", "numba", "scipy", "scikit-learn", "hydra-core")
# Methods that are checked; coordinate descent is compiled for the CPU only.
METHODS = ("coordinate", "fista", "admm")
ANYWHERE = ("fista", "admm")
TOLERANCE = 1e-4


def main(cfg: DictConfig) -> None:
    with one_line_errors(ValueError, OSError):
        if not examine(torch_device(read_settings(cfg).device)):
            raise SystemExit(1)


def examine(device: torch.device) -> bool:
    """Print what was found; whether all is well."""
    for line in (*_versions(), *_devices(device), *_caches()):
        print(line)
    print()
    passed = [_imports("torchvision")]
    methods = METHODS if device.type == "cpu" else ANYWHERE
    passed += [_check(f"{m} on {device}", lambda m=m: _solve(m, device)) for m in methods]
    print()
    print("all is well" if all(passed) else "something is wrong: see above")
    return all(passed)


def _versions() -> Iterator[str]:
    yield f"deconvnet       {__version__}, in {Path(__file__).parents[1]}"
    yield f"python          {platform.python_version()}, {sys.executable}"
    yield f"system          {platform.platform()}"
    yield f"torch           {torch.__version__}"  # with its build, such as +cpu
    for name in PACKAGES:
        try:
            yield f"{name:15} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name:15} not installed"


def _devices(device: torch.device) -> Iterator[str]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(n) for n in range(gpus))
    yield f"device          {device}; {f'{gpus} GPUs: {names}' if gpus else 'no CUDA GPU'}"
    yield f"threads         {torch.get_num_threads()} of {os.cpu_count()} processors"


def _imports(name: str) -> bool:
    """Whether a package can be imported: builds of torch and torchvision may not fit together."""
    try:
        importlib.import_module(name)
    except Exception as problem:  # torchvision raises RuntimeError, others ImportError
        print(
            f"FAILED  import {name}: {_reason(problem)}; install it from the same index as torch "
            "(docs/start.md#how-large-is-the-installation)"
        )
        return False
    print(f"ok      import {name}")
    return True


def _caches() -> Iterator[str]:
    folder = cache_folder(kernels.descend)
    if folder is None:
        yield "compiled loops  not cached: every process compiles them"
        return
    writable = os.access(_nearest(folder), os.W_OK)
    yield f"compiled loops  {folder}" + ("" if writable else ", NOT writable: set NUMBA_CACHE_DIR")


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def _check(name: str, check: Callable[[], float]) -> bool:
    """Run a check that returns an error; any exception is a failure, and the rest goes on."""
    started = time.perf_counter()
    try:
        error = check()
    except Exception as problem:  # whatever an installation can be missing
        print(f"FAILED  {name}: {_reason(problem)}")
        return False
    passed = error <= TOLERANCE
    seconds = time.perf_counter() - started
    print(f"{'ok' if passed else 'WRONG':7} {name}: error {error:.1e}, {seconds:.1f} s")
    return passed


def _reason(problem: Exception) -> str:
    return (" ".join(str(problem).split()) or type(problem).__name__)[:200]


def _solve(method: str, device: torch.device) -> float:
    """The largest error of a code whose minimum is known: filters of one pixel shrink the image.

    minimise over z      lam/2 (z - y)^2 + |z|      z = sign(y) max(|y| - 1 / lam, 0)
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 1, 16, 16, generator=generator).to(device)
    lam = 4.0
    settings = SolverSettings(method, iterations=500, tolerance=0, gap=1e-7)
    z = sparse_code(y, torch.ones(1, 1, 1, 1, device=device), lam=lam, settings=settings).z
    return float((z - y.sign() * (y.abs() - 1 / lam).clamp(min=0)).abs().max())
