"""A sparse code as a layer: what it learns, what it keeps, and what it refuses."""

import copy

import pytest
import torch
from torch.testing import assert_close

from deconvnet import SolverSettings, sparse_code
from deconvnet.nn import SparseCode

OPTIONS = [{}, {"threshold_per_map": True}, {"threshold_per_map": True, "group": 2}]


@pytest.fixture
def y(textures):
    images = textures(2, 1, 12, 14)
    return images - images.mean((1, 2, 3), keepdim=True)


def layer(lam=5.0, seed=1, **options):
    f = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return SparseCode(f, lam, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_maps_are_those_of_sparse_code_with_filters_of_unit_norm(y, options):
    code = layer(**options)
    norms = code.filters.flatten(1).norm(dim=1)
    assert_close(norms, torch.ones(4))
    settings = SolverSettings("coordinate", iterations=1000, training_iterations=1, gap=1e-3)
    group = options.get("group", 1)
    expected = sparse_code(y, code.filters.detach(), lam=5.0, group=group, settings=settings)
    assert_close(code(y), expected.z)
    assert_close(y - code.reconstruct(y), code.solve(y).residual)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_few_steps_lower_a_loss_and_keep_filters_and_thresholds_in_range(y, options):
    code = layer(**options)
    optimizer = torch.optim.Adam(code.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = (code.reconstruct(y) - y).square().sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.any() for p in code.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert_close(code.filters.flatten(1).norm(dim=1), torch.ones(4))
    assert code.lam > 0 and (not code.threshold_per_map or (code.weights > 0).all())


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_is_copied_and_restored_from_its_state(y, options):
    code, other = layer(**options), layer(lam=2.0, seed=2, **options)
    other.load_state_dict(code.state_dict())
    with torch.no_grad():
        assert torch.equal(other(y), code(y)) and torch.equal(copy.deepcopy(code)(y), code(y))


@pytest.mark.parametrize("threshold_per_map", [False, True])
def test_lam_may_be_set_after_training(y, threshold_per_map):
    code = layer(threshold_per_map=threshold_per_map)
    for lam in (10.0, torch.tensor(10.0)):
        code.lam = lam
        assert code.lam.dtype == y.dtype and code.lam.item() == pytest.approx(10.0)
    with torch.no_grad():
        assert torch.count_nonzero(code(y)) > torch.count_nonzero(layer()(y))
    for value, message in ((torch.tensor(-1.0), "-1.0: must be positive"), ("a", "'a': must be a")):
        with pytest.raises(ValueError, match=f"lam={message}"):
            code.lam = value


def test_the_layer_keeps_its_precision_within_autocast_and_is_left_out_of_compilation(y):
    before = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.ones_(before.weight)
    model = torch.nn.Sequential(before, layer(lam=50.0), torch.nn.ReLU(inplace=True))
    compiled = torch.compile(model, backend="eager")
    compiled(y).sum().backward()
    assert before.weight.grad.any() and torch.equal(compiled(y), model(y))
    with torch.autocast("cpu", torch.bfloat16):
        assert before(y).dtype == torch.bfloat16 and model(y).dtype == torch.float32


def test_a_mask_hides_pixels(y):
    mask = torch.ones_like(y)
    mask[..., 3:6, 4:9] = 0
    hidden = y.where(mask > 0, torch.nan)
    assert layer().reconstruct(hidden, mask=mask).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(4, 5, 5), 1.0), {}, "filters must be floating, of the shape"),
        ((torch.ones(4, 1, 5, 5).int(), 1.0), {}, "filters must be floating, of the shape"),
        ((torch.ones(4, 1, 5, 5), 0.0), {}, "lam=0.0: must be positive and finite"),
        ((torch.ones(4, 1, 5, 5), 1.0), {"group": 3}, "group=3: must divide the 4 maps"),
        ((torch.ones(4, 1, 5, 5), 1.0), {"boundary": "wrap"}, "boundary='wrap': choose"),
        ((torch.ones(4, 1, 5, 5), 1.0), {"settings": "admm"}, "SolverSettings"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        SparseCode(*arguments, **options)
    assert "\n" not in str(caught.value)
