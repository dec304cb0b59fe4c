"""SPORCO's solvers and learners (github.com/bwohlberg/sporco), with the calls of our own.

They run as fast as they can: FastSolve skips what only its statistics need, and the learner that
always evaluates its objective is kept from doing so. HighMemSolve is off, since it gained nothing
in our measurements while rho still changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import sporco.fft
from problems import Problem
from sporco.admm import cbpdn
from sporco.dictlrn import cbpdndl, onlinecdl, prlcnscdl
from sporco.pgm import cbpdn as pgm_cbpdn
from sporco.pgm.backtrack import BacktrackRobust, BacktrackStandard
from timing import Recorder, Snapshots

ENDLESS = 10**6


def set_threads(threads: int) -> None:
    sporco.fft.pyfftw_threads = threads


def admm(problem: Problem, recorder: Recorder) -> None:
    """ConvBPDN with its automatic penalty parameter, the default."""
    options = {"FastSolve": True, "RelStopTol": 0.0}
    _code(problem, recorder, cbpdn.ConvBPDN, options, lambda solver: solver.Y)


def pgm(problem: Problem, recorder: Recorder) -> None:
    """The proximal gradient method with robust backtracking.

    The first step size is the default, which was faster in our measurements than that of its
    example, which has to be shortened again and again.
    """
    options = {"FastSolve": True, "Backtrack": BacktrackRobust()}
    _code(problem, recorder, pgm_cbpdn.ConvBPDN, options, lambda solver: solver.X)


SOLVERS: dict[str, Callable[[Problem, Recorder], None]] = {"SPORCO ADMM": admm, "SPORCO PGM": pgm}


def _code(
    problem: Problem,
    recorder: Recorder,
    kind: type,
    options: dict,
    sparse: Callable[[object], np.ndarray],
) -> None:
    def watch(solver) -> bool:
        return recorder(solver.k + 1, lambda: _maps(sparse(solver)))

    chosen = kind.Options({"MaxMainIter": ENDLESS, "Callback": watch, **options})
    several = len(problem.y) > 1
    solver = kind(
        _filters(problem.f), _images(problem.y), problem.weight, chosen, dimK=int(several)
    )
    recorder.start()
    solver.solve()


def _images(y: np.ndarray) -> np.ndarray:
    """(N, C, H, W) -> (H, W[, C][, N]), without axes of length 1."""
    return np.ascontiguousarray(y.transpose(2, 3, 1, 0)).reshape(
        *y.shape[2:], *(n for n in (y.shape[1], y.shape[0]) if n > 1)
    )


def _filters(f: np.ndarray) -> np.ndarray:
    """(K, C, h, w) -> (h, w[, C], K)."""
    turned = np.ascontiguousarray(f.transpose(2, 3, 1, 0))
    return turned[:, :, 0] if f.shape[1] == 1 else turned


def _maps(x: np.ndarray) -> np.ndarray:
    """(H, W, 1, N, K) -> (N, K, H, W)."""
    return x[:, :, 0].transpose(2, 3, 0, 1)


def _from_filters(d: np.ndarray) -> np.ndarray:
    """The filters of a learner, (h, w, 1, 1, K) with one channel -> (K, C, h, w)."""
    return np.ascontiguousarray(d.reshape(*d.shape[:2], 1, -1).transpose(3, 2, 0, 1))


Learner = Callable[[np.ndarray, np.ndarray, float, Snapshots, int], None]


def learn_batch(
    y: np.ndarray,
    f: np.ndarray,
    weight: float,
    recorder: Snapshots,
    threads: int,
    *,
    methods: tuple[str, str],
    coding: Callable[[float], dict] = lambda weight: {},
    updating: dict | None = None,
) -> None:
    """ConvBPDNDictLearn: coding steps alternate with filter steps."""
    chosen = cbpdndl.ConvBPDNDictLearn.Options(
        {
            "MaxMainIter": ENDLESS,
            "Callback": partial(_watch, recorder),
            "CBPDN": {"FastSolve": True, **coding(weight)},
            "CCMOD": {"FastSolve": True, **(updating or {})},
        },
        *methods,
    )
    learner = cbpdndl.ConvBPDNDictLearn(_filters(f), _images(y), weight, chosen, *methods)
    recorder.start()
    learner.solve()


def learn_consensus(
    y: np.ndarray,
    f: np.ndarray,
    weight: float,
    recorder: Snapshots,
    threads: int,
    *,
    coding: Callable[[float], dict] = lambda weight: {},
    updating: dict | None = None,
) -> None:
    """ConvBPDNDictLearn_Consensus: the images in several processes of one thread each."""
    chosen = prlcnscdl.ConvBPDNDictLearn_Consensus.Options(
        {
            "MaxMainIter": ENDLESS,
            "Callback": partial(_watch, recorder),
            "CBPDN": coding(weight),
            "CCMOD": updating or {},
        }
    )
    set_threads(1)
    learner = prlcnscdl.ConvBPDNDictLearn_Consensus(
        _filters(f), _images(y), weight, chosen, nproc=threads if threads > 1 else 0
    )
    learner.evaluate = lambda: (0.0, 0.0, 0.0)
    recorder.start()
    learner.solve()


def learn_online(
    y: np.ndarray, f: np.ndarray, weight: float, recorder: Snapshots, threads: int
) -> None:
    """OnlineConvBPDNDictLearn with the settings of its example: one random image at a time."""
    chosen = onlinecdl.OnlineConvBPDNDictLearn.Options(
        {
            "eta_a": 10.0,
            "eta_b": 20.0,
            "DataType": np.float32,
            "CBPDN": {
                "rho": 5.0,
                "AutoRho": {"Enabled": True},
                "RelaxParam": 1.8,
                "RelStopTol": 1e-4,
                "MaxMainIter": 50,
                "FastSolve": True,
                "DataType": np.float32,
            },
        }
    )
    learner = onlinecdl.OnlineConvBPDNDictLearn(_filters(f), weight, chosen)
    images, generator = _images(y), np.random.default_rng(0)
    recorder.start()
    for count in range(1, ENDLESS):
        learner.solve(images[..., [generator.integers(len(y))]], dimK=1)
        if recorder(count, lambda: _from_filters(learner.getdict())):
            return


def _watch(recorder: Snapshots, learner) -> bool:
    return recorder(learner.j + 1, lambda: _from_filters(learner.getdict()))


def _example_rho(weight: float) -> dict:
    return {"rho": 50.0 * weight + 0.5}


# The learning methods, and the number of iterations of each.
LEARNERS: dict[str, tuple[Learner, int]] = {
    "SPORCO consensus": (partial(learn_batch, methods=("admm", "cns")), 100),
    "SPORCO consensus, its example": (
        partial(
            learn_batch,
            methods=("admm", "cns"),
            coding=_example_rho,
            updating={"rho": 10.0, "ZeroMean": True},
        ),
        200,
    ),
    "SPORCO parallel consensus": (learn_consensus, 100),
    "SPORCO parallel consensus, its example": (
        partial(learn_consensus, coding=_example_rho, updating={"rho": 1.0, "ZeroMean": True}),
        200,
    ),
    "SPORCO PGM, its example": (
        partial(
            learn_batch,
            methods=("pgm", "pgm"),
            coding=lambda weight: {"Backtrack": BacktrackStandard(gamma_u=1.1), "L": 36.0},
            updating={"Backtrack": BacktrackStandard(), "L": 50.0},
        ),
        100,
    ),
    "SPORCO online, its example": (learn_online, 100),
}
