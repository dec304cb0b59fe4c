"""Images with holes: what stands in for the pixels that were not seen.

The cost ignores these pixels. Only what needs whole images uses the stand-ins: initial filters that
are patches, linear filters of the preprocessing, and pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deconvnet.images.highpass import tikhonov_lowpass

# Weight of the smoothness of the interpolation: seen pixels are almost kept. Smaller values give
# the same error on photographs with half of their pixels missing.
SMOOTHNESS = 0.01


def fill_holes(images: Tensor, mask: Tensor) -> Tensor:
    """Images (N, C, H, W) with a smooth interpolation where the mask is 0; all else is unchanged.

    mask: (N or 1, C or 1, H, W). Where it is 0 the images may have any value, even NaN. A plane
    without a seen pixel becomes 0. The images do not influence each other.
    """
    unseen = (mask == 0).expand_as(images)
    filled = torch.zeros_like(images).where(unseen, images)
    for image, holes in zip(filled, unseen, strict=True):
        planes = holes.any(-1).any(-1) & ~holes.all(-1).all(-1)
        if planes.any():
            seen = ~holes[planes][:, None]
            smooth = tikhonov_lowpass(image[planes][:, None], SMOOTHNESS, seen)
            image[planes] = image[planes].where(seen[:, 0], smooth[:, 0])
    return filled
