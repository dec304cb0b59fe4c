"""Would the same filters be learned again? From other seeds, and from halves of the images.

A filter that is not found again is an accident of its start or of its images, and says little about
the data. The lowest layer is learned again with the same settings and the same lam, and its filters
are matched with those of the network (`filters.matching`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.filters.matching import FilterMatch, match_filters
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.network import DeconvNet, load
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.validation import OnDemand, as_number
from deconvnet.training.loop import train
from deconvnet.training.session import Limits
from deconvnet.training.training_set import ImageSource

# A filter that is found again at this cosine is called stable.
STABLE = 0.9
HALVES = 2


@dataclass(frozen=True)
class Stability:
    """The K filters of a network in networks that were learned again.

    seeds: a match for each other seed; halves: for each half of the images; between_halves: of the
    filters of one half in those of the other. chance: the mean matched cosine with filters whose
    entries are in random order.
    """

    num_maps: int
    filter_shape: tuple[int, int]
    seeds: tuple[FilterMatch, ...]
    halves: tuple[FilterMatch, ...]
    between_halves: FilterMatch | None
    chance: float

    @property
    def over_seeds(self) -> np.ndarray | None:
        """(K,): the mean over the other seeds of the best cosine of each filter."""
        return np.mean([match.best for match in self.seeds], 0) if self.seeds else None

    @property
    def over_halves(self) -> np.ndarray | None:
        """(K,): the smaller of the best cosines of each filter in the two halves."""
        return np.min([match.best for match in self.halves], 0) if self.halves else None

    def as_dict(self) -> dict:
        """The values as JSON takes them, best and matched cosines for each filter."""

        def values(match: FilterMatch) -> dict:
            arrays = {"best": match.best, "nearest": match.nearest}
            arrays |= {"matched": match.matched, "partners": match.partners}
            means = {"mean_best": match.mean_best, "mean_matched": match.mean_matched}
            return {**means, **{name: array.tolist() for name, array in arrays.items()}}

        arrays = {"over_seeds": self.over_seeds, "over_halves": self.over_halves}
        return {
            "num_maps": self.num_maps,
            "filter_shape": list(self.filter_shape),
            "chance": self.chance,
            **{name: None if array is None else array.tolist() for name, array in arrays.items()},
            "seeds": [values(match) for match in self.seeds],
            "halves": [values(match) for match in self.halves],
            "between_halves": self.between_halves and values(self.between_halves),
        }

    def __str__(self) -> str:
        """A table of at most 80 columns."""
        size = "x".join(map(str, self.filter_shape))
        head = f"{'found again':28}{'best cosine':>14}{'one to one':>14}{f'above {STABLE}':>14}"
        lines = [f"{self.num_maps:,} filters of {size}, learned again", "", head]
        for number, match in enumerate(self.seeds, 1):
            lines.append(_row(f"from another seed, {number}", match))
        for number, match in enumerate(self.halves, 1):
            lines.append(_row(f"from half {number} of the images", match))
        if self.between_halves is not None:
            lines.append(_row("half 1 in half 2", self.between_halves))
        lines.append(f"{'entries in random order':28}{'':14}{self.chance:>14.3f}")
        return "\n".join(lines)


def _row(name: str, match: FilterMatch) -> str:
    stable = float((match.best > STABLE).mean())
    return f"{name:28}{match.mean_best:>14.3f}{match.mean_matched:>14.3f}{stable:>14.1%}"


def measure_stability(
    net: DeconvNet,
    images: Tensor | OnDemand | ImageSource,
    *,
    seeds: int = 1,
    halves: bool = True,
    seed: int = 0,
    folder: Path | None = None,
    limits: Limits | None = None,
    note: Callable[[str], None] = lambda name: None,
) -> Stability:
    """Learn the lowest layer of a network again, and match its filters with those of the network.

    images: those that the network has learned from, as for `train`; seed: with which it did. seeds:
    how many other seeds to try, seed + 1 and so on; halves: whether to learn from every second
    image, and from the others, with the same seed. folder: keeps the networks, as
    seed-1.safetensors and half-1.safetensors; those that it holds are not learned again. limits: as
    of `train`. note: called with the name of each network before it is learned.

    Maps of one sign are compared with sign, others without (`filter_cosines`).
    """
    if not isinstance(images, ImageSource):
        images = ImageSource.from_tensor(images)
    seeds = _count(seeds)
    if seeds == 0 and not halves:
        raise ValueError("seeds=0, halves=False: nothing to compare with; give at least one")
    if halves and images.count < HALVES:
        raise ValueError(f"halves=True: {images.count} image cannot be halved; use halves=False")
    learn = _Learner(net, folder, limits, note)
    others = [learn(f"seed-{n}", images, seed + n) for n in range(1, seeds + 1)]
    parts = [
        learn(f"half-{n + 1}", _part(images, torch.arange(n, images.count, HALVES)), seed)
        for n in range(HALVES if halves else 0)
    ]
    f, settings = net.layer(1).filters, net.layer(1).settings

    def match(f: Tensor, g: Tensor) -> FilterMatch:
        return match_filters(f, g, either_sign=not settings.non_negative)

    return Stability(
        settings.num_maps,
        settings.filter_shape,
        tuple(match(f, g) for g in others),
        tuple(match(f, g) for g in parts),
        match(*parts) if parts else None,
        match(f, _shuffled(f)).mean_matched,
    )


class _Learner:
    """Learns the lowest layer of a network again, or loads what was learned before."""

    def __init__(
        self,
        net: DeconvNet,
        folder: Path | None,
        limits: Limits | None,
        note: Callable[[str], None],
    ):
        self.net, self.folder, self.limits, self.note = net, folder, limits, note

    def __call__(self, name: str, images: ImageSource, seed: int) -> Tensor:
        """The filters (K, C, h, w)."""
        settings = self.net.layer(1).settings
        path = self.folder and Path(self.folder) / f"{name}.safetensors"
        if path is not None and path.exists():
            again = load(path)
            if again.layer(1).settings != settings:
                raise ValueError(f"{path}: was learned with other settings; remove it")
            return again.layer(1).filters
        self.note(name)
        again = DeconvNet([settings], self.net.preprocessing.settings, seed=seed)
        again.to(self.net.device)
        with Monitor(None, progress=False) as monitor:
            limits = {} if self.limits is None else {"limits": self.limits}
            train(again, images, monitor=monitor, seed=seed, **limits)
        if path is not None:
            again.save(path)
        return again.layer(1).filters


def _part(images: ImageSource, numbers: Tensor) -> ImageSource:
    """Some of the images, by their numbers."""
    prefetch = images.prefetch
    return replace(
        images,
        count=len(numbers),
        read=lambda indices: images.read(numbers[indices]),
        prefetch=prefetch and (lambda indices: prefetch(numbers[indices])),
        digests=None,
    )


def _shuffled(f: Tensor) -> Tensor:
    """Filters (K, C, h, w), the entries of each in random order."""
    generator = seeded_generator(0)
    orders = [torch.randperm(f[0].numel(), generator=generator) for _ in f]
    flat = f.flatten(1).cpu()
    rows = zip(flat, orders, strict=True)
    return torch.stack([row[order] for row, order in rows]).view(f.shape).to(f)


def _count(seeds: int) -> int:
    """The number of seeds; ValueError unless it is a whole number, at least 0."""
    if as_number(seeds, "seeds") != int(seeds) or seeds < 0:
        raise ValueError(f"seeds={seeds}: must be a whole number, at least 0")
    return int(seeds)
