"""A training run: layer by layer, learn -> infer -> show -> save, and go on where it stopped."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.images.preprocessing import Spread
from deconvnet.monitoring.monitor import Monitor
from deconvnet.monitoring.records import InferencePoint, LayerResult, decibels
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet, Layer, LayerProblem
from deconvnet.sparse_coding.problem import data_term
from deconvnet.storage.integrity import InvalidFileError
from deconvnet.storage.network_files import load_network
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.modes import plain
from deconvnet.training.layer_trainer import LayerData, LayerTrainer, warm_starts_size
from deconvnet.training.run_folder import RunFolder
from deconvnet.training.training_set import ImageSource, TrainingSet
from deconvnet.training.warm_starts import DiskWarmStarts
from deconvnet.visualization.evolution.evolution import append_epoch, load_if_valid
from deconvnet.visualization.evolution.snapshots import plan_snapshots, project_snapshot
from deconvnet.visualization.pictures.evolution_picture import evolution_picture
from deconvnet.visualization.pictures.layer_pictures import filter_picture, layer_pictures

log = logging.getLogger(__name__)

# How many images the curve of inference is drawn for.
CURVE_IMAGES = 4
# And how many images the other pictures choose from.
SHOWN_IMAGES = 256
# An objective that is so many times that of the epoch before has risen. (Filters that are started
# anew or moved cost a little, too.)
RISE = 1.05


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


@plain
def train(
    net: DeconvNet,
    images: Tensor | ImageSource,
    run: RunFolder | None,
    monitor: Monitor,
    *,
    frames: Tensor | None = None,
    seed: int = 0,
    chunk: int = 8,
    communicator: Communicator = SINGLE,
    hold: bool = True,
    memory: float = math.inf,
    disk: float = 0.0,
) -> list[LayerResult]:
    """Learn all layers of the network from images (N, 3, H, W) in [0, 1]; what each layer reached.

    frames: (N, 4), the place of each picture in its square, or None where they fill it.
    Goes on from the state of the run, saves after every epoch, leaves <run>/network.safetensors.
    Raises Interrupted, having saved, when the process is asked to stop (Ctrl-C, SIGTERM).

    ranks: processes that share the work and end with the same network; the first one writes, and
    for the others run is None and the monitor has no folder. hold: whether what finished layers
    found in the images is held in memory, or found again at every visit. memory: GiB that the
    states of inference of all images may take, in all ranks together; disk: GiB that they may take
    in the run folder where that is too little. Where they would take more, every visit infers from
    the beginning.
    """
    images = ImageSource.from_tensor(images, frames) if isinstance(images, Tensor) else images
    if run:
        run.claim()
    state = communicator.broadcast(run and run.state)
    if state is not None:
        net.load_parts(state["network"]["tensors"])
    initial = _initial_filters(net, communicator.broadcast(run and run.initial))
    position = TrainingState.of(state)
    if position.layer > net.depth:
        log.info(
            "all %d layers were trained before; for another run choose another name=..., to learn "
            "more of this one more layers=...",
            net.depth,
        )
        if run:
            _save_again(net, run.network)
        if run and state["trainer"] is None:
            run.remove_warm_starts()
        return position.results[: net.depth]
    monitor.start(position.step, position.layer)
    with _stop_requests() as stop_requested:

        def watch(done: int, total: int) -> None:
            monitor.inferred(done, total)
            if stop_requested():
                raise Interrupted

        training_set = TrainingSet(
            net, images, communicator=communicator, chunk=chunk, hold=hold, progress=watch
        )
        if state is None:
            training_set.fit_preprocessing()
        resumed = state and state["trainer"]
        if run:
            run.remove_warm_starts(keep=position.layer)
        while position.layer <= net.depth:
            _train_layer(
                *(net, training_set, position, run, monitor, stop_requested, seed, (memory, disk)),
                *(resumed, initial.get(position.layer)),
            )
            resumed = None
            position.layer += 1
            monitor.flush()
            position.save(run, net)
            if run:
                run.remove_warm_starts(keep=position.layer)
    if run:
        net.save(run.network)
    return position.results


def _train_layer(
    net: DeconvNet,
    training_set: TrainingSet,
    position: TrainingState,
    run: RunFolder | None,
    monitor: Monitor,
    stop_requested: Callable[[], bool],
    seed: int,
    room: tuple[float, float],
    resumed: dict | None,
    initial: Tensor | None,
) -> None:
    """Learn one layer, infer its maps of all images, and show them."""
    started = time.perf_counter()
    number, layer = position.layer, net.layer(position.layer)
    training_set.hold_codes(training_set.own_images(number), number - 1)
    if resumed is None and number > 1:
        layer.fit_scale(position.pooled or training_set.pooled_spread(number - 1))
    data = training_set.layer_data(number)
    keep, folder = _place_for_states(
        layer, data, training_set.communicator, run, number, *room, resumed
    )
    trainer = LayerTrainer(
        layer,
        data,
        seed=seed,
        number=number,
        chunk=training_set.chunk,
        watch=plan_snapshots(
            net, training_set.codes_of(training_set.sample_indices(1), number - 1), number
        ),
        communicator=training_set.communicator,
        keep=keep,
        folder=folder,
        token=training_set.communicator.broadcast(run and run.token) or "",
        filters=initial,
        state=resumed,
    )
    if training_set.communicator.world_size > 1 and training_set.communicator.is_main:
        log.info("layer %d: %s", number, trainer.traffic)
    try:
        _learn(net, training_set, trainer, position, run, monitor, stop_requested)
    finally:
        trainer.close()
    tally = LayerEvaluation()
    for codes in training_set.infer_next_layer(number):
        tally.add(net, codes)
    tally = tally.shared(training_set.communicator)
    position.pooled = tally.pooled
    result = tally.result(number, time.perf_counter() - started)
    position.results.append(result)
    if result.dead and training_set.communicator.is_main:
        log.warning(
            "layer %d: %d of its %d maps are zero on all images (dead): fewer num_maps, or a "
            "larger lam",
            *(number, result.dead, layer.settings.num_maps),
        )
    _show(net, training_set, position, run, monitor)


def _initial_filters(net: DeconvNet, parts: tuple[dict, dict] | None) -> dict[int, Tensor]:
    """The filters that layers start from, by their numbers, of a network given by its parts."""
    if parts is None:
        return {}
    start = DeconvNet.from_parts(*parts)
    found = {}
    for number in range(1, min(net.depth, start.depth) + 1):
        own, filters = net.layer(number).filters, start.layer(number).filters
        if own.shape != filters.shape:
            here, there = ("x".join(map(str, f.shape)) for f in (own, filters))
            raise ValueError(
                f"layer {number} is to start from filters of {there} (maps, channels, rows, "
                f"columns), but has filters of {here}: use the same num_maps, filter_size and "
                "colours, and layers=... for fewer layers"
            )
        found[number] = filters
    return found


def _save_again(net: DeconvNet, path: Path) -> None:
    """Write the file of a finished network unless it is there, whole and the same."""
    try:
        tensors, _ = load_network(path)
        same = all(torch.equal(tensors[name], value) for name, value in net.to_parts()[0].items())
    except (InvalidFileError, KeyError):
        same = False
    if not same:
        if path.exists():
            log.warning("%s was not what this run has learned: it is written again", path)
        net.save(path)


def _place_for_states(
    layer: Layer,
    data: LayerData,
    communicator: Communicator,
    run: RunFolder | None,
    number: int,
    memory: float,
    disk: float,
    resumed: dict | None,
) -> tuple[bool, Path | None]:
    """Whether states of inference are kept, and in which folder, None being memory.

    While a layer learns this does not change: with states or without, it learns something else.
    """
    needed = warm_starts_size(layer, data) / 2**30
    on_disk = DiskWarmStarts.NUM_FILES * needed
    root = communicator.broadcast(run and str(run.states))
    folder = root and Path(root) / f"layer{number}"
    kept, there = _states_of(resumed)
    if kept is not False and not there and needed <= memory:
        return True, None
    if folder and (there or (kept is not False and on_disk <= disk)):
        where = f"they are in {folder}, {on_disk:.3g} GiB at most"
    elif kept:
        raise ValueError(
            f"memory={memory:g}, disk={disk:g}: layer {number} learns with the states of inference "
            f"of {data.images} images; resume with memory={1.01 * needed:.3g} or "
            f"disk={1.01 * on_disk:.3g} (GiB)"
        )
    else:
        folder, where = None, "every visit infers from the beginning"
    if communicator.is_main:
        log.info(
            "layer %d: the states of inference of %d images would take %.3g GiB%s: %s",
            *(number, data.images, needed),
            *(f", which is more than memory={memory:g}" if needed > memory else "", where),
        )
        if folder:
            _check_room(folder, on_disk)
    return folder is not None, folder


def _states_of(resumed: dict | None) -> tuple[bool | None, bool]:
    """Whether a layer that is resumed keeps states, None if that is open, and whether they are on
    disk.
    """
    if resumed is None:
        return None, False
    codes = resumed["codes"]
    # Runs of a time before it was written down: they have states if they have any.
    kept = resumed.get("keep", codes["shape"] is not None or None)
    return kept, "now" in codes


def _check_room(folder: Path, needed: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # What the files occupy, which have holes.
    there = sum(512 * path.stat().st_blocks for path in folder.iterdir())
    free = (shutil.disk_usage(folder).free + there) / 2**30
    if needed > free:
        raise ValueError(
            f"disk: {folder} needs up to {needed:.3g} GiB and has {free:.3g}; make room, or "
            "begin a run with disk=0, or on another disk"
        )


@dataclass
class TrainingState:
    """Where a run is, beside the filters: layer being learned, filter updates so far, results, and
    how large the pooled maps below are.
    """

    layer: int
    step: int
    results: list[LayerResult]
    pooled: Spread | None = None

    @classmethod
    def of(cls, state: dict | None) -> TrainingState:
        """That of a saved state, or the beginning."""
        if state is None:
            return cls(1, 0, [])
        try:
            results = [LayerResult(**result) for result in state["results"]]
            pooled = state.get("pooled")
            return cls(state["layer"], state["step"], results, pooled and Spread(**pooled))
        except TypeError as error:
            raise InvalidFileError(
                f"the checkpoint is no state of a run of this version ({error}); resume from "
                "another one"
            ) from None

    def save(
        self, run: RunFolder | None, net: DeconvNet, trainer: LayerTrainer | None = None
    ) -> None:
        """Write it down, of all ranks, by the first."""
        learning = trainer and trainer.state_dict()
        if run is None:
            return
        # A layer whose training has not begun is no part of what was learned.
        tensors, settings = net.to_parts(self.layer if trainer else self.layer - 1)
        state = {
            "network": {"tensors": tensors, "settings": settings},
            "layer": self.layer,
            "step": self.step,
            "results": [asdict(result) for result in self.results],
            "pooled": self.pooled and asdict(self.pooled),
            "trainer": learning,
        }
        run.save(self.step, state)


@dataclass
class LayerEvaluation:
    """What the maps of a finished layer are like, summed over images.

    active: (K,) entries of every map that are not zero; pooled: of what the next layer stands on.
    """

    images: int = 0
    objective: float = 0.0
    entries: int = 0
    nonzero: int = 0
    pixels: int = 0
    values: float = 0.0
    squares: float = 0.0
    error: float = 0.0
    active: Tensor | None = None
    pooled: Spread = field(default_factory=Spread)

    def add(self, net: DeconvNet, codes: Codes) -> None:
        found = codes.layers[-1]
        z, y = found.z, codes.y.double()
        self.images += len(y)
        self.objective += float(found.objective.sum())
        self.entries += z.numel()
        self.nonzero += int(torch.count_nonzero(z))
        self.pixels += y.numel()
        self.values += float(y.sum())
        self.squares += float(y.square().sum())
        self.error += float((y - net.synthesize(codes, len(codes.layers))).square().sum())
        active = (z != 0).sum((0, 2, 3)).cpu()
        self.active = active if self.active is None else self.active + active
        self.pooled.add(found.pooled)

    def shared(self, communicator: Communicator) -> LayerEvaluation:
        """Over the images of all ranks."""
        pooled = self.pooled.shared(communicator)
        parts = [part for part in communicator.all_gather(self) if part.images]
        summed = [key for key in vars(self) if key != "pooled"]
        return LayerEvaluation(
            **{key: sum(getattr(part, key) for part in parts) for key in summed}, pooled=pooled
        )

    def result(self, number: int, seconds: float) -> LayerResult:
        signal = self.squares - self.values**2 / self.pixels
        return LayerResult(
            layer=number,
            objective=self.objective / self.images,
            snr=decibels(signal, self.error),
            density=self.nonzero / self.entries,
            dead=int((self.active == 0).sum()),
            seconds=seconds,
        )


def _learn(
    net: DeconvNet,
    training_set: TrainingSet,
    trainer: LayerTrainer,
    position: TrainingState,
    run: RunFolder | None,
    monitor: Monitor,
    stop_requested: Callable[[], bool],
) -> None:
    """All the filter updates of a layer that are left."""
    monitor.layer(trainer.number, trainer.updates_done, trainer.updates)
    before = math.inf
    while not trainer.done:
        stats = trainer.update(stop=stop_requested())
        position.step += 1
        monitor.advance()
        if stats:
            monitor.epoch(stats, position.step)
            if stats.objective > RISE * before and training_set.communicator.is_main:
                log.warning(
                    "layer %d, epoch %d: the objective has risen from %.4g to %.4g; if it goes on, "
                    "use larger learning.batch_size or learning.averaging_epochs",
                    *(trainer.number, stats.epoch, before, stats.objective),
                )
            before = stats.objective
            if trainer.number == 1 and run:
                monitor.picture("layer1/filters", filter_picture(net), position.step)
            if trainer.snapshot:
                # Before the checkpoint: a run that goes on from it has these columns.
                _show_snapshot(net, training_set, trainer, run)
        # Alone there is no need to ask the others.
        stopping = trainer.stopping or (
            training_set.communicator.world_size == 1 and stop_requested()
        )
        if stats or stopping:
            monitor.flush()
            position.save(run, net, trainer)
        if stopping:
            raise Interrupted


def _show_snapshot(
    net: DeconvNet, training_set: TrainingSet, trainer: LayerTrainer, run: RunFolder | None
) -> None:
    """Add what the maps look like after this epoch to the file of the layer."""
    number, images = trainer.number, trainer.snapshot.peaks.images.clamp(min=0).unique().cpu()
    codes = training_set.gather_codes(images, number - 1)
    if run:
        column = project_snapshot(net, codes, number, trainer.snapshot, images)
        append_epoch(run.evolution(number), column)


def _show(
    net: DeconvNet,
    training_set: TrainingSet,
    position: TrainingState,
    run: RunFolder | None,
    monitor: Monitor,
) -> None:
    """Everything that a finished layer has to show, of some of the images if they are many."""
    number, some = position.layer, training_set.sample_indices(SHOWN_IMAGES)
    codes = training_set.gather_codes(some, number)
    if run is None:
        return
    monitor.result(position.results[-1], codes.layer(number).values, position.step)
    problem = net.layer_problem(codes, number, slice(CURVE_IMAGES))
    monitor.inference(number, _inference_curve(net.layer(number), problem))
    pixels, _ = training_set.images.read(some)
    pictures = layer_pictures(net, codes, pixels.to(net.device), number)
    learned = load_if_valid(run.evolution(number))
    if learned:
        pictures[f"layer{number}/evolution"] = evolution_picture(learned)
    for name, picture in pictures.items():
        monitor.picture(name, picture, position.step)


def _inference_curve(layer: Layer, problem: LayerProblem) -> list[InferencePoint]:
    """How the objective falls while the maps of some images are inferred, beta beside it."""
    A, settings = problem.T @ layer.operator(), layer.settings
    curve = []

    def watch(iteration: int, z: Tensor, beta: Tensor) -> None:
        cost = data_term(problem.b - A(z), settings.lam) + settings.prior.value(z)
        density = float(torch.count_nonzero(z)) / z.numel()
        curve.append(InferencePoint(iteration, float(cost.mean()), float(beta.mean()), density))

    layer.infer(problem, settings=replace(settings.solver, tolerance=0.0), callback=watch)
    return curve


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
