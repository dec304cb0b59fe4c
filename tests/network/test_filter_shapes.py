"""Filters that are not square: they learn, resume, are saved and reconstruct as square ones do, and
filters of one row are the convolutions of signals."""

import numpy as np
import pytest
import torch
from helpers import StopAt, assert_same_network
from numpy.testing import assert_allclose

from deconvnet import Learned, learn_filters, learn_online
from deconvnet.filters.statistics import filter_statistics
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet, load
from deconvnet.network.tiling import reconstruct
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.training.loop import Interrupted, train
from deconvnet.training.run_folder import RunFolder
from deconvnet.training.training_set import ImageSource
from deconvnet.visualization.projection.feature_projection import pixel_features

FISTA = SolverSettings("fista", iterations=20, training_iterations=3)
LEARNING = LearningSettings(epochs=4, batch_size=2)
EXACT = SolverSettings("coordinate", iterations=2000, gap=1e-5)


@pytest.fixture(scope="module")
def images(textures):
    return textures(4, 1, 17, 22)


def learn(folder, images, stop=None):
    """The network that learns in this folder, or None if it is stopped at an update."""
    common = dict(lam=3.0, solver=FISTA, learning=LEARNING)
    layers = [
        LayerSettings(3, (3, 5), pool=[1, 2, 1], **common),
        LayerSettings(2, [2, 3], boundary="zero", **common),
    ]
    net = DeconvNet(layers, PreprocessingSettings("grey", steps=["mean"]))
    run = RunFolder(folder, {"data": {}}, "auto")
    with StopAt(folder, ("update", stop)) if stop else Monitor(folder, progress=False) as monitor:
        try:
            train(net, ImageSource.from_tensor(images), run, monitor)
        except Interrupted:
            return None
    return net


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "run"
    return folder, learn(folder, images)


def test_a_run_with_filters_that_are_not_square_resumes_exactly(images, trained, tmp_path):
    folder, net = trained
    assert learn(tmp_path, images, stop=11) is None  # in the second layer
    assert_same_network(learn(tmp_path, images), net)
    loaded = load(folder)
    assert_same_network(loaded, net)
    assert [layer.settings.filter_size for layer in loaded.layers] == [[3, 5], [2, 3]]
    assert loaded.layer(2).filters.shape == (2, 3, 2, 3)


def test_a_network_of_filters_that_are_not_square_reconstructs_and_projects(images, trained):
    net = trained[1]
    codes = net.infer(images)
    assert codes.layer(1).shape == (3, 19, 26) and codes.layer(2).shape == (2, 10, 26)
    assert net.snr(codes, 1) > 3
    whole = reconstruct(net, images[:1])
    assert torch.equal(whole.pixels, net.reconstruct(codes.select(slice(0, 1))))
    features = pixel_features(net, codes, 2)
    assert features.tiles.shape[2:] == (7, 7)  # 6x7 pixels see a unit
    assert features.tiles.flatten(1).any(1).all()


@pytest.mark.parametrize(("size", "stored"), [(5, 5), ((5, 5), 5), ((1, 6), [1, 6])])
def test_learned_filters_are_saved_with_their_size_and_squares_with_one_number(
    images, tmp_path, size, stored
):
    once = LearningSettings(epochs=1)
    learned = learn_filters(images, 2, size, lam=3.0, learning=once)
    learned.save(tmp_path / "filters.safetensors")
    loaded = Learned.load(tmp_path / "filters.safetensors")
    assert loaded.settings.filter_size == stored == learned.settings.filter_size
    assert torch.equal(loaded.filters, learned.filters)


def test_signals_are_coded_and_learned_as_dense_convolutions():
    """Objective, optimality and statistics, computed with np.convolve and np.correlate."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 2, 1, 40, generator=generator, dtype=torch.float64)
    learned = learn_filters(y, 4, (1, 7), lam=2.0, learning=LEARNING, solver=EXACT)
    again = learn_online(y.split(1), filters=learned.filters, lam=2.0, solver=EXACT)
    for f in (learned.filters, again.filters):
        assert f.shape == (4, 2, 1, 7)
        assert_allclose(f.square().sum((1, 2, 3)), 1, rtol=1e-6)
    solution = learned.encode(y, settings=EXACT)
    f, z = learned.filters[:, :, 0].numpy(), solution.z[:, :, 0].numpy()
    painted = np.array(
        [
            [sum(np.convolve(z[n, k], f[k, c], "valid") for k in range(4)) for c in range(2)]
            for n in range(3)
        ]
    )
    r = y[:, :, 0].numpy() - painted
    objective = np.square(r).sum((1, 2)) + np.abs(z).sum((1, 2))
    assert_allclose(solution.objective, objective, rtol=1e-9)
    slopes = 2.0 * np.array(
        [
            [sum(np.correlate(r[n, c], f[k, c], "full") for c in range(2)) for k in range(4)]
            for n in range(3)
        ]
    )
    assert np.abs(slopes).max() < 1.02
    assert_allclose(slopes[z != 0], np.sign(z[z != 0]), atol=0.02)

    sums = filter_statistics(solution.z, torch.from_numpy(r)[:, :, None], learned.filters)
    gram = np.zeros((4, 4, 13))
    for n in range(3):
        for k in range(4):
            for j in range(4):
                gram[k, j] += np.correlate(z[n, j], z[n, k], "full")[45 - 6 : 45 + 7]
    assert_allclose(sums.gram[:, :, 0], gram, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((3, 5, 7), r"filter_size=\(3, 5, 7\): must be a whole number from 1, or two"),
        ((3, 0), r"filter_size=\(3, 0\): must be whole numbers from 1"),
        ([3, 2.5], r"filter_size=\[3, 2.5\]: must be whole numbers from 1"),
        ("wide", "filter_size='wide': must be a whole number"),
        ((1, 200_000), r"filter_size=\(1, 200000\): must be at most 100000"),
    ],
)
def test_a_wrong_filter_size_is_refused_in_one_line(size, message):
    with pytest.raises(ValueError, match=message):
        LayerSettings(2, size)


def test_filters_larger_than_the_images_along_one_axis_are_refused(images):
    with pytest.raises(ValueError, match="17x22 are smaller than the 3x23 filters"):
        learn_online([images], 2, (3, 23), lam=1.0)
    with pytest.raises(ValueError, match=r"filter_size=\(5, 3\): .* have \(3, 5\)"):
        learn_filters(images, filter_size=(5, 3), filters=torch.ones(2, 1, 3, 5), lam=1.0)
