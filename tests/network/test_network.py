"""The network: what inference promises of its codes, the way back to pixels, and its files."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deconvnet import DeconvNet, LayerSettings, PreprocessingSettings, SolverSettings, load
from deconvnet.images.fit import TrainingScale
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.codes import join
from deconvnet.network.layer import LayerProblem
from deconvnet.network.network import restore_network
from deconvnet.operators.arithmetic import convolution_matrix
from deconvnet.operators.linear import Deconvolution, Identity, LinearOperator
from deconvnet.operators.pooling import UNPOOLINGS, max_pool, unpool
from deconvnet.sparse_coding.prior import Prior
from deconvnet.sparse_coding.solve import solve
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.loop import train
from deconvnet.training.run_folder import RunFolder

FAST = SolverSettings(iterations=20)

# Three layers in every combination of pooling: over maps too, over positions only, and none.
POOLS = {
    "pooled": ([2, 2, 2], [1, 3, 2]),
    "not pooled": (None, None),
    "pooled once": (None, [2, 2, 2]),
}


def layers(pools=POOLS["pooled"], *, solver=FAST, pooling="after", **other):
    return [
        LayerSettings(5, 5, pool=pools[0], pooling=pooling, solver=solver, **other),
        LayerSettings(4, 3, pool=pools[1], pooling=pooling, lam=3.0, solver=solver, **other),
        LayerSettings(3, 2, lam=5.0, solver=solver, **other),
    ]


def network(images, pools=POOLS["pooled"], *, color="rgb", steps=("mean",), **other):
    """A network with random filters, whose scales fit the images."""
    settings = PreprocessingSettings(color=color, steps=list(steps))
    net = DeconvNet(layers(pools, **other), settings, seed=3)
    net.preprocessing.fit(images)
    for number in (2, 3):
        net.layer(number).fit_scale(net.infer(images, depth=number - 1).layers[-1].pooled)
    return net


@pytest.fixture(scope="module")
def images(textures):
    return textures(4, 3, 20, 26)


@pytest.fixture(scope="module")
def net(images):
    return network(images)


@pytest.fixture(scope="module")
def codes(net, images):
    return net.infer(images)


def paint(z, f):
    """Maps to image by torch's transposed convolution, cut to the image."""
    h, w = f.shape[2:]
    whole = F.conv_transpose2d(z, f)
    return whole[..., h - 1 : whole.shape[2] - h + 1, w - 1 : whole.shape[3] - w + 1]


def test_codes_have_maps_pooled_maps_switches_and_the_objective_of_every_image(net, codes):
    assert codes.y.shape == (4, 3, 20, 26)
    first, second, third = codes.layers
    assert first.z.shape == (4, 5, 24, 30) and first.pooled.shape == (4, 3, 12, 15)
    assert second.z.shape == (4, 4, 14, 17) and second.pooled.shape == (4, 4, 5, 9)
    assert third.z.shape == (4, 3, 6, 10) and third.pooled is third.z and third.switches is None
    for layer in (first, second):
        kept = layer.z.flatten(1).gather(1, layer.switches.flatten(1))
        assert torch.equal(kept, layer.pooled.flatten(1))
    for layer in codes.layers:
        assert layer.objective.shape == (4,) and layer.objective.dtype == torch.float64
        assert layer.density == (layer.z != 0).double().mean().item()
        assert 0 < layer.density < 0.9


def test_the_objective_of_every_layer_is_its_formula(net, codes):
    b = codes.y
    for number, layer in enumerate(codes.layers, 1):
        settings, f = net.layer(number).settings, net.layer(number).filters
        b = (b / net.layer(number).scale).double()
        residual = paint(layer.z.double(), f.double()) - b
        reconstruction = settings.lam / 2 * residual.square().sum((1, 2, 3))
        sparsity = layer.z.double().abs().sum((1, 2, 3))
        # z and the residual are float32.
        assert_close(layer.reconstruction, reconstruction, rtol=1e-4, atol=1e-6)
        assert_close(layer.sparsity, sparsity, rtol=1e-6, atol=1e-9)
        assert_close(layer.objective, reconstruction + sparsity, rtol=1e-4, atol=1e-6)
        b = layer.pooled


