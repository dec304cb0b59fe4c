"""Activations of a layer in place of images: their values, units, and shards on disk."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deconvnet import ActivationSource, DeconvNet, LayerSettings, learn_filters, load, sparse_code
from deconvnet.activations.settings import TrainingData
from deconvnet.activations.source import activation_preprocessing
from deconvnet.visualization.models.normalization import Normalization
from deconvnet.visualization.models.zoo import LoadedModel

LAYER = "3"
MODEL = Normalization((0.5,), (0.25,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(model, pixels):
    return ActivationSource(model, LAYER, pixels, batch=3)


def test_activations_are_those_of_the_layer_in_the_units_of_the_model(model, pixels, source):
    with torch.no_grad():
        expected = model[:4](pixels)
        normalised = model[:4]((pixels - 0.5) / 0.25)
    assert source.shape == expected.shape == (7, 8, 8, 8) and len(source) == 7
    assert_close(source[:], expected)
    assert_close(source[2], expected[2])
    assert_close(source[torch.tensor([5, 0])], expected[[5, 0]])
    assert_close(torch.cat(list(source.split(2))), expected)
    loaded = LoadedModel(model, "small", "none", MODEL)
    assert_close(ActivationSource(loaded, LAYER, pixels)[:], normalised)
    assert_close(ActivationSource(model, LAYER, pixels, normalization=MODEL)[:], normalised)


def test_standardised_activations_have_mean_zero_and_a_mean_norm_of_one(source):
    standardized = source.standardized()
    y = standardized[:]
    assert_close(y.mean((0, 2, 3)), torch.zeros(8), atol=1e-6, rtol=0)
    assert_close(y.norm(dim=1).mean(), torch.tensor(1.0))
    assert_close(standardized.restored(y), source[:])


def test_lam_means_the_same_whatever_the_units_of_the_layer(model, pixels, source):
    scaled = nn.Sequential(*model[:3], nn.ReLU(), nn.Identity())
    scaled[2] = nn.Conv2d(6, 8, 3)
    scaled[2].load_state_dict({k: 8 * v for k, v in model[2].state_dict().items()})
    y, eight = source[:], ActivationSource(scaled, LAYER, pixels)[:]
    assert_close(eight, 8 * y)
    nets = [network(images) for images in (source, ActivationSource(scaled, LAYER, pixels))]
    maps = [net.infer(x).layer(1).z for net, x in zip(nets, (y, eight), strict=True)]
    assert maps[0].any()
    assert_close(*maps)


def network(images, **settings):
    """A network with random filters, fitted to the units of these activations."""
    layer = LayerSettings(12, 1, lam=8.0, non_negative=True, **settings)
    net = DeconvNet([layer], activation_preprocessing(8))
    net.preprocessing.fit(images[:])
    return net


def test_a_network_from_its_file_gives_activations_back_in_the_units_of_the_model(source, tmp_path):
    net = network(source)
    net.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    codes = again.infer(source)
    assert torch.equal(again.reconstruct(codes), net.reconstruct(net.infer(source)))
    pre, y = net.preprocessing, source[:]
    painted = torch.einsum("nkhw,kc->nchw", codes.layer(1).z, net.layer(1).filters[..., 0, 0])
    expected = pre.scale * painted + y.mean((0, 2, 3))[:, None, None]
    assert_close(again.reconstruct(codes), expected, atol=1e-5, rtol=1e-5)


def test_filters_and_maps_are_those_of_a_tensor_of_the_activations(source):
    on_demand = source.standardized()
    tensor = on_demand[:]
    learned = [
        learn_filters(images, 5, 1, lam_ratio=0.2, non_negative=True)
        for images in (on_demand, tensor)
    ]
    assert torch.equal(learned[0].filters, learned[1].filters)
    maps = [sparse_code(images, learned[0].filters, lam=5.0).z for images in (on_demand, tensor)]
    assert torch.equal(*maps)
    with pytest.raises(ValueError, match="mask: needs images in a tensor"):
        learn_filters(on_demand, 5, 1, lam=5.0, mask=torch.ones(1, 1, 8, 8))


def test_stored_activations_are_computed_once_and_read_bit_equal(
    model, pixels, source, tmp_path, monkeypatch
):
    monkeypatch.setattr("deconvnet.activations.shards.SHARD_BYTES", 3 * 4 * 8 * 8 * 8)
    indices = torch.tensor([6, 1, 2])
    first = ActivationSource(model, LAYER, pixels, folder=tmp_path)
    stored = first[indices]
    assert_close(stored, source[indices])  # other images share the batches
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "activations-00000.safetensors",
        "activations-00002.safetensors",
    ]
    again = ActivationSource(model, LAYER, pixels, folder=tmp_path)
    monkeypatch.setattr(again, "_computed", None)
    assert torch.equal(again[indices], stored)
    assert_close(first[:], source[:])


def test_other_or_damaged_shards_are_refused_in_one_line(model, pixels, tmp_path):
    ActivationSource(model, LAYER, pixels, folder=tmp_path)[0]
    for layer, images in (("1", pixels), (LAYER, pixels[:6]), (LAYER, 1 - pixels)):
        with pytest.raises(ValueError, match="activations of another model, layer or images"):
            ActivationSource(model, layer, images, folder=tmp_path)
    shard = tmp_path / "activations-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="activations-00000"):
        ActivationSource(model, LAYER, pixels, folder=tmp_path)


class Tokens(nn.Module):
    """Patches of 4x4 pixels as tokens, behind a class token."""

    def __init__(self):
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1))[:, 0]


def test_tokens_are_maps_of_their_grid_without_the_class_token():
    torch.manual_seed(0)
    model, pixels = Tokens(), torch.rand(2, 3, 12, 20)
    source = ActivationSource(model, "block", pixels)
    assert source.shape == (2, 8, 3, 5)
    with torch.no_grad():
        tokens = model.block(model.patches(pixels).movedim(1, 3))
    assert_close(source[:], tokens.movedim(3, 1))


def test_vectors_are_maps_of_one_position(model, pixels):
    assert ActivationSource(model, "4", pixels).shape == (7, 8 * 8 * 8, 1, 1)


def test_wrong_input_is_refused_in_one_line(model, pixels):
    cases = [
        (dict(layer="9"), "layer '9': no such layer"),
        (dict(batch=0), "batch=0"),
        (dict(images="no-such-folder"), "no-such-folder"),
        (dict(images=pixels[0]), "images must have the shape"),
        (dict(images=pixels / 0), "NaN or infinite activations of the image 0"),
    ]
    for other, message in cases:
        arguments = dict(model=model, layer=LAYER, images=pixels) | other
        with pytest.raises(ValueError, match=message) as caught:
            ActivationSource(**arguments)
        assert "\n" not in str(caught.value)


def test_the_kind_of_images_follows_from_their_path():
    kinds = {"photos": "folder", "a/list.txt": "list", "one.TAR": "shards", "x.npy": "array"}
    for path, source in kinds.items():
        data = TrainingData(images=path, size=None)
        assert (data.source, data.path, data.images) == (source, path, None)


def test_settings_of_activations_are_refused_by_their_key():
    cases = [
        (dict(layer="4"), "data.layer=4: needs data.model"),
        (dict(store="x"), "data.store=x: needs data.model"),
        (dict(model="m"), "data.layer=None"),
        (dict(model="m", layer="4", options=3), "data.options=3"),
        (dict(model="m", layer="4", source="folder", path="x", fit="pad"), "data.fit=pad"),
        (dict(model="m", layer="4", source="folder", path="x", mask="alpha"), "data.mask=alpha"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            TrainingData(**settings)
