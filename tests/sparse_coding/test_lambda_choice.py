"""The choice of lambda by held-out pixels, by SURE and by density, and the path it is made from."""

import math

import pytest
import torch
from torch.testing import assert_close

from deconvnet import SolverSettings, choose_lam, regularization_path, sparse_code
from deconvnet.operators.convolution import deconvolve
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.problem import duality_gap
from deconvnet.sparse_coding.regularization_path import solutions_along
from deconvnet.sparse_coding.solve import lam_from_ratio

SIGMA = 0.1
EXACT = SolverSettings("coordinate", iterations=1000, tolerance=1e-9)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


@pytest.fixture(scope="module")
def problem():
    """(clean images, noisy images, filters): sparse codes of smooth filters, and white noise."""
    rows = torch.arange(5.0)
    bump = torch.exp(-((rows - 2) ** 2) / 2)
    waves = torch.stack([bump, bump * (rows - 2), bump * (1 - (rows - 2) ** 2)])
    filters = (waves[:, None, :, None] * waves[None, :, None, :]).reshape(9, 1, 5, 5)[:6]
    filters = filters / filters.square().sum((1, 2, 3), keepdim=True).sqrt()
    active = torch.rand(8, 6, 28, 28, generator=torch.Generator().manual_seed(1)) < 0.006
    clean = deconvolve(normal(8, 6, 28, 28) * active, filters)
    return clean, clean + SIGMA * normal(*clean.shape), filters


@pytest.fixture(scope="module")
def path(problem):
    return regularization_path(*problem[1:], num_lams=10, smallest_ratio=0.02, events=True)


def test_a_path_descends_from_lambda_max_in_equal_steps(problem, path):
    _, images, filters = problem
    assert path.lam_max == lam_from_ratio(Deconvolution(filters), images, 1.0)
    assert_close(float(path.lam[0]), path.lam_max)
    assert_close(path.lam.log().diff(), torch.full((9,), math.log(50) / 9).double())
    assert len(path) == 10 and (path.non_zeros[0] == 0).all()
    assert path.objective.shape == (10, 8)
    assert (path.snr.mean(1).diff() > 0).all() and (path.density.mean(1).diff() > 0).all()


def test_a_path_may_begin_at_a_quantile_of_lambda_max(problem):
    _, images, filters = problem
    options = dict(num_lams=2, smallest_ratio=0.9, lam_max_quantile=0.5)
    path = regularization_path(images, filters, **options)
    median = lam_from_ratio(Deconvolution(filters), images, 1.0, lam_max_quantile=0.5)
    assert path.lam_max == path.lam[0] == median
    assert 0 < (path.non_zeros[0] == 0).sum() < len(images)
    assert choose_lam(images, filters, noise=SIGMA, **options).path.lam_max == median
    with pytest.raises(ValueError, match="lam_max_quantile=0.5: there is no lambda_max if lams"):
        regularization_path(images, filters, lams=[1.0], lam_max_quantile=0.5)


def test_every_code_of_a_path_is_the_minimum_of_its_own_problem(problem, path):
    _, images, filters = problem
    for n in (3, 9):
        lam, z = float(path.lam[n]), path.events[n].maps()
        alone = sparse_code(images, filters, lam=lam, settings=EXACT)
        assert_close(path.objective[n], alone.objective, rtol=1e-3, atol=0)
        gap = duality_gap(Deconvolution(filters), images, z, lam)
        assert_close(path.gap[n], gap, rtol=1e-3, atol=1e-4)
        assert torch.equal(path.non_zeros[n], z.count_nonzero((1, 2, 3)))
        assert_close(path.reconstruction[n] + path.sparsity[n], path.objective[n])
        error = (images - deconvolve(z, filters)).double().square().sum((1, 2, 3))
        signal = images.double().square().sum((1, 2, 3))
        assert_close(path.snr[n], 10 * (signal / error).log10(), rtol=1e-4, atol=1e-4)


