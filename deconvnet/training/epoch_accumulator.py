"""Statistics of an epoch, accumulated while its images are visited, and the time of each phase."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from deconvnet.filters.sparse_statistics import SparseMaps
from deconvnet.monitoring.monitor import memory_used
from deconvnet.monitoring.statistics import EpochStats, RankLoad
from deconvnet.monitoring.strongest_activations import Peaks, SnapshotPlan
from deconvnet.network.metrics import decibels
from deconvnet.sparse_coding.problem import Solution
from deconvnet.support.communicator import Communicator
from deconvnet.support.scaling import exponent, magnitude, times_power

# The phases of a filter update that are timed.
PHASES = ("inference", "sums", "exchange", "update")
# The fields that are summed over images and ranks.
SUMMED = ("images", "entries", "nonzero", "reconstruction", "sparsity", "error", "signal")


class PhaseClock:
    """Seconds that this rank spends in each phase. On a GPU, where work is asynchronous, this is
    the time to queue the work, not to execute it.
    """

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = dict(seconds or dict.fromkeys(PHASES, 0.0))
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """Add the time since the last call of `start` or `end` to this phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


@dataclass
class EpochAccumulator:
    """Sums over the images of an epoch, each at the time of its visit.

    energy: (K,) sum of squares of each map; peaks: the strongest activation of each map, in epochs
    with a snapshot; loads: set by `reduced`, one per rank.
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
    clock: PhaseClock = field(default_factory=PhaseClock)
    loads: list[RankLoad] = field(default_factory=list)

    def add(self, solution: Solution, b: Tensor, maps: SparseMaps | None = None) -> None:
        """Add the solution of some images with the target b (n, C, H, W).

        maps: those of the solution, if they are sparse.
        """
        self.images += len(b)
        self.entries += solution.z.numel()
        self.nonzero += int(torch.count_nonzero(solution.z)) if maps is None else len(maps.z)
        self.reconstruction += float(solution.reconstruction.sum())
        self.sparsity += float(solution.sparsity.sum())
        self.error += _sum_of_squares(solution.residual)
        self.signal += _sum_of_squares(b)
        energy = _energy(solution.z) if maps is None else maps.energy()
        self.energy = energy if self.energy is None else self.energy + energy

    def add_peaks(self, z: Tensor, images: Tensor, plan: SnapshotPlan) -> None:
        """Update the strongest activations with the maps z (n, K, H, W) of these images (n,)."""
        peaks = Peaks.none(z) if self.peaks is None else self.peaks
        self.peaks = peaks.updated(z, images, plan.first)

    def reduced(self, communicator: Communicator) -> EpochAccumulator:
        """The sums over all ranks, with the load of each."""
        device = torch.device("cpu") if self.energy is None else self.energy.device
        load = RankLoad(dict(self.clock.seconds), memory_used(device))
        if communicator.world_size == 1:
            return replace(self, loads=[load])
        gathered = communicator.all_gather((self.state_dict(), load))
        parts = [EpochAccumulator.from_state_dict(state, device) for state, _ in gathered]
        energies = [part.energy for part in parts if part.energy is not None]
        peaks = [part.peaks for part in parts if part.peaks is not None]
        return EpochAccumulator(
            **{key: sum(getattr(part, key) for part in parts) for key in SUMMED},
            loads=[load for _, load in gathered],
            clock=self.clock,
            energy=sum(energies[1:], energies[0]) if energies else None,
            peaks=reduce(Peaks.merged, peaks) if peaks else None,
        )

    def stats(self, *, layer: int, epoch: int, epochs: int, dead: int, double: int) -> EpochStats:
        """The statistics of the epoch: means per image and ratios."""
        return EpochStats(
            layer=layer,
            epoch=epoch,
            epochs=epochs,
            reconstruction=self.reconstruction / self.images,
            sparsity=self.sparsity / self.images,
            snr=decibels(self.signal, self.error),
            density=self.nonzero / self.entries,
            dead=dead,
            double=double,
            seconds_per_image=max(sum(load.seconds.values()) for load in self.loads) / self.images,
            loads=tuple(self.loads),
        )

    def state_dict(self) -> dict:
        return {
            **{key: getattr(self, key) for key in SUMMED},
            "seconds": self.clock.seconds,
            "energy": None if self.energy is None else self.energy.cpu(),
            "peaks": None if self.peaks is None else self.peaks.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: dict, device: torch.device) -> EpochAccumulator:
        energy, peaks = state["energy"], state["peaks"]
        return cls(
            **{key: state[key] for key in SUMMED},
            energy=None if energy is None else energy.to(device),
            peaks=None if peaks is None else Peaks.from_state_dict(peaks, device),
            clock=PhaseClock(state["seconds"]),
        )


def _energy(z: Tensor) -> Tensor:
    """(K,), float64: the sum of squares of each map of z (N, K, rows, columns)."""
    # Sum each plane pairwise in its own dtype: accurate enough, and without a copy.
    e = exponent(magnitude(z))
    return times_power(times_power(z, -e).square().sum((2, 3)).double().sum(0), 2 * e)


def _sum_of_squares(x: Tensor) -> float:
    """In float64, without a copy of x in it."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
