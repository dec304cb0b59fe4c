"""Long recordings: windows to learn from, and a code found piece by piece.

    C channels · T times · K atoms · L times of an atom
    y recording (C, T)   M mask (C, T)   f filters (K, C, 1, L)
    z maps (1, K, 1, T+L-1), as in `signals`

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
from deconvnet.operators.linear import Deconvolution
from deconvnet.signals import as_signals
from deconvnet.sparse_coding.events import Events
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.sparse_coding.solve import (
    check_lam_ratio,
    default_solver,
    lam_of_largest,
    relative_schedule,
    sparse_code,
)
from deconvnet.support.seeding import seeded_generator
from deconvnet.support.torch_modes import plain
from deconvnet.support.validation import (
    FLOATS,
    as_filters,
    as_number,
    as_positive_integer,
    as_positive_number,
    as_tensor,
    as_weights,
    check_settings,
)

# Times of a recording that are coded at once, and how far beyond them it is looked ahead, in
# lengths of an atom.
CHUNK, AHEAD = 2**16, 8


def windows(
    recording: Any,
    length: int,
    *,
    count: int,
    mask: Any = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """Batches (n, C, 1, length) of windows at random times of a long recording (C, T).

    For `learn_online`: `count` windows in all, at most `batch_size` at a time. recording: anything
    with a shape that gives recording[:, i:j] as numbers, such as a tensor or a memory-mapped numpy
    array, of which only the windows are read; as float32, or float64 if it is. mask: as in
    `code_recording`; batches are then pairs of images and masks, for learn_online(..., mask=True).
    """
    data = _Recording.of(recording, mask)
    T = data.shape[1]
    length, count = as_positive_integer(length, "length"), as_positive_integer(count, "count")
    batch_size = as_positive_integer(batch_size, "batch_size")
    if length > T:
        raise ValueError(f"length={length}: the recording has {T} times")
    starts = torch.randint(T - length + 1, (count,), generator=seeded_generator(seed, 1))
    for part in starts.split(batch_size):
        pieces = [data.piece(i, i + length) for i in part.tolist()]
        images, masks = (torch.stack(parts)[:, :, None] for parts in zip(*pieces, strict=True))
        yield images if mask is None else (images, masks)


@dataclass(frozen=True)
class RecordingCode:
    """The code of a long recording.

    events: at the minimum of the objective, up to the solver's accuracy, of maps (1, K, 1, T+L-1)
    with boundary "valid". objective: of the whole recording; gap: an upper bound on how far it is
    above the minimum of the whole recording (None for p < 1); lam: the weight that was used.
    """

    events: Events
    objective: float
    gap: float | None
    lam: float

    def __repr__(self) -> str:
        line = f"RecordingCode({len(self.events)} events, objective {self.objective:.6g}"
        if self.gap is None:
            return f"{line})"
        share = self.gap / self.objective if self.objective > 0 else 0.0
        return f"{line}, at most {share:.2%} above the minimum)"


@plain
def code_recording(
    recording: Any,
    filters: Any,
    *,
    lam: float | None = None,
    lam_ratio: float | None = None,
    p: float = 1.0,
    mask: Any = None,
    weights: Any = None,
    group: int = 1,
    non_negative: bool = False,
    settings: SolverSettings | None = None,
    chunk: int = CHUNK,
    ahead: int | None = None,
) -> RecordingCode:
    """The sparse code of a recording (C, T) of any length, in memory that does not grow with T.

        minimise over z      lam/2 ||mask * (sum_k f_k * z_k - y)||^2 + prior(z)   as `sparse_code`

    recording: as in `windows`; filters: (K, C, 1, L). lam, or lam_ratio relative to the lambda_max
    of the whole recording, which is then read twice. mask: (C or 1, T), >= 0, anything that gives
    mask[:, i:j]; times where it is 0 are ignored and may have any value. weights: (K,), one for
    each atom. p, group, non_negative: as in `sparse_code`. settings: by default those of
    `default_solver`. Only the events, which are the result, grow with the recording. Raises
    ValueError if an argument is out of range or does not fit the others.

    It is coded from left to right, `chunk` times at once. What the codes so far paint into the
    times to come is subtracted from these, and each chunk is solved together with the next `ahead`
    times (by default 8 L), whose codes are then dropped and found again with the next chunk. So
    every code knows all those before it, and the error at a junction is the influence of what lies
    more than `ahead` times later, which falls geometrically. The gap measures it: it is computed
    for the whole recording, junctions included. For p < 1, where there are many local minima and no
    gap, it is another local minimum than that of `sparse_code`, about as good.
    """
    data = _Recording.of(recording, mask)
    C, T = data.shape
    like, _ = data.piece(0, 1)
    f = as_filters(filters, C).to(like)
    if f.shape[2] != 1:
        raise ValueError(f"filters must have one row, (K, {C}, 1, L), got {tuple(f.shape)}")
    K, L = f.shape[0], f.shape[3]
    if (lam is None) == (lam_ratio is None):
        raise ValueError(f"lam={lam}, lam_ratio={lam_ratio}: give one of the two")
    prior = _prior(p, weights, group, non_negative, like, K)
    chunk = as_positive_integer(chunk, "chunk")
    check_settings(settings, SolverSettings, "settings")
    if chunk < 2 * L:
        raise ValueError(f"chunk={chunk}: must be at least twice the length of an atom, {2 * L}")
    if T < L:
        raise ValueError(f"recording of {T} times: must not be shorter than the atoms of {L}")
    settings = settings or default_solver(like, prior.p)
    if lam_ratio is None:
        lam = as_positive_number(lam, "lam")
    else:
        check_lam_ratio(lam_ratio)
        lam = lam_of_largest(_largest_correlation(data, f, prior, chunk), lam_ratio, f.dtype)
        settings = relative_schedule(settings, Deconvolution(f), lam, lam_ratio)
    ahead = AHEAD * L if ahead is None else as_positive_integer(ahead, "ahead")
    coder = _Coder(f, lam, prior, settings)
    certificate, parts = _Certificate(f, lam, prior), []
    for piece in _coded_pieces(data, coder, chunk, ahead):
        certificate.add(piece)
        part = Events.of_maps(piece.z, filter_size=(1, L), boundary="valid")
        column = part.column + piece.first
        parts.append(replace(part, column=column, shape=(1, K, 1, T + L - 1)))
    return RecordingCode(_joined(parts), *certificate.values(), lam)


def _prior(p: float, weights: Any, group: int, non_negative: bool, like: Tensor, K: int) -> Prior:
    weights = None if weights is None else as_weights(weights).to(like)
    if weights is not None and tuple(weights.shape) != (K,):
        raise ValueError(
            f"weights of shape {tuple(weights.shape)}: expected ({K},), one for each atom"
        )
    p, group = as_number(p, "p"), as_positive_integer(group, "group")
    prior = Prior(p, weights=weights, group=group, non_negative=non_negative)
    prior.check((1, K, 1, 1))
    return prior


@dataclass(frozen=True)
class _Recording:
    """A recording (C, T) and its mask, which are read piece by piece."""

    y: Any
    mask: Any
    shape: tuple[int, int]

    @classmethod
    def of(cls, recording: Any, mask: Any) -> _Recording:
        shape = tuple(getattr(recording, "shape", ()))
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"recording must have the shape (C, T), channels and times, not empty, got {shape}"
            )
        of_mask = tuple(getattr(mask, "shape", ()))
        if mask is not None and of_mask not in (shape, (1, shape[1])):
            raise ValueError(
                f"mask of shape {of_mask} does not fit a recording of shape {shape}: expected "
                f"{shape} or {(1, shape[1])}"
            )
        return cls(recording, mask, shape)

    def piece(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Some times and their mask, (C, t) each, float32 or float64, not shared with what is
        read. The recording is 0 where the mask is.
        """
        y = _read(self.y, first, last, "recording")
        mask = torch.ones_like(y)
        if self.mask is not None:
            mask = _read(self.mask, first, last, "mask").to(y).expand_as(y)
            y = torch.where(mask > 0, y, torch.zeros_like(y))
        times = f"times {first} to {first + y.shape[1] - 1}"
        if not torch.isfinite(y).all():
            where = "" if self.mask is None else " where the mask is not 0"
            raise ValueError(f"recording: {times} have NaN or infinite values{where}")
        if not ((mask >= 0) & torch.isfinite(mask)).all():
            raise ValueError(f"mask: {times} have values that are negative or not finite")
        return y, mask


