"""The learning of one layer: batch by batch, infer -> sums -> update, with care for its filters.

The position is two integers, epoch and batch; the images of an epoch come in an order made from
(seed, layer, epoch), so that a layer whose learning was stopped goes on as if it had not been.

Several processes (ranks) can share it. Each infers the images of a batch that are its own, the sums
over the batch are all that they tell each other, and each makes the same update of its filters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.filters.update import (
    Batch,
    FilterStatistics,
    LearningSettings,
    dead_filters,
    duplicate_filters,
    filter_statistics,
    off_center,
    random_patch_positions,
    shift,
    update_filters,
    update_filters_by_cg,
)
from deconvnet.monitoring.monitor import memory_used
from deconvnet.monitoring.peaks import Peaks, Snapshot, SnapshotPlan
from deconvnet.monitoring.records import EpochStats, RankLoad, decibels
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet, Layer, LayerProblem, check_size, seeded
from deconvnet.operators.convolution import map_size
from deconvnet.operators.linear import Identity, LinearOperator
from deconvnet.operators.pooling import Window, pooled_shape
from deconvnet.sparse_coding.problem import Solution
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.modes import plain
from deconvnet.support.units import exponent, magnitude, times_power
from deconvnet.training.sampler import BatchSampler
from deconvnet.training.warm_starts import DiskWarmStarts, WarmStarts, merge_state_dicts

RECENTER_EVERY = 4
# Steps of Lanczos' method for ||T||^2: within 5% of it, at the price of two visits.
NORM_STEPS = 12
# Numbers that ranks tell each other beside the sums: not finite, asked to stop.
FLAGS = 2
# What a checkpoint says of the order of images that it counts on.
ORDER = "places"
# What the time of an update goes into.
PHASES = ("inference", "sums", "exchange", "update")
# What is added up over the images of an epoch.
SUMMED = ("images", "entries", "nonzero", "reconstruction", "sparsity", "error", "signal")


class Diverged(RuntimeError):
    """The objective is no longer finite; the filters are those of before."""


@dataclass(frozen=True)
class LayerData:
    """What a layer stands on and has to explain, of the images that are asked for by their indices.

    images: how many there are. below: (n, C, H, W), what is below the layer, in the space that its
    filters paint in, of the given shape (C, H, W). target: what is to be explained, and through
    what.
    """

    images: int
    shape: torch.Size
    device: torch.device
    below: Callable[[Tensor], Tensor]
    target: Callable[[Tensor], LayerProblem]
    # told which images will be asked for next, where that helps
    ahead: Callable[[Tensor], None] | None = None

    @classmethod
    def from_tensor(
        cls, below: Tensor, target: Callable[[Tensor], LayerProblem] | None = None
    ) -> LayerData:
        """Of tensors (N, C, H, W) in memory; by default what is below is what is explained."""
        return cls(
            len(below),
            below.shape[1:],
            below.device,
            lambda images: below[images],
            target or (lambda images: LayerProblem(below[images])),
        )

    @classmethod
    def from_codes(cls, net: DeconvNet, codes: Codes, number: int) -> LayerData:
        """Of layer `number` of a network over the codes of the layers below."""
        return cls.from_tensor(
            net.layer_input(codes, number), partial(net.layer_problem, codes, number)
        )


def warm_starts_size(layer: Layer, data: LayerData) -> int:
    """Bytes that the states of inference of all images take while a layer learns."""
    settings, size = layer.settings, layer.settings.filter_size
    maps = (settings.num_maps, *map_size(data.shape[1:], (size, size), settings.boundary))
    window = pooling_window(layer)
    # A pooled value and its switch.
    each = 4 * math.prod(maps) if window is None else 12 * math.prod(pooled_shape(maps, window))
    return data.images * each


def pooling_window(layer: Layer) -> Window | None:
    """The window by which states of inference are kept pooled, if they are."""
    proximal = layer.settings.solver.method in ("fista", "ista")
    return layer.settings.window if proximal else None


class LayerTrainer:
    """Learns the filters of one layer on what it has to explain.

    ground: what the layer stands on; a tensor (N, C, H, W) is also what it explains. watch: the
    epochs at whose end there is a `snapshot`, until the next one begins. ranks: processes that
    share the work; all of them make the same calls. keep: the state of inference of every image
    (`states_size`); else every visit infers its maps from the beginning. folder: where they are
    kept in files, in place of memory, until `close`; token: what these are marked with. filters:
    (K, C, h, w), those that learning starts from, by default as the settings say.

    Holds the state of inference of its images, the energy of every map in this epoch, and the
    running sums of the filter update. One call of `update` is one filter update. Without a `state`
    from `state_dict` the filters start as the settings say; with it they stay.
    """

    def __init__(
        self,
        layer: Layer,
        data: LayerData | Tensor,
        *,
        seed: int = 0,
        number: int = 1,
        chunk: int = 8,
        watch: SnapshotPlan | None = None,
        communicator: Communicator = SINGLE,
        keep: bool = True,
        folder: Path | None = None,
        token: str = "",
        filters: Tensor | None = None,
        state: dict | None = None,
    ):
        self.data = LayerData.from_tensor(data) if isinstance(data, Tensor) else data
        check_size(self.data.shape, layer, number)
        self.layer, self.seed, self.number, self.chunk = layer, seed, number, chunk
        self.watch, self.communicator, self.keep = watch, communicator, keep
        self.settings: LearningSettings = layer.settings.learning
        self.sampler = BatchSampler(
            self.data.images,
            self.settings.batch_size,
            (seed, number, 2),
            communicator.rank,
            communicator.world_size,
        )
        self.epoch, self.batch = 0, 0
        # Whether some rank was asked to stop, as of the last update.
        self.stopping = False
        own, window = self.sampler.own.to(self.data.device), pooling_window(layer)
        self.warm_starts = (
            DiskWarmStarts(own, window, folder, token) if folder else WarmStarts(own, window)
        )
        self.snapshot: Snapshot | None = None
        self.sums: FilterStatistics | None = None
        self._seen = EpochAccumulator()
        if state is None:
            if filters is None:
                filters = self._draw_filters(layer.settings.num_maps, seeded(seed, number, 1))
            layer.set_filters(filters.to(layer.filters))
        else:
            self.load_state_dict(state)

    @property
    def done(self) -> bool:
        return self.epoch >= self.settings.epochs

    @property
    def updates(self) -> int:
        """Filter updates in all epochs."""
        return self.settings.epochs * self.sampler.batches

    @property
    def updates_done(self) -> int:
        return self.epoch * self.sampler.batches + self.batch

    @property
    def message(self) -> int:
        """Bytes of the sums over a batch that ranks add up, however many images there are."""
        K, C, h, w = self.layer.filters.shape
        if self.settings.update == "cg":
            return 8 * K * C * h * w
        return 8 * (FLAGS + K * C * h * w + K * K * (2 * h - 1) * (2 * w - 1))

    @property
    def traffic(self) -> str:
        """What ranks tell each other in an update, in words."""
        size = f"{self.message / 1e6:.2f} MB, whatever the number of images"
        if self.settings.update == "cg":
            return f"in an update {1 + self.settings.update_iterations} messages of {size}"
        return f"in an update one message of {size}"

    def close(self) -> None:
        """Nothing more is learned: files of states are closed."""
        self.warm_starts.close()

    @plain
    def update(self, *, stop: bool = False) -> EpochStats | None:
        """Visit the next batch and update the filters; at the end of an epoch, what it saw.

        stop: that this rank was asked to stop, which all then know by `stopping`. Raises Diverged,
        on all ranks and before the update, where an objective is not finite.
        """
        self.snapshot = None
        self._seen.clock.start()
        chosen = self.sampler.batch(self.epoch, self.batch).to(self.data.device)
        self._announce_next(chosen)
        if self.settings.update == "cg":
            self._update_by_cg(chosen, stop)
        else:
            self._update_by_sums(chosen, stop)
        self._seen.clock.end("update")
        self.batch += 1
        return self._end_epoch() if self.batch == self.sampler.batches else None

    def _announce_next(self, chosen: Tensor) -> None:
        """Say which images will be asked for: those of this batch and the next."""
        if self.data.ahead is None:
            return
        over = self.batch + 1 == self.sampler.batches
        following = (self.epoch + 1, 0) if over else (self.epoch, self.batch + 1)
        self.data.ahead(torch.cat([chosen.cpu(), self.sampler.batch(*following)]))

    def _update_by_sums(self, chosen: Tensor, stop: bool) -> None:
        layer, f = self.layer, self.layer.filters
        sums, finite = FilterStatistics.none(f), True
        for part in self._parts(chosen):
            self._seen.clock.end("sums")
            solution, T = self._visit(part)
            self._seen.clock.end("inference")
            if not torch.isfinite(solution.objective).all():
                finite = False
                continue
            sums += filter_statistics(
                solution.z,
                T.adjoint(solution.residual),
                f,
                layer.g,
                boundary=layer.settings.boundary,
                curvature=self._curvature(part, T),
            )
        self._seen.clock.end("sums")
        linear, gram, flags = self.communicator.all_reduce_sum(
            sums.linear, sums.gram, self._flags(finite, stop)
        )
        self._seen.clock.end("exchange")
        self._check_flags(flags)
        sums = FilterStatistics(linear, gram)
        # Each update lets 1 / (updates in `averaging_epochs` epochs) of what came before fade.
        fade = max(0.0, 1 - 1 / max(self.settings.averaging_epochs * self.sampler.batches, 1))
        self.sums = sums if self.sums is None or fade == 0 else self.sums * fade + sums
        f.copy_(
            update_filters(
                f,
                self.sums,
                layer.g,
                norm=self.settings.norm,
                iterations=self.settings.update_iterations,
                non_negative=self.settings.non_negative,
                zero_mean=self.settings.zero_mean,
            )
        )

    def _update_by_cg(self, chosen: Tensor, stop: bool) -> None:
        layer, visited, finite = self.layer, [], True
        for part in self._parts(chosen):
            solution, _ = self._visit(part)
            finite = finite and bool(torch.isfinite(solution.objective).all())
            # Maps that are kept pooled are unpooled again when they are needed.
            z = None if self.keep and self.warm_starts.window else solution.z
            visited.append((part, z, solution.residual))
        self._seen.clock.end("inference")
        flags = self.communicator.all_reduce_sum(self._flags(finite, stop))
        self._seen.clock.end("exchange")
        self._check_flags(*flags)

        def batches() -> Iterator[Batch]:
            for part, z, residual in visited:
                yield self.warm_starts[part] if z is None else z, residual, self.data.target(part).T

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
                communicator=self.communicator,
            )
        )

    def _flags(self, finite: bool, stop: bool) -> Tensor:
        """What a rank has to say beside its sums: (FLAGS,)."""
        flags = [float(not finite), float(stop)]
        return torch.tensor(flags, dtype=torch.float64, device=self.data.device)

    def _check_flags(self, flags: Tensor) -> None:
        """Act upon the sum of all flags, as all ranks do."""
        bad, stop = flags.tolist()
        self.stopping = stop > 0
        if bad:
            settings = self.layer.settings
            raise Diverged(
                f"layer {self.number}, epoch {self.epoch + 1}: the objective is not finite; lower "
                f"model.layer{self.number}.lam ({settings.lam}) or solver.relaxation "
                f"({settings.solver.relaxation}), or look for extreme values in the images; the "
                "last checkpoint is from before"
            )

    def _curvature(self, part: Tensor, T: LinearOperator) -> Tensor | None:
        """||T||^2 of these images, which stays the same while this layer learns."""
        if isinstance(T, Identity):
            return None
        found = self.warm_starts.scalar("curvature", part)
        if found is None:
            found = 1.05 * T.squared_norm(self.data.target(part).b, steps=NORM_STEPS)
            self.warm_starts.set_scalar("curvature", part, found)
        return found

    def _parts(self, images: Tensor) -> Iterator[Tensor]:
        return iter(images.split(self.chunk) if len(images) else ())

    def _draw_filters(self, num: int, generator: torch.Generator) -> Tensor:
        """So many filters as learning starts with."""
        H, W = self.data.shape[1:]
        images, size = self.data.images, self.layer.settings.filter_size

        def draw(number: int) -> Tensor:
            return self._patches(random_patch_positions(number, images, (H, W), size, generator))

        return self.layer.draw_filters(num, draw, generator)

    def _patches(self, places: Tensor) -> Tensor:
        """(P, C, h, w): the pieces of what is below at places (P, 3), image, row, column."""
        size = self.layer.settings.filter_size
        patches = self.layer.filters.new_zeros(len(places), self.data.shape[0], size, size)
        drawn, own = places[:, 0], self.warm_starts.images.cpu()
        for part in self._parts(own[torch.isin(own, drawn)]):
            below = self.data.below(part.to(self.data.device))
            for n, image in zip(part.tolist(), below, strict=True):
                for p in (drawn == n).nonzero()[:, 0].tolist():
                    i, j = places[p, 1:].tolist()
                    patches[p] = image[:, i : i + size, j : j + size]
        # Exact: what the other ranks add is zero.
        return self.communicator.all_reduce_sum(patches)[0].to(patches.dtype)

    def _visit(self, part: Tensor) -> tuple[Solution, LinearOperator]:
        """Go on inferring the maps of some images; what was found, and their T."""
        target = self.data.target(part)
        solution = self.layer.infer(
            target,
            state=self.warm_starts[part],
            step=self.warm_starts.scalar("step", part),
            training=self.keep,
        )
        if self.keep:
            self.warm_starts[part] = solution.state
            if solution.step is not None:
                self.warm_starts.set_scalar("step", part, solution.step)
        self._seen.add(solution, target.b)
        if self.watch and self.epoch + 1 in self.watch.epochs:
            self._seen.add_peaks(solution.z, part, self.watch)
        return solution, target.T

    def _end_epoch(self) -> EpochStats:
        seen, self._seen = self._seen.shared(self.communicator), EpochAccumulator()
        dead = dead_filters(seen.energy)
        double = duplicate_filters(self.layer.filters, seen.energy)
        double = [k for k in double if k not in dead]
        self.epoch, self.batch = self.epoch + 1, 0
        if seen.peaks is not None:
            self.snapshot = Snapshot(self.epoch, seen.peaks, self.layer.filters.clone())
        self.warm_starts.next_pass()
        if self.settings.reinit_unused and not self.done:
            self._reinitialize(sorted([*dead, *double]))
        early = 3 * self.epoch <= 2 * self.settings.epochs
        if self.settings.recenter and early and self.epoch % RECENTER_EVERY == 0:
            self._recenter()
        self.warm_starts.next_pass()
        return seen.stats(self, dead=len(dead), double=len(double))

    def _reinitialize(self, filters: list[int]) -> None:
        """Start these filters anew, and forget what was known of their maps."""
        if not filters:
            return
        layer = self.layer
        generator = seeded(self.seed, self.number, 3, self.epoch)
        fresh = self._draw_filters(len(filters), generator)
        f = layer.filters.clone()
        f[filters] = fresh
        layer.set_filters(f)
        for part, state in self._states():
            state[:, filters] = 0
            self.warm_starts[part] = state
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
            self.warm_starts[part] = state
        layer.set_filters(f)
        if self.sums is not None:
            self.sums = self.sums.without(list(moves))

    def _states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, states of inference) of the images, some at a time."""
        for part in self._parts(self.warm_starts.images):
            state = self.warm_starts[part]
            if state is not None:
                yield part, state

    def state_dict(self) -> dict | None:
        """Everything beside the filters that `load_state_dict` needs to go on exactly from here,
        with any number of ranks; of all ranks, for the first one.
        """
        seen = self._seen.shared(self.communicator)
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
            "seen": seen.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        if state.get("order") != ORDER:
            raise ValueError(
                "this checkpoint was written in the middle of a layer by a deconvnet that visits "
                "images in another order: go on with the one that wrote it, or start anew "
                "(resume=false)"
            )
        device = self.data.device
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.warm_starts.load_state_dict(state["codes"], device)
        sums = state["sums"]
        self.sums = sums and FilterStatistics(sums["linear"].to(device), sums["gram"].to(device))
        # What all have seen counts once.
        self._seen = (
            EpochAccumulator.of(state["seen"], device)
            if self.communicator.is_main
            else EpochAccumulator()
        )


