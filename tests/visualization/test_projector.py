"""Projections, compared with networks reversed by hand and with Captum, and their properties for
every network; the model is left as it was, and errors are one line."""

import copy
import functools
import logging
import re
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.ops import stochastic_depth

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings
from deconvnet.visualization.models.zfnet import ZFNet
from deconvnet.visualization.projection.projector import Projector

DOUBLE = torch.float64


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


def seeded(make, *, seed=0):
    """A network with random parameters, statistics of batch normalisation among them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make()
        net = (_filled(net) if next(net.parameters()).is_meta else net).double().eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias, 0, 0.2)
    return net


def without_head(maker):
    """A network of torchvision without its classifier, which has most of its parameters."""
    with torch.device("meta"):
        net = maker()
    net.classifier = nn.Sequential()
    return net


def _filled(net):
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, 0, 0.1)  # that cannot be overlooked
    return net


def strongest(projector, x, layer, count=1):
    """The strongest units of as many maps of a layer, of the first image."""
    maps = projector.responses(x[:1], [layer])[layer][0]
    W = maps.shape[2]
    values, places = maps.flatten(1).max(1)
    order = values.argsort(descending=True)[:count].tolist()
    return [(0, k, int(places[k]) // W, int(places[k]) % W) for k in order]


# A network turned around by hand.


def by_hand(layers, x, unit, *, method="deconv", seed=None):
    """Zeiler and Fergus's deconvnet of layers in a row, for one unit of the last: an image.

    Up with the layers themselves, keeping the switches; down with the transposed filters, without
    biases, by adding at the switches, and rectified. seed: other maps to begin with.
    """
    n, k, i, j = unit
    y, passed = x[n : n + 1], []
    for layer in layers:
        switches = None
        if isinstance(layer, nn.MaxPool2d):
            window = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            above, switches = F.max_pool2d(y, *window, layer.ceil_mode, return_indices=True)
        else:
            above = layer(y.clone())
        passed.append((layer, y.shape, above, switches))
        y = above
    signal = torch.zeros_like(y) if seed is None else seed
    if seed is None:
        signal[0, k, i, j] = y[0, k, i, j]
    for layer, shape, above, switches in reversed(passed):
        if isinstance(layer, nn.Conv2d):
            extra = [
                below - (size - 1) * stride + 2 * padding - dilation * (kernel - 1) - 1
                for below, size, stride, padding, dilation, kernel in zip(
                    shape[2:],
                    signal.shape[2:],
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                    layer.kernel_size,
                    strict=True,
                )
            ]
            signal = F.conv_transpose2d(
                signal, layer.weight, None, layer.stride, layer.padding, extra, layer.groups
            )
        elif isinstance(layer, nn.ReLU):
            if method != "gradient":
                signal = signal.clamp(min=0)
            if method != "deconv":
                signal = signal * (above > 0)
        elif isinstance(layer, nn.MaxPool2d):
            unpooled = signal.new_zeros(shape).flatten(2)
            signal = unpooled.scatter_add(2, switches.flatten(2), signal.flatten(2)).view(shape)
        else:
            assert isinstance(layer, nn.Dropout | nn.LocalResponseNorm), "nothing goes down here"
    return signal[0].detach()


ALEXNET, VGG11 = (models.alexnet, (67, 75)), (models.vgg11, (24, 29))
PLAIN = [
    *((*ALEXNET, layer) for layer in (0, 2, 3, 8, 12)),
    *((*VGG11, layer) for layer in (0, 2, 8, 11)),
]


@pytest.fixture(scope="module")
def plain():
    """plain(maker, size): (layers, images), made once."""
    known = {}

    def make(maker, size):
        if maker not in known:
            known[maker] = seeded(lambda: without_head(maker)).features, rand(2, 3, *size)
        return known[maker]

    return make


@pytest.fixture(scope="module")
def chosen(plain):
    """chosen(maker, size, layer): three units of a layer and their values, found once."""

    @functools.cache
    def choose(maker, size, layer):
        layers, x = plain(maker, size)
        units = strongest(Projector(layers, local=False), x, str(layer), 2) + [(1, 5, 0, 0)]
        with torch.no_grad():
            maps = [layers[: layer + 1](image[None])[0] for image in x]
        return units, [maps[n][k, i, j] for n, k, i, j in units]

    return choose


@pytest.mark.parametrize(("maker", "size", "layer"), PLAIN)
@pytest.mark.parametrize("method", ["deconv", "guided", "gradient"])
def test_a_projection_is_the_network_reversed_by_hand(maker, size, layer, method, plain, chosen):
    layers, x = plain(maker, size)
    units, values = chosen(maker, size, layer)
    exact = Projector(layers, method=method, local=False)
    found = exact(x, str(layer), units)
    quick = Projector(layers, method=method)(x, str(layer), units)
    for unit, value, image, local, shown in zip(
        units, values, found.images, quick.images, found.values, strict=True
    ):
        expected = by_hand(layers[: layer + 1], x, unit, method=method)
        assert torch.equal(image, expected)
        assert_close(local, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
        assert shown == value
    assert found.images[0].any()
    assert found.report.faithful or method != "deconv"
    assert found.units.tolist() == [list(unit) for unit in units]


def test_response_normalisation_is_skipped_on_the_way_down():
    net, x = seeded(lambda: ZFNet(size=32, width=4)), rand(2, 3, 32, 32)
    projector = Projector(net, local=False)
    layers = list(net.children())
    for name in ("norm1", "conv2", "pool2", "relu5"):
        (unit,) = strongest(projector, x, name)
        found = projector(x, name, [unit])
        last = [name for name, _ in net.named_children()].index(name)
        assert torch.equal(found.images[0], by_hand(layers[: last + 1], x, unit))
        assert found.report.skipped == {"local_response_norm": 2 if last > 7 else 1}
        assert found.report.faithful


def test_the_gradient_goes_through_response_normalisation():
    net, x = seeded(lambda: ZFNet(size=32, width=4)), rand(1, 3, 32, 32).requires_grad_()
    found = Projector(net, method="gradient", local=False)(x, "relu3", [(0, 2, 3, 3)])
    value = net.relu3(net.conv3(nn.Sequential(*list(net.children())[:8])(x)))[0, 2, 3, 3]
    assert_close(found.images[0], value.detach() * torch.autograd.grad(value, x)[0][0])


def test_a_unit_of_the_first_convolution_projects_to_its_filter():
    net, x = seeded(lambda: nn.Conv2d(3, 5, (4, 3), stride=(3, 2))), rand(1, 3, 20, 21)
    found = Projector(nn.Sequential(net))(x, "0", [(0, 3, 2, 4)], seeds=torch.tensor([1.0]))
    expected = torch.zeros(3, 20, 21, dtype=DOUBLE)
    expected[:, 6:10, 8:11] = net.weight[3].detach()
    assert torch.equal(found.images[0], expected)
    assert found.boxes.tolist() == [[6, 8, 10, 11]]


def test_kernels_that_lie_in_the_padding_project_to_zero():
    net, x = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 2, padding=5))), rand(1, 3, 8, 8)
    places = [(0, 0), (2, 3), (4, 4), (8, 12), (12, 12), (13, 13), (14, 16), (16, 1), (16, 16)]
    units = [(0, 1, i, j) for i, j in places]
    quick, exact = (Projector(net, local=local)(x, "0", units) for local in (True, False))
    assert torch.equal(quick.images, exact.images)
    assert quick.images.flatten(1).any(1).tolist() == [i in (4, 8, 12) for i, _ in places]
    assert quick.boxes[-1].tolist() == [0, 0, 0, 0] and quick.tiles().shape == (9, 3, 2, 2)


def test_vectors_are_maps_with_one_position():
    net, x = seeded(lambda: ZFNet(size=32, width=4)), rand(2, 3, 32, 32)
    projector = Projector(net, local=False)
    maps = projector.responses(x, ["fc7", "fc6"])
    assert maps["fc7"].shape == (2, 10, 1, 1) and maps["fc6"].shape == (2, 32, 1, 1)
    assert torch.equal(maps["fc7"][:, :, 0, 0], net(x)) and torch.equal(
        projector.outputs(x), net(x)
    )
    found = projector(x, "fc7", [(1, 4, 0, 0)])
    # Through two matrices by hand, and through the layers below as before.
    signal = (maps["fc7"][1, 4] * net.fc7.weight[4]).clamp(min=0) @ net.fc6.weight
    below = list(net.children())[: list(dict(net.named_children())).index("flatten")]
    expected = by_hand(below, x, (1, 0, 0, 0), seed=signal.view(1, 8, 2, 2))
    assert_close(found.images[0], expected, rtol=0, atol=1e-15)
    assert found.boxes.tolist() == [[0, 0, 32, 32]] and found.images.any()


# Other implementations.


def captum_deconvolution(model, module, x, unit, kind="NeuronDeconvolution"):
    attribution = pytest.importorskip("captum.attr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(attribution, kind)(model, module).attribute(x.clone(), unit[1:])[0].detach()


def largest_difference(a, b):
    """The largest difference, of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("maker", "layer"),
    [
        (lambda: without_head(models.alexnet), "features.6"),
        (lambda: without_head(models.vgg11), "features.8"),
        (models.resnet18, "layer2.0.bn2"),
        (models.squeezenet1_1, "features.6"),
        (models.densenet121, "features.denseblock2.denselayer2.conv1"),
    ],
)
def test_captum_agrees_where_it_is_right(maker, layer):
    model, x = seeded(maker), rand(1, 3, 63, 63 if "features.6" in layer else 40)
    for method, kind in (("deconv", "NeuronDeconvolution"), ("guided", "NeuronGuidedBackprop")):
        projector = Projector(model, method=method)
        (unit,) = strongest(projector, x, layer)
        found = projector(x, layer, [unit])
        other = captum_deconvolution(model, model.get_submodule(layer), x, unit, kind)
        assert largest_difference(found.values[0] * other, found.images[0]) < 1e-10


class Functional(nn.Module):
    """ReLU as a function, which modules cannot see."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))

    def down(self, x, signal):
        return F.conv_transpose2d(
            F.conv_transpose2d(signal, self.b.weight).clamp(min=0), self.a.weight
        )


class Shared(nn.Module):
    """One ReLU in two branches side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.c = (nn.Conv2d(3, 6, 3, padding=1) for _ in range(2))
        self.relu, self.b = nn.ReLU(), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        return self.b(self.relu(self.a(x)) + self.relu(self.c(x)))

    def down(self, x, signal):
        signal = F.conv_transpose2d(signal, self.b.weight).clamp(min=0)
        return F.conv_transpose2d(signal, self.a.weight + self.c.weight, padding=1)


