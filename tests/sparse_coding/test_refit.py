"""Refitted codes: the non-zero coefficients of least squared error."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch.testing import assert_close

from deconvnet import LayerSettings, LearningSettings, SolverSettings, learn_filters, sparse_code
from deconvnet.filters.constraint import normalize
from deconvnet.operators.arithmetic import convolution_matrix

LAM = 4.0


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 1, 6, 7, generator=torch.Generator().manual_seed(2)).double()


@pytest.fixture(scope="module")
def filters():
    return normalize(torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double())


def settings(method, **changes):
    return SolverSettings(method, iterations=800, tolerance=1e-8, **changes)


@pytest.mark.parametrize(
    ("method", "non_negative"),
    [("coordinate", False), ("coordinate", True), ("fista", True), ("admm", False)],
)
def test_refitted_maps_are_the_least_squares_solution_on_the_support(
    method, non_negative, images, filters
):
    options = dict(lam=LAM, non_negative=non_negative)
    plain = sparse_code(images, filters, **options, settings=settings(method))
    fitted = sparse_code(images, filters, **options, settings=settings(method, refit=True))
    A = torch.as_tensor(convolution_matrix(filters, (6, 7))).numpy()
    for z, refitted, b in zip(plain.z, fitted.z, images, strict=True):
        support = (z != 0).flatten().numpy()
        columns, b = A[:, support], b.flatten().numpy()
        x = nnls(columns, b)[0] if non_negative else np.linalg.lstsq(columns, b, rcond=None)[0]
        assert_close(refitted.flatten()[support], torch.from_numpy(x), rtol=0, atol=1e-4)
        assert not refitted.flatten()[~support].any()
    assert (fitted.reconstruction < plain.reconstruction).all()
    assert_close(fitted.sparsity, fitted.z.abs().sum((1, 2, 3)))
    assert_close(fitted.state, plain.state)


def test_groups_are_refitted_whole_and_the_gap_is_that_of_the_code(images, filters):
    options = dict(lam=LAM, group=2)
    solver = SolverSettings("fista", iterations=500, gap=1e-4)
    plain = sparse_code(images, filters, **options, settings=solver)
    refit = dataclasses.replace(solver, refit=True)
    fitted = sparse_code(images, filters, **options, settings=refit)
    assert torch.equal(fitted.gap, plain.gap)
    groups = (plain.z.unflatten(1, (2, 2)) != 0).any(2)
    assert torch.equal((fitted.z.unflatten(1, (2, 2)) != 0).any(2), groups)
    assert (fitted.reconstruction < plain.reconstruction).all()


def test_training_visits_are_not_refitted(images):
    learned = [
        learn_filters(
            images,
            4,
            3,
            lam=LAM,
            solver=SolverSettings("fista", refit=refit),
            learning=LearningSettings(epochs=2),
        ).filters
        for refit in (False, True)
    ]
    assert torch.equal(*learned)


def test_a_refit_is_refused_where_there_is_no_convex_problem(images, filters):
    with pytest.raises(ValueError, match="solver.refit=True: choose admm"):
        SolverSettings("half_quadratic", refit=True)
    with pytest.raises(ValueError, match="solver.refit=True: for p=1"):
        sparse_code(images, filters, lam=1.0, p=0.5, settings=SolverSettings(refit=True))
    with pytest.raises(ValueError, match="solver.refit=True: needs p=1"):
        LayerSettings(4, p=0.5, solver=SolverSettings(refit=True))
    with pytest.raises(ValueError, match="refitted codes have no gradient"):
        sparse_code(
            images,
            filters.clone().requires_grad_(),
            lam=1.0,
            settings=settings("fista", refit=True),
        )
