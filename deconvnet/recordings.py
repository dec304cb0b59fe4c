"""Long recordings: windows to learn from, and a code found piece by piece.

    C channels · T times · K atoms · L times of an atom
    y recording (C, T)   f filters (K, C, 1, L)   z maps (1, K, 1, T+L-1), as in `signals`

The maps of a recording of 10^7 times would not fit into memory, but its events do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import correlate, deconvolve
from deconvnet.signals import as_signals
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
    K, L = f.shape[0], f.shape[3]
    lam, chunk = as_positive_number(lam, "lam"), as_positive_integer(chunk, "chunk")
    check_settings(settings, SolverSettings, "settings")
    if chunk < 2 * L:
        raise ValueError(f"chunk={chunk}: must be at least twice the length of an atom, {2 * L}")
    if T < L:
        raise ValueError(f"recording of {T} times: must not be shorter than the atoms of {L}")
    pieces = _coded_pieces(
        recording,
        f,
        lam,
        non_negative,
        settings or default_solver(like),
        chunk,
        AHEAD * L if ahead is None else as_positive_integer(ahead, "ahead"),
    )
    certificate, parts = _Certificate(f, lam, non_negative), []
    for piece in pieces:
        certificate.add(piece)
        part = Events.of_maps(piece.z, filter_size=(1, L), boundary="valid")
        column = part.column + piece.first
        parts.append(replace(part, column=column, shape=(1, K, 1, T + L - 1)))
    objective, gap = certificate.values()
    return RecordingCode(_joined(parts), objective, gap)


@dataclass(frozen=True)
class _Piece:
    """A part of the code: the maps z (1, K, 1, t+L-1) that were found with it, zero elsewhere, of
    times from `first` on; and the next times (C, ...) of the recording that no later code paints,
    with their residual."""

    z: Tensor
    first: int
    y: Tensor
    residual: Tensor
    is_last: bool


def _coded_pieces(
    recording: Any,
    f: Tensor,
    lam: float,
    non_negative: bool,
    settings: SolverSettings,
    chunk: int,
    ahead: int,
) -> Iterator[_Piece]:
    """The code of a recording, `chunk` positions of the maps after another."""
    (C, T), L = _shape(recording), f.shape[3]
    begin, end = 0, 0  # positions of the maps: those of this piece
    painted = f.new_zeros(C, 0)  # by earlier pieces, into the first times of this one
    while end < T + L - 1:
        begin = end
        first = max(begin - L + 1, 0)  # the first time that position `begin` paints
        last = begin + chunk + ahead
        # What is left of the recording must not be shorter than an atom.
        is_last = last > T - L
        last, end = (T, T + L - 1) if is_last else (last, begin + chunk)
        y = _piece(recording, first, last)
        target = y.clone()
        target[:, : painted.shape[1]] -= painted
        z = _coded(target, f, lam, non_negative, settings, known=begin - first)
        z[..., end - first :] = 0
        added = as_signals(deconvolve(z, f))[0]
        # Positions from `end` on paint no time before this one.
        final = (T if is_last else end - L + 1) - first
        yield _Piece(z, first, y[:, :final], (target - added)[:, :final], is_last)
        painted = added[:, final : end - first]


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

    def add(self, piece: _Piece) -> None:
        residual = piece.residual
        self.squares += float(residual.double().square().sum())
        self.products += float((piece.y.double() * residual.double()).sum())
        self.sparsity += float(piece.z.double().abs().sum())
        known = torch.cat([self.before, residual], 1)
        reach = self.f.shape[3] - 1
        correlations = correlate(known[None, :, None], self.f)[..., reach:]
        if not piece.is_last:
            correlations = correlations[..., : residual.shape[1]]
        correlations = correlations if self.non_negative else correlations.abs()
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
