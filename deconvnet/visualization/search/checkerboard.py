"""How visible the checkerboard of an uneven overlap is in projections."""

from __future__ import annotations

import torch
from torch import Tensor


def checkerboard(images: Tensor, period: tuple[int, int]) -> Tensor:
    """(U,): how much the magnitude of projections (U, C, H, W) varies with the phase of a pattern.

    period: of the pattern, in pixels. The result is the standard deviation of the mean magnitude of
    each phase, divided by the mean over all phases; it is 0 if magnitudes do not depend on the
    phase. Fine structure in the image also varies with the phase, so only what exceeds the value
    for `overlap="normalised"` is a checkerboard.
    """
    magnitude = images.abs().double().mean(1)
    rows, columns = (
        torch.arange(size, device=images.device) % max(1, step)
        for size, step in zip(magnitude.shape[1:], period, strict=True)
    )
    # The last period may be incomplete: its phases have fewer pixels.
    phase = (rows[:, None] * (columns.max() + 1) + columns).flatten()
    sums = magnitude.new_zeros(len(images), int(phase.max()) + 1)
    phases = sums.index_add(1, phase, magnitude.flatten(1)) / phase.bincount()
    mean = phases.mean(1)
    return torch.where(mean > 0, phases.std(1, correction=0) / mean.clamp(min=1e-300), 0)
