"""What the switches are worth: the same network with unpoolings that forget a part of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.operators.pooling import UNPOOLINGS
from deconvnet.support.modes import plain

MEANINGS = {
    "switches": "every value back at the place and in the map of its maximum",
    "no_map": "at the place of the maximum, in all maps of its group",
    "no_place": "in the map of the maximum, at all places of the window",
    "centre": "in the middle of the window, whatever the switch",
    "average": "everywhere in the window, as average pooling has it",
    "everywhere": "everywhere in the window, the full value",
}


@dataclass(frozen=True)
class Ablation:
    """One layer seen through one unpooling of all layers below it.

    images: (N, C, H, W) what is made of the images, preprocessed domain; snr: in dB, over all of
    them. With `inferred` the maps are those that explain the images best through this unpooling,
    else those that were inferred with the switches.
    """

    kind: str
    layer: int
    inferred: bool
    images: Tensor
    snr: float


@plain
def ablate(net: DeconvNet, codes: Codes, *, chunk: int = 8) -> list[Ablation]:
    """All layers above the first through all unpoolings, in the order of UNPOOLINGS.

    Maps are inferred anew, `chunk` images at a time, only where a layer explains the image: what it
    stands on is the same in any case.
    """
    found = []
    for kind in UNPOOLINGS:
        with unpooling(net, kind):
            for number in range(2, len(codes.layers) + 1):
                found.append(_seen(net, codes, kind, number, inferred=False))
                if net.layer(number).settings.target != "maps":
                    below = replace(codes, layers=codes.layers[: number - 1])
                    anew = net.infer_next_layer(below, chunk=chunk)
                    found.append(_seen(net, anew, kind, number, inferred=True))
    return found


@contextmanager
def unpooling(net: DeconvNet, kind: str) -> Iterator[None]:
    """The network with another unpooling in all layers, for a while."""
    before = [layer.settings for layer in net.layers]
    try:
        for layer in net.layers:
            layer.settings = replace(layer.settings, unpooling=kind)
        yield
    finally:
        for layer, settings in zip(net.layers, before, strict=True):
            layer.settings = settings


def _seen(net: DeconvNet, codes: Codes, kind: str, layer: int, *, inferred: bool) -> Ablation:
    made = net.synthesize(codes, layer)
    return Ablation(kind, layer, inferred, made, snr(codes.y, made))