def test_inference_lowers_the_objective_of_every_image_in_every_layer(net, codes):
    b = codes.y
    for number, layer in enumerate(codes.layers, 1):
        b = b / net.layer(number).scale
        nothing = net.layer(number).settings.lam / 2 * b.double().square().sum((1, 2, 3))
        assert (layer.objective < 0.9 * nothing).all()
        b = layer.pooled


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_codes_do_not_depend_on_how_many_images_are_inferred_at_a_time(net, codes, images, chunk):
    for found, expected in zip(net.infer(images, chunk=chunk).layers, codes.layers, strict=True):
        # Libraries may add in another order for another batch: some units of float32 rounding.
        tolerance = 1e-5 * expected.z.abs().max().item()
        assert_close(found.z, expected.z, rtol=0, atol=tolerance)
        assert_close(found.pooled, expected.pooled, rtol=0, atol=tolerance)
        assert_close(found.objective, expected.objective, rtol=1e-5, atol=0)


def test_codes_of_an_image_do_not_depend_on_the_rest_of_the_batch(net, codes, images, textures):
    loud = torch.cat([images[2:3], textures(1, 3, 20, 26, seed=9).round()])
    alone, beside = net.infer(images[2:3]), net.infer(loud)
    for number, expected in enumerate(codes.layers, 1):
        tolerance = 1e-5 * expected.z.abs().max().item()
        for found in (alone, beside):
            assert_close(found.layer(number).z[0], expected.z[2], rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(9, 9), (9, 31), (16, 16), (33, 14)])
@pytest.mark.parametrize("count", [1, 3])
def test_images_of_any_size_and_number_are_inferred_and_reconstructed(net, textures, size, count):
    images = textures(count, 3, *size)
    codes = net.infer(images, depth=2)
    assert codes.layer(1).z.shape == (count, 5, size[0] + 4, size[1] + 4)
    for layer in (1, 2):
        pixels = net.reconstruct(codes, layer)
        assert pixels.shape == images.shape
        assert pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize("steps", [["contrast"], ["mean", "laplacian"], ["mean", "whiten"], []])
@pytest.mark.parametrize("color", ["rgb", "grey", "ycbcr"])
def test_a_network_of_any_colour_reconstructs_its_images(images, color, steps):
    net = network(images, color=color, steps=steps, solver=SolverSettings(iterations=25))
    net.layer(1).settings.lam = 1000.0
    codes = net.infer(images, depth=1)
    pixels = net.reconstruct(codes)
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    expected = grey if color == "grey" else images
    assert pixels.shape == expected.shape
    # So little sparsity is asked for that next to nothing may be lost.
    assert net.snr(codes, 1) > 20
    assert (pixels - expected).abs().mean() < 0.03


@pytest.mark.parametrize("color", ["rgb", "ycbcr"])
def test_a_colour_network_takes_grey_images_as_colourless_ones(images, color):
    net = network(images, color=color)
    grey = images.mean(1, keepdim=True)
    codes, same = net.infer(grey, depth=1), net.infer(grey.expand(-1, 3, -1, -1), depth=1)
    assert torch.equal(codes.layer(1).z, same.layer(1).z)
    assert net.reconstruct(codes).shape == (4, 3, 20, 26)


def test_a_grey_network_takes_colour_images(images):
    net = network(images, color="grey")
    assert net.layer(1).filters.shape == (5, 1, 5, 5)
    assert net.reconstruct(net.infer(images, depth=1)).shape == (4, 1, 20, 26)


@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS)
def test_reconstruction_deconvolves_rescales_and_unpools_down_to_the_image(images, pools):
    net = network(images, pools)
    codes = net.infer(images)
    for top in (1, 2, 3):
        maps = codes.layer(top).z
        for number in range(top, 0, -1):
            maps = paint(maps, net.layer(number).filters)
            if number == 1:
                break
            maps = maps * net.layer(number).scale
            below = codes.layer(number - 1)
            if below.switches is not None:
                empty = torch.zeros(4, below.z[0].numel())
                maps = empty.scatter(1, below.switches.flatten(1), maps.flatten(1))
                maps = maps.view(below.z.shape)
        expected = net.preprocessing.inverse(maps, codes.record).clamp(0, 1)
        assert_close(net.reconstruct(codes, top), expected, rtol=0, atol=1e-5)
    assert torch.equal(net.reconstruct(codes), net.reconstruct(codes, 3))


