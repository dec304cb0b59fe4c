"""The linear system of the derivative of a code: H v = s on its support.

    H = lam F_S'M^2 F_S + w/|z| (I - z z'/|z|^2)      as in `implicit_gradient`

In float64 on the CPU, whatever the device: H is sparse and often ill-conditioned. Conjugate
gradients need hundreds of iterations, also with blocks of H as a preconditioner; factors are exact
and, eliminated in the order of `nested_dissection`, take less time than the code itself.

    z maps (N, K, rows, columns)   f filters (K, C, h, w)   M mask   w weights
    m groups of G maps in the support
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary
from deconvnet.sparse_coding.active_set import Footprint, footprint
from deconvnet.sparse_coding.nested_dissection import Cholesky, Part, dissect
from deconvnet.sparse_coding.prior import Prior

if TYPE_CHECKING:
    from scipy.sparse import bsr_matrix, csr_matrix

# In units of the diagonal of H: directions in which H is smaller are not determined by the minimum.
SINGULAR = 1e-8
# Corrections of the solve with H + SINGULAR I towards the solve with H; each removes a factor of
# SINGULAR / eigenvalue of the error.
CORRECTIONS = 2


@dataclass(frozen=True)
class Code:
    """What defines a code beside the tensors that may require a gradient."""

    boundary: Boundary
    prior: Prior
    lam: float
    shape: tuple[int, int, int, int]
    image: tuple[int, int, int]


@dataclass(frozen=True)
class Support:
    """The m groups of maps that may change: image n, group g, row i, column j (m,), values z (m, G)
    and whether each maps may change, free (m, G), 0 or 1.
    """

    n: Tensor
    g: Tensor
    i: Tensor
    j: Tensor
    z: Tensor
    free: Tensor

    @classmethod
    def of(cls, z: Tensor, prior: Prior) -> Support:
        groups = z.unflatten(1, (-1, prior.group))
        active = groups != 0
        support = active.any(2)
        if prior.entry_weights is not None and not prior.non_negative:
            # Without a penalty there is no threshold that would keep a coefficient at zero.
            support = support | (prior.entry_weights.to(z) == 0)
        n, g, i, j = support.nonzero(as_tuple=True)
        values = groups[n, g, :, i, j]
        free = values != 0 if prior.non_negative else torch.ones_like(values, dtype=torch.bool)
        return cls(n, g, i, j, values, free.to(z))

    def maps(self, values: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Maps of this shape with the values (m, G), and zeros elsewhere."""
        z, group = values.new_zeros(shape), values.shape[1]
        z.unflatten(1, (-1, group))[self.n, self.g, :, self.i, self.j] = values
        return z

    def at(self, z: Tensor) -> Tensor:
        """The values (m, G) of maps at the support, zero where they may not change."""
        groups = z.unflatten(1, (-1, self.z.shape[1]))
        return groups[self.n, self.g, :, self.i, self.j] * self.free

    def weights(self, prior: Prior) -> Tensor:
        """(m, 1): the weight of each group."""
        w = prior.entry_weights
        if w is None:
            return torch.ones_like(self.z[:, :1])
        w = w.to(self.z)[(None,) * (4 - w.ndim)]
        return w[self._positions(w.shape)][:, None]

    def towards_weights(self, values: Tensor, w: Tensor, K: int) -> Tensor:
        """The gradient (of the shape of w) for values (m,), the derivatives in the group weights.

        The maps of a group share a weight, so each gets the same part.
        """
        w4 = w[:, None, None] if w.ndim == 1 else w
        gradient = values.new_zeros((1,) * (4 - w4.ndim) + tuple(w4.shape))
        group = self.z.shape[1] if gradient.shape[1] == K else 1
        for u in range(group):
            n, _, i, j = self._positions(gradient.shape)
            k = self.g * group + u if gradient.shape[1] > 1 else torch.zeros_like(self.g)
            gradient.index_put_((n, k, i, j), values / group, accumulate=True)
        return gradient.reshape(w.shape)

    def _positions(self, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Where the groups are in a tensor of this shape, which broadcasts to them."""
        places = self.n, self.g, self.i, self.j
        return tuple(x if size > 1 else x * 0 for x, size in zip(places, shape, strict=True))


def solved(
    code: Code, support: Support, f: Tensor, mask: Tensor | None, w: Tensor, s: Tensor
) -> Tensor:
    """v (m, G) with H v = s on the support, image by image."""
    v = torch.zeros(s.shape, dtype=torch.float64)
    on_host = (x.cpu().double() for x in (f, support.z, support.free, w, s))
    filters, z, free, w, s_host = on_host
    n, g, i, j = (x.cpu() for x in (support.n, support.g, support.i, support.j))
    mask = None if mask is None else mask.cpu().double().expand(code.shape[0], *code.image)
    group = code.prior.group
    for image in n.unique().tolist():
        at = (n == image).nonzero()[:, 0]
        order, parts = _elimination(code, i[at].numpy(), j[at].numpy(), filters.shape[2:])
        at = at[torch.from_numpy(order)]
        places = (x[at].numpy() for x in (g, i, j))
        seen = None if mask is None else mask[image].numpy()
        painted = _painted(code, filters.numpy(), seen, *places, free[at].numpy())
        hessian = code.lam * (painted @ painted.T)
        if group > 1:
            hessian = hessian + _curvature_of_lengths(z[at], free[at], w[at])
        solution = _least_norm(hessian.tocsr(), parts, s_host[at].flatten().numpy())
        v[at] = torch.from_numpy(solution).view(-1, group)
    return v.to(s) * support.free


def _elimination(
    code: Code, i: np.ndarray, j: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, list[Part]]:
    """The order in which to eliminate groups at places i, j (m,), and its parts in unknowns."""
    if code.boundary == "circular":
        # Folded, places that are close across the border are close in the plane.
        rows, columns = code.shape[2:]
        i, j = np.minimum(i, rows - i), np.minimum(j, columns - j)
    # Filters of even size reach one further to one side, and with "reflect" to both.
    more = int(code.boundary == "reflect")
    order, parts = dissect(i, j, (size[0] - 1 + more, size[1] - 1 + more))
    group = code.prior.group
    return order, [Part(p.begin * group, p.end * group, p.children) for p in parts]


def _painted(
    code: Code,
    f: np.ndarray,
    mask: np.ndarray | None,
    g: np.ndarray,
    i: np.ndarray,
    j: np.ndarray,
    free: np.ndarray,
) -> csr_matrix:
    """M F_S' of an image, (m G, C H W): what a unit impulse of each coefficient paints.

    mask (C, H, W). Zero where a coefficient is not free.
    """
    from scipy.sparse import csr_matrix

    K, C, h, w = f.shape
    _, H, W = code.image
    rows, columns = (
        footprint(code.boundary, *side) for side in zip(code.image[1:], (h, w), strict=True)
    )
    atoms = f.reshape(K // code.prior.group, code.prior.group, C, h, w)
    shape = (len(g) * code.prior.group, C * H * W)
    total = csr_matrix(shape)
    for a in range(rows.length.shape[1]):
        for b in range(columns.length.shape[1]):
            m = np.flatnonzero((rows.length[i, a] > 0) & (columns.length[j, b] > 0))
            if not len(m):
                continue
            x, u, inside = _run(rows, i[m], a, h)
            y, v, inside_too = _run(columns, j[m], b, w)
            visible = inside[:, :, None] & inside_too[:, None, :]
            # (m, h, w, G, C): numpy puts the axes of the advanced indices first.
            values = atoms[g[m][:, None, None], :, :, u[:, :, None], v[:, None, :]]
            values = values * (visible[..., None, None] * free[m][:, None, None, :, None])
            pixel = (x[:, :, None] * W + y[:, None, :])[..., None] + np.arange(C) * (H * W)
            if mask is not None:
                values *= mask.reshape(-1)[pixel][:, :, :, None, :]
            values = values.transpose(0, 3, 4, 1, 2)
            pixel = np.broadcast_to(pixel.transpose(0, 3, 1, 2)[:, None], values.shape)
            coefficient = (m[:, None] * code.prior.group + np.arange(code.prior.group)).reshape(-1)
            count = np.zeros(shape[0] + 1, np.int64)
            count[coefficient + 1] = C * h * w
            part = csr_matrix((values.reshape(-1), pixel.reshape(-1), count.cumsum()), shape)
            total = part if a == b == 0 else total + part
    total.eliminate_zeros()
    return total


def _run(
    side: Footprint, positions: np.ndarray, run: int, taps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(m, taps) each: pixel and tap of a run of a footprint, and whether it has that many."""
    step = np.arange(taps)
    inside = step < side.length[positions, run][:, None]
    pixel = np.where(inside, side.pixel[positions, run][:, None] + step, 0)
    return pixel, np.where(inside, side.tap[positions, run][:, None] + step, 0), inside


def _curvature_of_lengths(z: Tensor, free: Tensor, w: Tensor) -> bsr_matrix:
    """w/|z| (I - z z'/|z|^2) for every group, as blocks on the diagonal; all arguments (m, G)."""
    from scipy.sparse import bsr_matrix

    lengths = z.square().sum(1).sqrt()[:, None, None]
    unit = z[:, :, None] / torch.where(lengths > 0, lengths, 1)
    blocks = w[:, :, None] * (torch.diag_embed(free) - unit * unit.mT)
    blocks = torch.where(lengths > 0, blocks / torch.where(lengths > 0, lengths, 1), 0)
    m, G = z.shape
    return bsr_matrix((blocks.numpy(), np.arange(m), np.arange(m + 1)), (m * G, m * G))


def _least_norm(hessian: csr_matrix, parts: list[Part], s: np.ndarray) -> np.ndarray:
    """v with H v = s; if H is singular, the least squares solution of least norm, in units of the
    square root of its diagonal. H in the order of elimination of its parts; it is changed.

    With B = (H + e I)^-1 for a small e, e B removes from s, to a factor of e / eigenvalue, all that
    H can produce: what remains is the part that H cannot, to be left out. Then B alone is H^-1 to
    the same factor, and corrections remove the rest.
    """
    diagonal = hessian.diagonal()
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
    hessian.data *= np.repeat(scale, np.diff(hessian.indptr)) * scale[hessian.indices]
    solve = Cholesky(hessian, parts, SINGULAR).solve
    s, beyond = scale * s, scale * s
    for _ in range(CORRECTIONS + 1):
        beyond = SINGULAR * solve(beyond)
    s = s - beyond
    v = correction = solve(s)
    for _ in range(CORRECTIONS):
        correction = SINGULAR * solve(correction)
        v = v + correction
    return scale * v
