"""Perturbations of images for the experiments of Zeiler and Fergus (2014, sections 4.1 to 4.4).

Boxes are covered; images are shifted, zoomed and rotated; and the probabilities of a model are
computed. Images (N, C, H, W) are in the input space of the model; boxes are top, left, bottom,
right, the last two exclusive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.projector import Projector


def fill_values(projector: Projector, x: Tensor, fill: float | Tensor | None = None) -> Tensor:
    """(N, C, 1, 1): the colour that replaces removed pixels.

    fill: one number, or one per channel (C,), in the input space of the model. The default is mean
    grey: zero if the projector's normalisation subtracts the mean of the data, and the mean colour
    of each image if the model's input is plain pixels, for which zero would be black.
    """
    N, C = x.shape[:2]
    if fill is None:
        is_centred = any(projector.normalization.mean)
        return x.new_zeros(N, C, 1, 1) if is_centred else x.mean((2, 3), keepdim=True)
    fill = torch.as_tensor(fill, dtype=x.dtype, device=x.device)
    if fill.shape not in ((), (C,)):
        raise ValueError(f"fill of shape {tuple(fill.shape)}: one number, or one for each of {C}")
    return fill.reshape(1, -1, 1, 1).expand(N, C, 1, 1)


def cover_boxes(x: Tensor, boxes: Tensor, fill: Tensor) -> Tensor:
    """Images (N, C, H, W) with one box each, boxes (N, 4), filled with `fill` (N, C, 1, 1)."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
    top, left, bottom, right = boxes.to(x.device).unsqueeze(2).unbind(1)
    inside = ((rows >= top) & (rows < bottom))[:, None, :, None]
    inside = inside & ((columns >= left) & (columns < right))[:, None, None, :]
    return torch.where(inside, fill, x)


def shifted(x: Tensor, rows: float, fill: Tensor) -> Tensor:
    """Images shifted down by whole pixels (up if negative), with `fill` (N, C, 1, 1) above."""
    H = x.shape[2]
    rows = max(-H, min(H, int(rows)))
    new = fill.expand_as(x).clone()
    new[:, :, max(rows, 0) : H + min(rows, 0)] = x[:, :, max(-rows, 0) : H - max(rows, 0)]
    return new


def zoomed(x: Tensor, factor: float, fill: Tensor) -> Tensor:
    """Images enlarged about their centre (reduced if factor < 1), with bilinear interpolation."""
    return _warped(x, [[1 / factor, 0.0], [0.0, 1 / factor]], fill)


def rotated(x: Tensor, degrees: float, fill: Tensor) -> Tensor:
    """Images rotated counter-clockwise about their centre, with bilinear interpolation."""
    # Round, because otherwise neither sine nor cosine of a right angle would be exactly 0.
    sine, cosine = (round(f(math.radians(degrees)), 15) for f in (math.sin, math.cos))
    return _warped(x, [[cosine, -sine], [sine, cosine]], fill)


def _warped(x: Tensor, matrix: list[list[float]], fill: Tensor) -> Tensor:
    """Pixel (column, row), relative to the centre, takes the value at matrix * (column, row)."""
    H, W = x.shape[2:]
    (a, b), (c, d) = matrix
    # The coordinates of grid_sample run from -1 to 1 along each axis, whatever its length.
    theta = x.new_tensor([[a, b * H / W, 0.0], [c * W / H, d, 0.0]])
    coordinates = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x - fill, coordinates, padding_mode="zeros", align_corners=False) + fill


def class_probabilities(projector: Projector, x: Tensor) -> Tensor | None:
    """(N, classes): the probabilities of the model; None if its output is not a table of classes.

    These are the softmax of its outputs, unless the outputs are probabilities already.
    """
    outputs = projector.outputs(x)
    if outputs is None:
        return None
    outputs = outputs.double()
    if (outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-4).all():
        return outputs
    return outputs.softmax(1)


def class_indices(base: Tensor, classes: Tensor | None) -> Tensor:
    """(N,): the given classes, or the most likely classes of the probabilities `base` (N, K)."""
    N, K = base.shape
    if classes is None:
        return base.argmax(1)
    classes = torch.as_tensor(classes, device=base.device).reshape(-1)
    if classes.shape != (N,) or classes.dtype.is_floating_point:
        raise ValueError(f"classes {classes.tolist()}: expected one number for each of {N} images")
    if ((classes < 0) | (classes >= K)).any():
        raise ValueError(f"classes {classes.tolist()}: the model has {K}, numbered from 0")
    return classes


def layer_title(layer: str, longest: int = 20) -> str:
    """The name of a layer in a caption, shortened to its end; a number gets the word "layer"."""
    if layer.isdigit():
        return f"layer {layer}"
    return layer if len(layer) <= longest else f"…{layer[1 - longest :]}"


def check_images(x: Tensor) -> None:
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"images of shape {tuple(x.shape)}: expected (N, C, H, W), N at least 1")


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover 0 to count - 1."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
