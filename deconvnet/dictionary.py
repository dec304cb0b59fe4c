"""Convolutional dictionary learning without a network: images in, filters out, and `encode`.

learn_filters holds the images and their maps and goes through them epoch by epoch; learn_online
sees every batch once and forgets it, for more images than fit into memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deconvnet.convolution import Boundary
from deconvnet.learning import (
    LearningSettings,
    dead_filters,
    filter_sums,
    patches_of,
    update_filters,
)
from deconvnet.monitor import EpochStats, Monitor, decibels
from deconvnet.network import Layer, LayerSettings, Target, seeded
from deconvnet.solvers import (
    Solution,
    SolverSettings,
    default_solver,
    lam_of_share,
    relative_schedule,
    sparse_code,
)
from deconvnet.trainer import LayerTrainer


@dataclass(frozen=True)
class Learned:
    """Filters (K, C, h, w) that were learned from images, what each epoch or batch saw, and the
    settings of the layer they belong to, with the lam that was used.
    """

    filters: Tensor
    history: list[EpochStats]
    settings: LayerSettings

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
            p=layer.p,
            boundary=layer.boundary,
            group=layer.group,
            non_negative=layer.non_negative,
            mask=mask,
            weights=weights,
            settings=settings,
            chunk=chunk,
        )


def learn_filters(
    images: Tensor,
    num_maps: int,
    filter_size: int,
    *,
    lam: float | None = None,
    share: float | None = None,
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

    images: (N, C, H, W), explained as they are: remove at least their mean. lam weighs the
    reconstruction; or share, in (0, 1], of what leaves all maps zero under the filters that the
    learning starts from (`lam_of_share`). group, non_negative: the prior of the maps; those of the
    filters are in `learning`. solver: by default what is fastest on the device. `encode` of what
    is returned infers the maps of these or of other images.
    """
    if images.ndim != 4 or not torch.isfinite(images).all():
        raise ValueError(f"images must be finite and (N, C, H, W), got {tuple(images.shape)}")
    settings = _settings(
        lam,
        share,
        num_maps=num_maps,
        filter_size=filter_size,
        p=p,
        boundary=boundary,
        group=group,
        non_negative=non_negative,
        solver=solver or default_solver(images, p),
        learning=learning or LearningSettings(),
    )
    layer = Layer(settings, images.shape[1], seeded(seed, 1)).to(images)
    trainer = LayerTrainer(layer, images, seed=seed)
    if share is not None:
        _take_share(layer, images, share)
    history = []
    with Monitor(progress=progress) as monitor:
        monitor.layer(1, 0, trainer.updates)
        while not trainer.done:
            stats = trainer.update()
            monitor.advance()
            if stats:
                history.append(stats)
                monitor.epoch(stats, step=len(history))
    return Learned(layer.filters, history, settings)


@torch.no_grad()
def learn_online(
    batches: Iterable[Tensor],
    num_maps: int,
    filter_size: int,
    *,
    lam: float | None = None,
    share: float | None = None,
    p: float = 1.0,
    boundary: Boundary = "valid",
    group: int = 1,
    non_negative: bool = False,
    memory: float = 50.0,
    solver: SolverSettings | None = None,
    learning: LearningSettings | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Learned:
    """Filters from batches of images that are seen once, one after the other (Mairal et al. 2010).

    batches: of images (N, C, H, W), preprocessed as for `learn_filters`, whose other arguments
    these are. Only one batch and the sums over those before are in memory; the sums are a mean over
    about the last `memory` batches. Of `learning` counts what concerns one update: init,
    update_iterations, norm, non_negative, zero_mean, revive (filters that the batches leave unused
    start anew as patches of the last). A share is that of the first batch. The history has one
    entry for each batch.
    """
    if not memory >= 1:
        raise ValueError(f"memory={memory}: must be at least 1 batch")
    learning = learning or LearningSettings()
    settings = _settings(
        lam,
        share,
        num_maps=num_maps,
        filter_size=filter_size,
        p=p,
        boundary=boundary,
        group=group,
        non_negative=non_negative,
        solver=solver or SolverSettings(),
        learning=learning,
    )
    layer, sums, history = None, None, []
    with Monitor(progress=progress) as monitor:
        monitor.layer(1, 0, len(batches) if hasattr(batches, "__len__") else 0)
        for count, images in enumerate(batches, 1):
            if images.ndim != 4 or not torch.isfinite(images).all():
                shape = tuple(images.shape)
                raise ValueError(f"batch {count}: must be finite and (N, C, H, W), got {shape}")
            if layer is None:
                settings.solver = solver or default_solver(images, p)
                layer = Layer(settings, images.shape[1], seeded(seed, 1)).to(images)
                layer.initialize(images, seeded(seed, 1, 1))
                if share is not None:
                    _take_share(layer, images, share)
            started = time.perf_counter()
            found = layer.infer(Target(images))
            f, kept = layer.filters, 1 - 1 / min(count, memory)
            new = filter_sums(found.z, found.residual, f, boundary=boundary)
            new = new * (1 / len(images))
            sums = new if sums is None else sums * kept + new * (1 - kept)
            dead = dead_filters(sums.energy)
            layer.set_filters(
                update_filters(
                    f,
                    sums,
                    norm=learning.norm,
                    iterations=learning.update_iterations,
                    non_negative=learning.non_negative,
                    zero_mean=learning.zero_mean,
                )
            )
            if dead and learning.revive:
                f = layer.filters.clone()
                shuffle = seeded(seed, 1, 2, count)
                draw = patches_of(images, layer.settings.filter_size, shuffle)
                f[dead] = layer.fresh_filters(len(dead), draw, shuffle)
                layer.set_filters(f)
                sums = sums.without(dead)
            seconds = (time.perf_counter() - started) / len(images)
            history.append(_stats(found, images, count, len(dead), seconds))
            monitor.advance()
            monitor.epoch(history[-1], step=count)
    if layer is None:
        raise ValueError("batches: there are none")
    return Learned(layer.filters, history, settings)


def _settings(lam: float | None, share: float | None, **layer: Any) -> LayerSettings:
    """Those of the layer; with a share its lam is yet to be found."""
    if (lam is None) == (share is None):
        raise ValueError(f"lam={lam}, share={share}: give one of the two")
    return LayerSettings(lam=1.0 if lam is None else lam, **layer)


def _take_share(layer: Layer, images: Tensor, share: float) -> None:
    """Set lam to a share under the filters as they are now, and what counts in its units."""
    A, settings = layer.operator(), layer.settings
    prior = dict(p=settings.p, group=settings.group, non_negative=settings.non_negative)
    settings.lam = lam_of_share(A, images, share, **prior)
    settings.solver = relative_schedule(settings.solver, A, settings.lam, share)


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
