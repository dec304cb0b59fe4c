"""The control for projections: the same network with shuffled weights.

Projections follow the edges of the image even if the weights are random (Adebayo et al. 2018; Nie
et al. 2018). A projection is therefore evidence only next to that of a network that has learned
nothing.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from deconvnet.network.network import DeconvNet

Model = TypeVar("Model", bound=nn.Module)


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
