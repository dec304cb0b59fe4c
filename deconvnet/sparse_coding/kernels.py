"""Compiled loops over the non-zero coefficients of sparse maps, on the CPU.

    r residual (C, H, W)   c correlations (K, rows, columns)   G maps of a group

The boundary enters these loops only through the `Footprint` of each axis. They release the
interpreter's lock, so that threads may share the work. One compiled form serves filters of all
sizes, one for float32 and one for float64, and is cached on disk if possible
(support/compiling.py); only the sweeps over groups have another than those over single maps. To
compile quickly, loops create no arrays, so that numba counts no references.
"""

from __future__ import annotations

import numpy as np

from deconvnet.sparse_coding.tap_loops import correlate_at, paint_at
from deconvnet.support.atomics import observe, publish
from deconvnet.support.compiling import compiled
from deconvnet.support.vectors import (
    BLOCK,
    FILTERS,
    LANES,
    correlate_block,
    fill,
    load,
    load_first,
    magnitude,
    multiply,
    multiply_add,
    square_root,
    store,
    total,
    where_greater,
)

# Sums may be reordered, but NaNs must propagate.
_MATH = {"reassoc", "contract", "arcp", "nsz"}
OPTIONS = dict(fastmath=_MATH, error_model="numpy", nogil=True, no_cfunc_wrapper=True, _nrt=False)
_compiled = compiled(**OPTIONS)
# How often a thread asks for the progress of another before it yields the processor.
_PATIENCE = 1000
# Inlined into the caller. A separate function would cost a call per coefficient, and the process
# that compiles it would run a copy that sums in another order than the one that other processes
# load from disk.
_inlined = compiled(**OPTIONS, forceinline=True, no_cpython_wrapper=True)
# Without that freedom, all copies compute the same bits, and a function may be separate.
_EXACT = dict(OPTIONS, fastmath=False, no_cpython_wrapper=True)
_separate, _exact = compiled(**_EXACT), compiled(**_EXACT, forceinline=True)


@_exact
def _shrunk(magnitude, beta, p):
    """argmin_x |x|^p + beta/2 (x - magnitude)^2 for a magnitude >= 0 and p < 1; see `prior`."""
    smallest = (2 * (1 - p) / beta) ** (1 / (2 - p))
    if magnitude <= smallest + p / beta * smallest ** (p - 1):
        return 0 * magnitude
    x = magnitude
    if p > 0:
        for _ in range(6):
            slope = p * x ** (p - 1)
            x -= (slope + beta * (x - magnitude)) / (beta - (1 - p) * slope / x)
    return x


def active(z, G):
    """(g, i, j) of the groups in maps z (K, rows, columns) that are not all zero."""
    nonzero = z != 0
    if G > 1:
        nonzero = nonzero.reshape(-1, G, *z.shape[1:]).any(1)
    # On a flat array numpy searches ten times as fast.
    positions = np.unravel_index(np.flatnonzero(nonzero), nonzero.shape)
    return tuple(index.astype(np.int32) for index in positions)


@_compiled
def strongest(c, inverse, best, which, top, bottom):
    """best (rows, columns): the largest magnitude times `inverse` (groups,) over the groups at each
    position, and `which` group has it; from row `top` to row `bottom`. c (groups, rows, columns):
    correlations, or their lengths.
    """
    for i in range(top, bottom):
        for j in range(c.shape[2]):
            best[i, j], which[i, j] = 0, 0
        for g in range(c.shape[0]):
            for j in range(c.shape[2]):
                v = abs(c[g, i, j]) * inverse[g]
                if v > best[i, j]:
                    best[i, j], which[i, j] = v, g


