"""Compiled loops that paint and correlate maps only where their values are, on the CPU.

    V values of the maps of one image · K maps · C channels · h, w filter
    frame (C, rows + h-1, Q): an image with the border that filters reach, Q = columns + w-1
    F (K, w B): the filters column by column; the h C numbers of a column lie together, B >= h C

A line holds the h rows of the frame below one row of the maps, column by column: Q B numbers. In
it a filter is one contiguous run, so that a value is painted, or correlated, by a single long loop,
and four values at the same place share their loads and stores. A line stays in the fastest cache
for all values of its row.

The order of every sum is determined by the image alone.
"""

from __future__ import annotations

import numpy as np

from deconvnet.support.compiling import compiled

# Sums may be reordered, but NaNs must propagate.
_compiled = compiled(
    fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy", nogil=True
)

# Maps are searched for values so many numbers at a time.
_BLOCK = 64


@_compiled
def strongest(z, window, switches):
    """Set switches (K', H', W') to the flat index into z (K, H, W) of each window's largest
    magnitude, or of a NaN.
    """
    (K, H, W), (group, h, w) = z.shape, window
    best, where = np.empty(W, z.dtype), np.empty(W, np.int64)
    for g in range(switches.shape[0]):
        for m in range(switches.shape[1]):
            best[:], where[:] = -1, 0
            for k in range(g * group, min((g + 1) * group, K)):
                for i in range(m * h, min((m + 1) * h, H)):
                    row, start = z[k, i], (k * H + i) * W
                    for j in range(W):
                        x = abs(row[j])
                        better = (x > best[j]) | (x != x)
                        best[j] = x if better else best[j]
                        where[j] = start if better else where[j]
            for n in range(switches.shape[2]):
                top = n * w
                for j in range(n * w + 1, min((n + 1) * w, W)):
                    if best[j] > best[top] or best[j] != best[j]:
                        top = j
                switches[g, m, n] = where[top] + top


@_compiled
def nonzero(z):
    """The indices (V,) of the non-zero numbers of z (n,)."""
    blocks = -(-len(z) // _BLOCK)
    indices, count = np.empty(0, np.int64), 0
    for _ in range(2):
        v = 0
        for b in range(blocks):
            block = z[b * _BLOCK : (b + 1) * _BLOCK]
            # A sum of magnitudes takes an eighth of the time of comparing them.
            total = z.dtype.type(0)
            for i in range(len(block)):
                total += abs(block[i])
            if total != 0:
                for i in range(len(block)):
                    if block[i] != 0:
                        if count:
                            indices[v] = b * _BLOCK + i
                        v += 1
        if not count:
            indices, count = np.empty(v, np.int64), v
    return indices


@_compiled
def by_place(indices, rows, columns):
    """(starts, k, j, order): values at flat indices (V,) of maps (K, rows, columns), by place.

    The values in row i have the numbers starts[i] to starts[i + 1]; k, j (V,) are their maps and
    columns, order (V,) their numbers before sorting.
    """
    places, V = rows * columns, len(indices)
    free = np.zeros(places + 1, np.int64)
    for v in range(V):
        free[indices[v] % places + 1] += 1
    for p in range(places):
        free[p + 1] += free[p]
    starts = free[::columns].copy()
    k, j, order = np.empty(V, np.int32), np.empty(V, np.int32), np.empty(V, np.int32)
    for v in range(V):
        map_, p = divmod(indices[v], places)
        at = free[p]
        k[at], j[at], order[at] = map_, p % columns, v
        free[p] += 1
    return starts, k, j, order


@_compiled
def paint(frame, F, size, values, starts, k, j, order):
    """Add values (V,), in their order before sorting, times their filters to the frame.

    size: (h, w).
    """
    (C, _, Q), n, (h, w) = frame.shape, F.shape[1], size
    B = n // w
    line = np.empty(Q * B, frame.dtype)
    for i in range(len(starts) - 1):
        a, b = starts[i], starts[i + 1]
        if a == b:
            continue
        line[:] = 0
        while a < b:
            run = line[j[a] * B : j[a] * B + n]
            if a + 3 < b and j[a + 3] == j[a]:
                f0, f1, f2, f3 = F[k[a]], F[k[a + 1]], F[k[a + 2]], F[k[a + 3]]
                x0, x1 = values[order[a]], values[order[a + 1]]
                x2, x3 = values[order[a + 2]], values[order[a + 3]]
                for e in range(n):
                    run[e] += (x0 * f0[e] + x1 * f1[e]) + (x2 * f2[e] + x3 * f3[e])
                a += 4
            else:
                f, x = F[k[a]], values[order[a]]
                for e in range(n):
                    run[e] += x * f[e]
                a += 1
        for u in range(h):
            for c in range(C):
                row = frame[c, i + u]
                for q in range(Q):
                    row[q] += line[q * B + u * C + c]


@_compiled
def correlate_at(frame, F, size, values, starts, k, j, order):
    """Set values (V,), in their order before sorting, to the correlations of filters and frame."""
    (C, _, Q), n, (h, w) = frame.shape, F.shape[1], size
    B = n // w
    line = np.zeros(Q * B, frame.dtype)
    for i in range(len(starts) - 1):
        a, b = starts[i], starts[i + 1]
        if a == b:
            continue
        for u in range(h):
            for c in range(C):
                row = frame[c, i + u]
                for q in range(Q):
                    line[q * B + u * C + c] = row[q]
        while a < b:
            run = line[j[a] * B : j[a] * B + n]
            if a + 3 < b and j[a + 3] == j[a]:
                f0, f1, f2, f3 = F[k[a]], F[k[a + 1]], F[k[a + 2]], F[k[a + 3]]
                x0 = x1 = x2 = x3 = frame.dtype.type(0)
                for e in range(n):
                    x0 += run[e] * f0[e]
                    x1 += run[e] * f1[e]
                    x2 += run[e] * f2[e]
                    x3 += run[e] * f3[e]
                values[order[a]], values[order[a + 1]] = x0, x1
                values[order[a + 2]], values[order[a + 3]] = x2, x3
                a += 4
            else:
                f, x = F[k[a]], frame.dtype.type(0)
                for e in range(n):
                    x += run[e] * f[e]
                values[order[a]] = x
                a += 1
