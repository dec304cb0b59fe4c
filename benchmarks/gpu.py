"""All measurements on a machine with a GPU, in one call of a few minutes.

python benchmarks/gpu.py
python benchmarks/gpu.py --device cpu           the same at tiny size: to see whether it runs
python benchmarks/gpu.py speed waits            some of it

equal      how far results on the device are from those on the CPU
speed      seconds per iteration, compared with the limits of memory and arithmetic of the device
waits      how often an iteration makes the CPU wait for the device
coding     seconds until the objective of the problem "grey" is within 1e-1 to 1e-4 of the minimum
memory     the peak of memory by how many images are inferred at a time
scaling    the tables of benchmarks/scaling.py

Needs no internet and no SPORCO. The results are in <output>/gpu.json, rewritten after every part; a
part that fails is reported and the next one starts.

The least memory traffic of an iteration, in arrays of the size of the maps z, if all elementwise
operations were fused with the preceding convolution, and images are negligible compared with maps:

    admm     3: its state t is read to paint v = 2 shrink(t) - t; t is read again and written
    fista    4: z and the z before are read, z is written, and read again to be painted

and the least computation: to paint and to correlate once, 4 h w operations per coefficient of z
if the sums are done directly. The limits of the device are measured by copying and by multiplying
matrices in float32.
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

import clocks
import ours
import problems
import scaling
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
        print("torch finds no GPU here; --device cpu runs the same at tiny size")
        sys.exit(2)
    options.output.mkdir(parents=True, exist_ok=True)
    found = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": clocks.machine(),
        "device": describe(options.device),
        "seconds": {},
    }
    print("\n".join(f"{key}: {value}" for key, value in found["device"].items()))
    failed = []
    for part in options.what:
        started = time.perf_counter()
        try:
            found[part], lines = PARTS[part](options)
        except Exception:
            # A machine with a GPU is rare: what else can be measured on it is.
            failed.append(part)
            found[part], lines = {"failed": traceback.format_exc()}, [traceback.format_exc()]
        found["seconds"][part] = time.perf_counter() - started
        (options.output / "gpu.json").write_text(to_json(found, indent=1))
        print("\n".join([f"\n# {part} ({found['seconds'][part]:.0f} s)\n", *lines]))
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
    parser.add_argument("--threads", type=int, help="of the CPU (default: as torch has it)")
    parser.add_argument("--repeats", type=int, default=3, help="of each timing (default 3)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"),
        help="folder of the results (default runs/benchmark)",
    )  # fmt: skip
    options = parser.parse_args()
    if unknown := [name for name in options.what if name not in PARTS]:
        parser.error(f"what={' '.join(unknown)}: choose of {', '.join(PARTS)}")
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
    """What it is, and what torch does to float32 on it unasked."""
    if device == "cpu":
        return {"name": "cpu", "torch": torch.__version__}
    of = torch.cuda.get_device_properties(0)
    return {
        "name": of.name,
        "memory, GiB": round(of.total_memory / 2**30, 1),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "TF32 in products of matrices": torch.backends.cuda.matmul.allow_tf32,
    }


@torch.no_grad()
def equal(options: Namespace) -> tuple[dict, list[str]]:
    """The same computations on both: in float64 they should differ by rounding alone; in float32
    an entry may be zero here and not there, and of two maxima in a window the other be chosen.
    """
    lines = ["| largest difference / largest entry | float64 | float32 |", "|---|---|---|"]
    found = {}
    for name, run in _computations(options.quick).items():
        found[name] = {}
        for dtype in (torch.float64, torch.float32):
            pairs = zip(run(options.device, dtype), run("cpu", dtype), strict=True)
            found[name][str(dtype)] = max(difference(there, here) for there, here in pairs)
        lines.append(f"| {name} | {' | '.join(f'{d:.1e}' for d in found[name].values())} |")
    return found, lines


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
            found = sparse_code(y, f, lam=LAM, boundary=boundary, settings=settings)
            return [found.z, found.objective]

        return run

    def learning(device: str, dtype: torch.dtype) -> list[Tensor]:
        y = small(device, 4, pixels, maps)[0].to(dtype)
        chosen = LearningSettings(epochs=1, batch_size=2)
        found = learn_filters(
            y, maps, filter_size=8, lam=LAM, solver=SolverSettings(), learning=chosen
        )
        return [found.filters]

    def inference(device: str, dtype: torch.dtype) -> list[Tensor]:
        images = scaling.raw_images(case(device, 2, pixels, maps)).to(dtype)
        net = two_layers(quick).to(dtype)
        net.preprocessing.fit(images)
        # Filters of noise from the same generator: they do not depend on what a device rounds.
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
    """A network that explains images through both layers, pooling in the loop."""
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
    found = {"bytes_per_second": copied, "operations_per_second": multiplied, "runs": []}
    lines = [
        f"copies move {copied / 1e9:.0f} GB/s, products of matrices do {multiplied / 1e12:.1f} "
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
            found["runs"].append(run)
            lines.append(
                f"| {method} | {count} | {1e3 * seconds:.3f} | {needed / seconds / 1e9:.0f} | "
                f"{needed / seconds / copied:.1%} | {operations / seconds / multiplied:.1%} |"
            )
    return found, lines


def iteration_seconds(
    y: Tensor, f: Tensor, method: str, repeats: int, device: str
) -> tuple[float, int]:
    """The median seconds of an iteration, and the entries of z: what 3 times the iterations take
    longer, so that it is free of how a call starts and ends.
    """
    seconds, clock = [], clocks.Clock(ours.synchronizer(device))

    def passed(iterations: int) -> tuple[float, int]:
        before = clock.seconds
        clock.start()
        found = coded(y, f, method, iterations)
        clock.stop()
        return clock.seconds - before, found.z.numel()

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
    """Bytes per second, read and written, of the best of several copies."""
    numbers = 2**20 if device == "cpu" else 2**28
    source = torch.ones(numbers, device=device)
    goal = torch.empty_like(source)
    return 2 * 4 * numbers / _least(lambda: goal.copy_(source), device)


def matrix_rate(device: str) -> float:
    """Operations per second of products of matrices in float32."""
    side = 256 if device == "cpu" else 8192
    a, b = (torch.ones(side, side, device=device) for _ in "ab")
    return 2 * side**3 / _least(lambda: a @ b, device)


def _least(run: Callable[[], object], device: str, times: int = 10) -> float:
    clock, seconds = clocks.Clock(ours.synchronizer(device)), []
    for _ in range(times):
        before = clock.seconds
        clock.start()
        run()
        clock.stop()
        seconds.append(clock.seconds - before)
    return min(seconds)


@torch.no_grad()
def waits(options: Namespace) -> tuple[dict, list[str]]:
    """By torch.cuda.set_sync_debug_mode, which warns of every operation that waits; on the CPU
    there are none.
    """
    pixels, maps = (40, 8) if options.quick else (256, 64)
    y, f = small(options.device, 2, pixels, maps)
    found, lines = {}, ["| waits for the device | per iteration | where |", "|---|---|---|"]
    for method in METHODS:
        coded(y, f, method, ITERATIONS)
        few = waited(lambda m=method: coded(y, f, m, ITERATIONS), options.device)
        many = waited(lambda m=method: coded(y, f, m, 3 * ITERATIONS), options.device)
        each = {
            place: (count - few[place]) / (2 * ITERATIONS)
            for place, count in many.most_common()
            if count > few[place]
        }
        found[method] = {"per iteration": sum(each.values()), "where": each}
        places = ", ".join(f"{place} {count:.2g}" for place, count in each.items())
        lines.append(f"| {method} | {found[method]['per iteration']:.2f} | {places or '-'} |")
    return found, lines


def waited(run: Callable[[], object], device: str) -> Counter[str]:
    """How often each line of Python waited for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    told = [w for w in caught if "called a synchronizing" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in told)


