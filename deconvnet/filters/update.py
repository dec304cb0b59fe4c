"""Learning of filters from sums over images, and the care of filters that are dead or double.

    z maps (N, K, H+h-1, W+w-1)   b what is explained (N, C, H, W)   f filters (K, C, h, w)   g
    connectivity (K, C)

    T from what the layer paints to what it explains: the identity, or the layers below

With the maps fixed the cost is quadratic in the filters, lam/2 ||T Z f - b||^2. Without T two sums
over images say all about it:

    linear  Z'b        (K, C, h, w)
    gram    Z'Z        (K, K, 2h-1, 2w-1): the correlation of every pair of maps at every shift of
    two filters

Their size does not depend on the number of images, and sums of batches add. They are all that
passes from inference to learning. Everything about them is float64: sums decide. With a T of its
own for every image no such sums exist: there are those of a bound, ||T||^2 Z'Z with the true
gradient, and conjugate gradients on the normal equations, which go through the images again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.filters.sparse_statistics import SparseMaps
from deconvnet.operators.convolution import (
    Boundary,
    connected,
    continued,
    deconvolve,
    filter_gradient,
    fourier_size,
)
from deconvnet.operators.linear import LinearOperator, conjugate_gradients
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.renaming import renamed
from deconvnet.support.units import exponent, magnitude, times_power
from deconvnet.support.validation import check_tensors

UPDATES = ("proximal", "cg")
NORMS = ("filter", "plane")
# Complex numbers of products of spectra that are held at a time: on a CPU what a cache holds.
BLOCK, BLOCK_ON_CPU = 2**22, 2**17

# z, the residual b - T Z f, and T of some images.
Batch = tuple[Tensor, Tensor, LinearOperator]


# More epochs, or steps of an update, can only be a mistake.
MOST_STEPS = 1_000_000


@renamed(revive="reinit_unused", memory="averaging_epochs")
@dataclass
class LearningSettings:
    """How the filters of a layer are learned."""

    # passes over the training images
    epochs: int = 12
    # images per filter update; null: one update an epoch
    batch_size: int | None = 8
    # proximal: many steps on the sums; cg: conjugate gradients on the maps of one batch (the
    # papers)
    update: str = "proximal"
    # steps of one update (the authors' toolbox: 2 or 4 of cg)
    update_iterations: int = 10
    # proximal: an update uses the mean of the sums of about this many epochs; 0: of its batch alone
    averaging_epochs: float = 1.0
    # patches: filters start as pieces of what is explained; random: as Gaussian noise (the papers)
    init: str = "patches"
    # unit norm of each whole filter, or of each of its 2-D planes (the CVPR 2010 paper)
    norm: str = "filter"
    # filters of entries >= 0
    non_negative: bool = False
    # filters whose every 2-D plane has the mean zero; not with non_negative
    zero_mean: bool = False
    # re-seed filters that no map uses or that repeat another, at the end of each epoch but the last
    reinit_unused: bool = True
    # move filters that have settled off centre to the middle of their frame, every fourth epoch in
    # the first two thirds: a filter that is cut off by its frame is a local minimum
    recenter: bool = True

    def __post_init__(self) -> None:
        for key, choices in (("update", UPDATES), ("norm", NORMS), ("init", ("patches", "random"))):
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"learning.{key}={getattr(self, key)}: choose one of {', '.join(choices)}"
                )
        for key in ("epochs", "update_iterations"):
            if not 1 <= getattr(self, key) <= MOST_STEPS:
                raise ValueError(
                    f"learning.{key}={getattr(self, key)}: must be at least 1, and at most "
                    f"{MOST_STEPS}"
                )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"learning.batch_size={self.batch_size}: must be at least 1, or null")
        if self.non_negative and self.zero_mean:
            raise ValueError(
                "learning.zero_mean=True: not with learning.non_negative, which leaves only zeros"
            )
        if not self.averaging_epochs >= 0:
            raise ValueError(
                f"learning.averaging_epochs={self.averaging_epochs}: must not be negative"
            )


@dataclass(frozen=True)
class FilterStatistics:
    """The quadratic cost of the filters, 1/2 f'(gram)f - (linear)'f, summed over images."""

    linear: Tensor
    gram: Tensor

    @classmethod
    def none(cls, f: Tensor) -> FilterStatistics:
        """The sums over no image, for filters (K, C, h, w)."""
        K, _, h, w = f.shape
        gram = f.new_zeros(K, K, 2 * h - 1, 2 * w - 1, dtype=torch.float64)
        return cls(torch.zeros_like(f, dtype=torch.float64), gram)

    def __add__(self, other: FilterStatistics) -> FilterStatistics:
        return FilterStatistics(self.linear + other.linear, self.gram + other.gram)

    def __mul__(self, factor: float) -> FilterStatistics:
        return FilterStatistics(self.linear * factor, self.gram * factor)

    @property
    def energy(self) -> Tensor:
        """(K,): the sum of the squares of every map."""
        h, w = self.linear.shape[2:]
        return self.gram[..., h - 1, w - 1].diagonal()

    def without(self, filters: list[int]) -> FilterStatistics:
        """The same with nothing known of these filters."""
        linear, gram = self.linear.clone(), self.gram.clone()
        linear[filters], gram[filters], gram[:, filters] = 0, 0, 0
        return FilterStatistics(linear, gram)


def filter_statistics(
    z: Tensor,
    residual: Tensor,
    f: Tensor,
    g: Tensor | None = None,
    *,
    boundary: Boundary = "valid",
    curvature: Tensor | None = None,
) -> FilterStatistics:
    """The sums over a batch whose maps z leave the residual b - A z (N, C, H, W) under filters f.

    Through layers below, residual is T'(b - A z) and curvature ||T||^2 (N, 1, 1, 1).

    gram is the correlation of the whole maps, as they go on beyond the border. Unless the border
    wraps that is a little more than Z'Z, since they also paint beyond the image, so the quadratic
    cost made of it lies above the true one and touches it at f: what lowers the one lowers the
    other. `linear` is chosen so that the gradient at f is the true one, -Z'(b - A z).
    """
    h, w = f.shape[2:]
    few = None if boundary == "reflect" or curvature is not None else SparseMaps.from_dense(z)
    if few is None:
        gradient, gram = _map_sums(z, -residual, (h, w), boundary, curvature)
    else:
        gradient = few.filter_gradient(-residual, (h, w), boundary)
        gram = few.correlations((h, w), wrap=boundary == "circular")
    return FilterStatistics(_gram_product(gram, (h, w))(f.double()) - connected(gradient, g), gram)


def update_filters(
    f: Tensor,
    sums: FilterStatistics,
    g: Tensor | None = None,
    *,
    norm: str = "filter",
    iterations: int = 10,
    non_negative: bool = False,
    zero_mean: bool = False,
) -> Tensor:
    """Filters (K, C, h, w) of unit norm that lower 1/2 f'(gram)f - (linear)'f, starting from f.

    By accelerated projected gradient steps; what `normalize` may ask of filters holds for all.

    Each filter has a step of its own, by the energy of its map: rare filters learn as fast as
    frequent ones. The best of all iterates is returned, f itself included, so that the cost of the
    sums never rises.
    """
    product = _gram_product(sums.gram, tuple(f.shape[2:]))
    asked = dict(norm=norm, non_negative=non_negative, zero_mean=zero_mean)
    start = normalize(connected(f.double(), g), **asked)
    most = sums.energy.max().item()
    energy = sums.energy.clamp(min=1e-9 * most if most > 0 else 1.0)
    scale = energy.rsqrt().view(-1, 1, 1, 1)
    # The same for every channel: one tells it.
    largest = _largest_eigenvalue(lambda v: scale * product(scale * v), start[:, :1])
    step = scale.square() / largest

    def cost(v: Tensor) -> tuple[float, Tensor]:
        moved = product(v)
        return float((v * (0.5 * moved - sums.linear)).sum()), moved - sums.linear

    x, y, t = start, start, 1.0
    best, (lowest, at_x) = start, cost(start)
    at_y = at_x
    for _ in range(iterations):
        x_old, x = x, normalize(connected(y - step * at_y, g), **asked, fallback=start)
        at_old, (value, at_x) = at_x, cost(x)
        if value < lowest:
            best, lowest = x, value
        else:
            t = 1.0
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        momentum = (t - 1) / t_next
        # The gradient is as linear as y is: no product of its own.
        y, at_y = x + momentum * (x - x_old), at_x + momentum * (at_x - at_old)
        t = t_next
    return best.to(f.dtype)


def update_filters_by_cg(
    f: Tensor,
    batches: Callable[[], Iterable[Batch]],
    g: Tensor | None = None,
    *,
    norm: str = "plane",
    iterations: int = 2,
    boundary: Boundary = "valid",
    non_negative: bool = False,
    zero_mean: bool = False,
    communicator: Communicator = SINGLE,
) -> Tensor:
    """Filters after some conjugate gradient steps on Z'T'T Z f = Z'T'b from f, then unit norm and
    what else `normalize` may ask of them.

    The update of Zeiler et al. 2010 (T = I) and 2011, gradient R_(l-1)' of the residual correlated
    with z_l. batches() goes through (z, b - T Z f, T) of the images; every step does it once, and
    with a communicator sends one message of the size of the filters.
    """
    size = tuple(f.shape[2:])

    def towards_filters(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros_like(f, dtype=torch.float64)
        for z, y in pairs:
            if exponent(magnitude(z)) or exponent(magnitude(y)):
                # Their products leave the range of float32.
                z, y = z.double(), y.double()
            for one in range(len(z)):
                part = slice(one, one + 1)
                total += filter_gradient(z[part], y[part], size, g, boundary=boundary)
        return communicator.all_reduce_sum(total)[0].flatten(2)[None]

    def system(v: Tensor) -> Tensor:
        v = v[0].view(f.shape).to(f.dtype)
        painted = ((z, deconvolve(z, v, g, boundary=boundary), T) for z, _, T in batches())
        return towards_filters((z, T.adjoint(T(y))) for z, y, T in painted)

    target = towards_filters((z, T.adjoint(residual)) for z, residual, T in batches())
    # Of directions in the units of the data squared float32 would lose some.
    e = exponent(magnitude(target))
    change = conjugate_gradients(
        lambda v: times_power(system(v), -e),
        times_power(target, -e),
        tolerance=1e-6,
        max_iterations=iterations,
    )
    asked = dict(norm=norm, non_negative=non_negative, zero_mean=zero_mean)
    start = connected(f.double(), g)
    kept = normalize(start, **asked) if non_negative or zero_mean else start
    return normalize(start + change[0].view(f.shape), **asked, fallback=kept).to(f.dtype)


def normalize(
    f: Tensor,
    norm: str = "filter",
    *,
    fallback: Tensor | None = None,
    non_negative: bool = False,
    zero_mean: bool = False,
) -> Tensor:
    """f with unit l2 norm of every filter, or of every 2-D plane; one that is zero becomes that of
    `fallback`.

    Before it is scaled it loses its negative entries (non_negative), or every plane its mean
    (zero_mean): together that is the nearest filter of the kind.
    """
    check_tensors(f=f)
    if f.ndim != 4:
        raise ValueError(f"filters must have the shape (K, C, h, w), got {tuple(f.shape)}")
    axes = (2, 3) if norm == "plane" else (1, 2, 3)
    given = f
    if non_negative:
        f = f.clamp(min=0)
    if zero_mean:
        f = f - f.mean((2, 3), keepdim=True)
    length = length_of(f, axes)
    if zero_mean:
        # Of a plane that is constant only rounding is left.
        rounding = 10 * torch.finfo(f.dtype).eps * given.abs().amax(axes, keepdim=True)
        f = torch.where(length > rounding, f, torch.zeros_like(f))
        length = torch.where(length > rounding, length, torch.zeros_like(length))
    unit = f / torch.where(length > 0, length, torch.ones_like(length))
    return unit if fallback is None else torch.where(length > 0, unit, fallback)


def length_of(f: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The l2 norm over these axes, which stay; also where squares leave the range of float32."""
    e = exponent(magnitude(f))
    return times_power(torch.linalg.vector_norm(times_power(f, -e), dim=axes, keepdim=True), e)


