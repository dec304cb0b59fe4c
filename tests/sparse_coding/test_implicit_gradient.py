"""The gradient of a sparse code is that of finite differences, and what has none says so."""

import pytest
import torch
from torch.testing import assert_close

from deconvnet import SolverSettings, sparse_code
from deconvnet.operators.convolution import BOUNDARIES, deconvolve, map_size
from deconvnet.sparse_coding import nested_dissection
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.support_system import Code, Support, solved

# Without a tolerance all iterations are done. A solver that stops by a difference of costs, which
# are rounded, resolves the maps to the root of that rounding only.
SETTINGS = SolverSettings("coordinate", iterations=100, tolerance=0)
PARTS = ("z", "residual", "reconstruction", "sparsity")
SIZE = 7, 8


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(channels=1, mask=False, weights=None, group=1, lam=1.5, **options):
    """What may have a gradient, and the other options of `sparse_code`."""
    f = random(4, channels, 3, 3, seed=1)
    theta = {
        "images": random(2, channels, *SIZE),
        "filters": f / f.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
        "lam": torch.tensor(lam, dtype=torch.float64),
    }
    if mask:
        m = random(2, 1, *SIZE, seed=2).abs()
        theta["mask"] = m.where(m > 0.3, 0.0)
    if weights:
        maps = map_size(SIZE, (3, 3), options.get("boundary", "valid"))
        shape = (4, 1, 1) if weights == "maps" else (2, 4, *maps)
        theta["weights"] = one_of_each_group(0.5 + 0.3 * random(*shape, seed=3).abs(), group)
    return theta, {"group": group, "settings": SETTINGS, **options}


def one_of_each_group(w, group):
    """Weights (.., K, rows, columns) in which the maps of a group have the weight of the first."""
    return w[..., ::group, :, :].repeat_interleave(group, -3)


PROBLEMS = {
    **{boundary: dict(boundary=boundary) for boundary in BOUNDARIES},
    "channels": dict(channels=2),
    "mask": dict(mask=True, lam=2.0),
    "weights of maps": dict(weights="maps"),
    "weights of coefficients": dict(weights="coefficients"),
    "groups": dict(group=2, weights="maps", lam=1.0),
    "non-negative": dict(non_negative=True),
    "non-negative groups": dict(non_negative=True, group=2),
    "all": dict(
        channels=2,
        mask=True,
        weights="coefficients",
        group=2,
        non_negative=True,
        boundary="reflect",
        lam=2.0,
    ),
}


def parts(theta, options):
    solution = sparse_code(**theta, **options)
    return [getattr(solution, part) for part in PARTS]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_finite_differences(name):
    theta, options = problem(**PROBLEMS[name])
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    values = parts(leaves, options)
    cotangents = [random(*value.shape, seed=4) for value in values]
    # One direction in the space of all that has a gradient.
    direction = {key: random(*value.shape, seed=5) for key, value in theta.items()}
    if "weights" in theta:
        direction["weights"] = one_of_each_group(direction["weights"], options["group"])
    if "mask" in theta:
        direction["mask"] *= theta["mask"] > 0
    above, below = (
        parts({key: theta[key] + step * direction[key] for key in theta}, options)
        for step in (1e-6, -1e-6)
    )
    for value, c, up, down in zip(values, cotangents, above, below, strict=True):
        gradient = torch.autograd.grad((c * value).sum(), list(leaves.values()), retain_graph=True)
        found = sum((g * d).sum() for g, d in zip(gradient, direction.values(), strict=True))
        expected = (c * (up - down)).sum() / 2e-6
        assert_close(found, expected, rtol=1e-6, atol=1e-6)


def gradients(theta, options, part="z"):
    """The gradients of a random linear function of a part of the solution."""
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    value = getattr(sparse_code(**leaves, **options), part)
    return torch.autograd.grad((random(*value.shape, seed=4) * value).sum(), list(leaves.values()))


