"""A network that has learned nothing, to compare pictures with.

Projections follow the edges of the image even where the weights are random (Adebayo et al. 2018;
Nie et al. 2018), so a picture of a feature is evidence only beside the picture of its control.
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
    """A copy of a network with the entries of every weight in a random order.

    Weights keep their values, and with them their mean and norm, and lose all structure: of every
    filter over space and channels. Biases and what normalisation knows stay.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, DeconvNet):
        for layer in model.layers:
            for f, wiring in zip(layer.filters, layer.connectivity, strict=True):
                # Only among the maps that the filter sees.
                f[wiring.bool()] = _shuffled(f[wiring.bool()], generator)
        return model
    for p in model.parameters():
        if p.dim() > 1:
            p.copy_(torch.stack([_shuffled(weight, generator) for weight in p]))
    return model


def _shuffled(weight: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
    return weight.flatten()[order].view(weight.shape)
