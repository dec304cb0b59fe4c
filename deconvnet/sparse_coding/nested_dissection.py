"""Cholesky factors of a sparse matrix whose unknowns have places in a plane.

Unknowns interact only within a few rows and columns of each other, so a strip of unknowns as wide
as that separates those on its two sides. If the strip comes last, the sides are eliminated one by
one, and each is divided in the same way (nested dissection, George 1973). All arithmetic is then in
dense blocks, which takes less time than a general sparse solver, and half its memory.

    n unknowns   A (n, n), symmetric and positive definite   R'R = A, R upper triangular
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# At most this many unknowns are not divided further.
LEAF = 64


@dataclass(frozen=True)
class Part:
    """Unknowns begin, ..., end - 1 in the order of elimination, which separate the children."""

    begin: int
    end: int
    children: tuple[int, ...]


def dissect(i: np.ndarray, j: np.ndarray, reach: tuple[int, int]) -> tuple[np.ndarray, list[Part]]:
    """(order (n,), parts): an order in which to eliminate unknowns at row i and column j (n,).

    reach: unknowns interact if they are at most so many rows and columns apart. Children come
    before the part that separates them.
    """
    order, parts = [], []

    def divide(index: np.ndarray) -> int:
        first, second, last = _halves(i, j, reach, index)
        children = tuple(divide(half) for half in (first, second) if len(half))
        begin = parts[children[-1]].end if children else sum(map(len, order))
        order.append(last)
        parts.append(Part(begin, begin + len(last), children))
        return len(parts) - 1

    if len(i):
        divide(np.arange(len(i)))
    return np.concatenate([*order, np.zeros(0, np.int64)]).astype(np.int64), parts


def _halves(
    i: np.ndarray, j: np.ndarray, reach: tuple[int, int], index: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two halves of some unknowns that do not interact, and those between them; or all in one."""
    nothing = index[:0]
    # Across the longer side, in units of the width of a strip.
    sides = [(np.ptp(x[index]) / max(r, 1), x[index], r) for x, r in ((i, reach[0]), (j, reach[1]))]
    extent, x, width = max(sides, key=lambda side: side[0])
    if len(index) <= LEAF or extent < 2:
        return nothing, nothing, index
    begin = int(np.median(x)) - width // 2
    first, second = x < begin, x >= begin + width
    if not first.any() or not second.any():
        return nothing, nothing, index
    return index[first], index[second], index[~first & ~second]


class Cholesky:
    """The factors of A + shift I, and the solution of systems with it.

    A: in the order of `dissect`, with sorted or unsorted columns; parts: as `dissect` returns them.
    """

    def __init__(self, A: csr_matrix, parts: list[Part], shift: float):
        self.parts = parts
        # Of each part: the unknowns after it that it interacts with, R of its own unknowns, and the
        # columns of R of the others.
        self.after: list[np.ndarray] = []
        self.diagonal: list[np.ndarray] = []
        self.beside: list[np.ndarray] = []
        pending: dict[int, np.ndarray] = {}  # what remains of children, for their parent
        place = np.zeros(A.shape[0], np.int64)
        for number, part in enumerate(parts):
            self._eliminate(A, number, part, shift, pending, place)

    def _eliminate(
        self,
        A: csr_matrix,
        number: int,
        part: Part,
        shift: float,
        pending: dict[int, np.ndarray],
        place: np.ndarray,
    ) -> None:
        from scipy.linalg.blas import dsyrk, dtrsm
        from scipy.linalg.lapack import dpotrf

        begin, end = part.begin, part.end
        entries = slice(A.indptr[begin], A.indptr[end])
        rows = np.repeat(np.arange(end - begin), np.diff(A.indptr[begin : end + 1]))
        columns, values = A.indices[entries], A.data[entries]
        after = _later(end, A.shape[0], columns, [self.after[child] for child in part.children])
        place[after] = np.arange(len(after))
        own = np.zeros((end - begin, end - begin), order="F")
        beside = np.zeros((end - begin, len(after)), order="F")
        rest = np.zeros((len(after), len(after)), order="F")
        mine, later = (columns >= begin) & (columns < end), columns >= end
        own[rows[mine], columns[mine] - begin] = values[mine]
        beside[rows[later], place[columns[later]]] = values[later]
        for child in part.children:
            ahead, left = self.after[child], pending.pop(child)
            split = np.searchsorted(ahead, end)
            here, there = ahead[:split] - begin, place[ahead[split:]]
            # By columns, since LAPACK stores them one after another.
            own.T[np.ix_(here, here)] += left.T[:split, :split]
            beside.T[np.ix_(there, here)] += left.T[split:, :split]
            rest.T[np.ix_(there, there)] += left.T[split:, split:]
        if end > begin:  # else nothing lies between the children
            own[np.diag_indices(end - begin)] += shift
            own, info = dpotrf(own, overwrite_a=1)
            if info:
                raise np.linalg.LinAlgError("the matrix is not positive definite")
        if end > begin and len(after):
            beside = dtrsm(1.0, own, beside, trans_a=1, overwrite_b=1)
            rest = dsyrk(-1.0, beside, beta=1.0, c=rest, trans=1, overwrite_c=1)
        self.after.append(after)
        self.diagonal.append(own)
        self.beside.append(beside)
        pending[number] = rest

    def solve(self, b: np.ndarray) -> np.ndarray:
        """x with (A + shift I) x = b (n,), in the order of `dissect`."""
        from scipy.linalg.blas import dtrsv

        x = np.array(b, np.float64)
        blocks = zip(self.parts, self.after, self.diagonal, self.beside, strict=True)
        blocks = [block for block in blocks if block[0].end > block[0].begin]
        for part, after, R, beside in blocks:
            x[part.begin : part.end] = dtrsv(R, x[part.begin : part.end], trans=1)
            x[after] -= x[part.begin : part.end] @ beside
        for part, after, R, beside in reversed(blocks):
            x[part.begin : part.end] = dtrsv(R, x[part.begin : part.end] - beside @ x[after])
        return x


def _later(end: int, n: int, columns: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """The unknowns from `end` on among some columns and others, in order."""
    marked = np.zeros(n - end, bool)
    for array in (columns, *others):
        marked[array[array >= end] - end] = True
    return np.flatnonzero(marked) + end