def _read(array: Any, first: int, last: int, name: str) -> Tensor:
    piece = array[:, first:last]
    if not isinstance(piece, Tensor):
        piece = np.ascontiguousarray(piece)
    piece = as_tensor(piece, name)
    return piece.clone() if piece.dtype in FLOATS else piece.float()


@dataclass(frozen=True)
class _Coder:
    """Codes a target that the codes before it have already explained a part of."""

    f: Tensor
    lam: float
    prior: Prior
    settings: SolverSettings

    def __call__(self, target: Tensor, mask: Tensor, *, known: int) -> Tensor:
        """The maps (1, K, 1, T+L-1) of a target (C, T); the first `known` positions are zero, since
        what they paint is subtracted from the target."""
        prior = self.prior
        weights = prior.weights
        if known:
            K, L = self.f.shape[0], self.f.shape[3]
            base = target.new_ones(K) if weights is None else weights
            weights = base.view(1, K, 1, 1).repeat(1, 1, 1, target.shape[1] + L - 1)
            weights[..., :known] = 1 + 2 * self._most(mask * target, mask)
        solution = sparse_code(
            target[None, :, None],
            self.f,
            lam=self.lam,
            p=prior.p,
            mask=None if (mask == 1).all() else mask[None, :, None],
            weights=weights,
            group=prior.group,
            non_negative=prior.non_negative,
            settings=self.settings,
        )
        z = solution.z.clone()
        z[..., :known] = 0
        return z

    def _most(self, seen: Tensor, mask: Tensor) -> float:
        """A weight above which no coefficient pays.

        A coefficient z gains at most lam z c, where c is the product of the norms of what is seen
        and of its atom, and only up to z = 2 c / ||f||^2; it costs w |z|^p.
        """
        p, group = self.prior.p, self.prior.group
        longest = torch.linalg.vector_norm(self.f, dim=(1, 2, 3)).max() * mask.max() * group
        norm = torch.linalg.vector_norm(seen)
        return float(self.lam * (2 * norm) ** (1 - p) * longest**p * norm)


