"""How long codes of 1x1 filters take, beside FISTA, ADMM and scikit-learn.

    python benchmarks/pointwise.py
    python benchmarks/pointwise.py --problems wide --rounds 3

Every position of an image is a vector of channels: here a patch of a photograph of scikit-image,
minus its mean, of unit norm. The filters are such patches of other photographs. All solvers
minimise 1/2 ||D z - y||^2 + lambda sum |z| on one thread. Prints the seconds of the processor (the
median of the rounds, in which the solvers take turns), how far the objective is above its minimum,
which is known from a duality gap of 1e-6, and the non-zero coefficients of a position.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from skimage import data, transform
from sklearn.decomposition import sparse_encode
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from deconvnet import LearningSettings, SolverSettings, learn_filters, sparse_code
from deconvnet.sparse_coding import pointwise
from deconvnet.sparse_coding.solve import default_solver


@dataclass(frozen=True)
class Spec:
    """`images` of positions (height, width), whose channels are grey patches of this side."""

    maps: int
    patch: int
    positions: tuple[int, int]
    weight: float
    images: int = 1

    def problem(self) -> tuple[Tensor, Tensor]:
        """(y, f): images (N, C, H, W) and filters (K, C, 1, 1)."""
        random = np.random.default_rng(0)
        count = self.images * self.positions[0] * self.positions[1]
        y = _patches("camera", self.patch, count, random)
        f = _patches("astronaut", self.patch, self.maps, random)
        y = y.reshape(self.images, *self.positions, -1).transpose(0, 3, 1, 2)
        return torch.from_numpy(y.copy()), torch.from_numpy(f)[:, :, None, None]


PROBLEMS = {
    "wide": Spec(maps=1000, patch=49, positions=(32, 34), weight=0.15),
    "activations": Spec(maps=512, patch=11, positions=(14, 14), weight=0.1, images=4),
    "patches": Spec(maps=75, patch=5, positions=(128, 128), weight=0.1),
}

SOLVERS = ("default", "residual", "fista", "admm", "sklearn")


def _patches(photograph: str, side: int, count: int, random: np.random.Generator) -> np.ndarray:
    """(count, side * side) float32: patches of contrast, of mean zero and unit norm."""
    image = getattr(data, photograph)() / 255.0
    image = transform.rescale(image.mean(-1) if image.ndim == 3 else image, 0.5, anti_aliasing=True)
    windows = np.lib.stride_tricks.sliding_window_view(image, (side, side))
    corners = random.integers(0, windows.shape[:2], (3 * count, 2))
    patches = windows[tuple(corners.T)].reshape(len(corners), -1)
    patches = patches - patches.mean(1, keepdims=True)
    norms = np.linalg.norm(patches, axis=1, keepdims=True)
    strongest = np.argsort(-norms[:, 0], kind="stable")[: 2 * count]
    chosen = random.permutation(strongest)[:count]
    return (patches[chosen] / norms[chosen]).astype(np.float32)


def solvers(y: Tensor, f: Tensor, weight: float) -> dict[str, Callable[[], Tensor]]:
    """The solvers by name, which return their maps.

    default: that of `sparse_code`; residual: the same, but as for larger filters, which correlates
    the residual in every round; fista, admm: to a gap of 1e-3; sklearn: `lasso_cd`.
    """
    lam, gap = 1 / weight, 1e-3
    default = default_solver(y)
    rows, atoms = (x.movedim(1, -1).reshape(-1, y.shape[1]).numpy() for x in (y, f))

    def code(settings: SolverSettings) -> Tensor:
        return sparse_code(y, f, lam=lam, settings=settings).z

    def with_residuals() -> Tensor:
        with _without_gram():
            return code(default)

    def scikit_learn() -> Tensor:
        with warnings.catch_warnings():
            # Its tolerance is below the rounding of float32.
            warnings.simplefilter("ignore", ConvergenceWarning)
            z = sparse_encode(rows, atoms, algorithm="lasso_cd", alpha=weight, max_iter=1000)
        return torch.from_numpy(z).view(len(y), *y.shape[2:], -1).movedim(-1, 1)

    return {
        "default": lambda: code(default),
        "residual": with_residuals,
        "fista": lambda: code(SolverSettings("fista", iterations=3000, gap=gap)),
        "admm": lambda: code(SolverSettings("admm", iterations=3000, gap=gap)),
        "sklearn": scikit_learn,
    }


@contextmanager
def _without_gram():
    most, pointwise.MAX_FILTERS = pointwise.MAX_FILTERS, 0
    try:
        yield
    finally:
        pointwise.MAX_FILTERS = most


def compare(name: str, spec: Spec, names: list[str], rounds: int) -> None:
    y, f = spec.problem()
    precise = SolverSettings("coordinate", iterations=1000, gap=1e-6)
    minimum = float(sparse_code(y, f, lam=1 / spec.weight, settings=precise).objective.sum())
    K, C, sides = len(f), y.shape[1], "x".join(map(str, spec.positions))
    print(f"\n{name}: {K} filters over {C} channels, {len(y)} x {sides}, lambda {spec.weight:g}")
    seconds: dict[str, list[float]] = {}
    maps = {}
    small = solvers(y[..., :2, :2].contiguous(), f, spec.weight)
    for number in range(rounds):
        by_name = solvers(y, f, spec.weight)
        for solver in names:
            if number == 0:
                # Compiles the loops.
                small[solver]()
            # A Gram matrix that is kept from the last call would not be timed.
            pointwise._last.clear()
            start = time.process_time()
            maps[solver] = by_name[solver]()
            seconds.setdefault(solver, []).append(time.process_time() - start)
    for solver, z in maps.items():
        error = y.double() - torch.einsum("kc,nkhw->nchw", f[:, :, 0, 0].double(), z.double())
        value = float(error.square().sum() / 2 / spec.weight + z.double().abs().sum())
        count = float((z != 0).sum()) / (z.numel() / K)
        print(
            f"| {solver} | {statistics.median(seconds[solver]):.3f} s | "
            f"{value / minimum - 1:.1e} | {count:.1f} |",
            flush=True,
        )


def learn(spec: Spec) -> None:
    """Four epochs of learning on eleven images, of which eight are one batch."""
    y, _ = replace(spec, images=11).problem()
    start = time.process_time()
    learned = learn_filters(
        y, spec.maps, 1, lam=1 / spec.weight, learning=LearningSettings(epochs=4)
    )
    seconds = time.process_time() - start
    last = learned.history[-1]
    print(
        f"\nlearning {spec.maps} filters from {y[:, 0].numel()} positions of {y.shape[1]} "
        f"channels, 4 epochs: {seconds:.1f} s, snr {last.snr:.2f} dB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--learn", action="store_true", help="learn filters as well")
    parser.add_argument("--quick", action="store_true", help="tiny, to check that everything runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.problems:
        spec = PROBLEMS[name]
        if args.quick:
            spec = replace(spec, maps=20, patch=5, positions=(3, 3))
        compare(name, spec, args.solvers, args.rounds)
        if args.learn:
            learn(spec)


if __name__ == "__main__":
    main()
