"""deconvnet's solvers and learning for the comparison with SPORCO, and the minimum of a problem.

A solver is called with a problem and a recorder. It starts the recorder's clock when it is ready to
solve, and calls the recorder after each iteration until that returns True.
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
from problems import Objective, Problem
from timing import Clock, Due, Recorder, Snapshots, StopSolver

from deconvnet import LayerSettings, LearningSettings, SolverSettings
from deconvnet.network.layer import Layer
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import METHODS
from deconvnet.sparse_coding.solve import solve
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_trainer import LayerTrainer

ENDLESS = 10**6
# Coordinate descent runs on the CPU only.
TIMED = [method for method in ("coordinate", "admm", "fista") if method in METHODS]


def solvers(device: str) -> dict[str, Callable[[Problem, Recorder], None]]:
    """The solvers by name. Those with boundary "valid" solve a problem of their own."""
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
            raise StopSolver

    A = Deconvolution(f, boundary)
    recorder.start()
    try:
        # Without a callback, a solver need not keep the maps of all images.
        callback = None if counted else watch
        solution = solve(A, y, lam=problem.lam, settings=settings, callback=callback)
        recorder(solution.iterations, lambda: solution.z.cpu().numpy(), last=True)
    except StopSolver:
        pass


@dataclass(frozen=True)
class Minimum:
    """The lowest objective and the highest lower bound of each image, as lists.

    seconds: how long the search took.
    """

    objective: list[float]
    bound: list[float]
    seconds: float

    @property
    def gap(self) -> float:
        """The relative duality gap: how far the sum of the objectives may be above the minimum."""
        return 1 - sum(self.bound) / sum(self.objective)


def minimum(
    problem: Problem, boundary: str, folder: Path, *, gap: float, patience: float, device: str
) -> Minimum:
    """The minimum to a relative duality gap, in float64, or what `patience` seconds reach.

    It is stored in the folder, and searched again only with more patience.
    """
    lowest = stored_minimum(problem, boundary, folder)
    if lowest is None or (lowest.gap > gap and lowest.seconds < patience):
        lowest = search(problem, boundary, gap=gap, patience=patience, device=device)
        stored = {**_stored_minima(folder), _key(problem, boundary): vars(lowest)}
        (folder / "minima.json").write_text(json.dumps(stored, indent=1))
    return lowest


def stored_minimum(problem: Problem, boundary: str, folder: Path) -> Minimum | None:
    stored = _stored_minima(folder).get(_key(problem, boundary))
    return None if stored is None else Minimum(**stored)


def _stored_minima(folder: Path) -> dict:
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
    """The lowest objectives that our best solver reaches, and lower bounds of the minima."""
    objective = Objective(problem, boundary)
    lowest = np.full(len(problem.y), np.inf)
    bound = np.zeros(len(problem.y))
    clock, due = Clock(synchronizer(device)), Due(every=1, growth=1.25)

    def watch(iteration: int, z: torch.Tensor, beta: torch.Tensor) -> None:
        late = clock.seconds > patience
        if not (late or due(iteration)):
            return
        maps = z.cpu().numpy()
        np.minimum(lowest, objective(maps), out=lowest)
        np.maximum(bound, objective.dual(maps), out=bound)
        if late or lowest.sum() - bound.sum() <= gap * lowest.sum():
            raise StopSolver

    y, f = (torch.from_numpy(array).to(device, dtype) for array in (problem.y, problem.f))
    method = "coordinate" if "coordinate" in METHODS and device == "cpu" else "admm"
    settings = SolverSettings(method=method, iterations=ENDLESS, tolerance=0.0)
    clock.start()
    try:
        solution = solve(
            Deconvolution(f, boundary),
            y,
            lam=problem.lam,
            prior=Prior(non_negative=problem.non_negative),
            settings=settings,
            callback=watch,
        )
        due.next = 0
        watch(solution.iterations, solution.z, None)
    except StopSolver:
        pass
    return Minimum(lowest.tolist(), bound.tolist(), clock.seconds)


LEARNERS = {
    "deconvnet, 12 epochs": dict(epochs=12),
    "deconvnet, 36 epochs": dict(epochs=36),
    "deconvnet, 36 epochs from patches": dict(epochs=36, init="patches"),
}
if "coordinate" in METHODS:
    by_coordinates = SolverSettings("coordinate", training_iterations=1)
    # Each update uses its own five images alone, which are enough for all filters.
    halves = dict(batch_size=5, averaging_epochs=0, solver=by_coordinates)
    LEARNERS["deconvnet, 36 epochs, coordinate"] = dict(epochs=36, **halves)
    LEARNERS["deconvnet, 40 epochs from patches, coordinate"] = dict(
        epochs=40, init="patches", **halves
    )


def learn(
    y: np.ndarray,
    f: np.ndarray,
    weight: float,
    recorder: Snapshots,
    *,
    device: str = "cpu",
    boundary: str = "circular",
    non_negative: bool = False,
    given: bool = False,
    solver: SolverSettings | None = None,
    **learning: Any,
) -> None:
    """Learn filters update by update, from filters f or, with init="patches", from patches of y.

    An iteration is one update of the filters. learning: settings that differ from the defaults.
    given: learn from f in any case, as `learn_filters(filters=f)` does, so that `init` applies to
    replacements of unused filters alone.
    """
    images, start = (torch.from_numpy(array).to(device) for array in (y, f))
    settings = LayerSettings(
        len(f),
        f.shape[2:],
        lam=1 / weight,
        boundary=boundary,
        non_negative=non_negative,
        solver=solver or SolverSettings(),
        learning=LearningSettings(**{"init": "random", **learning}),
    )
    layer = Layer(settings, y.shape[1], seeded_generator(0, 1)).to(images)
    recorder.start()
    trainer = LayerTrainer(layer, images)
    if given or settings.learning.init == "random":
        layer.set_filters(start)
    while not trainer.done:
        trainer.update()
        filters = layer.filters
        if recorder(trainer.updates_done, lambda: filters.cpu().numpy().copy(), trainer.done):  # noqa: B023
            return


def peak_on_device(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
