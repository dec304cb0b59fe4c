"""Measure the cost, the accuracy and the time of solvers and of learning on real photographs.

python benchmarks/performance.py WHAT, where WHAT is

solvers    objective above the true minimum, density and SNR of each solver
z-step     the exact z-step against conjugate gradients, interleaved
speed      seconds per image of inference and of learning, and memory
layers     four layers of the ICCV 2011 paper: seconds, memory, scaling
steps      step sizes and starting points of gradient methods, with --run runs/iccv2011-small
scaling    learning shared by several processes of one thread each
"""

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# With another busy process on the machine, threads of OpenMP that spin while they wait cost up to
# ten times the time; on a quiet machine a short spin is as fast. To be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from hydra import compose, initialize_config_dir

from deconvnet import LayerSettings, SolverSettings, load
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.read_settings import read_settings, register
from deconvnet.images.datasets import load_images
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.images.sources import DataSettings
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.operators.linear import Deconvolution, LinearOperator, dot
from deconvnet.sparse_coding.prior import penalties, shrink
from deconvnet.sparse_coding.problem import Solution, data_term, duality_gap
from deconvnet.sparse_coding.solve import solve
from deconvnet.support.communicator import started
from deconvnet.support.devices import torch_device
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.training_set import ImageSource, TrainingSet

