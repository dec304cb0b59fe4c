"""Compiled loops of `pointwise`: coordinate descent with 1x1 filters, position by position.

    P positions of all images   C channels   K maps   M capacity of a working set
    c0 (P, K) correlations of the data with the filters   G (K, K) Gram matrix of the filters

As in `kernels`, one compiled form serves all sizes, and loops create no arrays.
"""

from __future__ import annotations

import numpy as np

from deconvnet.sparse_coding.kernels import OPTIONS
from deconvnet.support.compiling import compiled

# Positions that are not finite are left out, so that searches for the largest value may vectorise.
_FINITE = dict(OPTIONS, fastmath={*OPTIONS["fastmath"], "nnan"})
_compiled = compiled(**OPTIONS)
_finite = compiled(**_FINITE)
_inlined = compiled(**_FINITE, forceinline=True, no_cpython_wrapper=True)

# A coefficient may enter the working set if its correlation exceeds its limit by this fraction, or
# by a tenth of the largest violation at the start of the round.
SLACK, PROGRESS = 0.02, 0.1
# Between two searches of all coefficients, the working set is swept at most this often, and a round
# makes at most this many searches.
SWEEPS, SEARCHES = 50, 500
# Coefficients within this fraction of the strongest enter together.
COMPANIONS = 0.7
# Positions and channels of an image whose residuals are computed together, in the innermost cache.
BLOCK, CHANNELS = 64, 128


@_inlined
def _largest(c, inverse, sign):
    """max over k of |c_k| inverse_k, or with sign 0 of max(c_k, 0) inverse_k; sign is else -1."""
    best = c.dtype.type(0)
    for k in range(len(c)):
        best = max(best, max(c[k], sign * c[k]) * inverse[k])
    return best