def test_the_scale_below_an_upper_layer_is_what_it_is_said_to_be(images):
    settings = layers()
    settings[1].scale = "max"
    net = DeconvNet(settings)
    pooled = net.infer(images, depth=2).layers
    net.layer(2).fit_scale(pooled[0].pooled)
    net.layer(3).fit_scale(pooled[1].pooled)
    assert_close(net.layer(2).scale, pooled[0].pooled.abs().max())
    assert_close(net.layer(3).scale, pooled[1].pooled.square().mean().sqrt())


@pytest.mark.parametrize("pools", POOLS.values(), ids=POOLS)
def test_the_operator_of_every_layer_has_its_adjoint(images, pools):
    net = network(images, pools).double()
    codes = net.infer(images.double())
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(codes.y.shape, generator=generator, dtype=torch.float64)
    for number in (1, 2, 3):
        shape = codes.layer(number).z.shape
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        A = net.operator(codes, number)
        there, back = (A(z) * y).sum(), (z * A.adjoint(y)).sum()
        assert_close(there, back, rtol=1e-12, atol=1e-9)
        assert there.abs() > 1e-3


def test_the_snr_is_that_of_the_preprocessed_images(net, codes):
    made = paint(codes.layer(1).z, net.layer(1).filters)
    signal = (codes.y - codes.y.mean()).square().sum()
    expected = 10 * torch.log10(signal / (codes.y - made).square().sum())
    assert net.snr(codes, 1) == pytest.approx(expected.item(), abs=1e-3)
    assert net.snr(codes, 1) > net.snr(codes, 2) > 0


def test_going_on_layer_by_layer_is_the_same_as_inferring_all(net, codes, images):
    grown = net.infer(images, depth=0)
    assert grown.layers == () and torch.equal(grown.y, codes.y)
    for _ in range(3):
        grown = net.infer_next_layer(grown)
    for found, expected in zip(grown.layers, codes.layers, strict=True):
        assert torch.equal(found.z, expected.z) and torch.equal(found.objective, expected.objective)
    with pytest.raises(ValueError, match="layer=4: this network has layers 1 to 3"):
        net.infer_next_layer(grown)


def test_selected_codes_are_those_of_the_selected_images(net, codes):
    chosen = torch.tensor([3, 0])
    some = codes.select(chosen)
    assert torch.equal(some.y, codes.y[chosen])
    for number in (1, 2, 3):
        assert torch.equal(some.layer(number).z, codes.layer(number).z[chosen])
        assert torch.equal(some.layer(number).objective, codes.layer(number).objective[chosen])
        expected = net.reconstruct(codes, number)[chosen]
        assert_close(net.reconstruct(some, number), expected, rtol=0, atol=1e-5)


def test_progress_hears_of_every_chunk_of_every_layer(net, images):
    heard = []
    net.infer(images, depth=2, chunk=3, progress=lambda done, total: heard.append((done, total)))
    assert heard == [(3, 4), (4, 4)] * 2


@pytest.mark.parametrize("depth", [-1, 4])
def test_a_depth_that_the_network_lacks_is_refused(net, images, depth):
    with pytest.raises(ValueError, match=f"depth={depth}: this network has layers 1 to 3"):
        net.infer(images, depth=depth)


@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_the_codes_lack_is_refused(net, images, layer):
    codes = net.infer(images[:1], depth=2)
    with pytest.raises(ValueError, match=f"layer={layer}: these codes have layers 1 to 2"):
        codes.layer(layer)
    with pytest.raises(ValueError, match=f"layer={layer}"):
        net.reconstruct(codes, layer)


def test_a_layer_that_the_network_lacks_is_refused(net, codes):
    for layer in (0, 4):
        with pytest.raises(ValueError, match=f"layer={layer}: this network has layers 1 to 3"):
            net.layer(layer)
        with pytest.raises(ValueError, match=f"layer={layer}"):
            net.operator(codes, layer)


def test_images_smaller_than_a_filter_are_refused_with_both_sizes_and_the_layer(net, textures):
    message = "images of 4x9 are smaller than the 5x5 filters of layer 1"
    with pytest.raises(ValueError, match=message):
        net.infer(textures(1, 3, 4, 9))
    deep = DeconvNet([LayerSettings(2, 3, pool=[1, 4, 4], solver=FAST), LayerSettings(2, 4)])
    message = "the pooled maps of layer 1 of 4x3 are smaller than the 4x4 filters of layer 2"
    with pytest.raises(ValueError, match=message):
        deep.infer(textures(1, 3, 14, 10))


