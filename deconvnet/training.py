"""A training run: layer by layer, learn -> infer -> show -> save, and go on where it stopped."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from deconvnet.monitor import InferencePoint, LayerResult, Monitor
from deconvnet.network import Codes, DeconvNet, Layer
from deconvnet.run import Run
from deconvnet.solvers import solve
from deconvnet.sparsity import penalty
from deconvnet.trainer import LayerTrainer
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
    seed: int = 0,
    chunk: int = 8,
) -> list[LayerResult]:
    """Learn all layers of the network from images (N, 3, H, W) in [0, 1]; what each layer reached.

    Goes on from the state of the run, saves after every epoch, leaves <run>/network.safetensors.
    Raises Interrupted, having saved, when the process is asked to stop (Ctrl-C, SIGTERM).
    """
    position, resumed = _restore(net, images, run)
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

        codes = net.infer(images, depth=position.layer - 1, chunk=chunk, progress=watch)
        while position.layer <= net.depth:
            started = time.perf_counter()
            number, layer = position.layer, net.layer(position.layer)
            b = codes.layers[-1].pooled if number > 1 else codes.y
            if resumed is None and number > 1:
                layer.fit_scale(b)
            b = b / layer.scale
            trainer = LayerTrainer(layer, b, seed=seed, number=number, chunk=chunk, state=resumed)
            resumed = None
            _learn(net, trainer, position, run, monitor, stop_requested)
            codes = net.extend(codes, chunk=chunk, progress=watch)
            seconds = time.perf_counter() - started
            position.results.append(_result(net, codes, number, seconds))
            _show(net, codes, images, b, position, monitor)
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


def _restore(net: DeconvNet, images: Tensor, run: Run) -> tuple[_Position, dict | None]:
    """The position of the run and the state of its trainer, the network being brought there."""
    if run.state is None:
        net.preprocessing.fit(images)
        return _Position(1, 0, []), None
    state = run.state
    net.load_parts(state["network"]["tensors"])
    results = [LayerResult(**result) for result in state["results"]]
    return _Position(state["layer"], state["step"], results), state["trainer"]


def _learn(
    net: DeconvNet,
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
            position.save(run, net, trainer)
        if stop_requested():
            position.save(run, net, trainer)
            raise Interrupted


def _show(
    net: DeconvNet,
    codes: Codes,
    images: Tensor,
    b: Tensor,
    position: _Position,
    monitor: Monitor,
) -> None:
    """Everything that a finished layer has to show."""
    number = position.layer
    monitor.result(position.results[-1], codes.layer(number).z, position.step)
    monitor.inference(number, _inference_curve(net.layer(number), b[:CURVE_IMAGES]))
    for name, picture in layer_pictures(net, codes, images, number).items():
        monitor.picture(name, picture, position.step)


def _inference_curve(layer: Layer, b: Tensor) -> list[InferencePoint]:
    """How the objective falls while the maps of some images are inferred, beta beside it."""
    A, settings = layer.operator(), layer.settings
    curve = []

    def watch(iteration: int, z: Tensor, beta: Tensor) -> None:
        error = float((b - A(z)).double().square().sum())
        cost = settings.lam / 2 * error + float(penalty(z, settings.p))
        density = float(torch.count_nonzero(z)) / z.numel()
        curve.append(InferencePoint(iteration, cost / len(b), float(beta.mean()), density))

    solve(
        A,
        b,
        lam=settings.lam,
        p=settings.p,
        settings=replace(settings.solver, tolerance=0.0),
        callback=watch,
    )
    return curve


def _result(net: DeconvNet, codes: Codes, number: int, seconds: float) -> LayerResult:
    found = codes.layer(number)
    return LayerResult(
        layer=number,
        objective=float(found.objective.mean()),
        snr=net.snr(codes, number),
        density=found.density,
        dead=int((found.z.abs().amax((0, 2, 3)) == 0).sum()),
        seconds=seconds,
    )


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
