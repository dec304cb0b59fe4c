"""Ablation of the switches: the same network with unpoolings that discard part of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.operators.pooling import UNPOOLINGS
from deconvnet.support.torch_modes import plain

# Where each unpooling puts a pooled value.
DESCRIPTIONS = {
    "switches": "at the position and in the map of the maximum",
    "no_map": "at the position of the maximum, in all maps of its group",
    "no_place": "in the map of the maximum, at all positions of the window",
    "centre": "at the centre of the window, whatever the switch",
    "average": "everywhere in the window, as in average pooling",
    "everywhere": "everywhere in the window, the full value",
}


@dataclass(frozen=True)
class SwitchAblation:
    """Reconstruction from one layer with one unpooling in all layers below it.

    images: (N, C, H, W), the reconstructions in the preprocessed domain; snr: in dB, over all
    images. inferred: whether the maps were inferred again with this unpooling, or are those that
    were inferred with the switches.
    """

    kind: str
    layer: int
    inferred: bool
    images: Tensor
    snr: float


@plain
def ablate(net: DeconvNet, codes: Codes, *, chunk: int = 8) -> list[SwitchAblation]:
    """Ablations of all layers above the first with all unpoolings, in the order of UNPOOLINGS.

    Maps are inferred again, `chunk` images at a time, only for layers that reconstruct the image:
    the maps of the others do not depend on the unpooling.
    """
    results = []
    for kind in UNPOOLINGS:
        with unpooling(net, kind):
            for number in range(2, len(codes.layers) + 1):
                results.append(_ablated(net, codes, kind, number, inferred=False))
                if net.layer(number).settings.target != "maps":
                    codes_below = replace(codes, layers=codes.layers[: number - 1])
                    inferred = net.infer_next_layer(codes_below, chunk=chunk)
                    results.append(_ablated(net, inferred, kind, number, inferred=True))
    return results


@contextmanager
def unpooling(net: DeconvNet, kind: str) -> Iterator[None]:
    """Use another unpooling in all layers of the network within a `with` block."""
    previous = [layer.settings for layer in net.layers]
    try:
        for layer in net.layers:
            layer.settings = replace(layer.settings, unpooling=kind)
        yield
    finally:
        for layer, settings in zip(net.layers, previous, strict=True):
            layer.settings = settings


def _ablated(
    net: DeconvNet, codes: Codes, kind: str, layer: int, *, inferred: bool
) -> SwitchAblation:
    images = net.synthesize(codes, layer)
    return SwitchAblation(kind, layer, inferred, images, snr(codes.y, images))