def test_images_that_are_not_images_are_refused(net, images):
    for value, message in ((float("nan"), "image 1 .*NaN"), (7.0, "image 1 .*0, 1")):
        wrong = images.clone()
        wrong[1, 0, 3, 4] = value
        with pytest.raises(ValueError, match=message):
            net.infer(wrong)
    for wrong in (images[0], images[:, :2], (images * 255).byte()):
        with pytest.raises(ValueError, match="images"):
            net.infer(wrong)


def test_images_of_double_precision_are_inferred_in_that_of_the_network(net, codes, images):
    assert torch.equal(net.infer(images.double(), depth=1).layer(1).z, codes.layer(1).z)


def test_two_networks_of_one_seed_are_equal_and_of_two_seeds_are_not():
    one, same, other = (DeconvNet(layers(), seed=seed).state_dict() for seed in (5, 5, 6))
    for name in one:
        assert torch.equal(one[name], same[name])
    for number in range(3):
        assert not torch.equal(one[f"layers.{number}.filters"], other[f"layers.{number}.filters"])


def test_the_network_never_draws_from_the_global_generator(images):
    state = torch.random.get_rng_state()
    network(images).infer(images, depth=1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("kind", "num_maps", "seen"),
    [
        ("singles", 9, [1] * 9),
        ("doubles", 36, [2] * 36),
        ("singles_and_doubles", 45, [1] * 9 + [2] * 36),
        ("random_doubles", 150, [2] * 150),
        ("full", 7, [9] * 7),
    ],
)
def test_connectivity_over_nine_maps_has_the_counts_of_the_paper(kind, num_maps, seen):
    net = DeconvNet([LayerSettings(9, 5), LayerSettings(num_maps, 3, connectivity=kind)])
    layer = net.layer(2)
    assert layer.connectivity.sum(1).tolist() == seen
    planes = layer.filters.abs().sum((2, 3)) > 0
    assert torch.equal(planes, layer.connectivity.bool())
    pairs = {tuple(row) for row in layer.connectivity.tolist()}
    if kind != "full":
        # Every choice of maps occurs, and none again before all others have.
        assert len(pairs) == min(num_maps, {"random_doubles": 36}.get(kind, num_maps))


@pytest.mark.parametrize(
    ("kind", "right"), [("singles", 9), ("doubles", 36), ("singles_and_doubles", 45)]
)
def test_a_number_of_maps_that_does_not_fit_the_connectivity_names_the_right_one(kind, right):
    with pytest.raises(ValueError, match=rf"layer2: num_maps=44: .*{kind} .*makes {right} filters"):
        DeconvNet([LayerSettings(9, 5), LayerSettings(44, 3, connectivity=kind)])


def test_pairs_of_a_single_map_are_refused():
    grey = PreprocessingSettings(color="grey")
    with pytest.raises(ValueError, match="layer1: connectivity=random_doubles: .*two input"):
        DeconvNet([LayerSettings(4, 5, connectivity="random_doubles")], grey)


def test_pooling_over_maps_leaves_fewer_for_the_layer_above():
    net = DeconvNet([LayerSettings(7, 5, pool=[3, 2, 2]), LayerSettings(2, 3)])
    assert net.layer(2).filters.shape == (2, 3, 3, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_maps": 0}, "num_maps=0: must be at least 1"),
        ({"filter_size": 0}, "filter_size=0: must be at least 1"),
        ({"lam": 0.0}, "lam=0.0: must be positive"),
        ({"lam": float("nan")}, "lam=nan"),
        ({"p": 1.5}, "p=1.5: .*between 0 and 1"),
        ({"connectivity": "pairs"}, "connectivity=pairs: choose one of full, singles, "),
        ({"boundary": "zeros"}, "boundary=zeros: choose one of valid, circular"),
        ({"scale": "std"}, "scale=std: choose one of rms, max, norm, none"),
        ({"target": "pixels"}, "target=pixels: choose one of maps, image, both"),
        ({"image_weight": 0.0}, "image_weight=0.0: must be positive"),
        ({"pooling": "before"}, "pooling=before: choose one of after, in_loop"),
        ({"unpooling": "all"}, "unpooling=all: choose one of switches, no_map, no_place, centre"),
        ({"pool": [2, 2]}, r"pool=\[2, 2\]: expected \[maps, rows, columns\]"),
        ({"pool": [1, 0, 2]}, r"pool=\[1, 0, 2\]"),
    ],
)
def test_wrong_settings_of_a_layer_name_the_key_the_value_and_what_would_be_right(values, message):
    with pytest.raises(ValueError, match=message):
        LayerSettings(**{"num_maps": 4, **values})


