"""A training run: layer by layer, learn -> infer -> show -> save, and go on where it stopped."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from deconvnet.codes import Codes, LayerCodes
from deconvnet.monitor import InferencePoint, LayerResult, Monitor
from deconvnet.network import DeconvNet, Layer, Target
from deconvnet.run import Run
from deconvnet.solvers import data_term
from deconvnet.sparsity import Prior
from deconvnet.trainer import LayerTrainer
from deconvnet.visualization.evolution import (
    append,
    evolution_picture,
    layer_watch,
    project_snapshot,
    recorded,
)
from deconvnet.visualization.figures import filter_picture, layer_pictures

log = logging.getLogger(__name__)

# How many images the curve of inference is drawn for.
CURVE_IMAGES = 4


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


def train(
    net: DeconvNet,
    images: Tensor,
    run: Run,
    monitor: Monitor,
    *,
    frames: Tensor | None = None,
    seed: int = 0,
    chunk: int = 8,
) -> list[LayerResult]:
    """Learn all layers of the network from images (N, 3, H, W) in [0, 1]; what each layer reached.

    frames: (N, 4), the place of each picture in its square, or None where they fill it.
    Goes on from the state of the run, saves after every epoch, leaves <run>/network.safetensors.
    Raises Interrupted, having saved, when the process is asked to stop (Ctrl-C, SIGTERM).
    """
    position, resumed = _restore(net, images, frames, run)
    path = run.folder / "network.safetensors"
    if position.layer > net.depth:
        log.info("all %d layers were trained before", net.depth)
        if not path.exists():
            net.save(path)
        return position.results[: net.depth]
    monitor.start(position.step)
    with _stop_requests() as stop_requested:

        def watch(done: int, total: int) -> None:
            monitor.inferred(done, total)
            if stop_requested():
                raise Interrupted

        codes = net.infer(
            images, frames=frames, depth=position.layer - 1, chunk=chunk, progress=watch
        )
        while position.layer <= net.depth:
            started = time.perf_counter()
            number, layer = position.layer, net.layer(position.layer)
            if resumed is None and number > 1:
                layer.fit_scale(codes.layers[-1].pooled)
            trainer = LayerTrainer(
                layer,
                net.below(codes, number),
                partial(net.target, codes, number),
                seed=seed,
                number=number,
                chunk=chunk,
                watch=layer_watch(net, codes, number),
                state=resumed,
            )
            resumed = None
            _learn(net, codes, trainer, position, run, monitor, stop_requested)
            codes = net.extend(codes, chunk=chunk, progress=watch)
            seconds = time.perf_counter() - started
            position.results.append(_result(net, codes, number, seconds))
            _show(net, codes, images, position, run, monitor)
            position.layer += 1
            position.save(run, net)
    net.save(path)
    return position.results


@dataclass
class _Position:
    """Where a run is, beside the filters: layer being learned, filter updates so far, results."""

    layer: int
    step: int
    results: list[LayerResult]

    def save(self, run: Run, net: DeconvNet, trainer: LayerTrainer | None = None) -> None:
        # A layer whose training has not begun is no part of what was learned.
        tensors, settings = net.to_parts(self.layer if trainer else self.layer - 1)
        state = {
            "network": {"tensors": tensors, "settings": settings},
            "layer": self.layer,
            "step": self.step,
            "results": [asdict(result) for result in self.results],
            "trainer": trainer and trainer.state_dict(),
        }
        run.save(self.step, state)


def _restore(
    net: DeconvNet, images: Tensor, frames: Tensor | None, run: Run
) -> tuple[_Position, dict | None]:
    """The position of the run and the state of its trainer, the network being brought there."""
    if run.state is None:
        net.preprocessing.fit(images, frames)
        return _Position(1, 0, []), None
    state = run.state
    net.load_parts(state["network"]["tensors"])
    results = [LayerResult(**result) for result in state["results"]]
    return _Position(state["layer"], state["step"], results), state["trainer"]


def _learn(
    net: DeconvNet,
    codes: Codes,
    trainer: LayerTrainer,
    position: _Position,
    run: Run,
    monitor: Monitor,
    stop_requested: Callable[[], bool],
) -> None:
    """All the filter updates of a layer that are left."""
    monitor.layer(trainer.number, trainer.updates_done, trainer.updates)
    while not trainer.done:
        stats = trainer.update()
        position.step += 1
        monitor.advance()
        if stats:
            monitor.epoch(stats, position.step)
            if trainer.number == 1:
                monitor.picture("layer1/filters", filter_picture(net), position.step)
            if trainer.snapshot:
                # Before the checkpoint: a run that goes on from it has these columns.
                column = project_snapshot(net, codes, trainer.number, trainer.snapshot)
                append(run.evolution(trainer.number), column)
            position.save(run, net, trainer)
        if stop_requested():
            position.save(run, net, trainer)
            raise Interrupted


def _show(
    net: DeconvNet,
    codes: Codes,
    images: Tensor,
    position: _Position,
    run: Run,
    monitor: Monitor,
) -> None:
    """Everything that a finished layer has to show."""
    number = position.layer
    monitor.result(position.results[-1], codes.layer(number).values, position.step)
    some = net.target(codes, number, slice(CURVE_IMAGES))
    monitor.inference(number, _inference_curve(net.layer(number), some))
    pictures = layer_pictures(net, codes, images, number)
    learned = recorded(run.evolution(number))
    if learned:
        pictures[f"layer{number}/evolution"] = evolution_picture(learned)
    for name, picture in pictures.items():
        monitor.picture(name, picture, position.step)


def _inference_curve(layer: Layer, target: Target) -> list[InferencePoint]:
    """How the objective falls while the maps of some images are inferred, beta beside it."""
    A, settings = target.T @ layer.operator(), layer.settings
    prior = Prior(settings.p, group=settings.group)
    curve = []

    def watch(iteration: int, z: Tensor, beta: Tensor) -> None:
        cost = data_term(target.b - A(z), settings.lam) + prior(z)
        density = float(torch.count_nonzero(z)) / z.numel()
        curve.append(InferencePoint(iteration, float(cost.mean()), float(beta.mean()), density))

    layer.infer(target, settings=replace(settings.solver, tolerance=0.0), callback=watch)
    return curve


def _result(net: DeconvNet, codes: Codes, number: int, seconds: float) -> LayerResult:
    found = codes.layer(number)
    return LayerResult(
        layer=number,
        objective=float(found.objective.mean()),
        snr=net.snr(codes, number),
        density=found.density,
        dead=_dead(found),
        seconds=seconds,
    )


def _dead(found: LayerCodes) -> int:
    """How many maps are zero on all images."""
    active = sum((found.select(slice(n, n + 1)).z != 0).sum((0, 2, 3)) for n in range(len(found)))
    return int((active == 0).sum())


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT or SIGTERM has come; a second one acts at once."""
    requested = False

    def handle(number: int, frame: object) -> None:
        nonlocal requested
        requested = True
        signal.signal(number, before[number])

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
