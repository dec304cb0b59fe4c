"""Signals: recordings of several channels over time, with the learner and the solvers of images.

    N trials · C channels · T times · K atoms · L times of an atom
    signals (N, C, T) are images of one row (N, C, 1, T); atoms (K, C, L) are filters (K, C, 1, L)

Nothing here solves a problem. `as_images` and `as_signals` convert; `learn_filters`,
`learn_online`, `sparse_code` and `Learned` do the rest, with filter_size=(1, L). `windows` gives
`learn_online` pieces of a long recording, and `code_recording` codes it piece by piece. Codes
become events (`Solution.events`), around which `epochs` cuts the signals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deconvnet.filters.constraint import leading_pair
from deconvnet.operators.convolution import correlate, deconvolve
from deconvnet.sparse_coding.events import Events
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.sparse_coding.solve import default_solver, sparse_code
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import (
    FLOATS,
    as_filters,
    as_positive_integer,
    as_positive_number,
    as_tensor,
    check_settings,
)

# Times of a recording that are coded at once, and how far beyond them it is looked ahead, in
# lengths of an atom.
CHUNK, AHEAD = 2**16, 8


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
    return _only_row(as_tensor(images, "images"), "images", "(N, C, 1, T)")


def factors(filters: Any) -> tuple[Tensor, Tensor]:
    """Space u (K, C), of unit norm, and time v (K, L) of filters (K, C, 1, L) of rank 1: f = u v'.

    Of filters of a higher rank, those of the nearest filters of rank 1. The channel of u with the
    largest magnitude is positive.
    """
    f = as_tensor(filters, "filters")
    _only_row(f, "filters", "(K, C, 1, L)")
    f = as_signals(leading_pair(f))
    K = torch.arange(len(f), device=f.device)
    strongest = f.square().sum(2).argmax(1)
    v = f[K, strongest]
    u = (f * v[:, None]).sum(2)
    length = torch.linalg.vector_norm(u, dim=1, keepdim=True).clamp(min=1e-300)
    u = u / length
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


def windows(
    recording: Any, length: int, *, count: int, batch_size: int = 8, seed: int = 0
) -> Iterator[Tensor]:
    """Batches (n, C, 1, length) of windows at random times of a long recording (C, T).

    For `learn_online`: `count` windows in all, at most `batch_size` at a time. recording: anything
    with a shape that gives recording[:, i:j] as numbers, such as a tensor or a memory-mapped numpy
    array, of which only the windows are read; as float32, or float64 if it is.
    """
    C, T = _shape(recording)
    length, count = as_positive_integer(length, "length"), as_positive_integer(count, "count")
    batch_size = as_positive_integer(batch_size, "batch_size")
    if length > T:
        raise ValueError(f"length={length}: the recording has {T} times")
    starts = torch.randint(T - length + 1, (count,), generator=seeded_generator(seed, 1))
    for part in starts.split(batch_size):
        yield torch.stack([_piece(recording, i, i + length) for i in part.tolist()])[:, :, None]


@dataclass(frozen=True)
class RecordingCode:
    """The code of a long recording.

    events: at the minimum of the objective, up to the solver's accuracy, of maps (1, K, 1, T+L-1)
    with boundary "valid". objective: of the whole recording; gap: an upper bound on how far it is
    above the minimum of the whole recording.
    """

    events: Events
    objective: float
    gap: float

    def __repr__(self) -> str:
        share = self.gap / self.objective if self.objective > 0 else 0.0
        return (
            f"RecordingCode({len(self.events)} events, objective {self.objective:.6g}, at most "
            f"{share:.2%} above the minimum)"
        )


@plain
def code_recording(
    recording: Any,
    filters: Any,
    *,
    lam: float,
    non_negative: bool = False,
    settings: SolverSettings | None = None,
    chunk: int = CHUNK,
    ahead: int | None = None,
) -> RecordingCode:
    """The sparse code of a recording (C, T) of any length, in memory that does not grow with T.

        minimise over z      lam/2 ||sum_k f_k * z_k - y||^2 + sum |z|           as `sparse_code`

    recording: as in `windows`; filters: (K, C, 1, L). settings: by default those of
    `default_solver`. Only the events, which are the result, grow with the recording.

    It is coded from left to right, `chunk` times at once. What the codes so far paint into the
    times to come is subtracted from these, and each chunk is solved together with the next `ahead`
    times (by default 8 L), whose codes are then dropped and found again with the next chunk. So
    every code knows all those before it, and the error at a junction is the influence of what lies
    more than `ahead` times later, which falls geometrically. The gap measures it: it is computed
    for the whole recording, junctions included.
    """
    C, T = _shape(recording)
    like = _piece(recording, 0, 1)
    f = as_filters(filters, C).to(like)
    if f.shape[2] != 1:
        raise ValueError(f"filters must have one row, (K, {C}, 1, L), got {tuple(f.shape)}")
    lam = as_positive_number(lam, "lam")
    check_settings(settings, SolverSettings, "settings")
    K, L = f.shape[0], f.shape[3]
    chunk = as_positive_integer(chunk, "chunk")
    ahead = AHEAD * L if ahead is None else as_positive_integer(ahead, "ahead")
    if chunk < 2 * L:
        raise ValueError(f"chunk={chunk}: must be at least twice the length of an atom, {2 * L}")
    if T < L:
        raise ValueError(f"recording of {T} times: must not be shorter than the atoms of {L}")
    settings = settings or default_solver(like)
    certificate = _Certificate(f, lam, non_negative)
    parts: list[Events] = []
    begin, painted = 0, like.new_zeros(C, 0)  # the first map position that is not final
    while begin < T + L - 1:
        first = max(begin - L + 1, 0)  # the first time that this position paints
        last = min(T, begin + chunk + ahead)
        # The rest of the recording must not be shorter than an atom.
        last = T if T - last < L else last
        end = T + L - 1 if last == T else begin + chunk
        target = _piece(recording, first, last)
        y = target.clone()
        target[:, : painted.shape[1]] -= painted
        z = _coded(target, f, lam, non_negative, settings, known=begin - first)
        z[..., end - first :] = 0
        added = as_signals(deconvolve(z, f))[0]
        # Positions from `end` on paint no time before this one.
        final = T if last == T else end - L + 1
        residual = (target - added)[:, : final - first]
        certificate.add(y[:, : final - first], residual, z, is_last=last == T)
        parts.append(Events.of_maps(z, filter_size=(1, L), boundary="valid"))
        parts[-1] = replace(parts[-1], column=parts[-1].column + first, shape=(1, K, 1, T + L - 1))
        painted = added[:, final - first : end - first]
        begin = end
    objective, gap = certificate.values()
    return RecordingCode(_joined(parts), objective, gap)


def _coded(
    target: Tensor,
    f: Tensor,
    lam: float,
    non_negative: bool,
    settings: SolverSettings,
    *,
    known: int,
) -> Tensor:
    """The maps (1, K, 1, T+L-1) of a target (C, T); the first `known` positions are zero, since
    what they paint is subtracted from the target."""
    weights = None
    if known:
        K, L = f.shape[0], f.shape[3]
        weights = target.new_ones(1, K, 1, target.shape[1] + L - 1)
        # No correlation with the target exceeds the product of norms.
        longest = torch.linalg.vector_norm(f, dim=(1, 2, 3)).max()
        weights[..., :known] = 1 + 2 * lam * longest * torch.linalg.vector_norm(target)
    solution = sparse_code(
        target[None, :, None],
        f,
        lam=lam,
        weights=weights,
        non_negative=non_negative,
        settings=settings,
    )
    z = solution.z.clone()
    z[..., :known] = 0
    return z


class _Certificate:
    """Objective and duality gap of a recording, from the parts of its residual in order."""

    def __init__(self, f: Tensor, lam: float, non_negative: bool):
        self.f, self.lam, self.non_negative = f, lam, non_negative
        self.squares = self.products = self.sparsity = self.largest = 0.0
        # The residual of the last L-1 times, with which those that follow are correlated.
        self.before = f.new_zeros(f.shape[1], f.shape[3] - 1)

    def add(self, y: Tensor, residual: Tensor, z: Tensor, *, is_last: bool) -> None:
        """The next times (C, t) of the recording, with their residual, and the maps that were
        found with them."""
        self.squares += float(residual.double().square().sum())
        self.products += float((y.double() * residual.double()).sum())
        self.sparsity += float(z.double().abs().sum())
        known = torch.cat([self.before, residual], 1)
        reach = self.f.shape[3] - 1
        correlations = correlate(known[None, :, None], self.f)[..., reach:]
        correlations = correlations if is_last else correlations[..., : residual.shape[1]]
        correlations = correlations if self.non_negative else correlations.abs()
        if correlations.numel():
            self.largest = max(self.largest, float(correlations.max()))
        self.before = known[:, known.shape[1] - reach :]

    def values(self) -> tuple[float, float]:
        """The objective, and the gap to the dual objective at the residual scaled to be feasible
        (`duality_gap`)."""
        lam, scale = self.lam, 1 / max(1.0, self.lam * self.largest)
        objective = lam / 2 * self.squares + self.sparsity
        dual = lam * (scale * self.products - scale**2 / 2 * self.squares)
        return objective, max(objective - dual, 0.0)


def _joined(parts: list[Events]) -> Events:
    """The events of several parts, sorted by map and time."""
    names = ("image", "map", "row", "column", "value")
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    order = (columns["map"] * parts[0].shape[3] + columns["column"]).argsort()
    return replace(parts[0], **{name: column[order] for name, column in columns.items()})


def _only_row(images: Tensor, name: str, expected: str) -> Tensor:
    if images.ndim != 4 or images.shape[2] != 1:
        raise ValueError(f"{name} must have one row, {expected}, got {tuple(images.shape)}")
    return images[:, :, 0]


def _shape(recording: Any) -> tuple[int, int]:
    shape = tuple(getattr(recording, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"recording must have the shape (C, T), channels and times, not empty, got {shape}"
        )
    return shape


def _piece(recording: Any, first: int, last: int) -> Tensor:
    """Times of a recording as a tensor (C, t), float32 or float64, not shared with it."""
    piece = recording[:, first:last]
    if not isinstance(piece, Tensor):
        piece = np.ascontiguousarray(piece)
    piece = as_tensor(piece, "recording")
    piece = piece.clone() if piece.dtype in FLOATS else piece.float()
    if not torch.isfinite(piece).all():
        raise ValueError(
            f"recording: times {first} to {first + piece.shape[1] - 1} have NaN or infinite values"
        )
    return piece
