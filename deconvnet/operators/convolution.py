"""Deconvolution of feature maps into images, and its adjoints in the maps and in the filters.

This module defines "convolution" for the whole package; no other module flips, pads or crops.

    N images · C channels of the target (the image or maps that a layer explains) · K maps
    H, W pixels · h, w filter
    y image (N, C, H, W)     f filters (K, C, h, w)     g connectivity (K, C) of 0 and 1
    z maps  (N, K, H+h-1, W+w-1) with boundary "valid", (N, K, H, W) with all others

It is a true convolution: an impulse in map k paints filter f[k] into the image, unflipped.

- "valid" (both papers): the maps are larger than the image, every filter that touches the image has
  its own coefficient, nothing wraps. An impulse at (i, j) paints f[k] with its top left corner at
  pixel (i-h+1, j-w+1).
- "circular" (Fourier packages): maps and image have the same size and the border wraps. An impulse
  at (i, j) paints f[k] with its top left corner at pixel (i, j).
- "zero": maps and image have the same size and both are zero beyond the border. Filters are
  centred: an impulse at (i, j) paints f[k] with its top left corner at pixel
  (i-(h-1)//2, j-(w-1)//2).
- "reflect": as "zero", but the maps are continued beyond the border by their mirror image, in
  which the border itself is not repeated (torch's padding mode "reflect").

Every operation has a spatial form and a Fourier form; both are exact and agree to rounding.
"""

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.support.validation import check_tensors

Boundary = Literal["valid", "circular", "zero", "reflect"]
Method = Literal["spatial", "fourier"]

BOUNDARIES: tuple[str, ...] = get_args(Boundary)
METHODS: tuple[str, ...] = get_args(Method)
# Boundaries whose maps are first continued beyond the border and then used as "valid" ones.
CONTINUED = ("zero", "reflect")
# Up to this many channels, `_paint_by_rows` is faster.
FEW_CHANNELS = 16
# Large maps are computed this many numbers at a time, which fit into a cache.
STRIP = 2**20
# With one thread and up to this many numbers, torch convolves a single image with another routine
# than a batch. This was measured, not documented: with another version of torch, an image alone and
# in a batch may differ by rounding (tests/operators/test_rounding_in_batches.py names the version).
NATIVE_CONVOLUTION = 20480


def deconvolve(
    z: Tensor,
    f: Tensor,
    g: Tensor | None = None,
    *,
    boundary: Boundary = "valid",
    method: Method = "spatial",
) -> Tensor:
    """The image (N, C, H, W) that the maps paint: y_c = sum_k g_kc (z_k * f_kc).

    The model of Zeiler et al. 2010.
    z: (N, K, H+h-1, W+w-1), or (N, K, H, W) unless the boundary is "valid"; f: (K, C, h, w); g: (K,
    C) or None for full connectivity. Raises ValueError if the shapes do not fit.
    """
    check_tensors(z=z, f=f)
    _check(f, boundary, method, z=z)
    f = connected(f, g)
    h, w = f.shape[2:]
    if boundary in CONTINUED:
        z, boundary = continued(z, (h, w), boundary), "valid"
    if method == "fourier":
        size = fourier_size(z.shape[2:], boundary)
        spectrum = torch.fft.rfft2(z, size)
        painted = torch.fft.irfft2(_mix(spectrum, torch.fft.rfft2(f, size)), size)
        if boundary == "circular":
            return painted
        return painted[..., h - 1 : z.shape[2], w - 1 : z.shape[3]]
    if boundary == "circular":
        z = F.pad(z, (w - 1, 0, h - 1, 0), mode="circular")
    if f.shape[1] <= FEW_CHANNELS:
        return _paint_by_rows(z, f)
    return conv2d(z, f.flip(2, 3).transpose(0, 1))


