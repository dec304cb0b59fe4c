"""Training, layer by layer, epoch by epoch: infer -> sums -> update -> watch -> save.

Everything that happens in a run happens here, in order. The position of a run is two integers,
epoch and batch, in a layer; the images of an epoch come in an order made from (seed, layer, epoch),
so that a run that was stopped goes on as if it had not been.
"""

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

from deconvnet.learning import (
    FilterSums,
    LearningSettings,
    dead_filters,
    double_filters,
    filter_sums,
    off_center,
    random_filters,
    shift,
    update_filters,
    update_filters_by_cg,
)
from deconvnet.monitor import EpochStats, InferencePoint, LayerResult, Monitor
from deconvnet.network import (
    Codes,
    DeconvNet,
    Layer,
    LayerSettings,
    check_size,
    seeded,
)
from deconvnet.run import Run
from deconvnet.solvers import Solution, SolverSettings, solve
from deconvnet.sparsity import penalty
from deconvnet.visualization.figures import filter_picture, layer_pictures

log = logging.getLogger(__name__)

# How many images the curve of inference is drawn for.
CURVE_IMAGES = 4

RECENTER_EVERY = 4


class Diverged(RuntimeError):
    """The objective is no longer finite; the filters are those of before."""


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


class LayerTrainer:
    """Learns the filters of one layer on what it has to explain, b (N, C, H, W).

    Holds the state of inference of every image (as z), so that each visit starts where the last one
    ended, the energy of every map in this epoch, and the running sums of the filter update. One
    call of `update` is one filter update. Without a `state` from `state_dict` the filters start as
    the settings say; with it they stay.
    """

    def __init__(
        self,
        layer: Layer,
        b: Tensor,
        *,
        seed: int = 0,
        number: int = 1,
        chunk: int = 8,
        state: dict | None = None,
    ):
        check_size(b, layer, number)
        self.layer, self.b = layer, b
        self.seed, self.number, self.chunk = seed, number, chunk
        self.settings: LearningSettings = layer.settings.learning
        self.epoch, self.batch = 0, 0
        self.codes: Tensor | None = None
        self.energy: Tensor | None = None
        self.sums: FilterSums | None = None
        self._totals = _Totals()
        if state is None:
            layer.initialize(b, seeded(seed, number, 1))
        else:
            self.load_state_dict(state)

    @property
    def done(self) -> bool:
        return self.epoch >= self.settings.epochs

    @property
    def batches(self) -> int:
        """Filter updates in an epoch."""
        return -(-len(self.b) // self.batch_size)

    @property
    def updates(self) -> int:
        """Filter updates in all epochs."""
        return self.settings.epochs * self.batches

    @property
    def updates_done(self) -> int:
        return self.epoch * self.batches + self.batch

    @property
    def batch_size(self) -> int:
        return min(self.settings.batch_size or len(self.b), len(self.b))

    @torch.no_grad()
    def update(self) -> EpochStats | None:
        """Visit the next batch and update the filters; at the end of an epoch, what it saw."""
        started = time.perf_counter()
        order = torch.randperm(len(self.b), generator=seeded(self.seed, self.number, 2, self.epoch))
        chosen = order[self.batch * self.batch_size : (self.batch + 1) * self.batch_size]
        if self.settings.update == "cg":
            self._update_by_cg(chosen)
        else:
            self._update_by_sums(chosen)
        self._totals.seconds += time.perf_counter() - started
        self.batch += 1
        return self._end_epoch() if self.batch == self.batches else None

    def _update_by_sums(self, chosen: Tensor) -> None:
        layer, sums = self.layer, None
        for part in chosen.split(self.chunk):
            z, residual = self._visit(part)
            new = filter_sums(z, residual, layer.filters, layer.g, boundary=layer.settings.boundary)
            sums = new if sums is None else sums + new
        # Each update lets 1 / (updates in `memory` epochs) of what came before fade.
        fade = max(0.0, 1 - 1 / max(self.settings.memory * self.batches, 1))
        self.sums = sums if self.sums is None or fade == 0 else self.sums * fade + sums
        layer.filters.copy_(
            update_filters(
                layer.filters,
                self.sums,
                layer.g,
                norm=self.settings.norm,
                iterations=self.settings.update_iterations,
            )
        )

    def _update_by_cg(self, chosen: Tensor) -> None:
        layer = self.layer
        z, _ = self._visit(chosen)
        layer.filters.copy_(
            update_filters_by_cg(
                layer.filters,
                z,
                self.b[chosen.to(self.b.device)],
                layer.g,
                norm=self.settings.norm,
                iterations=self.settings.update_iterations,
                boundary=layer.settings.boundary,
            )
        )

    def _visit(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Go on inferring the maps of some images; (z, residual)."""
        settings = self.layer.settings
        part = part.to(self.b.device)
        b = self.b[part]
        solution = solve(
            self.layer.operator(),
            b,
            lam=settings.lam,
            p=settings.p,
            settings=settings.solver,
            state=None if self.codes is None else self.codes[part],
            training=True,
        )
        if not torch.isfinite(solution.objective).all():
            raise Diverged(
                f"layer {self.number}, epoch {self.epoch + 1}: the objective is not finite; lower "
                f"model.layer{self.number}.lam ({settings.lam}) or solver.relaxation "
                f"({settings.solver.relaxation}), or look for extreme values in the images"
            )
        if self.codes is None:
            self.codes = b.new_zeros(len(self.b), *solution.state.shape[1:])
        self.codes[part] = solution.state
        self._totals.add(solution, b)
        energy = solution.z.double().square().sum((0, 2, 3))
        self.energy = energy if self.energy is None else self.energy + energy
        return solution.z, solution.residual

    def _end_epoch(self) -> EpochStats:
        dead, double = self._unused_filters()
        self.epoch, self.batch = self.epoch + 1, 0
        totals, self._totals = self._totals, _Totals()
        if self.settings.revive and not self.done:
            self._revive(sorted({*dead, *double}))
        early = 3 * self.epoch <= 2 * self.settings.epochs
        if self.settings.recenter and early and self.epoch % RECENTER_EVERY == 0:
            self._recenter()
        return totals.stats(self, dead=len(dead), double=len(double))

    def _unused_filters(self) -> tuple[list[int], list[int]]:
        """Filters that no map uses, and filters that repeat another that is used more."""
        energy, self.energy = self.energy, None
        dead = dead_filters(energy)
        double = double_filters(self.layer.filters, energy)
        return dead, [k for k in double if k not in dead]

    def _revive(self, filters: list[int]) -> None:
        """Start these filters anew, and forget what was known of their maps."""
        if not filters:
            return
        layer = self.layer
        settings = layer.settings
        fresh = random_filters(
            len(filters),
            self.b,
            settings.filter_size,
            self.settings.init,
            seeded(self.seed, self.number, 3, self.epoch),
        )
        f = layer.filters.clone()
        f[filters] = fresh
        layer.set_filters(f)
        self.codes[:, filters] = 0
        if self.sums is not None:
            self.sums = self.sums.without(filters)

    def _recenter(self) -> None:
        """Move filters to the middle of their frames, and their maps the other way."""
        layer = self.layer
        moves = off_center(layer.filters)
        f = layer.filters.clone()
        wrap = layer.settings.boundary == "circular"
        for k, (rows, columns) in moves.items():
            f[k] = shift(f[k], rows, columns)
            self.codes[:, k] = shift(self.codes[:, k], -rows, -columns, wrap=wrap)
        layer.set_filters(f)
        if self.sums is not None:
            self.sums = self.sums.without(list(moves))

    def state_dict(self) -> dict:
        """Everything beside the filters that `load_state_dict` needs to go on exactly from here."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "codes": None if self.codes is None else self.codes.cpu(),
            "energy": None if self.energy is None else self.energy.cpu(),
            "sums": None
            if self.sums is None
            else {"linear": self.sums.linear.cpu(), "gram": self.sums.gram.cpu()},
            "totals": asdict(self._totals),
        }

    def load_state_dict(self, state: dict) -> None:
        device = self.b.device
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.codes = None if state["codes"] is None else state["codes"].to(device)
        self.energy = None if state["energy"] is None else state["energy"].to(device)
        sums = state["sums"]
        self.sums = sums and FilterSums(sums["linear"].to(device), sums["gram"].to(device))
        self._totals = _Totals(**state["totals"])


@dataclass
class _Totals:
    """Sums over the images of an epoch, as they were visited."""

    images: int = 0
    entries: int = 0
    nonzero: int = 0
    reconstruction: float = 0.0
    sparsity: float = 0.0
    error: float = 0.0
    signal: float = 0.0
    seconds: float = 0.0

    def add(self, solution: Solution, b: Tensor) -> None:
        self.images += len(b)
        self.entries += solution.z.numel()
        self.nonzero += int(torch.count_nonzero(solution.z))
        self.reconstruction += float(solution.reconstruction.sum())
        self.sparsity += float(solution.sparsity.sum())
        self.error += float(solution.residual.double().square().sum())
        self.signal += float(b.double().square().sum())

    def stats(self, trainer: LayerTrainer, *, dead: int, double: int) -> EpochStats:
        ratio = self.signal / max(self.error, 1e-30)
        return EpochStats(
            layer=trainer.number,
            epoch=trainer.epoch,
            epochs=trainer.settings.epochs,
            reconstruction=self.reconstruction / self.images,
            sparsity=self.sparsity / self.images,
            snr=float(10 * torch.log10(torch.tensor(max(ratio, 1e-30)))),
            density=self.nonzero / self.entries,
            dead=dead,
            double=double,
            seconds_per_image=self.seconds / self.images,
        )


@dataclass(frozen=True)
class Learned:
    """Filters (K, C, h, w) that were learned from images, and what each epoch saw."""

    filters: Tensor
    history: list[EpochStats]


def learn_filters(
    images: Tensor,
    num_maps: int,
    filter_size: int,
    *,
    lam: float,
    p: float = 1.0,
    boundary: str = "valid",
    solver: SolverSettings | None = None,
    learning: LearningSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Learned:
    """Filters under which the images have sparse maps: one layer without network or run folder.

    images: (N, C, H, W), explained as they are: remove at least their mean. `sparse_code` then
    infers the maps of these or of other images.
    """
    if images.ndim != 4 or not torch.isfinite(images).all():
        raise ValueError(f"images must be finite and (N, C, H, W), got {tuple(images.shape)}")
    settings = LayerSettings(
        num_maps=num_maps,
        filter_size=filter_size,
        lam=lam,
        p=p,
        boundary=boundary,
        solver=solver or SolverSettings(),
        learning=learning or LearningSettings(),
    )
    layer = Layer(settings, images.shape[1], seeded(seed, 1)).to(images)
    trainer = LayerTrainer(layer, images, seed=seed)
    history = []
    with Monitor(progress=progress) as monitor:
        monitor.layer(1, 0, trainer.updates)
        while not trainer.done:
            stats = trainer.update()
            monitor.advance()
            if stats:
                history.append(stats)
                monitor.epoch(stats, step=len(history))
    return Learned(layer.filters, history)


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
