"""Learn the filters of SPORCO's own notebooks, with SPORCO's settings and with deconvnet.

python benchmarks/sporco_learning_notebooks.py                   all rows
python benchmarks/sporco_learning_notebooks.py consensus online  some of them
python benchmarks/sporco_learning_notebooks.py --threads 1 --repeats 3

The notebooks (github.com/bwohlberg/sporco-notebooks, 2022) learn filters from five photographs of
128x128, and publish the seconds. This script learns from the same images here: SPORCO with the
options of its notebook, then deconvnet with coordinate descent, from the same random filters and
from patches. One function scores the filters by the minimum of

    1/2 sum over the images ||sum_k f_k * z_k - y||^2 + lambda sum |z|      circular convolution

to a relative duality gap of 1e-3, while the clock is stopped, and says when the filters of
deconvnet were first as good as those of SPORCO. Images come with SPORCO (pip install -e
'.[benchmark]'); nothing is downloaded. A JSON file goes to runs/benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import deconvnet_solvers
import numpy as np
import problems
import timing
import torch
from sporco_notebooks import arguments, as_image, photograph, run_rounds, split

MAPS, SIZE, WEIGHT, GAP = 64, 8, 0.2, 1e-3
CROPS = {
    "barbara.png": np.s_[10:522, 100:612],
    "kodim23.png": np.s_[:, 60:572],
    "monarch.png": np.s_[:, 160:672],
    "sail.png": np.s_[:, 210:722],
    "tulips.png": np.s_[:, 30:542],
}
# All images at once, without earlier ones.
OURS = dict(
    epochs=100,
    batch_size=len(CROPS),
    averaging_epochs=0,
    solver=deconvnet_solvers.by_coordinates,
)


@dataclass(frozen=True)
class Notebook:
    """published: the seconds that the notebook shows. learn(images, filters, threads): SPORCO's
    filters, and the seconds here.
    """

    grey: bool
    published: float
    learn: Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, float]]


@dataclass
class Row:
    """A row of the table, with the seconds of each round."""

    name: str
    published: float
    objective: float = 0.0
    lowest: dict[str, float] = field(default_factory=dict)
    sporco: list[float] = field(default_factory=list)
    ours: dict[str, list[float]] = field(default_factory=lambda: {"random": [], "patches": []})


def main() -> None:
    options = arguments(__doc__, NOTEBOOKS)
    rows = [Row(name, NOTEBOOKS[name].published) for name in options.rows]
    run_rounds(
        rows, lambda row: run(row, NOTEBOOKS[row.name], options.threads), HEADER, line, options
    )


HEADER = """
| row | published, s | SPORCO here, s | objective | ours as low from random filters, s | lowest \
| from patches, s | lowest |
|---|---|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    cells = [row.name, f"{row.published:.1f}", timing.spread(row.sporco), f"{row.objective:.1f}"]
    for init, seconds in row.ours.items():
        ratio = np.median(row.sporco) / np.median(seconds)
        cells += [f"{timing.spread(seconds)}, {ratio:.0f} times", f"{row.lowest[init]:.1f}"]
    return f"| {' | '.join(cells)} |"


def run(row: Row, notebook: Notebook, threads: int) -> None:
    """One round of a row: SPORCO's notebook, then ours."""
    y = images(notebook.grey)
    f = np.random.default_rng(0).standard_normal((MAPS, y.shape[1], SIZE, SIZE)).astype(np.float32)
    learned, seconds = notebook.learn(y, f, threads)
    row.sporco.append(seconds)
    row.objective = score(y, learned)
    f /= np.sqrt(np.square(f).sum((1, 2, 3), keepdims=True))
    for init, times in row.ours.items():
        learn = partial(deconvnet_solvers.learn, y, f, WEIGHT, init=init, **OURS)
        learn(timing.Snapshots(iterations=2))
        snapshots = timing.Snapshots()
        learn(snapshots)
        reached = float("inf")
        for _, at, filters in snapshots.recorded:
            row.lowest[init] = score(y, filters)
            if row.lowest[init] <= row.objective:
                reached = min(reached, at)
        times.append(reached)


