"""Another output in one layer of a network: what reaches the output, and what stays as it was."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deconvnet
from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings
from deconvnet.visualization.projection.layer_form import LayerForm, first_tensor
from deconvnet.visualization.projection.token_grids import TokenGrid

CHANNELS, MAPS = 4, 6


class Network(nn.Module):
    """A convolution whose rectifier is called twice, and a head."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, CHANNELS, 3, 2), nn.Conv2d(CHANNELS, 5, 3)
        self.norm, self.relu, self.head = nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Linear(5, 3)

    def upper(self, y):
        return self.head(self.relu(self.high(y)).mean((2, 3)))

    def forward(self, x):
        return self.upper(self.relu(self.norm(self.low(x))))


def concepts(filter_size=1, **options):
    settings = LayerSettings(MAPS, filter_size, lam=20.0, non_negative=True, **options)
    arrays = PreprocessingSettings(color="none", steps=[], scale="none", channels=CHANNELS)
    return DeconvNet([settings], arrays)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Network().eval()


X = torch.rand(2, 3, 13, 15, generator=torch.Generator().manual_seed(1))


def activations(model):
    return model.relu(model.norm(model.low(X))).detach()


@pytest.mark.parametrize("options", [{}, {"filter_size": 3}], ids=["1x1", "3x3"])
def test_the_reconstruction_takes_the_place_of_the_activations(model, options):
    net, a = concepts(**options), activations(model)
    with deconvnet.patch(model, "relu#0", net) as patch:
        y = model(X)
    codes = net.infer(a)
    assert_close(y, model.upper(net.reconstruct(codes)))
    assert_close(patch.activations, a)
    assert_close(patch.patched, net.reconstruct(codes))
    assert_close(patch.codes.layer(1).z, codes.layer(1).z)


def test_a_concept_is_removed_by_setting_its_map_to_zero(model):
    net, a = concepts(3), activations(model)
    codes = net.infer(a)
    strongest = int(codes.layer(1).z.sum((0, 2, 3)).argmax())
    z = codes.layer(1).z.clone()
    z[:, strongest] = 0
    expected = model.upper(net.operator(codes, 1)(z))
    assert_close(deconvnet.patch(model, "relu#0", net, without=[strongest])(X), expected)
    assert not torch.allclose(expected, deconvnet.patch(model, "relu#0", net)(X))


@pytest.mark.parametrize(
    "constant",
    [0.0, torch.arange(4.0), torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(2))],
    ids=["number", "channels", "maps"],
)
def test_a_constant_takes_the_place_of_all_activations(model, constant):
    y = deconvnet.patch(model, "relu#0", constant)(X)
    maps = constant[:, None, None] if getattr(constant, "ndim", 0) == 1 else constant
    assert_close(y, model.upper(torch.zeros(2, CHANNELS, 6, 7) + maps))


def test_a_function_of_the_activations_takes_their_place(model):
    y = deconvnet.patch(model, "relu#0", lambda a: 2 * a)(X)
    assert_close(y, model.upper(2 * activations(model)))


def test_of_a_module_that_is_called_again_only_the_named_call_is_patched(model):
    y = deconvnet.patch(model, "relu#1", 0.0)(X)
    assert_close(y, model.head.bias.expand(2, 3))


def test_the_model_is_the_same_afterwards_also_after_an_exception(model):
    before = model(X)
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    with deconvnet.patch(model, "relu#0", 0.0) as patch:
        model(X)
    with pytest.raises(ZeroDivisionError), patch:  # it may be entered again
        1 / 0  # noqa: B018
    after = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    assert hooks == after == [0] * len(hooks)
    assert torch.equal(model(X), before)


def test_modes_and_statistics_are_not_touched():
    torch.manual_seed(0)
    model = Network().train()
    model.head.eval()
    modes = [part.training for part in model.modules()]
    patched, alone = model(X), nn.BatchNorm2d(CHANNELS)
    alone(model.low(X))
    with deconvnet.patch(model, "relu#0", activations(model.eval())[0]):
        for part, mode in zip(model.modules(), modes, strict=True):
            part.training = mode
        model.norm.reset_running_stats()
        patched = model(X)
    assert patched.requires_grad
    assert [part.training for part in model.modules()] == modes
    # The pass that finds out how the layer holds its maps leaves no trace in the statistics.
    assert_close(model.norm.running_mean, alone.running_mean)
    assert int(model.norm.num_batches_tracked) == 1


def test_tokens_beside_the_grid_keep_their_activations():
    tokens, maps = torch.rand(2, 8, 3), torch.rand(2, 3, 2, 3)
    form = LayerForm(grid=TokenGrid(2, 3, 1, 8))
    found = form.with_maps(tokens, maps)
    assert_close(form.maps(found), maps)
    assert_close(found[:, [0, 7]], tokens[:, [0, 7]])


def test_of_several_outputs_the_first_tensor_is_replaced():
    class Pair(nn.Module):
        def forward(self, x):
            return [None, x, "more"]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.pair(x * torch.ones(1, requires_grad=True))

    y = deconvnet.patch(Both(), "pair", 3.0)(X)
    assert y[0] is None and y[2] == "more"
    assert (first_tensor(y) == 3).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("relu#0", torch.rand(5)), r"replacement of layer 'relu#0' is \(5,\): expected \(2, 4, 6"),
        (("relu#0", lambda a: a[:, :1]), r"is \(2, 1, 6, 7\): expected \(2, 4, 6, 7\)"),
        (("relu", 0.0), r"layer 'relu': called 2 times; choose relu#0, relu#1"),
        (("rule", 0.0), r"layer 'rule': no such layer; did you mean relu\?"),
        (("high", concepts()), r"layer 'high' has 5 channels, and the network takes 4"),
        (("low", "mean"), "replacement must be a tensor"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model, given, message):
    with pytest.raises(ValueError, match=message) as error:
        deconvnet.patch(model, *given)(X)
    assert "\n" not in str(error.value)


def test_maps_and_networks_that_do_not_exist_are_refused(model):
    with pytest.raises(ValueError, match="without=6: the network has maps 0 to 5"):
        deconvnet.patch(model, "low", concepts(), without=[6])
    with pytest.raises(ValueError, match=r"without=\[1\]: needs a network"):
        deconvnet.patch(model, "low", 0.0, without=[1])
    with pytest.raises(ValueError, match="the network takes images"):
        deconvnet.patch(model, "low", DeconvNet([LayerSettings(2, 3)]))
    with (
        deconvnet.patch(model, "low", 0.0) as patch,
        pytest.raises(ValueError, match="it is entered already"),
        patch,
    ):
        pass
    with pytest.raises(ValueError, match=r"called with a tensor \(3, 13, 15\)"):
        deconvnet.patch(model, "low", 0.0)(X[0])