def test_an_image_of_zeros_has_no_snr_and_is_left_out_of_the_mean(problem, path):
    _, images, filters = problem
    lams = path.lam[4:6].tolist()
    more = regularization_path(torch.cat([images, 0 * images[:1]]), filters, lams=lams)
    assert more.snr[:, -1].isnan().all() and (more.gap[:, -1] == 0).all()
    assert_close(more.snr.nanmean(1), path.snr[4:6].mean(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["admm", "fista"])
def test_a_warm_start_saves_iterations(problem, method):
    _, images, filters = problem
    A, b = Deconvolution(filters), images[:1]
    # While beta still adapts, ADMM gains nothing from a start that is close.
    settings = SolverSettings(method, iterations=500, gap=3e-2, adaptive=method == "fista")
    first, second = solutions_along(A, b, [20.0, 22.0], Prior(), settings, None)
    alone = sparse_code(b, filters, lam=22.0, settings=settings)
    assert second.iterations < 0.7 * alone.iterations
    assert_close(second.objective, alone.objective, rtol=3e-2, atol=0)
    assert (second.gap <= 3e-2 * second.objective).all() and first.lam == 20.0


def test_sure_of_the_number_of_coefficients_agrees_with_monte_carlo_and_with_the_error(problem):
    clean, images, filters = problem
    options = dict(num_lams=4, smallest_ratio=0.05, settings=EXACT)
    sure = choose_lam(images, filters, noise=SIGMA, **options)
    sample = SIGMA * torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    sampled = choose_lam(images, filters, noise=sample, **options)
    error = torch.stack(
        [
            (sparse_code(images, filters, lam=float(lam)).residual - images + clean).square()
            for lam in sure.path.lam
        ]
    ).mean((1, 2, 3, 4))
    assert_close(sure.errors.mean(1), error.double(), rtol=0, atol=0.06 * SIGMA**2)
    # The sample's own energy, which is the same for every lam, differs from n sigma^2.
    drawn = sample.double().square().mean() - SIGMA**2
    assert_close(sampled.errors.mean(1) + drawn, sure.errors.mean(1), rtol=0, atol=0.04 * SIGMA**2)
    assert sure.criterion == "sure" and sure.path.non_zeros.shape == (4, 8)


def test_sure_of_preprocessed_images_is_the_error_of_the_images_before(problem):
    """With groups, for which the number of coefficients is not the degrees of freedom."""
    clean, images, filters = problem

    def highpass(y):
        return y - torch.nn.functional.avg_pool2d(y, 5, 1, 2)

    admm = SolverSettings("admm", iterations=60)
    options = dict(group=2, settings=admm)
    choice = choose_lam(
        *(highpass(images), filters),
        noise=SIGMA,
        preprocess=highpass,
        lams=[20.0],
        **options,
    )
    residual = sparse_code(highpass(images), filters, lam=20.0, **options).residual
    error = (images - residual - clean).double().square().mean()
    assert abs(choice.errors.mean() - error) < 0.1 * SIGMA**2


@pytest.mark.parametrize("criterion", [{}, {"noise": SIGMA}])
def test_the_chosen_lam_is_nearly_the_best(problem, criterion):
    clean, images, filters = problem

    def error(lam):
        residual = sparse_code(images, filters, lam=lam).residual
        return float((images - residual - clean).square().mean())

    choice = choose_lam(images, filters, smallest_ratio=0.08, num_lams=8, **criterion)
    best = min(error(float(lam)) for lam in choice.path.lam)
    assert 10 * math.log10(error(choice.lam) / best) < 0.1


def test_hidden_pixels_do_not_enter_the_code_and_a_mask_hides_more(problem):
    _, images, filters = problem
    mask = torch.ones(1, 1, 24, 24)
    mask[..., 12:] = 0
    holes = images.masked_fill(mask == 0, torch.nan)
    options = dict(lams=[5.0, 10.0, 20.0], mask=mask, seed=3)
    choice = choose_lam(holes, filters, **options)
    assert choice.errors.isfinite().all()
    same = choose_lam(images, filters, **options)
    assert torch.equal(choice.errors, same.errors) and choice.lam == same.lam
    other = choose_lam(images, filters, **{**options, "seed": 4})
    assert not torch.equal(other.errors, same.errors)


def test_a_density_is_reached_within_a_hundredth(problem):
    _, images, filters = problem
    choice = choose_lam(images, filters, density=0.01)
    z = sparse_code(images, filters, lam=choice.lam).z
    assert float(z.count_nonzero()) / z.numel() == pytest.approx(0.01, rel=0.02)
    assert (choice.path.lam.diff() > 0).all() and choice.errors is None


def test_lam_is_interpolated_between_the_lams_of_the_path(problem):
    _, images, filters = problem
    choice = choose_lam(images, filters, lams=[2.0, 8.0, 32.0])
    best = int(choice.errors.mean(1).argmin())
    assert best == 1 and 4 < choice.lam < 16 and choice.lam != 8.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lams": []}, r"lams=\[\]: must be a list of at least one number"),
        ({"lams": [1.0, -2.0]}, "lams=-2.0: must be positive"),
        ({"num_lams": 1}, "num_lams=1: must be at least 2"),
        ({"smallest_ratio": 1.0}, r"smallest_ratio=1.0: must lie in \(0, 1\)"),
        ({"p": 0.5}, "p=0.5: only p=1 has a lambda_max; give lams"),
        ({"settings": SolverSettings("half_quadratic")}, "settings.method=half_quadratic: ends"),
        ({"settings": "admm"}, r"settings='admm': use SolverSettings\('admm'\)"),
        ({"held_out": 0}, r"held_out=0: must lie in \(0, 1\)"),
        ({"held_out": 1e-9}, "held_out=1e-09: hides none of the 4608 pixels"),
        ({"noise": 0.1, "density": 0.1}, "noise=0.1, density=0.1: give at most one"),
        ({"noise": -1}, "noise=-1.0: must be positive"),
        ({"preprocess": torch.neg}, "preprocess: is for noise="),
        ({"noise": 0.1, "preprocess": "low"}, "preprocess='low': must be a function of images"),
        ({"noise": 0.1, "preprocess": torch.numel}, r"preprocess\(noise\) must be a tensor"),
        ({"noise": 0.1, "preprocess": torch.ravel}, r"preprocess: makes \(4608,\) of noise"),
        ({"noise": torch.ones(3)}, r"noise of shape \(3,\): must be a number, or finite and of"),
        ({"density": 0.0}, r"density=0.0: must lie in \(0, 1\)"),
        ({"density": 0.9, "lams": [1.0, 2.0]}, "density=0.9: the densest code of the path"),
        ({"density": 0.01, "lams": [50.0, 60.0]}, "density=0.01: the sparsest code of the path"),
        ({"weights": torch.zeros(1)}, "lambda_max needs all weights to be positive; or give lams"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(problem, arguments, message):
    _, images, filters = problem
    with pytest.raises(ValueError, match=message) as caught:
        choose_lam(images, filters, **arguments)
    assert "\n" not in str(caught.value)
