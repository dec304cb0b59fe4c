"""Measure how time and memory grow with images, pixels, maps, filter size and layers.

python benchmarks/scaling.py                    one thread, a few minutes
python benchmarks/scaling.py --device cuda
python benchmarks/scaling.py --quick            tiny sizes, to check that it runs

Coding is `sparse_code` with each method from zero maps, with the same settings at every size:
boundary valid, lam 20, tolerance 1e-3, at most 200 iterations. An epoch is one epoch of learning a
layer with the default solver of the device, but not the first, which starts from zero maps. Layers
are those of a small network that explains the image through all layers below, with pooling in the
loop.

Images are high-passed crops of scikit-image's photographs, filters are patches of other
photographs: nothing is learned beforehand. A table has a row for each size. Each cell gives the
median seconds, the milliseconds per iteration (per round of coordinate descent), and the peak
memory above what was in use before, in units of the float32 maps z. The last row gives the
exponents, the slopes of lines through the logarithms, with their standard errors; that of memory is
of the bytes. On the CPU each cell has a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

# Threads that spin while they wait take the time of others. To be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import problems
import timing
import torch
from deconvnet_solvers import synchronizer

from deconvnet import LayerSettings, LearningSettings, SolverSettings
from deconvnet.filters.initial import initial_filters
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.layer import Layer
from deconvnet.network.network import DeconvNet
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.problem import Solution, duality_gap
from deconvnet.sparse_coding.solve import default_solver, sparse_code
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_data import LayerData
from deconvnet.training.layer_trainer import LayerTrainer

AXES = {
    "images": (1, 2, 4, 8, 16),
    "pixels": (64, 128, 256, 512),
    "maps": (16, 32, 64, 128),
    "size": (5, 8, 11, 15),
    "layers": (1, 2, 3),
}
QUICK_AXES = {
    "images": (1, 2),
    "pixels": (40, 56),
    "maps": (6, 12),
    "size": (5, 8),
    "layers": (1, 2),
}
TITLES = {
    "images": "number of images",
    "pixels": "pixels of a side",
    "maps": "number of maps",
    "size": "pixels of a filter's side",
    "layers": "layer that is inferred and learned, through those below",
}
CODERS = ("coordinate", "admm", "fista")
EPOCH = "epoch"
LAM, TOLERANCE, MOST = 20.0, 1e-3, 200
# Iterations of the run whose memory is measured: all that a solver does it has done by then.
MEMORY_ITERATIONS = 12
# Maps where the other axes have 32, maps that are pooled together, and lam of each layer.
LAYERS = ((15, 3, 1.0), (50, 2, 0.5), (100, 2, 0.4))
# A cell is timed repeatedly until this many seconds have passed, or all its repeats are done.
PATIENCE = 1.0


@dataclass(frozen=True)
class Case:
    """One cell: the number and size of images, maps and filters, and the method."""

    axis: str
    method: str
    device: str
    threads: int
    repeats: int
    images: int
    pixels: int
    maps: int
    size: int
    layers: int = 0

    @property
    def value(self) -> int:
        return getattr(self, self.axis)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device=cuda: torch finds no CUDA device here; use --device cpu")
        sys.exit(2)
    started = time.time()
    results = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": timing.machine(),
        "options": {**vars(options), "output": str(options.output)},
        "runs": measure_all(options),
    }
    results["minutes"] = (time.time() - started) / 60
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"scaling-{options.device}.json").write_text(to_json(results, indent=1))
    print(show(results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument(
        "--repeats", type=int, default=3,
        help=f"of each timing (default 3; fewer where they take more than {PATIENCE:g} s)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"),
        help="folder of the results (default runs/benchmark)",
    )  # fmt: skip
    options = parser.parse_args()
    for key in ("threads", "repeats"):
        if getattr(options, key) < 1:
            parser.error(f"--{key}={getattr(options, key)}: must be at least 1")
    if options.quick:
        options.repeats, options.output = 1, options.output / "quick"
    return options


def measure_all(options: argparse.Namespace) -> list[dict]:
    """The measurements of all cells; options: device, threads, repeats, quick."""
    results = []
    for case in cases(options):
        once = measure if options.device == "cuda" else partial(alone, measure)
        results.append({**asdict(case), "value": case.value, **once(case)})
        seconds = statistics.median(results[-1]["seconds"])
        line = f"{case.axis} {case.value}: {case.method} {seconds:.3g} s"
        print(line, file=sys.stderr, flush=True)
    return results


def cases(options: argparse.Namespace) -> list[Case]:
    """All cells; they differ only in one axis."""
    # Sizes that take minutes on a CPU; on a GPU, sizes that exceed the cost of launching kernels.
    base = dict(images=1, pixels=128, maps=32, size=8)
    if options.device == "cuda":
        base = dict(images=4, pixels=256, maps=64, size=8)
    if options.quick:
        base = dict(images=1, pixels=48, maps=8, size=6)
    common = dict(device=options.device, threads=options.threads, repeats=options.repeats)
    cells = []
    for axis, values in (QUICK_AXES if options.quick else AXES).items():
        methods = ("fista", EPOCH) if axis == "layers" else (*CODERS, EPOCH)
        if options.device == "cuda":
            methods = tuple(method for method in methods if method != "coordinate")
        for value in values:
            sized = {**base, axis: value}
            cells += [Case(axis, method, **common, **sized) for method in methods]
    return cells


def alone(run: Callable[[Case], dict], case: Case) -> dict:
    """The result of run(case) in a separate process, so that its peak memory can be measured."""
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        # It loads torch once, but does nothing with it: its children start their own threads.
        context.set_forkserver_preload(["deconvnet", "problems", "deconvnet_solvers"])
        for pool in ("OMP", "MKL", "OPENBLAS"):
            os.environ[f"{pool}_NUM_THREADS"] = str(case.threads)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, run, case))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        sys.exit(f"{case} failed: its message is above")
    finally:
        process.join()


def _answer(there: Connection, run: Callable[[Case], dict], case: Case) -> None:
    there.send(run(case))


@torch.no_grad()
def measure(case: Case) -> dict:
    """The seconds (a list), iterations, bytes, bytes of z and duality gap of one cell."""
    torch.set_num_threads(case.threads)
    if case.layers:
        return _through_layers(case)
    y, f = data(case)
    return _learning(case, y) if case.method == EPOCH else _coding(case, y, f)


def _coding(case: Case, y: torch.Tensor, f: torch.Tensor) -> dict:
    def code(y: torch.Tensor, iterations: int = MOST) -> Solution:
        settings = SolverSettings(case.method, iterations=iterations, tolerance=TOLERANCE)
        return sparse_code(y, f, lam=LAM, settings=settings)

    code(y[:1, :, :32, :32])
    code(y, 2)
    used = peak_of(lambda: code(y, MEMORY_ITERATIONS), case.device)
    solution, seconds = timed(lambda: code(y), case)
    gap = duality_gap(Deconvolution(f), y, solution.z, LAM).sum() / solution.objective.sum()
    return {
        "seconds": seconds,
        "iterations": solution.iterations,
        "bytes": used,
        "maps_bytes": 4 * solution.z.numel(),
        "gap": float(gap),
        "density": float(torch.count_nonzero(solution.z)) / solution.z.numel(),
    }


def _learning(case: Case, y: torch.Tensor) -> dict:
    settings = LayerSettings(
        case.maps,
        case.size,
        lam=LAM,
        solver=default_solver(y),
        learning=LearningSettings(epochs=case.repeats + 2),
    )

    def trainer(y: torch.Tensor) -> LayerTrainer:
        return LayerTrainer(Layer(settings, 1, seeded_generator(0, 1)).to(y), y)

    epoch(trainer(y[:1, :, :40, :40]))
    return _epochs(case, lambda: trainer(y))


def _through_layers(case: Case) -> dict:
    """The top layer of a network with several layers, on ten iterations of the layers below."""
    solver = SolverSettings("fista", iterations=10, tolerance=TOLERANCE)
    learning = LearningSettings(epochs=case.repeats + 2)
    common = dict(target="image", pooling="in_loop", solver=solver, learning=learning)
    net = DeconvNet(
        [
            LayerSettings(k * case.maps // 32, case.size, pool=[group, 3, 3], lam=lam, **common)
            for k, group, lam in LAYERS[: case.layers]
        ],
        PreprocessingSettings("grey"),
    )
    images = raw_images(case)
    net.preprocessing.fit(images)
    codes = net.to(case.device).infer(images, depth=0)
    for number in range(1, case.layers):
        net.layer(number).initialize(net.layer_input(codes, number), seeded_generator(0, number))
        codes = net.infer_next_layer(codes)
    number, layer = case.layers, net.layer(case.layers)
    if number > 1:
        layer.fit_scale(codes.layers[-1].pooled)
    layer.initialize(net.layer_input(codes, number), seeded_generator(0, number))
    if case.method == EPOCH:
        data = LayerData.from_codes(net, codes, number)
        return _epochs(case, lambda: LayerTrainer(layer, data, number=number))

    def infer(iterations: int) -> Solution:
        settings = replace(solver, iterations=iterations)
        return layer.infer(net.layer_problem(codes, number), settings=settings)

    infer(2)
    used = peak_of(lambda: infer(MEMORY_ITERATIONS), case.device)
    solution, seconds = timed(lambda: infer(MOST), case)
    return {
        "seconds": seconds,
        "iterations": solution.iterations,
        "bytes": used,
        "maps_bytes": 4 * solution.z.numel(),
    }


def _epochs(case: Case, start: Callable[[], LayerTrainer]) -> dict:
    """The memory of the first epoch of learning, and the time of the next."""
    # Plans of Fourier transforms, which are made once, are not memory of learning.
    epoch(start())
    trainers = []

    def first() -> None:
        trainers.append(start())
        epoch(trainers[0])

    used = peak_of(first, case.device)
    (trainer,) = trainers
    _, seconds = timed(lambda: epoch(trainer), case)
    z = trainer.layer.operator().zeros(
        trainer.data.layer_input(torch.arange(trainer.data.num_images))
    )
    return {
        "seconds": seconds,
        "bytes": used,
        "maps_bytes": 4 * z.numel(),
    }


def epoch(trainer: LayerTrainer) -> None:
    for _ in range(trainer.sampler.batches):
        trainer.update()


def timed(run: Callable[[], object], case: Case) -> tuple[object, list[float]]:
    """The last result, and the seconds of each run."""
    clock, seconds = timing.Clock(synchronizer(case.device)), []
    while len(seconds) < case.repeats and sum(seconds) < PATIENCE:
        before = clock.seconds
        clock.start()
        result = run()
        clock.stop()
        seconds.append(clock.seconds - before)
    return result, seconds


def peak_of(run: Callable[[], object], device: str) -> int:
    """The peak memory of a run above what is in use now, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Memory that the C library holds after it was freed would be reused without being counted.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = timing.fresh_peak()
    run()
    return max(0, int(timing.peak() - before))


