"""Where the strongest maps of one image are active, drawn over the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.network.network import DeconvNet
from deconvnet.operators.arithmetic import Field
from deconvnet.visualization.drawing.canvas import (
    ELONGATED,
    GAP,
    PAPER,
    hstack,
    quantile_magnitude,
    text_block,
    vstack,
)
from deconvnet.visualization.drawing.sheet import Sheet, enlarged
from deconvnet.visualization.projection.feature_projection import layer_field

SHOWN_MAPS = 12
# Sizes in pixels: the width of an image, of the feature below it, the height of two lines of text
# beside that, the smallest of a mark.
IMAGE, FEATURE, LABEL, MARK = 144, 32, 38, 3
POSITIVE, NEGATIVE = (0.80, 0.05, 0.05), (0.05, 0.20, 0.85)
# The darkest grey of the image below the marks, and the smallest opacity of a mark.
PALE, FAINT = 0.5, 0.12


def active_map_sheet(
    net: DeconvNet,
    z: Tensor,
    image: Tensor,
    preprocessed: Tensor,
    features: Tensor,
    layer: int,
) -> Sheet:
    """An image (1 or 3, H, W) in [0, 1], the same preprocessed, as colours, and then the maps z
    (K, H', W') of it with the largest |z|.

    Every non-zero coefficient is a mark at the centre of its receptive field: red if it is
    positive, blue if it is negative, and the more opaque the larger it is, on one scale. Below each
    are the feature of the map (features: (K, 3, h, w) in [0, 1]), its number and the number
    of its non-zero coefficients.
    """
    image = image.cpu().float().expand(3, -1, -1)
    z, features = z.cpu().float(), enlarged(features, FEATURE)
    size = max(round(IMAGE * image.shape[1] / image.shape[2]), IMAGE // ELONGATED), IMAGE
    both = torch.stack([image, preprocessed.cpu().float()])
    shown, prepared = F.interpolate(both, size, mode="bilinear", antialias=True).clamp(0, 1)
    pale = PALE + (1 - PALE) * shown.mean(0)
    scale = float(quantile_magnitude(z[None], 0.95))
    totals = z.abs().sum((1, 2))
    order = [k for k in totals.sort(descending=True, stable=True).indices.tolist() if totals[k] > 0]
    fields = [layer_field(net, layer, axis) for axis in (0, 1)]
    units = [
        _unit_of_pixels(field, length, pixels, count)
        for field, length, pixels, count in zip(
            fields, image.shape[1:], size, z.shape[1:], strict=True
        )
    ]
    narrowest = min(f.stride * n / m for f, m, n in zip(fields, image.shape[1:], size, strict=True))
    below = max(features.shape[2], LABEL)
    cells = [
        vstack([picture, text_block(name, IMAGE, below)], GAP)
        for name, picture in (("image", shown), ("preprocessed", prepared))
    ]
    for k in order[:SHOWN_MAPS]:
        strength = _dilated(z[k], math.ceil(MARK / narrowest))[units[0]][:, units[1]] / scale
        text = f"map {k}\n{int(torch.count_nonzero(z[k]))} active"
        label = text_block(text, IMAGE - features.shape[3], below)
        cells.append(vstack([_marked(pale, strength), hstack([features[k], label])], GAP))
    return Sheet(cells)


def _unit_of_pixels(field: Field, length: int, pixels: int, units: int) -> Tensor:
    """(pixels,): the unit whose receptive field has its centre next to each pixel of a picture that
    shows `length` pixels of the image."""
    position = (torch.arange(pixels) + 0.5) * length / pixels
    first = field.offset + field.size / 2 - field.stride / 2
    return ((position - first) / field.stride).floor().long().clamp(0, units - 1)


def _dilated(z: Tensor, width: int) -> Tensor:
    """The value with the largest magnitude of the `width` x `width` positions around each."""
    if width <= 1:
        return z
    before, after = (width - 1) // 2, width // 2
    largest = [
        F.max_pool2d(F.pad(sign * z[None], (before, after) * 2), width, 1)[0] for sign in (1, -1)
    ]
    return torch.where(largest[0] >= largest[1], largest[0], -largest[1])


def _marked(pale: Tensor, strength: Tensor) -> Tensor:
    """A grey image (H, W) with marks whose opacity is |strength| (H, W), at least FAINT."""
    opacity = torch.where(strength == 0, 0.0, strength.abs().clamp(FAINT, 1))
    colour = torch.where(
        (strength > 0)[None],
        torch.tensor(POSITIVE).view(3, 1, 1),
        torch.tensor(NEGATIVE).view(3, 1, 1),
    )
    return (opacity * colour + (1 - opacity) * pale).clamp(0, PAPER)
