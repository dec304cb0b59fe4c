"""How visible the checkerboard of an uneven overlap is in projections, and tiles without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.projection import ProjectionReport

# Tiles of at least so many periods of a checkerboard are averaged over one period.
PERIODS = 16


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


def averaged(tiles: Tensor, period: tuple[int, int]) -> Tensor:
    """Tiles (U, C, h, w), each pixel averaged over one period of a checkerboard."""
    if period == (1, 1):
        return tiles
    padding = (0, period[1] - 1, 0, period[0] - 1)
    return F.avg_pool2d(F.pad(tiles, padding, mode="reflect"), period, stride=1)


def averaged_period(report: ProjectionReport, size: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of pixels over which tiles that show `size` (h, w) pixels are averaged;
    (1, 1) if no convolution leaves a pattern, or if a period is more than a small part of them.

    Among several patterns, this is the period of the finest, which is the most visible.
    """
    uneven = [overlap for overlap in report.uneven if all(overlap.period)]
    period = uneven[-1].period if uneven else (1, 1)
    return period if min(size) >= PERIODS * max(period) else (1, 1)
