"""What a network keeps of its outputs with a layer replaced, against the same computed at once."""

import json
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deconvnet
from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.visualization import faithfulness
from deconvnet.visualization.experiments.faithfulness import log_probabilities

CHANNELS, MAPS, IMAGES = 4, 6, 5
X = torch.rand(IMAGES, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    low = [nn.Conv2d(3, CHANNELS, 3), nn.ReLU()]
    return nn.Sequential(*low, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()


def dictionary(lam=20.0, gap=None, refit=False):
    solver = SolverSettings("fista", gap=gap, iterations=500, refit=refit)
    settings = LayerSettings(MAPS, 1, lam=lam, non_negative=True, solver=solver)
    steps = ["channel_mean"]
    net = DeconvNet(
        [settings], PreprocessingSettings("none", steps, scale="norm", channels=CHANNELS)
    )
    return net


@pytest.fixture(scope="module")
def net(model):
    net = dictionary(gap=1e-3)
    net.preprocessing.fit(model[:2](X))
    return net


CLASSES = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def result(model, net):
    batches = [(X[:3], CLASSES[:3]), (X[3:], CLASSES[3:])]
    return faithfulness(model, "1", net, batches)


def test_outputs_are_compared_with_those_of_the_network_on_its_own(model, net, result):
    own = model(X).detach()
    replacements = {"reconstruction": net, "mean": net.preprocessing.channel_mean, "zero": 0.0}
    assert list(result.outputs) == list(replacements)
    for name, replacement in replacements.items():
        y = deconvnet.patch(model, "1", replacement)(X).detach()
        found = result.outputs[name]
        assert found.change == pytest.approx(float((y - own).norm() / own.norm()), rel=1e-5)
        assert found.agreement == float((y.argmax(1) == own.argmax(1)).double().mean())
        assert found.accuracy == pytest.approx(float((y.argmax(1) == CLASSES).float().mean()))
        kl = nn.functional.kl_div(
            *(outputs.double().log_softmax(1) for outputs in (y, own)),
            log_target=True,
            reduction="batchmean",
        )
        assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert result.accuracy == float((own.argmax(1) == CLASSES).double().mean())
    kept = 1 - result.outputs["reconstruction"].kl / result.outputs["zero"].kl
    assert result.recovered == pytest.approx(kept)


def test_unexplained_variance_and_non_zero_coefficients_are_counted_over_all_images(
    model, net, result
):
    a = model[:2](X).detach()
    codes = net.infer(a)
    z, error = codes.layer(1).z, a - net.reconstruct(codes)
    variance = (a - a.mean((0, 2, 3), keepdim=True)).square().sum()
    assert result.fvu == pytest.approx(float(error.square().sum() / variance), rel=1e-4)
    assert result.l0_image == float((z != 0).sum()) / IMAGES
    assert result.l0_position == pytest.approx(result.l0_image / 100)
    active = (z != 0).flatten(2).any(2).sum(0)
    assert list(result.active_images) == active.tolist()
    assert result.dead == int((active == 0).sum())


def test_the_gap_bounds_the_distance_from_the_minimum(model, net, result):
    a = model[:2](X).detach()
    exact = dictionary(gap=1e-5)
    exact.load_state_dict(net.state_dict())
    objective, minimum = (n.infer(a).layer(1).objective for n in (net, exact))
    assert 0 < result.gap <= result.largest_gap <= 1e-3
    assert float(((objective - minimum) / objective).max()) <= result.largest_gap


def test_with_a_refit_the_gap_is_that_of_the_codes_before_it(model, net, result):
    refitted = dictionary(gap=1e-3, refit=True)
    refitted.load_state_dict(net.state_dict())
    found = faithfulness(model, "1", refitted, [X])
    assert found.largest_gap == pytest.approx(result.largest_gap, rel=1e-3)
    assert found.fvu < result.fvu and found.l0_image <= result.l0_image


def test_a_perfect_reconstruction_keeps_every_output(model):
    net = dictionary(lam=1e6)
    # Rectified activations are non-negative sums of the units of the channels.
    net.preprocessing.channel_mean.zero_()
    net.layer(1).filters.zero_()[range(CHANNELS), range(CHANNELS)] = 1
    found = faithfulness(model, "1", net, [X])
    assert found.outputs["reconstruction"].agreement == 1
    assert found.outputs["reconstruction"].kl < 1e-8
    assert found.fvu < 1e-6 and found.recovered > 1 - 1e-6


def test_outputs_that_are_no_classes_are_compared_as_they_are(model, net):
    found = faithfulness(model[:3], "1", net, [X])
    assert found.outputs["zero"] == type(found.outputs["zero"])(change=1.0)
    assert found.recovered is None and found.accuracy is None
    assert "100.0%" in str(found) and "KL of zero" not in str(found)


def test_probabilities_are_not_taken_for_logits():
    logits = torch.randn(4, 3, dtype=torch.float64)
    assert_close(log_probabilities(logits.softmax(1)), log_probabilities(logits))


def test_the_table_fits_into_80_columns_and_json_takes_the_values(result):
    lines = str(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("its reconstruction") for line in lines)
    values = json.loads(json.dumps(result.as_dict()))
    assert values["num_maps"] == MAPS and values["outputs"]["zero"]["kl"] > 0
    assert math.isfinite(values["fvu"])


def test_no_images_are_refused(model, net):
    with pytest.raises(ValueError, match="batches: there are no images"):
        faithfulness(model, "1", net, [])
