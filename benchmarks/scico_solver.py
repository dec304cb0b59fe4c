"""SCICO's ADMM (github.com/lanl/scico) for benchmarks/compare_sporco.py, in SCICO's environment.

python benchmarks/scico_solver.py JOB.json

Job: data (an .npz file of y, f and weight), threads, goal (an objective), limit (seconds) and
repeats. Prints, for each value of rho and each round, the points of `timing.Recorder`.

The solver is that of SCICO's example of convolutional sparse coding: it minimises over all maps at
once in the Fourier domain, and shrinks. It has a fixed penalty rho; RHOS are those that are tried.
Its problems have one image of one channel, and circular boundaries. JAX compiles the iteration at
the first call, which is not timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

# That with which SPORCO starts its own search, for lambda = 0.05, and a third and three times it.
RHOS = (1.2, 3.5, 10.0)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    # JAX has as many threads as the process has cores, so this comes before its import.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    from problems import Objective, Problem
    from timing import Recorder

    with np.load(job["data"]) as data:
        problem = Problem("scico", data["y"], data["f"], float(data["weight"]))
    objective, runs = Objective(problem), []
    with contextlib.redirect_stdout(sys.stderr):
        for rho in RHOS:
            solve(problem, rho, Recorder(None, iterations=2))
        for turn in range(job["repeats"]):
            for rho in RHOS:
                recorder = Recorder(objective, goal=job["goal"], limit=job["limit"])
                solve(problem, rho, recorder)
                runs.append({"rho": rho, "turn": turn, "points": recorder.points})
    versions = {name: metadata.version(name) for name in ("scico", "jax")}
    print(json.dumps({"runs": runs, "versions": versions}))


def solve(problem, rho: float, recorder) -> None:
    import scico.numpy as snp
    from scico.functional import L1Norm
    from scico.linop import CircularConvolve, Identity, Sum
    from scico.loss import SquaredL2Loss
    from scico.optimize.admm import ADMM, FBlockCircularConvolveSolver

    y, f = snp.array(problem.y[0, 0]), snp.array(problem.f[:, 0])
    shape = (len(f), *y.shape)
    C = CircularConvolve(f, input_shape=shape, ndims=2)
    solver = ADMM(
        f=SquaredL2Loss(y=y, A=Sum(input_shape=C.output_shape, axis=0) @ C),
        g_list=[problem.weight * L1Norm()],
        C_list=[Identity(input_shape=shape)],
        rho_list=[rho],
        alpha=1.8,
        maxiter=1,
        subproblem_solver=FBlockCircularConvolveSolver(),
        itstat_options={"fields": {}, "itstat_func": lambda solver: ()},
    )
    recorder.start()
    iteration, done = 0, False
    while not done:
        solver.step()
        iteration += 1
        z = solver.z_list[0]
        # JAX returns before it has computed.
        z.block_until_ready()
        done = recorder(iteration, lambda: np.asarray(z)[None])  # noqa: B023


if __name__ == "__main__":
    main()
