"""The gradient of a sparse code by implicit differentiation at the minimum.

    J(z) = lam/2 ||r||^2 + sum_g w_g |z_g|     r = M (y - F z)     |z_g| the l2 norm of a group

At the minimum the gradient of J vanishes on the support S, the coefficients that are not zero:
-lam F_S'M r + w z/|z| = 0. Small changes of y, f, lam, M and w do not change S, and differentiating
this condition gives those of z. For a loss L with the gradient dL/dz on S:

    H v = dL/dz          H = lam F_S'M^2 F_S + w/|z| (I - z z'/|z|^2)        one solve, of S only
    dL/dtheta = -<v, d/dtheta (-lam F_S'M r + w z/|z|)>                      for every theta

Without groups the second term of H is zero, and dL/dy = lam M^2 F_S v (Mairal, Bach and Ponce 2012,
"Task-driven dictionary learning", proposition 1). Nothing depends on how z was found, so memory
does not grow with the iterations.

    y image (N, C, H, W)   z maps (N, K, rows, columns)   f filters (K, C, h, w)
    M mask   w weights     m groups of G maps in the support
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from deconvnet.operators.convolution import Boundary, correlate, deconvolve, filter_gradient
from deconvnet.sparse_coding.active_set import Footprint, footprint
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.support.torch_modes import full_precision
from deconvnet.support.validation import as_tensor

if TYPE_CHECKING:
    from scipy.sparse import bsr_matrix, csr_matrix

# In units of the diagonal of H: directions in which H is smaller are not determined by the minimum.
SINGULAR = 1e-8
# Corrections of the solve with H + SINGULAR I towards the solve with H; each removes a factor of
# SINGULAR / eigenvalue of the error.
CORRECTIONS = 2


def requires_gradient(*given: Any) -> bool:
    """Whether autograd is on and one of these arguments requires a gradient."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in given)


def check_differentiable(p: float, lam_ratio: float | None, settings: SolverSettings) -> None:
    """Raise ValueError for problems and methods whose codes have no gradient here."""
    instead = "or call it inside torch.no_grad()"
    if p != 1:
        raise ValueError(f"p={p}: codes have a gradient only for p=1; use p=1, {instead}")
    if settings.method == "half_quadratic":
        raise ValueError(
            "solver.method=half_quadratic: ends above the minimum, where codes have no gradient; "
            f"use admm, fista, ista or coordinate, {instead}"
        )
    if lam_ratio is not None:
        raise ValueError(
            f"lam_ratio={lam_ratio}: there is no gradient through the largest correlation; give "
            f"lam, for example from lam_from_ratio, {instead}"
        )


def with_gradient(
    solution: Solution,
    images: Tensor,
    filters: Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    *,
    boundary: Boundary,
    prior: Prior,
) -> Solution:
    """The solution with the same values and, in z, residual, reconstruction and sparsity (so also
    objective), the gradient with respect to images, filters, lam, mask and weights.

    The arguments are those of `sparse_code`, as given; prior: with the same weights, plain.
    """
    f = _plain_type(filters).to(solution.residual).resolve_neg()
    mask = None if mask is None else _plain_type(mask).to(f)
    shape, image = tuple(solution.z.shape), tuple(solution.residual.shape[1:])
    code = _Code(boundary, prior, solution.lam, shape, image)
    terms = solution.z, solution.residual, solution.reconstruction, solution.sparsity
    # Of these only the gradient is needed.
    others = (_plain_type(x) if requires_gradient(x) else None for x in (images, lam, weights))
    y, lam, weights = others
    z, residual, reconstruction, sparsity = _AtMinimum.apply(code, *terms, y, f, lam, mask, weights)
    return dataclasses.replace(
        solution, z=z, residual=residual, reconstruction=reconstruction, sparsity=sparsity
    )


def _plain_type(value: Any) -> Tensor:
    """A plain tensor, with its gradient, of a subclass of Tensor; arrays have none."""
    if requires_gradient(value):
        return value.as_subclass(Tensor)
    return as_tensor(value, "array")


