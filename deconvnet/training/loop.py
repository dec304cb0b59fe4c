"""The training run: for each layer learn filters, infer maps, draw pictures and save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.monitoring.monitor import Monitor
from deconvnet.monitoring.statistics import EpochStats, LayerResult
from deconvnet.network.network import DeconvNet
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import OnDemand
from deconvnet.training.checkpoint import TrainingState, transferred_filters
from deconvnet.training.computed_lam import (
    choice_picture,
    restore_computed_lams,
    set_computed_lam,
)
from deconvnet.training.layer_costs import layer_costs
from deconvnet.training.layer_evaluation import LayerEvaluation, inference_curve
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.run_folder import RunFolder
from deconvnet.training.session import UNLIMITED, Limits, Session, stop_requests
from deconvnet.training.training_set import ImageSource, TrainingSet
from deconvnet.training.warm_start_placement import place_warm_starts
from deconvnet.visualization.drawing.canvas import as_curves, shade_signed
from deconvnet.visualization.evolution.evolution import append_epoch, load_if_valid
from deconvnet.visualization.evolution.while_learning import plan_snapshots, project_snapshot
from deconvnet.visualization.pictures.evolution_picture import evolution_cards, evolution_picture
from deconvnet.visualization.pictures.layer_pictures import (
    filter_cards,
    filter_picture,
    layer_cards,
    snapshot_features,
)
from deconvnet.visualization.projection.feature_projection import PixelFeatures, signed_filters

log = logging.getLogger(__name__)

# The number of images over which the curve of inference is averaged.
CURVE_IMAGES = 4
# An objective has risen if it exceeds that of the previous epoch by this factor. (Re-initialised
# or shifted filters also raise it slightly.)
RISE = 1.05


class Interrupted(Exception):
    """Training was asked to stop and has saved its state."""


@plain
def train(
    net: DeconvNet,
    images: Tensor | OnDemand | ImageSource,
    run: RunFolder | None = None,
    monitor: Monitor | None = None,
    *,
    frames: Tensor | None = None,
    seed: int = 0,
    limits: Limits = UNLIMITED,
    communicator: Communicator = SINGLE,
) -> list[LayerResult]:
    """Learn all layers of the network from images (N, 3, H, W) in [0, 1]; returns their results.

    Of a network for arrays, images are (N, C, H, W), such as an `ActivationSource`.

    run: where to save; a checkpoint is written after every epoch and network.safetensors at the
    end, and a run that was stopped resumes from its checkpoint. None: nothing is saved. monitor:
    shows progress; by default a progress bar, and a TensorBoard page in the run folder. frames:
    (N, 4), the frame of each picture in its image, or None if it fills it (`images.frames`).

    communicator: processes that share the work and end with the same network. Rank 0 writes; on the
    others run must be None.

    Raises Interrupted, after saving, when the process is asked to stop (Ctrl-C, SIGTERM).
    """
    if not isinstance(images, ImageSource):
        images = ImageSource.from_tensor(images, frames)
    if run:
        run.claim()
    checkpoint = communicator.broadcast(run and run.state)
    if checkpoint is not None:
        net.load_parts(checkpoint["network"]["tensors"])
        restore_computed_lams(net, checkpoint["network"]["settings"])
    initial = transferred_filters(net, communicator.broadcast(run and run.initial))
    state = TrainingState.from_checkpoint(checkpoint)
    if state.layer > net.depth:
        return _finished(net, state, run)
    if monitor is None:
        opened = Monitor(run and run.folder, progress=communicator.is_main)
    else:
        opened = nullcontext(monitor)
    with opened as monitor, stop_requests() as stop_requested:
        monitor.start(state.step, state.layer, net.depth)
        data = TrainingSet(
            *(net, images),
            communicator=communicator,
            chunk=limits.chunk,
            hold=limits.hold_codes,
            progress=_progress(monitor, stop_requested),
        )
        session = Session(net, data, run, monitor, limits, seed, stop_requested)
        if checkpoint is None:
            data.fit_preprocessing()
        size = data.read(torch.arange(1))[0].shape[2:]
        monitor.expect(layer_costs(net, size, len(data)))
        _train_layers(session, state, checkpoint and checkpoint["trainer"], initial)
    if run:
        net.save(run.network)
    return state.results


def _train_layers(
    session: Session, state: TrainingState, resumed: dict | None, initial: dict[int, Tensor]
) -> None:
    """Train all remaining layers. resumed: the trainer state of the first of them, if it has begun;
    initial: the filters that layers start from, by number.
    """
    run, net = session.run, session.net
    if run:
        run.remove_warm_starts(keep=state.layer)
    while state.layer <= net.depth:
        _train_layer(session, state, resumed, initial.get(state.layer))
        resumed = None
        state.layer += 1
        session.monitor.flush()
        state.save(session)
        if run:
            run.remove_warm_starts(keep=state.layer)


def _train_layer(
    session: Session, state: TrainingState, resumed: dict | None, initial: Tensor | None
) -> None:
    """Learn the filters of one layer, infer its maps for all images, and show both."""
    started = time.perf_counter()
    net, data, number = session.net, session.data, state.layer
    data.hold_codes(data.own_images(number), number - 1)
    if resumed is None and number > 1:
        net.layer(number).fit_scale(state.pooled or data.pooled_spread(number - 1))
    trainer = _layer_trainer(session, number, resumed, initial)
    if resumed is None:
        _compute_lam(session, state)
    try:
        _learn_filters(session, state, trainer)
    finally:
        trainer.close()
    evaluation = LayerEvaluation()
    for codes in data.infer_next_layer(number):
        evaluation.add(net, codes)
    evaluation = evaluation.reduced(session.communicator)
    state.pooled = evaluation.pooled
    state.results.append(evaluation.result(number, time.perf_counter() - started))
    _warn_of_dead_maps(session, state.results[-1])
    _show_layer(session, state)


def _layer_trainer(
    session: Session, number: int, resumed: dict | None, initial: Tensor | None
) -> LayerTrainer:
    net, data, communicator = session.net, session.data, session.communicator
    layer_data = data.layer_data(number)
    example = data.codes_of(data.sample_indices(1), number - 1)
    trainer = LayerTrainer(
        net.layer(number),
        layer_data,
        seed=session.seed,
        number=number,
        chunk=session.limits.chunk,
        snapshot_plan=plan_snapshots(net, example, number),
        communicator=communicator,
        placement=place_warm_starts(session, layer_data, number, resumed),
        filters=initial,
        state=resumed,
    )
    if communicator.world_size > 1 and communicator.is_main:
        log.info("layer %d: %s", number, trainer.traffic)
    return trainer


def _compute_lam(session: Session, state: TrainingState) -> None:
    """Compute the lam of a layer that begins, if its settings ask for that, and show the choice."""
    choice = set_computed_lam(session.data, state.layer, seed=session.seed)
    if choice and session.run:
        session.monitor.picture(f"layer{state.layer}/lam", choice_picture(choice), state.step)


def _learn_filters(session: Session, state: TrainingState, trainer: LayerTrainer) -> None:
    """Make all remaining filter updates of a layer."""
    monitor = session.monitor
    monitor.layer(trainer.number, trainer.updates_done, trainer.updates)
    previous_objective = math.inf
    while not trainer.done:
        stats = trainer.update(stop=session.stop_requested())
        state.step += 1
        monitor.advance()
        if stats:
            _show_epoch(session, state, trainer, stats, previous_objective)
            previous_objective = stats.objective
        # A single process can stop now; others learn of the request at the next update.
        stopping = trainer.stopping or (
            session.communicator.world_size == 1 and session.stop_requested()
        )
        if stats or stopping:
            monitor.flush()
            state.save(session, trainer)
        if stopping:
            raise Interrupted


def _show_epoch(
    session: Session,
    state: TrainingState,
    trainer: LayerTrainer,
    stats: EpochStats,
    previous_objective: float,
) -> None:
    """Show the statistics of an epoch and the filters after it."""
    session.monitor.epoch(stats, state.step)
    if trainer.sums is not None:
        session.monitor.map_energies(trainer.number, trainer.sums.energy, state.step)
    if stats.objective > RISE * previous_objective and session.communicator.is_main:
        log.warning(
            "layer %d, epoch %d: the objective has risen from %.4g to %.4g; if it keeps rising, "
            "use larger %s",
            *(trainer.number, stats.epoch, previous_objective, stats.objective),
            "learning.batch_size or learning.averaging_epochs"
            if trainer.sampler.batches > 1
            else "solver.training_iterations",
        )
    # After the last epoch, all pictures of the layer are shown.
    if trainer.number == 1 and session.run and not trainer.done:
        tiles = as_curves(shade_signed(signed_filters(session.net)))
        _show_filters(session, 1, tiles, state.step)
    if trainer.snapshot:
        # Save before the checkpoint, so that a run that resumes from it has this column.
        _show_snapshot(session, state, trainer)


def _show_snapshot(session: Session, state: TrainingState, trainer: LayerTrainer) -> None:
    """Append the features of the layer after this epoch to its file of features over epochs, and
    show those of an upper layer."""
    number, snapshot = trainer.number, trainer.snapshot
    images = snapshot.peaks.images.clamp(min=0).unique().cpu()
    codes = session.data.gather_codes(images, number - 1, pooled_only=True)
    if session.run is None:
        return
    column = project_snapshot(session.net, codes, number, snapshot, images)
    append_epoch(session.run.evolution(number), column)
    if number > 1 and not trainer.done:
        features = PixelFeatures(column.tiles[0], column.boxes[0], column.values[0])
        shown = snapshot_features(features, tuple(codes.y.shape[2:]))
        _show_filters(session, number, shown, state.step)


def _show_filters(session: Session, layer: int, tiles: Tensor, step: int) -> None:
    picture, cards = filter_picture(tiles), filter_cards(tiles)
    session.monitor.picture(f"layer{layer}/filters", picture, step, cards)


def _show_layer(session: Session, state: TrainingState) -> None:
    """Show the result, the curve of inference and the pictures of a finished layer."""
    net, monitor, number = session.net, session.monitor, state.layer
    images = session.data.shown
    codes = session.data.gather_codes(images, number)
    if session.run is None:
        return
    monitor.result(state.results[-1], codes.layer(number).values, state.step)
    problem = net.layer_problem(codes, number, slice(CURVE_IMAGES))
    monitor.inference(number, inference_curve(net.layer(number), problem))
    pixels, _, _ = session.data.read(images)
    pictures = layer_cards(net, codes, pixels, number)
    evolution = load_if_valid(session.run.evolution(number))
    if evolution:
        drawn = evolution_picture(evolution), evolution_cards(evolution)
        pictures[f"layer{number}/evolution"] = drawn
    for name, (picture, cards) in pictures.items():
        monitor.picture(name, picture, state.step, cards)


def _warn_of_dead_maps(session: Session, result: LayerResult) -> None:
    if result.dead and session.communicator.is_main:
        log.warning(
            "layer %d: %d of its %d maps are zero on all images (dead): use a smaller num_maps, or "
            "a larger lam",
            *(result.layer, result.dead, session.net.layer(result.layer).settings.num_maps),
        )


def _finished(net: DeconvNet, state: TrainingState, run: RunFolder | None) -> list[LayerResult]:
    """The results of a run whose layers are all trained."""
    log.info(
        "all %d layers are already trained; choose another name=... for another run, or more "
        "layers=... to learn more of this one",
        net.depth,
    )
    if run:
        _restore_network_file(net, run.network)
        if run.state["trainer"] is None:
            run.remove_warm_starts()
    return state.results[: net.depth]


def _restore_network_file(net: DeconvNet, path: Path) -> None:
    """Write the file of a finished network again if it is missing, damaged or different."""
    try:
        tensors, _ = load_network(path)
        same = all(torch.equal(tensors[name], value) for name, value in net.to_parts()[0].items())
    except (InvalidFileError, KeyError):
        same = False
    if not same:
        if path.exists():
            log.warning("%s is not the network that this run learned: it is written again", path)
        net.save(path)


def _progress(monitor: Monitor, stop_requested: Callable[[], bool]) -> Callable[[int, int], None]:
    """Progress of inference, which can be interrupted: the layer's filters have been saved."""

    def progress(done: int, total: int) -> None:
        monitor.inferred(done, total)
        if stop_requested():
            raise Interrupted

    return progress
