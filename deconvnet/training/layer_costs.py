"""The relative costs of the layers of a network, by which the time left of a run is estimated."""

from __future__ import annotations

import math

from deconvnet.monitoring.time_left import LayerCost
from deconvnet.network.network import DeconvNet

# The cost of a coefficient in an iteration, in multiply-adds, besides those of its filter.
COEFFICIENT_COST = 200
# The costs of learning from a visit to an image and, for a finished layer, of measuring and drawing
# it, relative to inference of the same number of iterations. With these constants, the estimates
# were 0.86 to 0.99 of the time that was left in a run of `default`, and 1.2 to 1.6 of it in one of
# `iccv2011_small` (processor time of one thread).
LEARNING_FACTOR, SHOWING_FACTOR = 1.5, 1.0
# Coordinate descent stops long before its last iteration, and later rounds visit few coefficients.
# With six crops of 64x64 and filters of 7x7 and 12x12, inference took 0.2 to 0.45 of the processor
# time of four epochs of learning, at most what this many rounds of learning cost.
ROUNDS = 2


def layer_costs(net: DeconvNet, size: tuple[int, int], images: int) -> list[LayerCost]:
    """The costs of all layers, for images of H x W pixels. They are estimates: solvers differ, and
    an image may stop before the last iteration.
    """
    costs, below = [], 0.0
    for layer, shape in zip(net.layers, net.map_shapes(size), strict=True):
        settings, (_, C, h, w) = layer.settings, layer.filters.shape
        coefficients = math.prod(shape)
        painting = coefficients * C * h * w
        iteration = coefficients * COEFFICIENT_COST + painting
        # What reconstructs the image goes through all layers below.
        iteration += below if settings.target != "maps" else 0.0
        below += painting
        iterations = settings.solver.iterations
        if settings.solver.method == "coordinate":
            iterations = min(iterations, ROUNDS)
        visit = iteration * settings.solver.training_iterations * (1 + LEARNING_FACTOR)
        costs.append(
            LayerCost(
                images * settings.learning.epochs * visit,
                images * iterations * iteration * (1 + SHOWING_FACTOR),
            )
        )
    return costs
