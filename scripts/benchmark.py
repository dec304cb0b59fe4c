"""Measure the solvers on real photographs: what they cost, what they reach, how long they take.

python scripts/benchmark.py solvers    objective above the true minimum, density, SNR of each solver
python scripts/benchmark.py z-step     the exact z-step against conjugate gradients, interleaved
python scripts/benchmark.py speed      seconds per image of inference and of learning, and memory
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable

# With another busy process on the machine, threads of OpenMP that spin while they wait cost up to
# ten times the time; on a quiet machine a short spin is as fast. To be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from deconvnet import LayerSettings, SolverSettings, config
from deconvnet.data import DataSettings, load_images
from deconvnet.network import DeconvNet, snr
from deconvnet.operators import Deconvolution
from deconvnet.preprocessing import PreprocessingSettings
from deconvnet.solvers import Solution, duality_gap, solve
from deconvnet.trainer import LayerTrainer

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
    parser.add_argument("what", choices=["solvers", "z-step", "speed"], help="what to measure")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--images", type=int, default=4, help="how many crops (default 4)")
    parser.add_argument("--maps", type=int, default=24, help="feature maps (default 24)")
    parser.add_argument("--color", default="rgb", choices=["rgb", "grey"])
    parser.add_argument("--lam", type=float, default=2.0, help="weight of the reconstruction")
    parser.add_argument("--repeats", type=int, default=7, help="of each timing (default 7)")
    options = parser.parse_args()
    try:
        layer, y = problem(options, config.device(options.device))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{len(y)} images {y.shape[1]}x{y.shape[2]}x{y.shape[3]}, {options.maps} maps of 7x7, "
        f"lam {options.lam}, torch {torch.__version__} on {y.device}, "
        f"{torch.get_num_threads()} threads"
    )
    {"solvers": solvers, "z-step": z_step, "speed": speed}[options.what](layer, y, options)


def problem(options: argparse.Namespace, device: torch.device) -> tuple[LayerTrainer, torch.Tensor]:
    """A layer whose filters have been learned for six epochs, and the preprocessed photographs."""
    images = load_images(DataSettings()).images
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
    """Every solver from zero, the faster of two runs; the minimum is a long ADMM run in float64."""
    A, lam = trainer.layer.operator(), options.lam
    double = Deconvolution(A.f.double().cpu())
    b = y.double().cpu()
    exact = solve(double, b, lam=lam, settings=SolverSettings(iterations=400, tolerance=1e-6))
    lowest = float(exact.objective.mean())
    gap = float(duality_gap(double, b, exact.z, lam).mean())
    print(f"minimum {lowest:.2f} per image (duality gap {gap:.2g})\n")
    print("| solver | above the minimum | entries of z not zero | SNR | time against the first |")
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
    """One pass of the paper's schedule with each z-step, in turns; ratios of neighbours in time."""
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
    """Median seconds per image, with the spread, and the peak of memory."""
    A, lam = trainer.layer.operator(), options.lam
    infer = SolverSettings(iterations=60, tolerance=0.0)
    work = {
        "inference, 60 iterations of admm": lambda: solve(A, y, lam=lam, settings=infer),
        "one epoch of learning": lambda: [trainer.update() for _ in range(trainer.batches)],
    }
    counts = {"one epoch of learning": len(trainer.b)}
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"memory, peak of the process        {peak:.0f} MiB")


def timed(run: Callable[[], Solution], device: torch.device) -> tuple[Solution, float]:
    """The result, and the seconds until the device had finished it."""
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