def test_a_layer_without_a_window_cannot_be_pooled_in_the_loop():
    with pytest.raises(ValueError, match=r"pooling=in_loop: needs pool=\[maps, rows, columns\]"):
        LayerSettings(4, pooling="in_loop")
    assert LayerSettings(4, pool=[2, 3, 3], pooling="in_loop").window == (2, 3, 3)
    assert LayerSettings(4, pool=[2, 3, 3]).window is None


# What a layer explains


class Dense(LinearOperator):
    """A matrix for each image in place of an operator: it does not know the layers."""

    def __init__(self, matrices, maps, image):
        self.matrices, self.maps, self.image = matrices, tuple(maps), tuple(image)

    def __call__(self, z):
        painted = torch.einsum("nij,nj->ni", self.matrices, z.flatten(1))
        return painted.view(len(z), *self.image)

    def adjoint(self, y):
        return torch.einsum("nij,ni->nj", self.matrices, y.flatten(1)).view(len(y), *self.maps)


@pytest.fixture(scope="module")
def small(textures):
    return textures(2, 3, 9, 10).double()


def tiny(small, *, pooling="in_loop", depth=2, **top):
    """(network in double precision, codes of all layers but the top one): partial windows."""
    solver = SolverSettings(method="fista", iterations=30, tolerance=0)
    layers = [LayerSettings(3, 3, pool=[2, 2, 2], pooling=pooling, lam=10.0, solver=solver)]
    if depth == 3:
        layers.append(LayerSettings(3, 3, pool=[2, 2, 1], pooling=pooling, solver=solver))
    layers.append(LayerSettings(4, 2, **{"lam": 5.0, "solver": solver, **top}))
    net = DeconvNet(layers, PreprocessingSettings(color="grey"), seed=3).double()
    net.preprocessing.fit(small)
    codes = net.infer(small, depth=1)
    for number in range(2, depth + 1):
        net.layer(number).fit_scale(codes.layers[-1].pooled)
        codes = net.infer_next_layer(codes) if number < depth else codes
    return net, codes


def way_down(net, codes, number):
    """Matrices (N, pixels, entries) from the maps of a layer to the images, product by product."""
    matrices = []
    for n in range(len(codes.y)):
        matrix, size = None, tuple(codes.y.shape[2:])
        for level in range(1, number + 1):
            F = net.layer(level).scale * convolution_matrix(net.layer(level).filters, size)
            matrix = F if matrix is None else matrix @ F
            if level < number:
                switches = codes.layer(level).switches[n]
                U = torch.zeros(matrix.shape[1], switches.numel(), dtype=F.dtype)
                U[switches.flatten(), torch.arange(switches.numel())] = 1
                matrix, size = matrix @ U, tuple(switches.shape[1:])
        matrices.append(matrix)
    return torch.stack(matrices)


def squared_error(M, z, b):
    return (b.flatten(1) - torch.einsum("nij,nj->ni", M, z.flatten(1))).square().sum(1)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("window", [None, [3, 2, 2]])
