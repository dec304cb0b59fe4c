"""Measure on a GPU: agreement with the CPU, speed, waits, memory and scaling, in a few minutes.

python benchmarks/gpu.py
python benchmarks/gpu.py --device cpu           tiny sizes on the CPU, to check that it runs
python benchmarks/gpu.py speed waits            only these parts

equal      how far results on the device are from those on the CPU
speed      seconds per iteration, compared with the limits of memory and arithmetic of the device
waits      how often an iteration makes the CPU wait for the device
coding     seconds until the objective of the problem "grey" is within 1e-1 to 1e-4 of the minimum
memory     the peak memory against the number of images inferred at a time
scaling    the tables of benchmarks/scaling.py

Needs neither a download nor SPORCO. Results are written to <output>/gpu.json after each part; if a
part fails, the failure is reported and the next part runs.

The least that an iteration must read or write, in arrays of the size of the maps z, if all
elementwise operations were fused with the convolution before them (images are negligible):

    admm     3: its state t is read to synthesise from v = 2 shrink(t) - t; t is read again, written
    fista    4: z and the previous z are read, z is written, and read again to synthesise

The least that it must compute is one synthesis and one correlation: 4 h w operations for each
coefficient of z with direct sums. The limits of the device are measured with copies and matrix
products in float32.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import deconvnet_solvers
import problems
import scaling
import timing
import torch
from torch import Tensor

from deconvnet import LayerSettings, LearningSettings, SolverSettings, learn_filters
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.strict_json import to_json
from deconvnet.network.network import DeconvNet
from deconvnet.sparse_coding.problem import Solution
from deconvnet.sparse_coding.solve import sparse_code
from deconvnet.support.seeding import seeded_generator

METHODS = ("admm", "fista")
# Arrays of the size of z that an iteration has to read or write: see above.
TRAFFIC = {"admm": 3, "fista": 4}
LAM = 20.0
ITERATIONS = 20


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    options = arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU; --device cpu runs tiny sizes on the CPU")
        sys.exit(2)
    options.output.mkdir(parents=True, exist_ok=True)
    results = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": timing.machine(),
        "device": describe(options.device),
        "seconds": {},
    }
    print("\n".join(f"{key}: {value}" for key, value in results["device"].items()))
    failed = []
    for part in options.what:
        started = time.perf_counter()
        try:
            results[part], lines = PARTS[part](options)
        except Exception:
            # Machines with a GPU are rare, so the other parts are measured all the same.
            failed.append(part)
            results[part], lines = {"failed": traceback.format_exc()}, [traceback.format_exc()]
        results["seconds"][part] = time.perf_counter() - started
        (options.output / "gpu.json").write_text(to_json(results, indent=1))
        print("\n".join([f"\n# {part} ({results['seconds'][part]:.0f} s)\n", *lines]))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def arguments() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="what", help=f"{', '.join(PARTS)} (default: all of them)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: those of torch)")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (default 3)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"),
        help="folder for the results (default runs/benchmark)",
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in PARTS]:
        parser.error(f"what={' '.join(unknown)}: choose from {', '.join(PARTS)}")
    for key in ("threads", "repeats"):
        if getattr(options, key) is not None and getattr(options, key) < 1:
            parser.error(f"--{key}={getattr(options, key)}: must be at least 1")
    options.what = options.what or list(PARTS)
    options.quick = options.device == "cpu"
    if options.quick:
        options.repeats, options.output = 1, options.output / "quick"
    if options.threads:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    return options


def describe(device: str) -> dict:
    """The device, and whether torch rounds float32 on it (TF32)."""
    if device == "cpu":
        return {"name": "cpu", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory, GiB": round(properties.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "TF32 in products of matrices": torch.backends.cuda.matmul.allow_tf32,
    }


@torch.no_grad()
def equal(options: Namespace) -> tuple[dict, list[str]]:
    """Run the same computations on the device and on the CPU.

    In float64 they should differ by rounding only. In float32 a coefficient may be zero on one and
    not on the other, and a pooling window may choose the other of two maxima.
    """
    lines = ["| largest difference / largest value | float64 | float32 |", "|---|---|---|"]
    results = {}
    for name, run in _computations(options.quick).items():
        results[name] = {}
        for dtype in (torch.float64, torch.float32):
            pairs = zip(run(options.device, dtype), run("cpu", dtype), strict=True)
            results[name][str(dtype)] = max(difference(there, here) for there, here in pairs)
        lines.append(f"| {name} | {' | '.join(f'{d:.1e}' for d in results[name].values())} |")
    return results, lines


def difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|; 0 where both are zero, infinite where one is not finite."""
    a, b = a.cpu().double(), b.cpu().double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    largest, apart = float(b.abs().max()), float((a - b).abs().max())
    return apart / largest if largest else (math.inf if apart else 0.0)