def images(grey: bool) -> np.ndarray:
    """(5, C, 128, 128), high-passed as in the notebooks."""
    made = [photograph(name, grey, crop, zoom=0.25) for name, crop in CROPS.items()]
    return np.stack([as_image(split(image, 5.0)[1]) for image in made])


def score(y: np.ndarray, f: np.ndarray) -> float:
    problem = problems.Problem("notebook", y, f, WEIGHT)
    found = deconvnet_solvers.search(
        problem, "circular", gap=GAP, patience=60.0, dtype=torch.float32
    )
    return sum(found.objective)


# SPORCO's learners, with the options that the notebooks show.


def consensus(y: np.ndarray, f: np.ndarray, threads: int) -> tuple[np.ndarray, float]:
    from sporco.dictlrn import cbpdndl

    chosen = cbpdndl.ConvBPDNDictLearn.Options(
        {
            "MaxMainIter": 200,
            "CBPDN": {"rho": 50.0 * WEIGHT + 0.5},
            "CCMOD": {"rho": 10.0, "ZeroMean": True},
        },
        dmethod="cns",
    )
    return _solved(
        cbpdndl.ConvBPDNDictLearn(*_in_sporcos_order(y, f), WEIGHT, chosen, dmethod="cns")
    )


def parallel(y: np.ndarray, f: np.ndarray, threads: int) -> tuple[np.ndarray, float]:
    import sporco.fft
    from sporco.dictlrn import prlcnscdl

    chosen = prlcnscdl.ConvBPDNDictLearn_Consensus.Options(
        {
            "MaxMainIter": 200,
            "CBPDN": {"rho": 50.0 * WEIGHT + 0.5},
            "CCMOD": {"rho": 1.0, "ZeroMean": True},
        }
    )
    learner = prlcnscdl.ConvBPDNDictLearn_Consensus(
        *_in_sporcos_order(y, f), WEIGHT, chosen, nproc=threads if threads > 1 else 0
    )
    # Each process has a thread of its own.
    sporco.fft.pyfftw_threads = 1
    try:
        return _solved(learner)
    finally:
        sporco.fft.pyfftw_threads = threads


def online(y: np.ndarray, f: np.ndarray, threads: int) -> tuple[np.ndarray, float]:
    from sporco.dictlrn import onlinecdl

    chosen = onlinecdl.OnlineConvBPDNDictLearn.Options(
        {
            "ZeroMean": False,
            "eta_a": 10.0,
            "eta_b": 20.0,
            "DataType": np.float32,
            "CBPDN": {
                "rho": 5.0,
                "AutoRho": {"Enabled": True},
                "RelaxParam": 1.8,
                "RelStopTol": 1e-7,
                "MaxMainIter": 50,
                "FastSolve": False,
                "DataType": np.float32,
            },
        }
    )
    D, S = _in_sporcos_order(y, f)
    learner = onlinecdl.OnlineConvBPDNDictLearn(D, WEIGHT, chosen)
    np.random.seed(12345)
    for _ in range(50):
        learner.solve(S[..., [np.random.randint(0, S.shape[-1])]])
    return _filters(learner), float(learner.timer.elapsed("solve"))


def _solved(learner) -> tuple[np.ndarray, float]:
    learner.solve()
    return _filters(learner), float(learner.timer.elapsed("solve"))


def _filters(learner) -> np.ndarray:
    """(K, C, h, w)."""
    D = np.asarray(learner.getdict()).reshape(SIZE, SIZE, -1, MAPS)
    return np.ascontiguousarray(D.transpose(3, 2, 0, 1), np.float32)


def _in_sporcos_order(y: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Filters (h, w[, C], K) and images (H, W[, C], N)."""
    D, S = f.transpose(2, 3, 1, 0), y.transpose(2, 3, 1, 0)
    if y.shape[1] == 1:
        D, S = D[:, :, 0], S[:, :, 0]
    return np.ascontiguousarray(D), np.ascontiguousarray(S)


NOTEBOOKS = {
    "consensus": Notebook(True, 86.53, consensus),
    "parallel": Notebook(True, 29.26, parallel),
    "online": Notebook(False, 231.13, online),
}


if __name__ == "__main__":
    main()
