"""The choice of the method of a projection, and the same units in several methods."""

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
