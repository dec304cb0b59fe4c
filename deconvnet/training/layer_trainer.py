"""Learning the filters of one layer: batch by batch, infer maps, sum statistics, update filters.

The position in the training is two integers, epoch and batch. The order of the images in an epoch
depends only on (seed, layer, epoch), so training that was stopped resumes exactly.

Several processes (ranks) can share the work. Each infers its own images of a batch; ranks exchange
only the sums over the batch, and every rank makes the same update to its copy of the filters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from deconvnet.filters.care import (
    centring_shifts,
    dead_filters,
    duplicate_filters,
    shift,
    shift_filters,
)
from deconvnet.filters.initial import draw_filters, random_patch_positions
from deconvnet.filters.sparse_statistics import SparseMaps
from deconvnet.filters.statistics import (
    FilterStatistics,
    filter_statistics,
    masked_statistics,
    sparse_maps,
)
from deconvnet.filters.update import (
    Batch,
    Diverged,
    LearningSettings,
    update_filters,
    update_filters_by_cg,
)
from deconvnet.monitoring.statistics import EpochStats
from deconvnet.monitoring.strongest_activations import Snapshot, SnapshotPlan
from deconvnet.network.layer import CONVOLUTION, Layer, check_input_size
from deconvnet.operators.linear import Identity, LinearOperator, Mask
from deconvnet.sparse_coding.problem import Solution
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain
from deconvnet.training.epoch_accumulator import EpochAccumulator
from deconvnet.training.layer_data import LayerData
from deconvnet.training.sampler import BatchSampler
from deconvnet.training.warm_starts import (
    IN_MEMORY,
    Placement,
    merge_state_dicts,
    open_warm_starts,
    pooling_window,
)

log = logging.getLogger(__name__)

RECENTER_EVERY = 4
# If every update sees all images, the objective falls unless inference stops too early. Rounding
# does not raise it by this fraction.
RISE = 1e-3
# Steps of Lanczos' method for ||T||^2: accurate to 5%, for the cost of two visits.
NORM_STEPS = 12
# Number of flags that ranks exchange with the sums: objective not finite, asked to stop.
FLAGS = 2
# The identifier, in checkpoints, of the order of images.
ORDER = "places"


class LayerTrainer:
    """Learns the filters of one layer; each call of `update` is one filter update.

    data: the training data; a tensor (N, C, H, W) is both the input and the target of the layer.
    snapshot_plan: the epochs after which a `snapshot` is taken, which is available until the next
    update. communicator: the processes that share the work; all of them must make the same calls.
    placement: whether and where the maps of each image are stored as warm starts for its next
    visit. filters: (K, C, h, w), the initial filters; None: drawn according to the settings. state:
    from `state_dict`, to resume; the filters of the layer are then not changed.
    """

    def __init__(
        self,
        layer: Layer,
        data: LayerData | Tensor,
        *,
        seed: int = 0,
        number: int = 1,
        chunk: int = 8,
        snapshot_plan: SnapshotPlan | None = None,
        communicator: Communicator = SINGLE,
        placement: Placement = IN_MEMORY,
        filters: Tensor | None = None,
        state: dict | None = None,
    ):
        if isinstance(data, Tensor):
            data = LayerData.from_tensor(data, lambda images, x=data: layer.problem(x[images]))
        self.data = data
        check_input_size(self.data.shape, layer, number)
        self.layer, self.seed, self.number, self.chunk = layer, seed, number, chunk
        self.snapshot_plan, self.communicator, self.keep = (
            snapshot_plan,
            communicator,
            placement.keep,
        )
        self.settings: LearningSettings = layer.settings.learning
        self.sampler = BatchSampler(
            self.data.num_images,
            self.settings.batch_size,
            (seed, number, 2),
            communicator.rank,
            communicator.world_size,
        )
        self.epoch, self.batch = 0, 0
        # Whether any rank was asked to stop before the last update.
        self.stopping = False
        own_images = self.sampler.own_images.to(self.data.device)
        self.warm_starts = open_warm_starts(own_images, pooling_window(layer.settings), placement)
        self.snapshot: Snapshot | None = None
        self.sums: FilterStatistics | None = None
        self._accumulator = EpochAccumulator()
        # Of the last epoch; infinite where the next may exceed it. A resumed run does not know.
        self._previous_objective, self._has_warned = math.inf, False
        if state is None:
            if filters is None:
                filters = self._draw_filters(
                    layer.settings.num_maps, seeded_generator(seed, number, 1)
                )
            layer.set_filters(filters.to(layer.filters))
        else:
            self.load_state_dict(state)

    @property
    def done(self) -> bool:
        return self.epoch >= self.settings.epochs

    @property
    def updates(self) -> int:
        """The number of filter updates in all epochs."""
        return self.settings.epochs * self.sampler.batches

    @property
    def updates_done(self) -> int:
        return self.epoch * self.sampler.batches + self.batch

    @property
    def message_bytes(self) -> int:
        """The size of the sums that ranks exchange, which does not depend on the images."""
        K, C, h, w = self.layer.atoms.shape
        if self.settings.update == "cg":
            return 8 * K * C * h * w
        return 8 * (FLAGS + K * C * h * w + K * K * (2 * h - 1) * (2 * w - 1))

    @property
    def traffic(self) -> str:
        """A description of the messages that ranks exchange for an update."""
        count = "one message"
        if self.settings.update == "cg":
            count = f"{1 + self.settings.update_iterations} messages"
        size = f"{self.message_bytes / 1e6:.2f} MB"
        return f"ranks exchange {count} of {size} per update, whatever the number of images"

    def close(self) -> None:
        """Close the files of warm starts. The trainer cannot be used afterwards."""
        self.warm_starts.close()

    @plain
    def update(self, *, stop: bool = False) -> EpochStats | None:
        """Infer the next batch and update the filters; returns statistics at the end of an epoch.

        stop: whether this rank was asked to stop; afterwards `stopping` is set on all ranks. Raises
        Diverged on all ranks, before the filters change, if any objective is not finite.
        """
        self.snapshot = None
        self._accumulator.clock.start()
        images = self.sampler.batch(self.epoch, self.batch).to(self.data.device)
        self._prefetch(images)
        if self.settings.update == "cg":
            self._update_by_cg(images, stop)
        else:
            self._update_by_sums(images, stop)
        self._accumulator.clock.end("update")
        self.batch += 1
        return self._end_epoch() if self.batch == self.sampler.batches else None

    def _prefetch(self, images: Tensor) -> None:
        """Announce the images of this batch and the next."""
        if self.data.prefetch is None:
            return
        last = self.batch + 1 == self.sampler.batches
        following = (self.epoch + 1, 0) if last else (self.epoch, self.batch + 1)
        self.data.prefetch(torch.cat([images.cpu(), self.sampler.batch(*following)]))

    def _update_by_sums(self, images: Tensor, stop: bool) -> None:
        """Update the filters with the running sums of statistics over batches."""
        layer, f, clock = self.layer, self.layer.filters, self._accumulator.clock
        sums, finite = FilterStatistics.zeros(layer.atoms), True
        for chunk in self._chunks(images):
            clock.end("sums")
            solution, T, maps = self._visit(chunk)
            clock.end("inference")
            if not torch.isfinite(solution.objective).all():
                finite = False
                continue
            sums += self._statistics(chunk, solution, T, maps)
        clock.end("sums")
        linear, gram, flags = self.communicator.all_reduce_sum(
            sums.linear, sums.gram, self._flags(finite, stop)
        )
        clock.end("exchange")
        self._check_flags(flags)
        sums = FilterStatistics(linear, gram)
        # Earlier sums decay by 1 / (updates in `averaging_epochs` epochs) per update.
        fade = max(0.0, 1 - 1 / max(self.settings.averaging_epochs * self.sampler.batches, 1))
        self.sums = sums if self.sums is None or fade == 0 else self.sums * fade + sums
        f.copy_(
            update_filters(
                *(f, self.sums.of_filters(f), layer.constraint),
                iterations=self.settings.update_iterations,
                # Elsewhere the search for the eigenvalue is small beside inference of dense maps.
                adaptive=layer.settings.solver.method == "coordinate",
            )
        )

    def _update_by_cg(self, images: Tensor, stop: bool) -> None:
        """Update the filters by conjugate gradients on the maps of this batch."""
        layer, clock, visited, finite = self.layer, self._accumulator.clock, [], True
        for chunk in self._chunks(images):
            solution, _, _ = self._visit(chunk)
            finite = finite and bool(torch.isfinite(solution.objective).all())
            # Maps that are stored pooled are unpooled again when they are needed.
            z = None if self.keep and self.warm_starts.window else solution.z
            visited.append((chunk, z, solution.residual))
        clock.end("inference")
        flags = self.communicator.all_reduce_sum(self._flags(finite, stop))
        clock.end("exchange")
        self._check_flags(*flags)

        def batches() -> Iterator[Batch]:
            for chunk, z, residual in visited:
                z = self.warm_starts[chunk] if z is None else z
                yield z, residual, self.data.problem(chunk).T

        layer.filters.copy_(
            update_filters_by_cg(
                layer.filters,
                batches,
                layer.constraint,
                iterations=self.settings.update_iterations,
                boundary=layer.settings.boundary,
                communicator=self.communicator,
            )
        )

    def _flags(self, finite: bool, stop: bool) -> Tensor:
        """The flags of this rank, (FLAGS,), which are summed over ranks."""
        flags = [float(not finite), float(stop)]
        return torch.tensor(flags, dtype=torch.float64, device=self.data.device)

    def _check_flags(self, flags: Tensor) -> None:
        """Handle the sum of all flags, in the same way on every rank."""
        not_finite, stop = flags.tolist()
        self.stopping = stop > 0
        if not_finite:
            settings = self.layer.settings
            raise Diverged(
                f"layer {self.number}, epoch {self.epoch + 1}: the objective is not finite; lower "
                f"model.layer{self.number}.lam ({settings.lam}) or solver.relaxation "
                f"({settings.solver.relaxation}), or look for extreme values in the images; the "
                "last checkpoint is from before"
            )

    def _visit(self, images: Tensor) -> tuple[Solution, LinearOperator, SparseMaps | None]:
        """Infer the maps of these images, starting from their last visit; also returns their T, and
        the non-zero coefficients if there are few.
        """
        problem = self.data.problem(images)
        solution = self.layer.infer(
            problem,
            settings=replace(self.layer.settings.solver, refit=False),
            state=self.warm_starts[images],
            step=self.warm_starts.scalar("step", images),
            training=self.keep,
        )
        if self.keep:
            self.warm_starts[images] = solution.state
            if solution.step is not None:
                self.warm_starts.set_scalar("step", images, solution.step)
        size = tuple(self.layer.atoms.shape[2:])
        maps = sparse_maps(solution.z, size, self.layer.settings.boundary)
        self._accumulator.add(solution, problem.b, maps)
        if self.snapshot_plan and self.epoch + 1 in self.snapshot_plan.epochs:
            self._accumulator.add_peaks(solution.z, images, self.snapshot_plan)
        return solution, problem.T, maps

    def _statistics(
        self, images: Tensor, solution: Solution, T: LinearOperator, maps: SparseMaps | None
    ) -> FilterStatistics:
        """The sums over these images, from their maps under the current filters."""
        layer, z, residual = self.layer, solution.z, solution.residual
        f, g, boundary = layer.atoms, layer.g, layer.settings.boundary
        if isinstance(T, Mask):
            return masked_statistics(z, residual, f, T, g, boundary=boundary)
        curvature = self._curvature(images, T)
        return filter_statistics(
            z, T.adjoint(residual), f, g, boundary=boundary, curvature=curvature, maps=maps
        )

    def _curvature(self, images: Tensor, T: LinearOperator) -> Tensor | None:
        """||T||^2 of these images, which is constant while this layer learns."""
        if isinstance(T, Identity):
            return None
        curvature = self.warm_starts.scalar("curvature", images)
        if curvature is None:
            curvature = 1.05 * T.squared_norm(self.data.problem(images).b, steps=NORM_STEPS)
            self.warm_starts.set_scalar("curvature", images, curvature)
        return curvature

    def _end_epoch(self) -> EpochStats:
        epoch = self._accumulator.reduced(self.communicator)
        self._accumulator = EpochAccumulator()
        dead = dead_filters(epoch.energy)
        duplicates = duplicate_filters(self.layer.atoms, epoch.energy)
        duplicates = [k for k in duplicates if k not in dead]
        self.epoch, self.batch = self.epoch + 1, 0
        stats = epoch.stats(
            layer=self.number,
            epoch=self.epoch,
            epochs=self.settings.epochs,
            dead=len(dead),
            double=len(duplicates),
        )
        self._watch_objective(stats)
        if epoch.peaks is not None:
            self.snapshot = Snapshot(self.epoch, epoch.peaks, self.layer.filters.clone())
        self.warm_starts.next_pass()
        if self.settings.reinit_unused and not self.done:
            self._reinitialize(sorted([*dead, *duplicates]))
        early = 3 * self.epoch <= 2 * self.settings.epochs
        # A filter of patches that is shifted explains other patches: maps would not make up for it.
        shifts = self.settings.recenter and self.layer.settings.coding == CONVOLUTION
        if shifts and early and self.epoch % RECENTER_EVERY == 0:
            self._recenter()
        self.warm_starts.next_pass()
        return stats

    def _watch_objective(self, stats: EpochStats) -> None:
        """Warn, once, if ADMM makes too few iterations: the objective rises although every update
        sees all images.

        With few iterations at a fixed beta its maps are sparser than at the minimum, and do not
        follow the filters that are learned from them.
        """
        settings, previous = self.layer.settings, self._previous_objective
        solver, self._previous_objective = settings.solver, stats.objective
        is_convex = settings.p == 1 and pooling_window(settings) is None
        if self.sampler.batches > 1 or solver.method != "admm" or not is_convex:
            return
        if stats.objective <= (1 + RISE) * previous or self._has_warned:
            return
        self._has_warned = True
        if not self.communicator.is_main:
            return
        log.warning(
            "layer %d, epoch %d: the objective has risen from %.4g to %.4g, because %d iterations "
            "of ADMM a visit are too few here: use solver.training_iterations=%d or more%s",
            *(self.number, stats.epoch, previous, stats.objective, solver.training_iterations),
            max(50, 2 * solver.training_iterations),
            ", or method coordinate" if self.data.device.type == "cpu" and self.number == 1 else "",
        )

    def _reinitialize(self, filters: list[int]) -> None:
        """Draw these filters again, and reset their maps and statistics."""
        if not filters:
            return
        layer, self._previous_objective = self.layer, math.inf
        generator = seeded_generator(self.seed, self.number, 3, self.epoch)
        f = layer.filters.clone()
        f[filters] = self._draw_filters(len(filters), generator)
        layer.set_filters(f)
        for images, state in self._states():
            state[:, filters] = 0
            self.warm_starts[images] = state
        if self.sums is not None:
            self.sums = self.sums.without(filters)

    def _recenter(self) -> None:
        """Shift off-centre filters to the middle of their frames, and their maps the other way."""
        layer = self.layer
        shifts = centring_shifts(layer.filters)
        if shifts:
            self._previous_objective = math.inf
        wrap = layer.settings.boundary == "circular"
        for images, state in self._states():
            for k, (rows, columns) in shifts.items():
                state[:, k] = shift(state[:, k], -rows, -columns, wrap=wrap)
            # With pooled states, several shifted values may share a window: the largest is kept.
            self.warm_starts[images] = state
        layer.set_filters(shift_filters(layer.filters, shifts))
        if self.sums is not None:
            self.sums = self.sums.without(list(shifts))

    def _draw_filters(self, num: int, generator: torch.Generator) -> Tensor:
        """`num` initial filters."""
        H, W = self.data.shape[1:]
        images, size = self.data.num_images, self.layer.settings.filter_shape

        def draw_patches(number: int) -> tuple[Tensor, Tensor | None]:
            return self._patches(random_patch_positions(number, images, (H, W), size, generator))

        return draw_filters(
            num,
            self.layer.filters,
            self.settings.init,
            draw_patches,
            generator,
            constraint=self.layer.constraint,
        )

    def _patches(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """(P, C, h, w): patches of the layer's input at positions (P, 3), image, row, column; and
        (P,), the fraction of each that is known, if not everything is.
        """
        h, w = self.layer.settings.filter_shape
        patches = self.layer.filters.new_zeros(len(positions), self.data.shape[0], h, w)
        known = patches.new_zeros(len(positions))
        drawn, own_images = positions[:, 0], self.warm_starts.images.cpu()
        for chunk in self._chunks(own_images[torch.isin(own_images, drawn)]):
            here = torch.isin(drawn, chunk)
            _, i, j = positions[here].unbind(1)
            place = (torch.searchsorted(chunk, drawn[here]), slice(None), i, j)
            chunk, here = chunk.to(self.data.device), here.to(self.data.device)
            windows = self.data.layer_input(chunk).unfold(2, h, 1).unfold(3, w, 1)
            patches[here] = windows[place]
            if self.data.seen is not None:
                seen = self.data.seen(chunk).to(known).unfold(2, h, 1).unfold(3, w, 1)
                known[here] = seen[place].mean((1, 2, 3))
        # Exact: all other ranks contribute zeros.
        if self.data.seen is None:
            return self.communicator.all_reduce_sum(patches)[0].to(patches.dtype), None
        patches_sum, known = self.communicator.all_reduce_sum(patches, known)
        return patches_sum.to(patches.dtype), known

    def _states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, warm starts) of the images of this rank, a chunk at a time."""
        for images in self._chunks(self.warm_starts.images):
            state = self.warm_starts[images]
            if state is not None:
                yield images, state

    def _chunks(self, images: Tensor) -> Iterator[Tensor]:
        return iter(images.split(self.chunk) if len(images) else ())

    def state_dict(self) -> dict | None:
        """The state, besides the filters, from which `load_state_dict` resumes exactly, with any
        number of ranks. It is gathered on rank 0; None on other ranks.
        """
        epoch = self._accumulator.reduced(self.communicator)
        parts = self.communicator.gather(self.warm_starts.state_dict())
        if parts is None:
            return None
        sums = self.sums and {"linear": self.sums.linear.cpu(), "gram": self.sums.gram.cpu()}
        return {
            "order": ORDER,
            "keep": self.keep,
            "epoch": self.epoch,
            "batch": self.batch,
            "codes": merge_state_dicts(parts),
            "sums": sums,
            "seen": epoch.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        if state.get("order") != ORDER:
            raise ValueError(
                "this checkpoint was written in the middle of a layer by a version of deconvnet "
                "that visits images in another order: resume with that version, or start again "
                "(resume=false)"
            )
        device = self.data.device
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.warm_starts.load_state_dict(state["codes"], device)
        sums = state["sums"]
        self.sums = sums and FilterStatistics(sums["linear"].to(device), sums["gram"].to(device))
        # The saved sums are over all ranks and must be counted only once.
        if self.communicator.is_main:
            self._accumulator = EpochAccumulator.from_state_dict(state["seen"], device)
        else:
            self._accumulator = EpochAccumulator()
