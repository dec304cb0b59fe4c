"""SNR and PSNR of an estimate, in decibels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def snr(reference: Tensor, estimate: Tensor) -> float:
    """10 log10( sum (reference - its mean)^2 / sum (reference - estimate)^2 ) in dB.

    inf if the two are equal, even for a constant reference.
    """
    reference, estimate = reference.double(), estimate.double()
    signal = (reference - reference.mean()).square().sum()
    noise = (reference - estimate).square().sum()
    if noise == 0:
        return math.inf
    return float(10 * torch.log10(signal / noise))


def psnr(reference: Tensor, estimate: Tensor) -> Tensor:
    """10 log10(1 / mean squared error) in dB of every image (N,), for pixels in [0, 1].

    reference, estimate: (N, C, H, W); inf if the two are equal.
    """
    return -10 * (reference.double() - estimate.double()).square().mean((1, 2, 3)).log10()


def decibels(signal: float, error: float) -> float:
    """10 log10(signal / error) of two energies, clamped to +-300 dB."""
    if error <= 1e-30 * signal:
        return 300.0 if signal > 0 else -300.0
    return 10 * math.log10(max(signal / error, 1e-30))
