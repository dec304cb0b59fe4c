"""Max pooling that remembers where each maximum was, and unpooling that puts it back there.

    N images · K maps · H, W size of a map · (groups, h, w) size of a pooling window

A window spans `groups` consecutive maps and h x w positions of each. Windows do not overlap; those
at the borders, and the last group of maps, may be partial, so the pooled size is ceil(size /
window). What survives of a window is its element of largest magnitude, with its sign; of two
equally large ones the positive, then the first (Zeiler et al. 2011, and the authors' toolbox).

Switches are the flat indices of the survivors into the (K, H, W) maps of their image, int64, in the
shape of the pooled maps. With the switches fixed, pooling and unpooling are linear and each other's
adjoint: U = P'.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[int, int, int]


def max_pool(z: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """(pooled maps, switches), both (N, ceil(K/groups), ceil(H/h), ceil(W/w)): [p, s] = P(z)."""
    if z.ndim != 4:
        raise ValueError(f"maps must have the shape (N, K, H, W), got {tuple(z.shape)}")
    if len(window) != 3 or min(window) < 1:
        raise ValueError(
            f"pooling window {window}: expected three numbers (groups, h, w), each at least 1"
        )
    windows = _windows(z, window)
    # The zeros that complete a partial window can win only where all of it is zero, and then the
    # first, a real element, is taken. Both reductions return the first of several extrema.
    largest, where_largest = windows.max(-1)
    smallest, where_smallest = windows.min(-1)
    positive = largest >= -smallest
    pooled = torch.where(positive, largest, smallest)
    local = torch.where(positive, where_largest, where_smallest)
    return pooled, _flat_index(local, window, z.shape)


def pool(z: Tensor, switches: Tensor) -> Tensor:
    """The maps' values at the switches, in their shape: p = P_s z, the adjoint of `unpool`."""
    return z.flatten(1).gather(1, switches.flatten(1)).view(switches.shape)


def unpool(pooled: Tensor, switches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Maps (N, K, H, W) with every pooled value at its switch and zeros elsewhere: z = U_s p.

    shape: that of the maps.
    Deterministic on every device: the switches of one image are all different, so the scatter
    writes no place twice.
    """
    if pooled.shape != switches.shape:
        raise ValueError(
            f"pooled maps of shape {tuple(pooled.shape)} do not fit switches of shape "
            f"{tuple(switches.shape)}"
        )
    if pooled.shape[0] != shape[0]:
        raise ValueError(
            f"{pooled.shape[0]} pooled images cannot be unpooled to the shape {tuple(shape)}"
        )
    z = pooled.new_zeros(shape)
    z.flatten(1).scatter_(1, switches.flatten(1), pooled.flatten(1))
    return z


def pooled_shape(shape: tuple[int, int, int], window: Window) -> tuple[int, int, int]:
    """(K, H, W) after pooling maps of the given (K, H, W) with this window."""
    return tuple(-(-size // step) for size, step in zip(shape, window, strict=True))


def _windows(z: Tensor, window: Window) -> Tensor:
    """z, completed with zeros, as (N, groups of maps, rows, columns, elements of a window)."""
    (N, *shape), (k, h, w) = z.shape, window
    K, H, W = pooled_shape(shape, window)
    z = F.pad(z, (0, W * w - shape[2], 0, H * h - shape[1], 0, K * k - shape[0]))
    return z.view(N, K, k, H, h, W, w).permute(0, 1, 3, 5, 2, 4, 6).reshape(N, K, H, W, k * h * w)


def _flat_index(local: Tensor, window: Window, shape: tuple[int, ...]) -> Tensor:
    """Indices into a window, (N, K', H', W'), as indices into the (K, H, W) maps of the image."""
    _, H, W = shape[1:]
    k, h, w = window
    group, row, column = (torch.arange(size, device=local.device) for size in local.shape[1:])
    plane = group[:, None, None] * k + local // (h * w)
    i = row[:, None] * h + local // w % h
    j = column * w + local % w
    return (plane * H + i) * W + j
