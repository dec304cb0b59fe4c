"""What a caller has switched on in torch, and gradients: what is differentiable and what is not."""

import contextlib
import copy
import functools

import pytest
import torch
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    learn_filters,
    learn_online,
    sparse_code,
)
from deconvnet.operators.convolution import correlate, deconvolve
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.prior import Prior, penalties, shrink, threshold
from deconvnet.sparse_coding.problem import METHODS, duality_gap
from deconvnet.sparse_coding.solve import lam_from_ratio, solve

ONCE = LearningSettings(epochs=1)
FEW = SolverSettings(iterations=10)


@contextlib.contextmanager
def autocast(dtype=torch.bfloat16):
    with torch.autocast("cpu", dtype=dtype):
        yield


@contextlib.contextmanager
def default_float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "bfloat16": autocast,
    "float16": lambda: autocast(torch.float16),
    "inference_mode": torch.inference_mode,
    "default_float64": default_float64,
    "deterministic": deterministic,
    "default_device": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def images(textures):
    return textures(2, 1, 16, 18)


@pytest.fixture(scope="module")
def y(images):
    return images - images.mean((1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def f():
    f = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    return f / f.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def network():
    layers = [
        LayerSettings(4, 5, pool=[1, 2, 2], solver=FEW, learning=ONCE),
        LayerSettings(6, 3, target="both", solver=FEW, learning=ONCE),
    ]
    return DeconvNet(layers, PreprocessingSettings(color="grey", contrast_size=5))


def through_a_network(images):
    from deconvnet.monitoring.monitor import Monitor
    from deconvnet.training.loop import train

    net = network()
    with Monitor(progress=False) as monitor:
        train(net, images, None, monitor)
    codes = net.infer(images)
    return [
        *(layer.filters for layer in net.layers),
        *(layer.z for layer in codes.layers),
        *(layer.objective for layer in codes.layers),
        net.reconstruct(codes),
        net.preprocessing(images)[0],
    ]


def restored(images):
    from deconvnet.applications.restoration.restorer import Restorer

    net = DeconvNet(
        [LayerSettings(4, 5)], PreprocessingSettings(color="grey", steps=["mean"], scale="none")
    )
    restorer = Restorer(net).fit(images)
    mask = (torch.arange(18) % 5 > 0).expand(1, 1, 16, 18)
    return [*restorer.denoise(images, 0.1), *restorer.inpaint(images, mask)]


def in_scikit_learn(images):
    from deconvnet.sklearn import DeconvNetTransformer

    model = DeconvNetTransformer(num_maps=4, filter_size=5, epochs=1, device="cpu")
    features = model.fit_transform(images.numpy())
    return [torch.from_numpy(each) for each in (features, model.inverse_transform(features))]


def dictionaries(images):
    y = images - images.mean()
    learned = learn_filters(y, 4, filter_size=5, lam_ratio=0.1, learning=ONCE)
    random = LearningSettings(epochs=1, init="random")
    online = learn_online(y.split(1), 4, filter_size=5, lam=5.0, learning=random)
    return [learned.filters, online.filters, learned.encode(y).z]


DOORS = [through_a_network, restored, in_scikit_learn, dictionaries]


@pytest.fixture(scope="module")
def in_no_mode(images):
    """What a door gives outside of all modes; computed once."""
    return functools.cache(lambda door: door(images))


@pytest.fixture(scope="module")
def coded_in_no_mode(y, f):
    """What a solver gives outside of all modes; computed once."""
    return functools.cache(lambda method: coded(y, f, method))


def coded(y, f, method):
    # The schedule of half_quadratic repeats its iterations for each of seven betas.
    settings = SolverSettings(method, iterations=2 if method == "half_quadratic" else 20)
    return sparse_code(y, f, lam_ratio=0.1, settings=settings)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_results_do_not_depend_on_the_modes_of_torch(images, in_no_mode, door, mode):
    if mode == "default_device" and door in (through_a_network, restored):
        pytest.skip("makes its network on that device")
    plain = in_no_mode(door)
    with MODES[mode]():
        changed = door(images)
    for one, other in zip(plain, changed, strict=True):
        assert other.dtype == one.dtype and torch.equal(one, other)


def test_a_network_is_made_on_the_default_device_and_computes_where_it_is(images):
    expected = network().infer(images).layers[1].z
    with torch.device("meta"):
        assert network().device.type == "meta"
        with torch.device("cpu"):
            net = network()
        assert torch.equal(net.infer(images).layers[1].z, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_every_solver_gives_the_maps_and_objectives_that_it_gives_in_no_mode(
    y, f, coded_in_no_mode, method, mode
):
    plain = coded_in_no_mode(method)
    with MODES[mode]():
        changed = coded(y, f, method)
    assert torch.equal(plain.z, changed.z) and torch.equal(plain.objective, changed.objective)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", ["images", "filters", "both"])
def test_codes_have_the_values_of_plain_ones_and_a_gradient_only_if_one_is_asked_for(
    y, f, method, given
):
    settings = SolverSettings(method, iterations=3)
    plain = sparse_code(y, f, lam=5.0, settings=settings)
    if given != "filters":
        y = y.clone().requires_grad_()
    if given != "images":
        f = torch.nn.Parameter(f.clone())
    with torch.no_grad():
        found = sparse_code(y, f, lam=5.0, settings=settings)
    for name, value in vars(found).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(plain, name)) and not value.requires_grad
    if method != "half_quadratic":
        found = sparse_code(y, f, lam=5.0, settings=settings)
        for name, value in vars(found).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(plain, name))
                assert value.requires_grad == (name not in ("state", "step", "gap"))
    direct = solve(Deconvolution(f), y, lam=5.0, settings=settings)
    assert not direct.z.requires_grad and not duality_gap(Deconvolution(f), y, plain.z, 5.0).grad_fn
    assert isinstance(lam_from_ratio(Deconvolution(f), y, 0.1), float)


def test_filters_that_were_learned_from_feature_maps_are_plain_tensors():
    maps = torch.nn.Conv2d(3, 4, 3)(torch.rand(2, 3, 12, 12))
    for learned in (
        learn_filters(maps, 4, filter_size=5, lam=5.0, learning=ONCE),
        learn_online([maps, maps], 4, filter_size=5, lam=5.0),
    ):
        assert not learned.filters.requires_grad
        learned.filters.numpy()
        copy.deepcopy(learned)
        assert not learned.encode(maps.detach()).z.requires_grad
        assert learned.encode(maps).z.requires_grad


def test_painting_and_correlating_are_differentiable_outside(y, f):
    z = sparse_code(y, f, lam=5.0).z.double().requires_grad_()
    weights = f.double().requires_grad_()
    deconvolve(z, weights).square().sum().backward()
    correlate(y.double(), weights).square().sum().backward()
    assert weights.grad.abs().sum() > 0 and z.grad.abs().sum() > 0


def around_the_threshold(beta, p):
    """Values at 0, far below, just below, at, just above and far above the threshold."""
    _, tau = threshold(beta, p)
    shares = torch.tensor([0.0, 1e-12, 0.01, 0.3, 0.69, 0.9, 1 - 1e-4, 1 + 1e-4, 1.5, 3.0, 50.0])
    v = tau * shares.double()
    return torch.cat([v, -v])


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("beta", [0.7, 30.0])
def test_the_gradient_of_the_shrinkage_is_that_of_finite_differences(p, non_negative, beta):
    v = around_the_threshold(beta, p).requires_grad_()
    asked = dict(p=p, non_negative=non_negative)
    # Not at 0, where v and -v are clamped from different sides.
    away = v.detach()[v.detach().abs() > 1e-6].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: shrink(x, beta, **asked), away, eps=1e-7)
    shrink(v, beta, **asked).sum().backward()
    assert torch.isfinite(v.grad).all()
    below = v.detach().abs() < 0.999 * threshold(beta, p)[1]
    assert (v.grad[below] == 0).all()