Computation = Callable[[str, torch.dtype], list[Tensor]]


def _computations(quick: bool) -> dict[str, Computation]:
    pixels, maps = (40, 8) if quick else (128, 32)

    def coding(method: str, boundary: str) -> Computation:
        def run(device: str, dtype: torch.dtype) -> list[Tensor]:
            y, f = (t.to(dtype) for t in small(device, 2, pixels, maps))
            settings = SolverSettings(method, iterations=ITERATIONS, tolerance=0.0)
            solution = sparse_code(y, f, lam=LAM, boundary=boundary, settings=settings)
            return [solution.z, solution.objective]

        return run

    def learning(device: str, dtype: torch.dtype) -> list[Tensor]:
        y = small(device, 4, pixels, maps)[0].to(dtype)
        chosen = LearningSettings(epochs=1, batch_size=2)
        learned = learn_filters(
            y, maps, filter_size=8, lam=LAM, solver=SolverSettings(), learning=chosen
        )
        return [learned.filters]

    def inference(device: str, dtype: torch.dtype) -> list[Tensor]:
        images = scaling.raw_images(case(device, 2, pixels, maps)).to(dtype)
        net = two_layers(quick).to(dtype)
        net.preprocessing.fit(images)
        # Random filters from one generator do not depend on the rounding of a device.
        codes = net.to(device).infer(images)
        return [codes.y, *(layer.pooled for layer in codes.layers)]

    solvers = {
        f"sparse_code, {method}, {boundary}, {ITERATIONS} iterations": coding(method, boundary)
        for method in METHODS
        for boundary in ("valid", "circular")
    }
    return {
        **solvers,
        "learn_filters, one epoch": learning,
        "DeconvNet.infer, two layers": inference,
    }


def two_layers(quick: bool) -> DeconvNet:
    """A network whose layer 2 explains the image through layer 1, with pooling in the loop."""
    solver = SolverSettings("fista", iterations=10, tolerance=0.0)
    common = dict(target="image", pooling="in_loop", solver=solver)
    first, second = (6, 10) if quick else (15, 50)
    return DeconvNet(
        [
            LayerSettings(first, 5, pool=[3, 2, 2], lam=1.0, **common),
            LayerSettings(second, 5, pool=[2, 2, 2], lam=0.5, **common),
        ],
        PreprocessingSettings("grey"),
    )


@torch.no_grad()
def speed(options: Namespace) -> tuple[dict, list[str]]:
    pixels, maps, counts = (40, 8, (1, 2)) if options.quick else (256, 64, (1, 8, 32))
    copied, multiplied = copy_bandwidth(options.device), matrix_rate(options.device)
    results = {"bytes_per_second": copied, "operations_per_second": multiplied, "runs": []}
    lines = [
        f"copies move {copied / 1e9:.0f} GB/s, matrix products reach {multiplied / 1e12:.1f} "
        "TFLOP/s in float32\n",
        f"| {maps} maps of 8x8, {pixels}x{pixels}, float32 | images | ms per iteration | GB/s if "
        "it moved the least | share of the copy bandwidth | share of the arithmetic |",
        "|---|---|---|---|---|---|",
    ]
    for count in counts:
        y, f = small(options.device, count, pixels, maps)
        for method in METHODS:
            seconds, entries = iteration_seconds(y, f, method, options.repeats, options.device)
            needed = 4 * TRAFFIC[method] * entries
            operations = 4 * f[0].numel() * entries
            run = {
                "method": method,
                "images": count,
                "seconds": seconds,
                "bytes": needed,
                "operations": operations,
            }
            results["runs"].append(run)
            lines.append(
                f"| {method} | {count} | {1e3 * seconds:.3f} | {needed / seconds / 1e9:.0f} | "
                f"{needed / seconds / copied:.1%} | {operations / seconds / multiplied:.1%} |"
            )
    return results, lines