def initial_filters(
    num: int,
    b: Tensor,
    size: int,
    init: str,
    generator: torch.Generator,
    *,
    non_negative: bool = False,
    zero_mean: bool = False,
) -> Tensor:
    """`draw_filters` (num, C, size, size) for what is explained, b (N, C, H, W)."""
    like = b.new_empty(num, b.shape[1], size, size)
    asked = dict(non_negative=non_negative, zero_mean=zero_mean)
    return draw_filters(num, like, init, generator, patch_sampler(b, size, generator), **asked)


def draw_filters(
    num: int,
    like: Tensor,
    init: str,
    generator: torch.Generator,
    draw: Callable[[int], Tensor],
    *,
    non_negative: bool = False,
    zero_mean: bool = False,
) -> Tensor:
    """(num, C, h, w) of unit norm, as `like`: Gaussian noise, or the livelier half of patches of
    what is explained, draw(number) -> (number, C, h, w).

    With non_negative the magnitudes of noise, or the positive parts of patches.
    """
    asked = dict(non_negative=non_negative, zero_mean=zero_mean)
    if init == "random":
        noise = _noise((num, *like.shape[1:]), generator).to(like)
        return normalize(noise.abs() if non_negative else noise, **asked)
    patches = draw(20 * num)
    strength = length_of(patches, (1, 2, 3)).flatten()
    strongest = strength.argsort(descending=True, stable=True)[: len(patches) // 2]
    chosen = strongest[torch.randperm(len(strongest), generator=generator)[:num].to(like.device)]
    noise = _noise(patches[chosen].shape, generator).to(like)
    noise = noise.abs() if non_negative else noise
    # The trace of noise keeps a patch without any contrast from being a filter of zeros.
    return normalize(normalize(patches[chosen], **asked) + 1e-3 * normalize(noise), **asked)


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gaussian noise, the same whatever torch's default type is."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def patch_sampler(b: Tensor, size: int, generator: torch.Generator) -> Callable[[int], Tensor]:
    """So many random patches (number, C, size, size) of b (N, C, H, W), when they are asked for."""

    def draw(number: int) -> Tensor:
        places = random_patch_positions(number, len(b), b.shape[2:], size, generator).tolist()
        return torch.stack([b[n, :, i : i + size, j : j + size] for n, i, j in places])

    return draw


def random_patch_positions(
    num: int, images: int, shape: tuple[int, int], size: int, generator: torch.Generator
) -> Tensor:
    """(num, 3): image, row and column of random patches, size x size, of images of H x W."""
    highest = (images, shape[0] - size + 1, shape[1] - size + 1)
    drawn = [torch.randint(end, (num,), generator=generator) for end in highest]
    return torch.stack(drawn, 1)


def dead_filters(energy: Tensor) -> list[int]:
    """Filters whose maps hold at most a millionth of the mean energy of a map; energy: (K,)."""
    return torch.nonzero(energy <= 1e-6 * energy.mean()).flatten().tolist()


def duplicate_filters(f: Tensor, energy: Tensor, *, similarity: float = 0.97) -> list[int]:
    """Filters that equal one with a stronger map up to sign and shift: the weaker of each pair."""
    h, w = f.shape[2:]
    f = normalize(f)
    # Correlate all pairs at all shifts; (K, K, 2h-1, 2w-1).
    alike = F.conv2d(f, f, padding=(h - 1, w - 1)).abs().amax((2, 3)) > similarity
    order = energy.argsort(descending=True, stable=True).tolist()
    kept, double = [], []
    for k in order:
        (double if any(alike[k, j] for j in kept) else kept).append(k)
    return sorted(double)


def off_center(f: Tensor) -> dict[int, tuple[int, int]]:
    """{filter: (rows, columns)}: how far to move those whose energy is not centred in the frame."""
    h, w = f.shape[2:]
    energy = f.double().square().sum(1)
    energy = energy / energy.sum((1, 2), keepdim=True).clamp(min=1e-300)
    rows = energy.sum(2) @ torch.arange(h, dtype=energy.dtype, device=f.device)
    columns = energy.sum(1) @ torch.arange(w, dtype=energy.dtype, device=f.device)
    moves = torch.stack([(h - 1) / 2 - rows, (w - 1) / 2 - columns], 1).round().long().tolist()
    return {k: (i, j) for k, (i, j) in enumerate(moves) if i or j}


def shift(planes: Tensor, rows: int, columns: int, *, wrap: bool = False) -> Tensor:
    """Planes (..., H, W) moved down and right; zeros come in, or with wrap what went out."""
    moved = planes.roll((rows, columns), (-2, -1))
    if not wrap:
        for axis, by in ((-2, rows), (-1, columns)):
            start = 0 if by > 0 else moved.shape[axis] + by
            moved.narrow(axis, start, abs(by)).zero_()
    return moved


def _map_sums(
    z: Tensor, y: Tensor, size: tuple[int, int], boundary: Boundary, curvature: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Z'y (K, C, h, w), and the sums of z_k[i] z_j[i + shift], (K, K, 2h-1, 2w-1), shift 0 in the
    middle, each image times its curvature; float64.

    By way of Fourier: of the correlations of the maps with each other and with y only a few shifts
    are wanted, which are taken by products with the rows of a discrete Fourier transform. Shifts up
    are those down with the maps of a pair exchanged. Products are float64 from there on, so that it
    makes no difference which images come together.
    """
    (h, w), K = size, z.shape[1]
    z = continued(z, size, boundary)
    grid = tuple(z.shape[2:])
    if boundary != "circular":
        grid = fourier_size((grid[0] + h - 1, grid[1] + w - 1))
        y = F.pad(y, (w - 1, 0, h - 1, 0))
    spectra = torch.cat([torch.fft.rfft2(z, grid), torch.fft.rfft2(y, grid)], 1)
    spectra = spectra.permute(3, 2, 1, 0).contiguous()
    rows, columns = (
        _phases(range(h), grid[0], z.device),
        _phases(range(1 - w, w), grid[1], z.device),
    )
    held = BLOCK_ON_CPU if z.device.type == "cpu" else BLOCK
    found = []
    for part in spectra.split(max(1, held // (grid[0] * K * spectra.shape[2]))):
        part = part.to(torch.complex128)
        maps = part[..., :K, :].conj()
        if curvature is None:
            products = maps @ part.mT
        else:
            weighed = maps * curvature.flatten()
            products = torch.cat([weighed @ part[..., :K, :].mT, maps @ part[..., K:, :].mT], 3)
        found.append(rows @ products.flatten(2))
    # The transform of real maps is known by its first half: all but its ends count twice.
    half = spectra.shape[0]
    columns = columns[:, :half] / (grid[0] * grid[1])
    columns[:, 1 : half - (grid[1] % 2 == 0)] *= 2
    of_rows = torch.cat(found).flatten(1)
    sums = columns.real @ of_rows.real - columns.imag @ of_rows.imag
    sums = sums.view(2 * w - 1, h, K, -1).permute(2, 3, 1, 0)
    down = sums[:, :K]
    up = down[:, :, 1:].transpose(0, 1).flip(2, 3)
    return sums[:, K:, :, w - 1 :].contiguous(), torch.cat([up, down], 2)


def _phases(shifts: range, length: int, device: torch.device) -> Tensor:
    """(shifts, length), complex128: rows of the inverse transform, not divided by the length."""
    places = torch.arange(length, device=device)
    turns = torch.tensor(shifts, device=device)[:, None] * places % length
    angle = turns.double() * (2 * math.pi / length)
    return torch.polar(torch.ones_like(angle), angle)


def _gram_product(gram: Tensor, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """v (K, C, h, w) -> Z'Z v, a convolution with the gram, one matrix product per frequency."""
    h, w = size
    grid = fourier_size((2 * h - 1, 2 * w - 1))
    K = len(gram)
    spectrum = gram.new_empty(grid[0], grid[1] // 2 + 1, K, K, dtype=torch.complex128)
    # Some rows of pairs at a time, so that beside the gram there is its spectrum and little more.
    some = max(1, BLOCK // (K * grid[0] * grid[1]))
    for k in range(0, K, some):
        kernel = F.pad(gram[k : k + some], (0, grid[1] - 2 * w + 1, 0, grid[0] - 2 * h + 1))
        kernel = kernel.roll((1 - h, 1 - w), (2, 3))
        spectrum[:, :, k : k + some] = torch.fft.rfft2(kernel).permute(2, 3, 0, 1)

    def product(v: Tensor) -> Tensor:
        moved = spectrum @ torch.fft.rfft2(v, grid).permute(2, 3, 0, 1)
        return torch.fft.irfft2(moved.permute(2, 3, 0, 1), grid)[..., :h, :w]

    return product


def _largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """By power iteration, rounded up by 5% because it approaches from below."""
    v = _noise(like.shape, torch.Generator().manual_seed(0)).to(like)
    value = 1.0
    for _ in range(100):
        v = product(v / torch.linalg.vector_norm(v).clamp(min=1e-300))
        previous, value = value, float(torch.linalg.vector_norm(v))
        if abs(value - previous) <= 2e-3 * value:
            break
    return 1.05 * value if value > 0 else 1.0
