"""Initial filters, and replacements for unused ones: noise or patches of the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from deconvnet.filters.constraint import FilterConstraint, length_of, normalize
from deconvnet.support.validation import as_filter_size

INITS = ("patches", "random")
# Patches drawn for each filter; filters are chosen from the half with more contrast.
PATCHES_PER_FILTER = 20
# If pixels are missing, at least one in this many patches is considered: those best known.
MOST_KNOWN = 4

# number -> random patches (number, C, h, w), and the fraction of each that is known (number,);
# None: all of them are.
PatchSampler = Callable[[int], tuple[Tensor, Tensor | None]]


def initial_filters(
    num: int,
    images: Tensor,
    size: int | tuple[int, int],
    init: str,
    generator: torch.Generator,
    *,
    seen: Tensor | None = None,
    constraint: FilterConstraint | None = None,
) -> Tensor:
    """`draw_filters` (num, C, h, w) for images (N, C, H, W) in memory.

    size: (h, w), or the side of squares. seen: (N or 1, C or 1, H, W), which pixels are known; the
    images have stand-ins for the others.
    """
    size = as_filter_size(size, "size")
    like = images.new_empty(1, images.shape[1], *size)
    draw_patches = patch_sampler(images, size, generator, seen)
    return draw_filters(num, like, init, draw_patches, generator, constraint=constraint)


def draw_filters(
    num: int,
    like: Tensor,
    init: str,
    draw_patches: PatchSampler,
    generator: torch.Generator,
    *,
    constraint: FilterConstraint | None = None,
) -> Tensor:
    """Random filters (num, C, h, w) of unit norm; shape, dtype and device as `like` (K, C, h, w).

    init: "random", Gaussian noise (Zeiler et al. 2010), or "patches" of the layer's target, from
    the half of `draw_patches(number)` with larger norm; if pixels are missing, from that half of
    the quarter of which most is known, or of all that are known. constraint: its signs and means
    apply; whole filters get unit norm, and all planes are connected. With non_negative the
    magnitude of the noise or the positive part of the patches is used.
    """
    constraint = replace(constraint or FilterConstraint(), norm="filter", connectivity=None)
    # A tapered filter may have any shape if it is small enough: begin with one that is tapered.
    t = constraint.window(like)

    def initial(f: Tensor) -> Tensor:
        return constraint.project(f if t is None else f * t)

    def noise(shape: torch.Size) -> Tensor:
        # float32 whatever torch's default dtype, so that the filters do not depend on it.
        values = torch.randn(shape, generator=generator, dtype=torch.float32).to(like)
        return values.abs() if constraint.non_negative else values

    if init == "random":
        return initial(noise(torch.Size((num, *like.shape[1:]))))
    patches, known = draw_patches(PATCHES_PER_FILTER * num)
    if known is not None:
        patches = patches[known >= known.sort().values[-len(known) // MOST_KNOWN]]
    order = length_of(patches, (1, 2, 3)).flatten().argsort(descending=True, stable=True)
    stronger = order[: len(patches) // 2]
    chosen = stronger[torch.randperm(len(stronger), generator=generator)[:num].to(like.device)]
    patches = patches[chosen]
    # A little noise prevents a patch without contrast from becoming a filter of zeros.
    untapered = replace(constraint, taper=0.0)
    return initial(untapered.project(patches) + 1e-3 * normalize(noise(patches.shape)))


def patch_sampler(
    images: Tensor, size: tuple[int, int], generator: torch.Generator, seen: Tensor | None = None
) -> PatchSampler:
    """Samples random patches (number, C, h, w) of images (N, C, H, W).

    size: (h, w). seen: (N or 1, C or 1, H, W), which pixels are known; None: all.
    """
    h, w = size

    def draw_patches(number: int) -> tuple[Tensor, Tensor | None]:
        shape = (images.shape[2], images.shape[3])
        positions = random_patch_positions(number, len(images), shape, size, generator).tolist()

        def patches(planes: Tensor) -> Tensor:
            return torch.stack([planes[n, :, i : i + h, j : j + w] for n, i, j in positions])

        if seen is None:
            return patches(images), None
        known = patches(seen.expand(len(images), -1, -1, -1)).to(images)
        return patches(images), known.mean((1, 2, 3))

    return draw_patches


def random_patch_positions(
    num: int,
    images: int,
    shape: tuple[int, int],
    size: tuple[int, int],
    generator: torch.Generator,
) -> Tensor:
    """(num, 3): image, row and column of random patches of size (h, w) in images of (H, W)."""
    ends = (images, shape[0] - size[0] + 1, shape[1] - size[1] + 1)
    return torch.stack([torch.randint(end, (num,), generator=generator) for end in ends], 1)