def iteration_seconds(
    y: Tensor, f: Tensor, method: str, repeats: int, device: str
) -> tuple[float, int]:
    """The median seconds per iteration, and the number of coefficients of z.

    Measured as the difference between runs of 3 n and n iterations, which cancels the cost of a
    call.
    """
    seconds, clock = [], timing.Clock(deconvnet_solvers.synchronizer(device))

    def passed(iterations: int) -> tuple[float, int]:
        before = clock.seconds
        clock.start()
        solution = coded(y, f, method, iterations)
        clock.stop()
        return clock.seconds - before, solution.z.numel()

    _, entries = passed(ITERATIONS)
    for _ in range(repeats):
        short, long = passed(ITERATIONS)[0], passed(3 * ITERATIONS)[0]
        seconds.append((long - short) / (2 * ITERATIONS))
    # On a busy machine a tiny run may have been the slower one.
    return max(statistics.median(seconds), 1e-9), entries


def coded(y: Tensor, f: Tensor, method: str, iterations: int) -> Solution:
    settings = SolverSettings(method, iterations=iterations, tolerance=0.0)
    return sparse_code(y, f, lam=LAM, settings=settings)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of the fastest of several copies."""
    numbers = 2**20 if device == "cpu" else 2**28
    source = torch.ones(numbers, device=device)
    goal = torch.empty_like(source)
    return 2 * 4 * numbers / _least(lambda: goal.copy_(source), device)


def matrix_rate(device: str) -> float:
    """Operations per second of matrix products in float32."""
    side = 256 if device == "cpu" else 8192
    a, b = (torch.ones(side, side, device=device) for _ in "ab")
    return 2 * side**3 / _least(lambda: a @ b, device)


def _least(run: Callable[[], object], device: str, times: int = 10) -> float:
    clock, seconds = timing.Clock(deconvnet_solvers.synchronizer(device)), []
    for _ in range(times):
        before = clock.seconds
        clock.start()
        run()
        clock.stop()
        seconds.append(clock.seconds - before)
    return min(seconds)


@torch.no_grad()
def waits(options: Namespace) -> tuple[dict, list[str]]:
    """Count waits with torch.cuda.set_sync_debug_mode, which warns at each; the CPU has none."""
    pixels, maps = (40, 8) if options.quick else (256, 64)
    y, f = small(options.device, 2, pixels, maps)
    results, lines = {}, ["| waits for the device | per iteration | where |", "|---|---|---|"]
    for method in METHODS:
        coded(y, f, method, ITERATIONS)
        few = waited(lambda m=method: coded(y, f, m, ITERATIONS), options.device)
        many = waited(lambda m=method: coded(y, f, m, 3 * ITERATIONS), options.device)
        per_iteration = {
            place: (count - few[place]) / (2 * ITERATIONS)
            for place, count in many.most_common()
            if count > few[place]
        }
        results[method] = {"per iteration": sum(per_iteration.values()), "where": per_iteration}
        places = ", ".join(f"{place} {count:.2g}" for place, count in per_iteration.items())
        lines.append(f"| {method} | {results[method]['per iteration']:.2f} | {places or '-'} |")
    return results, lines


def waited(run: Callable[[], object], device: str) -> Counter[str]:
    """The number of times that each line of Python waited for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in waits)


