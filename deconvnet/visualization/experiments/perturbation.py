"""What the experiments of Zeiler & Fergus (2014, sections 4.2 to 4.4) do to images.

Grey squares, shifts, zooms and rotations, and the probabilities that a model answers with. Images
are what the model takes, (N, C, H, W); boxes are top, left, bottom, right, the last two exclusive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.projector import Projector


def fill_values(projector: Projector, x: Tensor, fill: float | Tensor | None = None) -> Tensor:
    """(N, C, 1, 1): what stands in the place of pixels that are taken away.

    fill: a number, or one for each channel (C,), as the model takes them. By default mean grey:
    zero where the projector's normalisation takes the mean of the data away, and the mean colour of
    each image where the model takes plain pixels, of which zero would be black.
    """
    N, C = x.shape[:2]
    if fill is None:
        centred = any(projector.normalization.mean)
        return x.new_zeros(N, C, 1, 1) if centred else x.mean((2, 3), keepdim=True)
    fill = torch.as_tensor(fill, dtype=x.dtype, device=x.device)
    if fill.shape not in ((), (C,)):
        raise ValueError(f"fill of shape {tuple(fill.shape)}: one number, or one for each of {C}")
    return fill.reshape(1, -1, 1, 1).expand(N, C, 1, 1)


def cover_boxes(x: Tensor, boxes: Tensor, fill: Tensor) -> Tensor:
    """Images (N, C, H, W) with a box of each (N, 4) filled with `fill` (N, C, 1, 1)."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
    top, left, bottom, right = boxes.to(x.device).unsqueeze(2).unbind(1)
    inside = ((rows >= top) & (rows < bottom))[:, None, :, None]
    inside = inside & ((columns >= left) & (columns < right))[:, None, None, :]
    return torch.where(inside, fill, x)


def shifted(x: Tensor, rows: float, fill: Tensor) -> Tensor:
    """Images moved down by whole pixels (up if negative), with `fill` (N, C, 1, 1) behind them."""
    H = x.shape[2]
    rows = max(-H, min(H, int(rows)))
    new = fill.expand_as(x).clone()
    new[:, :, max(rows, 0) : H + min(rows, 0)] = x[:, :, max(-rows, 0) : H - max(rows, 0)]
    return new


def zoomed(x: Tensor, factor: float, fill: Tensor) -> Tensor:
    """Images enlarged about their middle (made smaller if factor < 1), bilinear."""
    return _warped(x, [[1 / factor, 0.0], [0.0, 1 / factor]], fill)


def rotated(x: Tensor, degrees: float, fill: Tensor) -> Tensor:
    """Images turned counter-clockwise about their middle, bilinear, as they lie on the page."""
    # Of the right angles neither the sine nor the cosine comes out as exactly 0 otherwise.
    sine, cosine = (round(f(math.radians(degrees)), 15) for f in (math.sin, math.cos))
    return _warped(x, [[cosine, -sine], [sine, cosine]], fill)


def _warped(x: Tensor, matrix: list[list[float]], fill: Tensor) -> Tensor:
    """Pixel (column, row) about the middle shows what lies at matrix * (column, row)."""
    H, W = x.shape[2:]
    (a, b), (c, d) = matrix
    # grid_sample counts each axis from -1 to 1, whatever its length is.
    theta = x.new_tensor([[a, b * H / W, 0.0], [c * W / H, d, 0.0]])
    places = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x - fill, places, padding_mode="zeros", align_corners=False) + fill


def class_probabilities(projector: Projector, x: Tensor) -> Tensor | None:
    """(N, classes): the model's probabilities, or None of a model that does not tell classes.

    The softmax of its outputs, unless these are probabilities already.
    """
    outputs = projector.outputs(x)
    if outputs is None:
        return None
    outputs = outputs.double()
    if (outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-4).all():
        return outputs
    return outputs.softmax(1)


def class_indices(base: Tensor, classes: Tensor | None) -> Tensor:
    """(N,): the classes that a user named as the true ones, or the most likely of `base` (N, K)."""
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
    """The name of a layer in a caption, or the end of it; a number alone needs a word."""
    if layer.isdigit():
        return f"layer {layer}"
    return layer if len(layer) <= longest else f"…{layer[1 - longest :]}"


def check_images(x: Tensor) -> None:
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(f"images of shape {tuple(x.shape)}: expected (N, C, H, W), N at least 1")


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` or fewer that cover 0 to count - 1."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
