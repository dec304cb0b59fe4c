"""The choice of the method of a projection, and the same units in several methods."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deconvnet.visualization import Projector

UNITS = [(0, 1, 3, 2), (1, 0, 2, 2), (1, 2, 0, 1)]


def network(*middle):
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), *middle, last, nn.ReLU()).double()


def images():
    return torch.rand(2, 3, 12, 12, generator=torch.manual_seed(1), dtype=torch.float64)


def ones():
    return torch.ones(len(UNITS), dtype=torch.float64)


def test_layers_above_max_pooling_are_projected_by_deconv_and_others_by_guided():
    model, x = network(nn.MaxPool2d(2)), images()
    projector = Projector(model)
    assert projector.methods_of(x, "3") == ("deconv", "guided")
    assert projector.methods_of(x, "1") == ("guided", "deconv")
    assert projector(x, "3", UNITS).report.method == "deconv"
    report = projector(x, "1", UNITS).report
    assert report.method == "guided"
    assert "chosen because no switch of max pooling is passed" in str(report)


def test_without_switches_deconv_gives_one_picture_for_all_images_and_says_so():
    x = images()
    same_unit = [(0, 1, 3, 3), (1, 1, 3, 3)]
    seeds = torch.ones(2, dtype=torch.float64)
    found = Projector(network()).by_method(x, "3", same_unit, seeds=seeds)
    one, other = found["deconv"].images
    assert torch.equal(one, other)
    one, other = found["guided"].images
    assert (one - other).abs().max() > 0.1 * one.abs().max()
    assert not found["deconv"].report.depends_on_image
    assert "the same whatever the image" in str(found["deconv"].report)
    assert found["guided"].report.depends_on_image
    assert "the same whatever the image" not in str(found["guided"].report)
    pooled = Projector(network(nn.MaxPool2d(2)))(x, "3", same_unit, seeds=seeds)
    assert pooled.report.depends_on_image and "whatever" not in str(pooled.report)
    assert (pooled.images[0] - pooled.images[1]).abs().max() > 0


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("middle", [(), (nn.MaxPool2d(2),), (nn.LocalResponseNorm(3),)])
def test_several_methods_together_equal_each_alone(middle, local):
    model, x = network(*middle), images()
    methods = ("gradient", "guided", "deconv")
    together = Projector(model, local=local).by_method(x, "3", UNITS, methods=methods)
    assert tuple(together) == methods
    for method, found in together.items():
        alone = Projector(model, method=method, local=local)(x, "3", UNITS)
        assert_close(found.images, alone.images, rtol=0, atol=0)
        assert torch.equal(found.values, alone.values)
        assert torch.equal(found.boxes, alone.boxes)
        assert found.report == alone.report


def test_several_methods_share_a_forward_pass():
    model, x = network(nn.MaxPool2d(2)), images()
    projector = Projector(model, local=False)
    projector.by_method(x, "3", UNITS)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    projector.by_method(x, "3", UNITS)
    assert len(calls) == 1


def test_without_rules_auto_is_the_gradient_and_says_so(caplog):
    model, x = network(nn.Tanh()), images()
    projector = Projector(model)
    assert projector.methods_of(x, "3") == ("gradient",)
    found = projector(x, "3", UNITS)
    reason = "because deconv has no rule for tanh x1"
    assert f"gradient: rectified 1, switched 0 times; chosen {reason}" in str(found.report)
    assert f"layer 3: its gradient is shown, {reason}" in caplog.text
    assert len(caplog.records) == 1, "once for a layer"
    assert_close(found.images, Projector(model, method="gradient")(x, "3", UNITS).images)
    with pytest.raises(ValueError, match="layer '3': guided has no rule for tanh x1; strict=False"):
        projector(x, "3", UNITS, method="guided")
    mixed = Projector(model, strict=False)
    assert mixed.methods_of(x, "3") == ("guided", "deconv")
    assert mixed(x, "3", UNITS).report.unsupported == {"tanh": 1}


@pytest.mark.parametrize(
    ("method", "methods"),
    [
        ("deconv", ("deconv", "guided")),
        ("guided", ("guided", "deconv")),
        ("gradient", ("gradient",)),
    ],
)
def test_a_method_that_is_given_comes_first(method, methods):
    projector = Projector(network(), method=method)
    assert projector.methods_of(images(), "3") == methods
    assert projector(images(), "3", UNITS).report.method == method


def test_a_wrong_method_of_one_call_is_refused():
    with pytest.raises(ValueError, match="method=auto: choose one of deconv, guided, gradient"):
        Projector(network())(images(), "3", UNITS, method="auto")


class Held(nn.Module):
    """The scale and offset of normalisation as constants, as in batch normalisation."""

    def __init__(self, norm, y):
        super().__init__()
        mean, variance = statistics(norm, y)
        weight = norm.weight.detach()
        weight = weight[:, None, None] if isinstance(norm, nn.GroupNorm) else weight
        self.scale = weight / (variance + norm.eps).sqrt()
        self.offset = -mean * self.scale
        assert_close(y * self.scale + self.offset, norm(y).detach())

    def forward(self, y):
        return y * self.scale + self.offset


def statistics(norm, y):
    """Mean and variance by which the maps y are normalised, of a shape that broadcasts with y."""
    if isinstance(norm, nn.GroupNorm):
        groups = y.unflatten(1, (norm.num_groups, -1))
        dims = tuple(range(2, groups.dim()))
        mean = groups.mean(dims, keepdim=True).expand_as(groups).flatten(1, 2)
        return mean, groups.var(dims, False, keepdim=True).expand_as(groups).flatten(1, 2)
    dims = tuple(range(-len(norm.normalized_shape), 0))
    return y.mean(dims, keepdim=True), y.var(dims, False, keepdim=True)


class Last(nn.Module):
    """A module on (N, H, W, C) for maps (N, C, H, W)."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, y):
        return self.module(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("method", ["deconv", "guided"])
@pytest.mark.parametrize(
    "norm",
    [nn.GroupNorm(2, 6), nn.GroupNorm(1, 6), nn.LayerNorm([6, 10, 10]), Last(nn.LayerNorm(6))],
    ids=["groups", "one group", "layer", "channels"],
)
def test_statistics_of_normalisation_are_constants_like_those_of_batch_normalisation(norm, method):
    x = images()[:1]
    norm = copy.deepcopy(norm).double()
    inner = getattr(norm, "module", norm)
    nn.init.normal_(inner.weight, generator=torch.Generator().manual_seed(2))
    model = network(norm)
    y = model[:2](x).detach()
    y = y.permute(0, 2, 3, 1) if isinstance(norm, Last) else y
    held = Held(inner, y)
    twin = network(Last(held) if isinstance(norm, Last) else held)
    units = [(0, 1, 3, 2), (0, 3, 0, 8)]
    ones = torch.ones(2, dtype=torch.float64)
    # Held at the values of the whole image, so no windows of it.
    found, expected = (
        Projector(each, method=method, local=False)(x, "3", units, seeds=ones)
        for each in (model, twin)
    )
    assert found.images.any()
    assert_close(found.images, expected.images, rtol=0, atol=1e-13)
    assert torch.equal(found.boxes, expected.boxes)
    name = "group_norm" if isinstance(norm, nn.GroupNorm) else "layer_norm"
    assert found.report.extended == {name: 1} and not found.report.faithful


def test_the_gradient_follows_the_statistics_of_normalisation():
    x = images()[:1].requires_grad_()
    model = network(nn.GroupNorm(1, 6).double(), nn.GELU())
    (expected,) = torch.autograd.grad(model[:4](x)[0, 1, 3, 2], x)
    found = Projector(model, method="gradient")(x, "3", [(0, 1, 3, 2)], seeds=torch.ones(1))
    assert_close(found.images, expected, rtol=0, atol=1e-14)
    assert found.boxes.tolist() == [[0, 0, 12, 12]]