@_inlined
def _subtract_rows(c, G, rows, amounts, n):
    """c -= sum over the first n entries of amounts * G[rows], four rows at a time."""
    for a in range(0, n - 3, 4):
        i, j, k, m = rows[a], rows[a + 1], rows[a + 2], rows[a + 3]
        s, t, u, v = amounts[a], amounts[a + 1], amounts[a + 2], amounts[a + 3]
        for q in range(len(c)):
            c[q] -= s * G[i, q] + t * G[j, q] + u * G[k, q] + v * G[m, q]
    for a in range(n // 4 * 4, n):
        i, s = rows[a], amounts[a]
        for q in range(len(c)):
            c[q] -= s * G[i, q]


@_inlined
def _admit(n, k, z, p, w, s, G, weights, lam, rounding, scratch):
    """Make coefficient k, of value z, member n of the working set."""
    c, free, members, values, written, q, L, limit, least, sub, _, _ = scratch
    members[n], values[n], written[n], q[n], free[k] = k, z, 0, c[k], 0
    L[n], limit[n] = s * G[k, k], weights[w, k] / lam
    least[n] = rounding[p] * np.sqrt(L[n])
    for a in range(n + 1):
        sub[n, a] = s * G[k, members[a]]
        sub[a, n] = sub[n, a]


@_inlined
def _violation(n, w, inverse, scratch):
    """How far the correlation of a non-zero member is from its limit, relative to it, at most."""
    c, _, members, z, _, q, L, limit, least, _, _, _ = scratch
    largest = c.dtype.type(0)
    for a in range(n):
        d = abs(q[a] - limit[a]) if z[a] > 0 else abs(q[a] + limit[a])
        # Relative to a weight of zero, rounding would be infinite.
        if z[a] != 0 and d > least[a]:
            largest = max(largest, d * inverse[w, members[a]])
    return largest


@_inlined
def _sweep(n, positive, precision, scratch):
    """Minimise over one of the n members after another; returns whether any changed its correlation
    by more than this fraction of its limit.
    """
    c, _, _, z, _, q, L, limit, least, sub, _, _ = scratch
    zero, moving = c.dtype.type(0), False
    for a in range(n):
        x = zero
        if L[a] > 0:
            u = q[a] + L[a] * z[a]
            if u > limit[a]:
                x = (u - limit[a]) / L[a]
            elif u < -limit[a] and not positive:
                x = (u + limit[a]) / L[a]
        d = x - z[a]
        if d != 0:
            z[a] = x
            for e in range(n):
                q[e] -= d * sub[a, e]
            if abs(d) * L[a] > max(precision * limit[a], least[a]):
                moving = True
    return moving


@_inlined
def _update_correlations(n, s, G, scratch):
    """Bring all correlations up to date with the values of the n members."""
    c, _, members, z, written, q, _, _, _, _, rows, amounts = scratch
    # Of a type, or `_subtract_rows` is compiled for the constant 0 too; as `precision` in `code`.
    m = np.int64(0)
    for a in range(n):
        if z[a] != written[a]:
            rows[m], amounts[m], written[a] = members[a], s * (z[a] - written[a]), z[a]
            m += 1
    _subtract_rows(c, G, rows, amounts, m)
    for a in range(n):
        q[a] = c[members[a]]


@_finite
def code(
    c0,
    G,
    weights,
    inverse,
    scale,
    rounding,
    lam,
    positive,
    change,
    places,
    codes,
    sums,
    scratch,
):
    """One round at each of the `places` (m,): grow the working set until no correlation exceeds
    its limit by more than the slack, and sweep over it after every growth.

    weights, inverse (P or 1, K): of the prior, and 1 / (weight / lam). scale (P,): the squared
    mask, empty without one. rounding (P,): of a correlation with a filter of norm 1. change:
    whether to change the codes, or only to measure them. codes: count (P,), index and value (P, M)
    of the non-zero coefficients, updated in place. sums: strength, penalty, explained (P,), the
    largest correlation relative to its limit, the value of the prior, and |b|^2 - |b - A z|^2.
    Returns how many places were coded; the next one needs a larger capacity M.
    """
    count, index, value = codes
    strength, penalty, explained = sums
    c, free, members, z, _, _, _, _, _, _, rows, amounts = scratch
    number = c.dtype.type
    K, M = len(c), len(members)
    sign = number(0) if positive else number(-1)
    zero, one, slack, progress = number(0), number(1), number(SLACK), number(PROGRESS)
    least_slack = number(4 * np.finfo(c.dtype).eps)
    for t in range(len(places)):
        p = places[t]
        w = p if len(weights) > 1 else 0
        s = scale[p] if len(scale) else one
        for k in range(K):
            c[k], free[k] = c0[p, k], inverse[w, k]
        # The working set has n members; m more enter in each search, at first the old ones.
        n, m = 0, count[p]
        for a in range(m):
            rows[a], amounts[a] = index[p, a], value[p, a]
        tolerance, violation, precision = zero, zero, np.float64(0)
        for search in range(SEARCHES):
            for a in range(m):
                _admit(n + a, rows[a], amounts[a], p, w, s, G, weights, lam, rounding, scratch)
            n, grown, moving = n + m, m > 0, False
            for _ in range(SWEEPS if search > 0 else 0):
                moving = _sweep(n, positive, precision, scratch)
                if not moving:
                    break
            _update_correlations(n, s, G, scratch)
            best = _largest(c, free, sign)
            if search == 0:
                violation = max(best - one, _violation(n, w, inverse, scratch))
                tolerance = max(min(slack, progress * violation), least_slack)
                if not (change and violation > 0):
                    break
            elif not (grown or moving):
                break
            # While coefficients are missing, the others need not be exact.
            precision = max(tolerance, progress * (best - one)) / 4
            m, room = 0, min(1 + n // 4, K - n)
            if best > one + tolerance:
                if n + room > M:
                    return t
                enough = max(number(COMPANIONS) * best, one + tolerance) if room > 1 else best
                for k in range(K):
                    if m < room and max(c[k], sign * c[k]) * free[k] >= enough:
                        rows[m], amounts[m], m = k, zero, m + 1
        penalty[p], explained[p], count[p] = 0, 0, 0
        for a in range(n):
            k = members[a]
            best = max(best, max(c[k], sign * c[k]) * inverse[w, k])
            if z[a] != 0:
                # Sorted by map, as a start from maps is, so that visits are like rounds.
                e = count[p]
                while e > 0 and index[p, e - 1] > k:
                    index[p, e], value[p, e], e = index[p, e - 1], value[p, e - 1], e - 1
                index[p, e], value[p, e] = k, z[a]
                count[p] += 1
                penalty[p] += np.float64(weights[w, k]) * abs(z[a])
                explained[p] += np.float64(z[a]) * (np.float64(c0[p, k]) + np.float64(c[k]))
        strength[p] = best
    return len(places)


@_compiled
def squared_norms(y, images, norms):
    """norms (P,) = sum over the channels of y (N, C, P / N), for these images."""
    size = y.shape[2]
    for n in images:
        for q in range(size):
            norms[n * size + q] = 0
        for c in range(y.shape[1]):
            for q in range(size):
                norms[n * size + q] += np.float64(y[n, c, q]) * np.float64(y[n, c, q])


@_compiled
def residuals(b, f, mask, places, codes, r, squares, products, tile):
    """r (N, C, P / N) = b - A z at these places, in increasing order; squares and products (P,):
    |r|^2 and <b, r>.

    f (K, C). mask (P,): empty without one. tile (BLOCK, CHANNELS): scratch.
    """
    count, index, value = codes
    per_image, C = b.shape[2], f.shape[1]
    for t in range(len(places)):
        squares[places[t]], products[places[t]] = 0, 0
    # Channels outermost: this part of all filters fits into the second cache.
    for start in range(0, C, tile.shape[1]):
        channels = min(tile.shape[1], C - start)
        t = 0
        while t < len(places):
            first = places[t]
            n, left = first // per_image, first % per_image
            size = 1
            while (
                size < len(tile)
                and left + size < per_image
                and t + size < len(places)
                and places[t + size] == first + size
            ):
                size += 1
            for q in range(size):
                p = first + q
                for c in range(channels):
                    tile[q, c] = 0
                m = mask[p] if len(mask) else b.dtype.type(1)
                for a in range(count[p]):
                    k, z = index[p, a], m * value[p, a]
                    for c in range(channels):
                        tile[q, c] += z * f[k, start + c]
            for c in range(channels):
                for q in range(size):
                    y = b[n, start + c, left + q]
                    x = y - tile[q, c]
                    r[n, start + c, left + q] = x
                    squares[first + q] += np.float64(x) * np.float64(x)
                    products[first + q] += np.float64(y) * np.float64(x)
            t += size