def correlate(
    y: Tensor,
    f: Tensor,
    g: Tensor | None = None,
    *,
    boundary: Boundary = "valid",
    method: Method = "spatial",
) -> Tensor:
    """The adjoint of `deconvolve` in the maps: F'y, the image correlated with every filter.

    y: (N, C, H, W); f: (K, C, h, w). Returns (N, K, H+h-1, W+w-1), or (N, K, H, W) unless the
    boundary is "valid". <deconvolve(z, f), y> = <z, correlate(y, f)>.
    """
    check_tensors(y=y, f=f)
    _check(f, boundary, method, y=y)
    f = connected(f, g)
    h, w = f.shape[2:]
    if method == "spatial" and boundary != "reflect":
        return _in_strips(y, f, boundary)
    if boundary in CONTINUED:
        return _folded(correlate(y, f, method=method), (h, w), boundary)
    shape = map_size(y.shape[2:], (h, w), boundary)
    size = fourier_size(shape, boundary)
    if boundary == "valid":
        y = F.pad(y, (w - 1, 0, h - 1, 0))
    spectrum = torch.fft.rfft2(f, size).conj()
    maps = torch.fft.irfft2(_mix(torch.fft.rfft2(y, size), spectrum.transpose(0, 1)), size)
    return maps[..., : shape[0], : shape[1]]


