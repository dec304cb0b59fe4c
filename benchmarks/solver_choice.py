"""Which of our solvers codes a problem fastest on a CPU, over the sizes that problems have.

    python benchmarks/solver_choice.py
    python benchmarks/solver_choice.py --channels 16 112 --threads 2

One image for each problem, of high-passed photographs of scikit-image (1 and 3 channels), or of the
rectified responses of a photograph to random filters, minus the mean of each channel (more
channels). The filters are patches of other photographs. Prints the seconds until the objective is
within 1e-2 and 1e-3 of its minimum, and until the duality gap proves the latter; "over" is twice
the time of the fastest solver before. At the end, how much longer the default takes than the
fastest. Seconds are of the processor with one thread, else of the clock on the wall.

Each problem is stored in runs/benchmark/solver_choice.jsonl; the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from skimage import data
from timing import Clock
from torch import Tensor

from deconvnet import SolverSettings
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.descent import CoordinateDescent
from deconvnet.sparse_coding.iteration import CHECK_EVERY, Method, Start, Until
from deconvnet.sparse_coding.problem import Problem
from deconvnet.sparse_coding.solve import SOLVERS, default_solver, lam_from_ratio, sparse_code

# Distances from the minimum, relative to it; the last also as a duality gap.
LEVELS = (1e-2, 1e-3)
METHODS = ("coordinate", "fista", "admm")
RATIOS = (0.3, 0.1, 0.03, 0.01)
# (channels, maps, filter, pixels): images of fewer pixels where a problem would take minutes.
SHAPES = (
    *((1, 16, 3, 128), (1, 16, 8, 128), (1, 64, 1, 128), (1, 64, 5, 128), (1, 64, 8, 128)),
    *((1, 64, 11, 128), (1, 64, 16, 128), (1, 256, 8, 64), (1, 512, 11, 64), (1, 64, 8, 32)),
    (1, 64, 8, 256),
    *((3, 16, 5, 96), (3, 64, 3, 96), (3, 64, 8, 96), (3, 256, 8, 48), (3, 64, 16, 64)),
    *((16, 16, 3, 48), (16, 64, 1, 48), (16, 64, 3, 48), (16, 64, 5, 48), (16, 64, 11, 48)),
    *((16, 256, 5, 32), (16, 512, 3, 32)),
    *((112, 64, 3, 28), (112, 64, 5, 28), (112, 256, 1, 28), (112, 256, 3, 28), (112, 512, 5, 14)),
    *((256, 64, 3, 14), (256, 64, 5, 14), (256, 512, 1, 28), (256, 256, 3, 14), (256, 512, 3, 14)),
)
# Seconds after which the first solver of a problem stops too.
PATIENCE = 8.0


class Stop(Exception):
    """Raised to stop a solver."""


@dataclass(frozen=True)
class Row:
    """A problem, the non-zero coefficients for each number of the image, and the seconds of each
    method to each distance, and to the gap (infinite if it was stopped before).
    """

    channels: int
    maps: int
    filter: int
    pixels: int
    ratio: float
    threads: int
    nonzero: float
    seconds: dict[str, list[float]]
    default: str

    @property
    def key(self) -> list:
        return [self.channels, self.maps, self.filter, self.pixels, self.ratio, self.threads]

    def excess(self, goal: int) -> float:
        """The time of the default over that of the fastest."""
        fastest = min(times[goal] for times in self.seconds.values())
        return self.seconds[self.default][goal] / fastest if fastest < math.inf else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = sorted({shape[0] for shape in SHAPES})
    parser.add_argument("--channels", type=int, nargs="+", choices=every, default=every)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="lam_ratio")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = list(measured(options))
    goals = [f"a distance of {level:g}" for level in LEVELS] + [f"a gap of {LEVELS[-1]:g}"]
    for goal, name in enumerate(goals):
        excess = np.array([row.excess(goal) for row in rows])
        excess = excess[~np.isnan(excess)]
        print(
            f"to {name} the default takes at most {excess.max():.2f} times as long as the fastest, "
            f"in {np.count_nonzero(excess > 1.5)} of {len(excess)} problems over 1.5 times"
        )


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """The rows, each printed, from the file or measured and stored."""
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "solver_choice.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    known = {str(row.key): row for row in (Row(**json.loads(line)) for line in lines)}
    # Code is compiled, or loaded, and the pages of arrays are mapped before anything is timed.
    for size in (1, 3):
        sparse_code(torch.randn(1, 2, 16, 16), torch.randn(4, 2, size, size), lam_ratio=0.3)
    print("| C | K | filter | image | lam_ratio | non-zero | " + " | ".join(METHODS) + " |")
    print("|---|---|---|---|---|---|" + "---|" * len(METHODS))
    for shape in SHAPES:
        if shape[0] not in options.channels:
            continue
        y, f = problem(*shape)
        for ratio in options.ratios:
            row = known.get(str([*shape, ratio, options.threads]))
            if row is None:
                row = measure(y, f, ratio)
                with file.open("a") as stored:
                    print(json.dumps(asdict(row)), file=stored)
            cells = (
                " ".join("over" if math.isinf(t) else f"{t:.3g}" for t in row.seconds[method])
                for method in METHODS
            )
            C, K, h, side = shape
            print(
                f"| {C} | {K} | {h} | {side} | {ratio} | {row.nonzero:.2g} | "
                + " | ".join(cells)
                + " |",
                flush=True,
            )
            yield row


def problem(channels: int, maps: int, size: int, pixels: int) -> tuple[Tensor, Tensor]:
    """(y, f): an image (1, C, pixels, pixels) and filters (K, C, size, size) of unit norm."""
    random = np.random.default_rng(0)
    responses = random.standard_normal((channels, 3, 5, 5)) / 5
    coded = _channels("astronaut", channels, responses)
    start = (coded.shape[1] - pixels) // 3
    y = coded[:, start : start + pixels, start : start + pixels]
    others = [_channels(name, channels, responses) for name in ("chelsea", "coffee")]
    f = np.empty((maps, channels, size, size), np.float32)
    for k in range(maps):
        # The strongest of a few, because most of a photograph is flat.
        patches = []
        for _ in range(4):
            other = others[k % 2]
            i, j = (random.integers(0, side - size) for side in other.shape[1:])
            patches.append(other[:, i : i + size, j : j + size])
        f[k] = max(patches, key=np.linalg.norm)
        f[k] /= np.linalg.norm(f[k])
    return torch.from_numpy(y[None].astype(np.float32)), torch.from_numpy(f)


def _channels(photograph: str, channels: int, responses: np.ndarray) -> np.ndarray:
    """A photograph in half its size: (C, height, width)."""
    image = getattr(data, photograph)().transpose(2, 0, 1) / 255
    image = ndimage.zoom(image, (1, 0.5, 0.5), order=1)
    image -= ndimage.gaussian_filter(image, (0, 5, 5))
    if channels == 1:
        return image.mean(0, keepdims=True)
    if channels == 3:
        return image
    image = torch.nn.functional.conv2d(torch.from_numpy(image)[None], torch.from_numpy(responses))
    image = image[0].relu().numpy()
    return image - image.mean((1, 2), keepdims=True)


def measure(y: Tensor, f: Tensor, ratio: float) -> Row:
    """The seconds of each method; a method stops at twice the time of the fastest before it."""
    A = Deconvolution(f)
    posed = Problem(A, y, lam_from_ratio(A, y, ratio))
    curves: dict[str, Curve] = {}
    for method in METHODS:
        limit = 2 * min([PATIENCE, *(curve.points[-1].seconds for curve in curves.values())])
        curves[method] = Curve(limit)
        with contextlib.suppress(Stop):
            until = Until(10**6, callback=curves[method])
            curves[method].clock.start()
            SOLVERS[method](posed, Start(A.zeros(y)), SolverSettings(method), until)
    minimum = min(point.objective for curve in curves.values() for point in curve.points)
    seconds = {method: curve.times(minimum) for method, curve in curves.items()}
    nonzero = curves["coordinate"].nonzero / y.numel()
    C, K, h = f.shape[1], f.shape[0], f.shape[2]
    default = default_solver(y).method
    return Row(C, K, h, y.shape[2], ratio, torch.get_num_threads(), nonzero, seconds, default)


class Point(NamedTuple):
    seconds: float
    objective: float
    gap: float


class Curve:
    """Records objective and gap as a callback, and stops the method at the last level, or if late.

    nonzero: the coefficients that are not zero at the end.
    """

    def __init__(self, limit: float):
        self.limit, self.clock, self.points = (
            limit,
            Clock(clock="process_time" if torch.get_num_threads() == 1 else "perf_counter"),
            [],
        )
        self.nonzero = 0

    def __call__(self, count: int, method: Method) -> None:
        # What coordinate descent computes for its certificate, it needs anyway.
        if isinstance(method, CoordinateDescent):
            method.certify([0])
            objective, gap = float(method.costs[0]), float(method.gaps[0])
        elif count % CHECK_EVERY:
            return
        self.clock.stop()
        z = method.maps()
        if not isinstance(method, CoordinateDescent):
            residual = method.problem.b - method.problem.A(z)
            objective = float(method.problem.objective(z, residual))
            gap = objective - float(method.problem.dual_objective(residual))
        self.points.append(Point(self.clock.seconds, objective, gap / objective))
        self.nonzero = int(torch.count_nonzero(z))
        if gap <= LEVELS[-1] * objective or self.clock.seconds > self.limit:
            raise Stop
        self.clock.start()

    def times(self, minimum: float) -> list[float]:
        """The seconds to each level, and to the last as a gap."""
        reached = [
            [point.seconds for point in self.points if point.objective <= (1 + level) * minimum]
            for level in LEVELS
        ]
        reached.append([point.seconds for point in self.points if point.gap <= LEVELS[-1]])
        return [min(seconds, default=math.inf) for seconds in reached]


if __name__ == "__main__":
    main()
