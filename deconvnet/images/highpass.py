"""What a filter makes of planes whose border is mirrored, and the planes back from that.

    N images · C planes · H, W pixels     planes (N, C, H, W)
    f (C, C, size, size), size odd, symmetric in both axes: it commutes with mirroring the planes

This module decides what a filter sees beyond the border, and what is kept of the planes so that
undoing a high-pass does not blow up what an error leaves at its low frequencies.
"""

import math

import numpy as np
import torch
from scipy.fft import dctn, idctn
from torch import Tensor
from torch.nn import functional

from deconvnet.operators.linear import conjugate_gradients
from deconvnet.support.units import exponent, magnitude, times_power

# To undo a filter, the planes blurred by LOW_SIGMA pixels are known too; their agreement weighs
# LOW_WEIGHT times the mean squared gain of the filter. Measured on the default photographs: the
# round trip errs by 1e-6; with white noise of 0.1 in y the pixels come back with 41 dB ("laplacian"
# and "whiten"; "contrast" has the same), while the blurred picture alone has 20 dB. With the weight
# 1e-4 "laplacian" falls to 33 dB; with 10 it has 43 dB, but then the blur decides frequencies that
# y is there to explain.
LOW_SIGMA = 4.0
LOW_WEIGHT = 0.1


def correlate(planes: Tensor, f: Tensor) -> Tensor:
    """Correlation with f (C, C, size, size); the border is mirrored and the edge repeated."""
    margin = f.shape[-1] // 2
    for axis in (2, 3):
        first = planes.narrow(axis, 0, margin).flip(axis)
        last = planes.narrow(axis, planes.shape[axis] - margin, margin).flip(axis)
        planes = torch.cat([first, planes, last], axis)
    return functional.conv2d(planes, f.to(planes))


def invert(filtered: Tensor, low: Tensor, f: Tensor) -> Tensor:
    """The planes (N, C, H, W) of which f makes `filtered` and `blur` makes `low`, least squares:

        minimise |K x - filtered|^2 + weight |B x - low|^2,
        (K'K + weight B^2) x = K' filtered + weight B low,

    a C x C system for every frequency of the image mirrored to 2H x 2W, with the gains K of f and B
    of the blur. Both terms vanish at the original, so the round trip is exact whatever the weight;
    the weight says how little of an error of `filtered` reaches the low frequencies, where a
    high-pass filter has next to no gain to divide by.
    """
    gain, low_gain = _gain(f, filtered), _blur_gain(filtered)
    identity = torch.eye(gain.shape[-1]).to(gain)
    weight = LOW_WEIGHT * gain.shape[-1] * gain.square().mean()
    system = gain.mT @ gain + (weight * low_gain.square())[..., None, None] * identity
    right = _mix(gain.mT, _spectrum(filtered)) + weight * low_gain * _spectrum(low)
    return _from_spectrum(_mix(torch.linalg.inv(system), right), filtered)


def blur(planes: Tensor) -> Tensor:
    """The planes under a Gaussian of LOW_SIGMA pixels, mirrored at the border."""
    return _apply(_blur_gain(planes), planes)


def _blur_gain(planes: Tensor) -> Tensor:
    """The gain (2H, W+1) of `blur`."""
    height, width = planes.shape[2:]
    of = torch.float32
    u, v = torch.fft.fftfreq(2 * height, dtype=of), torch.fft.rfftfreq(2 * width, dtype=of)
    squares = u[:, None].square() + v.square()
    return torch.exp(-2 * (math.pi * LOW_SIGMA) ** 2 * squares).to(planes)


def _gain(f: Tensor, planes: Tensor) -> Tensor:
    """The gain (2H, W+1, C, C) of f, real because f is symmetric in both axes."""
    height, width = planes.shape[2:]
    size = f.shape[-1]
    padded = functional.pad(f.to(planes), (0, 2 * width - size, 0, 2 * height - size))
    centred = padded.roll((-(size // 2), -(size // 2)), (2, 3))
    return torch.fft.rfft2(centred).real.permute(2, 3, 0, 1)


def _spectrum(planes: Tensor) -> Tensor:
    """The transform (N, C, 2H, W+1) of planes continued by their mirror image, without a jump."""
    planes = torch.cat([planes, planes.flip(2)], 2)
    return torch.fft.rfft2(torch.cat([planes, planes.flip(3)], 3))


def _from_spectrum(spectrum: Tensor, planes: Tensor) -> Tensor:
    height, width = planes.shape[2:]
    return torch.fft.irfft2(spectrum, (2 * height, 2 * width))[..., :height, :width]


def _mix(gain: Tensor, spectrum: Tensor) -> Tensor:
    return torch.einsum("uvcd,nduv->ncuv", gain.to(spectrum.dtype), spectrum)


def tikhonov_lowpass(planes: Tensor, psi: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """The map z0 (N, C, H, W) of the low frequencies of planes (Zeiler et al. 2010, its prior):

        minimise 1/2 ||mask (z0 - planes)||^2 + psi/2 ||grad z0||^2

    with the differences of neighbouring pixels for a gradient, and none across the border. Without
    a mask a division for every frequency of the mirrored planes, of which a wave of 2 pi sqrt(psi)
    pixels keeps about half its amplitude. mask: broadcasts to the planes, 0 where they are unknown,
    some of it not 0 in every plane; then conjugate gradients to 1e-5. psi: one number or
    (N, 1, 1, 1).
    """
    gradient = psi * _gradient_gain(planes)
    if mask is None:
        return _apply_gain(1 / (1 + gradient), planes)
    square = mask.square().to(planes)
    known = square.expand_as(planes).mean((1, 2, 3), keepdim=True)
    right = square * torch.where(square > 0, planes, torch.zeros_like(planes))
    e = exponent(magnitude(right))
    found = conjugate_gradients(
        lambda z: square * z + _apply_gain(gradient, z),
        times_power(right, -e),
        tolerance=1e-5,
        max_iterations=500,
        preconditioner=lambda r: _apply_gain(1 / (known + gradient), r),
    )
    return times_power(found, e)


def _gradient_gain(planes: Tensor) -> Tensor:
    """The gain (H, W) of grad' grad at the cosines that mirrored planes are made of."""
    u, v = (torch.arange(n, dtype=torch.float64) / (2 * n) for n in planes.shape[2:])
    squares = torch.sin(math.pi * u[:, None]).square() + torch.sin(math.pi * v).square()
    return 4 * squares.to(planes)


def _apply_gain(gain: Tensor, planes: Tensor) -> Tensor:
    """The planes with every cosine (H, W) of theirs times a gain, (H, W) or one for each image.

    On a CPU by cosine transforms, which take a quarter of the memory of the mirrored planes.
    """
    differentiated = torch.is_grad_enabled() and planes.requires_grad
    if planes.device.type == "cpu" and not differentiated:
        made = [
            dctn(plane, axes=(-2, -1)) * own
            for plane, own in zip(planes.numpy(), gain.expand(*planes.shape).numpy(), strict=True)
        ]
        made = [idctn(of, axes=(-2, -1), overwrite_x=True) for of in made]
        return torch.from_numpy(np.stack(made))
    height, width = planes.shape[2:]
    # The mirrored planes have each frequency but the lowest twice, and the highest not at all.
    both = torch.cat([gain, torch.zeros_like(gain[..., :1, :]), gain[..., 1:, :].flip(-2)], -2)
    return _apply(functional.pad(both, (0, 1)), planes)


def _apply(gain: Tensor, planes: Tensor) -> Tensor:
    return _from_spectrum(gain * _spectrum(planes), planes)
