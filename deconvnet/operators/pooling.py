"""Max pooling with switches, the positions of the maxima, and unpooling to these positions.

    N images · K maps · H, W size of a map · (groups, h, w) size of a pooling window

A window spans `groups` consecutive maps and h x w positions of each. Windows do not overlap; those
at the borders, and the last group of maps, may be partial, so the pooled size is ceil(size /
window). Each window keeps its element of largest magnitude, with its sign; of two equally large
ones the positive, then the first (Zeiler et al. 2011, and the authors' toolbox).

Switches are the flat indices of the survivors into the (K, H, W) maps of their image, int64, in the
shape of the pooled maps. With the switches fixed, pooling and unpooling are linear and each other's
adjoint: U = P'.

To measure what the switches contribute, other unpoolings ignore part of them and spread each value
with weights over the positions of its window that remain possible (`weighted_unpool`).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.support.thread_pool import run_all
from deconvnet.support.validation import check_tensors

Window = tuple[int, int, int]

# The switches of maps with at least so many numbers an image are found by compiled code, several
# times as fast on a CPU; loading it takes a second.
COMPILED = 2**14

UNPOOLINGS = ("switches", "no_map", "no_place", "centre", "average", "everywhere")


def max_pool(z: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """(pooled maps, switches), both (N, ceil(K/groups), ceil(H/h), ceil(W/w)): [p, s] = P(z)."""
    check_tensors(z=z)
    if z.ndim != 4 or 0 in z.shape[1:]:
        raise ValueError(f"maps must have the shape (N, K, H, W), got {tuple(z.shape)}")
    if not isinstance(window, (tuple, list)) or len(window) != 3 or not all(map(_is_size, window)):
        raise ValueError(
            f"pooling window {window}: expected three numbers (groups, h, w), each at least 1"
        )
    largest, where_largest = _pool3d(z, window)
    smallest, where_smallest = _pool3d(-z, window)
    positive = largest >= smallest
    pooled = torch.where(positive, largest, -smallest)
    return pooled, torch.where(positive, where_largest, where_smallest)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def split_signs(z: Tensor) -> Tensor:
    """(N, 2K, H, W): the positive parts of maps (N, K, H, W), then the negative, both >= 0."""
    return torch.cat([z.relu(), (-z).relu()], 1)


def strongest(z: Tensor, window: Window) -> Tensor:
    """The switches of `max_pool` alone, in at most half its time; ties are broken arbitrarily."""
    compiles = z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64)
    if not compiles or z[:1].numel() < COMPILED:
        return _pool3d(z.abs(), window)[1]
    # Imported here because it loads numba.
    from deconvnet.operators.sparse_kernels import strongest as find_strongest

    switches = z.new_empty(len(z), *pooled_shape(z.shape[1:], window), dtype=torch.int64)
    images = zip(z.detach().contiguous().numpy(), switches.numpy(), strict=True)
    run_all([partial(find_strongest, maps, tuple(window), where) for maps, where in images])
    return switches


def pool(z: Tensor, switches: Tensor) -> Tensor:
    """The maps' values at the switches, in their shape: p = P_s z, the adjoint of `unpool`."""
    return z.flatten(1).gather(1, switches.flatten(1)).view(switches.shape)


def unpool(pooled: Tensor, switches: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Maps (N, K, H, W) with every pooled value at its switch and zeros elsewhere: z = U_s p.

    shape: that of the maps.
    Deterministic on every device: the switches of an image are all different, so the scatter never
    writes to one position twice.
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


def weighted_unpool(pooled: Tensor, weights: Tensor, window: Window) -> Tensor:
    """Maps with every pooled value spread over all positions of its window: z_i = w_i p.

    weights: (N or 1, K, H, W), in the shape of the maps.
    """
    z = pooled
    for axis, size in enumerate(window, 1):
        z = z.repeat_interleave(size, axis).narrow(axis, 0, weights.shape[axis])
    return weights * z


def weighted_pool(z: Tensor, weights: Tensor, window: Window) -> Tensor:
    """The adjoint of `weighted_unpool`: p = sum of w_i z_i over each window."""
    return _sum_windows(weights * z, window)


def unpooling_weights(
    kind: str, switches: Tensor, shape: tuple[int, int, int], window: Window
) -> Tensor:
    """The weights (N, K, H, W), float32, of an unpooling that uses only part of the switches.

    no_map: the position of the maximum, in all maps of its group; no_place: all positions in its
    map; centre: the middle of the window, whatever the switch; average: all positions of the
    window. Their squares sum to 1 in each window, so that pooling with them inverts unpooling.
    everywhere: the value itself at all positions.
    """
    if kind not in UNPOOLINGS:
        raise ValueError(f"unpooling={kind}: choose one of {', '.join(UNPOOLINGS)}")
    if kind == "centre":
        switches = _centres(shape, window, switches.device).expand_as(switches)
    if kind in ("average", "everywhere"):
        weights = torch.ones(1, *shape, device=switches.device)
    else:
        ones = torch.ones_like(switches, dtype=torch.float32)
        weights = unpool(ones, switches, (len(ones), *shape))
    ignored = {"no_map": (window[0], 1, 1), "no_place": (1, *window[1:])}.get(kind)
    if ignored is not None:
        weights = weighted_unpool(_sum_windows(weights, ignored), torch.ones_like(weights), ignored)
    if kind == "everywhere":
        return weights
    length = _sum_windows(weights.square(), window).sqrt()
    return weights / weighted_unpool(length, torch.ones_like(weights), window)


def pooled_shape(shape: tuple[int, int, int], window: Window) -> tuple[int, int, int]:
    """(K, H, W) after pooling maps of the given (K, H, W) with this window."""
    return tuple(-(-size // step) for size, step in zip(shape, window, strict=True))


def _pool3d(z: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """(maxima, flat indices) of windows over maps, rows and columns; ties go to the first."""
    largest, indices = F.max_pool3d(z[:, None], window, ceil_mode=True, return_indices=True)
    return largest[:, 0], indices[:, 0]


def _sum_windows(z: Tensor, window: Window) -> Tensor:
    (N, *shape), (k, h, w) = z.shape, window
    K, H, W = pooled_shape(shape, window)
    z = F.pad(z, (0, W * w - shape[2], 0, H * h - shape[1], 0, K * k - shape[0]))
    return z.view(N, K, k, H, h, W, w).sum((2, 4, 6))


def _centres(shape: tuple[int, int, int], window: Window, device: torch.device) -> Tensor:
    """(1, K', H', W'): switches to the middle of every window, for partial ones of their part."""
    middles = []
    for size, step in zip(shape, window, strict=True):
        first = torch.arange(0, size, step, device=device)
        middles.append((first + (first + step).clamp(max=size) - 1) // 2)
    plane, row, column = middles
    return (plane.view(-1, 1, 1) * shape[1] + row.view(-1, 1)) * shape[2] + column[None, None]
