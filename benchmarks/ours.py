"""deconvnet's solvers and learning behind the same calls, and what all are judged by: the minimum.

A solver gets a problem and a recorder, starts its clock when it is ready to solve, and calls it
with every iterate until it has had enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clocks import Clock, Due, Enough, Recorder, Snapshots
from problems import Objective, Problem

from deconvnet import LayerSettings, LearningSettings, SolverSettings
from deconvnet.network.layer import Layer
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.problem import METHODS
from deconvnet.sparse_coding.solve import solve
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_trainer import LayerTrainer

ENDLESS = 10**6
# The solver of coordinates, where there is one, runs on the CPU alone.
TIMED = [method for method in ("coordinate", "admm", "fista") if method in METHODS]


def solvers(device: str) -> dict[str, Callable[[Problem, Recorder], None]]:
    """By name; those with boundary valid solve a problem of their own."""
    methods = [method for method in TIMED if device == "cpu" or method != "coordinate"]
    names = {"admm": "ADMM", "fista": "FISTA", "coordinate": "coordinate"}
    return {
        f"deconvnet {names[method]}{', valid' if boundary == 'valid' else ''}": partial(
            code, method=method, boundary=boundary, device=device
        )
        for boundary in ("circular", "valid")
        for method in methods
    }


def boundary_of(name: str) -> str:
    return "valid" if name.endswith(", valid") else "circular"


def synchronizer(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


@torch.no_grad()
def code(problem: Problem, recorder: Recorder, *, method: str, boundary: str, device: str) -> None:
    y, f = (torch.from_numpy(array).to(device) for array in (problem.y, problem.f))
    counted = recorder.objective is None
    settings = SolverSettings(
        method=method, iterations=recorder.iterations if counted else ENDLESS, tolerance=0.0
    )

    def watch(iteration: int, z: torch.Tensor, beta: torch.Tensor) -> None:
        if recorder(iteration, lambda: z.cpu().numpy()):
            raise Enough

    A = Deconvolution(f, boundary)
    recorder.start()
    try:
        # Without a callback, a solver need not keep the maps of all images.
        callback = None if counted else watch
        found = solve(A, y, lam=problem.lam, settings=settings, callback=callback)
        recorder(found.iterations, lambda: found.z.cpu().numpy(), last=True)
    except Enough:
        pass


@dataclass(frozen=True)
class Minimum:
    """The lowest objective (N,) that was reached and the highest lower bound, as lists; seconds of
    the search.
    """

    objective: list[float]
    bound: list[float]
    seconds: float

    @property
    def gap(self) -> float:
        """By how much the sum of the objectives may be above that of the minima, relatively."""
        return 1 - sum(self.bound) / sum(self.objective)


def minimum(
    problem: Problem, boundary: str, folder: Path, *, gap: float, patience: float, device: str
) -> Minimum:
    """The minimum to a relative duality gap, in float64, or as near as `patience` seconds lead.

    It is kept in the folder, and looked for again only where more patience is offered.
    """
    found = kept_minimum(problem, boundary, folder)
    if found is None or (found.gap > gap and found.seconds < patience):
        found = search(problem, boundary, gap=gap, patience=patience, device=device)
        kept = {**_kept(folder), _key(problem, boundary): vars(found)}
        (folder / "minima.json").write_text(json.dumps(kept, indent=1))
    return found


def kept_minimum(problem: Problem, boundary: str, folder: Path) -> Minimum | None:
    found = _kept(folder).get(_key(problem, boundary))
    return None if found is None else Minimum(**found)


def _kept(folder: Path) -> dict:
    file = folder / "minima.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _key(problem: Problem, boundary: str) -> str:
    return f"{problem.name} {boundary} {problem.digest}"


@torch.no_grad()
def search(
    problem: Problem,
    boundary: str,
    *,
    gap: float,
    patience: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Minimum:
    """The lowest objectives that the best of our solvers reaches, and bounds of the minima."""
    judge = Objective(problem, boundary)
    lowest = np.full(len(problem.y), np.inf)
    bound = np.zeros(len(problem.y))
    clock, due = Clock(synchronizer(device)), Due(every=1, growth=1.25)

    def watch(iteration: int, z: torch.Tensor, beta: torch.Tensor) -> None:
        late = clock.seconds > patience
        if not (late or due(iteration)):
            return
        maps = z.cpu().numpy()
        np.minimum(lowest, judge(maps), out=lowest)
        np.maximum(bound, judge.dual(maps), out=bound)
        if late or lowest.sum() - bound.sum() <= gap * lowest.sum():
            raise Enough

    y, f = (torch.from_numpy(array).to(device, dtype) for array in (problem.y, problem.f))
    method = "coordinate" if "coordinate" in METHODS and device == "cpu" else "admm"
    settings = SolverSettings(method=method, iterations=ENDLESS, tolerance=0.0)
    clock.start()
    try:
        found = solve(
            Deconvolution(f, boundary), y, lam=problem.lam, settings=settings, callback=watch
        )
        due.next = 0
        watch(found.iterations, found.z, None)
    except Enough:
        pass
    return Minimum(lowest.tolist(), bound.tolist(), clock.seconds)


LEARNERS = {
    "deconvnet, 12 epochs": dict(epochs=12),
    "deconvnet, 36 epochs": dict(epochs=36),
    "deconvnet, 36 epochs from patches": dict(epochs=36, init="patches"),
}
if "coordinate" in METHODS:
    by_coordinates = SolverSettings("coordinate", training_iterations=1)
    LEARNERS["deconvnet, 36 epochs, coordinate"] = dict(epochs=36, solver=by_coordinates)
    LEARNERS["deconvnet, 40 epochs from patches, coordinate"] = dict(
        epochs=40, batch_size=5, init="patches", solver=by_coordinates
    )


def learn(
    y: np.ndarray,
    f: np.ndarray,
    weight: float,
    recorder: Snapshots,
    *,
    device: str,
    solver: SolverSettings | None = None,
    **learning: Any,
) -> None:
    """learn_filters, one update at a time, from filters f or, with init "patches", its own.

    An iteration is an update of the filters; settings not named in `learning` are the defaults.
    """
    images, start = (torch.from_numpy(array).to(device) for array in (y, f))
    settings = LayerSettings(
        len(f),
        f.shape[2],
        lam=1 / weight,
        boundary="circular",
        solver=solver or SolverSettings(),
        learning=LearningSettings(**{"init": "random", **learning}),
    )
    layer = Layer(settings, y.shape[1], seeded_generator(0, 1)).to(images)
    recorder.start()
    trainer = LayerTrainer(layer, images)
    if settings.learning.init == "random":
        layer.set_filters(start)
    while not trainer.done:
        trainer.update()
        filters = layer.filters
        if recorder(trainer.updates_done, lambda: filters.cpu().numpy().copy(), trainer.done):  # noqa: B023
            return


def peak_on_device(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
