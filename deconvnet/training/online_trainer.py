"""Online learning of one layer: infer a batch, add it to the running sums, update the filters.

images b (N, C, H, W)   maps z   filters f (K, C, h, w)
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from deconvnet.filters.care import centring_shifts, dead_filters, shift_filters
from deconvnet.filters.initial import initial_filters
from deconvnet.filters.statistics import FilterStatistics, filter_statistics, masked_statistics
from deconvnet.filters.update import Diverged, update_filters
from deconvnet.images.holes import fill_holes
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.network.layer import Layer, LayerProblem
from deconvnet.network.metrics import decibels
from deconvnet.operators.linear import Mask
from deconvnet.sparse_coding.problem import Solution
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain

# Filters are recentred first after this many batches, then each time the stream has grown by this
# factor: its length is unknown, and a shifted filter loses the sums over its maps.
RECENTER_FIRST, RECENTER_GROWTH = 16, 1.5


class OnlineTrainer:
    """Learns the filters of one layer from batches that are each used once (Mairal et al. 2010).

    layer: with the filters to start from. averaging_batches, at least 1: with S_t the sums over
    batch t divided by its number of images, the filters are updated with

        sums_t = (1 - a_t) sums_(t-1) + a_t S_t,    a_t = 1 / min(t, averaging_batches)

    the mean of up to that many batches, then a mean in which earlier batches decay. Only these sums
    are stored, no batch.
    """

    def __init__(self, layer: Layer, *, averaging_batches: float = 50.0, seed: int = 0):
        self.layer, self.averaging_batches, self.seed = layer, averaging_batches, seed
        self.learning = layer.settings.learning
        self.sums: FilterStatistics | None = None
        self.batches, self._next_recenter = 0, RECENTER_FIRST

    @plain
    def update(self, images: Tensor, mask: Mask | None = None) -> EpochStats:
        """Learn from one batch of images (N, C, H, W) and return the statistics of its inference.

        mask: for these images, on the device and in the dtype of the layer. Raises Diverged, before
        the update, if an objective is not finite.
        """
        started = time.perf_counter()
        images = images.to(self.layer.filters)
        problem = LayerProblem(images) if mask is None else LayerProblem(mask.target(images), mask)
        solver = replace(self.layer.settings.solver, refit=False)
        solution = self.layer.infer(problem, settings=solver)
        if not torch.isfinite(solution.objective).all():
            raise Diverged("the objective is not finite")
        self.batches += 1
        self._add(solution, mask)
        dead = dead_filters(self.sums.energy)
        self._update_filters()
        if dead and self.learning.reinit_unused:
            self._reinitialize(dead, images, mask)
        if self.learning.recenter and self.batches == self._next_recenter:
            self._recenter()
            self._next_recenter = math.ceil(RECENTER_GROWTH * self.batches)
        seconds = (time.perf_counter() - started) / len(images)
        return self._stats(solution, problem.b, dead=len(dead), seconds_per_image=seconds)

    def _add(self, solution: Solution, mask: Mask | None) -> None:
        z, residual, f = solution.z, solution.residual, self.layer.filters
        boundary = self.layer.settings.boundary
        if mask is None:
            new = filter_statistics(z, residual, f, boundary=boundary)
        else:
            new = masked_statistics(z, residual, f, mask, boundary=boundary)
        new = new * (1 / len(z))
        fade = 1 - 1 / min(self.batches, self.averaging_batches)
        self.sums = new if self.sums is None else self.sums * fade + new * (1 - fade)

    def _update_filters(self) -> None:
        layer = self.layer
        layer.set_filters(
            update_filters(
                *(layer.filters, self.sums, layer.constraint),
                iterations=self.learning.update_iterations,
                adaptive=layer.settings.solver.method == "coordinate",
            )
        )

    def _reinitialize(self, dead: list[int], images: Tensor, mask: Mask | None) -> None:
        """Replace unused filters by initial ones, such as patches of these images."""
        f, seen = self.layer.filters.clone(), None
        if mask is not None:
            images, seen = fill_holes(images, mask.mask), mask.mask > 0
        f[dead] = initial_filters(
            len(dead),
            images,
            self.layer.settings.filter_shape,
            self.learning.init,
            seeded_generator(self.seed, 1, 2, self.batches),
            seen=seen,
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

    def _stats(
        self, solution: Solution, b: Tensor, *, dead: int, seconds_per_image: float
    ) -> EpochStats:
        signal = float(b.double().square().sum())
        error = float(solution.residual.double().square().sum())
        return EpochStats(
            layer=1,
            epoch=self.batches,
            epochs=self.batches,
            reconstruction=float(solution.reconstruction.mean()),
            sparsity=float(solution.sparsity.mean()),
            snr=decibels(signal, error),
            density=float(torch.count_nonzero(solution.z)) / solution.z.numel(),
            dead=dead,
            double=0,
            seconds_per_image=seconds_per_image,
        )