@_compiled
def correlate_and_search(
    y, f, size, inverse, G, parts, positive, active, tile, block, best, which, top, bottom
):
    """Correlate rows `top` to `bottom` of the maps with all filters and, over the coefficients that
    are not active, do what `strongest` does; returns the largest magnitude times `inverse` of those
    that are active.

    y (C, rows + h-1, ...): the image, continued beyond its border, with rows of at least w-1
    numbers more than a multiple of BLOCK. f (n, C h w, FILTERS): the filters, so many at a time,
    padded with zeros. size (h, w). parts: best and which (parts, rows, columns) are over the groups
    parts[m] to parts[m + 1]. positive: correlations below 0 count as 0. active (g, j, starts): the
    active groups, sorted by row. Scratch: tile (n FILTERS, BLOCK), block (2, BLOCK).
    """
    (h, w), (g, j, starts) = size, active
    C, W, columns = y.shape[0], y.shape[2], best.shape[2]
    sizes = (y.shape[1] * W, W, C, h, w)
    zeros = fill(y.dtype.type(0))
    largest = y.dtype.type(0)
    for i in range(top, bottom):
        n = starts[i]
        for left in range(0, columns, BLOCK):
            for m in range(f.shape[0]):
                rows = tile[m * FILTERS : (m + 1) * FILTERS]
                correlate_block(rows, y, i * W + left, f, m * f.shape[1] * FILTERS, sizes)
            while n < starts[i + 1] and j[n] < left + BLOCK:
                squares = y.dtype.type(0)
                for k in range(g[n] * G, (g[n] + 1) * G):
                    c = tile[k, j[n] - left]
                    if c > 0 or not positive:
                        squares += c * c
                    tile[k, j[n] - left] = 0
                largest = max(largest, np.sqrt(squares) * inverse[g[n]])
                n += 1
            for part in range(len(parts) - 1):
                for q in range(0, BLOCK, LANES):
                    strongest_yet, number = zeros, zeros
                    for u in range(parts[part], parts[part + 1]):
                        if G == 1:
                            c = load(tile, u * BLOCK + q)
                            v = where_greater(c, zeros, c, zeros) if positive else magnitude(c)
                        else:
                            v = zeros
                            for k in range(u * G, (u + 1) * G):
                                c = load(tile, k * BLOCK + q)
                                c = where_greater(c, zeros, c, zeros) if positive else c
                                v = multiply_add(c, c, v)
                            v = square_root(v)
                        v = multiply(v, fill(inverse[u]))
                        this = fill(y.dtype.type(u - parts[part]))
                        number = where_greater(v, strongest_yet, this, number)
                        strongest_yet = where_greater(v, strongest_yet, v, strongest_yet)
                    store(block, q, strongest_yet)
                    store(block, BLOCK + q, number)
                for q in range(min(BLOCK, columns - left)):
                    best[part, i, left + q] = block[0, q]
                    which[part, i, left + q] = np.int32(block[1, q])
    return largest