@pytest.mark.parametrize("method", ["admm", "fista", "ista"])
def test_the_gradient_does_not_depend_on_the_method(method):
    theta, options = problem(boundary="circular", lam=1.0)
    expected = gradients(theta, options)
    settings = SolverSettings(method, iterations=200, tolerance=1e-12)
    for found, one in zip(
        gradients(theta, {**options, "settings": settings}), expected, strict=True
    ):
        assert_close(found, one, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_the_objective_is_that_of_its_explicit_terms():
    theta, options = problem(mask=True, weights="maps")
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    solution = sparse_code(**leaves, **options)
    solution.objective.sum().backward()
    z = solution.z.detach()
    with torch.no_grad():
        plain = {key: value.detach() for key, value in leaves.items()}
    y, f, lam, mask, w = (value.requires_grad_() for value in plain.values())
    error = mask * (y - deconvolve(z, f))
    (lam / 2 * error.square().sum() + (w * z.abs()).sum()).backward()
    for key, value in plain.items():
        gradient = leaves[key].grad
        expected = value.grad if key != "mask" else value.grad * (mask > 0)
        assert_close(gradient, expected, rtol=1e-7, atol=1e-7)


def test_float32_has_the_gradient_of_float64_in_any_units_and_in_chunks():
    theta, _ = problem()
    options = {"settings": SolverSettings("coordinate", iterations=30, tolerance=0)}
    expected = gradients(theta, options)
    single = {key: value.float() for key, value in theta.items()}
    for found, one in zip(gradients(single, {**options, "chunk": 1}), expected, strict=True):
        assert found.dtype == torch.float32
        assert_close(found.double(), one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))
    # With images in units of 1e-20 and filters of 1e-10, z is in units of 1e-10.
    scaled = dict(images=1e-20 * theta["images"], filters=1e-10 * theta["filters"])
    scaled = {key: value.float() for key, value in scaled.items()} | {"lam": theta["lam"] * 1e30}
    for found, one, s in zip(gradients(scaled, options), expected, (1e10, 1.0, 1e-40), strict=True):
        assert_close(found.double() / s, one, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_what_requires_no_gradient_gets_none_and_numbers_and_arrays_are_accepted():
    theta, options = problem(mask=True, weights="maps")
    f = theta["filters"].clone().requires_grad_()
    given = {**theta, "filters": f, "lam": 1.5, "images": theta["images"].numpy()}
    sparse_code(**given, **options).z.sum().backward()
    (alone,) = torch.autograd.grad(sparse_code(**{**theta, "filters": f}, **options).z.sum(), f)
    assert torch.equal(f.grad, alone)


def test_a_filter_given_twice_has_the_gradient_of_the_solution_of_least_norm():
    theta, options = problem(boundary="circular")
    settings = SolverSettings("fista", iterations=200, tolerance=0)
    y, f, lam = theta.values()
    twice = torch.cat([f, f[:1]]).requires_grad_()
    options = {**options, "settings": settings}
    solution = sparse_code(y, twice, lam=lam, **options)
    assert_close(solution.z[:, 0], solution.z[:, 4])
    assert solution.z[:, 0].any()
    deconvolve(solution.z, twice.detach(), boundary="circular").sum().backward()
    once = f.clone().requires_grad_()
    z = sparse_code(y, once, lam=lam, **options).z
    deconvolve(z, once.detach(), boundary="circular").sum().backward()
    # What the maps paint is unique; half of its gradient is that of each copy.
    assert_close(twice.grad[1:4], once.grad[1:], rtol=1e-4, atol=1e-4)
    assert_close(twice.grad[0], once.grad[0] / 2, rtol=1e-4, atol=1e-4)
    assert_close(twice.grad[4], twice.grad[0], rtol=1e-4, atol=1e-4)


def test_pixels_that_are_masked_have_no_gradient_whatever_they_are():
    theta, options = problem(mask=True)
    hidden = theta["mask"] == 0
    theta["images"] = theta["images"].where(~hidden, torch.nan)
    of_images, of_filters, _, of_mask = gradients(theta, options, "residual")
    assert (of_images[hidden] == 0).all() and (of_mask[hidden] == 0).all()
    assert of_images.isfinite().all() and of_filters.isfinite().all()


def test_maps_of_zeros_have_zero_gradients():
    theta, options = problem(lam=1e-3)
    for gradient in gradients(theta, options):
        assert torch.count_nonzero(gradient) == 0


def test_what_is_kept_for_the_backward_pass_is_the_image_and_the_support():
    theta, options = problem(boundary="circular")
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        sparse_code(**leaves, **options)
    assert sum(tensor.numel() for tensor in kept) <= sum(value.numel() for value in theta.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lam=2.0, p=0.5), "p=0.5: codes have a gradient only for p=1"),
        (dict(lam=2.0, settings=SolverSettings("half_quadratic")), "ends above the minimum"),
        (dict(lam_ratio=0.1), "no gradient through the largest correlation"),
    ],
)
def test_codes_without_a_gradient_say_so_instead_of_having_zeros(options, message):
    theta, _ = problem()
    f = theta["filters"].requires_grad_()
    with pytest.raises(ValueError, match=message) as caught:
        sparse_code(theta["images"], f, **options)
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        assert not sparse_code(theta["images"], f, **options).z.requires_grad