@dataclass(frozen=True)
class _Code:
    """What defines a code beside the tensors that may require a gradient."""

    boundary: Boundary
    prior: Prior
    lam: float
    shape: tuple[int, int, int, int]
    image: tuple[int, int, int]


@dataclass(frozen=True)
class _Support:
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
    def of(cls, z: Tensor, prior: Prior) -> _Support:
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


class _AtMinimum(torch.autograd.Function):
    """z, residual and the terms of the objective as functions of images, filters, lam, mask and
    weights, at the minimum.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, code: _Code, *tensors: Any) -> tuple[Tensor, ...]:
        z, residual, reconstruction, sparsity, _, f, lam, mask, weights = tensors
        ctx.set_materialize_grads(False)
        ctx.code, ctx.support = code, _Support.of(z, code.prior)
        ctx.lam = None if lam is None else lam.detach()
        ctx.weights = None if weights is None else weights.detach()
        # Returned as they are, they would be views of inputs, which must not be changed in place.
        outputs = tuple(x.detach() for x in (z, residual, reconstruction, sparsity))
        ctx.save_for_backward(outputs[1], f, mask)
        return outputs

    @staticmethod
    @full_precision
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        r, f, mask = ctx.saved_tensors
        towards = dict(zip(("y", "f", "lam", "mask", "w"), ctx.needs_input_grad[5:], strict=True))
        with torch.no_grad():
            given = _gradients(ctx.code, ctx.support, r, f, mask, gradients, towards)
        if towards["lam"]:
            given["lam"] = given["lam"].reshape(ctx.lam.shape).to(ctx.lam)
        if towards["w"]:
            K, w = ctx.code.shape[1], ctx.weights
            given["w"] = ctx.support.towards_weights(given["w"], w, K).to(w)
        found = tuple(given[name] for name in towards)
        if torch.is_grad_enabled():  # create_graph=True
            found = _OnceDifferentiable.apply(
                *(None if x is None else x.detach().requires_grad_() for x in found)
            )
        return (None,) * 5 + found


class _OnceDifferentiable(torch.autograd.Function):
    """Gradients that raise an error when they are differentiated.

    torch's once_differentiable leaves them constant unless the gradient of the loss in the code
    requires a gradient, so that those of a sum over the code would have silent zeros.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("the gradient of a sparse code cannot be differentiated again")


def _gradients(
    code: _Code,
    support: _Support,
    r: Tensor,
    f: Tensor,
    mask: Tensor | None,
    gradients: tuple[Tensor | None, ...],
    towards: dict[str, bool],
) -> dict[str, Tensor | None]:
    """The gradients in y, f, lam, mask and the weights of groups (m,); None if not asked for.

    gradients: those of the loss in z, residual, reconstruction and sparsity.
    """
    of_z, of_r, of_reconstruction, of_sparsity = gradients
    lam, boundary = code.lam, code.boundary
    lengths = support.z.square().sum(1, keepdim=True).sqrt()
    direction = support.z / torch.where(lengths > 0, lengths, 1)
    w = support.weights(code.prior)
    # The gradient in r and z, with z held fixed; then that of z, with r a function of it.
    a = torch.zeros_like(r) if of_r is None else of_r
    if of_reconstruction is not None:
        a = a + (of_reconstruction * lam).to(r).view(-1, 1, 1, 1) * r
    s = torch.zeros_like(support.z) if of_z is None else support.at(of_z)
    if of_r is not None or of_reconstruction is not None:
        s = s - support.at(correlate(_masked(a, mask), f, boundary=boundary))
    of_lengths = torch.zeros_like(lengths)
    if of_sparsity is not None:
        of_lengths = of_sparsity.to(r)[support.n, None]
        s = s + of_lengths * w * direction
    v = _solved(code, support, f, mask, w, s)
    v_maps = support.maps(v, code.shape)
    painted = deconvolve(v_maps, f, boundary=boundary)
    masked = _masked(painted, mask)
    a = a + lam * masked
    found: dict[str, Tensor | None] = dict.fromkeys(towards)
    if towards["y"]:
        found["y"] = _masked(a, mask)
    if towards["f"]:
        size, z = tuple(f.shape[2:]), support.maps(support.z, code.shape)
        found["f"] = filter_gradient(v_maps, lam * _masked(r, mask), size, boundary=boundary)
        found["f"] -= filter_gradient(z, _masked(a, mask), size, boundary=boundary)
    if towards["lam"]:
        by_image = (r * masked).double().sum((1, 2, 3))
        if of_reconstruction is not None:
            by_image = by_image + of_reconstruction * r.double().square().sum((1, 2, 3)) / 2
        found["lam"] = by_image.sum()
    if towards["mask"]:
        visible = torch.where(mask > 0, mask, 1)
        found["mask"] = torch.where(mask > 0, r / visible * a + lam * r * painted, 0)
        found["mask"] = found["mask"].sum_to_size(mask.shape)
    if towards["w"]:
        found["w"] = (of_lengths * lengths)[:, 0] - (v * direction).sum(1)
    return found


