"""Learning filters from images with holes: the update against dense least squares, and what a mask
must not change."""

import numpy as np
import pytest
import torch
from filter_problems import gram_times, problem, rand
from helpers import assert_same
from torch.testing import assert_close

from deconvnet import LearningSettings, SolverSettings, learn_filters, learn_online
from deconvnet.filters.constraint import normalize
from deconvnet.filters.initial import initial_filters
from deconvnet.filters.statistics import masked_statistics
from deconvnet.filters.update import update_filters, update_filters_by_cg
from deconvnet.images.holes import fill_holes
from deconvnet.network.layer import Layer, LayerSettings
from deconvnet.operators.convolution import BOUNDARIES, deconvolve, map_size
from deconvnet.operators.linear import Composition, Deconvolution, LinearOperator, Mask, Scaling
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_data import LayerData
from deconvnet.training.layer_trainer import LayerTrainer

every_boundary = pytest.mark.parametrize("boundary", BOUNDARIES)

ADMM = SolverSettings(iterations=20, training_iterations=3)
FISTA = SolverSettings("fista", iterations=20, training_iterations=3)
QUICK = LearningSettings(epochs=2, batch_size=3)
LEARN = dict(num_maps=4, filter_size=5, lam=5.0, solver=ADMM, learning=QUICK)