@pytest.mark.parametrize("loss", [torch.sum, lambda z: z.square().sum()])
def test_a_second_derivative_is_refused(loss):
    theta, options = problem()
    y = theta["images"].requires_grad_()
    z = sparse_code(y, theta["filters"], lam=1.5, **options).z
    (gradient,) = torch.autograd.grad(loss(z), y, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (y.sum() + gradient.sum()).backward()


def test_maps_may_be_changed_in_place_and_a_residual_only_before_it_is_needed():
    theta, options = problem()
    y = theta["images"].requires_grad_()
    solution = sparse_code(y, theta["filters"], lam=1.5, **options)
    (expected,) = torch.autograd.grad(solution.z.relu().sum(), y, retain_graph=True)
    (gradient,) = torch.autograd.grad(solution.z.relu_().sum(), y, retain_graph=True)
    assert torch.equal(gradient, expected)
    solution.residual.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        solution.z.sum().backward()


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(
    "shapes", [((20, 26), (4, 3)), ((1, 400), (1, 6))], ids=["image", "signal"]
)
def test_the_system_on_a_large_support_is_solved_as_a_dense_one(boundary, shapes, monkeypatch):
    monkeypatch.setattr(nested_dissection, "LEAF", 8)
    size, taps = shapes
    f, lam, prior = random(4, 2, *taps, seed=1), 1.5, Prior(group=2)
    z = random(1, 2, 2, *map_size(size, taps, boundary))
    z = (z * (random(1, 2, 1, *z.shape[3:], seed=2) > 1.2)).flatten(1, 2)
    mask = random(1, 2, *size, seed=3).abs()
    support = Support.of(z, prior)
    m = len(support.n)
    places = support.i.numpy(), support.j.numpy()
    assert len(nested_dissection.dissect(*places, (taps[0], taps[1]))[1]) > 10
    impulses = torch.zeros(m, 2, 2, 2, *z.shape[2:], dtype=z.dtype)
    for u in range(2):
        impulses[range(m), u, support.g, u, support.i, support.j] = 1
    painted = mask * deconvolve(impulses.view(2 * m, 4, *z.shape[2:]), f, boundary=boundary)
    painted = painted.flatten(1)
    unit = support.z / support.z.norm(dim=1, keepdim=True)
    curvature = torch.eye(2) - unit[:, :, None] * unit[:, None]
    curvature = torch.block_diag(*curvature / support.z.norm(dim=1)[:, None, None])
    s = random(m, 2, seed=4)
    expected = torch.linalg.solve(lam * painted @ painted.T + curvature, s.flatten())
    code = Code(boundary, prior, lam, tuple(z.shape), (2, *size))
    found = solved(code, support, f, mask, torch.ones(m, 1, dtype=z.dtype), s)
    assert_close(found.flatten(), expected, rtol=1e-7, atol=1e-9)
