"""Random generators: one for each purpose, so that no draw depends on another."""

from __future__ import annotations

import torch


def seeded_generator(*seeds: int) -> torch.Generator:
    """A generator on the CPU, from the seed of the run and the numbers of what it is for.

    seeds: such as (seed, layer, purpose, epoch); different numbers give independent generators.
    """
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % (2**62)
    return torch.Generator().manual_seed(seed)
