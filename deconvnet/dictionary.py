"""Convolutional dictionary learning without a network: learn filters from images, encode images.

`learn_filters` keeps the images and their maps in memory and visits them epoch by epoch;
`learn_online` uses every batch once, for more images than fit into memory. Both may start from
given filters. Their result encodes images, learns more, and can be saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deconvnet.filters.update import Diverged, LearningSettings
from deconvnet.images.holes import fill_holes
from deconvnet.monitoring.monitor import Monitor
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.network.layer import Layer, LayerSettings
from deconvnet.network.network import FILTERS
from deconvnet.operators.convolution import Boundary
from deconvnet.operators.linear import Mask
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import check_one_weight, default_solver, sparse_code
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.support.renaming import renamed_arguments
from deconvnet.support.scaling import magnitude
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import (
    FilterSize,
    OnDemand,
    as_filter_size,
    as_filters,
    as_images,
    as_number,
    as_positive_integer,
    as_positive_number,
    as_tensor,
    check_settings,
    images_of_batch,
)
from deconvnet.training.layer_data import LayerData
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.online_trainer import OnlineTrainer
from deconvnet.training.warm_starts import Placement, warm_starts_size

# Of images that are read on demand: how many determine lam, and the bytes that the maps of all of
# them may take to be kept between visits.
RATIO_IMAGES, WARM_STARTS = 64, 2**32


@dataclass(frozen=True)
class Learned:
    """Filters learned from images, with the settings to encode images and to learn more.

    filters: (K, C, h, w). history: the statistics of each epoch (`learn_filters`) or of each batch
    (`learn_online`). settings: those of the layer, with the lam that was used.
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

        mask, weights, settings, chunk: as in `sparse_code`; the solver of the learning is not used.
        As there, the maps have a gradient if one of the arguments requires it. Raises
        ValueError if an argument is out of range or does not fit the filters.
        """
        layer = self.settings
        return sparse_code(
            images,
            self.filters,
            lam=layer.lam,
            p=layer.p,
            boundary=layer.boundary,
            group=layer.group,
            non_negative=layer.non_negative,
            mask=mask,
            weights=weights,
            settings=settings,
            chunk=chunk,
        )

    def learn_more(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        solver: SolverSettings | None = None,
        learning: LearningSettings | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Learned:
        """`learn_filters` continued from these filters, with the same lam and prior.

        images: (N, C, H, W), the same as before or others. mask: as in `learn_filters`. solver,
        learning: by default those of the learning so far, with the same number of epochs. Maps and
        sums over images start from zero. The history covers both.
        """
        settings = self._settings_with(solver, learning)
        more = _learn_epochs(
            images,
            mask,
            settings,
            self.filters,
            solver=settings.solver,
            seed=seed,
            progress=progress,
        )
        return dataclasses.replace(more, history=[*self.history, *more.history])

    @renamed_arguments(memory="averaging_batches")
    def learn_more_online(
        self,
        batches: Iterable[Tensor],
        *,
        mask: Tensor | bool | None = None,
        averaging_batches: float = 50.0,
        solver: SolverSettings | None = None,
        learning: LearningSettings | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Learned:
        """`learn_online` continued from these filters, with the same lam and prior.

        batches, mask, averaging_batches: as in `learn_online`. solver, learning: as in
        `learn_more`. The history covers both.
        """
        settings = self._settings_with(solver, learning)
        more = _learn_batches(
            batches,
            mask,
            settings,
            self.filters,
            solver=settings.solver,
            averaging_batches=averaging_batches,
            seed=seed,
            progress=progress,
        )
        return dataclasses.replace(more, history=[*self.history, *more.history])

    def save(self, path: str | Path) -> None:
        """Write filters, settings and history to a .safetensors file, safe to share and to load.

        `Learned.load` reads it. It is not a network file, since filters have no preprocessing.
        """
        history = [dataclasses.asdict(dataclasses.replace(e, loads=())) for e in self.history]
        settings = {
            "kind": FILTERS,
            "layer": dataclasses.asdict(self.settings),
            "history": history,
        }
        save_network(Path(path), {"filters": self.filters}, settings)

    @classmethod
    def load(cls, path: str | Path) -> Learned:
        """The filters, settings and history of a file of `save`, on the CPU.

        Raises InvalidFileError, in one line, for any other file.
        """
        tensors, settings = load_network(Path(path))
        if settings.get("kind") != FILTERS:
            raise InvalidFileError(
                f"{path}: holds no filters of Learned.save; a network is read by deconvnet.load"
            )
        try:
            filters = tensors["filters"]
            layer = LayerSettings.from_dict(settings["layer"], f"{path}: layer")
            shape = (layer.num_maps, *layer.filter_shape)
            if filters.ndim != 4 or (len(filters), *filters.shape[2:]) != shape:
                raise ValueError(f"filters of the shape {tuple(filters.shape)}")
            history = [EpochStats(**{**epoch, "loads": ()}) for epoch in settings["history"]]
        except Exception as error:  # invalid settings may fail anywhere
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidFileError(f"{path}: not filters of this version ({reason})") from None
        return cls(filters, history, layer)

    def _settings_with(
        self, solver: SolverSettings | None, learning: LearningSettings | None
    ) -> LayerSettings:
        check_settings(solver, SolverSettings, "solver")
        check_settings(learning, LearningSettings, "learning")
        return dataclasses.replace(
            self.settings,
            solver=solver or self.settings.solver,
            learning=learning or self.settings.learning,
        )


@renamed_arguments(share="lam_ratio")
def learn_filters(
    images: Tensor,
    num_maps: int | None = None,
    filter_size: FilterSize | None = None,
    *,
    filters: Tensor | None = None,
    lam: float | None = None,
    lam_ratio: float | None = None,
    lam_max_quantile: float = 1.0,
    p: float = 1.0,
    boundary: Boundary = "valid",
    group: int = 1,
    non_negative: bool = False,
    mask: Tensor | None = None,
    solver: SolverSettings | None = None,
    learning: LearningSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Learned:
    """Learn filters for which the images have sparse maps: one layer, without a network.

        minimise over z, f    lam/2 ||sum_k f_k * z_k - y||^2 + prior(z),    every f_k of unit norm

    images: (N, C, H, W) of float32 or float64, a tensor or a numpy array; or an `ActivationSource`,
    which is read batch by batch. They are not preprocessed: subtract at least their mean (of
    activations, with `standardized`). num_maps, filter_size: learn this many filters of
    this size in pixels, one side for squares or (rows, columns); or filters: (K, C, h, w) to start
    from, projected onto the constraint of `learning`, whose `init` is then ignored. Signals are
    images of one row, (N, C, 1, T), with filters of (1, length).

    lam: weight of the reconstruction, larger is denser; or lam_ratio, in (0, 1]: lambda = 1/lam
    relative to the smallest lambda that leaves all maps zero under the initial filters, or with
    lam_max_quantile below 1 to this quantile over the images (`lam_from_ratio`; of an
    `ActivationSource`, over 64 of them). p, group,
    non_negative: the prior of the maps, and boundary: as in `sparse_code`. mask: (N or 1, C or 1,
    H, W), >= 0, weights the errors as in `sparse_code`; pixels where it is 0 are ignored and may
    have any value. solver: by default `default_solver`, the fastest on the device. learning:
    epochs, batches and the constraint on filters. seed: for the initial filters and the order of
    the images. progress: show a progress bar.

    Raises ValueError if an argument is out of range or does not fit the others, and Diverged if
    the objective becomes infinite or NaN.
    """
    settings = _layer_settings(
        num_maps,
        filter_size,
        filters,
        lam=lam,
        lam_ratio=lam_ratio,
        lam_max_quantile=lam_max_quantile,
        p=p,
        boundary=boundary,
        group=group,
        non_negative=non_negative,
        solver=solver,
        learning=learning,
    )
    return _learn_epochs(
        images,
        mask,
        settings,
        filters,
        solver=solver,
        seed=seed,
        progress=progress,
    )


@renamed_arguments(share="lam_ratio", memory="averaging_batches")
def learn_online(
    batches: Iterable[Tensor],
    num_maps: int | None = None,
    filter_size: FilterSize | None = None,
    *,
    filters: Tensor | None = None,
    lam: float | None = None,
    lam_ratio: float | None = None,
    lam_max_quantile: float = 1.0,
    p: float = 1.0,
    boundary: Boundary = "valid",
    group: int = 1,
    non_negative: bool = False,
    mask: Tensor | bool | None = None,
    averaging_batches: float = 50.0,
    solver: SolverSettings | None = None,
    learning: LearningSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Learned:
    """Learn filters from batches of images that are each used once (Mairal et al. 2010).

    batches: any iterable of images (N, C, H, W), preprocessed as for `learn_filters`; N, H and W
    may differ. A batch may be a list or tuple of images and labels, as a DataLoader yields it; the
    labels are ignored. Empty batches are skipped. mask: one for all images, (1, C or 1, H, W), >=
    0; or True: every batch is a list or tuple of images and their mask, (N or 1, C or 1, H, W). All
    other arguments are those of `learn_filters`, except that lam_ratio refers to the first batch
    and that there are no epochs.

    Memory holds one batch and the sums over earlier batches. averaging_batches: each update uses
    the mean over about this many of the last batches, at least 1. Of `learning`, these settings
    apply: init, update_iterations, norm, non_negative, zero_mean, reinit_unused (filters that no
    batch has used are replaced by patches of the last one) and recenter (filters that have settled
    off centre are shifted after 16, 24, 36, 54, ... batches). The history has one entry per batch.

    Raises ValueError and Diverged as `learn_filters` does.
    """
    settings = _layer_settings(
        num_maps,
        filter_size,
        filters,
        lam=lam,
        lam_ratio=lam_ratio,
        lam_max_quantile=lam_max_quantile,
        p=p,
        boundary=boundary,
        group=group,
        non_negative=non_negative,
        solver=solver,
        learning=learning,
    )
    return _learn_batches(
        batches,
        mask,
        settings,
        filters,
        solver=solver,
        averaging_batches=averaging_batches,
        seed=seed,
        progress=progress,
    )


@plain
def _learn_epochs(
    images: Tensor,
    mask: Tensor | None,
    settings: LayerSettings,
    filters: Tensor | None,
    *,
    solver: SolverSettings | None,
    seed: int,
    progress: bool,
) -> Learned:
    data, some, M = _layer_data(images, mask)
    settings.solver = solver or default_solver(some, settings.p)
    layer = Layer(settings, some.shape[1], seeded_generator(seed, 1)).to(some)
    initial = None if filters is None else _initial_filters(filters, layer)
    keep = not isinstance(images, OnDemand) or warm_starts_size(layer, data) <= WARM_STARTS
    trainer = LayerTrainer(layer, data, seed=seed, filters=initial, placement=Placement(keep))
    _compute_lam(layer, some, M)
    history = []
    with Monitor(progress=progress) as monitor:
        monitor.layer(1, 0, trainer.updates)
        while not trainer.done:
            try:
                stats = trainer.update()
            except Diverged:
                raise _diverged(f"epoch {trainer.epoch + 1}", layer.settings) from None
            monitor.advance()
            if stats:
                history.append(stats)
                monitor.epoch(stats, step=len(history))
    return Learned(layer.filters, history, layer.settings)


def _layer_data(
    images: Tensor | OnDemand, mask: Tensor | None
) -> tuple[LayerData, Tensor, Mask | None]:
    """The training data, the images that determine lam (all, or some if they are read on demand),
    and the mask.
    """
    if isinstance(images, OnDemand):
        if mask is not None:
            raise ValueError("mask: needs images in a tensor or a numpy array")
        some = torch.linspace(0, images.shape[0] - 1, min(RATIO_IMAGES, images.shape[0]))
        return LayerData.from_images(images), images.read(some.round().long()), None
    images, M = _checked(images, mask, "images")
    if M is None:
        return LayerData.from_tensor(images), images, None
    if not M.mask.any():
        raise ValueError("mask: must not be 0 everywhere, since then no pixel is seen")
    return LayerData.from_masked(images, M), images, M


@plain
def _learn_batches(
    batches: Iterable[Tensor],
    mask: Tensor | bool | None,
    settings: LayerSettings,
    filters: Tensor | None,
    *,
    solver: SolverSettings | None,
    averaging_batches: float,
    seed: int,
    progress: bool,
) -> Learned:
    averaging_batches = as_number(averaging_batches, "averaging_batches")
    if not averaging_batches >= 1:
        raise ValueError(f"averaging_batches={averaging_batches:g}: must be at least 1 batch")
    trainer, history = None, []
    with Monitor(progress=progress) as monitor:
        monitor.layer(1, 0, _length(batches))
        for number, batch in enumerate(_iterate(batches), 1):
            name = f"batch {number}"
            images, batch_mask = _images_and_mask(batch, mask, name)
            monitor.advance()
            if images.numel() == 0:
                continue
            images, M = _checked(images, batch_mask, name)
            if M is not None and not M.mask.any():
                continue
            if trainer is None:
                settings.solver = solver or default_solver(images, settings.p)
                layer = _started_layer(settings, images, M, filters, seed)
                trainer = OnlineTrainer(layer, averaging_batches=averaging_batches, seed=seed)
            _check_fit(images, layer, name)
            try:
                history.append(trainer.update(images, M))
            except Diverged:
                raise _diverged(name, layer.settings) from None
            monitor.epoch(history[-1], step=len(history))
    if trainer is None:
        raise ValueError("batches: there are none, or all of them are empty or hidden by masks")
    return Learned(layer.filters, history, layer.settings)


def _started_layer(
    settings: LayerSettings,
    images: Tensor,
    M: Mask | None,
    filters: Tensor | None,
    seed: int,
) -> Layer:
    """A layer with its initial filters and lam, for a stream that begins with these images."""
    layer = Layer(settings, images.shape[1], seeded_generator(seed, 1)).to(images)
    _check_fit(images, layer, "batch 1")
    if filters is not None:
        layer.set_filters(_initial_filters(filters, layer))
    elif M is None:
        layer.initialize(images, seeded_generator(seed, 1, 1))
    else:
        filled = fill_holes(images, M.mask)
        layer.initialize(filled, seeded_generator(seed, 1, 1), M.mask > 0)
    _compute_lam(layer, images, M)
    return layer


def _layer_settings(
    num_maps: int | None,
    filter_size: FilterSize | None,
    filters: Tensor | None,
    *,
    lam: float | None,
    lam_ratio: float | None,
    lam_max_quantile: float,
    p: float,
    boundary: Boundary,
    group: int,
    non_negative: bool,
    solver: SolverSettings | None,
    learning: LearningSettings | None,
) -> LayerSettings:
    """The settings of the layer, except those that depend on the images.

    That is the lam of a lam_ratio, and the default solver.
    """
    check_one_weight(lam, lam_ratio, lam_max_quantile)
    check_settings(learning, LearningSettings, "learning")
    check_settings(solver, SolverSettings, "solver")
    if filters is not None:
        num_maps, filter_size = _sizes_of(filters, num_maps, filter_size)
    elif num_maps is None or filter_size is None:
        raise ValueError(
            f"num_maps={num_maps}, filter_size={filter_size}: give both, or filters to start from"
        )
    return LayerSettings(
        as_positive_integer(num_maps, "num_maps"),
        as_filter_size(filter_size),
        lam=None if lam is None else as_positive_number(lam, "lam"),
        lam_ratio=lam_ratio,
        lam_max_quantile=lam_max_quantile,
        p=as_number(p, "p"),
        boundary=boundary,
        group=group,
        non_negative=non_negative,
        solver=solver or SolverSettings(),
        learning=learning or LearningSettings(),
    )


def _sizes_of(
    filters: Tensor, num_maps: int | None, filter_size: FilterSize | None
) -> tuple[int, tuple[int, int]]:
    """K and (h, w) of filters (K, C, h, w); num_maps and filter_size must agree if given."""
    shape = tuple(filters.shape) if hasattr(filters, "shape") else ()
    as_filters(filters, shape[1] if len(shape) == 4 else 1)
    K, _, h, w = shape
    if num_maps is not None and as_positive_integer(num_maps, "num_maps") != K:
        raise ValueError(f"num_maps={num_maps}: the filters to start from have {K}")
    if filter_size is not None and as_filter_size(filter_size) != (h, w):
        actual = h if h == w else (h, w)
        raise ValueError(f"filter_size={filter_size}: the filters to start from have {actual}")
    return K, (h, w)


def _initial_filters(filters: Tensor, layer: Layer) -> Tensor:
    """Filters to start from, in the dtype and on the device of the layer.

    Raises ValueError if they are not finite, or if the constraint reduces one of them to zero.
    """
    filters = as_filters(filters, layer.filters.shape[1]).to(layer.filters)
    if not torch.isfinite(filters).all():
        raise ValueError("filters must be finite: there are NaN or infinite values")
    constraint = layer.constraint
    empty = ~constraint.project(filters).flatten(1).any(1)
    if empty.any():
        keys = [key for key in ("non_negative", "zero_mean") if getattr(constraint, key)]
        why = f"nothing is left of it under learning.{keys[0]}=True" if keys else "must not be zero"
        raise ValueError(f"filters[{int(empty.nonzero()[0])}]: {why}")
    return filters


def _compute_lam(layer: Layer, images: Tensor, M: Mask | None) -> None:
    """Set lam from its ratio, if there is one, for the current filters."""
    if layer.settings.lam_ratio is not None:
        A, b = layer.operator(), images
        if M is not None:
            A, b = M @ A, M.target(images)
        layer.settings = layer.settings.with_lam_of_ratio(A, b)


def _check_fit(images: Tensor, layer: Layer, name: str) -> None:
    """Raise ValueError for a batch that the filters do not fit."""
    (H, W), (h, w) = images.shape[2:], layer.settings.filter_shape
    if h > H or w > W:
        raise ValueError(f"{name}: images of {H}x{W} are smaller than the {h}x{w} filters")
    channels = layer.filters.shape[1]
    if images.shape[1] != channels:
        raise ValueError(
            f"{name}: images of {images.shape[1]} channels, but the first ones had {channels}"
        )


def _images_and_mask(
    batch: Any, mask: Tensor | bool | None, name: str
) -> tuple[Tensor, Tensor | None]:
    """The images of a batch, and their mask: from the batch if mask is True, else the given one."""
    if mask is not True:
        return images_of_batch(batch, name), None if mask is False else mask
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        raise ValueError(
            f"{name} is a {type(batch).__name__}: with mask=True it must be a list or tuple of "
            "images and their mask"
        )
    return as_tensor(batch[0], name), batch[1]


def _checked(images: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Mask | None]:
    """The images, finite wherever they are seen, and their mask."""
    images = as_images(images, name)
    try:
        M = None if mask is None else Mask(mask, images)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not math.isfinite(magnitude(images if M is None else M.target(images))):
        where = " where the mask is not 0" if M is not None else ""
        use = ": give a mask that is 0 there" if M is None else ""
        raise ValueError(
            f"{name}: must be finite, but there are NaN or infinite values{where}{use}"
        )
    return images, M


def _diverged(where: str, settings: LayerSettings) -> Diverged:
    return Diverged(
        f"{where}: the objective is not finite; lower lam ({settings.lam:g}) or solver.relaxation "
        f"({settings.solver.relaxation:g}), or look for extreme values in the images"
    )


def _length(batches: Iterable[Any]) -> int:
    """The number of batches, or 0 if it is unknown."""
    try:
        return len(batches)
    except TypeError:
        return 0


def _iterate(batches: Iterable[Any]) -> Iterator[Any]:
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
