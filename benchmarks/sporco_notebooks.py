"""Solve the problems of SPORCO's own notebooks, with SPORCO's settings and with deconvnet.

python benchmarks/sporco_notebooks.py                        all rows
python benchmarks/sporco_notebooks.py grey colour            some of them
python benchmarks/sporco_notebooks.py --threads 1 --repeats 3

The notebooks (github.com/bwohlberg/sporco-notebooks, 2022) publish seconds for their images,
filters and options. This script runs the same problems here: SPORCO with the options of its
notebook until its own rule stops it, then deconvnet with its default solver until its objective is
as low, and further to within 1e-3 of the minimum (float64, duality gap at most 1e-5). One float64
function evaluates the objectives of both while the clock is stopped:

    1/2 ||mask * (sum_k f_k * z_k - y)||^2 + lambda sum w |z|      circular convolution

Images and filters come with SPORCO (pip install -e '.[benchmark]'); nothing is downloaded. The rows
take turns for --repeats rounds in one process. A JSON file goes to runs/benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import timing
import torch
from problems import Objective, Problem

from deconvnet import SolverSettings
from deconvnet.sparse_coding.solve import coding_problem, default_solver, solve, sparse_code

GAP, LEVEL = 1e-5, 1e-3


@dataclass(frozen=True)
class Notebook:
    """A problem of a notebook, and how the notebook solves it.

    y (C, H, W), f (K, C, h, w), mask (H, W) and weights (K, H, W): float32 arrays in our order.
    solver(y, f, weight, mask, weights): SPORCO's solver, ready to solve, from the same arrays.
    published: the seconds that the notebook shows. restored, clean: how an image is made of what
    the maps synthesize, and the image whose PSNR the notebook shows.
    """

    y: np.ndarray
    f: np.ndarray
    weight: float
    published: float
    solver: Callable
    clean: np.ndarray
    restored: Callable[[np.ndarray], np.ndarray]
    mask: np.ndarray | None = None
    weights: np.ndarray | None = None

    @cached_property
    def circular(self) -> Objective:
        return Objective(Problem("notebook", self.y[None], self.f, self.weight))

    def objective(self, z: np.ndarray) -> float:
        """Of maps (1, K, H, W)."""
        error = self.circular.synthesize(z)[0] - self.y
        error = error if self.mask is None else self.mask * error
        size = np.abs(z[0]) if self.weights is None else self.weights * np.abs(z[0])
        return float(np.square(error).sum() / 2 + self.weight * size.sum(dtype=np.float64))

    def psnr(self, z: np.ndarray) -> float:
        error = self.restored(self.circular.synthesize(z)[0]) - self.clean
        return float(-10 * np.log10(np.square(error).mean()))


@dataclass
class Row:
    """What a row of the table shows; seconds: of each round."""

    name: str
    published: float
    minimum: float = 0.0
    objective: float = 0.0
    psnr: tuple[float, float] = (0.0, 0.0)
    sporco: list[float] = field(default_factory=list)
    as_low: list[float] = field(default_factory=list)
    to_level: list[float] = field(default_factory=list)


def main() -> None:
    options = arguments(__doc__, NOTEBOOKS, limit=120.0)
    notebooks = {name: NOTEBOOKS[name]() for name in options.rows}
    rows = [
        Row(name, notebook.published, minimum(notebook)) for name, notebook in notebooks.items()
    ]
    for notebook in notebooks.values():
        compile_kernels(notebook)
    run_rounds(
        rows, lambda row: run(row, notebooks[row.name], options.limit), HEADER, line, options
    )


def run_rounds(
    rows: list, run: Callable, header: str, line: Callable, options: argparse.Namespace
) -> None:
    """Run all rows in turn, print the table, and store it under the name of the program."""
    for turn in range(options.repeats):
        for row in rows:
            run(row)
            print(f"round {turn + 1}: {line(row)}")
    options.output.mkdir(parents=True, exist_ok=True)
    results = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": timing.machine(),
        "threads": options.threads,
        "rows": [asdict(row) for row in rows],
    }
    file = options.output / f"{Path(sys.argv[0]).stem}.json"
    file.write_text(json.dumps(results, indent=1))
    print(header)
    for row in rows:
        print(line(row))


HEADER = """
| row | published, s | SPORCO here, s | above the minimum | PSNR | ours as low, s | times as fast \
| ours to 1e-3, s | PSNR |
|---|---|---|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    ratio = timing.ratios(row.sporco, row.as_low)
    return (
        f"| {row.name} | {row.published:.1f} | {timing.spread(row.sporco)} "
        f"| {row.objective / row.minimum - 1:.1e} | {row.psnr[0]:.2f} "
        f"| {timing.spread(row.as_low)} | {statistics.median(ratio):.0f} "
        f"({min(ratio):.0f} to {max(ratio):.0f}) "
        f"| {timing.spread(row.to_level)} | {row.psnr[1]:.2f} |"
    )