def data(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, H, W), with repeated tiles if there are too few, and filters."""
    if case.axis == "pixels":
        whole = problems.high_pass(problems.photograph("camera", 1))
        top, left = ((length - case.pixels) // 2 for length in whole.shape[1:])
        tiles = whole[None, :, top : top + case.pixels, left : left + case.pixels]
    else:
        tiles = problems.crops(problems.CODED, 16, case.pixels, 1)
    # Evenly spaced, since tiles are ordered by photograph.
    chosen = np.arange(case.images) * len(tiles) // case.images
    y = torch.from_numpy(np.ascontiguousarray(tiles[chosen], np.float32)).to(case.device)
    others = torch.from_numpy(problems.crops(problems.OTHERS, 10, 128, 1))
    f = initial_filters(case.maps, others, case.size, "patches", torch.Generator().manual_seed(0))
    return y, f.to(case.device)


def raw_images(case: Case) -> torch.Tensor:
    """Images (N, 1, H, W) in [0, 1], for a network that preprocesses them."""
    both = [problems.photograph(name, 1) for name in problems.CODED]
    step, count = case.pixels, case.images
    places = [(w, i, j) for i in range(512 // step) for j in range(512 // step) for w in both]
    tiles = [
        w[:, i * step :, j * step :][:, :step, :step]
        for w, i, j in (places[n % len(places)] for n in range(count))
    ]
    return torch.from_numpy(np.stack(tiles).astype(np.float32))


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(slope, its standard error) of the line through log y over log x by least squares.

    The error is NaN for two points; both are NaN unless all numbers are positive.
    """
    if len(x) < 2 or min(*x, *y) <= 0:
        return math.nan, math.nan
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    u, v = u - u.mean(), v - v.mean()
    slope = float(u @ v / (u @ u))
    if len(x) == 2:
        return slope, math.nan
    rest = v - slope * u
    return slope, math.sqrt(float(rest @ rest) / (len(x) - 2) / float(u @ u))