@dataclass(frozen=True)
class _Piece:
    """A part of the code: the maps z (1, K, 1, t+L-1) that were found with it, zero elsewhere, of
    times from `first` on; and the next times (C, ...) of the recording that no later code paints,
    with their mask and what is left of them; both times the mask."""

    z: Tensor
    first: int
    y: Tensor
    residual: Tensor
    mask: Tensor
    is_last: bool


def _coded_pieces(data: _Recording, coder: _Coder, chunk: int, ahead: int) -> Iterator[_Piece]:
    """The code of a recording, `chunk` positions of the maps after another."""
    (C, T), L = data.shape, coder.f.shape[3]
    begin, end = 0, 0  # positions of the maps: those of this piece
    painted = coder.f.new_zeros(C, 0)  # by earlier pieces, into the first times of this one
    while end < T + L - 1:
        begin = end
        first = max(begin - L + 1, 0)  # the first time that position `begin` paints
        last = begin + chunk + ahead
        # What is left of the recording must not be shorter than an atom.
        is_last = last > T - L
        last, end = (T, T + L - 1) if is_last else (last, begin + chunk)
        y, mask = data.piece(first, last)
        target = y.clone()
        target[:, : painted.shape[1]] -= painted
        z = coder(target, mask, known=begin - first)
        z[..., end - first :] = 0
        added = as_signals(deconvolve(z, coder.f))[0]
        # Positions from `end` on paint no time before this one.
        final = (T if is_last else end - L + 1) - first
        residual = (mask * (target - added))[:, :final]
        yield _Piece(z, first, (mask * y)[:, :final], residual, mask[:, :final], is_last)
        painted = added[:, final : end - first]


class _Correlations:
    """The correlations of atoms with a signal (C, T) that comes in consecutive parts."""

    def __init__(self, f: Tensor):
        self.f = f
        # The last L-1 times, with which those that follow are correlated.
        self.before = f.new_zeros(f.shape[1], f.shape[3] - 1)

    def add(self, part: Tensor, *, is_last: bool) -> Tensor:
        """(1, K, 1, t): those that this part (C, t) completes; of the last part, all of them."""
        known = torch.cat([self.before, part], 1)
        reach = self.f.shape[3] - 1
        self.before = known[:, known.shape[1] - reach :]
        correlations = correlate(known[None, :, None], self.f)[..., reach:]
        return correlations if is_last else correlations[..., : part.shape[1]]


def _largest_correlation(data: _Recording, f: Tensor, prior: Prior, chunk: int) -> float:
    """The dual norm of the correlations with the whole recording, lambda_max."""
    correlations, largest, T = _Correlations(f), 0.0, data.shape[1]
    for first in range(0, T, chunk):
        last = min(first + chunk, T)
        y, mask = data.piece(first, last)
        part = correlations.add(mask.square() * y, is_last=last == T)
        largest = max(largest, float(prior.dual_norm(part)))
    return largest


class _Certificate:
    """Objective and duality gap of a recording, from the parts of its residual in order."""

    def __init__(self, f: Tensor, lam: float, prior: Prior):
        self.lam, self.prior, self.correlations = lam, prior, _Correlations(f)
        self.squares = self.products = self.sparsity = self.largest = 0.0

    def add(self, piece: _Piece) -> None:
        residual = piece.residual
        self.squares += float(residual.double().square().sum())
        self.products += float((piece.y.double() * residual.double()).sum())
        self.sparsity += float(self.prior.value(piece.z))
        if self.prior.convex:
            part = self.correlations.add(piece.mask * residual, is_last=piece.is_last)
            self.largest = max(self.largest, float(self.prior.dual_norm(part)))

    def values(self) -> tuple[float, float | None]:
        """The objective, and the gap to the dual objective at the residual scaled to be feasible
        (`duality_gap`)."""
        objective = self.lam / 2 * self.squares + self.sparsity
        if not self.prior.convex:
            return objective, None
        scale = 1 / max(1.0, self.lam * self.largest)
        dual = self.lam * (scale * self.products - scale**2 / 2 * self.squares)
        return objective, max(objective - dual, 0.0)


def _joined(parts: list[Events]) -> Events:
    """The events of several parts, sorted by map and time."""
    names = ("image", "map", "row", "column", "value")
    columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    order = (columns["map"] * parts[0].shape[3] + columns["column"]).argsort()
    return replace(parts[0], **{name: column[order] for name, column in columns.items()})
