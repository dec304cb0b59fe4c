"""A linear support vector machine for many images: scikit-learn's LinearSVC in less memory.

    N images · D features · A (N, D) the features · T (N, classes) the labels as 1 and -1

Each class is told from the rest by a machine that minimises

    1/2 (||w||^2 + b^2) + C sum_n max(0, 1 - T_n (A_n w + b))^2

LinearSVC would hold several copies of the features, in float64 and wider. Here they remain as they
are, in float32, and all classes share the products with A in each of at most ITERATIONS steps of
L-BFGS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ITERATIONS = 100


@dataclass(frozen=True)
class LinearSVM:
    """Weights w (D, classes) and offsets b (classes,) of the machines of the classes."""

    w: Tensor
    b: Tensor
    classes: np.ndarray

    @classmethod
    def fit(
        cls, A: Tensor, labels: np.ndarray, *, C: float, start: LinearSVM | None = None
    ) -> LinearSVM:
        """The machines of features A (N, D) and labels (N,); start: those for another C."""
        classes, index = np.unique(labels, return_inverse=True)
        signs = 2.0 * torch.eye(len(classes)) - 1
        T = signs[torch.from_numpy(index)].to(A)
        w = A.new_zeros(A.shape[1], len(classes)) if start is None else start.w.clone()
        b = A.new_zeros(len(classes)) if start is None else start.b.clone()
        _minimize(A, T, C, w, b)
        return cls(w, b, classes)

    def predict(self, A: Tensor) -> np.ndarray:
        """The classes (N,) of features A (N, D): those of the largest decision values."""
        return self.classes[(A @ self.w + self.b).argmax(1).cpu().numpy()]

    def score(self, A: Tensor, labels: np.ndarray) -> float:
        """The share of features whose class is right."""
        return float(np.mean(self.predict(A) == labels))


def _minimize(A: Tensor, T: Tensor, C: float, w: Tensor, b: Tensor) -> None:
    """Bring w and b to the minimum, in place. The objective is divided by N."""
    optimizer = torch.optim.LBFGS(
        [w, b],
        max_iter=ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def cost() -> Tensor:
        violation = (1 - T * (A @ w + b)).clamp(min=0)
        slope = -2 * C * T * violation
        # Products with few rows from the left are ten times as fast as with A transposed.
        w.grad = (w + (slope.T.contiguous() @ A).T) / len(A)
        b.grad = (b + slope.sum(0)) / len(A)
        return ((w.square().sum() + b.square().sum()) / 2 + C * violation.square().sum()) / len(A)

    with torch.no_grad():
        optimizer.step(cost)