def run(row: Row, notebook: Notebook, limit: float) -> None:
    """One round of a row: SPORCO's notebook, then ours."""
    solver = notebook.solver(notebook)
    solver.solve()
    row.sporco.append(float(solver.timer.elapsed("solve")))
    z = np.asarray(solver.getcoef()).reshape(*notebook.y.shape[1:], -1).transpose(2, 0, 1)[None]
    row.objective = notebook.objective(z)
    points, maps = timed(notebook, row.minimum * (1 + LEVEL), limit)
    row.as_low.append(timing.time_to(points, row.objective, 0)[0])
    row.to_level.append(timing.time_to(points, row.minimum, LEVEL)[0])
    row.psnr = notebook.psnr(z), notebook.psnr(maps)


def timed(notebook: Notebook, goal: float, limit: float) -> tuple[list, np.ndarray]:
    """The points of our default solver until the goal, and its last maps."""
    recorder = timing.Recorder(lambda z: np.array([notebook.objective(z)]), goal=goal, limit=limit)
    A, b, prior = coding_problem(**arguments_of(notebook, torch.float32))
    settings = default_solver(b)
    settings = SolverSettings(settings.method, iterations=10**6, tolerance=0.0)
    maps = None

    def watch(iteration: int, z: torch.Tensor, beta: torch.Tensor) -> None:
        nonlocal maps
        maps = z
        if recorder(iteration, lambda: z.numpy()):
            raise timing.StopSolver

    recorder.start()
    with contextlib.suppress(timing.StopSolver):
        solve(A, b, lam=1 / notebook.weight, prior=prior, settings=settings, callback=watch)
    return recorder.points, maps.numpy()


def minimum(notebook: Notebook) -> float:
    """The minimum of the objective, to a relative duality gap of GAP."""
    settings = SolverSettings("coordinate", iterations=10**5, tolerance=0.0, gap=GAP)
    given = arguments_of(notebook, torch.float64)
    code = sparse_code(**given, lam=1 / notebook.weight, settings=settings)
    gap = float(code.gap) / float(code.objective)
    if gap > 2 * GAP:
        raise RuntimeError(f"the minimum was found to {gap:.1e} only")
    return notebook.objective(code.z.numpy())


def compile_kernels(notebook: Notebook) -> None:
    given = arguments_of(notebook, torch.float32)
    sparse_code(
        **given, lam=1 / notebook.weight, settings=SolverSettings("coordinate", iterations=2)
    )


def arguments_of(notebook: Notebook, dtype: torch.dtype) -> dict:
    tensor = lambda array: None if array is None else torch.from_numpy(array).to(dtype)  # noqa: E731
    mask = None if notebook.mask is None else tensor(notebook.mask[None, None])
    return dict(
        images=tensor(notebook.y[None]),
        filters=tensor(notebook.f),
        p=1.0,
        boundary="circular",
        mask=mask,
        weights=tensor(notebook.weights),
        group=1,
        non_negative=False,
    )


# The notebooks. Crops, filters, weights and options are those that they show.


