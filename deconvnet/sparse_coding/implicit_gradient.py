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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from deconvnet.operators.convolution import Boundary, correlate, deconvolve, filter_gradient
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.support_system import Code, Support, solved
from deconvnet.support.torch_modes import full_precision
from deconvnet.support.validation import as_tensor


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
    if settings.refit:
        raise ValueError(
            f"solver.refit=True: refitted codes have no gradient; use False, {instead}"
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
    code = Code(boundary, prior, solution.lam, shape, image)
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


class _AtMinimum(torch.autograd.Function):
    """z, residual and the terms of the objective as functions of images, filters, lam, mask and
    weights, at the minimum.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, code: Code, *tensors: Any) -> tuple[Tensor, ...]:
        z, residual, reconstruction, sparsity, _, f, lam, mask, weights = tensors
        ctx.set_materialize_grads(False)
        ctx.code, ctx.support = code, Support.of(z, code.prior)
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
    code: Code,
    support: Support,
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
    v = solved(code, support, f, mask, w, s)
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