def test_a_layer_that_explains_the_image_solves_the_problem_of_the_whole_way_down(
    small, depth, window
):
    pooled = {"pool": window, "pooling": "in_loop"} if window else {}
    solver = SolverSettings(method="fista", iterations=30, tolerance=0)
    net, below = tiny(small, depth=depth)
    net.layers[-1].settings = LayerSettings(4, 2, lam=5.0, target="image", solver=solver, **pooled)
    codes = net.infer_next_layer(below)
    found = codes.layer(depth)
    R = way_down(net, codes, depth)
    A = Dense(R, found.shape, codes.y.shape[1:])
    prior = Prior(window=window and tuple(window))
    expected = solve(A, codes.y, lam=5.0, prior=prior, settings=solver)
    assert_close(found.z, expected.z, rtol=1e-8, atol=1e-9)
    assert_close(found.reconstruction, 2.5 * squared_error(R, found.z, codes.y))
    assert_close(found.sparsity, found.z.abs().sum((1, 2, 3)))
    assert (found.objective < 0.95 * 2.5 * codes.y.square().sum((1, 2, 3))).all()
    # More of the image is explained than by maps that explain the maps below.
    snr = net.snr(codes, depth)
    net.layer(depth).settings.target = "maps"
    assert snr > net.snr(net.infer_next_layer(below), depth)


@pytest.mark.parametrize("weight", [0.3, 4.0])
def test_a_layer_that_explains_both_minimises_the_weighted_sum_of_their_errors(small, weight):
    net, below = tiny(small, target="both", image_weight=weight)
    codes, layer = net.infer_next_layer(below), net.layer(2)
    found = codes.layer(2)
    maps = below.layer(1).pooled / layer.scale
    F2 = convolution_matrix(layer.filters, tuple(maps.shape[2:])).expand(2, -1, -1)
    R2 = way_down(net, codes, 2)
    errors = squared_error(F2, found.z, maps) + weight * squared_error(R2, found.z, codes.y)
    assert_close(found.reconstruction, 2.5 * errors)
    M = torch.cat([F2, weight**0.5 * R2], 1)
    b = torch.cat([maps.flatten(1), weight**0.5 * codes.y.flatten(1)], 1)[..., None, None]
    A = Dense(M, found.shape, b.shape[1:])
    expected = solve(A, b, lam=5.0, settings=layer.settings.solver)
    assert_close(found.z, expected.z, rtol=1e-8, atol=1e-9)


def test_of_maps_and_image_the_heavier_is_explained_better(small):
    errors = []
    for weight in (1e-3, 1.0, 1e3):
        solver = SolverSettings(method="fista", iterations=300)
        net, below = tiny(small, target="both", image_weight=weight, lam=50.0, solver=solver)
        painted = net.layer(2).operator()(net.infer_next_layer(below).layer(2).z)
        maps = below.layer(1).pooled / net.layer(2).scale
        image = net.decoder(below, 2)(painted)
        errors.append(((maps - painted).square().sum(), (below.y - image).square().sum()))
    maps, image = zip(*errors, strict=True)
    assert maps[0] < maps[1] < maps[2] and image[0] > image[1] > image[2]


@pytest.mark.parametrize("method", ["admm", "fista", "half_quadratic"])
def test_a_layer_that_explains_maps_sees_nothing_but_the_maps_below(small, method):
    solver = SolverSettings(method=method, iterations=3)
    net, below = tiny(small, solver=solver, pooling="after")
    maps = below.layer(1).pooled / net.layer(2).scale
    expected = solve(Deconvolution(net.layer(2).filters), maps, lam=5.0, settings=solver)
    found = net.infer_next_layer(below).layer(2)
    assert torch.equal(found.z, expected.z) and torch.equal(found.objective, expected.objective)
    directly = net.layer(2).infer(LayerProblem(maps))
    assert torch.equal(found.z, directly.z)


@pytest.mark.parametrize("target", ["image", "both"])
def test_the_input_of_the_first_layer_is_the_image(images, target):
    nets = [DeconvNet([LayerSettings(4, 5, target=kind, solver=FAST)]) for kind in ("maps", target)]
    expected, found = (net.infer(images).layer(1) for net in nets)
    assert torch.equal(found.z, expected.z) and torch.equal(found.objective, expected.objective)


def test_nothing_is_between_the_first_layer_and_the_image(net, codes):
    assert isinstance(net.decoder(codes, 1), Identity)
    assert isinstance(net.operator(codes, 1), Deconvolution)
    with pytest.raises(ValueError, match="layer=4"):
        net.decoder(codes, 4)