def kodim(grey: bool) -> np.ndarray:
    return photograph("kodim23.png", grey, np.s_[160:416, 60:316])


def grey() -> Notebook:
    return high_passed(kodim(True), 10, "G:12x12x36", 5e-2, 7.68, partial(admm, RelStopTol=5e-3))


def grey_pgm() -> Notebook:
    return high_passed(kodim(True), 10, "G:12x12x36", 5e-2, 8.18, pgm)


def colour() -> Notebook:
    return high_passed(
        kodim(False), 10, "RGB:8x8x3x64", 1e-1, 32.24, partial(admm, RelStopTol=5e-3)
    )


def many() -> Notebook:
    fixed = partial(admm, RelStopTol=5e-3, AutoRho={"Enabled": False})
    return high_passed(kodim(True), 10, "G:12x12x216", 5e-2, 63.50, fixed)


def barbara() -> Notebook:
    image = photograph("barbara.png", True, np.s_[10:522, 100:612])
    tuned = partial(admm, RelStopTol=5e-3, HighMemSolve=True)
    return high_passed(image, 20, "G:12x12x36", 1e-2, 1.04, tuned)


def masked() -> Notebook:
    from sporco.admm import tvl2
    from sporco.signal import rndmask

    image = photograph("monarch.png", True, np.s_[:, 160:672], zoom=0.5)
    np.random.seed(12345)
    mask = rndmask(image.shape, 0.5, dtype=np.float32)
    mask, seen = np.pad(mask, PAD), np.pad(mask * image, PAD, "symmetric")
    options = tvl2.TVL2Denoise.Options(
        {"MaxMainIter": 200, "DFidWeight": mask, "gEvalY": False, "AutoRho": {"Enabled": True}}
    )
    low = tvl2.TVL2Denoise(seen, 0.05, options).solve()
    return Notebook(
        as_image(mask * (seen - low)),
        filters("G:8x8x128"),
        2e-2,
        155.42,
        mask_decoupled,
        clean=as_image(image),
        restored=lambda high: (high + low)[:, PAD:-PAD, PAD:-PAD],
        mask=mask.astype(np.float32),
    )


def weighted() -> Notebook:
    image = photograph("monarch.png", True, np.s_[:, 160:672], zoom=0.5)
    np.random.seed(12345)
    noisy = image + np.random.normal(0.0, 0.1, image.shape).astype(np.float32)
    low, high = split(noisy, 5.0)
    _, padded_high = split(np.pad(noisy, PAD, "symmetric"), 5.0)
    f = filters("G:8x8x128")
    matched = Objective(Problem("notebook", as_image(padded_high)[None], f, 1.0))
    square = np.square(matched.correlate(as_image(padded_high)[None].astype(np.float64)))[0]
    return Notebook(
        as_image(np.pad(high, PAD, "symmetric")),
        f,
        4.8e-2,
        39.48,
        partial(admm, MaxMainIter=250, RelStopTol=3e-3, rho=4e2 * 4.8e-2, HighMemSolve=True,
                AutoRho={"Enabled": False}),
        clean=as_image(image),
        restored=lambda painted: np.clip(painted[:, PAD:-PAD, PAD:-PAD] + low, 0, 1),
        weights=(1 / np.maximum(square, 1e-8)).astype(np.float32),
    )  # fmt: skip


NOTEBOOKS = {
    "grey": grey,
    "grey_pgm": grey_pgm,
    "colour": colour,
    "many": many,
    "barbara": barbara,
    "masked": masked,
    "weighted": weighted,
}
PAD = 8


def high_passed(
    image: np.ndarray, strength: float, name: str, weight: float, published: float, solver: Callable
) -> Notebook:
    """A notebook that codes what is left of an image without its low frequencies."""
    low, high = split(image, strength)
    low = as_image(low)
    return Notebook(
        as_image(high),
        filters(name),
        weight,
        published,
        solver,
        clean=as_image(image),
        restored=lambda painted: painted + low,
    )


