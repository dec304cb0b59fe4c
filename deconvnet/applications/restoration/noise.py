"""Estimation of the noise level of an image."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from deconvnet.support.validation import as_images


def estimate_noise(images: Tensor) -> Tensor:
    """The standard deviation (N,) of the noise in images (N, C, H, W), averaged over the planes.

    It comes from the median of the finest wavelet coefficients (Donoho and Johnstone 1994), as
    computed by scikit-image. Fine texture counts as noise: six clean photographs gave 0.002 to
    0.01. The result is 0 if there are no such coefficients, as in an image of one colour.
    """
    from skimage.restoration import estimate_sigma

    images = as_images(images)
    planes = images.cpu().double().numpy()
    with warnings.catch_warnings():
        # scikit-image warns of the median of no coefficients.
        warnings.simplefilter("ignore", RuntimeWarning)
        estimates = [estimate_sigma(image, channel_axis=0) for image in planes]
    sigma = torch.from_numpy(np.nan_to_num(np.asarray(estimates)).mean(1))
    rounding = torch.finfo(images.dtype).eps * images.cpu().abs().amax((1, 2, 3))
    return torch.where(sigma > rounding, sigma, 0.0).to(images.dtype)