def half_seen(*shape, seed=9):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.fixture(scope="module")
def images(textures):
    y = textures(5, 1, 20, 20)
    return y - y.mean((1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def seen():
    return half_seen(5, 1, 20, 20)


def learned_online(images, mask):
    batches = zip(images.split(2), mask.split(2), strict=True)
    return learn_online(batches, mask=True, **LEARN)


def masked_problem(boundary, *, weights):
    """Maps z, filters f, a mask M of 0, 1 and the weights, and the matrix of f -> M Z f."""
    z, f, b = problem(boundary, K=2, size=(3, 2), image=(6, 7))
    values = torch.tensor([0.0, 1.0, *weights], dtype=torch.float64)
    drawn = torch.randint(len(values), (3, 1, 6, 7), generator=torch.Generator().manual_seed(4))
    M = Mask(values[drawn], b)
    units = torch.eye(f.numel(), dtype=f.dtype).view(-1, *f.shape)
    columns = [M(deconvolve(z, unit, boundary=boundary)).flatten() for unit in units]
    return z, f, M, torch.stack(columns, 1)


def sums_under_mask(z, f, b, M, boundary):
    residual = M.target(b) - M(deconvolve(z, f, boundary=boundary))
    return masked_statistics(z, residual, f, M, boundary=boundary)


@every_boundary
@pytest.mark.parametrize("weights", [(), (0.3, 2.0)])
def test_the_sums_under_a_mask_have_the_gradient_of_the_cost_and_half_of_its_curvature(
    boundary, weights
):
    z, f, M, matrix = masked_problem(boundary, weights=weights)
    b = rand(3, 2, 6, 7, seed=7)
    sums = sums_under_mask(z, f, b, M, boundary)
    residual = M.target(b).flatten() - matrix @ f.flatten()
    gradient = gram_times(sums.gram, f) - sums.linear
    assert_close(gradient.flatten(), -matrix.T @ residual, rtol=1e-10, atol=1e-10)
    units = torch.eye(f.numel(), dtype=f.dtype).view(-1, *f.shape)
    model = torch.stack([gram_times(sums.gram, unit).flatten() for unit in units])
    exact = matrix.T @ matrix
    # So that the minimum of the model, within any convex constraint, does not raise the cost.
    least = torch.linalg.eigvalsh(model - exact / 2)[0]
    assert least > -1e-9 * torch.linalg.eigvalsh(exact)[-1]


def test_where_pixels_are_missing_at_random_the_sums_have_the_curvature_of_the_cost():
    z, f, _ = problem("valid", K=2, size=(3, 2), image=(60, 60))
    M = Mask(half_seen(3, 2, 60, 60), rand(3, 2, 60, 60))
    sums = sums_under_mask(z, f, rand(3, 2, 60, 60), M, "valid")
    step = rand(*f.shape, seed=3)
    exact = float(M(deconvolve(z, step)).square().sum())
    modelled = float((step * gram_times(sums.gram, step)).sum())
    assert modelled == pytest.approx(exact, rel=0.1)


@every_boundary
def test_both_updates_find_the_filters_that_explain_the_seen_pixels(boundary):
    z, truth, M, matrix = masked_problem(boundary, weights=(0.5,))
    assert torch.linalg.matrix_rank(matrix) == truth.numel()
    b = deconvolve(z, truth, boundary=boundary).where(M.mask > 0, torch.nan)
    start = normalize(truth + 0.3 * rand(*truth.shape, seed=8))
    f = start
    for _ in range(20):
        f = update_filters(f, sums_under_mask(z, f, b, M, boundary), iterations=10)
    assert_close(f, truth, rtol=0, atol=1e-3)
    residual = M.target(b) - M(deconvolve(z, start, boundary=boundary))
    by_cg = update_filters_by_cg(
        start, lambda: [(z, residual, M)], iterations=50, boundary=boundary
    )
    assert_close(by_cg, truth, rtol=0, atol=1e-6)


def test_values_of_unseen_pixels_do_not_change_a_bit(images, seen):
    first, second = (
        [
            learn_filters(unseen, mask=seen, boundary="reflect", **LEARN).filters,
            learned_online(unseen, seen).filters,
        ]
        for unseen in (images.where(seen, 1e6), images.where(seen, torch.nan))
    )
    assert all(map(torch.equal, first, second))
    assert torch.isfinite(first[0]).all() and torch.isfinite(first[1]).all()


def test_a_mask_of_ones_changes_the_filters_by_rounding_only(images):
    y, ones = images.double(), torch.ones(1, 1, 20, 20)
    # ADMM would solve its linear systems less exactly without a mask than with one.
    options = LEARN | dict(solver=FISTA)
    plain = learn_filters(y, **options)
    assert_close(learn_filters(y, mask=ones, **options).filters, plain.filters)
    more = plain.learn_more(y, mask=ones)
    assert_close(more.filters, plain.learn_more(y).filters)
    online = learn_online(y.split(2), **options)
    assert_close(learn_online(y.split(2), mask=ones, **options).filters, online.filters)
    assert_close(
        online.learn_more_online(y.split(2), mask=ones).filters,
        online.learn_more_online(y.split(2)).filters,
    )


def test_weights_of_all_pixels_act_like_lam(images):
    y, two = images.double(), torch.full((1, 1, 20, 20), 2.0)
    expected = learn_filters(y, **LEARN | dict(lam=20.0, solver=FISTA))
    weighted = learn_filters(y, mask=two, **LEARN | dict(solver=FISTA))
    assert_close(weighted.filters, expected.filters)


def test_a_lam_ratio_refers_to_the_seen_pixels(images, seen):
    ratio = LEARN | dict(lam=None, lam_ratio=0.1)
    masked = learn_filters(images.where(seen, torch.nan), mask=seen, **ratio)
    zeros = learn_filters(
        images * seen, filters=masked.filters, lam_ratio=0.1, solver=ADMM, learning=QUICK
    )
    again = learn_filters(images, mask=seen, filters=masked.filters, lam_ratio=0.1, learning=QUICK)
    assert again.settings.lam == pytest.approx(zeros.settings.lam, rel=1e-5)


def test_planted_filters_are_recovered_from_images_with_half_of_their_pixels_missing():
    position = torch.arange(4, dtype=torch.float64) - 1.5
    window = torch.exp(-(position[:, None].square() + position.square()) / (2 * 0.8**2))
    planted = normalize(window * rand(2, 1, 4, 4, seed=1))
    z = rand(4, 2, *map_size((24, 24), (4, 4), "valid"), seed=2)
    chance = torch.rand(z.shape, generator=torch.Generator().manual_seed(3))
    z = z.sign() * (1 + z.abs()) * (chance < 0.01)
    seen = half_seen(4, 1, 24, 24)
    holes = deconvolve(z, planted).where(seen, torch.nan)
    options = dict(
        lam=10.0,
        mask=seen,
        solver=SolverSettings("fista", training_iterations=10),
        learning=LearningSettings(epochs=16, batch_size=None),
    )
    # Of several starts, the one with the lowest cost counts: no knowledge of the truth is used.
    results = [learn_filters(holes, 2, 6, seed=seed, **options) for seed in range(3)]
    best = min(results, key=lambda result: result.history[-1].objective)
    similar = torch.nn.functional.conv2d(planted, best.filters, padding=5).abs().amax((2, 3))
    assert similar.amax(1).min() > 0.95
    assert sorted(similar.argmax(1).tolist()) == [0, 1]


@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_neither_the_chunks_nor_a_stop_change_filters_learned_with_holes(images, seen, update):
    data = LayerData.from_masked(images, Mask(seen, images))
    learning = LearningSettings(epochs=2, batch_size=4, update=update, update_iterations=2)
    settings = LayerSettings(4, 5, lam=5.0, solver=ADMM, learning=learning)

    def trainer(**options):
        return LayerTrainer(Layer(settings, 1, seeded_generator(0, 1)), data, **options)

    whole, stopped, chunked = trainer(), trainer(), trainer(chunk=1)
    for _ in range(4):
        whole.update()
        chunked.update()
    for _ in range(3):
        stopped.update()
    layer = Layer(settings, 1, seeded_generator(0, 1))
    layer.set_filters(stopped.layer.filters)
    layer.filters.copy_(stopped.layer.filters)
    resumed = LayerTrainer(layer, data, state=stopped.state_dict())
    resumed.update()
    assert torch.equal(resumed.layer.filters, whole.layer.filters)
    assert_same(resumed.state_dict()["codes"], whole.state_dict()["codes"])
    assert_close(chunked.layer.filters, whole.layer.filters, rtol=0, atol=1e-4)


def test_initial_patches_come_from_the_seen_part_of_the_images():
    b, seen = rand(3, 2, 12, 30, seed=5), torch.ones(1, 1, 12, 30, dtype=torch.bool)
    seen[..., :14] = False
    f = initial_filters(4, b, 5, "patches", torch.Generator().manual_seed(0), seen=seen)
    pieces = b[..., 14:].unfold(2, 5, 1).unfold(3, 5, 1).permute(0, 2, 3, 1, 4, 5)
    similar = normalize(pieces.reshape(-1, 2, 5, 5)).flatten(1) @ f.flatten(1).T
    assert (similar.amax(0) > 1 - 1e-5).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_holes_are_filled_smoothly_and_image_by_image(channels):
    ramp = torch.linspace(0, 1, 16, dtype=torch.float64).expand(3, 2, 12, 16)
    seen = half_seen(3, channels, 12, 16)
    seen[2, 0] = False
    filled = fill_holes(ramp.where(seen, torch.nan), seen)
    known = seen.expand_as(ramp)
    assert torch.equal(filled[known], ramp[known])
    assert (filled[:2] - ramp[:2]).abs().max() < 0.08
    assert (filled[2, 0] == 0).all()
    assert torch.equal(fill_holes(ramp[1:2].where(seen[1:2], 7.0), seen[1:2]), filled[1:2])


def test_a_mask_is_an_operator_with_an_exact_norm():
    y, x = rand(2, 2, 5, 6), rand(2, 2, 5, 6, seed=1)
    M = Mask(rand(2, 1, 5, 6, seed=2).abs(), y)
    assert_close((M(x) * y).sum(), (x * M.adjoint(y)).sum())
    assert_close(M.squared_norm(y).flatten(), M.mask.square().amax((1, 2, 3)))
    assert (LinearOperator.squared_norm(M, y) < 1.03 * M.squared_norm(y)).all()
    assert torch.equal(M[1:](x[1:]), M(x)[1:])
    large = Mask(1e20 * M.mask, y)
    normal, e = large.normalised()
    assert_close(2.0**e * normal(x), large(x)) and normal.mask.max() <= 2
    F = Deconvolution(rand(3, 2, 2, 2))
    z = rand(2, 3, 6, 7)
    assert isinstance(M @ F, Deconvolution) and torch.equal((M @ F)(z), M(F(z)))
    assert isinstance(M @ Scaling(2.0), Composition)


BAD = {
    "kind": (True, "mask must be a tensor or a numpy array, got bool"),
    "shape": (torch.ones(1, 1, 20, 19), "mask of shape (1, 1, 20, 19) does not fit images"),
    "images": (torch.ones(3, 1, 20, 20), "mask of shape (3, 1, 20, 20) does not fit images"),
    "channels": (torch.ones(1, 2, 20, 20), "mask must have the shape (N or 1, 1, H, W)"),
    "negative": (-torch.ones(1, 1, 20, 20), "mask=-1.0: must be finite and not negative"),
    "infinite": (np.full((1, 1, 20, 20), np.inf), "mask=inf: must be finite and not negative"),
    "file": (torch.full((1, 1, 20, 20), 255, dtype=torch.uint8), "mask of uint8, up to 255: use"),
    "nothing": (torch.zeros(1, 1, 20, 20), "mask: must not be 0 everywhere"),
}


@pytest.mark.parametrize("kind", BAD)
def test_masks_that_do_not_fit_the_images_are_refused_in_one_line(images, kind):
    mask, message = BAD[kind]
    with pytest.raises(ValueError) as error:
        learn_filters(images, mask=mask, **LEARN)
    assert message in str(error.value) and "\n" not in str(error.value)
    if kind not in ("kind", "nothing"):
        with pytest.raises(ValueError) as error:
            learn_online([images], mask=mask, **LEARN)
        assert str(error.value).startswith("batch 1: mask") and message in str(error.value)


def test_batches_without_their_mask_and_seen_pixels_that_are_nan_are_refused(images, seen):
    for batch in (images, (images,)):
        with pytest.raises(ValueError, match=r"^batch 1 is a \w+: with mask=True it must be"):
            learn_online([batch], mask=True, **LEARN)
    with pytest.raises(ValueError, match="^images: must be finite, .* where the mask is not 0$"):
        learn_filters(images.where(~seen, torch.nan), mask=seen, **LEARN)
    # A batch of which nothing is seen teaches nothing, wherever it is in the stream.
    none = torch.zeros(1, 1, 20, 20)
    alone = learn_online([(images, seen)], mask=True, **LEARN)
    between = [(images, none), (images, seen), (images, none)]
    assert torch.equal(learn_online(between, mask=True, **LEARN).filters, alone.filters)
