"""Convolutional dictionary learning without a network: images in, filters out, and `encode`.

learn_filters holds the images and their maps and goes through them epoch by epoch; learn_online
sees every batch once and forgets it, for more images than fit into memory. Both may begin with
given filters, and what they return can learn more, and be saved.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deconvnet.filters.care import centring_shifts, dead_filters, shift_filters
from deconvnet.filters.initial import initial_filters
from deconvnet.filters.statistics import FilterStatistics, filter_statistics
from deconvnet.filters.update import Diverged, LearningSettings, update_filters
from deconvnet.monitoring.monitor import Monitor
from deconvnet.monitoring.records import EpochStats
from deconvnet.network.layer import Layer, LayerProblem, LayerSettings
from deconvnet.network.metrics import decibels
from deconvnet.network.network import FILTERS
from deconvnet.operators.convolution import Boundary
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import (
    default_solver,
    lam_from_ratio,
    relative_schedule,
    sparse_code,
)
from deconvnet.storage.integrity import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.support.modes import plain
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.validation import (
    as_filters,
    as_images,
    as_number,
    check_settings,
    images_of_batch,
    positive,
    whole,
)
from deconvnet.training.layer_trainer import LayerTrainer

# Filters are moved to the middle of their frames first after this many batches of a stream, then
# each time the stream has grown by this factor: its length is unknown, and a filter that is moved
# loses the sums over its maps.
RECENTER_FIRST, RECENTER_GROWTH = 16, 1.5


@dataclass(frozen=True)
class Learned:
    """Filters (K, C, h, w) that were learned from images, what each epoch or batch saw, and the
    settings of the layer they belong to, with the lam that was used.
    """

    filters: Tensor
    history: list[EpochStats]
    settings: LayerSettings

    def __repr__(self) -> str:
        K, C, h, w = self.filters.shape
        last = f", objective {self.history[-1].objective:.6g}" if self.history else ""
        return (
            f"Learned({K} filters {C}x{h}x{w}, lam={self.settings.lam:.6g}, "
            f"{len(self.history)} in the history{last})"
        )

    def encode(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        settings: SolverSettings | None = None,
        chunk: int | None = None,
    ) -> Solution:
        """The sparse maps of any images (N, C, H, W), with the lam and the prior of the learning.

        mask, weights, settings, chunk: as in `sparse_code`.
        """
        layer = self.settings
        return sparse_code(
            images,
            self.filters,
            lam=layer.lam,
            **self._prior,
            mask=mask,
            weights=weights,
            settings=settings,
            chunk=chunk,
        )

    def learn_more(
        self,
        images: Tensor,
        *,
        solver: SolverSettings | None = None,
        learning: LearningSettings | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Learned:
        """`learn_filters` from these filters on, with their lam and prior, from the same images or
        others (N, C, H, W). The history covers both.

        solver, learning: by default the earlier ones, so as many epochs again. Maps and sums over
        images start from zero.
        """
        more = learn_filters(images, **self._asked(solver, learning, seed, progress))
        return dataclasses.replace(more, history=[*self.history, *more.history])

    def learn_more_online(
        self,
        batches: Iterable[Tensor],
        *,
        averaging_batches: float = 50.0,
        solver: SolverSettings | None = None,
        learning: LearningSettings | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Learned:
        """`learn_online` from these filters on, as `learn_more`, from batches of images."""
        asked = self._asked(solver, learning, seed, progress)
        more = learn_online(batches, averaging_batches=averaging_batches, **asked)
        return dataclasses.replace(more, history=[*self.history, *more.history])

    def save(self, path: str | Path) -> None:
        """Write filters, settings and history to a .safetensors file, safe to share and to load.

        It is a file for `Learned.load`: filters alone, without preprocessing, are no network.
        """
        history = [dataclasses.asdict(dataclasses.replace(of, loads=())) for of in self.history]
        settings = {
            "kind": FILTERS,
            "layer": dataclasses.asdict(self.settings),
            "history": history,
        }
        save_network(Path(path), {"filters": self.filters}, settings)

    @classmethod
    def load(cls, path: str | Path) -> Learned:
        """What `save` has written, on the CPU; else InvalidFileError, in one line."""
        tensors, settings = load_network(Path(path))
        if settings.get("kind") != FILTERS:
            raise InvalidFileError(
                f"{path}: holds no filters of Learned.save; a network is read by deconvnet.load"
            )
        try:
            filters, layer = (
                tensors["filters"],
                LayerSettings.from_dict(settings["layer"], f"{path}: layer"),
            )
            size = layer.filter_size
            if filters.ndim != 4 or filters.shape[::2] != (layer.num_maps, size):
                raise ValueError(f"filters of the shape {tuple(filters.shape)}")
            history = [EpochStats(**{**of, "loads": ()}) for of in settings["history"]]
        except Exception as error:  # settings of any type may go wrong anywhere
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidFileError(f"{path}: not filters of this version ({reason})") from None
        return cls(filters, history, layer)

    @property
    def _prior(self) -> dict[str, Any]:
        """What the maps have been asked for, by the names of arguments."""
        return {key: getattr(self.settings, key) for key in PRIOR}

    def _asked(
        self,
        solver: SolverSettings | None,
        learning: LearningSettings | None,
        seed: int,
        progress: bool,
    ) -> dict[str, Any]:
        """The arguments that continue what was learned before."""
        return dict(
            filters=self.filters,
            lam=self.settings.lam,
            **self._prior,
            solver=solver or self.settings.solver,
            learning=learning or self.settings.learning,
            seed=seed,
            progress=progress,
        )


@plain
def learn_filters(
    images: Tensor,
    num_maps: int | None = None,
    filter_size: int | None = None,
    *,
    filters: Tensor | None = None,
    lam: float | None = None,
    lam_ratio: float | None = None,
    p: float = 1.0,
    boundary: Boundary = "valid",
    group: int = 1,
    non_negative: bool = False,
    solver: SolverSettings | None = None,
    learning: LearningSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Learned:
    """Filters under which the images have sparse maps: one layer without network or run folder.

    images: (N, C, H, W) of float32 or float64, a tensor or a numpy array, explained as they are:
    remove at least their mean. filters: (K, C, h, h) to begin with, in place of num_maps and
    filter_size; they are given the norm and the signs that `learning` asks for, whose `init` then
    does not count. lam weighs the reconstruction; or lam_ratio, in (0, 1], relative to the lambda
    that leaves all maps zero under the initial filters (`lam_from_ratio`). group, non_negative: the
    prior of the maps; those of the filters are in `learning`. solver: by default what is fastest on
    the device. `encode` of the result infers the maps of these or of other images, `learn_more`
    continues learning. Raises Diverged where the objective is no longer finite.
    """
    images = _checked(images, "images")
    settings = _settings(
        num_maps,
        filter_size,
        filters=filters,
        lam=lam,
        lam_ratio=lam_ratio,
        p=p,
        boundary=boundary,
        group=group,
        non_negative=non_negative,
        solver=solver or default_solver(images, p),
        learning=learning,
    )
    layer = Layer(settings, images.shape[1], seeded_generator(seed, 1)).to(images)
    first = None if filters is None else _first(filters, layer)
    trainer = LayerTrainer(layer, images, seed=seed, filters=first)
    if lam_ratio is not None:
        _set_lam_from_ratio(layer, images, lam_ratio)
    history = []
    with Monitor(progress=progress) as monitor:
        monitor.layer(1, 0, trainer.updates)
        while not trainer.done:
            try:
                stats = trainer.update()
            except Diverged:
                raise _diverged(f"epoch {trainer.epoch + 1}", settings) from None
            monitor.advance()
            if stats:
                history.append(stats)
                monitor.epoch(stats, step=len(history))
    return Learned(layer.filters, history, settings)


@plain
def learn_online(
    batches: Iterable[Tensor],
    num_maps: int | None = None,
    filter_size: int | None = None,
    *,
    filters: Tensor | None = None,
    lam: float | None = None,
    lam_ratio: float | None = None,
    p: float = 1.0,
    boundary: Boundary = "valid",
    group: int = 1,
    non_negative: bool = False,
    averaging_batches: float = 50.0,
    solver: SolverSettings | None = None,
    learning: LearningSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Learned:
    """Filters from batches of images that are seen once, one after the other (Mairal et al. 2010).

    batches: of images (N, C, H, W), preprocessed as for `learn_filters`, whose other arguments
    these are. A batch may be a list or tuple of images and labels, as a DataLoader yields it: its
    first element counts. One without images is left out.

    Memory holds one batch and the sums over the batches before it; the sums are a mean over about
    the last `averaging_batches` batches. Of `learning`, these settings apply: init,
    update_iterations, norm, non_negative, zero_mean, reinit_unused (filters that the batches leave
    unused are replaced by patches of the last batch) and recenter (filters that have settled off
    centre are moved after 16, 24, 36, 54, ... batches). lam_ratio refers to the first batch. The
    history has one entry for each batch. Raises Diverged where the objective is no longer finite.
    """
    averaging_batches = as_number(averaging_batches, "averaging_batches")
    if not averaging_batches >= 1:
        raise ValueError(f"averaging_batches={averaging_batches:g}: must be at least 1 batch")
    asked = dict(
        filters=filters,
        lam=lam,
        lam_ratio=lam_ratio,
        p=p,
        boundary=boundary,
        group=group,
        non_negative=non_negative,
        learning=learning,
    )
    settings = _settings(num_maps, filter_size, solver=solver or SolverSettings(), **asked)
    stream, history = None, []
    with Monitor(progress=progress) as monitor:
        monitor.layer(1, 0, _length(batches))
        for number, batch in enumerate(_each(batches), 1):
            name = f"batch {number}"
            images = images_of_batch(batch, name)
            if images.numel() > 0:
                images = _checked(images, name)
                if stream is None:
                    settings.solver = solver or default_solver(images, p)
                    stream = _Stream(settings, images, filters, lam_ratio, seed, averaging_batches)
                history.append(stream.learn(images, name))
                monitor.epoch(history[-1], step=len(history))
            monitor.advance()
    if stream is None:
        raise ValueError("batches: there are none, or none has images")
    return Learned(stream.layer.filters, history, settings)


class _Stream:
    """A layer that learns from batches, and the sums over those that it has seen."""

    def __init__(
        self,
        settings: LayerSettings,
        images: Tensor,
        filters: Tensor | None,
        lam_ratio: float | None,
        seed: int,
        averaging_batches: float,
    ):
        self.settings, self.learning = settings, settings.learning
        self.seed, self.averaging_batches = seed, averaging_batches
        self.layer = Layer(settings, images.shape[1], seeded_generator(seed, 1)).to(images)
        self.sums: FilterStatistics | None = None
        self.count, self.next_look = 0, RECENTER_FIRST
        self._check(images, "batch 1")
        if filters is None:
            self.layer.initialize(images, seeded_generator(seed, 1, 1))
        else:
            self.layer.set_filters(_first(filters, self.layer))
        if lam_ratio is not None:
            _set_lam_from_ratio(self.layer, images, lam_ratio)

    def learn(self, images: Tensor, name: str) -> EpochStats:
        """Infer the maps of a batch, add it to the sums, and update the filters."""
        self._check(images, name)
        started = time.perf_counter()
        images = images.to(self.layer.filters)
        found = self.layer.infer(LayerProblem(images))
        if not torch.isfinite(found.objective).all():
            raise _diverged(name, self.settings)
        self.count += 1
        self._add(found, images)
        dead = dead_filters(self.sums.energy)
        self._update()
        if dead and self.learning.reinit_unused:
            self._reinitialize(dead, images)
        if self.learning.recenter and self.count == self.next_look:
            self._recenter()
            self.next_look = math.ceil(RECENTER_GROWTH * self.count)
        seconds = (time.perf_counter() - started) / len(images)
        return _stats(found, images, self.count, len(dead), seconds)

    def _check(self, images: Tensor, name: str) -> None:
        """Refuse a batch that the filters do not fit."""
        (H, W), size = images.shape[2:], self.settings.filter_size
        if min(H, W) < size:
            raise ValueError(
                f"{name}: images of {H}x{W} are smaller than the {size}x{size} filters"
            )
        channels = self.layer.filters.shape[1]
        if images.shape[1] != channels:
            raise ValueError(
                f"{name}: images of {images.shape[1]} channels, the first ones had {channels}"
            )

    def _add(self, found: Solution, images: Tensor) -> None:
        kept = 1 - 1 / min(self.count, self.averaging_batches)
        new = filter_statistics(
            found.z, found.residual, self.layer.filters, boundary=self.settings.boundary
        )
        new = new * (1 / len(images))
        self.sums = new if self.sums is None else self.sums * kept + new * (1 - kept)

    def _update(self) -> None:
        layer = self.layer
        iterations = self.learning.update_iterations
        layer.set_filters(
            update_filters(layer.filters, self.sums, layer.constraint, iterations=iterations)
        )

    def _reinitialize(self, dead: list[int], images: Tensor) -> None:
        """Replace unused filters by patches of these images."""
        f = self.layer.filters.clone()
        f[dead] = initial_filters(
            len(dead),
            images,
            self.settings.filter_size,
            self.learning.init,
            seeded_generator(self.seed, 1, 2, self.count),
            constraint=self.layer.constraint,
        )
        self.layer.set_filters(f)
        self.sums = self.sums.without(dead)

    def _recenter(self) -> None:
        """Shift filters to the middle of their frames, and drop the sums over their maps."""
        shifts = centring_shifts(self.layer.filters)
        if shifts:
            self.layer.set_filters(shift_filters(self.layer.filters, shifts))
            self.sums = self.sums.without(list(shifts))


# The keywords of the prior of the maps, and of the border.
PRIOR = ("p", "boundary", "group", "non_negative")


def _checked(images: Tensor, name: str) -> Tensor:
    images = as_images(images, name)
    if not torch.isfinite(images).all():
        raise ValueError(
            f"{name}: must be finite and (N, C, H, W), there are NaN or infinite values"
        )
    return images


def _settings(
    num_maps: int | None,
    filter_size: int | None,
    *,
    filters: Tensor | None,
    lam: float | None,
    lam_ratio: float | None,
    p: float,
    solver: SolverSettings,
    learning: LearningSettings | None,
    **layer: Any,
) -> LayerSettings:
    """The settings of the layer; with a lam_ratio its lam is still to be computed."""
    if (lam is None) == (lam_ratio is None):
        raise ValueError(f"lam={lam}, lam_ratio={lam_ratio}: give one of the two")
    check_settings(learning, LearningSettings, "learning")
    check_settings(solver, SolverSettings, "solver", optional=False)
    if filters is not None:
        num_maps, filter_size = _sizes(filters, num_maps, filter_size)
    elif num_maps is None or filter_size is None:
        raise ValueError(
            f"num_maps={num_maps}, filter_size={filter_size}: give both, or filters to begin with"
        )
    square = ", since filters are square"
    return LayerSettings(
        whole(num_maps, "num_maps"),
        whole(filter_size, "filter_size", square),
        lam=1.0 if lam is None else positive(lam, "lam"),
        p=as_number(p, "p"),
        solver=solver,
        learning=learning or LearningSettings(),
        **layer,
    )


def _sizes(filters: Tensor, num_maps: int | None, filter_size: int | None) -> tuple[int, int]:
    """(K, h) of filters (K, C, h, h), which must be what was asked for, if anything was."""
    shape = tuple(filters.shape) if hasattr(filters, "shape") else ()
    as_filters(filters, shape[1] if len(shape) == 4 else 1)
    K, _, h, w = shape
    if h != w:
        raise ValueError(f"filters of {h}x{w}: filters that are learned are square")
    for name, asked, found in (("num_maps", num_maps, K), ("filter_size", filter_size, h)):
        if asked is not None and whole(asked, name) != found:
            raise ValueError(f"{name}={asked}: the filters to begin with have {found}")
    return K, h


def _first(filters: Tensor, layer: Layer) -> Tensor:
    """Given filters as the layer takes them; there must be something left of each of them."""
    filters = as_filters(filters, layer.filters.shape[1]).to(layer.filters)
    if not torch.isfinite(filters).all():
        raise ValueError("filters must be finite: there are NaN or infinite values")
    constraint = layer.constraint
    empty = ~constraint.project(filters).flatten(1).any(1)
    if empty.any():
        keys = [key for key in ("non_negative", "zero_mean") if getattr(constraint, key)]
        why = f" with learning.{keys[0]}=True" if keys else ""
        raise ValueError(f"filters[{int(empty.nonzero()[0])}]: nothing of it is left{why}")
    return filters


def _set_lam_from_ratio(layer: Layer, images: Tensor, lam_ratio: float) -> None:
    """Set lam from its ratio under the current filters, and the schedule in its units."""
    A, settings = layer.operator(), layer.settings
    settings.lam = lam_from_ratio(A, images, lam_ratio, settings.prior)
    settings.solver = relative_schedule(settings.solver, A, settings.lam, lam_ratio)


def _diverged(where: str, settings: LayerSettings) -> Diverged:
    return Diverged(
        f"{where}: the objective is not finite; lower lam ({settings.lam:g}) or solver.relaxation "
        f"({settings.solver.relaxation:g}), or look for extreme values in the images"
    )


def _length(batches: Iterable[Tensor]) -> int:
    """How many batches there are, or 0 where that is not known."""
    try:
        return len(batches)
    except TypeError:
        return 0


def _each(batches: Iterable[Tensor]) -> Iterable[Tensor]:
    if isinstance(batches, (Tensor, np.ndarray)):
        raise ValueError(
            f"batches is one array of the shape {tuple(batches.shape)}: give several batches, such "
            "as images.split(8)"
        )
    try:
        return iter(batches)
    except TypeError:
        kind = type(batches).__name__
        raise ValueError(f"batches must be an iterable of images, got {kind}") from None


def _stats(found: Solution, b: Tensor, count: int, dead: int, seconds: float) -> EpochStats:
    error = float(found.residual.double().square().sum())
    return EpochStats(
        layer=1,
        epoch=count,
        epochs=count,
        reconstruction=float(found.reconstruction.mean()),
        sparsity=float(found.sparsity.mean()),
        snr=decibels(float(b.double().square().sum()), error),
        density=float(torch.count_nonzero(found.z)) / found.z.numel(),
        dead=dead,
        double=0,
        seconds_per_image=seconds,
    )
