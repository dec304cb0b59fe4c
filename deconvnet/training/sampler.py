"""The assignment of images to batches and to ranks, and the order of the batches.

    N images · B images in a batch · R ranks (processes)

A batch has B slots, and image i always has slot i mod B. In each epoch every slot visits its images
in a new order, which depends only on the seeds. Batches therefore differ between epochs, and yet a
slot with all its images can belong to one rank, the only one to read them and store their maps. The
batches do not depend on R, and in a full batch the numbers of images per rank differ by at most 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from deconvnet.support.seeding import seeded_generator


@dataclass(frozen=True)
class BatchSampler:
    """The share of one rank in the batches of N images.

    batch_size: B, at most N; None for all images in one batch. seeds: determine the orders,
    together with the number of the epoch.
    """

    num_images: int
    batch_size: int | None
    seeds: tuple[int, ...] = (0,)
    rank: int = 0
    world_size: int = 1

    @property
    def slots(self) -> int:
        """B."""
        return min(self.batch_size or self.num_images, self.num_images)

    @property
    def batches(self) -> int:
        """The number of batches in an epoch; the last may be smaller."""
        return -(-self.num_images // self.slots)

    @property
    def own_slots(self) -> range:
        """The consecutive slots of this rank; may be empty if there are more ranks than slots."""
        first, last = (self.slots * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(first, last)

    @property
    def own_images(self) -> Tensor:
        """The indices of the images of this rank, ascending."""
        starts = torch.arange(0, self.num_images, self.slots)[:, None]
        images = (starts + torch.tensor(self.own_slots, dtype=torch.int64)).flatten()
        return images[images < self.num_images]

    def batch(self, epoch: int, number: int) -> Tensor:
        """The images of this rank in a batch, by slot; epochs and batches count from 0."""
        if self.batches == 1:
            return self.own_images
        images = [order[number] for order in _orders(self, epoch) if number < len(order)]
        return torch.stack(images) if images else torch.empty(0, dtype=torch.int64)


@lru_cache(maxsize=2)
def _orders(sampler: BatchSampler, epoch: int) -> list[Tensor]:
    """For each slot of the rank, its images in the order of an epoch."""
    orders = []
    for slot in sampler.own_slots:
        images = torch.arange(slot, sampler.num_images, sampler.slots)
        shuffle = seeded_generator(*sampler.seeds, epoch, slot)
        orders.append(images[torch.randperm(len(images), generator=shuffle)])
    return orders