def test_the_target_of_some_images_is_theirs(small):
    for target in ("maps", "image", "both"):
        net, codes = tiny(small, target=target)
        whole, part = net.layer_problem(codes, 2), net.layer_problem(codes, 2, torch.tensor([1]))
        assert torch.equal(part.b[0], whole.b[1])
        v = torch.randn(codes.layer(1).pooled.shape, generator=seeded_generator(1)).double()
        assert_close(part.T(v[1:]), whole.T(v)[1:])
        assert_close(part.T.adjoint(part.b), whole.T.adjoint(whole.b)[1:])
        assert torch.equal(
            net.layer_input(codes, 2, torch.tensor([1]))[0], net.layer_input(codes, 2)[1]
        )


@pytest.mark.parametrize("method", ["admm", "fista", "ista", "half_quadratic"])
def test_maps_that_were_pooled_in_the_loop_are_no_more_than_their_maxima(images, method):
    net = network(images, pooling="in_loop", solver=SolverSettings(method=method, iterations=4))
    codes = net.infer(images, depth=2)
    for found, window in zip(codes.layers, POOLS["pooled"], strict=True):
        assert found.dense is None and found.z.shape == (4, *found.shape)
        assert torch.equal(found.z, unpool(found.pooled, found.switches, found.z.shape))
        assert torch.equal(max_pool(found.z, tuple(window))[0], found.pooled)
        assert found.density == pytest.approx((found.z != 0).double().mean().item(), rel=1e-12)
        assert torch.equal(found.values.sort().values, found.z[found.z != 0].sort().values)
        assert 0 < len(found.values) <= found.pooled.numel()
    # Pooling after inference drops coefficients, which are kept separately.
    net.layer(1).settings.pooling = "after"
    dense = net.infer(images, depth=1).layer(1)
    kept = unpool(dense.pooled, dense.switches, dense.z.shape)
    assert torch.count_nonzero(dense.z) > torch.count_nonzero(kept) > 0
    assert torch.equal(dense.dense, dense.z) and len(dense.values) == (dense.z != 0).sum()


@pytest.mark.parametrize("pooling", ["after", "in_loop"])
def test_codes_that_are_taken_apart_and_joined_are_the_same(images, pooling):
    net = network(images, pooling=pooling, solver=SolverSettings(method="fista", iterations=5))
    codes = net.infer(images)
    for found in codes.layers:
        parts = [
            found.select(torch.tensor([0])),
            found.select(slice(1, 3)),
            found.select(torch.tensor([3])),
        ]
        joined = join(parts)
        assert [len(part) for part in parts] == [1, 2, 1] and len(joined) == len(found) == 4
        assert torch.equal(joined.z, found.z) and torch.equal(joined.pooled, found.pooled)
        assert torch.equal(joined.objective, found.objective)
        assert joined.shape == found.shape
        assert torch.equal(parts[1].z, found.z[1:3])
        if found.switches is not None:
            assert torch.equal(joined.switches, found.switches)


@pytest.mark.parametrize("kind", UNPOOLINGS)
def test_images_are_reconstructed_whatever_unpooling_forgets(small, kind):
    net, below = tiny(small, lam=30.0, target="image")
    codes = net.infer_next_layer(below)
    expected = net.operator(codes, 2)(codes.layer(2).z)
    net.layer(1).settings.unpooling = kind
    pixels, A = net.reconstruct(codes, 2), net.operator(codes, 2)
    assert pixels.shape == (2, 1, 9, 10) and torch.isfinite(pixels).all()
    painted = A(codes.layer(2).z)
    assert torch.equal(painted, expected) == (kind == "switches")
    y = codes.y
    there, back = (painted * y).sum(), (codes.layer(2).z * A.adjoint(y)).sum()
    assert_close(there, back, rtol=1e-11, atol=1e-11)
    # What explains the image with the switches explains it worse without.
    worse = (painted - y).square().sum() > (expected - y).square().sum()
    assert worse == (kind != "switches")


def test_settings_of_targets_pooling_and_steps_are_saved(images, tmp_path):
    solver = SolverSettings(method="fista", iterations=3, step=0.02)
    net = network(
        images,
        solver=solver,
        pooling="in_loop",
        target="both",
        image_weight=0.25,
        unpooling="no_place",
        scale="none",
    )
    net.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    assert [layer.settings for layer in again.layers] == [layer.settings for layer in net.layers]
    settings = again.layer(2).settings
    assert (settings.target, settings.image_weight, settings.pooling) == ("both", 0.25, "in_loop")
    assert (settings.unpooling, settings.scale, settings.solver.step) == ("no_place", "none", 0.02)
    assert again.layer(2).scale == again.layer(3).scale == 1
    expected, found = net.infer(images), again.infer(images)
    for number in (1, 2, 3):
        assert torch.equal(found.layer(number).z, expected.layer(number).z)
        assert torch.equal(again.reconstruct(found, number), net.reconstruct(expected, number))


