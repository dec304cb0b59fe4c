"""A sparse code as a layer of a torch model: filters and thresholds are learned for its loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization

from deconvnet.filters.constraint import normalize
from deconvnet.operators.convolution import Boundary, check_boundary, deconvolve
from deconvnet.sparse_coding.problem import Solution, SolverSettings
from deconvnet.sparse_coding.solve import default_solver, sparse_code
from deconvnet.support.torch_modes import autocasts
from deconvnet.support.validation import (
    as_number,
    as_positive_integer,
    as_positive_number,
    as_tensor,
    check_settings,
)

# Without settings: with the tolerance of `default_solver` the cosine between a gradient and that of
# the exact minimum was 0.90 for codes of a photograph, with this gap 0.999 (docs/gradients.md).
GAP, ITERATIONS = 1e-3, 1000


class SparseCode(torch.nn.Module):
    """Images (N, C, H, W) -> their sparse maps z (N, K, rows, columns), by `sparse_code`.

        z = argmin lam/2 ||sum_k f_k * z_k - y||^2 + sum_g w_g |z_g|      every f_k of unit norm

    `filters` (K, C, h, w) and `lam` (one positive number) are learned; with threshold_per_map lam
    is fixed instead and `weights` (K / group,), one for the maps of each group, are learned: the
    threshold of a map is w / lam. What is learned is parametrised: the optimiser changes filters of
    any norm, which are divided by it, and the logarithms of lam and of the weights. Numbers and
    tensors may be assigned to all of them (`layer.lam = 10.0`), also after training. State
    dicts hold what the optimiser changes.

    boundary, group, non_negative: as in `sparse_code`. The gradient is that of the exact minimum,
    so the maps must be close to it: settings are by default those of `default_solver` with a gap of
    1e-3 and up to 1000 iterations, which takes about three times as long. Under autocast the layer
    stays in the precision of its filters; torch.compile leaves it as it is. Raises ValueError if an
    argument is out of range or does not fit the others.
    """

    filters: Tensor
    lam: Tensor
    weights: Tensor

    def __init__(
        self,
        filters: Tensor,
        lam: float,
        *,
        boundary: Boundary = "valid",
        group: int = 1,
        non_negative: bool = False,
        threshold_per_map: bool = False,
        settings: SolverSettings | None = None,
    ):
        super().__init__()
        f = as_tensor(filters, "filters")
        if f.ndim != 4 or not f.numel() or not f.is_floating_point():
            raise ValueError(
                f"filters must be floating, of the shape (K, C, h, w), got {f.dtype} of the shape "
                f"{tuple(f.shape)}"
            )
        check_boundary(boundary)
        check_settings(settings, SolverSettings, "settings")
        self.boundary, self.non_negative, self.settings = boundary, non_negative, settings
        self.group = as_positive_integer(group, "group")
        if len(f) % group:
            raise ValueError(f"group={group}: must divide the {len(f)} maps")
        lam = f.new_tensor(as_positive_number(lam, "lam"))
        self.filters = torch.nn.Parameter(f.clone())
        register_parametrization(self, "filters", _UnitNorm())
        self.threshold_per_map = threshold_per_map
        if threshold_per_map:
            self.register_buffer("lam", lam)
            self.weights = torch.nn.Parameter(f.new_ones(len(f) // group))
            register_parametrization(self, "weights", _Positive("weights"))
        else:
            self.lam = torch.nn.Parameter(lam)
            register_parametrization(self, "lam", _Positive("lam"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "lam" and "lam" in self.__dict__.get("_buffers", ()):
            # The buffer of a layer with threshold_per_map, which torch assigns only tensors to.
            value = self.lam.new_tensor(as_positive_number(value, "lam"))
        super().__setattr__(name, value)

    def forward(self, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The maps z (N, K, rows, columns) of images (N, C, H, W)."""
        return self.solve(images, mask=mask).z

    def solve(self, images: Tensor, *, mask: Tensor | None = None) -> Solution:
        """The solution of `sparse_code`, with its residual and objective, all differentiable."""
        if torch.compiler.is_compiling():
            # torch.compile would trace the loops of the solver; around the layer it still compiles.
            return torch.compiler.disable(SparseCode._solve)(self, images, mask)
        return self._solve(images, mask)

    def _solve(self, images: Tensor, mask: Tensor | None) -> Solution:
        if isinstance(images, Tensor) and autocasts(images.device.type):
            images = images.to(self.filters.dtype)  # the layers before are cast to half precision
        weights = self.weights.repeat_interleave(self.group) if self.threshold_per_map else None
        return sparse_code(
            images,
            self.filters,
            lam=self.lam,
            boundary=self.boundary,
            mask=mask,
            weights=weights,
            group=self.group,
            non_negative=self.non_negative,
            settings=self.settings or self._default_solver(),
        )

    def _default_solver(self) -> SolverSettings:
        return dataclasses.replace(default_solver(self.filters), gap=GAP, iterations=ITERATIONS)

    def decode(self, z: Tensor) -> Tensor:
        """The images (N, C, H, W) that maps paint with the filters."""
        return deconvolve(z, self.filters, boundary=self.boundary)

    def reconstruct(self, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Images painted by their own sparse maps, also where the mask hides them."""
        return self.decode(self(images, mask=mask))

    def extra_repr(self) -> str:
        K, C, h, w = self.filters.shape
        options = "".join(
            f", {name}={getattr(self, name)!r}"
            for name in ("group", "non_negative", "threshold_per_map")
            if getattr(self, name) not in (1, False)
        )
        return (
            f"{K} filters {C}x{h}x{w}, lam={float(self.lam.detach()):.6g}, {self.boundary}{options}"
        )


class _UnitNorm(torch.nn.Module):
    """Filters divided by their norms; assigned filters are kept as they are given."""

    def forward(self, f: Tensor) -> Tensor:
        return normalize(f)

    def right_inverse(self, f: Tensor) -> Tensor:
        return f


class _Positive(torch.nn.Module):
    """Positive numbers as powers of e; the logarithm of what is assigned."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, logarithm: Tensor) -> Tensor:
        return logarithm.exp()

    def right_inverse(self, value: Any) -> Tensor:
        value = value if isinstance(value, Tensor) else torch.tensor(as_number(value, self.name))
        if not bool((value > 0).all()):
            raise ValueError(f"{self.name}={as_number(value.min(), self.name)}: must be positive")
        return value.log()
