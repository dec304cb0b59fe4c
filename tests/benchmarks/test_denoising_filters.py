"""The benchmark that learns filters for denoising: patches, crops, and its denoiser."""

import torch
from denoising_filters import centre, crops
from patch_denoisers import Denoiser, coded, folded, hard_denoised, patches_of, surroundings_of
from torch.testing import assert_close

from deconvnet import SolverSettings


def test_folding_is_the_adjoint_of_taking_patches():
    y, p = torch.randn(2, 1, 7, 9).double(), torch.randn(2, 9, 35).double()
    assert_close((patches_of(y, 3) * p).sum(), (y * folded(p, y.shape)).sum())


def test_crops_are_parts_of_the_images_in_all_orientations():
    image = torch.arange(36.0).view(1, 1, 6, 6)
    found = crops([image], 64, 6, torch.Generator().manual_seed(0))
    assert len({tuple(crop.flatten().tolist()) for crop in found}) == 8
    assert torch.equal(centre(image, 2), image[:, :, 2:4, 2:4])


def denoiser():
    f = torch.randn(6, 9, 1, 1, generator=torch.Generator().manual_seed(0))
    return Denoiser(f, 0.1)


def test_a_denoiser_returns_a_constant_image_and_every_part_of_it_learns():
    model, flat = denoiser(), torch.full((1, 1, 8, 8), 0.5)
    assert_close(model(flat), flat)
    model(
        torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters())


def test_every_patch_has_the_code_that_it_has_alone():
    model, patches = denoiser(), torch.randn(2, 9, 300)
    model.code.settings = SolverSettings("fista", iterations=60, tolerance=1e-9)
    with torch.no_grad():
        z = coded(patches, model.code)
        alone = model.code(patches[1, :, 270].view(1, 9, 1, 1).contiguous())
    assert_close(z[1, :, 270], alone[0, :, 0, 0], rtol=1e-2, atol=1e-2)


def test_surroundings_lie_around_their_patches():
    y = torch.rand(2, 1, 12, 13, generator=torch.Generator().manual_seed(3))
    around = surroundings_of(y, 4, 3)
    assert around.shape == patches_of(y, 4, 3).shape
    # The patch in the second row and column of patches begins at (3, 3).
    square = y[0, 0, 1:9, 1:9].view(4, 2, 4, 2).mean((1, 3))
    assert_close(around[0, :, 4 + 1], square.flatten())


def test_with_a_stride_patches_still_cover_every_pixel():
    image = torch.rand(1, 1, 9, 11, generator=torch.Generator().manual_seed(2))
    patches = patches_of(image, 4, 3)
    once = torch.ones_like(patches)
    assert_close(folded(patches, image.shape, 3) / folded(once, image.shape, 3), image)


def test_patches_below_the_hard_threshold_become_their_means():
    f = torch.eye(9).view(9, 9, 1, 1)
    image = torch.full((1, 1, 8, 8), 0.5)
    image[0, 0, 2, 2], image[0, 0, 6, 6] = 0.6, 1.0
    denoised = hard_denoised(image, f, 0.2, 3)
    assert_close(denoised[0, 0, :3, :3], image[0, 0, :3, :3].mean().expand(3, 3))
    assert_close(denoised[0, 0, 6, 6], image[0, 0, 6, 6])