def correlate_strips(
    y: Tensor, f: Tensor, boundary: Boundary = "valid", *, numbers: int = STRIP
) -> Iterator[tuple[slice, slice, Tensor]]:
    """`correlate` in strips: (images, rows, their maps), of about `numbers` numbers each.

    On a CPU, strips that fit into the cache take half the time, and a caller that needs the maps
    only once never holds them all in memory. With "reflect", whose border is folded back, there is
    a single strip.
    """
    check_tensors(y=y, f=f)
    _check(f, boundary, "spatial", y=y)
    N, (h, w) = len(y), f.shape[2:]
    rows, columns = map_size(y.shape[2:], (h, w), boundary)
    if boundary == "reflect":
        yield slice(0, N), slice(0, rows), correlate(y, f, boundary=boundary)
        return
    images = max(1, numbers // (len(f) * rows * columns))
    step = rows if images > 1 else min(rows, max(h, numbers // (len(f) * columns)))
    if boundary == "valid" and step == rows:
        # The same sums, but the convolution skips the border, up to two thirds of the products.
        for n in range(0, N, images):
            part = conv2d(y[n : n + images], f, padding=(h - 1, w - 1))
            yield slice(n, n + images), slice(0, rows), part
        return
    if boundary == "circular":
        y = F.pad(y, (0, w - 1, 0, h - 1), mode="circular")
    else:
        full = (w - 1, w - 1, h - 1, h - 1)
        left, right, top, bottom = _beyond((h, w)) if boundary == "zero" else full
        y = F.pad(y, (right, left, bottom, top))
    for n in range(0, N, images):
        for i in range(0, rows, step):
            part = y[n : n + images, :, i : min(i + step, rows) + h - 1]
            yield slice(n, n + images), slice(i, min(i + step, rows)), conv2d(part, f)


def filter_gradient(
    z: Tensor,
    y: Tensor,
    size: int | tuple[int, int],
    g: Tensor | None = None,
    *,
    boundary: Boundary = "valid",
    method: Method = "spatial",
) -> Tensor:
    """The adjoint of `deconvolve` in the filters: Z'y (K, C, h, w), summed over the images.

    z: maps as in `deconvolve`; y: (N, C, H, W); size: (h, w) of the filters, or one number for
    square ones. <deconvolve(z, f), y> = <f, filter_gradient(z, y, size)>. With y the residual and
    the factor lam it is the gradient of the reconstruction term (Zeiler et al. 2010).
    """
    h, w = (size, size) if isinstance(size, int) else size
    check_tensors(z=z, y=y)
    if z.ndim != 4 or y.ndim != 4:
        raise ValueError(
            f"maps (N, K, rows, columns) and images (N, C, H, W) have four axes, got "
            f"{tuple(z.shape)} and {tuple(y.shape)}"
        )
    expected = map_size(y.shape[2:], (h, w), boundary)
    if z.shape[0] != y.shape[0] or tuple(z.shape[2:]) != expected:
        raise ValueError(
            f"maps of shape {tuple(z.shape)} do not fit images of shape {tuple(y.shape)} and "
            f"{h}x{w} filters with boundary {boundary!r}: expected "
            f"({y.shape[0]}, K, {expected[0]}, {expected[1]})"
        )
    if boundary in CONTINUED:
        z, boundary = continued(z, (h, w), boundary), "valid"
    if method == "fourier":
        size = fourier_size(z.shape[2:], boundary)
        if boundary == "valid":
            y = F.pad(y, (w - 1, 0, h - 1, 0))
        product = torch.einsum(
            "nkuv,ncuv->kcuv", torch.fft.rfft2(z, size).conj(), torch.fft.rfft2(y, size)
        )
        gradient = torch.fft.irfft2(product, size)[..., :h, :w]
    else:
        if boundary == "circular":
            z = F.pad(z, (w - 1, 0, h - 1, 0), mode="circular")
        shape = (y.shape[1], z.shape[1], h, w)
        gradient = torch.nn.grad.conv2d_weight(z, shape, y).flip(2, 3).transpose(0, 1)
    return connected(gradient, g)


def map_size(
    image: tuple[int, int], filter_size: tuple[int, int], boundary: Boundary = "valid"
) -> tuple[int, int]:
    """Height and width of the maps that explain an image of the given height and width."""
    (H, W), (h, w) = image, filter_size
    return (H + h - 1, W + w - 1) if boundary == "valid" else (H, W)


def fourier_size(maps: tuple[int, int], boundary: Boundary = "valid") -> tuple[int, int]:
    """The transform size for maps of this size, with small prime factors unless the border wraps.

    With boundary "valid" padding to the size of the maps suffices: the wrapped values fall on the
    h-1 rows that are cropped. With "zero" and "reflect" pass the size of the continued maps.
    """
    return tuple(maps) if boundary == "circular" else (_fast_length(maps[0]), _fast_length(maps[1]))


def continued(z: Tensor, filter_size: tuple[int, int], boundary: Boundary) -> Tensor:
    """Maps (N, K, H+h-1, W+w-1) whose "valid" image is that of z with its own boundary.

    z: (N, K, H, W) with boundary "zero" or "reflect"; with any other it is returned unchanged.
    """
    if boundary not in CONTINUED:
        return z
    mode = "constant" if boundary == "zero" else "reflect"
    return F.pad(z, _beyond(filter_size), mode=mode)


def per_channel(f: Tensor, channels: int) -> Tensor:
    """Grey filters f (K, 1, h, w) for images of several channels: (K*C, C, h, w).

    Filter k*C + c is f_k in channel c and zero in the others, so each channel has its own maps.
    With group = C in the prior the maps of all channels are active at the same positions.
    """
    if f.ndim != 4 or f.shape[1] != 1:
        raise ValueError(f"filters must have the shape (K, 1, h, w), got {tuple(f.shape)}")
    if channels < 1:
        raise ValueError(f"channels={channels}: must be at least 1")
    eye = torch.eye(channels, dtype=f.dtype, device=f.device)
    return (f[:, :, None] * eye[:, :, None, None]).flatten(0, 1)


def check_boundary(boundary: str) -> None:
    """Raise ValueError for an unknown boundary."""
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary={boundary!r}: choose {' or '.join(map(repr, BOUNDARIES))}")


def connected(f: Tensor, g: Tensor | None) -> Tensor:
    """The filters, zero in the planes that g (K, C) disconnects; f itself if g is None."""
    if g is None:
        return f
    if g.shape != f.shape[:2]:
        raise ValueError(
            f"connectivity of shape {tuple(g.shape)} does not fit filters of shape {tuple(f.shape)}"
        )
    return f * g[:, :, None, None].to(f.dtype)


def _beyond(filter_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom): how far beyond the border centred filters need the maps.

    They sum to w-1 and h-1; an even filter, which has no centre, needs one more on the left and at
    the top.
    """
    h, w = filter_size
    return w // 2, (w - 1) // 2, h // 2, (h - 1) // 2


def _folded(z: Tensor, filter_size: tuple[int, int], boundary: Boundary) -> Tensor:
    """The adjoint of `continued`: values beyond the border are dropped or added to their mirror.

    Written out because torch's own adjoint adds in an undefined order on a GPU.
    """
    left, right, top, bottom = _beyond(filter_size)
    for axis, before, after in ((2, top, bottom), (3, left, right)):
        size = z.shape[axis] - before - after
        inside = z.narrow(axis, before, size)
        if boundary == "reflect":
            inside = inside.clone()
            inside.narrow(axis, 1, before).add_(z.narrow(axis, 0, before).flip(axis))
            inside.narrow(axis, size - 1 - after, after).add_(
                z.narrow(axis, before + size, after).flip(axis)
            )
        z = inside
    return z


def _paint_by_rows(z: Tensor, f: Tensor) -> Tensor:
    """Valid deconvolution as the sum of the images painted by each row of the filters, shifted.

    CPU convolution routines are slow for few output channels: one convolution with all h rows of
    the C channels and h additions take about a third of the time for one channel, half for five.
    """
    K, C, h, w = f.shape
    rows = conv2d(z, f.flip(2, 3).permute(2, 1, 0, 3).reshape(h * C, K, 1, w))
    if h == 1:
        return rows
    height = z.shape[2] - h + 1
    painted = rows[:, :C, :height] + rows[:, C : 2 * C, 1 : 1 + height]
    for m in range(2, h):
        painted += rows[:, m * C : (m + 1) * C, m : m + height]
    return painted


def conv2d(z: Tensor, f: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """conv2d that rounds a single image as in a batch: a small one is padded to a batch of two."""
    alone = z.shape[0] == 1 and z.numel() <= NATIVE_CONVOLUTION and z.device.type == "cpu"
    z = torch.cat([z, z]) if alone else z
    maps = F.conv2d(z, f, padding=padding)
    return maps[:1] if alone else maps


def _in_strips(y: Tensor, f: Tensor, boundary: Boundary) -> Tensor:
    """`correlate`, in one piece unless the maps are large and on a CPU."""
    h, w = f.shape[2:]
    shape = (y.shape[0], f.shape[0], *map_size(y.shape[2:], (h, w), boundary))
    numbers = math.prod(shape)
    if not numbers:
        return y.new_zeros(shape)
    if y.device.type != "cpu" or numbers <= 4 * STRIP or _differentiated(y, f):
        if boundary == "valid":  # what the strip is then, without the checks
            return conv2d(y, f, padding=(h - 1, w - 1))
        return next(correlate_strips(y, f, boundary, numbers=numbers))[2]
    maps = y.new_empty(shape)
    for images, rows, part in correlate_strips(y, f, boundary):
        maps[images, :, rows] = part
    return maps


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _mix(spectrum: Tensor, filters: Tensor) -> Tensor:
    return torch.einsum("nkuv,kcuv->ncuv", spectrum, filters)


def _fast_length(length: int) -> int:
    """The smallest number >= length whose prime factors are 2, 3, 5 and 7."""
    while True:
        cofactor = length
        for prime in (2, 3, 5, 7):
            while cofactor % prime == 0:
                cofactor //= prime
        if cofactor == 1:
            return length
        length += 1


def _check(
    f: Tensor,
    boundary: Boundary,
    method: Method,
    *,
    z: Tensor | None = None,
    y: Tensor | None = None,
) -> None:
    check_boundary(boundary)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose 'spatial' or 'fourier'")
    if f.ndim != 4 or f.numel() == 0:
        raise ValueError(f"filters must have the shape (K, C, h, w), got {tuple(f.shape)}")
    K, C, h, w = f.shape
    if z is not None:
        if z.ndim != 4 or z.shape[1] != K:
            raise ValueError(
                f"maps must have the shape (N, {K}, rows, columns) for {K} filters, "
                f"got {tuple(z.shape)}"
            )
        if z.shape[2] < h or z.shape[3] < w:
            raise ValueError(
                f"maps of {z.shape[2]}x{z.shape[3]} are smaller than the {h}x{w} filters"
            )
    if y is not None:
        if y.ndim != 4 or y.shape[1] != C:
            raise ValueError(
                f"images must have the shape (N, {C}, H, W) for filters of {C} channels, "
                f"got {tuple(y.shape)}"
            )
        if boundary != "valid" and (y.shape[2] < h or y.shape[3] < w):
            raise ValueError(
                f"images of {y.shape[2]}x{y.shape[3]} are smaller than the {h}x{w} filters"
            )
