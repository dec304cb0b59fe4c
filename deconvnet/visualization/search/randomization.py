"""The control for projections: the same network with shuffled weights.

Projections follow the edges of the image even if the weights are random (Adebayo et al. 2018; Nie
et al. 2018). A projection is therefore evidence only next to that of a network that has learned
nothing.

The biases and normalisation statistics of a trained network belong to its weights: with shuffled
weights alone, most maps of a deep network are never active, or active everywhere. So the scale and
bias of each layer are set on some images (as in LSUV, Mishkin and Matas 2016): the means and
variances of normalisation layers are computed again, and every map of another layer varies as much,
and is positive as often, as it is in the original network. (With its mean instead, maps that are
rarely active would die: their responses are skewed in the original, but not in the control.)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from deconvnet.network.layer import Layer
from deconvnet.network.network import DeconvNet
from deconvnet.visualization.models.model_error import ModelError, described
from deconvnet.visualization.projection.model_isolation import isolated

log = logging.getLogger(__name__)

# A map of the control is positive at least this often.
RAREST = 1e-3
# Values of each map from which its activity is taken.
SAMPLES = 10_000
NORMALIZATIONS = nn.modules.batchnorm._BatchNorm
Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def shuffled_control(model: Model, x: Tensor, *, seed: int = 0) -> Model:
    """Return the control of a network: `shuffle_weights`, with scales and biases of its layers set
    on the images x (N, C, H, W).

    Normalisation layers get the statistics of these images. The maps of convolutions and linear
    layers with a bias get the standard deviation over these images that they have in `model`, and
    are positive as often, but at least in one of a thousand positions. If the model fails above
    some layer, the layers above it keep their biases. The filters of a DeconvNet have unit norm,
    and its maps no biases: it is only shuffled.
    """
    control = shuffle_weights(model, seed=seed).eval()
    if isinstance(model, DeconvNet):
        return control
    with isolated(model):
        activity = _activity_of_maps(model, x)
    modules = {name: module for name, module in control.named_modules() if name in activity}
    is_set: set[str] = set()

    def set_affine(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, y: Tensor) -> Tensor | None:
            if name in is_set:  # a layer that is called again
                return None
            is_set.add(name)
            return _match_activity(module, inputs, y, *activity[name])

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
    the same, but its structure is lost. Biases and the statistics of normalisation layers stay. Of
    a network with concepts, its own filters and those of the dictionary are shuffled.
    """
    try:
        model = copy.deepcopy(model)
    except Exception as error:  # a model may hold anything
        raise ModelError(
            f"the model {type(model).__name__} cannot be copied, as its control must be: "
            f"{described(error)}; visualize it with control=false"
        ) from error
    generator = torch.Generator().manual_seed(seed)
    layers = (part for part in model.modules() if isinstance(part, Layer))
    for layer in layers:
        for f, g in zip(layer.filters, layer.connectivity, strict=True):
            # Only among the maps that the filter is connected to.
            f[g.bool()] = _shuffled(f[g.bool()], generator)
    for p in model.parameters():
        if p.dim() > 1:
            p.copy_(torch.stack([_shuffled(weight, generator) for weight in p]))
    return model


def _shuffled(weight: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
    return weight.flatten()[order].view(weight.shape)


def _activity_of_maps(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For the layers whose bias can be set, the standard deviation of every map, and how often it
    is positive."""
    activity: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, y: Tensor) -> None:
            if name not in activity:
                maps = _by_map(module, y)
                activity[name] = (maps.std(1, correction=0), (maps > 0).float().mean(1))

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
    return activity


def _match_activity(
    module: nn.Module, inputs: tuple, y: Tensor, deviation: Tensor, density: Tensor
) -> Tensor:
    """Give the maps of a layer this standard deviation and share of positive values, and return
    its new output."""
    own = _by_map(module, y).std(1, correction=0)
    scale = torch.where(own > 0, deviation / own.clamp(min=torch.finfo(own.dtype).tiny), 1)
    module.weight.mul_(scale.view(-1, *[1] * (module.weight.dim() - 1)).to(module.weight))
    # A layer may not use its weights as they are.
    y = module.forward(*inputs)
    values = _by_map(module, y).sort(1).values
    count = values.shape[1]
    first = ((1 - density.clamp(RAREST, 1 - RAREST)) * count).round().long()
    first = first.clamp(1, max(count - 1, 1)).clamp(max=count - 1)[:, None]
    # Zero lies between the largest value that is not to be positive and the next.
    shift = -(values.gather(1, (first - 1).clamp(min=0)) + values.gather(1, first))[:, 0] / 2
    shift = shift.to(y)
    module.bias.add_(shift)
    return y + (shift.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else shift)


def _by_map(module: nn.Module, y: Tensor) -> Tensor:
    """(K, n): values of the maps of a layer, at most SAMPLES of each, evenly spaced."""
    maps = y.movedim(1 if isinstance(module, nn.Conv2d) else -1, 0).flatten(1)
    # An odd step, so that all columns of the maps take part.
    step = max(1, maps.shape[1] // SAMPLES) | 1
    return maps[:, ::step].float()


def _set_statistics(module: nn.Module, inputs: tuple) -> None:
    """Give a normalisation layer the statistics of its input (N, K, ...)."""
    maps = inputs[0].movedim(1, 0).flatten(1).float()
    variance, mean = torch.var_mean(maps, 1, correction=0)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance)


def _run(model: nn.Module, x: Tensor) -> None:
    """Run a model, as far as it gets."""
    try:
        model(x.clone())
    except Exception as error:  # a model may raise anything, for its head or for the size
        log.info("the control: the model fails above its layers: %s", error)
