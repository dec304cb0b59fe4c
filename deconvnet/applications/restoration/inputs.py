"""Checks of the arguments of `Restorer`: images, masks and noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deconvnet.applications.restoration.noise import estimate_noise
from deconvnet.support.validation import as_tensor, as_weights


def checked_images(images: object, filter_shape: tuple[int, int]) -> Tensor:
    """Images (N, 1 or 3, H, W), finite and not smaller than the filters."""
    images = as_tensor(images, "images")
    check_shape(images)
    if not torch.isfinite(images).all():
        raise ValueError("images must be finite: there are NaN or infinite values")
    if len(images) == 0:
        raise ValueError("0 images: must be at least 1")
    check_size(tuple(images.shape[2:]), filter_shape)
    return images


def check_shape(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"images must be floating and (N, 1 or 3, H, W), got {tuple(images.shape)} of "
            f"{images.dtype}"
        )
    if images.numel() == 0:
        raise ValueError(f"images must not be empty, got the shape {tuple(images.shape)}")


def check_size(size: tuple[int, int], filter_shape: tuple[int, int]) -> None:
    """Raise ValueError for images of size (H, W) that are smaller than the filters."""
    (H, W), (h, w) = size, filter_shape
    if h > H or w > W:
        raise ValueError(f"images of {H}x{W} are smaller than the {h}x{w} filters")


def checked_mask(mask: object, images: Tensor) -> Tensor:
    """A mask (N or 1, 1, H, W) of 0 and 1 for images (N, C, H, W), on their device."""
    mask = as_tensor(mask, "mask")
    fits = mask.ndim == 4 and mask.shape[1] == 1 and len(mask) in (1, len(images))
    if not fits or mask.shape[2:] != images.shape[2:]:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: expected (N or 1, 1, H, W) for images of "
            f"shape {tuple(images.shape)}"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must be 0 or 1 everywhere")
    if not mask.flatten(1).any(1).all():
        raise ValueError("mask: an image has no observed pixel, the mask is 0 everywhere")
    return mask.to(images.device)


def noise_level(sigma: float | Tensor | None, images: Tensor) -> Tensor:
    """The standard deviation (N,) of the noise; None: estimated from images (N, C, H, W)."""
    if sigma is None:
        sigma = estimate_noise(images)
        if not (sigma > 0).all():
            raise ValueError(
                f"sigma=None: image {int((sigma == 0).nonzero()[0])} has no noise that could "
                "be estimated; give sigma"
            )
    sigma = as_weights(sigma, "sigma")
    if sigma.numel() not in (1, len(images)):
        raise ValueError(
            f"sigma of the shape {tuple(sigma.shape)}: must be one number, or one for each of "
            f"{len(images)} images"
        )
    sigma = sigma.flatten()
    if not ((sigma > 0) & (sigma < math.inf)).all():
        value = sigma.tolist() if len(sigma) > 1 else sigma.item()
        raise ValueError(f"sigma={value}: must be positive")
    return sigma.expand(len(images))
