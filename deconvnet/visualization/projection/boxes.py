"""Boxes of units in pixels, all of one size, and crops of images to them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tile_boxes(fields: Tensor, image: tuple[int, int]) -> Tensor:
    """(U, 4), boxes of one size: the fields, or the whole image along an axis that is shorter.

    If fields differ in size (above upsampling or adaptive pooling), all boxes are as large as the
    largest.
    """
    boxes = fields.clone()
    for axis, size in enumerate(image if len(boxes) else ()):
        lengths = boxes[:, axis + 2] - boxes[:, axis]
        longest = lengths.max()
        boxes[:, axis] -= (longest - lengths) // 2
        boxes[:, axis + 2] = boxes[:, axis] + longest
        if longest >= size:
            boxes[:, axis], boxes[:, axis + 2] = 0, size
    return boxes


def crop(images: Tensor, boxes: Tensor, *, fill: float = 0.0) -> Tensor:
    """(U, C, h, w): one box of each image (U, C, H, W); boxes: (U, 4), of one size, which may reach
    beyond the image, where the result is `fill`."""
    parts = []
    H, W = images.shape[2:]
    for image, (top, left, bottom, right) in zip(images, boxes.tolist(), strict=True):
        inside = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        outside = (
            *(min(max(-left, 0), right - left), min(max(right - W, 0), right - left)),
            *(min(max(-top, 0), bottom - top), min(max(bottom - H, 0), bottom - top)),
        )
        parts.append(F.pad(inside, outside, value=fill))
    return torch.stack(parts) if parts else images[:0]