def show(results: dict) -> str:
    """The tables as text."""
    machine, options = results["machine"], results["options"]
    lines = [
        f"\n# scaling\n{machine['processor']}, load {machine['load']} at the start; on "
        f"{options['device']}, {options['threads']} threads, up to {options['repeats']} repeats; "
        "each cell: seconds | ms per iteration | peak memory / size of z"
    ]
    for axis in dict.fromkeys(run["axis"] for run in results["runs"]):
        lines += table(axis, [run for run in results["runs"] if run["axis"] == axis])
    return "\n".join(lines)


def table(axis: str, runs: list[dict]) -> list[str]:
    methods = list(dict.fromkeys(run["method"] for run in runs))
    by = {(run["value"], run["method"]): run for run in runs}
    values = sorted({run["value"] for run in runs})
    fixed = {key: runs[0][key] for key in ("images", "pixels", "maps", "size") if key != axis}
    if axis == "layers":
        fixed["maps"] = ", ".join(str(k * fixed["maps"] // 32) for k, _, _ in LAYERS)
    rest = ", ".join(f"{key} {value}" for key, value in fixed.items())
    lines = [f"\n## {TITLES[axis]}; {rest}\n", f"| {axis} | {' | '.join(methods)} |"]
    lines.append("|---" * (1 + len(methods)) + "|")
    for value in values:
        lines.append(f"| {value} | {' | '.join(_cell(by[value, method]) for method in methods)} |")
    fits = []
    for method in methods:
        column = [by[value, method] for value in values]
        quantities = (_seconds, _seconds_per_iteration, lambda run: run["bytes"])
        if method == EPOCH:
            quantities = (_seconds, lambda run: run["bytes"])
        fits.append(
            ", ".join(_fit(values, [quantity(run) for run in column]) for quantity in quantities)
        )
    return [*lines, f"| exponent | {' | '.join(fits)} |"]


def _seconds(run: dict) -> float:
    return statistics.median(run["seconds"])


def _seconds_per_iteration(run: dict) -> float:
    return _seconds(run) / run["iterations"]


def _cell(run: dict) -> str:
    memory = f"{run['bytes'] / run['maps_bytes']:.1f} z"
    if run["method"] == EPOCH:
        return f"{_seconds(run):.3g} s, {memory}"
    per_iteration = f"{1e3 * _seconds_per_iteration(run):.3g} ms"
    return f"{_seconds(run):.3g} s, {per_iteration} x {run['iterations']}, {memory}"


def _fit(x: list[int], y: list[float]) -> str:
    slope, error = exponent(x, y)
    return f"{slope:.2f}" if math.isnan(error) else f"{slope:.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()