def coding(options: Namespace) -> tuple[dict, list[str]]:
    """As in benchmarks/compare_sporco.py, without SPORCO and with circular boundaries only."""
    spec = problems.SPECS["grey"].tiny() if options.quick else problems.SPECS["grey"]
    folder = options.output
    problem = problems.make(spec, folder)
    objective = problems.Objective(problem)
    patience = 5.0 if options.quick else 60.0
    lowest = deconvnet_solvers.minimum(
        problem, "circular", folder, gap=1e-5, patience=patience, device=options.device
    )
    total = sum(lowest.objective)
    results = {"minimum": total, "gap": lowest.gap, "runs": []}
    lines = [
        f"{spec.title}; minimum {total:.6g}, duality gap {lowest.gap:.1e}\n",
        f"| seconds to | {' | '.join(f'{level:.0e}' for level in timing.LEVELS)} | iterations | ms "
        "per iteration |",
        "|---" * (len(timing.LEVELS) + 3) + "|",
    ]
    for name, solver in deconvnet_solvers.solvers(options.device).items():
        if deconvnet_solvers.boundary_of(name) != "circular":
            continue
        solver(problem, timing.Recorder(None, iterations=60))
        rounds = []
        for _ in range(options.repeats):
            recorder = timing.Recorder(
                objective,
                goal=total * (1 + timing.LEVELS[-1]),
                limit=patience / 3,
                synchronize=deconvnet_solvers.synchronizer(options.device),
            )
            solver(problem, recorder)
            rounds.append(recorder.points)
        results["runs"].append({"solver": name, "points": rounds})
        cells = (
            timing.spread([timing.time_to(points, total, level)[0] for points in rounds], 3)
            for level in timing.LEVELS
        )
        count, seconds, _ = rounds[0][-1]
        each = f"{count} | {1e3 * seconds / max(count, 1):.3f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {each} |")
    return results, lines


@torch.no_grad()
def memory(options: Namespace) -> tuple[dict, list[str]]:
    pixels, maps, chunks = (40, 8, (1, 2, 4)) if options.quick else (256, 64, (1, 2, 4, 8, 16, 32))
    images = scaling.raw_images(case(options.device, chunks[-1], pixels, maps))
    results, lines = {}, ["| | chunk | peak, MiB | in units of z of a chunk |", "|---|---|---|---|"]
    for method in METHODS:
        solver = SolverSettings(method, iterations=12, tolerance=0.0)
        layer = LayerSettings(maps, 8, lam=LAM, solver=solver)
        net = DeconvNet([layer], PreprocessingSettings("grey"))
        net.preprocessing.fit(images)
        codes = net.to(options.device).infer(images, depth=0)
        net.layer(1).initialize(codes.y, seeded_generator(0, 1))
        one = 4 * net.layer(1).operator().zeros(codes.y[:1]).numel()
        for chunk in chunks:
            # Of a few images only: memory for the maps of all images is not being measured.
            part = codes.select(slice(0, chunk))
            infer = partial(net.infer_next_layer, part, chunk=chunk)
            infer()
            used = scaling.peak_of(infer, options.device)
            results[f"{method} {chunk}"] = {"bytes": used, "maps_bytes": one * chunk}
            units = used / (one * chunk)
            lines.append(f"| {method} | {chunk} | {used / 2**20:.0f} | {units:.1f} |")
    return results, lines


def scaled(options: Namespace) -> tuple[dict, list[str]]:
    results = {
        "machine": timing.machine(),
        "options": {**vars(options), "output": str(options.output)},
        "runs": scaling.measure_all(options),
    }
    return results, [scaling.show(results)]


def small(device: str, count: int, pixels: int, maps: int) -> tuple[Tensor, Tensor]:
    """High-passed images and filters 8x8, patches of other photographs."""
    return scaling.data(case(device, count, pixels, maps))


def case(device: str, count: int, pixels: int, maps: int) -> scaling.Case:
    return scaling.Case("images", "admm", device, 1, 1, count, pixels, maps, 8)


PARTS = {
    "equal": equal,
    "speed": speed,
    "waits": waits,
    "coding": coding,
    "memory": memory,
    "scaling": scaled,
}


if __name__ == "__main__":
    main()
