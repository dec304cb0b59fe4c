"""The control for projections: the same network with shuffled weights.

Projections follow the edges of the image even if the weights are random (Adebayo et al. 2018; Nie
et al. 2018). A projection is therefore evidence only next to that of a network that has learned
nothing.

The biases and normalisation statistics of a trained network belong to its weights: with shuffled
weights alone, most maps of a deep network are never active, or active everywhere. So the scale and
bias of each layer are set on some images (as in LSUV, Mishkin and Matas 2016): the means and
variances of normalisation layers are computed again, and every map of another layer gets the mean
and variance that it has in the original network.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from deconvnet.network.network import DeconvNet
from deconvnet.visualization.projection.model_isolation import isolated

log = logging.getLogger(__name__)

NORMALIZATIONS = nn.modules.batchnorm._BatchNorm
Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def shuffled_control(model: Model, x: Tensor, *, seed: int = 0) -> Model:
    """Return the control of a network: `shuffle_weights`, with scales and biases of its layers set
    on the images x (N, C, H, W).

    Normalisation layers get the statistics of these images, and the maps of convolutions and linear
    layers with a bias get the mean and the variance over these images that they have in `model`. If
    the model fails above some layer, the layers above it keep their biases. The filters of a
    DeconvNet have unit norm, and its maps no biases: it is only shuffled.
    """
    control = shuffle_weights(model, seed=seed).eval()
    if isinstance(model, DeconvNet):
        return control
    with isolated(model):
        moments = _moments_of_maps(model, x)
    modules = {name: module for name, module in control.named_modules() if name in moments}
    is_set: set[str] = set()

    def set_affine(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, y: Tensor) -> Tensor | None:
            if name in is_set:  # a layer that is called again
                return None
            is_set.add(name)
            return _match_moments(module, inputs, y, *moments[name])

        return hook

    with ExitStack() as stack:
        for module in control.modules():
            if isinstance(module, NORMALIZATIONS) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(_set_statistics).remove)
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(set_affine(name)).remove)
        _run(control, x)
    return control


@torch.no_grad()
def shuffle_weights(model: Model, *, seed: int = 0) -> Model:
    """Return a copy of a network in which the entries of every filter are in random order.

    A filter is shuffled over space and channels: its values, and with them its mean and norm, stay
    the same, but its structure is lost. Biases and the statistics of normalisation layers stay.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, DeconvNet):
        for layer in model.layers:
            for f, g in zip(layer.filters, layer.connectivity, strict=True):
                # Only among the maps that the filter is connected to.
                f[g.bool()] = _shuffled(f[g.bool()], generator)
        return model
    for p in model.parameters():
        if p.dim() > 1:
            p.copy_(torch.stack([_shuffled(weight, generator) for weight in p]))
    return model


def _shuffled(weight: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
    return weight.flatten()[order].view(weight.shape)


def _moments_of_maps(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean and standard deviation of every map of the layers whose bias can be set."""
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, y: Tensor) -> None:
            if name not in moments:
                moments[name] = _moments(module, y)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            own = module._parameters
            if isinstance(module, (nn.Conv2d, nn.Linear)) and None not in (
                own.get("weight"),
                own.get("bias"),
            ):
                stack.callback(module.register_forward_hook(record(name)).remove)
        _run(model, x)
    return moments


def _match_moments(
    module: nn.Module, inputs: tuple, y: Tensor, mean: Tensor, deviation: Tensor
) -> Tensor:
    """Give the maps of a layer this mean and standard deviation; returns its new output."""
    own = _moments(module, y)[1]
    scale = torch.where(own > 0, deviation / own.clamp(min=torch.finfo(own.dtype).tiny), 1)
    module.weight.mul_(scale.view(-1, *[1] * (module.weight.dim() - 1)).to(module.weight))
    # A layer may not use its weights as they are.
    y = module.forward(*inputs)
    shift = (mean - _moments(module, y)[0]).to(y)
    module.bias.add_(shift)
    return y + (shift.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else shift)


def _moments(module: nn.Module, y: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) and (K,): the mean and standard deviation of the maps of a layer."""
    axis = 1 if isinstance(module, nn.Conv2d) else y.dim() - 1
    return _moments_along(y, axis)


def _set_statistics(module: nn.Module, inputs: tuple) -> None:
    """Give a normalisation layer the statistics of its input (N, K, ...)."""
    mean, deviation = _moments_along(inputs[0], 1)
    module.running_mean.copy_(mean)
    module.running_var.copy_(deviation.square())


def _moments_along(y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation over all axes but one."""
    axes = [other for other in range(y.dim()) if other != axis]
    deviation, mean = torch.std_mean(y.float() if y.dtype.itemsize < 4 else y, axes, correction=0)
    return mean, deviation


def _run(model: nn.Module, x: Tensor) -> None:
    """Run a model, as far as it gets."""
    try:
        model(x.clone())
    except Exception as error:  # a model may raise anything, for its head or for the size
        log.info("the control: the model fails above its layers: %s", error)