class _Clock:
    """Seconds by phase of this rank's work, and on a GPU when it was asked for, not done."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = dict(seconds or dict.fromkeys(PHASES, 0.0))
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """What has passed since the last one ended belongs to this phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


@dataclass
class EpochAccumulator:
    """Sums over the images of an epoch, as they were visited, and what stood out.

    energy: (K,) of every map; peaks: the strongest activations, if they are looked out for.
    """

    images: int = 0
    entries: int = 0
    nonzero: int = 0
    reconstruction: float = 0.0
    sparsity: float = 0.0
    error: float = 0.0
    signal: float = 0.0
    energy: Tensor | None = None
    peaks: Peaks | None = None
    clock: _Clock = field(default_factory=_Clock)
    loads: list[RankLoad] = field(default_factory=list)

    def add(self, solution: Solution, b: Tensor) -> None:
        self.images += len(b)
        self.entries += solution.z.numel()
        self.nonzero += int(torch.count_nonzero(solution.z))
        self.reconstruction += float(solution.reconstruction.sum())
        self.sparsity += float(solution.sparsity.sum())
        self.error += float(solution.residual.double().square().sum())
        self.signal += float(b.double().square().sum())
        # Each plane pairwise in its own type, which is exact enough and needs no copy.
        e = exponent(magnitude(solution.z))
        energy = times_power(solution.z, -e).square().sum((2, 3)).double().sum(0)
        energy = times_power(energy, 2 * e)
        self.energy = energy if self.energy is None else self.energy + energy

    def add_peaks(self, z: Tensor, images: Tensor, watch: SnapshotPlan) -> None:
        peaks = Peaks.none(z) if self.peaks is None else self.peaks
        self.peaks = peaks.updated(z, images, watch.first)

    def shared(self, communicator: Communicator) -> EpochAccumulator:
        """What all ranks have seen, and what each had to do."""
        device = torch.device("cpu") if self.energy is None else self.energy.device
        load = RankLoad(dict(self.clock.seconds), memory_used(device))
        if communicator.world_size == 1:
            return replace(self, loads=[load])
        found = communicator.all_gather((self.state_dict(), load))
        parts = [EpochAccumulator.of(part, device) for part, _ in found]
        energies = [part.energy for part in parts if part.energy is not None]
        peaks = [part.peaks for part in parts if part.peaks is not None]
        return EpochAccumulator(
            **{key: sum(getattr(part, key) for part in parts) for key in SUMMED},
            loads=[load for _, load in found],
            clock=self.clock,
            energy=sum(energies[1:], energies[0]) if energies else None,
            peaks=reduce(Peaks.merged, peaks) if peaks else None,
        )

    def state_dict(self) -> dict:
        return {
            **{key: getattr(self, key) for key in SUMMED},
            "seconds": self.clock.seconds,
            "energy": None if self.energy is None else self.energy.cpu(),
            "peaks": None if self.peaks is None else self.peaks.state_dict(),
        }

    @classmethod
    def of(cls, state: dict, device: torch.device | None) -> EpochAccumulator:
        energy, peaks = state["energy"], state["peaks"]
        return cls(
            **{key: state[key] for key in SUMMED},
            energy=None if energy is None else energy.to(device),
            peaks=None if peaks is None else Peaks.from_state_dict(peaks, device),
            clock=_Clock(state["seconds"]),
        )

    def stats(self, trainer: LayerTrainer, *, dead: int, double: int) -> EpochStats:
        return EpochStats(
            layer=trainer.number,
            epoch=trainer.epoch,
            epochs=trainer.settings.epochs,
            reconstruction=self.reconstruction / self.images,
            sparsity=self.sparsity / self.images,
            snr=decibels(self.signal, self.error),
            density=self.nonzero / self.entries,
            dead=dead,
            double=double,
            seconds_per_image=max(sum(load.seconds.values()) for load in self.loads) / self.images,
            loads=tuple(self.loads),
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
            codes = net.infer_next_layer(codes, chunk=chunk)
            layer.fit_scale(codes.layers[-1].pooled)
        data = LayerData.from_codes(net, codes, number)
        trainer = LayerTrainer(layer, data, seed=seed, number=number, chunk=chunk)
        while not trainer.done:
            history += filter(None, [trainer.update()])
    return history