def _masked(y: Tensor, mask: Tensor | None) -> Tensor:
    return y if mask is None else mask * y


def _solved(
    code: _Code, support: _Support, f: Tensor, mask: Tensor | None, w: Tensor, s: Tensor
) -> Tensor:
    """v (m, G) with H v = s on the support, image by image.

    In float64 on the CPU, whatever the device: H is sparse and often ill-conditioned. Conjugate
    gradients need hundreds of iterations, also with blocks of H as a preconditioner; factors are
    exact, and up to some 10,000 coefficients of an image take less time.
    """
    v = torch.zeros(s.shape, dtype=torch.float64)
    on_host = (x.cpu().double() for x in (f, support.z, support.free, w, s))
    filters, z, free, w, s_host = on_host
    n, g, i, j = (x.cpu() for x in (support.n, support.g, support.i, support.j))
    mask = None if mask is None else mask.cpu().double().expand(code.shape[0], *code.image)
    for image in n.unique().tolist():
        at = n == image
        places = (x[at].numpy() for x in (g, i, j))
        seen = None if mask is None else mask[image].numpy()
        painted = _painted(code, filters.numpy(), seen, *places, free[at].numpy())
        hessian = code.lam * (painted @ painted.T)
        if code.prior.group > 1:
            hessian = hessian + _curvature_of_lengths(z[at], free[at], w[at])
        solution = _least_norm(hessian, s_host[at].flatten().numpy())
        v[at] = torch.from_numpy(solution).view(-1, code.prior.group)
    return v.to(s) * support.free


def _painted(
    code: _Code,
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


def _least_norm(hessian: csr_matrix, s: np.ndarray) -> np.ndarray:
    """v with H v = s; if H is singular, the least squares solution of least norm, in units of the
    square root of its diagonal.

    With B = (H + e I)^-1 for a small e, e B removes from s, to a factor of e / eigenvalue, all that
    H can produce: what remains is the part that H cannot, to be left out. Then B alone is H^-1 to
    the same factor, and corrections remove the rest.
    """
    from scipy.sparse import diags, identity
    from scipy.sparse.linalg import splu

    diagonal = hessian.diagonal()
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
    hessian = (diags(scale) @ hessian @ diags(scale)).tocsc()
    shifted = (hessian + SINGULAR * identity(len(s))).tocsc()
    symmetric = dict(permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0)
    solve = splu(shifted, options=dict(SymmetricMode=True), **symmetric).solve
    s, beyond = scale * s, scale * s
    for _ in range(CORRECTIONS + 1):
        beyond = SINGULAR * solve(beyond)
    s = s - beyond
    v = correction = solve(s)
    for _ in range(CORRECTIONS):
        correction = SINGULAR * solve(correction)
        v = v + correction
    return scale * v
