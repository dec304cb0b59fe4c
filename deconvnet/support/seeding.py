"""Seeded random generators, one per purpose, so that no draw depends on another."""

from __future__ import annotations

import torch


def seeded_generator(*seeds: int) -> torch.Generator:
    """A CPU generator seeded from the seed of the run and numbers that identify its use.

    seeds: for example (seed, layer, purpose, epoch); different tuples give independent generators.
    """
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part + 1) % (2**62)
    return torch.Generator().manual_seed(seed)