def test_a_saved_network_infers_and_reconstructs_the_same_bits(net, codes, images, tmp_path):
    path = tmp_path / "net.safetensors"
    net.save(path)
    again = load(path)
    assert again.preprocessing.settings == net.preprocessing.settings
    assert [a.settings for a in again.layers] == [a.settings for a in net.layers]
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    found = again.infer(images)
    for number in (1, 2, 3):
        assert torch.equal(found.layer(number).z, codes.layer(number).z)
        assert torch.equal(again.reconstruct(found, number), net.reconstruct(codes, number))


def test_all_that_preprocessing_learned_is_saved(images, tmp_path):
    net = network(images, color="ycbcr", steps=["mean", "whiten"])
    net.save(tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors")
    assert again.preprocessing.whitening.abs().sum() > 0
    assert torch.equal(again.infer(images, depth=1).y, net.infer(images, depth=1).y)


def test_a_run_folder_loads_as_the_network_that_it_trained(textures, tmp_path):
    settings = [LayerSettings(3, 5, pool=[1, 2, 2], solver=FAST), LayerSettings(2, 3, solver=FAST)]
    for layer in settings:
        layer.learning.epochs = 1
    net, images = DeconvNet(settings), textures(2, 3, 16, 16)
    with Monitor(progress=False) as monitor:
        train(net, images, RunFolder(tmp_path, {}), monitor)
    expected = net.infer(images)
    for path in (tmp_path, str(tmp_path), tmp_path / "network.safetensors"):
        found = load(path).infer(images)
        assert torch.equal(found.layer(2).z, expected.layer(2).z)


def test_a_path_without_a_network_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such run folder or network file"):
        load(tmp_path / "nowhere")
    (tmp_path / "photos" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="network file; .* has the runs photos$"):
        load(tmp_path / "photo")
    with pytest.raises(ValueError, match="no checkpoint in this folder"):
        load(tmp_path)
    (tmp_path / "net.pt").write_bytes(b"words")
    with pytest.raises(ValueError, match=r"net.pt.*\.safetensors"):
        load(tmp_path / "net.pt")


def test_settings_of_another_version_are_refused_with_the_file(net, tmp_path):
    from deconvnet.storage.network_files import save_network

    tensors, settings = net.to_parts()
    settings["layers"][0]["stride"] = 2
    save_network(tmp_path / "new.safetensors", tensors, settings)
    message = "new.safetensors: not a network of this version.*stride"
    with pytest.raises(InvalidFileError, match=message):
        load(tmp_path / "new.safetensors")
    tensors, settings = net.to_parts()
    del tensors["layers.1.filters"]
    save_network(tmp_path / "part.safetensors", tensors, settings)
    with pytest.raises(InvalidFileError, match="part.safetensors: not a network of this version"):
        load(tmp_path / "part.safetensors")


def test_the_parts_of_the_lowest_layers_make_the_network_of_them(net, codes, images):
    small = DeconvNet.from_parts(*net.to_parts(2))
    assert small.depth == 2
    assert torch.equal(small.infer(images).layer(2).z, codes.layer(2).z)


def test_the_scale_of_the_training_images_is_saved_and_older_files_have_none(tmp_path):
    net = DeconvNet([LayerSettings(num_maps=2, filter_size=3)])
    net.save(tmp_path / "older.safetensors")
    assert "training_scale" not in net.to_parts()[1]
    assert load(tmp_path / "older.safetensors").training_scale is None
    net.training_scale = TrainingScale(299, "pad")
    net.save(tmp_path / "net.safetensors")
    assert load(tmp_path / "net.safetensors").training_scale == TrainingScale(299, "pad")
    tensors, settings = net.to_parts()
    for wrong in ({"side": 0}, {"side": 9, "fit": "squash"}, {"side": "9"}, {"width": 9}):
        with pytest.raises(InvalidFileError, match="not a network of this version"):
            restore_network("net", tensors, {**settings, "training_scale": wrong})
