"""What the forms of coordinate descent have in common: objective, stopping rule, certificate."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from deconvnet.sparse_coding.iteration import Method
from deconvnet.sparse_coding.problem import Problem


class CoordinateDescent(Method):
    """The state of a few images, each solved separately.

    costs, gaps, cost_of_zero: (N,) in float64, the objective, the duality gap where it was
    computed, and the objective of z = 0. going: the images of the last round.
    """

    def __init__(self, problem: Problem):
        super().__init__(problem)
        self.b = problem.b.detach().contiguous()
        N = len(self.b)
        self.images = list(range(N))
        self.going = self.images
        self.costs, self.gaps = np.full(N, math.inf), np.full(N, math.nan)
        self.costs_before = np.full(N, math.inf)
        self.cost_of_zero = self._cost_of_zero()

    def step(self, stopped: Tensor | None) -> None:
        """A round over the images that go on."""
        if stopped is not None:
            self.going = (~stopped).flatten().nonzero().flatten().tolist()
        self.descend(self.going)

    @abstractmethod
    def descend(self, images: list[int]) -> None:
        """A round over these images, which updates their costs."""

    @abstractmethod
    def certify(self, images: list[int]) -> None:
        """Compute the duality gaps of these images."""

    @abstractmethod
    def write(self, z: Tensor) -> Tensor:
        """Write the coefficients into maps of zeros z (N, K, rows, columns)."""

    @abstractmethod
    def terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """The residual b - A z (N, C, H, W), and the terms of the objective (N,), in float64."""

    def penalty(self) -> Tensor:
        """lam, the curvature of unit filters being 1."""
        return self.problem.per_image(self.problem.lam)

    def converged(self, tolerance: float) -> Tensor:
        # A part of the image that cannot be explained is in the objective, but in no difference.
        explained = np.maximum(self.cost_of_zero - self.costs, 0)
        decrease = self.costs_before - self.costs
        reached = decrease <= tolerance * np.minimum(self.costs, explained)
        return torch.from_numpy(reached).view(-1, 1, 1, 1)

    def certified(self, gap: float) -> Tensor:
        self.certify(self.going)
        return torch.from_numpy(self.gaps <= gap * self.costs).view(-1, 1, 1, 1)

    def _cost_of_zero(self) -> np.ndarray:
        return self.problem.lam / 2 * self.b.double().square().sum((1, 2, 3)).numpy()


def is_expanded_zero(maps: Tensor) -> bool:
    """Whether maps are a single expanded zero, so that searching them can be skipped.

    A contiguous copy would take the memory of maps, and longer than a sweep.
    """
    sides = zip(maps.shape, maps.stride(), strict=True)
    return (
        all(size == 1 or stride == 0 for size, stride in sides)
        and float(maps[(0,) * maps.ndim]) == 0
    )