def leaders(best, tile):
    """(rows, columns) of the largest value in each tile (rows, columns), if it exceeds 1."""
    (H, W), (h, w) = best.shape, tile
    value = best.ravel()
    at = np.flatnonzero(value > 1)
    i, j = np.divmod(at.astype(np.int32), np.int32(W))
    if h * w > 1:
        across = -(-W // w)
        tiles = i // np.int32(h) * across + j // np.int32(w)
        value, largest = value[at], np.zeros(-(-H // h) * across, best.dtype)
        np.maximum.at(largest, tiles, value)
        (strongest,) = np.nonzero(value == largest[tiles])
        # The first of equal ones.
        strongest = strongest[np.unique(tiles[strongest], return_index=True)[1]]
        i, j = i[strongest], j[strongest]
    return i, j


def by_bands(i, j, H, W, bands):
    """(order, starts): coefficients sorted by band of rows, then by column, for the sweeps."""
    key = i.astype(np.int64) * bands // H * W + j
    # With their numbers, keys are distinct, and numpy sorts them several times as fast.
    n = max(len(key), 1)
    key, order = np.divmod(np.sort(key * n + np.arange(len(key))), n)
    return order, np.searchsorted(key, np.arange(bands + 1) * W)


@_compiled
def correlations(gram, k, i, j, z, first, last, near, starts, columns):
    """gram (K, K, 2h-1, 2w-1) += sums of z_k[i] z_l[i + shift] over pairs in one image, for shifts
    of 0 rows and at least 0 columns, or of more rows.

    k, i, j, z (n,): the first of each pair, those from `first` to `last`, sorted by map. near (k,
    j, z): the second ones, sorted by row, then column; j counts from w-1 columns before the maps,
    and `columns` are those of the maps and w-1 on both sides. starts (positions + 1,): the index in
    `near` at which each position begins; rows end h-1 after the maps.
    """
    h, w = (gram.shape[2] + 1) // 2, (gram.shape[3] + 1) // 2
    near_k, near_j, near_z = near
    for n in range(first, last):
        for row in range(h):
            position = (i[n] + row) * columns + j[n]
            begin = starts[position + (0 if row else w - 1)]
            for m in range(begin, starts[position + 2 * w - 1]):
                gram[k[n], near_k[m], row + h - 1, near_j[m] - j[n]] += z[n] * near_z[m]


@_compiled
def towards_filters(gradient, y, g, i, j, z, first, last, rows, columns):
    """gradient (K, C, h, w) += Z'y for an image y (C, H, W), of the coefficients first to last."""
    for n in range(first, last):
        for c in range(y.shape[0]):
            for a in range(rows.length.shape[1]):
                for m in range(rows.length[i[n], a]):
                    x, u = rows.pixel[i[n], a] + m, rows.tap[i[n], a] + m
                    for b in range(columns.length.shape[1]):
                        left, v = columns.pixel[j[n], b], columns.tap[j[n], b]
                        for q in range(columns.length[j[n], b]):
                            gradient[g[n], c, u, v + q] += z[n] * y[c, x, left + q]


@_compiled
def towards_pointwise_filters(gradient, y, k, position, z, tile):
    """gradient (K, C) += Z'y for an image y (C, positions) and coefficients sorted by position.

    tile (positions, channels): scratch, in the innermost caches.
    """
    for start in range(0, y.shape[0], tile.shape[1]):
        channels = min(tile.shape[1], y.shape[0] - start)
        n = 0
        while n < len(k):
            left = position[n] // len(tile) * len(tile)
            size = min(len(tile), y.shape[1] - left)
            for c in range(channels):
                for q in range(size):
                    tile[q, c] = y[start + c, left + q]
            while n < len(k) and position[n] < left + size:
                row, q, value = k[n], position[n] - left, z[n]
                for c in range(channels):
                    gradient[row, start + c] += value * tile[q, c]
                n += 1


@_inlined
def _dot_at(r, f, k, rows, columns, mask, i, j):
    """<mask r, the image of a unit impulse at (i, j) of map k>."""
    H, W, h, w = r.shape[1], r.shape[2], f.shape[2], f.shape[3]
    sums = fill(r.dtype.type(0))
    for c in range(f.shape[1]):
        for a in range(rows.length.shape[1]):
            for m in range(rows.length[i, a]):
                pixel = (c * H + rows.pixel[i, a] + m) * W
                tap = ((k * f.shape[1] + c) * h + rows.tap[i, a] + m) * w
                for b in range(columns.length.shape[1]):
                    x, u = pixel + columns.pixel[j, b], tap + columns.tap[j, b]
                    for v in range(0, columns.length[j, b], LANES):
                        taps = load_first(f, u + v, columns.length[j, b] - v)
                        if mask.size:
                            taps = multiply(taps, load(mask, x + v))
                        sums = multiply_add(load(r, x + v), taps, sums)
    return total(sums)


@_inlined
def _paint_at(r, amount, f, k, rows, columns, mask, i, j):
    """r += amount * mask * the image of a unit impulse at (i, j) of map k."""
    H, W, h, w = r.shape[1], r.shape[2], f.shape[2], f.shape[3]
    amounts = fill(amount)
    for c in range(f.shape[1]):
        for a in range(rows.length.shape[1]):
            for m in range(rows.length[i, a]):
                pixel = (c * H + rows.pixel[i, a] + m) * W
                tap = ((k * f.shape[1] + c) * h + rows.tap[i, a] + m) * w
                for b in range(columns.length.shape[1]):
                    x, u = pixel + columns.pixel[j, b], tap + columns.tap[j, b]
                    for v in range(0, columns.length[j, b], LANES):
                        taps = load_first(f, u + v, columns.length[j, b] - v)
                        if mask.size:
                            taps = multiply(taps, load(mask, x + v))
                        store(r, x + v, multiply_add(amounts, taps, load(r, x + v)))


@_compiled
def subtract(r, filters, grid, active_set):
    """r -= A z."""
    f, planes = filters
    g, i, j, z, _, _ = active_set
    rows, columns, mask = grid
    tops, lefts, masked = rows.first, columns.first, mask.size > 0
    for n in range(len(g)):
        top, left = tops[i[n]], lefts[j[n]]
        complete = top >= 0 and left >= 0 and not masked
        for u in range(z.shape[1]):
            if z[n, u] != 0:
                k = g[n] * z.shape[1] + u
                if complete:
                    paint_at(r, f, planes, k, top * r.shape[2] + left, -z[n, u])
                else:
                    _paint_at(r, -z[n, u], f, k, rows, columns, mask, i[n], j[n])


@_compiled
def correlations_at(y, f, grid, g, i, j, c):
    """c (n, G) = <y, what a unit impulse at (i, j) of each map of g paints>, y (C, H, W)."""
    rows, columns, mask = grid
    for n in range(len(g)):
        for u in range(c.shape[1]):
            k = g[n] * c.shape[1] + u
            c[n, u] = _dot_at(y, f, k, rows, columns, mask, i[n], j[n])


@_compiled
def curvatures(f, G, inner, grid, g, i, j, scratch, L):
    """L (n,) = `inner` (groups,) where a coefficient paints all its taps; elsewhere the squared
    norm of what a unit impulse paints, summed over the group.

    G: maps of a group. scratch (C, H, W): zeros, which are restored.
    """
    rows, columns, mask = grid
    for n in range(len(g)):
        complete = rows.first[i[n]] >= 0 and columns.first[j[n]] >= 0
        if complete and mask.size == 0:
            L[n] = inner[g[n]]
            continue
        L[n] = 0
        for k in range(g[n] * G, (g[n] + 1) * G):
            _paint_at(scratch, f.dtype.type(1), f, k, rows, columns, mask, i[n], j[n])
            L[n] += _dot_at(scratch, f, k, rows, columns, mask, i[n], j[n])
            for a in range(rows.length.shape[1]):
                top = rows.pixel[i[n], a]
                for b in range(columns.length.shape[1]):
                    left = columns.pixel[j[n], b]
                    bottom, right = top + rows.length[i[n], a], left + columns.length[j[n], b]
                    for c in range(len(scratch)):
                        for x in range(top, bottom):
                            for q in range(left, right):
                                scratch[c, x, q] = 0


@_separate
def _sweep(r, f, planes, steps, g, z, n, end, p, positive):
    """Minimise over the coefficients of single maps from n on, up to `end` or the first without a
    pixel in `steps`; returns which that is.

    Nearly all steps are taken here. This is a function of its own, because code that seldom runs
    must not lie between these instructions (see `tap_loops`).
    """
    pixel, inverse, threshold = steps
    while n < end and pixel[n] >= 0:
        before, limit = z[n, 0], threshold[n]
        v = before + correlate_at(r, f, planes, g[n], pixel[n]) * inverse[n]
        if positive and v < 0:
            v = z.dtype.type(0)
        if p == 1 or limit == 0:
            # As a difference: NaNs propagate, and what is below the threshold is exactly 0.
            x = v - min(max(v, -limit), limit)
        else:
            shrunk = _shrunk(abs(v), z.dtype.type(1) / limit, p)
            x = z.dtype.type(shrunk if v > 0 else -shrunk)
        d = x - before
        if d != 0:
            paint_at(r, f, planes, g[n], pixel[n], -d)
            z[n, 0] = before + d
        n += 1
    return n


@_compiled
def descend(
    r,
    filters,
    grid,
    active_set,
    steps,
    starts,
    share,
    turns,
    sweeps,
    momentum,
    lam,
    p,
    positive,
    group,
    v,
    progress,
    state,
):
    """Minimise over one coefficient after another, updating z and r in place. In each of `turns`
    turns, first the even bands and then the odd ones are swept `sweeps` times.

    steps (pixel, inverse, threshold), each (n,): where a coefficient paints all its taps, and no
    mask changes them, the first of these pixels in a plane of r, 1 / L, and weight / (lam L);
    elsewhere pixel < 0.
    share (first, last): the bands that this call sweeps; others sweep the rest at the same time.
    progress (bands,): how many turns each band has had. A band is not swept before its neighbours,
    which touch it, are as far as if one thread swept all. state (2,), at first zeros: where to go
    on. Returns whether all is done; if not, call it again, since it waits for another band.
    momentum (spans, r_before, z_before): at first, z in band s and r in the rows spans[s, 0] to
    spans[s, 1] and columns spans[s, 2] to spans[s, 3], which partition it, move on by a part of
    their changes in the last turn; r_before (C, H, W) and z_before (n, G) are scratch. Not if there
    are no spans.
    group: maps of a group; None for 1, which has a form of its own, because a loop over a single
    map makes a step a third slower. v (G,): scratch.
    """
    # Unpacked once: passing a named tuple on or reading from it costs more than a step.
    f, planes = filters
    g, i, j, z, L, weight = active_set
    rows, columns, mask = grid
    spans, r_before, z_before = momentum
    (first, last), bands = share, len(progress)
    G = 1 if group is None else group
    while state[0] < 2 * turns:
        turn, parity, s = state[0] // 2, state[0] % 2, first + state[1]
        if s >= last:
            state[0] += 1
            state[1] = 0
            continue
        state[1] += 1
        if s % 2 != parity:
            continue
        needed = turn + parity if bands > 1 else 0
        for neighbour in ((s + 1) % bands, (s + bands - 1) % bands):
            waited = 0
            while observe(progress, neighbour) < needed:
                waited += 1
                if waited > _PATIENCE:
                    state[1] -= 1
                    return False
        # As by Nesterov.
        beta = z.dtype.type(turn) / z.dtype.type(turn + 3)
        for n in range(starts[s], starts[s + 1] if len(spans) else 0):
            for u in range(G):
                value = z[n, u]
                if beta > 0:
                    z[n, u] = value + beta * (value - z_before[n, u])
                z_before[n, u] = value
        for c in range(r.shape[0] if len(spans) else 0):
            for m in range(spans[s, 0], spans[s, 1]):
                for q in range(spans[s, 2], spans[s, 3]):
                    value = r[c, m, q]
                    if beta > 0:
                        r[c, m, q] = value + beta * (value - r_before[c, m, q])
                    r_before[c, m, q] = value
        for _ in range(sweeps):
            n = starts[s]
            while n < starts[s + 1]:
                if group is None and steps[0][n] >= 0:
                    n = _sweep(r, f, planes, steps, g, z, n, starts[s + 1], p, positive)
                    if n == starts[s + 1]:
                        break
                if not L[n] > 0:
                    # It paints nothing: its filter is zero, or all its pixels are masked.
                    for u in range(G):
                        z[n, u] = 0
                    n += 1
                    continue
                pixel, length = steps[0][n], z.dtype.type(0)
                for u in range(G):
                    k = g[n] * G + u
                    if group is None:
                        c = _dot_at(r, f, k, rows, columns, mask, i[n], j[n])
                    elif pixel >= 0:
                        c = correlate_at(r, f, planes, k, pixel)
                    else:
                        c = _dot_at(r, f, k, rows, columns, mask, i[n], j[n])
                    v[u] = z[n, u] + c / L[n]
                    if positive and v[u] < 0:
                        v[u] = 0
                    length += v[u] * v[u]
                length = abs(v[0]) if G == 1 else np.sqrt(length)
                if p == 1:
                    shrunk = max(length - weight[n] / (lam * L[n]), 0 * length)
                else:
                    shrunk = _shrunk(length, lam * L[n] / weight[n], p) if weight[n] > 0 else length
                for u in range(G):
                    if G == 1:
                        x = z.dtype.type(shrunk if v[u] > 0 else -shrunk)
                    else:
                        x = z.dtype.type(shrunk / length * v[u] if shrunk > 0 else shrunk)
                    d = x - z[n, u]
                    k = g[n] * G + u
                    if d != 0:
                        if group is None:
                            _paint_at(r, -d, f, k, rows, columns, mask, i[n], j[n])
                        elif pixel >= 0:
                            paint_at(r, f, planes, k, pixel, -d)
                        else:
                            _paint_at(r, -d, f, k, rows, columns, mask, i[n], j[n])
                        z[n, u] += d
                n += 1
        publish(progress, s, turn + 1)
    return True