SOLVERS = {
    "half_quadratic, paper (beta x6, 2 CG)": dict(method="half_quadratic", z_step="cg"),
    "half_quadratic, toolbox (beta x10, 2 CG)": dict(
        method="half_quadratic", z_step="cg", beta_factor=10.0
    ),
    "half_quadratic, beta x6, exact z-step": dict(method="half_quadratic"),
    "half_quadratic, beta x1.1, exact z-step": dict(method="half_quadratic", beta_factor=1.1),
    "half_quadratic, beta x1.02, exact z-step": dict(method="half_quadratic", beta_factor=1.02),
    "ista, 100 iterations": dict(method="ista", iterations=100),
    "fista, 100 iterations": dict(method="fista", iterations=100),
    "admm, 20 iterations": dict(iterations=20),
    "admm, 50 iterations": dict(iterations=50),
    "admm, 100 iterations": dict(iterations=100),
}


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = {"solvers": solvers, "z-step": z_step, "speed": speed, "layers": layers, "steps": steps}
    modes["scaling"] = scaling
    parser.add_argument("what", choices=modes, help="what to measure")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--run", help="steps: the run folder of a network that was trained")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all)")
    parser.add_argument("--size", type=int, help="layers: one size in pixels, in this process")
    parser.add_argument("--images", type=int, default=4, help="how many crops (default 4)")
    parser.add_argument("--maps", type=int, default=24, help="feature maps (default 24)")
    parser.add_argument("--color", default="rgb", choices=["rgb", "grey"])
    parser.add_argument("--lam", type=float, default=2.0, help="weight of the reconstruction")
    parser.add_argument("--repeats", type=int, default=7, help="of each timing (default 7)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], help="scaling: processes (default 1 2)"
    )
    parser.add_argument("--batch", type=int, default=8, help="scaling: batch_size (default 8)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with one_line_errors(ValueError, OSError):
        if options.what in ("layers", "steps", "scaling"):
            modes[options.what](options)
            return
        layer, y = problem(options, torch_device(options.device))
    print(
        f"{len(y)} images {y.shape[1]}x{y.shape[2]}x{y.shape[3]}, {options.maps} maps of 7x7, "
        f"lam {options.lam}, torch {torch.__version__} on {y.device}, "
        f"{torch.get_num_threads()} threads"
    )
    modes[options.what](layer, y, options)


def problem(options: argparse.Namespace, device: torch.device) -> tuple[LayerTrainer, torch.Tensor]:
    """A layer after six epochs of learning, and the preprocessed photographs."""
    images = load_images(DataSettings(scale=0.35, max_images=32)).images
    net = DeconvNet(
        [LayerSettings(options.maps, 7, lam=options.lam)], PreprocessingSettings(options.color)
    )
    net.preprocessing.fit(images)
    y = net.to(device).infer(images, depth=0).y
    trainer = LayerTrainer(net.layer(1), y)
    while trainer.epoch < 6:
        trainer.update()
    return trainer, y[: options.images]


@torch.no_grad()
def solvers(trainer: LayerTrainer, y: torch.Tensor, options: argparse.Namespace) -> None:
    """Each solver from zero, the faster of two runs; the minimum is a long float64 run of ADMM."""
    A, lam = trainer.layer.operator(), options.lam
    double = Deconvolution(A.f.double().cpu())
    b = y.double().cpu()
    exact = solve(double, b, lam=lam, settings=SolverSettings(iterations=400, tolerance=1e-6))
    lowest = float(exact.objective.mean())
    gap = float(duality_gap(double, b, exact.z, lam).mean())
    print(f"minimum {lowest:.2f} per image (duality gap {gap:.2g})\n")
    print("| solver | above the minimum | non-zero coefficients | SNR | time against the first |")
    print("|---|---|---|---|---|")
    first = None
    for name, settings in SOLVERS.items():
        chosen = SolverSettings(**{"tolerance": 0.0, **_one_pass(settings)})
        runs = [timed(lambda s=chosen: solve(A, y, lam=lam, settings=s), y.device) for _ in "ab"]
        solution, seconds = runs[0][0], min(seconds for _, seconds in runs)
        first = first or seconds
        above = float(solution.objective.mean()) / lowest - 1
        print(
            f"| {name} | {above:.2%} | {density(solution):.1%} | "
            f"{snr(y, y - solution.residual):.1f} dB | {seconds / first:.1f} |"
        )
    row = f"{density(exact):.1%} | {snr(b, b - exact.residual):.1f} dB"
    print(f"| the minimum | 0 | {row} | - |")


@torch.no_grad()
def z_step(trainer: LayerTrainer, y: torch.Tensor, options: argparse.Namespace) -> None:
    """One pass of the paper's schedule with each z-step in turn, and the ratios of their times."""
    A, lam = trainer.layer.operator(), options.lam
    for boundary in ("valid", "circular"):
        A = Deconvolution(A.f, boundary)
        forms = {
            "exact": dict(z_step="exact"),
            "2 CG": dict(z_step="cg"),
            "20 CG": dict(z_step="cg", cg_iterations=20),
        }
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        objective = {}
        for _ in range(options.repeats + 1):
            for name, settings in forms.items():
                chosen = SolverSettings(method="half_quadratic", iterations=1, **settings)
                solution, t = timed(
                    lambda s=chosen, A=A: solve(A, y, lam=lam, settings=s), y.device
                )
                seconds[name].append(t)
                objective[name] = float(solution.objective.mean())
        print(f"\nboundary {boundary}: one pass of 7 betas")
        for name in forms:
            ratios = [a / b for a, b in zip(seconds[name], seconds["exact"], strict=True)][1:]
            print(
                f"  {name:6} objective {objective[name]:9.1f}   time against exact: median "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


@torch.no_grad()
def speed(trainer: LayerTrainer, y: torch.Tensor, options: argparse.Namespace) -> None:
    """Median seconds per image with their range, and the peak memory."""
    A, lam = trainer.layer.operator(), options.lam
    infer = SolverSettings(iterations=60, tolerance=0.0)
    work = {
        "inference, 60 iterations of admm": lambda: solve(A, y, lam=lam, settings=infer),
        "one epoch of learning": lambda: [trainer.update() for _ in range(trainer.sampler.batches)],
    }
    counts = {"one epoch of learning": trainer.data.num_images}
    for name, run in work.items():
        times = [timed(run, y.device)[1] / counts.get(name, len(y)) for _ in range(options.repeats)]
        print(
            f"{name:34} {statistics.median(times):.4f} s per image "
            f"({min(times):.4f} to {max(times):.4f})"
        )
    if y.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        print(f"memory, peak on the device         {peak:.0f} MiB")
    else:
        print(f"memory, peak of the process        {_peak():.0f} MiB")


def layers(options: argparse.Namespace) -> None:
    """The paper's four layers, ten ISTA iterations each, for several sizes, images and threads.

    Every row runs in a separate process, so that its peak memory can be measured.
    """
    if options.size:
        print(json.dumps(_layers(options.size, options.images, torch_device(options.device))))
        return
    print("seconds per image and layer: 15, 50, 100, 150 maps of 7x7, ten ISTA iterations")
    print("| images | pixels | threads | layer 1 | layer 2 | layer 3 | layer 4 | MiB per image |")
    print("|---|---|---|---|---|---|---|---|")
    paper = "| the paper (recalled, not verified) | 150x150 | six cores, Matlab |"
    print(f"{paper} 0.12 | 0.21 | 0.38 | 0.56 | - |")
    rows = [(8, 150, 1), (8, 150, 2), (2, 150, 1), (4, 150, 1), (16, 150, 1)]
    rows += [(8, 106, 1), (8, 212, 1), (8, 300, 1)]
    for images, size, threads in rows:
        command = [sys.executable, __file__, "layers", "--device", options.device]
        command += [f"--size={size}", f"--images={images}", f"--threads={threads}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measurement = json.loads(done.stdout.splitlines()[-1])
        cells = " | ".join(f"{seconds:.3f}" for seconds in measurement["seconds"])
        print(
            f"| {images} | {size}x{size} | {threads} | {cells} | {measurement['mebibytes']:.0f} |"
        )


@torch.no_grad()
def _layers(size: int, count: int, device: torch.device) -> dict:
    """Seconds per image of each layer, the faster of two, and the peak memory per image."""
    solver = SolverSettings("ista", iterations=10, tolerance=0.0)
    common = dict(target="image", pooling="in_loop", solver=solver)
    shapes = [(15, 3, 1.0), (50, 2, 0.5), (100, 2, 0.4), (150, 2, 0.3)]
    net = DeconvNet(
        [LayerSettings(k, pool=[group, 3, 3], lam=lam, **common) for k, group, lam in shapes],
        PreprocessingSettings("grey"),
    )
    images = load_images(DataSettings(size=size, scale=1.0, max_images=count)).images
    net.preprocessing.fit(images)
    codes = net.to(device).infer(images, depth=0)
    before, seconds = _fresh_peak(), []
    for number in range(1, net.depth + 1):
        net.layer(number).initialize(
            net.layer_input(codes, number), torch.Generator().manual_seed(0)
        )
        runs = [timed(lambda c=codes: net.infer_next_layer(c, chunk=count), device) for _ in "ab"]
        codes = runs[0][0]
        seconds.append(min(t for _, t in runs) / len(images))
    return {"seconds": seconds, "mebibytes": (_peak() - before) / len(images)}


@torch.no_grad()
def steps(options: argparse.Namespace) -> None:
    """The objective of each layer above the lowest that any method reached, by iteration.

    On photographs at half size, which is not the training size of the experiments.
    """
    if not options.run:
        raise ValueError("steps needs --run, the folder of a run of deconvnet train")
    net = load(options.run)
    images = load_images(DataSettings(size=150, scale=0.5, max_images=None)).images
    chosen = torch.linspace(0, len(images) - 1, options.images).round().long()
    codes = net.infer(images[chosen])
    marks = (5, 10, 20, 50)
    print(f"{options.images} images; objective above the lowest that any reached in 200 iterations")
    for number in range(1, net.depth + 1):
        layer, problem = net.layer(number), net.layer_problem(codes, number)
        A, common = problem.T @ layer.operator(), layer.settings
        zero = torch.zeros_like(A.adjoint(problem.b))
        start = _adjoint_start(A, problem.b, common.lam, common.window)
        ways = {
            "ista, 1 / (lam norm^2)": (zero, "ista", False),
            "fista, 1 / (lam norm^2)": (zero, "fista", False),
            "ista, adaptive": (zero, "ista", True),
            "fista, adaptive": (zero, "fista", True),
            "fista, adaptive, from A'b": (start, "fista", True),
        }
        curves = {}
        for name, (state, method, adaptive) in ways.items():
            curve = curves[name] = []

            def watch(i: int, z: torch.Tensor, beta: torch.Tensor, curve=curve, A=A, b=problem.b):
                cost = data_term(b - A(z), common.lam) + penalties(z, common.p)  # noqa: B023
                curve.append(float(cost.mean()))

            settings = SolverSettings(method, iterations=200, tolerance=0.0, adaptive=adaptive)
            layer.infer(problem, settings=settings, state=state, callback=watch)
        lowest = min(curve[-1] for curve in curves.values())
        print(f"\n| layer {number}, iterations | " + " | ".join(map(str, marks)) + " |")
        print("|---" * (len(marks) + 1) + "|")
        for name, curve in curves.items():
            cells = " | ".join(f"{curve[mark - 1] / lowest - 1:.1%}" for mark in marks)
            print(f"| {name} | {cells} |")


def _adjoint_start(
    A: LinearOperator, b: torch.Tensor, lam: float, window: tuple[int, int, int] | None
) -> torch.Tensor:
    """A feed-forward guess of z: A'b shrunk at the best of four thresholds, optimally scaled."""
    correlations, best = A.adjoint(b), None
    for ratio in (0.1, 0.2, 0.3, 0.5):
        threshold = ratio * correlations.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        guess = shrink(correlations, 1 / threshold, window=window)
        image = A(guess)
        l1 = penalties(guess).view(-1, 1, 1, 1)
        scale = ((lam * dot(image, b) - l1) / (lam * dot(image, image))).clamp(min=0).to(b.dtype)
        cost = float((data_term(b - scale * image, lam) + penalties(scale * guess)).mean())
        if best is None or cost < best[0]:
            best = cost, scale * guess
    return best[1]


def scaling(options: argparse.Namespace) -> None:
    """Images per second while several processes learn the first two layers of the default model.

    Each process has one thread; efficiency is relative to one process alone in the same round.
    """
    if "RANK" in os.environ:
        _scaling_rank(options)
        return
    counts = [1, *(count for count in options.ranks if count != 1)]
    rounds = [{count: _launch(count, options) for count in counts} for _ in range(options.repeats)]
    print(f"batches of {options.batch} images, one thread a process, {options.repeats} rounds")
    print("| layer | ranks | one message an update | images a second | efficiency | exchange |")
    print("|---|---|---|---|---|---|")
    for index, number in enumerate((1, 2)):
        for count in counts:
            measurements = [entry[count][index] for entry in rounds]
            alone = [entry[1][index]["speed"] for entry in rounds]
            speeds = [entry["speed"] for entry in measurements]
            shares = sorted(s / (count * a) for s, a in zip(speeds, alone, strict=True))
            middle = statistics.median(shares)
            waits = statistics.median(entry["exchange"] for entry in measurements)
            print(
                f"| {number} | {count} | {measurements[0]['message'] / 1e6:.2f} MB | "
                f"{statistics.median(speeds):.1f} | {middle:.0%} ({shares[0]:.0%} to "
                f"{shares[-1]:.0%}) | {waits:.0%} of the time |"
            )


def _launch(count: int, options: argparse.Namespace) -> list[dict]:
    """The measurements of rank 0 among `count` processes."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    command = [sys.executable, __file__, "scaling", f"--batch={options.batch}"]
    command += [f"--device={options.device}", "--threads=1"]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=count, OMP_NUM_THREADS=1)
    processes = []
    for rank in range(count):
        own = {key: str(v) for key, v in dict(**shared, RANK=rank, LOCAL_RANK=rank).items()}
        environment = {**os.environ, **own}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise ValueError(f"ranks={count}: a process has failed, see its message")
    return json.loads(outputs[0].splitlines()[-1])


@torch.no_grad()
def _scaling_rank(options: argparse.Namespace) -> None:
    """One of the processes: a warm-up epoch and two timed epochs of each layer."""
    register()
    with initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
        learning = [f"model.layer{n}.learning.batch_size={options.batch}" for n in (1, 2)]
        settings = read_settings(compose("train", ["layers=2", *learning]))
    device = torch_device(options.device)
    net = DeconvNet(settings.layer_settings(), settings.preprocessing).to(device)
    measurements = []
    with started() as communicator:
        source = ImageSource.from_tensor(load_images(settings.data).images.to(device))
        training_set = TrainingSet(net, source, communicator=communicator)
        training_set.fit_preprocessing()
        for number in (1, 2):
            training_set.hold_codes(training_set.own_images(number), number - 1)
            if number > 1:
                net.layer(number).fit_scale(training_set.pooled_spread(number - 1))
            trainer = LayerTrainer(
                net.layer(number),
                training_set.layer_data(number),
                number=number,
                communicator=communicator,
            )
            _epoch(trainer)
            communicator.all_gather(None)
            start = time.perf_counter()
            loads = [_epoch(trainer).loads for _ in "ab"]
            synchronize(device)
            seconds = time.perf_counter() - start
            exchange = max(
                sum(accumulators[r].seconds["exchange"] for accumulators in loads) for r in (0, -1)
            )
            measurements.append(
                {
                    "speed": 2 * source.count / seconds,
                    "exchange": exchange / seconds,
                    "message": trainer.message_bytes,
                }
            )
            for _ in training_set.infer_next_layer(number):
                pass
    print(json.dumps(measurements))


def _epoch(trainer: LayerTrainer) -> EpochStats:
    while (stats := trainer.update()) is None:
        pass
    return stats


def _fresh_peak() -> float:
    """Reset the peak memory, where Linux permits it; returns the memory now in use, in MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def timed(run: Callable[[], Solution], device: torch.device) -> tuple[Solution, float]:
    """The result, and the seconds until the device had finished."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def density(solution: Solution) -> float:
    return float(torch.count_nonzero(solution.z)) / solution.z.numel()


def _one_pass(settings: dict) -> dict:
    return {"iterations": 1, **settings} if settings.get("method") == "half_quadratic" else settings


if __name__ == "__main__":
    main()
