"""The learning of one layer: batch by batch, infer -> sums -> update, with care for its filters.

The position is two integers, epoch and batch; the images of an epoch come in an order made from
(seed, layer, epoch), so that a layer whose learning was stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from deconvnet.codes import Codes
from deconvnet.learning import (
    Batch,
    FilterSums,
    LearningSettings,
    dead_filters,
    double_filters,
    filter_sums,
    off_center,
    shift,
    update_filters,
    update_filters_by_cg,
)
from deconvnet.monitor import EpochStats
from deconvnet.network import DeconvNet, Layer, Target, check_size, seeded
from deconvnet.operators import Identity, Operator
from deconvnet.pooling import Window, max_pool, unpool
from deconvnet.solvers import Solution
from deconvnet.visualization.evolution import Peaks, Snapshot, Watch

RECENTER_EVERY = 4
# Steps of Lanczos' method for ||T||^2: within 5% of it, at the price of two visits.
NORM_STEPS = 12


class Diverged(RuntimeError):
    """The objective is no longer finite; the filters are those of before."""


class States:
    """The state of inference of every image, so that each visit starts where the last one ended.

    As maps; with a window as pooled maps and switches, which is all that such a state is and takes
    a ninth of the memory.
    """

    def __init__(self, images: int, window: Window | None = None):
        self.images, self.window = images, window
        self.shape: tuple[int, ...] | None = None
        self.kept: list[Tensor] = []
        self.steps: Tensor | None = None

    def __getitem__(self, part: Tensor) -> Tensor | None:
        if self.shape is None:
            return None
        kept = [tensor[part] for tensor in self.kept]
        return kept[0] if self.window is None else unpool(*kept, (len(part), *self.shape))

    def __setitem__(self, part: Tensor, state: Tensor) -> None:
        new = (state,) if self.window is None else max_pool(state, self.window)
        if self.shape is None:
            self.shape = tuple(state.shape[1:])
            self.kept = [tensor.new_zeros(self.images, *tensor.shape[1:]) for tensor in new]
            if self.window is not None:
                # No two switches of an image may be the same.
                self.kept[1][:] = new[1][:1]
        for tensor, values in zip(self.kept, new, strict=True):
            tensor[part] = values

    def step(self, part: Tensor) -> Tensor | None:
        """The gradient steps (N, 1, 1, 1) that served these images, if all had one."""
        steps = None if self.steps is None else self.steps[part]
        return None if steps is None or steps.isnan().any() else steps

    def set_step(self, part: Tensor, steps: Tensor) -> None:
        if self.steps is None:
            self.steps = steps.new_full((self.images, 1, 1, 1), math.nan)
        self.steps[part] = steps

    def state_dict(self) -> dict:
        steps = None if self.steps is None else self.steps.cpu()
        return {"shape": self.shape, "kept": [t.cpu() for t in self.kept], "steps": steps}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.shape = state["shape"]
        self.kept = [tensor.to(device) for tensor in state["kept"]]
        self.steps = None if state["steps"] is None else state["steps"].to(device)


class LayerTrainer:
    """Learns the filters of one layer on what it has to explain.

    below: (N, C, H, W), what the layer stands on (`DeconvNet.below`). target: what the images of
    some indices are to be explained as; by default what is below. watch: the epochs at whose end
    there is a `snapshot`, until the next one begins.

    Holds the state of inference of every image, the energy of every map in this epoch, and the
    running sums of the filter update. One call of `update` is one filter update. Without a `state`
    from `state_dict` the filters start as the settings say; with it they stay.
    """

    def __init__(
        self,
        layer: Layer,
        below: Tensor,
        target: Callable[[Tensor], Target] | None = None,
        *,
        seed: int = 0,
        number: int = 1,
        chunk: int = 8,
        watch: Watch | None = None,
        state: dict | None = None,
    ):
        check_size(below, layer, number)
        self.layer, self.below = layer, below
        self.target = target or (lambda images: Target(below[images]))
        self.seed, self.number, self.chunk, self.watch = seed, number, chunk, watch
        self.settings: LearningSettings = layer.settings.learning
        self.epoch, self.batch = 0, 0
        pooled = layer.settings.solver.method in ("fista", "ista")
        self.codes = States(len(below), layer.settings.window if pooled else None)
        self.curvature: Tensor | None = None
        self.energy: Tensor | None = None
        self.peaks: Peaks | None = None
        self.snapshot: Snapshot | None = None
        self.sums: FilterSums | None = None
        self._totals = _Totals()
        if state is None:
            layer.initialize(below, seeded(seed, number, 1))
        else:
            self.load_state_dict(state)

    @property
    def done(self) -> bool:
        return self.epoch >= self.settings.epochs

    @property
    def batches(self) -> int:
        """Filter updates in an epoch."""
        return -(-len(self.below) // self.batch_size)

    @property
    def updates(self) -> int:
        """Filter updates in all epochs."""
        return self.settings.epochs * self.batches

    @property
    def updates_done(self) -> int:
        return self.epoch * self.batches + self.batch

    @property
    def batch_size(self) -> int:
        return min(self.settings.batch_size or len(self.below), len(self.below))

    @torch.no_grad()
    def update(self) -> EpochStats | None:
        """Visit the next batch and update the filters; at the end of an epoch, what it saw."""
        started = time.perf_counter()
        self.snapshot = None
        shuffle = seeded(self.seed, self.number, 2, self.epoch)
        order = torch.randperm(len(self.below), generator=shuffle)
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
            solution, T = self._visit(part)
            new = filter_sums(
                solution.z,
                T.adjoint(solution.residual),
                layer.filters,
                layer.g,
                boundary=layer.settings.boundary,
                curvature=self._curvature(part, T),
            )
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
                non_negative=self.settings.non_negative,
                zero_mean=self.settings.zero_mean,
            )
        )

    def _curvature(self, part: Tensor, T: Operator) -> Tensor | None:
        """||T||^2 of these images, which stays the same while this layer learns."""
        if isinstance(T, Identity):
            return None
        if self.curvature is None:
            self.curvature = self.below.new_full((len(self.below), 1, 1, 1), math.nan)
        if self.curvature[part].isnan().any():
            self.curvature[part] = 1.05 * T.squared_norm(self.target(part).b, steps=NORM_STEPS)
        return self.curvature[part]

    def _update_by_cg(self, chosen: Tensor) -> None:
        layer, visited = self.layer, []
        for part in chosen.split(self.chunk):
            solution, _ = self._visit(part)
            # Maps that are kept pooled are unpooled again when they are needed.
            z = solution.z if self.codes.window is None else None
            visited.append((part, z, solution.residual))

        def batches() -> Iterator[Batch]:
            for part, z, residual in visited:
                yield self.codes[part] if z is None else z, residual, self.target(part).T

        layer.filters.copy_(
            update_filters_by_cg(
                layer.filters,
                batches,
                layer.g,
                norm=self.settings.norm,
                iterations=self.settings.update_iterations,
                boundary=layer.settings.boundary,
                non_negative=self.settings.non_negative,
                zero_mean=self.settings.zero_mean,
            )
        )

    def _visit(self, part: Tensor) -> tuple[Solution, Operator]:
        """Go on inferring the maps of some images; what was found, and their T."""
        settings = self.layer.settings
        part = part.to(self.below.device)
        target = self.target(part)
        solution = self.layer.infer(
            target, state=self.codes[part], step=self.codes.step(part), training=True
        )
        if not torch.isfinite(solution.objective).all():
            raise Diverged(
                f"layer {self.number}, epoch {self.epoch + 1}: the objective is not finite; lower "
                f"model.layer{self.number}.lam ({settings.lam}) or solver.relaxation "
                f"({settings.solver.relaxation}), or look for extreme values in the images"
            )
        self.codes[part] = solution.state
        if solution.step is not None:
            self.codes.set_step(part, solution.step)
        self._totals.add(solution, target.b)
        # Each plane pairwise in its own type, which is exact enough and needs no copy.
        energy = solution.z.square().sum((2, 3)).double().sum(0)
        self.energy = energy if self.energy is None else self.energy + energy
        if self.watch and self.epoch + 1 in self.watch.epochs:
            peaks = Peaks.none(solution.z) if self.peaks is None else self.peaks
            self.peaks = peaks.updated(solution.z, part, self.watch.first)
        return solution, target.T

    def _end_epoch(self) -> EpochStats:
        dead, double = self._unused_filters()
        self.epoch, self.batch = self.epoch + 1, 0
        totals, self._totals = self._totals, _Totals()
        if self.peaks is not None:
            self.snapshot = Snapshot(self.epoch, self.peaks, self.layer.filters.clone())
            self.peaks = None
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
        generator = seeded(self.seed, self.number, 3, self.epoch)
        fresh = layer.fresh_filters(len(filters), self.below, generator)
        f = layer.filters.clone()
        f[filters] = fresh
        layer.set_filters(f)
        for part, state in self._states():
            state[:, filters] = 0
            self.codes[part] = state
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
        for part, state in self._states():
            for k, (rows, columns) in moves.items():
                state[:, k] = shift(state[:, k], -rows, -columns, wrap=wrap)
            # With a window, of the moved entries that now share one the strongest stays.
            self.codes[part] = state
        layer.set_filters(f)
        if self.sums is not None:
            self.sums = self.sums.without(list(moves))

    def _states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, states of inference) of all images, some at a time."""
        for part in torch.arange(len(self.below), device=self.below.device).split(self.chunk):
            yield part, self.codes[part]

    def state_dict(self) -> dict:
        """Everything beside the filters that `load_state_dict` needs to go on exactly from here."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "codes": self.codes.state_dict(),
            "curvature": None if self.curvature is None else self.curvature.cpu(),
            "energy": None if self.energy is None else self.energy.cpu(),
            "peaks": None if self.peaks is None else self.peaks.state_dict(),
            "sums": None
            if self.sums is None
            else {"linear": self.sums.linear.cpu(), "gram": self.sums.gram.cpu()},
            "totals": asdict(self._totals),
        }

    def load_state_dict(self, state: dict) -> None:
        device = self.below.device
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.codes.load_state_dict(state["codes"], device)
        curvature = state["curvature"]
        self.curvature = None if curvature is None else curvature.to(device)
        self.energy = None if state["energy"] is None else state["energy"].to(device)
        # Checkpoints of before there were peaks leave those of an epoch to the images to come.
        peaks = state.get("peaks")
        self.peaks = None if peaks is None else Peaks.from_state_dict(peaks, device)
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


def learn_layers(
    net: DeconvNet, y: Tensor, *, depth: int | None = None, seed: int = 0, chunk: int = 8
) -> list[EpochStats]:
    """Learn the lowest `depth` layers (None: all) from preprocessed images y, in memory alone.

    What each epoch saw, layer after layer. `training.train` does the same and keeps a run folder.
    """
    codes, history = Codes((), y, []), []
    for number in range(1, (net.depth if depth is None else depth) + 1):
        layer = net.layer(number)
        if number > 1:
            codes = net.extend(codes, chunk=chunk)
            layer.fit_scale(codes.layers[-1].pooled)
        below, target = net.below(codes, number), partial(net.target, codes, number)
        trainer = LayerTrainer(layer, below, target, seed=seed, number=number, chunk=chunk)
        while not trainer.done:
            history += filter(None, [trainer.update()])
    return history
