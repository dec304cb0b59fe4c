"""The learning of one layer: batch by batch, infer -> sums -> update, with care for its filters.

The position is two integers, epoch and batch; the images of an epoch come in an order made from
(seed, layer, epoch), so that a layer whose learning was stopped goes on as if it had not been.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

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
from deconvnet.monitor import EpochStats, Monitor
from deconvnet.network import Layer, LayerSettings, check_size, seeded
from deconvnet.solvers import Solution, SolverSettings, solve

RECENTER_EVERY = 4


class Diverged(RuntimeError):
    """The objective is no longer finite; the filters are those of before."""


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
