"""Layers that code the patches of their input independently, and layers that split signs."""

import dataclasses

import pytest
import torch
from sklearn.linear_model import Lasso
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    load,
)
from deconvnet.applications.restoration.restorer import Restorer
from deconvnet.network.switch_ablation import ablate
from deconvnet.network.tiling import reconstruct
from deconvnet.operators.patches import extract_patches
from deconvnet.operators.pooling import max_pool, split_signs
from deconvnet.sklearn import DeconvNetTransformer

EXACT = SolverSettings(method="fista", iterations=500, gap=1e-5)
FEW = SolverSettings(method="fista", iterations=10)


def layers(solver=EXACT, **other):
    fields = {"coding": "patches", "boundary": "zero", "solver": solver, **other}
    return [
        LayerSettings(4, 3, lam=1.0, pool=[1, 2, 2], split_signs=True, **fields),
        LayerSettings(6, 2, lam=6.0, normalize=0.1, **fields),
    ]


def network(images, settings):
    net = DeconvNet(settings, PreprocessingSettings(color="grey", steps=["mean"]), seed=1)
    net.preprocessing.fit(images)
    net.layer(2).fit_scale(net.infer(images, depth=1).layers[-1].pooled)
    return net


@pytest.fixture(scope="module")
def images(textures):
    return textures(2, 1, 12, 14)


@pytest.fixture(scope="module")
def net(images):
    return network(images, layers())


@pytest.fixture(scope="module")
def codes(net, images):
    return net.infer(images)


def patches_below(net, codes, number):
    layer = net.layer(number)
    x = net.layer_input(codes, number)
    return extract_patches(x, layer.settings.filter_shape, layer.settings.boundary)


