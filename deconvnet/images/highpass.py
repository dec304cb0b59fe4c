"""High-pass filters on planes with a mirrored border, and their inverse.

    N images · C planes · H, W pixels     planes (N, C, H, W)
    f (C, C, size, size), size odd, symmetric in both axes: it commutes with mirroring the planes

To invert a high-pass filter without amplifying errors at low frequencies, the inverse also uses a
blurred copy of the planes.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deconvnet.operators.convolution import conv2d
from deconvnet.operators.linear import conjugate_gradients
from deconvnet.support.scaling import exponent, magnitude, times_power

# The inverse also uses the planes blurred by BLUR_SIGMA pixels; their agreement is weighted by
# BLUR_WEIGHT times the mean squared gain of the filter. Measured on the default photographs: the
# round trip has an error of 1e-6; with white noise of 0.1 in y, pixels are recovered with 41 dB
# ("laplacian" and "whiten"; "contrast" has the same), while the blurred picture alone has 20 dB.
# With a weight of 1e-4 "laplacian" falls to 33 dB; with 10 it has 43 dB, but then the blur
# determines frequencies that y should represent.
BLUR_SIGMA = 4.0
BLUR_WEIGHT = 0.1


def correlate(planes: Tensor, f: Tensor) -> Tensor:
    """Correlation of planes with f (C, C, size, size); borders are mirrored, edges repeated."""
    margin = f.shape[-1] // 2
    for axis in (2, 3):
        first = planes.narrow(axis, 0, margin).flip(axis)
        last = planes.narrow(axis, planes.shape[axis] - margin, margin).flip(axis)
        planes = torch.cat([first, planes, last], axis)
    return conv2d(planes, f.to(planes))


def invert(filtered: Tensor, low: Tensor, f: Tensor) -> Tensor:
    """The planes x (N, C, H, W) of `correlate`(x, f) = filtered and `blur`(x) = low, least squares:

        minimise |K x - filtered|^2 + weight |B x - low|^2,
        (K'K + weight B^2) x = K' filtered + weight B low,

    a C x C system at every frequency of the image mirrored to 2H x 2W, with the gains K of f and B
    of the blur. Both terms vanish at the original, so the round trip is exact for any weight. The
    weight limits how much an error in `filtered` is amplified at low frequencies, where the gain of
    a high-pass filter is close to zero.
    """
    gain, low_gain = _gain(f, filtered), _blur_gain(filtered)
    identity = torch.eye(gain.shape[-1]).to(gain)
    weight = BLUR_WEIGHT * gain.shape[-1] * gain.square().mean()
    system = gain.mT @ gain + (weight * low_gain.square())[..., None, None] * identity
    right = _mix(gain.mT, _spectrum(filtered)) + weight * low_gain * _spectrum(low)
    return _from_spectrum(_mix(torch.linalg.inv(system), right), filtered)


def blur(planes: Tensor) -> Tensor:
    """Planes blurred by a Gaussian of BLUR_SIGMA pixels, mirrored at the border."""
    return _apply(_blur_gain(planes), planes)


def _blur_gain(planes: Tensor) -> Tensor:
    """The gain (2H, W+1) of `blur`."""
    height, width = planes.shape[2:]
    u = torch.fft.fftfreq(2 * height, dtype=torch.float32)
    v = torch.fft.rfftfreq(2 * width, dtype=torch.float32)
    squares = u[:, None].square() + v.square()
    return torch.exp(-2 * (math.pi * BLUR_SIGMA) ** 2 * squares).to(planes)


def _gain(f: Tensor, planes: Tensor) -> Tensor:
    """The gain (2H, W+1, C, C) of f, real because f is symmetric in both axes."""
    height, width = planes.shape[2:]
    size = f.shape[-1]
    padded = functional.pad(f.to(planes), (0, 2 * width - size, 0, 2 * height - size))
    centred = padded.roll((-(size // 2), -(size // 2)), (2, 3))
    return torch.fft.rfft2(centred).real.permute(2, 3, 0, 1)


def _spectrum(planes: Tensor) -> Tensor:
    """The Fourier transform (N, C, 2H, W+1) of planes extended by their mirror image."""
    planes = torch.cat([planes, planes.flip(2)], 2)
    return torch.fft.rfft2(torch.cat([planes, planes.flip(3)], 3))


def _from_spectrum(spectrum: Tensor, planes: Tensor) -> Tensor:
    height, width = planes.shape[2:]
    return torch.fft.irfft2(spectrum, (2 * height, 2 * width))[..., :height, :width]


def _mix(gain: Tensor, spectrum: Tensor) -> Tensor:
    return torch.einsum("uvcd,nduv->ncuv", gain.to(spectrum.dtype), spectrum)


def tikhonov_lowpass(planes: Tensor, psi: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """The low frequencies z0 (N, C, H, W) of planes, with the prior of Zeiler et al. 2010:

        minimise 1/2 ||mask (z0 - planes)||^2 + psi/2 ||grad z0||^2

    where the gradient is the difference of neighbouring pixels, zero across the border. Without a
    mask this is a division at every frequency of the mirrored planes: a wave of 2 pi sqrt(psi)
    pixels keeps about half its amplitude. mask: broadcasts to the planes, 0 where they are unknown,
    not all 0 in any plane; solved by conjugate gradients to 1e-5. psi: one number or (N, 1, 1, 1).
    """
    gradient = psi * _gradient_gain(planes)
    if mask is None:
        return _apply_gain(1 / (1 + gradient), planes)
    square = mask.square().to(planes)
    observed = square.expand_as(planes).mean((1, 2, 3), keepdim=True)
    right = square * torch.where(square > 0, planes, torch.zeros_like(planes))
    e = exponent(magnitude(right))
    solution = conjugate_gradients(
        lambda z: square * z + _apply_gain(gradient, z),
        times_power(right, -e),
        tolerance=1e-5,
        max_iterations=500,
        preconditioner=lambda r: _apply_gain(1 / (observed + gradient), r),
    )
    return times_power(solution, e)


def _gradient_gain(planes: Tensor) -> Tensor:
    """The gain (H, W) of grad' grad at the cosines of mirrored planes."""
    u, v = (torch.arange(n, dtype=torch.float64) / (2 * n) for n in planes.shape[2:])
    squares = torch.sin(math.pi * u[:, None]).square() + torch.sin(math.pi * v).square()
    return 4 * squares.to(planes)


def _apply_gain(gain: Tensor, planes: Tensor) -> Tensor:
    """Planes with their cosine coefficients multiplied by a gain, (H, W) or one per image.

    On a CPU by cosine transforms, which take a quarter of the memory of mirrored planes.
    """
    differentiated = torch.is_grad_enabled() and planes.requires_grad
    if planes.device.type == "cpu" and not differentiated:
        # Imported here because it takes as long to load as the rest of a network.
        from scipy.fft import dctn, idctn

        gains = gain.expand(*planes.shape).numpy()
        spectra = [
            dctn(image, axes=(-2, -1)) * image_gain
            for image, image_gain in zip(planes.numpy(), gains, strict=True)
        ]
        images = [idctn(spectrum, axes=(-2, -1), overwrite_x=True) for spectrum in spectra]
        return torch.from_numpy(np.stack(images))
    height, width = planes.shape[2:]
    # Mirrored planes have each frequency twice except the lowest, and the highest not at all.
    both = torch.cat([gain, torch.zeros_like(gain[..., :1, :]), gain[..., 1:, :].flip(-2)], -2)
    return _apply(functional.pad(both, (0, 1)), planes)


def _apply(gain: Tensor, planes: Tensor) -> Tensor:
    return _from_spectrum(gain * _spectrum(planes), planes)