class PreActivation(nn.Module):
    """What is rectified also goes past the ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.b = nn.ReLU(), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        y = self.a(x)
        return self.b(y + self.c(self.relu(y)))

    def down(self, x, signal):
        signal = F.conv_transpose2d(signal, self.b.weight)
        branch = F.conv_transpose2d(signal, self.c.weight, padding=1).clamp(min=0)
        return F.conv_transpose2d(signal + branch, self.a.weight)


@pytest.mark.parametrize("net", [Functional, Shared, PreActivation])
def test_functional_and_shared_operations_are_projected_correctly(net):
    model, x, unit = seeded(net), rand(1, 3, 14, 14), (0, 2, 5, 4)
    found = Projector(model, method="deconv")(x, "b", [unit])
    signal = torch.zeros(1, 4, *model(x).shape[2:], dtype=DOUBLE)
    signal[unit] = model(x)[unit]
    assert_close(found.images, model.down(x, signal).detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("net", [Functional, Shared, PreActivation])
def test_captum_is_silently_wrong_for_them(net):
    """Three of the reasons for rules on operations and not on modules."""
    model, x, unit = seeded(net), rand(1, 3, 14, 14), (0, 2, 5, 4)
    found = Projector(model)(x, "b", [unit])
    other = found.values[0] * captum_deconvolution(model, model.b, x, unit)
    assert largest_difference(other, found.images[0]) > 0.05
    if net is Functional:
        gradient = Projector(model, method="gradient")(x, "b", [unit])
        assert_close(other, gradient.images[0])


# One network in many words.


class Twin(nn.Module):
    """Convolution, ReLU, pooling, convolution, ReLU, convolution."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 3, padding=1)
        self.activation = activation

    def forward(self, x):
        y = F.max_pool2d(self.activation(self.a(x)), 3, 2)
        return self.c(self.activation(self.b(y)))


class Checkpointed(Twin):
    def forward(self, x):
        def first(x):
            return F.max_pool2d(self.activation(self.a(x)), 3, 2)

        def second(y):
            return self.activation(self.b(y))

        y = checkpoint(second, checkpoint(first, x, use_reentrant=False), use_reentrant=False)
        return self.c(y)


def on_a_view(y):
    y = torch.cat([y[:, :4], y[:, 4:].relu()], 1)
    y[:, :4].relu_()
    return y


def assigned(y):
    made = torch.empty_like(y)
    made[:, :3] = y[:, :3].relu()
    made[:, 3:] = y[:, 3:].relu()
    return made


def scripted_relu(y: torch.Tensor) -> torch.Tensor:
    return torch.relu(y)


def script():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(scripted_relu)


TWINS = {
    "one module for both": lambda: Twin(nn.ReLU()),
    "in place": lambda: Twin(nn.ReLU(inplace=True)),
    "a function": lambda: Twin(F.relu),
    "a method": lambda: Twin(lambda y: y.relu()),
    "a method in place": lambda: Twin(lambda y: y.relu_()),
    "torch.relu_": lambda: Twin(torch.relu_),
    "a threshold": lambda: Twin(nn.Threshold(0, 0)),
    "in place on a view": lambda: Twin(on_a_view),
    "assigned to parts": lambda: Twin(assigned),
    "scripted": lambda: Twin(script()),
    "checkpointed": lambda: Checkpointed(F.relu),
    "wrapped to be parallel": lambda: nn.DataParallel(Twin(F.relu)),
    "in other memory": lambda: Twin(F.relu).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("method", ["deconv", "guided", "gradient"])
def test_every_way_to_write_a_rectifier_gives_the_same_result(name, method):
    model, x, unit = seeded(TWINS[name]), rand(1, 3, 15, 17), (0, 1, 3, 4)
    found = Projector(model, method=method, local=False)(x, "c", [unit])
    twin = getattr(model, "module", model)
    layers = [twin.a, nn.ReLU(), nn.MaxPool2d(3, 2), twin.b, nn.ReLU(), twin.c]
    expected = by_hand(layers, x, unit, method=method)
    assert_close(found.images[0], expected, rtol=0, atol=1e-15)
    assert found.report.unsupported == {}
    assert found.report.exact["relu"] == (
        4 if name in ("in place on a view", "assigned to parts") else 2
    )
    assert found.report.rectified == found.report.exact["relu"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wrapped", "in place", "a part", "a part in place", "a function"])
def test_a_compiled_model_is_projected_as_if_it_were_not_compiled(kind):
    model, x, unit = seeded(lambda: Twin(F.relu)), rand(1, 3, 15, 17), [(0, 1, 3, 4)]
    expected = Projector(model)(x, "c", unit)
    if kind == "wrapped":
        model = torch.compile(model, backend="aot_eager")
    elif kind == "in place":
        model.compile(backend="aot_eager")
    elif kind == "a part":
        model.b = torch.compile(model.b, backend="aot_eager")
    elif kind == "a part in place":
        model.b.compile(backend="aot_eager")
    else:
        model.activation = torch.compile(F.relu, backend="aot_eager")
    called = getattr(model, "_compiled_call_impl", None)
    for _ in range(2):
        found = Projector(model)(x, "c", unit)
        assert torch.equal(found.images, expected.images) and found.report == expected.report
        with torch.no_grad():
            model(x)
    assert getattr(model, "_compiled_call_impl", None) is called, "left as it was"
    torch._dynamo.reset()


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self, middle):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.middle = middle

    def forward(self, x):
        return self.b(self.middle(self.a(x)))


RECTIFIERS = {
    "clamp": lambda y: y.clamp(min=0),
    "clamp in place": lambda y: y.clamp_(min=0),
    "clamp of numbers": lambda y: torch.clamp(y, 0.0, 6.0),
    "clamp_min": lambda y: torch.clamp_min(y, 0),
    "relu6": F.relu6,
    "hardtanh from zero": nn.Hardtanh(0, 4),
    "threshold": nn.Threshold(0.5, 0),
    "leaky_relu": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.5),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "silu in place": lambda y: F.silu(y, inplace=True),
    "silu by hand": lambda y: y * y.sigmoid(),
    "silu by hand, the other way": lambda y: torch.sigmoid(y).mul(y),
    "silu by hand in place": lambda y: y.mul_(y.sigmoid()),
    "silu of a multiple": lambda y: y * torch.sigmoid(1.702 * y),
    "hardswish": nn.Hardswish(),
    "hardswish by hand": lambda y: y * F.relu6(y + 3) / 6,
    "hardswish by hand, shifted": lambda y: y * (F.relu6(y + 3.0) / 6),
    "hardswish by a gate": lambda y: y * F.hardsigmoid(y),
    "mish": nn.Mish(),
    "mish by hand": lambda y: y * F.softplus(y).tanh(),
}
SCALED = {"hardswish by hand": 1 / 6}


@pytest.mark.parametrize("name", RECTIFIERS)
@pytest.mark.parametrize("method", ["deconv", "guided"])
def test_similar_operations_are_rectified_and_reported(name, method):
    model, x, unit = seeded(lambda: Between(RECTIFIERS[name])), rand(1, 3, 9, 9), (0, 2, 3, 2)
    found = Projector(model, method=method)(x, "b", [unit], seeds=torch.ones(1))
    signal = torch.zeros(1, 4, 5, 5, dtype=DOUBLE)
    signal[unit] = 1
    signal = F.conv_transpose2d(signal, model.b.weight).clamp(min=0)
    if method == "guided":
        signal = signal * (model.a(x) > (0.5 if name == "threshold" else 0))
    expected = F.conv_transpose2d(signal, model.a.weight).detach()
    assert_close(found.images, expected * SCALED.get(name, 1), rtol=0, atol=1e-14)
    if name.partition(" ")[0] in ("gelu", "silu", "hardswish", "mish"):
        assert found.report.extended == {name.partition(" ")[0]: 1}
    assert sum(found.report.extended.values()) == found.report.rectified == 1
    assert not found.report.faithful and not found.report.unsupported


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, y):
        tokens = y.flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=True)[0]
        return mixed.transpose(1, 2).reshape(y.shape)


def tanh_on_a_view(y):
    y = y.clone()
    y[:, :2].tanh_()
    return y


def shared_gate(y):
    gate = y.sigmoid()
    return y * gate + gate.cos()


def product_on_a_view(y):
    made = y.clone()
    made[:, :2] *= y[:, 2:]
    return made


