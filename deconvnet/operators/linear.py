"""Linear operators from feature maps to the image or maps that they explain.

Every inference and every picture in this package uses one of these operators, composed from
deconvolutions F, unpoolings U and scalings:

    layer l explains the maps below     A = F_l
    layer l explains the image          A = R_l = F_1 U_1 S_2 F_2 U_2 S_3 ... F_l
    layer l explains both               A = the two stacked, each with its weight

An operator has an adjoint, a norm and a solve of (beta I + lam A A') w = d; operators compose with
@. It works on batches, z (N, ...) -> y (N, ...), and treats every image separately.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from deconvnet.operators import pooling, sparse_maps
from deconvnet.operators.convolution import (
    CONTINUED,
    Boundary,
    check_boundary,
    correlate,
    deconvolve,
    fourier_size,
    map_size,
)
from deconvnet.support.scaling import exponent, magnitude, times_power
from deconvnet.support.validation import as_tensor, check_tensors

# torch multiplies matrices of n x c and c x d numbers with its own loop if n c d is below this.
# Measured, not documented, like `convolution.NATIVE_CONVOLUTION`.
NATIVE_PRODUCT = 400


class LinearOperator(ABC):
    """A linear map A from maps z to images (or maps below) y, with its adjoint A'.

    inexact_cg_steps: how many steps of `solve` from the last solution ADMM needs per iteration
    (measured: with a good preconditioner, one step converges in as many iterations as an exact
    solve). max_intermediate_numel: the size per image of the largest known array between z and y.
    """

    inexact_cg_steps = 4
    max_intermediate_numel = 0

    def __getitem__(self, images: slice) -> LinearOperator:
        """The operator for these images of the batch."""
        return self

    @abstractmethod
    def __call__(self, z: Tensor) -> Tensor:
        """A z."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A'y, with <A z, y> = <z, A'y>."""

    def zeros(self, y: Tensor) -> Tensor:
        """Maps of zeros in the shape of A'y."""
        return torch.zeros_like(self.adjoint(y))

    def __matmul__(self, inner: LinearOperator) -> LinearOperator:
        """The composition: (A @ B)(z) = A(B(z))."""
        return self if isinstance(inner, Identity) else Composition(self, inner)

    def curvature(self) -> float | Tensor:
        """An estimate of the largest ||A e||^2 of a unit impulse e, the product over parts of A.

        1 for unit filters. (N, 1, 1, 1) if each image has its own mask.
        """
        return 1.0

    def normalised(self) -> tuple[LinearOperator, int]:
        """(A', e) with A = 2^e A', in which filters, masks and factors have ordinary magnitude.

        A itself if they already are.
        """
        return self, 0

    def solve(
        self,
        d: Tensor,
        lam: float,
        beta: float | Tensor,
        start: Tensor | None = None,
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 100,
    ) -> Tensor:
        """w with (beta I + lam A A') w = d, in the space of the images.

        beta: a number for all images, or (N, 1, 1, 1), one per image. Uses conjugate gradients
        from `start` until the residual of every image is below `tolerance` times the norm of its d;
        operators with a faster method override this.
        """
        return conjugate_gradients(
            lambda w: beta * w + lam * self(self.adjoint(w)),
            d,
            start,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    def squared_norm(self, b: Tensor, *, steps: int = 30) -> Tensor:
        """||A||^2 (N, 1, 1, 1), the largest eigenvalue of A A', for each image in the shape of b.

        By Lanczos' method from a fixed start, which is far more accurate than as many power
        iterations. The estimate approaches from below, so it is increased by 2%: after 30 steps
        1 / (lam ||A||^2) is a step size that does not raise the objective.
        """
        generator = torch.Generator().manual_seed(0)
        y = torch.randn(b.shape[1:], generator=generator, dtype=torch.float32).to(b).expand_as(b)
        y, previous, beta = y / norm(y), torch.zeros_like(y), torch.zeros_like(b[:, :1, :1, :1])
        diagonal, off_diagonal = [], []
        for _ in range(steps):
            residual = self(self.adjoint(y)) - beta * previous
            diagonal.append(dot(y, residual))
            residual = residual - diagonal[-1] * y
            beta = norm(residual)
            off_diagonal.append(beta)
            previous, y = y, residual / beta.clamp(min=torch.finfo(b.dtype).tiny)
        upper = torch.diag_embed(torch.stack(off_diagonal[:-1], -1).flatten(1), 1)
        matrix = torch.diag_embed(torch.stack(diagonal, -1).flatten(1)) + upper + upper.mT
        return 1.02 * torch.linalg.eigvalsh(matrix)[:, -1].view(-1, 1, 1, 1)


class Deconvolution(LinearOperator):
    """F: maps (N, K, ...) -> image (N, C, H, W), the sum over the maps of map * filter.

    f: (K, C, h, w), disconnected planes being zero. mask: (N or 1, C or 1, H, W) of numbers >= 0;
    the operator is then M F: the errors ||M F z - M y||^2 are weighted by mask^2, and pixels where
    the mask is 0 do not count. sparse: whether to expect maps that are zero in all but one place of
    each pooling window; on a CPU their values are then painted one by one. Raises ValueError for a
    mask that is negative, not finite, or does not fit.

    If the border wraps, the solve is exact: one division per frequency. With boundary "valid"
    A A' is the same filter with zeros around the image, and the circular solution preconditions a
    few conjugate gradient steps. Both act on C channels, not on K maps, also with a mask. With
    "zero" and "reflect" the circular solution only preconditions, and a step applies A and A'.

    inexact_cg_steps: measured on photographs. Steps on C channels are cheap; steps through A are
    not.
    """

    def __init__(
        self,
        f: Tensor,
        boundary: Boundary = "valid",
        mask: Tensor | None = None,
        *,
        sparse: bool = False,
    ):
        check_tensors(f=f)
        check_boundary(boundary)
        self.f = f
        self.boundary = boundary
        self.sparse = sparse
        self.mask = mask if mask is None else _checked_mask(mask, f.shape[1], f)
        if boundary in CONTINUED:
            self.inexact_cg_steps = 2 if mask is None else 4
        else:
            self.inexact_cg_steps = 1 if mask is None else 6
        # Caches: per grid, F F' at every frequency and its eigenvectors and eigenvalues; and the
        # last inverse.
        self._grams: dict[tuple[int, int], Tensor] = {}
        self._eigensystems: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._inverse: tuple[tuple, Tensor] | None = None

    def __call__(self, z: Tensor) -> Tensor:
        paint = sparse_maps.deconvolve_sparse if self.sparse else deconvolve
        return self._masked(paint(z, self.f, boundary=self.boundary))

    def adjoint(self, y: Tensor) -> Tensor:
        return correlate(self._masked(y), self.f, boundary=self.boundary)

    def zeros(self, y: Tensor) -> Tensor:
        size = map_size(y.shape[2:], self.f.shape[2:], self.boundary)
        return y.new_zeros(len(y), len(self.f), *size)

    def solve(
        self,
        d: Tensor,
        lam: float,
        beta: float | Tensor,
        start: Tensor | None = None,
        *,
        tolerance: float = 1e-6,
        max_iterations: int = 100,
    ) -> Tensor:
        grid = self._grid(tuple(d.shape[2:]))
        # Where the mask is 0, d is 0 too, and w must stay 0.
        visible = None if self.mask is None else self.mask > 0
        weight = lam if self.mask is None else lam * _mean_square(self.mask)

        def precondition(r: Tensor) -> Tensor:
            r = self._filter_inverse(r, grid, beta, weight)
            return r if visible is None else r * visible

        if self.boundary == "circular" and self.mask is None:
            return precondition(d)

        def system(w: Tensor) -> Tensor:
            if self.boundary in CONTINUED:
                return beta * w + lam * self(self.adjoint(w))
            return beta * w + lam * self._masked(self._filter(self._masked(w), grid))

        return conjugate_gradients(
            system,
            d,
            start,
            tolerance=tolerance,
            max_iterations=max_iterations,
            preconditioner=precondition,
        )

    def squared_norm(self, b: Tensor, *, steps: int = 30) -> Tensor:
        """The largest gain over the frequencies: exact if the border wraps, else a close upper
        bound; with "reflect", whose maps count more than once at the border, by Lanczos' method.
        With a mask, this value times the largest mask^2.
        """
        if self.boundary == "reflect":
            plain = Deconvolution(self.f, self.boundary)
            largest = LinearOperator.squared_norm(plain, b[:1], steps=steps)
        else:
            largest = self._eigen(self._grid(tuple(b.shape[2:])))[1].amax()
        if self.mask is not None:
            largest = largest * self.mask.square().amax((1, 2, 3), keepdim=True)
        return largest.expand(b.shape[0], 1, 1, 1)

    def curvature(self) -> float | Tensor:
        # Squares in double: those of small filters are 0 in float32.
        largest = float(self.f.detach().double().square().sum((1, 2, 3)).amax())
        if self.mask is None:
            return largest
        largest = largest * _mean_square(self.mask.detach().double())
        return largest if len(largest) > 1 else float(largest)

    def normalised(self) -> tuple[LinearOperator, int]:
        f_exponent = exponent(magnitude(self.f))
        mask_exponent = 0 if self.mask is None else exponent(magnitude(self.mask))
        if f_exponent == mask_exponent == 0:
            return self, 0
        f = times_power(self.f, -f_exponent)
        mask = self.mask if self.mask is None else times_power(self.mask, -mask_exponent)
        part = Deconvolution(f, self.boundary, mask, sparse=self.sparse)
        return part, f_exponent + mask_exponent

    def __getitem__(self, images: slice) -> Deconvolution:
        if self.mask is None or len(self.mask) == 1:
            return self
        part = copy.copy(self)
        part.mask = self.mask[images]
        return part

    def _masked(self, y: Tensor) -> Tensor:
        return y if self.mask is None else self.mask * y

    def _grid(self, image: tuple[int, int]) -> tuple[int, int]:
        """The transform size: that of the image if the border wraps; otherwise large enough for
        F F' to extend beyond one side, so that nothing wraps into the image.
        """
        if self.boundary == "circular":
            return image
        h, w = self.f.shape[2:]
        return fourier_size((image[0] + h - 1, image[1] + w - 1))

    def _filter(self, y: Tensor, grid: tuple[int, int]) -> Tensor:
        """F F' y with zeros around the images up to the grid."""
        return _wrapped(y, grid, lambda spectrum: _times(spectrum, self._gram(grid)))

    def _filter_inverse(
        self, y: Tensor, grid: tuple[int, int], beta: float | Tensor, weight: float | Tensor
    ) -> Tensor:
        """(beta I + weight F F')^-1 y with zeros around the images up to the grid.

        Uses the inverse at every frequency; or, with a beta or weight per image, eigenvectors,
        which are shared by all images but take several times as long to compute.
        """
        if isinstance(beta, Tensor) or isinstance(weight, Tensor):
            vectors, values = self._eigen(grid)
            gains = (beta + weight * values).reciprocal()
            return _wrapped(y, grid, lambda s: _times(_times(s, vectors.mH) * gains, vectors))
        return _wrapped(y, grid, lambda s: _times(s, self._inverted(grid, beta, weight)))

    def _gram(self, grid: tuple[int, int]) -> Tensor:
        """F F' (u, v, C, C) at every frequency of a grid, computed once; (1, 1, C, C) for filters
        of one pixel, which treat all frequencies alike.
        """
        grid = (1, 1) if tuple(self.f.shape[2:]) == (1, 1) else grid
        if grid not in self._grams:
            spectrum = torch.fft.rfft2(self.f, grid).permute(2, 3, 1, 0).contiguous()
            self._grams[grid] = spectrum @ spectrum.mH
        return self._grams[grid]

    def _eigen(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Eigenvectors (u, v, C, C) and eigenvalues (u, v, C) of F F', computed once per grid."""
        if grid not in self._eigensystems:
            gram = self._gram(grid)
            if gram.shape[-1] == 1:
                values, vectors = gram[..., 0].real, torch.ones_like(gram)
            else:
                values, vectors = torch.linalg.eigh(gram)
            self._eigensystems[grid] = vectors, values.clamp(min=0)
        return self._eigensystems[grid]

    def _inverted(self, grid: tuple[int, int], beta: float, weight: float) -> Tensor:
        """(beta I + weight F F')^-1 (u, v, C, C) at every frequency; the last one is cached."""
        key = (grid, beta, weight)
        if self._inverse is None or self._inverse[0] != key:
            gram = self._gram(grid)
            eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            factor, failed = torch.linalg.cholesky_ex(beta * eye + weight * gram)
            if failed.any():
                # Positive definite up to rounding; eigenvalues can be clamped at 0.
                vectors, values = self._eigen(grid)
                inverse = (vectors / (beta + weight * values)[..., None, :]) @ vectors.mH
            else:
                inverse = torch.cholesky_inverse(factor)
            self._inverse = key, inverse
        return self._inverse[1]


def _wrapped(y: Tensor, grid: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """y (N, C, H, W) with `change` applied to its spectrum (N, u, v, C) on a grid, cropped."""
    spectrum = change(torch.fft.rfft2(y, grid).permute(0, 2, 3, 1))
    return torch.fft.irfft2(spectrum.permute(0, 3, 1, 2), grid)[..., : y.shape[2], : y.shape[3]]


def _times(spectrum: Tensor, matrices: Tensor) -> Tensor:
    """(N, u, v, C): matrices (u, v, C, C) times spectrum (N, u, v, C) at every frequency.

    Each image is rounded as if it were alone, so that the batch does not change a bit of its maps
    (with the version of torch that was measured; others may round differently). This requires that
    the same routine computes every product: torch has its own for small products; larger ones, of
    two or more images, go to the BLAS library.
    """
    C = matrices.shape[-1]
    if C == 1:
        return spectrum * matrices[..., 0].real
    # Contiguous (u, v, N, C): otherwise torch takes several times as long.
    rows, columns = spectrum.permute(1, 2, 0, 3).contiguous(), matrices.mT
    batch = (NATIVE_PRODUCT - 1) // C**2
    if batch > 1:
        product = torch.cat([part @ columns for part in rows.split(batch, 2)], 2)
    else:
        pair = rows.expand(-1, -1, 2, -1) if rows.shape[2] == 1 else rows
        product = (pair @ columns)[:, :, : rows.shape[2]]
    return product.permute(2, 0, 1, 3)


def _checked_mask(mask: Tensor, channels: int, like: Tensor) -> Tensor:
    """The mask in the type and on the device of another tensor."""
    mask = as_tensor(mask, "mask")
    if mask.ndim != 4 or mask.shape[1] not in (1, channels):
        allowed = "1" if channels == 1 else f"1 or {channels}"
        raise ValueError(
            f"mask must have the shape (N or 1, {allowed}, H, W), got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.uint8 and mask.numel() and mask.max() > 1:
        # An image file, whose white would weight errors by 255^2.
        raise ValueError(
            f"mask of uint8, up to {mask.max()}: use mask > 0, or mask / 255 for weights"
        )
    mask = mask.to(like)
    if len(invalid := mask[~((mask >= 0) & (mask < math.inf))]):
        raise ValueError(f"mask={float(invalid[0])}: must be finite and not negative")
    return mask


def _mean_square(mask: Tensor) -> Tensor:
    """(N or 1, 1, 1, 1): the mean of mask^2 over the pixels where it is not 0."""
    total = mask.square().sum((1, 2, 3), keepdim=True)
    return total / (mask > 0).sum((1, 2, 3), keepdim=True).clamp(min=1)


class Mask(LinearOperator):
    """M: images -> mask * images. Errors ||M (x - y)||^2 are weighted by mask^2.

    mask: (N or 1, C or 1, H, W) of numbers >= 0, checked against images (N, C, H, W), in their
    dtype and on their device. M @ F is a `Deconvolution` with this mask, which has its own solve.
    Raises ValueError for a mask that is negative, not finite, or does not fit the images.
    """

    def __init__(self, mask: Tensor, images: Tensor):
        self.mask = _checked_mask(mask, images.shape[1], images)
        sizes = zip(self.mask.shape, images.shape, strict=True)
        if not all(m in (1, n) for m, n in sizes) or self.mask.shape[2:] != images.shape[2:]:
            raise ValueError(
                f"mask of shape {tuple(self.mask.shape)} does not fit images of shape "
                f"{tuple(images.shape)}: expected (N or 1, C or 1, H, W)"
            )

    def __call__(self, y: Tensor) -> Tensor:
        return self.mask * y

    adjoint = __call__

    def target(self, y: Tensor) -> Tensor:
        """M y, 0 where the mask is 0 even if y is NaN there."""
        return torch.where(self.mask > 0, self.mask * y, torch.zeros_like(y))

    def __getitem__(self, images: slice | Tensor) -> Mask:
        if len(self.mask) == 1:
            return self
        part = copy.copy(self)
        part.mask = self.mask[images]
        return part

    def __matmul__(self, inner: LinearOperator) -> LinearOperator:
        if isinstance(inner, Deconvolution) and inner.mask is None:
            return Deconvolution(inner.f, inner.boundary, self.mask, sparse=inner.sparse)
        return super().__matmul__(inner)

    def squared_norm(self, b: Tensor, *, steps: int = 30) -> Tensor:
        """The largest mask^2 of each image, exactly."""
        return self.mask.square().amax((1, 2, 3), keepdim=True).expand(len(b), 1, 1, 1)

    def curvature(self) -> float | Tensor:
        largest = _mean_square(self.mask.double())
        return largest if len(largest) > 1 else float(largest)

    def normalised(self) -> tuple[LinearOperator, int]:
        e = exponent(magnitude(self.mask))
        if e == 0:
            return self, 0
        part = copy.copy(self)
        part.mask = times_power(self.mask, -e)
        return part, e


class Unpooling(LinearOperator):
    """U_s: pooled maps -> maps of the given (K, H, W) shape, with the switches of a batch."""

    def __init__(self, switches: Tensor, shape: tuple[int, int, int]):
        self.switches = switches
        self.shape = tuple(shape)
        self.max_intermediate_numel = math.prod(self.shape)

    def __getitem__(self, images: slice) -> Unpooling:
        return Unpooling(self.switches[images], self.shape)

    def __call__(self, z: Tensor) -> Tensor:
        return pooling.unpool(z, self.switches, (z.shape[0], *self.shape))

    def adjoint(self, y: Tensor) -> Tensor:
        return pooling.pool(y, self.switches)


class WeightedUnpooling(LinearOperator):
    """U_w: pooled maps -> maps; each value is spread over its window with weights."""

    def __init__(self, weights: Tensor, window: pooling.Window):
        self.weights = weights
        self.window = window
        self.max_intermediate_numel = weights[0].numel()

    def __getitem__(self, images: slice) -> WeightedUnpooling:
        shared = len(self.weights) == 1
        return self if shared else WeightedUnpooling(self.weights[images], self.window)

    def __call__(self, z: Tensor) -> Tensor:
        return pooling.weighted_unpool(z, self.weights, self.window)

    def adjoint(self, y: Tensor) -> Tensor:
        return pooling.weighted_pool(y, self.weights, self.window)


class SignMerge(LinearOperator):
    """Positive and negative parts (N, 2K, H, W), as `split_signs` returns them -> maps, their
    difference (N, K, H, W).
    """

    def __call__(self, z: Tensor) -> Tensor:
        positive, negative = z.chunk(2, 1)
        return positive - negative

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([y, -y], 1)


class Identity(LinearOperator):
    """z -> z. Identity() @ A is A itself, with A's own squared_norm and solve."""

    def __call__(self, z: Tensor) -> Tensor:
        return z

    adjoint = __call__

    def __matmul__(self, inner: LinearOperator) -> LinearOperator:
        return inner


class Scaling(LinearOperator):
    """Multiplication by a number: the rescaling between two layers."""

    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, z: Tensor) -> Tensor:
        return self.factor * z

    adjoint = __call__

    def curvature(self) -> float | Tensor:
        return self.factor**2

    def normalised(self) -> tuple[LinearOperator, int]:
        e = exponent(abs(self.factor))
        return (Scaling(math.ldexp(self.factor, -e)), e) if e else (self, 0)


class Composition(LinearOperator):
    """outer after inner: z -> outer(inner(z))."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator):
        self.outer = outer
        self.inner = inner
        self.max_intermediate_numel = max(
            outer.max_intermediate_numel, inner.max_intermediate_numel
        )

    def __getitem__(self, images: slice) -> Composition:
        return Composition(self.outer[images], self.inner[images])

    def __call__(self, z: Tensor) -> Tensor:
        return self.outer(self.inner(z))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def curvature(self) -> float | Tensor:
        return self.outer.curvature() * self.inner.curvature()

    def normalised(self) -> tuple[LinearOperator, int]:
        outer, outer_exponent = self.outer.normalised()
        inner, inner_exponent = self.inner.normalised()
        if outer_exponent == inner_exponent == 0:
            return self, 0
        return Composition(outer, inner), outer_exponent + inner_exponent


class UnpooledDeconvolution(Composition):
    """F U: pooled maps -> what their values paint at their switches, without the maps between.

    On a CPU the values are painted one by one, and the adjoint correlates at the switches only,
    if that is faster than convolutions (`sparse_maps`).
    """

    outer: Deconvolution
    inner: Unpooling

    def __init__(self, outer: Deconvolution, inner: Unpooling):
        super().__init__(outer, inner)
        values = math.prod(inner.switches.shape[1:])
        self.sparse = outer.mask is None and sparse_maps.pays(
            outer.f, values, inner.shape, outer.boundary
        )
        if self.sparse:
            self.max_intermediate_numel = 0

    def __getitem__(self, images: slice) -> UnpooledDeconvolution:
        part = UnpooledDeconvolution(self.outer[images], self.inner[images])
        if part.sparse:
            part._deconvolver, part._places = self._deconvolver, self._places[images]
        return part

    def __call__(self, z: Tensor) -> Tensor:
        if not self._applies(z):
            return super().__call__(z)
        return self._deconvolver.paint(z.flatten(1), self._places)

    def adjoint(self, y: Tensor) -> Tensor:
        if not self._applies(y):
            return super().adjoint(y)
        return self._deconvolver.correlate(y, self._places).view(self.inner.switches.shape)

    def normalised(self) -> tuple[LinearOperator, int]:
        F, e = self.outer.normalised()
        return (UnpooledDeconvolution(F, self.inner), e) if e else (self, 0)

    def _applies(self, array: Tensor) -> bool:
        differentiated = torch.is_grad_enabled() and array.requires_grad
        return self.sparse and array.dtype == self.outer.f.dtype and not differentiated

    @cached_property
    def _deconvolver(self) -> sparse_maps.SparseDeconvolver:
        return sparse_maps.SparseDeconvolver(
            self.outer.f, self.outer.boundary, self.inner.shape[1:]
        )

    @cached_property
    def _places(self) -> list[sparse_maps.Places]:
        return [self._deconvolver.places(switches) for switches in self.inner.switches.flatten(1)]


class VerticalStack(LinearOperator):
    """Several operators on the same maps, stacked: z -> (w_1 A_1 z, w_2 A_2 z, ...).

    Their outputs have different shapes, so they are flattened and concatenated, (N, numel, 1, 1);
    `join` does the same to their targets, whose squared errors then add with the weights w^2.
    """

    def __init__(
        self, operators: list[LinearOperator], weights: list[float], shapes: list[torch.Size]
    ):
        self.operators, self.weights = operators, weights
        self.shapes = [tuple(shape[1:]) for shape in shapes]
        self.max_intermediate_numel = max(A.max_intermediate_numel for A in operators)

    def __getitem__(self, images: slice) -> VerticalStack:
        part = copy.copy(self)
        part.operators = [A[images] for A in self.operators]
        return part

    def __call__(self, z: Tensor) -> Tensor:
        return self.join([A(z) for A in self.operators])

    def adjoint(self, y: Tensor) -> Tensor:
        parts = y.flatten(1).split([math.prod(shape) for shape in self.shapes], 1)
        stacked = zip(self.operators, self.weights, parts, self.shapes, strict=True)
        return sum(A.adjoint(w * part.reshape(-1, *shape)) for A, w, part, shape in stacked)

    def curvature(self) -> float | Tensor:
        weighted = zip(self.weights, self.operators, strict=True)
        return sum(w**2 * A.curvature() for w, A in weighted)

    def normalised(self) -> tuple[LinearOperator, int]:
        parts, exponents = zip(*(A.normalised() for A in self.operators), strict=True)
        weights = [math.ldexp(w, e) for w, e in zip(self.weights, exponents, strict=True)]
        e = exponent(max(map(abs, weights)))
        if e == 0 and not any(exponents):
            return self, 0
        normalised = copy.copy(self)
        normalised.operators = list(parts)
        normalised.weights = [math.ldexp(w, -e) for w in weights]
        return normalised, e

    def join(self, targets: list[Tensor]) -> Tensor:
        """The targets of the operators, weighted, flattened and concatenated."""
        weighted = zip(self.weights, targets, strict=True)
        return torch.cat([w * target.flatten(1) for w, target in weighted], 1)[..., None, None]


def conjugate_gradients(
    system: Callable[[Tensor], Tensor],
    d: Tensor,
    start: Tensor | None = None,
    *,
    tolerance: float,
    max_iterations: int,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """w with system(w) = d for a symmetric positive definite system, image by image (first axis).

    Stops when the residual of every image is at most `tolerance` times the norm of its d. An image
    that has converged no longer changes, so that its result does not depend on the batch.
    """
    w, tiny = torch.zeros_like(d) if start is None else start, torch.finfo(d.dtype).tiny
    r = d if start is None else d - system(w)
    goal = (tolerance * norm(d)).square()
    direction, rz = None, None
    for _ in range(max_iterations):
        active = dot(r, r) > goal
        if tolerance and not active.any():
            break
        s = r if preconditioner is None else preconditioner(r)
        rz_old, rz = rz, dot(r, s)
        direction = s if direction is None else s + (rz / rz_old.clamp(min=tiny)) * direction
        q = system(direction)
        alpha = active * rz / dot(direction, q).clamp(min=tiny)
        w = w + alpha * direction
        r = r - alpha * q
    return w


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every image, (N, 1, 1, 1)."""
    return (a * b).sum((1, 2, 3), keepdim=True)


def norm(a: Tensor) -> Tensor:
    """The Euclidean norm of every image, (N, 1, 1, 1)."""
    return dot(a, a).sqrt()
