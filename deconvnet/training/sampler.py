"""Which images make a batch, in what order, and whose work they are.

    N images · B images in a batch · R ranks (processes)

A batch has B places, and image i always has the place i mod B: in an epoch every place goes through
its own images in an order of its own, made from seeds alone. So every batch is new, and yet a place
and all of its images can belong to one rank, which is the only one to read them and to know their
maps. What comes out does not depend on R, and of a full batch no rank has more than one image more
than another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from deconvnet.support.seeding import seeded_generator


@dataclass(frozen=True)
class BatchSampler:
    """The batches of N images for one of several ranks.

    batch_size: B, at most N, or None for all images in one batch. seeds: what the orders are made
    from, together with the number of the epoch.
    """

    images: int
    batch_size: int | None
    seeds: tuple[int, ...] = (0,)
    rank: int = 0
    world_size: int = 1

    @property
    def places(self) -> int:
        """B."""
        return min(self.batch_size or self.images, self.images)

    @property
    def batches(self) -> int:
        """Batches in an epoch; the last may be smaller."""
        return -(-self.images // self.places)

    @property
    def own_slots(self) -> range:
        """The places of this rank: some that are neighbours; none where there are more ranks."""
        first, last = (self.places * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(first, last)

    @property
    def own(self) -> Tensor:
        """The images of this rank, ascending."""
        starts = torch.arange(0, self.images, self.places)[:, None]
        own = (starts + torch.tensor(self.own_slots, dtype=torch.int64)).flatten()
        return own[own < self.images]

    def batch(self, epoch: int, number: int) -> Tensor:
        """The images of this rank in a batch, by their places; epochs and batches from 0."""
        if self.batches == 1:
            return self.own
        found = [images[number] for images in _order(self, epoch) if number < len(images)]
        return torch.stack(found) if found else torch.empty(0, dtype=torch.int64)


@lru_cache(maxsize=2)
def _order(sampler: BatchSampler, epoch: int) -> list[Tensor]:
    """The images of each of the own places, as they come in an epoch."""
    orders = []
    for place in sampler.own_slots:
        images = torch.arange(place, sampler.images, sampler.places)
        shuffle = seeded_generator(*sampler.seeds, epoch, place)
        orders.append(images[torch.randperm(len(images), generator=shuffle)])
    return orders