@pytest.mark.parametrize("number", [1, 2])
def test_each_place_has_the_code_of_its_patch_alone(net, codes, number):
    layer = net.layer(number)
    patches, D = patches_below(net, codes, number), layer.filters.flatten(1).double()
    places = codes.layer(number).z.any(1).nonzero()
    for n, i, j in places[[0, len(places) // 2, -1]].tolist():
        x = patches[n, :, i, j].double()
        if layer.settings.normalize:
            x = x / max(float(x.norm()), 0.1 * len(x) ** 0.5)
        # scikit-learn's objective is 1 / (lam numbers) times ours.
        alpha = 1 / (layer.lam * len(x))
        lasso = Lasso(alpha, fit_intercept=False, tol=1e-10, max_iter=100_000)
        expected = torch.from_numpy(lasso.fit(D.T.numpy(), x.numpy()).coef_).float()
        z = codes.layer(number).z[n, :, i, j]
        assert_close(z, expected, atol=1e-3, rtol=1e-3)


def test_the_norms_of_patches_are_remembered_and_floored(net, codes, images):
    norms = patches_below(net, codes, 2).norm(dim=1, keepdim=True)
    assert codes.layer(1).norms is None
    assert_close(codes.layer(2).norms, norms.clamp(min=0.1 * 32**0.5))
    flat = net.infer(torch.full_like(images, 0.5))
    assert_close(flat.layer(2).norms.amin(), torch.tensor(0.1 * 32**0.5))
    assert not flat.layer(2).z.any()


def test_signs_are_pooled_separately_and_unpooled_together(net, codes):
    first = codes.layer(1)
    pooled, switches = max_pool(split_signs(first.z), (1, 2, 2))
    assert torch.equal(first.pooled, pooled) and torch.equal(first.switches, switches)
    assert net.layer(2).filters.shape[1] == first.pooled.shape[1] == 8
    unpooled = net.layer(1).unpooling(first)(pooled)
    survives = unpooled != 0
    assert torch.equal(unpooled[survives], first.z[survives])
    assert int(survives.sum()) == int(torch.count_nonzero(pooled))


@pytest.mark.parametrize("number", [1, 2])
def test_the_projection_is_linear_and_adjoint_given_switches_and_norms(net, codes, number):
    R, z = net.operator(codes, number), codes.layer(number).z
    other = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    assert_close(R(z + 2 * other), R(z) + 2 * R(other), atol=1e-4, rtol=1e-4)
    y = torch.randn(codes.y.shape, generator=torch.Generator().manual_seed(1))
    assert_close((R(other) * y).sum(), (other * R.adjoint(y)).sum(), atol=1e-3, rtol=1e-4)


def test_codes_that_explain_nearly_all_reconstruct_nearly_all(images):
    """With as many filters as numbers in a patch, a large lam and no pooling, R z is the image."""
    settings = LayerSettings(
        9, 3, lam=1e4, coding="patches", boundary="zero", normalize=0.01, solver=FEW
    )
    net = DeconvNet([settings], PreprocessingSettings(color="grey", steps=["mean"]))
    net.layer(1).set_filters(torch.eye(9).view(9, 1, 3, 3))
    net.preprocessing.fit(images)
    assert net.snr(net.infer(images), 1) > 50


def test_images_do_not_depend_on_their_batch(net, codes, images):
    alone = net.infer(images[1:])
    assert torch.equal(alone.layer(2).z, codes.layer(2).z[1:])
    assert torch.equal(net.synthesize(alone, 2), net.synthesize(codes, 2)[1:])


@pytest.mark.parametrize("method", ["admm", "coordinate"])
def test_all_solvers_find_the_same_codes(images, codes, method):
    solver = SolverSettings(method=method, iterations=1000, gap=1e-5)
    other = network(images, layers(solver)).infer(images)
    for number in (1, 2):
        assert_close(other.layer(number).z, codes.layer(number).z, atol=0.01, rtol=0.0)


def test_a_file_keeps_the_settings(net, codes, images, tmp_path):
    net.save(tmp_path / "patches.safetensors")
    loaded = load(tmp_path / "patches.safetensors")
    assert [layer.settings for layer in loaded.layers] == [layer.settings for layer in net.layers]
    assert torch.equal(loaded.infer(images).layer(2).z, codes.layer(2).z)


def test_settings_of_older_files_code_by_convolution():
    fields = dataclasses.asdict(LayerSettings(4, 3))
    for key in ("coding", "normalize", "split_signs"):
        del fields[key]
    assert LayerSettings.from_dict(fields, "file") == LayerSettings(4, 3)


def test_layers_above_can_explain_the_image_through_patches(images):
    first, _ = layers()
    above = LayerSettings(6, 2, lam=10.0, target="image", solver=EXACT)
    net = network(images, [first, above])
    codes = net.infer(images)
    synthesis = net.synthesize(codes, 2)
    assert codes.layer(2).z.any()
    assert (codes.y - synthesis).square().sum() < codes.y.square().sum()


def test_signs_of_convolutional_maps_can_be_split(images):
    solver = SolverSettings(method="fista", iterations=10)
    plain = LayerSettings(4, 3, solver=solver)
    above = LayerSettings(3, 2, solver=solver)
    split = network(images, [dataclasses.replace(plain, split_signs=True), above]).infer(images)
    z = network(images, [plain, above]).infer(images, depth=1).layer(1).z
    assert torch.equal(split.layer(1).z, z)
    assert torch.equal(split.layer(1).pooled, split_signs(z))


def test_a_mask_is_refused(net, images):
    with pytest.raises(ValueError, match="layer1.coding=patches: needs images without holes"):
        net.infer(images, mask=torch.ones(1, 1, 12, 14))


def test_switches_are_ablated_and_large_images_tiled(net, codes, images):
    assert {result.layer for result in ablate(net, codes)} == {2}
    whole = reconstruct(net, images, memory=4.0)
    assert_close(whole.estimate, net.synthesize(codes, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"target": "image"}, "target=image: must be maps with coding=patches"),
        ({"pool": [1, 2, 2], "pooling": "in_loop"}, "pooling=in_loop: must be after"),
        ({"connectivity": "doubles"}, "connectivity=doubles: must be full with coding=patches"),
        ({"boundary": "reflect"}, "boundary=reflect: must be valid or circular or zero"),
        ({"lam": "auto"}, "lam=auto: give a number or lam_ratio with coding=patches"),
        ({"normalize": -1}, "normalize=-1.0: must be positive"),
        ({"coding": "patch"}, "coding=patch: choose one of convolution, patches"),
        ({"coding": "convolution", "normalize": 0.1}, "normalize=0.1: needs coding=patches"),
        ({"split_signs": True, "non_negative": True}, "split_signs=true: not with non_negative"),
        ({"split_signs": True, "pool": [3, 2, 2]}, "split_signs=true: pool=.3, 2, 2. must pool"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_a_line(other, message):
    with pytest.raises(ValueError, match=message) as error:
        LayerSettings(4, 3, **{"coding": "patches", **other})
    assert "\n" not in str(error.value)


def test_images_are_restored_by_other_layers(net):
    with pytest.raises(ValueError, match="layer1.coding=patches: images are restored by layers"):
        Restorer(net)


def test_the_transformer_takes_layers_of_patches_and_cannot_invert_them(images):
    learning = LearningSettings(epochs=1)
    transformer = DeconvNetTransformer(layers=layers(FEW, learning=learning), random_state=0)
    Z = transformer.fit_transform(images.numpy())
    assert Z.shape == (2, 6 * 6 * 7) and Z.any()
    with pytest.raises(ValueError, match="coding=patches of layer 1: .* coding=convolution, or"):
        transformer.inverse_transform(Z)
