"""Evaluation of a finished layer: statistics over all images, and the curve of its inference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deconvnet.images.preprocessing import Spread
from deconvnet.monitoring.statistics import InferencePoint, LayerResult
from deconvnet.network.codes import Codes
from deconvnet.network.layer import Layer, LayerProblem
from deconvnet.network.metrics import decibels
from deconvnet.network.network import DeconvNet
from deconvnet.sparse_coding.problem import data_term
from deconvnet.support.communicator import Communicator


@dataclass
class LayerEvaluation:
    """Sums over images of the final maps of a layer.

    active: (K,) non-zero coefficients of each map; values, squares: sums of the preprocessed
    images; error: squared error of their reconstruction; pooled: spread of the pooled maps, which
    determines the scale of the next layer.
    """

    images: int = 0
    objective: float = 0.0
    entries: int = 0
    nonzero: int = 0
    pixels: int = 0
    values: float = 0.0
    squares: float = 0.0
    error: float = 0.0
    active: Tensor | None = None
    pooled: Spread = field(default_factory=Spread)

    def add(self, net: DeconvNet, codes: Codes) -> None:
        """Add the images of these codes, whose last layer is evaluated."""
        top = codes.layers[-1]
        z, y = top.z, codes.y.double()
        self.images += len(z)
        self.objective += float(top.objective.sum())
        self.entries += z.numel()
        self.nonzero += int(torch.count_nonzero(z))
        error = y - net.synthesize(codes, len(codes.layers))
        if codes.mask is not None:
            seen = (codes.mask > 0).expand_as(y)
            y, error = y[seen], error[seen]
        self.pixels += y.numel()
        self.values += float(y.sum())
        self.squares += float(y.square().sum())
        self.error += float(error.square().sum())
        active = (z != 0).sum((0, 2, 3)).cpu()
        self.active = active if self.active is None else self.active + active
        self.pooled.add(top.pooled)

    def reduced(self, communicator: Communicator) -> LayerEvaluation:
        """The sums over all ranks."""
        pooled = self.pooled.shared(communicator)
        parts = [part for part in communicator.all_gather(self) if part.images]
        summed = [key for key in vars(self) if key != "pooled"]
        return LayerEvaluation(
            **{key: sum(getattr(part, key) for part in parts) for key in summed}, pooled=pooled
        )

    def result(self, number: int, seconds: float) -> LayerResult:
        """The result of layer `number`; seconds: its training time."""
        signal = self.squares - self.values**2 / self.pixels
        return LayerResult(
            layer=number,
            objective=self.objective / self.images,
            snr=decibels(signal, self.error),
            density=self.nonzero / self.entries,
            dead=int((self.active == 0).sum()),
            seconds=seconds,
        )


def inference_curve(layer: Layer, problem: LayerProblem) -> list[InferencePoint]:
    """Objective, beta and density after each iteration of inference, means over the images."""
    A, settings = problem.T @ layer.operator(), layer.settings
    curve = []

    def record(iteration: int, z: Tensor, beta: Tensor) -> None:
        objective = data_term(problem.b - A(z), settings.lam) + settings.prior.value(z)
        density = float(torch.count_nonzero(z)) / z.numel()
        curve.append(
            InferencePoint(iteration, float(objective.mean()), float(beta.mean()), density)
        )

    layer.infer(problem, settings=replace(settings.solver, tolerance=0.0), callback=record)
    return curve