def coding(options: Namespace) -> tuple[dict, list[str]]:
    """As benchmarks/peers.py does it, without SPORCO; the boundary is circular."""
    spec = problems.SPECS["grey"].tiny() if options.quick else problems.SPECS["grey"]
    folder = options.output
    problem = problems.make(spec, folder)
    judge = problems.Objective(problem)
    patience = 5.0 if options.quick else 60.0
    lowest = ours.minimum(
        problem, "circular", folder, gap=1e-5, patience=patience, device=options.device
    )
    total = sum(lowest.objective)
    found = {"minimum": total, "gap": lowest.gap, "runs": []}
    lines = [
        f"{spec.title}; minimum {total:.6g}, duality gap {lowest.gap:.1e}\n",
        f"| seconds to | {' | '.join(f'{level:.0e}' for level in clocks.LEVELS)} | iterations | ms "
        "per iteration |",
        "|---" * (len(clocks.LEVELS) + 3) + "|",
    ]
    for name, solver in ours.solvers(options.device).items():
        if ours.boundary_of(name) != "circular":
            continue
        solver(problem, clocks.Recorder(None, iterations=60))
        rounds = []
        for _ in range(options.repeats):
            recorder = clocks.Recorder(
                judge,
                goal=total * (1 + clocks.LEVELS[-1]),
                limit=patience / 3,
                synchronize=ours.synchronizer(options.device),
            )
            solver(problem, recorder)
            rounds.append(recorder.points)
        found["runs"].append({"solver": name, "points": rounds})
        cells = (
            clocks.spread([clocks.time_to(points, total, level)[0] for points in rounds], 3)
            for level in clocks.LEVELS
        )
        count, seconds, _ = rounds[0][-1]
        each = f"{count} | {1e3 * seconds / max(count, 1):.3f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {each} |")
    return found, lines


@torch.no_grad()
def memory(options: Namespace) -> tuple[dict, list[str]]:
    pixels, maps, chunks = (40, 8, (1, 2, 4)) if options.quick else (256, 64, (1, 2, 4, 8, 16, 32))
    images = scaling.raw_images(case(options.device, chunks[-1], pixels, maps))
    found, lines = {}, ["| | chunk | peak, MiB | in units of z of a chunk |", "|---|---|---|---|"]
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
            found[f"{method} {chunk}"] = {"bytes": used, "maps_bytes": one * chunk}
            units = used / (one * chunk)
            lines.append(f"| {method} | {chunk} | {used / 2**20:.0f} | {units:.1f} |")
    return found, lines


def scaled(options: Namespace) -> tuple[dict, list[str]]:
    found = {
        "machine": clocks.machine(),
        "options": {**vars(options), "output": str(options.output)},
        "runs": scaling.survey(options),
    }
    return found, [scaling.show(found)]


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
