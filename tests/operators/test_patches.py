"""Patches of images and their average, against torch's unfold, dense sums, and each other."""

import pytest
import torch
from torch.testing import assert_close

from deconvnet.operators.convolution import deconvolve
from deconvnet.operators.linear import SignMerge
from deconvnet.operators.patches import PATCH_BOUNDARIES, PatchAverage, extract_patches
from deconvnet.operators.pooling import split_signs

SIZES = [(3, 3), (2, 4)]


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def deltas(C, h, w):
    """One impulse as the filter of each number of a patch: (C h w, C, h, w)."""
    return torch.eye(C * h * w, dtype=torch.float64).view(-1, C, h, w)


def average_by_loops(z, f, norms, image, boundary):
    """The mean at every pixel of all patches that contain it, each painted on its own."""
    (h, w), (H, W) = f.shape[2:], image
    first = {"valid": (h - 1, w - 1), "zero": ((h - 1) // 2, (w - 1) // 2), "circular": (0, 0)}
    total, count = torch.zeros(f.shape[1], H, W, dtype=f.dtype), torch.zeros(H, W, dtype=f.dtype)
    for i in range(z.shape[1]):
        for j in range(z.shape[2]):
            patch = torch.einsum("k,kchw->chw", z[:, i, j], f) * norms[i, j]
            for m in range(h):
                for n in range(w):
                    r, c = i + m - first[boundary][0], j + n - first[boundary][1]
                    if boundary == "circular":
                        r, c = r % H, c % W
                    if 0 <= r < H and 0 <= c < W:
                        total[:, r, c] += patch[:, m, n]
                        count[r, c] += 1
    return total / count


def test_patches_of_the_inside_are_those_of_torch():
    y, (h, w) = rand(2, 3, 7, 8), (3, 2)
    patches = extract_patches(y, (h, w))[..., h - 1 : 1 - h, w - 1 : 1 - w]
    assert torch.equal(patches.flatten(2), torch.nn.functional.unfold(y, (h, w)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("boundary", PATCH_BOUNDARIES)
def test_painting_impulses_is_the_adjoint_of_extracting_patches(boundary, size):
    y = rand(2, 2, 6, 7)
    patches = extract_patches(y, size, boundary)
    p = rand(*patches.shape, seed=1)
    painted = deconvolve(p, deltas(2, *size), boundary=boundary)
    assert_close((painted * y).sum(), (p * patches).sum())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("boundary", PATCH_BOUNDARIES)
def test_the_average_of_patches_is_that_of_patches_painted_one_by_one(boundary, size):
    f, image = rand(3, 2, *size, seed=2), (5, 6)
    shape = extract_patches(rand(1, 2, *image), size, boundary).shape[2:]
    z, norms = rand(2, 3, *shape, seed=3), rand(2, 1, *shape, seed=4).abs()
    painted = PatchAverage(f, norms, shape, boundary)(z)
    for n in range(2):
        assert_close(painted[n], average_by_loops(z[n], f, norms[n, 0], image, boundary))


@pytest.mark.parametrize("boundary", PATCH_BOUNDARIES)
def test_patches_average_to_their_image(boundary):
    y, size = rand(2, 2, 6, 7), (3, 2)
    patches = extract_patches(y, size, boundary)
    P = PatchAverage(deltas(2, *size), None, patches.shape[2:], boundary)
    assert_close(P(patches), y)


@pytest.mark.parametrize("boundary", PATCH_BOUNDARIES)
def test_the_average_and_its_adjoint_agree_for_each_image(boundary):
    f, y = rand(4, 2, 3, 3), rand(2, 2, 6, 5, seed=1)
    shape = extract_patches(y, (3, 3), boundary).shape[2:]
    z, norms = rand(2, 4, *shape, seed=2), rand(2, 1, *shape, seed=3).abs()
    P = PatchAverage(f, norms, shape, boundary)
    assert_close((P(z) * y).sum((1, 2, 3)), (z * P.adjoint(y)).sum((1, 2, 3)))
    part = P[slice(1, 2)]
    assert_close(part(z[1:]), P(z)[1:])


def test_a_reflected_border_has_no_patches():
    with pytest.raises(ValueError, match="boundary=reflect: patches need valid or circular or"):
        extract_patches(rand(1, 1, 5, 5), (3, 3), "reflect")


def test_signs_are_split_and_merged_again():
    z, y = rand(2, 3, 4, 5), rand(2, 3, 4, 5, seed=1)
    parts, merge = split_signs(z), SignMerge()
    assert parts.min() >= 0 and parts.shape[1] == 6
    assert torch.equal(merge(parts), z)
    assert_close((merge(parts) * y).sum(), (parts * merge.adjoint(y)).sum())
