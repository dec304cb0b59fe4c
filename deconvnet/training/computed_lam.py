"""The lam of a layer that is computed when the layer begins to learn: by lam_ratio, or lam=auto.

Both refer to the initial filters and to some training images, and lam then stays as it is, so that
the objective means the same in every epoch. Images with little noise have no best lambda within
reach: each smaller one predicts hidden pixels a little better. So lam=auto takes the sparsest code
whose error is nearly the least.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from deconvnet.network.layer import AUTO, LayerSettings
from deconvnet.network.network import DeconvNet
from deconvnet.operators.linear import LinearOperator
from deconvnet.sparse_coding.lambda_choice import LamChoice, choose_by_held_out
from deconvnet.sparse_coding.solve import default_solver
from deconvnet.training.training_set import TrainingSet
from deconvnet.visualization.drawing.canvas import with_title
from deconvnet.visualization.drawing.charts import line_chart

log = logging.getLogger(__name__)

# The most training images from which lam is computed.
RATIO_IMAGES, AUTO_IMAGES = 64, 12
# lam=auto: the path, and by how much its error may exceed the least.
NUM_LAMS, SMALLEST_RATIO, SLACK = 12, 0.01, 0.1


def set_computed_lam(data: TrainingSet, number: int, *, seed: int) -> LamChoice | None:
    """Compute the lam of layer `number` from training images, if its settings ask for that.

    The settings then hold a number, and the schedule of the solver in units of it. All ranks use
    that of rank 0, whose codes of the layers below may be rounded differently. Returns the choice,
    on rank 0, of lam=auto. Raises ValueError if the filters predict nothing, as random ones do.
    """
    layer = data.net.layer(number)
    settings = layer.settings
    if settings.lam_ratio is None and settings.lam != AUTO:
        return None
    choice = None
    if data.communicator.is_main:
        images = data.sample_indices(AUTO_IMAGES if settings.lam == AUTO else RATIO_IMAGES)
        problem = data.layer_data(number).problem(images)
        A, b = problem.T @ layer.operator(), problem.b
        if settings.lam_ratio is None:
            choice = _nearly_least(A, b, settings, seed)
            if not choice.path.lam[0] < choice.lam:
                raise ValueError(
                    f"model.layer{number}.lam=auto: the initial filters predict no hidden pixels; "
                    "use learning.init=patches, or give a number"
                )
            settings = replace(settings, lam=choice.lam, lam_max_quantile=1.0)
        else:
            settings = settings.with_lam_of_ratio(A, b)
        log.info("layer %d: lam=%.6g", number, settings.lam)
    layer.settings = data.communicator.broadcast(settings)
    return choice


def restore_computed_lams(net: DeconvNet, settings: dict) -> None:
    """Take the computed lams, and the schedules in their units, from the settings of a checkpoint.

    settings: those of `DeconvNet.to_parts`, of the layers that have begun to learn.
    """
    for layer, fields in zip(net.layers, settings["layers"], strict=False):
        if not isinstance(layer.settings.lam, float):
            begun = LayerSettings.from_dict(dict(fields), "checkpoint")
            layer.settings = replace(
                layer.settings,
                lam=begun.lam,
                lam_ratio=None,
                lam_max_quantile=1.0,
                solver=begun.solver,
            )


def choice_picture(choice: LamChoice) -> Tensor:
    """The error of hidden pixels over the lams of the path, relative to that of maps of zeros, and
    the lam chosen; (3, H, W).
    """
    path, error = choice.path, choice.errors.mean(1)
    chosen = path.density.mean(1)[(path.lam - choice.lam).abs().argmin()]
    picture = line_chart(
        path.lam.log10(),
        [("hidden pixels", error / error[0])],
        xlabel="log10 lam",
        ylabel="error / error at lambda_max",
        size=(280, 420),
    )
    return with_title(f"lam {choice.lam:.4g}, density {chosen:.2%}", picture)


def _nearly_least(A: LinearOperator, b: Tensor, settings: LayerSettings, seed: int) -> LamChoice:
    """The smallest lam of a path whose error is at most 1 + SLACK times the least."""
    choice = choose_by_held_out(
        *(A, b, settings.prior),
        settings=default_solver(b),
        seed=seed,
        num_lams=NUM_LAMS,
        smallest_ratio=SMALLEST_RATIO,
        lam_max_quantile=settings.lam_max_quantile,
    )
    error = choice.errors.mean(1)
    index = torch.nonzero(error <= (1 + SLACK) * error.min())[0, 0]
    return replace(choice, lam=float(choice.path.lam[index]))