REFUSED = {
    "clamp": (lambda y: y.clamp(0.1), "clamp"),
    "clamp from above": (lambda y: y.clamp(max=1), "clamp"),
    "clamp by maps": (lambda y: y.clamp(min=y.flip(1)), "clamp"),
    "hardtanh": (nn.Hardtanh(-1, 1), "hardtanh"),
    "tanh on a view": (tanh_on_a_view, "tanh"),
    "a product with tanh": (lambda y: y * y.tanh(), "tanh"),
    "a product with a falling sigmoid": (lambda y: y * (-2 * y).sigmoid().cos(), "sigmoid"),
    "a gate that is also added": (shared_gate, "sigmoid"),
    "softplus": (nn.Softplus(), "softplus"),
    "tanh": (nn.Tanh(), "tanh"),
    "sigmoid": (nn.Sigmoid(), "sigmoid"),
    "softmax": (nn.Softmax(1), "softmax"),
    "glu": (lambda y: F.glu(y, 1).repeat(1, 2, 1, 1), "glu"),
    "absolute value": (torch.abs, "abs"),
    "power": (lambda y: y**2, "pow"),
    "product": (lambda y: y * y.flip(1), "mul of two things"),
    "product on a view": (product_on_a_view, "mul of"),
    "quotient": (lambda y: 1.0 / (y + 9), "reciprocal"),
    "quotient of maps": (lambda y: torch.ones_like(y) / (y + 9), "div by something"),
    "maximum": (lambda y: torch.maximum(y, torch.zeros(())), "maximum"),
    "where": (lambda y: torch.where(y > 0, y, 0.0), "where"),
    "instance norm": (nn.InstanceNorm2d(4), "batch_norm in training mode"),
    "batch norm of the batch": (
        nn.BatchNorm2d(4, track_running_stats=False),
        "batch_norm in training mode",
    ),
    "attention": (Attention, r"softmax|attention"),
    "filters from maps": (
        lambda y: F.conv2d(y, y[:1, :1].mean() * torch.ones(4, 4, 1, 1).to(y)),
        "convolution of two",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operation_without_a_rule_is_refused_by_name_or_reported(name):
    middle, expected = REFUSED[name]
    make = middle if isinstance(middle, type) else lambda: copy.deepcopy(middle)
    model, x = seeded(lambda: Between(make())), rand(2, 3, 9, 9)
    unit = [(1, 2, 3, 2)]
    with pytest.raises(
        ValueError, match=f"(?s)layer 'b': deconv has no rule for .*({expected})"
    ) as error:
        Projector(model, method="deconv")(x, "b", unit)
    assert "\n" not in str(error.value)
    found = Projector(model, strict=False)(x, "b", unit)
    assert any(re.search(expected, name) for name in found.report.unsupported)
    assert not found.report.faithful
    # Below it nothing is in the way; and there is no rectifier, so this is the gradient.
    assert Projector(model)(x, "a", unit).report.faithful
    gradient = Projector(model, method="gradient")(x, "b", unit)
    assert_close(found.images, gradient.images)
    assert found.report.rectified == 0


class Mul(torch.autograd.Function):
    """A rectifier by another name."""

    @staticmethod
    def forward(ctx, y):
        return y.clamp(min=0)

    @staticmethod
    def backward(ctx, signal):
        return signal


def product_in_no_grad(y):
    with torch.no_grad():
        gate = y.sigmoid()
    return y * gate


def in_place_on_the_data(y):
    y.data.clamp_(min=0)
    return y * 1


def in_place_without_a_gradient(y):
    with torch.no_grad():
        y.clamp_(min=0)
    return y * 1


def masked_on_a_view(y):
    y = y.clone()
    y[:, :2] *= y[:, :2] > 0
    return y


def pasted_into_a_copy(y):
    made = y.detach().clone()
    made[:, :2] = y[:, :2]
    return made


class Average(nn.Module):
    """What a buffer holds of the pixels, as a factor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, 1, 1))

    def forward(self, y):
        with torch.no_grad():
            self.mean.mul_(0.5).add_(y.mean((0, 2, 3))[:, None, None])
        return y * self.mean


COMPUTED = {
    "mask": lambda y: y * (y > 0),
    "mask of floating point": lambda y: y * (y > 0).to(y),
    "mask in place": lambda y: y.mul_(y > 0),
    "mask on a view": masked_on_a_view,
    "mask by where": lambda y: y * torch.where(y > 0, 1.0, 0.0),
    "mask into out": lambda y: y * torch.gt(y, 0, out=torch.empty(y.shape, dtype=torch.bool)),
    "mask of ones": lambda y: y * torch.ones_like(y).mul_(y.detach()),
    "mask by einsum": lambda y: torch.einsum("nchw,nchw->nchw", y, (y > 0).to(y)),
    "sign": lambda y: y * y.detach().sign(),
    "rounded": lambda y: y * y.detach().round(),
    "detached gate": lambda y: y * y.detach().sigmoid(),
    "gate in no_grad": product_in_no_grad,
    "one of the maps": lambda y: y * F.one_hot(y.argmax(1), 4).permute(0, 3, 1, 2),
    "drawn with probabilities": lambda y: y * torch.bernoulli(y.detach().sigmoid()),
    "pooled": lambda y: y * F.max_pool2d(y.detach(), 3, 1, 1),
    "quotient": lambda y: y / y.detach().std(),
    "average kept in a buffer": Average,
    "filters": lambda y: F.conv2d(y, y.detach().mean() * torch.ones(4, 4, 1, 1).to(y)),
    "statistics": lambda y: F.batch_norm(y, y.mean((0, 2, 3)).detach(), y.var((0, 2, 3)).detach()),
    "sorted maps": lambda y: y[:, y.mean((0, 2, 3)).argsort()],
    "selected maps": lambda y: y.index_select(1, y.detach().amax((0, 2, 3)).argsort()),
    "straight through": lambda y: y + (y.relu() - y).detach(),
    "negative part taken off": lambda y: y - y.clamp(max=0).detach(),
    "joined": lambda y: torch.cat([y[:, :2], y[:, 2:].detach()], 1),
    "pasted": pasted_into_a_copy,
    "data": in_place_on_the_data,
    "in place in no_grad": in_place_without_a_gradient,
    "own function": Mul.apply,
    "graph of its own": lambda y: y.detach().relu().requires_grad_() * 1 + y,
    "number": lambda y: y * float(y.detach().max()),
    "number computed with": lambda y: y * (1 / y.detach().std().item()),
    "array": lambda y: y * torch.from_numpy((y.detach().numpy() > 0) * 1.0),
    "list": lambda y: y * torch.tensor((y.detach() > 0).tolist()),
    "shift": lambda y: y.roll(int(1000 * y.detach().std()), 2),
    "dropout": lambda y: F.dropout(y, training=True),
    "dropout of maps": lambda y: F.dropout2d(y, training=True),
    "stochastic depth": lambda y: y + stochastic_depth(2 * y, 0.5, "row", True),
    "noise": lambda y: y * torch.randn_like(y),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_constant_that_depends_on_the_pixels_is_detected(name):
    middle = COMPUTED[name]
    make = middle if isinstance(middle, type) else lambda: middle
    model, x, unit = seeded(lambda: Between(make())), rand(2, 3, 9, 9), [(1, 2, 3, 2)]
    with pytest.raises(ValueError, match="layer 'b': deconv has no rule for ") as error:
        Projector(model, method="deconv")(x, "b", unit)
    assert "\n" not in str(error.value)
    found = Projector(model, strict=False)(x, "b", unit)
    assert found.report.unsupported and not found.report.faithful
    assert Projector(model)(x, "a", unit).report.faithful, "nothing of it lies below"


def after_many_others(y):
    """Where a constant lies in memory something of the pixels may have lain before."""
    for _ in range(50):
        passing = y.detach() > 0, y.detach() * 2
        del passing
        y = y * torch.ones(y.shape) * torch.tensor(1.0)
    return y


CONSTANT = {
    "number": lambda y: y * 3,
    "learned, though no parameter": lambda y: y + torch.ones(4, 1, 1).to(y).requires_grad_(),
    "made where others have been": after_many_others,
    "of a shape": lambda y: y * torch.ones_like(y) * y.new_full((4, 1, 1), 2) * y.shape[1],
    "places": lambda y: y * torch.arange(y.shape[3]).to(y),
    "array": lambda y: y * torch.from_numpy(np.linspace(0, 1, y.shape[3])),
    "list": lambda y: y * torch.tensor([1.0, 2, 3, 4]).to(y)[:, None, None],
    "standardised filters": lambda y: F.conv2d(
        y, standardised(torch.eye(4)[..., None, None]).to(y)
    ),
    "channels": lambda y: y[:, [2, 0, 1, 3]].index_select(1, torch.tensor([1, 0, 2, 3])),
    "copied": lambda y: torch.zeros_like(y).copy_(y),
    "shifted": lambda y: y.roll(2, 2),
    "checked": lambda y: y * (1 if bool(y.isfinite().all()) else 2),
    "bias drawn at random": lambda y: y + torch.randn_like(y),
    "dropout": nn.Dropout(),
    "batch norm": nn.BatchNorm2d(4),
}


def standardised(weight):
    return (weight - weight.mean()) / weight.std()


@pytest.mark.parametrize("name", CONSTANT)
def test_a_true_constant_is_accepted(name):
    model, x, unit = seeded(lambda: Between(CONSTANT[name])), rand(2, 3, 9, 9), [(1, 2, 3, 2)]
    found, gradient = (
        Projector(model, method=method)(x, "b", unit, seeds=torch.ones(1))
        for method in ("deconv", "gradient")
    )
    assert found.report.faithful
    assert_close(found.images, gradient.images)


STEPS = {
    **{f"computed: {name}": step for name, step in COMPUTED.items() if callable(step)},
    **{f"constant: {name}": step for name, step in CONSTANT.items()},
    "convolution": lambda y: F.conv2d(
        y, torch.linspace(-1, 1, 144).view(4, 4, 3, 3).to(y), None, 1, 1
    ),
    "average": lambda y: F.avg_pool2d(y, 3, 1, 1),
    "sum": lambda y: y + y.flip(1),
    "upside down": lambda y: y.flip(2),
}


@pytest.mark.parametrize("seed", range(12))
def test_what_is_reported_as_linear_is_linear(seed):
    """f(a x + (1 - a) y) = a f(x) + (1 - a) f(y) where only linear operations are listed."""
    random = np.random.default_rng(seed)
    names = [str(name) for name in random.choice(sorted(STEPS), 3)]
    names += [str(n) for n in random.choice([n for n in sorted(STEPS) if ":" not in n], 2)]
    steps = [STEPS[name]() if isinstance(STEPS[name], type) else STEPS[name] for name in names]

    def middle(y):
        for step in steps:
            y = step(y)
        return y

    model = seeded(lambda: Between(middle))
    found = Projector(model, strict=False)(rand(1, 3, 9, 9), "b", [(0, 2, 3, 2)]).report
    assert (found.unsupported == {}) == (not any(name.startswith("computed") for name in names))
    if not found.unsupported and "constant: bias drawn at random" not in names:
        x, y = rand(1, 3, 9, 9, seed=1), rand(1, 3, 9, 9, seed=2)
        with torch.no_grad():
            mixed = 0.3 * model(x) + 0.7 * model(y)
            assert_close(model(0.3 * x + 0.7 * y), mixed, rtol=1e-9, atol=1e-9)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


def kept(**options):
    """A convolution called with its settings in the form given."""
    weight = torch.linspace(-1, 1, 4 * 4 * 2 * 3, dtype=DOUBLE).view(4, 4, 2, 3)
    return lambda y: F.conv2d(y, weight, **options)


def pools(**options):
    return lambda y: F.max_pool2d(F.pad(y, (2, 2, 2, 2)), **options)


# Settings in every form that PyTorch keeps, and the same as pairs of numbers.
FORMS = {
    "valid": (kept(padding="valid"), kept(padding=(0, 0))),
    "same": (
        kept(padding="same"),
        lambda y: kept()(F.pad(y, (1, 1, 0, 1))),
    ),
    "same, dilated": (
        kept(padding="same", dilation=3),
        lambda y: kept(dilation=(3, 3))(F.pad(y, (3, 3, 1, 2))),
    ),
    "module with valid": (
        lambda: nn.Conv2d(4, 4, 3, padding="valid", stride=2),
        lambda: nn.Conv2d(4, 4, 3, stride=(2, 2)),
    ),
    "module with same and reflection": (
        lambda: nn.Conv2d(4, 4, (2, 3), padding="same", padding_mode="reflect"),
        lambda: nn.Sequential(nn.ReflectionPad2d((1, 1, 0, 1)), nn.Conv2d(4, 4, (2, 3))),
    ),
    "one number in a tuple": (
        kept(stride=(2,), padding=(1,), dilation=(2,)),
        kept(stride=(2, 2), padding=(1, 1), dilation=(2, 2)),
    ),
    "one number for some": (kept(stride=[2], padding=(1, 0)), kept(stride=(2, 2), padding=(1, 0))),
    "without a bias, by torch.convolution": (
        lambda y: torch.convolution(y, y.new_ones(4, 2, 2, 2), None, [2], [1], [1], False, [0], 2),
        lambda y: F.conv2d(y, y.new_ones(4, 2, 2, 2), None, (2, 2), (1, 1), (1, 1), 2),
    ),
    "transposed": (
        lambda y: torch.convolution(y, y.new_ones(4, 4, 3, 3), None, [2], [1], [1], True, [1], 1),
        lambda y: F.conv_transpose2d(y, y.new_ones(4, 4, 3, 3), None, (2, 2), (1, 1), (1, 1)),
    ),
    "max pooling": (pools(kernel_size=2), pools(kernel_size=(2, 2), stride=(2, 2))),
    "max pooling, no stride": (
        lambda y: torch.max_pool2d(y, [2]),
        lambda y: torch.max_pool2d(y, (2, 2), (2, 2), (0, 0), (1, 1)),
    ),
    "max pooling, one number": (
        pools(kernel_size=(3,), stride=(2,), padding=(1,), dilation=(2,), ceil_mode=True),
        pools(kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=True),
    ),
    "average pooling": (
        lambda y: torch._C._nn.avg_pool2d(y, [2]),
        lambda y: F.avg_pool2d(y, (2, 2), (2, 2)),
    ),
    "average pooling, divided by another number": (
        lambda y: F.avg_pool2d(y, (3,), (2,), (1,), True, False, 2),
        lambda y: F.avg_pool2d(y, (3, 3), (2, 2), (1, 1), True, False, 2),
    ),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_settings_of_operations_mean_the_same_in_every_form(name):
    x = rand(1, 3, 16, 15)
    made = []
    for form in FORMS[name]:
        # A module is made, a function is taken as it is.
        make = form if form.__code__.co_argcount == 0 else lambda form=form: form
        model = seeded(lambda make=make: nn.Sequential(nn.Conv2d(3, 4, 3), Apply(make())))
        units = [(0, 1, 2, 2), (0, 2, 0, 0)]
        for local in (True, False):
            found = Projector(model, local=local)(x, "1", units, seeds=torch.ones(2))
            made.append(found)
        made.append(Projector(model, overlap="normalised")(x, "1", units, seeds=torch.ones(2)))
    for one, other in zip(made[:3], made[3:], strict=True):
        assert_close(one.images, other.images, rtol=0, atol=1e-14)
        assert torch.equal(one.boxes, other.boxes)
    assert_close(made[0].images, made[1].images, rtol=0, atol=1e-14)


# What holds whatever the network.


def test_projections_of_a_linear_network_are_its_gradients_and_its_adjoint():
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2, bias=False),
            nn.BatchNorm2d(6),
            nn.AvgPool2d(2, 1),
            nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(4, 5, 3, bias=False, padding_mode="reflect", padding=1),
        )
    )
    nn.init.zeros_(net[1].bias), nn.init.zeros_(net[1].running_mean)
    x, z = rand(2, 3, 13, 12), rand(4, seed=1)
    units = [(0, 1, 2, 3), (1, 4, 0, 0), (1, 0, 8, 8), (0, 2, 5, 5)]
    found = Projector(net)(x, "5", units, seeds=z)
    gradient = Projector(net, method="gradient")(x, "5", units, seeds=z)
    assert torch.equal(found.images, gradient.images)
    at = tuple(torch.tensor(units).T)
    inner = (x[at[0]] * found.images).sum((1, 2, 3))
    assert_close(inner, (net(x)[at] * z).detach())


def test_the_projection_is_the_gradient_if_everything_is_positive(plain):
    layers, x = plain(*ALEXNET)
    layers = copy.deepcopy(layers)
    for p in layers.parameters():
        p.data.abs_()
    units = strongest(Projector(layers), x.abs(), "8", 2)
    found, gradient = (
        Projector(layers, method=method)(x.abs(), "8", units) for method in ("deconv", "gradient")
    )
    assert torch.equal(found.images, gradient.images)


def test_a_unit_of_a_pooled_map_projects_like_the_unit_at_its_switch(plain):
    layers, x = plain(*ALEXNET)
    y, switches = F.max_pool2d(layers[:2](x), 3, 2, return_indices=True)
    n, k, i, j = unit = (1, 7, 3, 2)
    row, column = divmod(int(switches[unit]), layers[:2](x).shape[3])
    pooled = Projector(layers)(x, "2", [unit])
    below = Projector(layers)(x, "1", [(n, k, row, column)])
    assert_close(pooled.images, below.images, rtol=1e-12, atol=0)
    assert_close(pooled.values, below.values, rtol=1e-12, atol=0) and pooled.values > 0


def test_pooling_with_overlapping_windows_erases_nothing():
    """MaxUnpool2d writes the windows one over the other: a zero of a neighbour erases the unit."""
    net, x = (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 5), nn.ReLU(), nn.MaxPool2d(3, 2))),
        rand(1, 3, 24, 24),
    )
    y, switches = F.max_pool2d(net[:2](x), 3, 2, return_indices=True)
    units = [
        (0, k, i, j) for k in range(8) for i in range(9) for j in range(9) if y[0, k, i, j] > 0
    ]
    erased = []
    for unit in units:
        signal = torch.zeros_like(y)
        signal[unit] = 1
        erased.append(not F.max_unpool2d(signal, switches, 3, 2, output_size=(20, 20)).any())
    assert sum(erased) > len(units) / 4
    found = Projector(net)(x, "2", units)
    assert found.images.flatten(1).any(1).all()
    for unit, image in list(zip(units, found.images, strict=True))[::20]:
        assert_close(image, by_hand(net, x, unit))


def test_folding_batch_normalisation_into_filters_changes_nothing():
    def make():
        return nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        )

    net = seeded(make)
    folded = nn.Sequential(
        *(fuse_conv_bn_eval(net[0], net[1]), *net[2:4], fuse_conv_bn_eval(net[4], net[5]), net[6])
    )
    x = rand(1, 3, 16, 16)
    units = strongest(Projector(net), x, "6", 3)
    found, other = Projector(net)(x, "6", units), Projector(folded)(x, "4", units)
    assert_close(found.images, other.images, rtol=0, atol=1e-12)
    assert found.report.linear == {"batch_norm": 2} and other.report.linear == {}


@pytest.fixture(scope="module")
def small():
    """(network, images): a bit of everything, the layers down, c1, ..., c4."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1, self.c2 = nn.Conv2d(3, 8, 5, stride=2), nn.Conv2d(8, 8, 3, padding=1)
            self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
            self.pool, self.drop = nn.MaxPool2d(3, 2), nn.Dropout(0.5)
            self.c3, self.c4 = nn.Conv2d(16, 8, 3), nn.Conv2d(8, 6, 1)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            y = self.relu(self.c1(x))
            y = self.pool(self.relu(self.bn(self.c2(y)) + y))
            y = self.relu(self.c3(self.drop(torch.cat([y, -y], 1))))
            return self.head(self.c4(y).mean((2, 3)))

    return seeded(Small), rand(9, 3, 31, 29)


def test_the_seed_only_sets_the_scale(small):
    net, x = small
    projector = Projector(net)
    unit = strongest(projector, x, "c4")
    found = projector(x, "c4", unit)
    ones = projector(x, "c4", unit, seeds=torch.ones(1))
    twice = projector(x, "c4", unit, seeds=torch.tensor([2.5]))
    assert_close(found.images, found.values * ones.images, rtol=1e-13, atol=1e-15)
    assert_close(twice.images, 2.5 * ones.images, rtol=1e-13, atol=1e-15)
    assert torch.equal(found.values, twice.values)


def test_a_negative_seed_does_not_pass_a_rectifier(small):
    net, x = small
    projector = Projector(net)
    (unit,) = strongest(projector, x, "relu#2")
    assert projector(x, "relu#2", [unit]).images.any()
    found = projector(x, "relu#2", [unit], seeds=torch.tensor([-1.0]))
    assert not found.images.any() and found.values > 0


def test_a_unit_that_is_off_projects_to_nothing(small):
    net, x = small
    maps = Projector(net).responses(x, ["relu#2"])["relu#2"]
    unit = (maps == 0).nonzero()[:1]
    found = Projector(net)(x, "relu#2", unit)
    assert not found.images.any() and found.values.tolist() == [0]
    assert found.report.rectified == 3


def test_images_and_units_do_not_affect_each_other(small):
    """Neither what else is in the batch, nor its size, nor other units change a bit."""
    net, x = small
    units = [(n, k, i, j) for n in (0, 3, 8) for k, i, j in ((1, 2, 2), (5, 0, 3), (2, 3, 1))]
    units += units[:1]
    found = Projector(net)(x, "c4", units)
    assert found.images.flatten(1).any(1).all()
    assert torch.equal(found.images[0], found.images[-1])
    for batch in (1, 2):
        again = Projector(net, batch=batch)(x, "c4", units)
        for key in ("images", "boxes", "fields", "values"):
            assert torch.equal(getattr(again, key), getattr(found, key)), key
    for row, (n, *place) in enumerate(units[:4]):
        alone = Projector(net)(x[n : n + 1], "c4", [(0, *place)])
        assert torch.equal(alone.images[0], found.images[row])
        assert torch.equal(alone.boxes[0], found.boxes[row])


def test_units_of_one_image_do_not_add_up():
    """Rectified together they are not the sum of each alone: so no two ever go down together."""
    net, x = seeded(Functional), rand(1, 3, 14, 14)
    projector = Projector(net)
    units = [(0, 1, 5, 5), (0, 2, 5, 5)]
    found = projector(x, "b", units, seeds=torch.ones(2))
    signal = torch.zeros(1, 4, 10, 10, dtype=DOUBLE)
    signal[0, 1:3, 5, 5] = 1
    together = net.down(x, signal)[0].detach()
    assert largest_difference(found.images.sum(0), together) > 0.05


def test_no_units_give_no_projections(small):
    net, x = small
    found = Projector(net)(x, "c4", [])
    assert len(found) == 0 and found.images.shape == (0, 3, 31, 29)
    assert found.boxes.shape == found.fields.shape == found.units.shape == (0, 4)
    assert found.tiles().shape[0] == 0


def outside(image, box):
    """An image with what is inside a box set to zero."""
    top, left, bottom, right = box.tolist()
    image = image.clone()
    image[:, top:bottom, left:right] = 0
    return image


def test_nothing_is_outside_the_boxes(small):
    net, x = small
    for layer in ("c1", "bn", "relu#1", "pool", "c4"):
        projector = Projector(net)
        h, w = projector.responses(x[:1], [layer])[layer].shape[2:]
        found = projector(x, layer, [(0, 1, 0, 0), (1, 5, h // 2, w // 2), (0, 3, h - 1, w - 1)])
        for image, box in zip(found.images, found.boxes, strict=True):
            assert not outside(image, box).any()
        assert found.images.any()


def test_tiles_and_patches_are_cropped_to_the_fields(small):
    net, x = small
    pixels = torch.rand(9, 3, 31, 29, dtype=DOUBLE)
    found = Projector(net)(x, "relu#1", [(4, 2, 0, 5), (4, 2, 6, 6), (7, 0, 13, 12)])
    tiles, patches = found.tiles(), found.patches(pixels)
    assert tiles.shape == patches.shape == (3, 3, 9, 9)
    top, left, bottom, right = found.fields[1].tolist()
    assert torch.equal(tiles[1], found.images[1, :, top:bottom, left:right])
    assert torch.equal(patches[1], pixels[4, :, top:bottom, left:right])
    # The first begins above the image.
    top, left, bottom, right = found.fields[0].tolist()
    assert top == -2 and (patches[0, :, :2] == 0.5).all() and not tiles[0, :, :2].any()
    assert torch.equal(patches[0, :, 2:], pixels[4, :, :bottom, left:right])
    assert_close(tiles.sum((1, 2, 3)), found.images.sum((1, 2, 3)))


# The model is left as it was.


def state_of(model):
    return (
        [(m, m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        [(name, p.requires_grad, p.grad, p._version) for name, p in model.named_parameters()],
        [(name, b.clone().tolist()) for name, b in model.named_buffers()],
    )


class Broken(nn.Module):
    def forward(self, y):
        raise RuntimeError("out of order")


@pytest.mark.parametrize(
    "use", ["layers", "responses", "outputs", "project", "refused", "broken", "ours"]
)
def test_the_model_is_left_as_it_was(small, use):
    net, x = copy.deepcopy(small[0]), small[1][:2]
    net.train().requires_grad_(True)
    net.bn.eval()
    net.c2.weight.requires_grad_(False)
    if use == "refused":
        net.relu = nn.Tanh()
    if use == "broken":
        net.drop = Broken()
    before, values = state_of(net), copy.deepcopy(net.state_dict())
    projector, kept = Projector(net, method="deconv"), x.clone()
    if use == "layers":
        projector.layers(x)
    elif use == "outputs":
        projector.outputs(x)
    elif use == "responses":
        projector.responses(x, ["c4", "relu#1"])
    elif use == "project":
        projector(x, "c4", [(0, 1, 2, 2)])
    elif use == "refused":
        with pytest.raises(ValueError, match="tanh"):
            projector(x, "c4", [(0, 1, 2, 2)])
    elif use == "broken":
        with pytest.raises(ValueError, match="Small fails on images of .*: out of order"):
            projector.outputs(x)
    else:
        with pytest.raises(KeyError):
            projector.responses(x, ["c4"], lambda layer, maps: {}[layer])
    assert state_of(net) == before
    assert all(torch.equal(value, values[key]) for key, value in net.state_dict().items())
    assert torch.equal(x, kept) and not x.requires_grad and x.grad is None


class Counting(nn.Module):
    """It counts the images that it has seen, in a buffer and not in its output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, y):
        self.seen += len(y)
        return self.conv(y).relu()


def test_buffers_that_a_model_writes_to_are_restored():
    net, x = seeded(Counting), rand(2, 3, 9, 9)
    net(x)
    before, projector = net.seen, Projector(net)
    projector.layers(x)
    projector.outputs(x)
    projector(x, "conv", [(1, 2, 3, 3)])
    assert net.seen is before and net.seen == 2
    net(x)
    assert net.seen == 4


def test_gradient_hooks_of_the_model_are_not_called_and_change_nothing(small):
    net, x, unit = copy.deepcopy(small[0]), small[1], [(1, 2, 2, 2)]
    expected, called = Projector(net)(x, "c4", unit), []

    def hook(*given):
        called.append(given)
        return (torch.zeros_like(given[1][0]),)

    net.relu.register_full_backward_hook(hook)
    net.c2.register_full_backward_pre_hook(lambda module, above: called.append(above))
    found = Projector(net)(x, "c4", unit)
    assert torch.equal(found.images, expected.images) and found.report.faithful and not called
    assert len(net.relu._backward_hooks) == len(net.c2._backward_pre_hooks) == 1


def test_a_model_in_training_mode_is_used_in_evaluation_mode(small):
    net, x = copy.deepcopy(small[0]), small[1]
    expected, scores = Projector(net)(x, "c4", [(1, 2, 2, 2)]), net(x)
    projector = Projector(net.train())
    assert torch.equal(projector(x, "c4", [(1, 2, 2, 2)]).images, expected.images)
    assert torch.equal(projector.outputs(x), scores)
    assert torch.equal(projector.responses(x, ["head"])["head"][:, :, 0, 0], scores)


def test_projection_works_within_no_grad(small):
    net, x = small
    expected = Projector(net)(x, "c4", [(1, 2, 2, 2)]).images
    with torch.no_grad():
        assert torch.equal(Projector(net)(x, "c4", [(1, 2, 2, 2)]).images, expected)
        assert len(Projector(net).layers(x)) == 11
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inference = x.clone()
        assert inference.is_inference()
        projector = Projector(net)
        assert torch.equal(projector(inference, "c4", [(1, 2, 2, 2)]).images, expected)
        assert projector.layers(inference)[0].field == (5, 5)
        assert torch.equal(projector.outputs(inference), net(x))
        assert projector.responses(inference, ["c4"])["c4"].shape[0] == 9
        assert torch.is_inference_mode_enabled()


def test_the_result_requires_no_grad(small):
    net, x = small
    found = Projector(net)(x.clone().requires_grad_(), "c4", [(1, 2, 2, 2)])
    maps = Projector(net).responses(x.clone().requires_grad_(), ["c4"])["c4"]
    assert not (found.images.requires_grad or found.values.requires_grad or maps.requires_grad)


def test_projection_within_autocast_is_unchanged(small):
    net, x = copy.deepcopy(small[0]).float(), small[1].float()
    expected = Projector(net)(x, "c4", [(1, 2, 2, 2)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Projector(net)(x, "c4", [(1, 2, 2, 2)])
    assert torch.equal(found.images, expected.images)


def test_networks_in_half_precision_are_projected(small):
    net, x = copy.deepcopy(small[0]), small[1]
    unit = strongest(Projector(net), x, "c1")
    expected = Projector(net)(x, "c1", unit)
    found = Projector(net.bfloat16())(x.bfloat16(), "c1", unit)
    assert found.images.dtype == found.values.dtype == torch.bfloat16
    assert largest_difference(found.images.double(), expected.images) < 0.05


def test_a_model_that_writes_to_its_input_does_not_change_ours():
    net, x = (
        seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3))),
        rand(1, 3, 8, 8),
    )
    kept, projector = x.clone(), Projector(net)
    projector.layers(x), projector.responses(x, ["0", "1"]), projector.outputs(x)
    found = projector(x, "1", [(0, 1, 2, 2)])
    assert torch.equal(x, kept)
    assert (found.images >= 0).all() and found.report.rectified == 1


def test_an_operation_in_place_after_a_layer_does_not_affect_its_units(small):
    net, x = small
    found = Projector(net)(x, "c1", [(0, 0, 0, 0)])
    assert_close(found.values, net.c1(x)[0, :1, 0, 0].detach())
    assert (Projector(net).responses(x, ["c1"])["c1"] < 0).any()


def test_a_model_that_catches_errors_is_still_stopped_at_the_layer():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            try:
                y = self.a(x)
            except Exception:
                y = torch.zeros(len(x), 4, 7, 7).to(x)
            return self.b(y)

    net, x = seeded(Careless), rand(1, 3, 9, 9)
    assert Projector(net)(x, "a", [(0, 0, 1, 1)]).images.any()
    assert Projector(net)(x, "b", [(0, 0, 1, 1)]).images.any()
    with pytest.raises(KeyError):
        Projector(net).responses(x, ["a"], lambda layer, maps: {}[layer])


def test_layers_below_a_head_that_requires_another_size_are_listed(caplog):
    net = seeded(lambda: ZFNet(size=32, width=4))
    projector, x = Projector(net), rand(1, 3, 40, 40)
    with caplog.at_level(logging.WARNING):
        layers = projector.layers(x)
    assert layers[-1].name == "flatten"
    assert "the model fails above its layers: " in caplog.text and "mat1 and mat2" in caplog.text
    assert projector(x, "relu5", strongest(projector, x, "relu5")).images.any()
    with pytest.raises(ValueError, match="layer 'fc6': the model fails before it: "):
        projector(x, "fc6", [(0, 0, 0, 0)])
    # Of another size the same projector has them.
    assert projector(rand(1, 3, 32, 32), "fc6", [(0, 0, 0, 0)]).images.shape == (1, 3, 32, 32)


def test_how_often_a_module_is_called_may_depend_on_the_size_of_the_image():
    class Deeper(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            while x.shape[2] > 8:
                x = self.a(x)
            return x

    projector = Projector(seeded(Deeper))
    assert [layer.name for layer in projector.layers(rand(1, 3, 10, 10))] == ["a"]
    assert [layer.name for layer in projector.layers(rand(1, 3, 14, 14))] == ["a#0", "a#1", "a#2"]
    assert projector(rand(1, 3, 14, 14), "a#2", [(0, 0, 0, 0)]).boxes.tolist() == [[0, 0, 7, 7]]
    assert projector(rand(1, 3, 10, 10), "a", [(0, 0, 0, 0)]).boxes.tolist() == [[0, 0, 3, 3]]


# The report.


@pytest.mark.parametrize(
    ("maker", "layer", "pools"),
    [
        (models.squeezenet1_1, "classifier.2", 3),
        (models.googlenet, "inception4a", 6),
        (models.resnet18, "avgpool", 1),
    ],
)
def test_the_report_counts_the_operations_of_the_graph(maker, layer, pools):
    options = {"init_weights": False, "aux_logits": False} if maker is models.googlenet else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = maker(weights=None, **options).eval()
    x = torch.randn(1, 3, 48, 48)
    report = Projector(net)(x, layer, [(0, 1, 0, 0)]).report
    tops = []
    hook = net.get_submodule(layer).register_forward_hook(
        lambda *args: tops.append(args[2].grad_fn)
    )
    net(x)
    hook.remove()
    names, path, seen = Counter(), list(tops), set(tops)
    while path:
        node = path.pop()
        names[type(node).__name__] += 1
        below = {node for node, _ in node.next_functions if node is not None} - seen
        seen |= below
        path += below
    assert report.rectified == report.exact["relu"] == names["ReluBackward0"] > 5
    assert report.switched == names["MaxPool2DWithIndicesBackward0"] == pools
    assert report.exact["convolution"] == names["ConvolutionBackward0"]
    assert report.linear.get("batch_norm", 0) == names["NativeBatchNormBackward0"]
    assert report.linear.get("cat", 0) == names["CatBackward0"]
    assert report.faithful and f"rectified {report.rectified}" in str(report)


def test_convolutions_that_leave_a_checkerboard_are_named_with_its_period():
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3)),
        *(nn.Conv2d(4, 4, 4, stride=2), nn.Conv2d(4, 4, (2, 3), stride=(2, 2)), nn.Conv2d(4, 4, 1)),
    )
    x = torch.zeros(1, 3, 96, 96)
    uneven = Projector(net)(x, "6", [(0, 0, 1, 1)]).report.uneven
    assert {u.layer: (u.kernel, u.stride, u.period) for u in uneven} == {
        "0": ((7, 7), (2, 2), (2, 2)),
        "5": ((2, 3), (2, 2), (16, 16)),
    }
    assert [u.layer for u in Projector(net)(x, "3", [(0, 0, 1, 1)]).report.uneven] == ["0"]


def constant_seed(kernel, stride, overlap):
    """Ones everywhere, down through a convolution of ones: the sum over all its units."""
    net = nn.Sequential(nn.Conv2d(1, 1, kernel, stride=stride, bias=False)).double()
    nn.init.ones_(net[0].weight)
    h = (20 - kernel) // stride + 1
    units = [(0, 0, i, j) for i in range(h) for j in range(h)]
    x, ones = torch.zeros(1, 1, 20, 20, dtype=DOUBLE), torch.ones(len(units))
    return Projector(net, overlap=overlap)(x, "0", units, seeds=ones).images.sum(0)[0]


def test_normalised_overlap_removes_the_checkerboard():
    inside = slice(4, -4)
    summed = constant_seed(3, 2, "sum")[inside, inside]
    assert sorted(summed.unique().tolist()) == [1, 2, 4]
    flat = constant_seed(3, 2, "normalised")[inside, inside]
    assert_close(flat, torch.full_like(flat, 9 / 4))
    # An even overlap is left alone.
    assert torch.equal(constant_seed(4, 2, "sum"), constant_seed(4, 2, "normalised"))


def test_normalised_overlap_is_reported(plain):
    layers, x = plain(*ALEXNET)
    report = Projector(layers, overlap="normalised")(x, "3", [(0, 0, 0, 0)]).report
    assert report.overlap == "normalised" and not report.faithful
    assert [u.layer for u in report.uneven] == ["0"] and "divided out" in str(report)


class Gated(nn.Module):
    def __init__(self, gate=nn.Sigmoid):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.squeeze, self.fc1, self.fc2 = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(4, 2, 1),
            nn.Conv2d(2, 4, 1),
        )
        self.gate = gate()

    def weights(self, y):
        return self.gate(self.fc2(F.relu(self.fc1(self.squeeze(y)))))

    def forward(self, x):
        y = self.a(x)
        return self.b(y * self.weights(y))


@pytest.mark.parametrize(
    ("gate", "name"),
    [
        *((nn.Sigmoid, "sigmoid"), (nn.Hardsigmoid, "hardsigmoid"), (nn.Softmax2d, "softmax")),
        # Any other single number for each map.
        (nn.Tanh, "tanh"),
    ],
)
def test_gates_are_constants_unless_their_gradient_is_requested(gate, name):
    net, x, unit = seeded(lambda: Gated(gate)), rand(2, 3, 16, 16), (1, 2, 5, 6)
    found = Projector(net)(x, "b", [unit], seeds=torch.ones(1))
    signal = torch.zeros(1, 4, 12, 12, dtype=DOUBLE)
    signal[0, 2, 5, 6] = 1
    signal = F.conv_transpose2d(signal, net.b.weight) * net.weights(net.a(x))[1]
    assert_close(found.images, F.conv_transpose2d(signal, net.a.weight).detach())
    assert found.boxes.tolist() == [[5, 6, 10, 11]]
    assert found.report.extended == {f"{name} as a constant gate": 1}
    assert found.report.rectified == 0 and "relu" not in found.report.exact
    # With its gradient the gate sees, and paints, the whole image.
    followed = Projector(net, gates="gradient")(x, "b", [unit], seeds=torch.ones(1))
    assert followed.images[0].any(0).all()
    assert followed.boxes.tolist() == [[0, 0, 16, 16]]
    assert followed.report.extended == {f"{name} as a gate, with its gradient": 1}
    assert followed.report.rectified == followed.report.exact["relu"] == 1


def test_a_gate_may_be_other_channels_of_the_same_maps():
    """A gated linear unit by hand; only x sigmoid(x) is an activation."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            values, gate = self.a(x).chunk(2, 1)
            return self.b(values * gate.sigmoid())

    net, x = seeded(Unit), rand(1, 3, 9, 9)
    found = Projector(net)(x, "b", [(0, 1, 2, 2)], seeds=torch.ones(1))
    signal = torch.zeros(1, 4, 5, 5, dtype=DOUBLE)
    signal[0, 1, 2, 2] = 1
    signal = F.conv_transpose2d(signal, net.b.weight) * net.a(x)[:, 4:].sigmoid()
    assert_close(found.images, F.conv_transpose2d(signal, net.a.weight[:4]).detach())


# What depends on what was learned.


def test_only_parameters_below_a_layer_matter(plain):
    layers, x = plain(*ALEXNET)
    projector = Projector(layers)
    units = strongest(projector, x, "8", 3)
    found = projector(x, "8", units, seeds=torch.ones(3)).images
    for number in (10, 8, 6, 3, 0):
        others = copy.deepcopy(layers)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            others[number].reset_parameters()
        changed = Projector(others)(x, "8", units, seeds=torch.ones(3)).images
        if number > 8:
            assert torch.equal(changed, found)
        else:
            both = torch.stack([changed.flatten(), found.flatten()])
            assert torch.corrcoef(both)[0, 1] < 0.9


# Names, and what is wrong.


class ChannelsLast(nn.Module):
    """Blocks on (N, H, W, C) between convolutions, or the same on (N, C, H, W)."""

    def __init__(self, last):
        super().__init__()
        self.last = last
        self.stem, self.depthwise = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.Linear(4, 7) if last else nn.Conv2d(4, 7, 1)
        self.act, self.drop, self.block = nn.ReLU(), nn.Dropout(), nn.Identity()
        self.down = nn.Linear(7, 4) if last else nn.Conv2d(7, 4, 1)
        self.scale = nn.Parameter(torch.rand(4) if last else torch.rand(4, 1, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(x)
        if self.last:
            x, y = x.permute(0, 2, 3, 1), y.movedim(1, -1).contiguous()
        y = self.block(x + self.scale * self.drop(self.down(self.act(self.up(y)))))
        return self.head(y.mean((1, 2) if self.last else (2, 3)))


def test_attention_weights_are_not_mistaken_for_maps_in_the_last_axis():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.drop = nn.Conv2d(3, 18, 1), nn.Dropout()
            self.out = nn.Conv2d(6, 5, 1)

        def forward(self, x):
            q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, 2, 3)).unbind(1)
            weights = self.drop((q.transpose(-1, -2) @ k).softmax(-1))
            return self.out((weights @ v.transpose(-1, -2)).transpose(-1, -2).reshape(-1, 6, 4, 4))

    shapes = {
        info.name: info.shape for info in Projector(Attention()).layers(rand(1, 3, 4, 4).float())
    }
    assert shapes == {"qkv": (18, 4, 4), "out": (5, 4, 4)}, "nor for maps at all"


@pytest.mark.parametrize("method", ["deconv", "guided", "gradient"])
def test_maps_are_found_where_a_network_has_its_channels_last(method):
    last = seeded(lambda: ChannelsLast(True))
    first = seeded(lambda: ChannelsLast(False))
    first.load_state_dict(
        {n: t.view(first.state_dict()[n].shape) for n, t in last.state_dict().items()}
    )
    # As many rows as maps: the shape is ambiguous.
    x = rand(2, 3, 8, 10)
    one, other = (Projector(net, method=method) for net in (last, first))
    kinds = {layer.name: layer for layer in one.layers(x)}
    for layer in other.layers(x):
        found = kinds.pop(layer.name)
        assert (found.shape, found.field, found.stride, found.offset) == (
            *(layer.shape, layer.field, layer.stride, layer.offset),
        )
        maps = [each.responses(x, [layer.name])[layer.name] for each in (one, other)]
        assert_close(*maps, rtol=1e-12, atol=1e-12)
        K, H, W = layer.shape
        units = [(0, K - 1, H // 2, W // 2), (1, 1, 0, W - 1), (0, 1, 0, W - 1)]
        projections = [each(x, layer.name, units) for each in (one, other)]
        assert_close(projections[0].images, projections[1].images, rtol=0, atol=1e-12)
        assert_close(projections[0].values, projections[1].values)
        assert torch.equal(projections[0].boxes, projections[1].boxes)
        assert torch.equal(projections[0].fields, projections[1].fields)
    assert kinds == {}
    with pytest.raises(ValueError, match="up has 7 maps of 4x5"):
        one(x, "up", [(0, 7, 0, 0)])


@pytest.mark.parametrize("maker", [models.convnext_tiny, models.swin_t, models.swin_v2_t])
def test_published_networks_with_channels_last_have_maps_of_the_size_of_their_stage(maker):
    net = without_classifier(maker)
    net.features = net.features[:3]
    projector = Projector(net.eval(), method="gradient")
    x = torch.rand(1, 3, 32, 32)
    for layer in projector.layers(x):
        if layer.name.startswith("features."):
            assert layer.shape[1:] in ((8, 8), (4, 4)) and layer.shape[0] in (96, 192, 384), layer
    layer = "features.1.0"
    maps = net.features[1][0](net.features[0](x))
    maps = maps if maker is models.convnext_tiny else maps.permute(0, 3, 1, 2)
    assert_close(projector.responses(x, [layer])[layer], maps)
    leaf = x.clone().requires_grad_()
    maps = net.features[1][0](net.features[0](leaf))
    unit = maps[0, 17, 3, 5] if maker is models.convnext_tiny else maps[0, 3, 5, 17]
    (gradient,) = torch.autograd.grad(unit, leaf)
    found = projector(x, layer, [(0, 17, 3, 5)], seeds=torch.ones(1))
    assert_close(found.images, gradient, rtol=1e-4, atol=1e-6)


def without_classifier(maker):
    """A network of torchvision with random parameters, its upper stages left out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = maker()
    net.norm = net.permute = net.avgpool = net.flatten = net.head = nn.Identity()
    net.classifier = nn.Identity()
    return net


def test_layers_are_listed_in_their_order_with_shapes_and_fields(small):
    net, x = small
    layers = {layer.name: layer for layer in Projector(net).layers(x)}
    assert list(layers) == [
        *("c1", "relu#0", "c2", "bn", "relu#1", "pool"),
        *("drop", "c3", "relu#2", "c4", "head"),
    ]
    assert [layer.kind for layer in layers.values()][:3] == ["Conv2d", "ReLU", "Conv2d"]
    assert {name: (layer.shape, layer.field, layer.stride) for name, layer in layers.items()} == {
        "c1": ((8, 14, 13), (5, 5), (2, 2)),
        "relu#0": ((8, 14, 13), (5, 5), (2, 2)),
        "c2": ((8, 14, 13), (9, 9), (2, 2)),
        "bn": ((8, 14, 13), (9, 9), (2, 2)),
        "relu#1": ((8, 14, 13), (9, 9), (2, 2)),
        "pool": ((8, 6, 6), (13, 13), (4, 4)),
        "drop": ((16, 6, 6), (13, 13), (4, 4)),
        "c3": ((8, 4, 4), (21, 21), (4, 4)),
        "relu#2": ((8, 4, 4), (21, 21), (4, 4)),
        "c4": ((6, 4, 4), (21, 21), (4, 4)),
        "head": ((5, 1, 1), None, None),
    }
    assert str(layers["c3"]).split() == ["c3", "Conv2d", "8x4x4", "21x21"]
    assert "the whole image" in str(layers["head"])


def test_every_call_of_a_module_is_projected_as_a_layer_of_its_own(small):
    net, x = small
    projector = Projector(net)
    for call, layer in ((0, "c1"), (1, "bn"), (2, "c3")):
        maps = projector.responses(x, [layer, f"relu#{call}"])
        if layer != "bn":
            assert torch.equal(maps[f"relu#{call}"], maps[layer].relu())
        assert projector(x, f"relu#{call}", [(0, 0, 1, 1)]).report.rectified == call + 1


def test_responses_are_the_outputs_of_the_layers(small):
    net, x = small
    maps = Projector(net).responses(x, ["c4", "c1", "head"])
    assert torch.equal(maps["c1"], net.c1(x))
    assert torch.equal(maps["head"][:, :, 0, 0], net(x))
    assert_close(maps["c4"].mean((2, 3)) @ net.head.weight.T + net.head.bias, net(x))
    sums = Projector(net).responses(x, ["c1"], lambda layer, y: (layer, y.sum()))
    assert sums == {"c1": ("c1", maps["c1"].sum())}


WRONG = {
    "a name": ({"layer": "c9"}, "layer 'c9': no such layer; did you mean c4, c3, c2?"),
    "a far name": ({"layer": "features"}, "layer 'features': no such layer; there are c1, relu#0"),
    "a number": ({"layer": 2}, "layer 2: must be a name; there are c1, relu#0"),
    "several calls": (
        {"layer": "relu"},
        "layer 'relu': called 3 times; choose relu#0, relu#1, relu#2",
    ),
    "a call": ({"layer": "relu#3"}, "layer 'relu#3': no such layer; did you mean relu#2, relu#1"),
    "an image": (
        {"units": [(0, 0, 0, 0), (9, 0, 0, 0)]},
        "unit (9, 0, 0, 0) (image, map, row, column): there are 9 images",
    ),
    "a map": (
        {"units": [(8, 6, 0, 0)]},
        "unit (8, 6, 0, 0) (image, map, row, column): there are 9 images, and c4 has 6 maps of 4x4",
    ),
    "a row": ({"units": [(0, 1, 0, 0), (7, 1, 4, 0)]}, "unit (7, 1, 4, 0) "),
    "a column": ({"units": [(0, 1, 0, -1)]}, "unit (0, 1, 0, -1) "),
    "one unit": ({"units": [0, 1, 2, 3]}, "units are torch.int64 (4,): expected rows of"),
    "a shape": ({"units": [(0, 1), (2, 3)]}, "units are torch.int64 (2, 2): expected rows of"),
    "fractions": (
        {"units": [(0, 1.5, 2, 3)]},
        "units are torch.float32 (1, 4): expected rows of integers",
    ),
    "ragged": ({"units": [(0, 1, 2, 3), (0, 1, 2)]}, "units: expected rows of (image, map, row"),
    "seeds": ({"seeds": torch.ones(2)}, "seeds of shape (2,) for 1 units: expected one for each"),
    "integers": (
        {"x": torch.zeros(1, 3, 31, 29, dtype=torch.int64)},
        "x is torch.int64 (1, 3, 31, 29): expected images",
    ),
    "one image": (
        {"x": torch.zeros(3, 31, 29)},
        "x is torch.float32 (3, 31, 29): expected images (N, C, H, W)",
    ),
    "no tensor": ({"x": [[0.0]]}, "x is list: expected images"),
    "method": ({"method": "lrp"}, "method=lrp: choose one of auto, deconv, guided, gradient"),
    "generative": ({"method": "generative"}, "method=generative: choose one of auto, deconv"),
    "gates": ({"gates": "open"}, "gates=open: choose one of constant, gradient"),
    "overlap": ({"overlap": "mean"}, "overlap=mean: choose one of sum, normalised"),
    "batch": ({"batch": 0}, "batch=0: must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_input_is_refused_in_one_line(small, name):
    net, x = small
    wrong, message = WRONG[name]
    wrong = dict(wrong)
    call = {"x": wrong.pop("x", x), "layer": "c4", "units": [(0, 1, 2, 3)]}
    call |= {key: wrong.pop(key) for key in ("layer", "units", "seeds") if key in wrong}
    with pytest.raises(ValueError) as error:
        Projector(net, **wrong)(**call)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    if name in ("integers", "one image", "no tensor"):
        for use in ("layers", "outputs"):
            with pytest.raises(ValueError, match="x is"):
                getattr(Projector(net), use)(call["x"])
    if "layer" in WRONG[name][0]:
        with pytest.raises(ValueError, match="layer "):
            Projector(net).responses(x, ["c1", call["layer"]])


def test_layers_that_do_not_depend_on_the_image_are_refused():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return self.b(self.a(x).detach())

    with pytest.raises(ValueError, match="layer 'b': its output does not depend on the image"):
        Projector(seeded(Cut))(rand(1, 3, 9, 9), "b", [(0, 0, 1, 1)])


def refused(model, x, layer="0"):
    with pytest.raises(ValueError) as error:
        Projector(model)(x, layer, [(0, 0, 0, 0)])
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AssertionError("Wrong height!\nExpected 224"), "of 3x9x8: Wrong height! Expected 224"),
        (AssertionError(), "of 3x9x8: AssertionError"),
        (KeyError("head"), "of 3x9x8: KeyError: 'head'"),
        (TypeError("no"), "of 3x9x8: TypeError: no"),
        (NotImplementedError(), "of 3x9x8: NotImplementedError"),
        (ZeroDivisionError("by zero"), "of 3x9x8: ZeroDivisionError: by zero"),
    ],
    ids=repr,
)
def test_an_error_of_the_model_is_one_line_with_its_name_and_the_size_of_the_images(error, says):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            raise error

    model, x = seeded(Fails), rand(1, 3, 9, 8)
    message = f"the model Fails fails on images {says}"
    assert refused(model, x) == message
    for use in ("layers", "outputs"):
        with pytest.raises(ValueError) as found:
            getattr(Projector(model), use)(x)
        assert str(found.value) == message and found.value.__cause__ is error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["scripted", "traced", "exported", "quantised", "meta", "lazy", "no"]
)
def test_models_that_cannot_be_inspected_are_refused_with_a_remedy(kind):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.rand(1, 3, 9, 9)
    make, says = {
        "scripted": (lambda: torch.jit.script(net), "TorchScript .* load its state_dict"),
        "traced": (lambda: torch.jit.trace(net, x), "TorchScript .* load its state_dict"),
        "exported": (
            lambda: torch.export.export(net, (x,)),
            "model is ExportedProgram: .*module()",
        ),
        "quantised": (
            lambda: nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 4, 3)),
            r"model is quantised \(0: Conv2d\)",
        ),
        "meta": (lambda: nn.Conv2d(3, 4, 3, device="meta"), "weight is on the meta device"),
        "lazy": (lambda: nn.LazyConv2d(4, 3), "weight has no shape yet: run it once"),
        "no": (lambda: net.forward, "model is method: expected torch.nn.Module"),
    }[kind]
    with pytest.raises(ValueError, match=says) as error:
        Projector(make())
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["scripted", "traced", "graph"])
def test_a_scripted_part_runs_but_is_not_a_layer(kind):
    x = rand(2, 3, 9, 9)

    class Part(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.a, self.part, self.b = nn.Conv2d(3, 4, 3), part, nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.b(self.part(self.a(x)))

    plain = seeded(lambda: Part(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())))
    model = copy.deepcopy(plain)
    if kind == "graph":
        model = torch.fx.symbolic_trace(model)
    else:
        given = model.a(x)
        make = torch.jit.script if kind == "scripted" else torch.jit.trace
        model.part = make(model.part, *([] if kind == "scripted" else [given]))
    unit = [(0, 1, 1, 2), (1, 0, 2, 2)]
    expected = Projector(plain)(x, "b", unit)
    projector = Projector(model)
    for _ in range(3):  # TorchScript optimises what has been run twice
        found = projector(x, "b", unit)
        assert_close(found.images, expected.images, rtol=0, atol=1e-15)
        assert found.report == expected.report
        model(x)
    if kind == "graph":
        assert "part.1" in [layer.name for layer in projector.layers(x)]
    else:
        assert [layer.name for layer in projector.layers(x)] == ["a", "b"]
        assert "layer 'part': it is TorchScript, which cannot be" in refused(model, x, "part")


def test_modules_that_are_not_layers_are_distinguished_from_names_that_do_not_exist():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.flat, self.unused = nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Conv2d(4, 4, 1)
            self.blocks = nn.ModuleList([nn.Identity(), nn.ReLU()])
            self.fold, self.none = nn.Unfold(2), nn.Identity()

        def forward(self, x):
            y = self.a(x)
            self.none([1])
            for block in self.blocks:
                y = block(y)
            self.fold(y.flatten(0, 1)[:, None])
            return self.flat(y)

    model, x = seeded(Tokens), rand(2, 3, 5, 4)
    assert refused(model, x, "flat").startswith(
        "layer 'flat': its output is (N, 4, 20): not tokens of a grid of patches; "
    )
    assert "its output is (4, 4, 12): not maps (N, K, H, W)" in refused(model, x[:1], "fold")
    assert "layer 'none': it returns no tensor" in refused(model, x, "none")
    assert "layer 'unused': the model does not call it" in refused(model, x, "unused")
    assert "did you mean blocks.1, blocks.0?" in refused(model, x, "blocks")
    assert "did you mean blocks.1?" in refused(model, x, "bloks.1")
    assert refused(model, x, "blocks.relu").startswith("layer 'blocks.relu': no such layer; ")
    assert "the model calls no module that gives maps" in refused(nn.Conv2d(3, 4, 1), x.float())


def test_a_partial_name_gets_its_layers_as_suggestions():
    model = seeded(lambda: without_head(models.resnet18))
    message = refused(model, rand(1, 3, 33, 33), "layer1.relu")
    assert "layer1.1.relu#1, layer1.1.relu#0, layer1.0.relu#1?" in message


def test_outputs_that_are_not_maps_of_the_images_are_not_layers():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.tokens = nn.Flatten(2)

        def forward(self, x):
            y = self.a(x)
            y = self.b(y.reshape(-1, 4, 4, 8))  # twice as many images of half the height
            return self.tokens(y)

    assert [layer.name for layer in Projector(seeded(Windows)).layers(rand(1, 3, 8, 8))] == ["a"]


def test_modules_may_return_several_tensors():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Functional()

        def forward(self, x):
            return {"scores": self.inner(x).mean((2, 3)), "none": None}

    class Pair(Functional):
        def forward(self, x):
            return "maps", super().forward(x), None

    several, x = seeded(Several), rand(1, 3, 9, 9)
    assert Projector(several).outputs(x).shape == (1, 4)
    pair = seeded(lambda: nn.Sequential(Pair()))
    assert Projector(pair).outputs(x) is None
    found = Projector(pair)(x, "0", [(0, 1, 2, 2)])
    assert torch.equal(found.images, Projector(pair)(x, "0.b", [(0, 1, 2, 2)]).images)


# Networks learned by deconvolution.


@pytest.fixture(scope="module")
def learned(textures):
    """(network, images, codes): two layers with pooling between, colour."""
    solver = SolverSettings(iterations=20)
    layers = [
        LayerSettings(4, 5, lam=5.0, pool=[2, 2, 2], solver=solver),
        LayerSettings(6, 3, lam=20.0, solver=solver),
    ]
    net = DeconvNet(layers, PreprocessingSettings(color="ycbcr", steps=["mean"]), seed=0).double()
    images = textures(3, 3, 22, 26).double()
    net.preprocessing.fit(images)
    net.layers[1].scale.fill_(0.7)
    return net, images, net.infer(images)


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
def test_projections_of_a_deconvnet_are_those_of_its_generative_model(learned, number):
    net, images, codes = learned
    z = codes.layer(number).z
    at = z.abs().flatten(1).argmax(1)
    units = [(n, *torch.unravel_index(place, z.shape[1:])) for n, place in enumerate(at)]
    units = [tuple(map(int, unit)) for unit in units] + [(1, 0, 3, 4)]
    found = Projector(net)(images, f"layer{number}", units)
    for (n, k, i, j), image, value in zip(units, found.images, found.values, strict=True):
        one = torch.zeros_like(z[:1])
        one[0, k, i, j] = z[n, k, i, j]
        assert_close(image, net.operator(codes.select([n]), number)(one)[0], rtol=0, atol=1e-12)
        assert_close(value, z[n, k, i, j])
    assert found.images[:3].flatten(1).any(1).all()
    for image, box in zip(found.images, found.boxes, strict=True):
        assert not outside(image, box).any()
    assert found.report.method == "generative" and found.report.faithful
    assert found.report.switched == number - 1


@torch.no_grad()
def test_the_projections_of_all_units_of_a_deconvnet_layer_sum_to_the_reconstruction(learned):
    net, images, codes = learned
    units = [(1, *place) for place in codes.layer(2).z[1].nonzero().tolist()]
    found = Projector(net)(images, "layer2", units)
    assert len(units) > 20
    assert_close(found.images.sum(0), net.synthesize(codes, 2)[1], rtol=0, atol=1e-10)
    ones = Projector(net)(images, "layer2", units[:3], seeds=torch.tensor([1.0, -1.0, 2.0]))
    expected = found.images[:3] / found.values[:3, None, None, None]
    assert_close(ones.images, expected * torch.tensor([1.0, -1, 2]).view(3, 1, 1, 1))


def test_codes_are_inferred_again_after_further_learning(learned):
    net, images, _ = learned
    net = copy.deepcopy(net)
    projector, unit = Projector(net), [(0, 1, 5, 5)]
    before = projector.responses(images, ["layer1"])["layer1"]
    assert torch.equal(projector.responses(images, ["layer1"])["layer1"], before)
    net.layers[0].set_filters(net.layers[0].filters.flip(0))
    after = projector.responses(images, ["layer1"])["layer1"]
    assert not torch.equal(after, before)
    assert torch.equal(
        Projector(net)(images, "layer1", unit).images, projector(images, "layer1", unit).images
    )


def test_responses_of_a_deconvnet_are_magnitudes(learned):
    net, images, codes = learned
    maps = Projector(net).responses(images, ["layer2", "layer1"])
    for number in (1, 2):
        assert_close(maps[f"layer{number}"], codes.layer(number).z.abs(), rtol=0, atol=1e-12)
    assert Projector(net).outputs(images) is None


def test_layers_of_a_deconvnet_have_the_shapes_of_their_maps(learned):
    net, images, codes = learned
    layers = Projector(net).layers(images)
    assert [(layer.name, layer.shape) for layer in layers] == [
        (f"layer{number}", tuple(codes.layer(number).shape)) for number in (1, 2)
    ]
    assert [(layer.field, layer.stride) for layer in layers] == [
        ((5, 5), (1, 1)),
        ((10, 10), (2, 2)),
    ]
    found = Projector(net)(images, "layer2", [(0, 0, 2, 3), (0, 5, 0, 0)])
    sizes = found.fields[:, 2:] - found.fields[:, :2]
    assert sizes.tolist() == [[10, 10]] * 2
    assert found.fields[1, :2].tolist() == list(layers[1].offset)


def test_a_deconvnet_has_one_method_and_its_own_layers(learned):
    net, images, _ = learned
    for method in ("deconv", "gradient"):
        with pytest.raises(ValueError, match=f"method={method}: a DeconvNet is always"):
            Projector(net, method=method)
    with pytest.raises(ValueError, match="layer 'layer3': no such layer; did you mean layer"):
        Projector(net)(images, "layer3", [(0, 0, 0, 0)])
    with pytest.raises(ValueError, match=r"unit \(0, 6, 0, 0\) .* layer2 has 6 maps"):
        Projector(net)(images, "layer2", [(0, 6, 0, 0)])
    assert len(Projector(net)(images, "layer2", [])) == 0


def test_pixels_are_prepared_and_shown_as_each_network_requires(learned, small):
    net, images, _ = learned
    projector = Projector(net)
    assert torch.equal(projector.prepare(images), images)
    found = projector(images, "layer1", [(0, 0, 5, 5)])
    assert projector.signed_rgb(found.images).shape == (1, 3, 22, 26)
    # By default a trained network takes pixels as they are.
    trained = Projector(small[0])
    assert torch.equal(trained.prepare(small[1]), small[1])
    assert torch.equal(trained.signed_rgb(small[1]), small[1])


def test_units_of_low_layers_are_projected_from_windows_of_their_images():
    layers, x = seeded(lambda: models.vgg11().features[:4]), rand(1, 3, 50, 47)
    sizes = []
    layers[0].register_forward_hook(
        lambda module, given, y: sizes.append(tuple(given[0].shape[2:]))
    )
    maps = layers[:4](x)
    H, W = maps.shape[2:]
    corners = [(0, 3, i, j) for i in (0, 1, H // 2, H - 1) for j in (0, W // 2 + 1, W - 1)]
    quick = Projector(layers)(x, "3", corners)
    # The names of its layers, where they lie and what depends on the image are found once.
    windows = sizes[7:]
    assert windows and max(h * w for h, w in windows) < 0.1 * x.shape[2] * x.shape[3]
    exact = Projector(layers, local=False)(x, "3", corners)
    assert_close(quick.images, exact.images, rtol=0, atol=1e-12 * float(exact.images.abs().max()))
    assert torch.equal(quick.boxes, exact.boxes) and torch.equal(quick.fields, exact.fields)
    assert quick.report == exact.report


def test_a_model_that_requires_one_size_gets_whole_images():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.place = nn.Parameter(rand(1, 4, 40, 40))

        def forward(self, x):
            return self.second((self.first(x) + self.place).relu())

    net, x, unit = seeded(Placed), rand(1, 3, 40, 40), [(0, 1, 20, 7)]
    quick, exact = (Projector(net, local=local)(x, "second", unit) for local in (True, False))
    assert_close(quick.images, exact.images, rtol=1e-12, atol=1e-15)


def test_a_model_whose_coordinates_depend_on_the_size_gets_whole_images():
    class Coordinates(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.first(x + torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)[:, None])

    net, x, unit = seeded(Coordinates), rand(1, 3, 40, 40), [(0, 1, 5, 7)]
    quick, exact = (Projector(net, local=local)(x, "first", unit) for local in (True, False))
    assert_close(quick.values, exact.values, rtol=1e-12, atol=0)
    assert_close(quick.images, exact.images, rtol=1e-12, atol=1e-15)
