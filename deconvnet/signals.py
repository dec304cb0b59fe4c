"""Signals: recordings of several channels over time, with the learner and the solvers of images.

    N trials · C channels · T times · K atoms · L times of an atom
    signals (N, C, T) are images of one row (N, C, 1, T); atoms (K, C, L) are filters (K, C, 1, L)

Nothing here solves a problem. `as_images` and `as_signals` convert; `learn_filters`,
`learn_online`, `sparse_code` and `Learned` do the rest, with filter_size=(1, L). Codes become
events (`Solution.events`), around which `epochs` cuts the signals; `factors` splits atoms into
space and time. `recordings` is for signals that are too long for this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deconvnet.filters.constraint import leading_pair
from deconvnet.sparse_coding.events import Events
from deconvnet.support.validation import FLOATS, as_positive_integer, as_tensor, check_settings


def as_images(signals: Any) -> Tensor:
    """Signals (N, C, T) as images of one row (N, C, 1, T), float32 or float64; no copy if it can
    be avoided."""
    signals = as_tensor(signals, "signals")
    if signals.ndim != 3:
        hints = {
            1: ": use signals[None, None]",
            2: ": use signals[:, None] for trials of one channel, signals[None] for one trial",
        }
        raise ValueError(
            f"signals must have the shape (N, C, T), trials, channels and times, got "
            f"{tuple(signals.shape)}{hints.get(signals.ndim, '')}"
        )
    return signals[:, :, None] if signals.dtype in FLOATS else signals[:, :, None].float()


def as_signals(images: Any) -> Tensor:
    """Images, filters or maps of one row (N, C, 1, T) as signals (N, C, T)."""
    return _only_row(images, "images", "(N, C, 1, T)")


def factors(filters: Any) -> tuple[Tensor, Tensor]:
    """Space u (K, C), of unit norm, and time v (K, L) of filters (K, C, 1, L) of rank 1: f = u v'.

    Of filters of a higher rank, those of the nearest filters of rank 1. The channel of u with the
    largest magnitude is positive.
    """
    f = _only_row(filters, "filters", "(K, C, 1, L)")
    f = as_signals(leading_pair(f[:, :, None]))
    K = torch.arange(len(f), device=f.device)
    strongest = f.square().sum(2).argmax(1)
    v = f[K, strongest]
    u = (f * v[:, None]).sum(2)
    length = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    u = u / torch.where(length > 0, length, torch.ones_like(length))
    return u, (f * u[:, :, None]).sum(1)


def epochs(
    signals: Any, events: Events, *, before: int, after: int, fill: float = float("nan")
) -> Tensor:
    """The signals around events, (M, C, before + after).

    signals: (N, C, T), those that were coded. Each epoch begins `before` times before the atom of
    its event does (`Events.corners`) and ends `after` times after that. Times outside the signals
    are `fill`. Raises ValueError if the events are not those of such signals.
    """
    signals = as_signals(as_images(signals))
    check_settings(events, Events, "events", optional=False)
    if not isinstance(before, (int, np.integer)) or before < 0:
        raise ValueError(f"before={before}: must be a whole number from 0")
    width = before + as_positive_integer(after, "after")
    N, T = len(signals), signals.shape[2]
    size = events.filter_size
    times = None if size is None else T + (size[1] - 1) * (events.boundary == "valid")
    if events.shape[0] != N or events.shape[2:] != (1, times):
        raise ValueError(
            f"events of maps {events.shape}: must be those of signals {tuple(signals.shape)}"
        )
    at = events.corners()[:, 1:] - before + torch.arange(width, device=events.value.device)
    at, image = at.to(signals.device), events.image.to(signals.device)
    inside = (at >= 0) & (at < T)
    # (M, width, C): an index in front of and behind a slice moves it to the end.
    cut = signals[image[:, None], :, at.clamp(0, T - 1)]
    cut = torch.where(inside[:, :, None], cut, torch.full_like(cut, fill))
    return cut.transpose(1, 2).contiguous()


def _only_row(images: Any, name: str, expected: str) -> Tensor:
    images = as_tensor(images, name)
    if images.ndim != 4 or images.shape[2] != 1:
        raise ValueError(f"{name} must have one row, {expected}, got {tuple(images.shape)}")
    return images[:, :, 0]