def photograph(name: str, grey: bool, crop: tuple, zoom: float | None = None) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1]."""
    from sporco.util import ExampleImages

    return ExampleImages().image(name, scaled=True, gray=grey, idxexp=crop, zoom=zoom)


def split(image: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high frequencies of an image."""
    from sporco.signal import tikhonov_filter

    return tikhonov_filter(image, strength, 16)


def filters(name: str) -> np.ndarray:
    """(K, C, h, w): a dictionary that comes with SPORCO."""
    from sporco.util import convdicts

    D = convdicts()[name]
    D = D[:, :, None] if D.ndim == 3 else D
    return np.ascontiguousarray(D.transpose(3, 2, 0, 1), np.float32)


def as_image(pixels: np.ndarray) -> np.ndarray:
    """(H, W[, C]) -> (C, H, W)."""
    return np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1), np.float32)


# SPORCO's solvers.


def admm(notebook: Notebook, **options):
    from sporco.admm import cbpdn

    if notebook.weights is not None:
        options["L1Weight"] = notebook.weights.transpose(1, 2, 0)[:, :, None, None]
    chosen = cbpdn.ConvBPDN.Options({"MaxMainIter": 200, "AuxVarObj": False, **options})
    return cbpdn.ConvBPDN(*in_sporcos_order(notebook), notebook.weight, chosen)


def pgm(notebook: Notebook):
    from sporco.pgm import cbpdn
    from sporco.pgm.backtrack import BacktrackStandard

    chosen = cbpdn.ConvBPDN.Options(
        {
            "MaxMainIter": 250,
            "RelStopTol": 1e-4,
            "L": 1.0,
            "Backtrack": BacktrackStandard(maxiter=15),
        }
    )
    return cbpdn.ConvBPDN(*in_sporcos_order(notebook), notebook.weight, chosen)


def mask_decoupled(notebook: Notebook):
    from sporco.admm import cbpdn

    chosen = cbpdn.ConvBPDNMaskDcpl.Options(
        {
            "MaxMainIter": 200,
            "HighMemSolve": True,
            "RelStopTol": 3e-2,
            "AuxVarObj": False,
            "RelaxParam": 1.8,
            "rho": 50 * notebook.weight + 0.1,
            "AutoRho": {"Enabled": False, "StdResiduals": False},
        }
    )
    D, s = in_sporcos_order(notebook)
    return cbpdn.ConvBPDNMaskDcpl(D, s, notebook.weight, notebook.mask, opt=chosen)


def in_sporcos_order(notebook: Notebook) -> tuple[np.ndarray, np.ndarray]:
    """Filters (h, w[, C], K) and the image (H, W[, C])."""
    D, s = notebook.f.transpose(2, 3, 1, 0), notebook.y.transpose(1, 2, 0)
    if len(notebook.y) == 1:
        D, s = D[:, :, 0], s[:, :, 0]
    return np.ascontiguousarray(D), np.ascontiguousarray(s)


def arguments(
    description: str, names: Mapping[str, object], *, limit: float | None = None
) -> argparse.Namespace:
    """The options of a program with rows of these names; sets the threads of both packages."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="of both (default 2)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds (default 1)")
    if limit is not None:
        parser.add_argument(
            "--limit", type=float, default=limit, help=f"seconds for deconvnet (default {limit:g})"
        )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"), help="folder of the results"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.rows if name not in names]:
        parser.error(f"{' '.join(unknown)}: choose from {', '.join(names)}")
    for key in ("threads", "repeats", "limit"):
        if not getattr(options, key, 1) > 0:
            parser.error(f"--{key}={getattr(options, key)}: must be positive")
    if importlib.util.find_spec("sporco") is None:
        sys.exit("this benchmark needs SPORCO: pip install -e '.[benchmark]'")
    options.rows = options.rows or list(names)
    import sporco.fft

    sporco.fft.pyfftw_threads = options.threads
    torch.set_num_threads(options.threads)
    sys.stdout.reconfigure(line_buffering=True)
    return options


if __name__ == "__main__":
    main()