@pytest.mark.parametrize("p", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("beta", [2.0, torch.tensor([2.0, 5.0]).double().view(2, 1, 1, 1)])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 1.0, 0.5, 0.5]).double()])
@pytest.mark.parametrize("group", [1, 2])
def test_the_proximal_map_of_every_prior_has_the_gradient_of_finite_differences(
    p, beta, weights, group
):
    v = 3 * torch.randn(2, 4, 1, 2, generator=torch.Generator().manual_seed(2)).double()
    v[:, :, 0, 1] *= 0.01
    prior = Prior(p, weights=weights, group=group)
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prior.shrink(x, beta), v, eps=1e-7)
    if p > 0:
        assert torch.autograd.gradcheck(prior, v, eps=1e-7)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.0, 0.0, 0.5, 0.5])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_maps_have_finite_gradients(p, group, weights, dtype):
    prior = Prior(p, weights=weights, group=group)
    for beta in (2.0, torch.full((2, 1, 1, 1), 2.0, dtype=dtype)):
        v = torch.zeros(2, 4, 3, 3, dtype=dtype)
        v[0, 0, 0, 0] = 1e-30
        v.requires_grad_()
        total = prior.shrink(v, beta).square().sum()
        if p > 0:
            total = total + prior(v).sum() + penalties(v, p).sum()
        total.backward()
        assert torch.isfinite(v.grad).all()


def test_a_gradient_leaves_the_values_of_the_prior_as_they_are():
    v = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    v[:, :2, 0] = 0
    beta = torch.full((2, 1, 1, 1), 2.0)
    for p in (0.5, 1.0):
        for group in (1, 2):
            prior, with_gradient = Prior(p, group=group), v.clone().requires_grad_()
            assert_close(prior(with_gradient), prior(v), rtol=0, atol=0)
            assert torch.equal(prior.shrink(with_gradient, beta), prior.shrink(v, beta))
