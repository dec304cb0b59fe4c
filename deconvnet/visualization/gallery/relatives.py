"""How the maps of a network are related: which look alike, and which are made of which.

K maps · C channels of the layer's input · (h, w) filter
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet

# The side of the pictures that are compared, in pixels, and how many relatives a map has.
SIDE = 24
RELATIVES = 8
SOURCES = 6
CHUNK = 32


def similarities(tiles: Tensor) -> np.ndarray:
    """(K, K): how alike signed pictures (K, C, h, w) are, -1 to 1.

    The cosine of two pictures at the shift of one against the other that makes it largest: a
    feature is the same wherever it lies in its tile. 0 for a picture of zeros.
    """
    small = tiles.float()
    if max(small.shape[2:]) > SIDE:
        scale = SIDE / max(small.shape[2:])
        size = [max(1, round(side * scale)) for side in small.shape[2:]]
        small = F.interpolate(small, size, mode="bilinear", antialias=True)
    norms = small.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    # Twice the size, so that a shift moves pixels out of the picture, not to its other side.
    size = [2 * side for side in small.shape[2:]]
    spectra = torch.fft.rfft2(small / norms, s=size)
    result = torch.eye(len(tiles))
    for start in range(0, len(tiles), CHUNK):
        for other in range(0, start + CHUNK, CHUNK):
            rows, columns = spectra[start : start + CHUNK], spectra[other : other + CHUNK]
            products = torch.einsum("achw,bchw->abhw", rows, columns.conj())
            cosines = torch.fft.irfft2(products, s=size).flatten(2).amax(2)
            result[start : start + CHUNK, other : other + CHUNK] = cosines
            result[other : other + CHUNK, start : start + CHUNK] = cosines.T
    return result.clamp(-1, 1).numpy()


def closest(row: np.ndarray, numbers: np.ndarray, itself: int) -> list[tuple[int, float]]:
    """(number, value) of the maps with the largest positive values, without the map itself.

    row: (K,), the values of the maps `numbers` (K,).
    """
    order = np.argsort(-row, kind="stable")
    chosen = [n for n in order if numbers[n] != itself and row[n] > 0][:RELATIVES]
    return [(int(numbers[n]), float(row[n])) for n in chosen]


def filter_weights(net: DeconvNet, layer: int) -> np.ndarray:
    """(K, C): with which weight channels of its input enter each map of a layer from 2: the norm of
    the filter."""
    return net.layer(layer).filters.flatten(2).norm(dim=2).cpu().numpy()


def pooled_maps(net: DeconvNet, layer: int, channel: int) -> list[int]:
    """The maps of the layer below that a channel of a layer's input pools."""
    settings = net.layer(layer - 1).settings
    group = settings.pool[0] if settings.pool else 1
    if settings.split_signs:
        channel %= settings.num_maps // group
    return list(range(channel * group, min((channel + 1) * group, settings.num_maps)))


def separate_sources(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    unit: tuple[int, int, int, int],
    channels: list[int],
) -> Tensor:
    """(len(channels), planes, H, W): what channels of a layer's input add to a unit's projection.

    The unit (image, map, row, column) is first projected to the input of its layer, (C, h, w), and
    then each channel on its own to the pixels. All C together are the projection of the unit.
    """
    n, k, i, j = unit
    z = torch.zeros_like(codes.layer(layer).z[n : n + 1])
    z[0, k, i, j] = codes.layer(layer).z[n, k, i, j]
    signal = net.layer(layer).painting(codes.layer(layer), slice(n, n + 1))(z)
    separate = signal.new_zeros(len(channels), *signal.shape[1:])
    for row, channel in enumerate(channels):
        separate[row, channel] = signal[0, channel]
    images = torch.full((len(channels),), n, device=signal.device)
    return net.decoder(codes.select(images), layer)(separate)
