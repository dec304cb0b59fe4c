"""Classification and its command, against explicit loops, scikit-learn and raw pixels."""

import dataclasses
import itertools
import math
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import strict_json
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.svm import LinearSVC
from torch.testing import assert_close

from deconvnet.applications.classification import feature_cache
from deconvnet.applications.classification.code_pyramids import CodePyramids, normalize_maxima
from deconvnet.applications.classification.codebook import Codebook
from deconvnet.applications.classification.descriptors import (
    CLIP,
    descriptors,
    normalize_descriptors,
)
from deconvnet.applications.classification.evaluation import Scores, confusion_matrix, evaluate
from deconvnet.applications.classification.grid_features import grid_maxima, num_cells
from deconvnet.applications.classification.image_descriptors import (
    image_descriptors,
    project_strongest,
    projection_to_layer_1,
)
from deconvnet.applications.classification.labelled_images import LabelledImages
from deconvnet.applications.classification.settings import (
    ClassData,
    ClassifySettings,
    FeatureSettings,
)
from deconvnet.applications.classification.spatial_pyramid import (
    bhattacharyya_kernel,
    intersection_kernel,
    pyramid,
    word_histogram,
)
from deconvnet.applications.classification.splits import Split, draw_split
from deconvnet.applications.classification.svm import predict_classes
from deconvnet.applications.classification.task import Task
from deconvnet.applications.classification.word_histograms import WordHistograms
from deconvnet.cli.classify import layers_beside
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.images.sources import DataSettings
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet, load
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.storage.checkpoint_files import save_checkpoint

FEW = SolverSettings(iterations=20)
CLASSES = ("left", "right", "upright")
ANGLES = (math.pi / 4, -math.pi / 4, 0.0)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Descriptors.


@pytest.mark.parametrize("shape", [(20, 23), (16, 16), (9, 20)])
@pytest.mark.parametrize(("patch", "cells", "step"), [(16, 4, 2), (12, 3, 3), (8, 2, 5)])
@pytest.mark.parametrize("strength", ["magnitude", "square", "signed"])
def test_descriptors_are_the_means_over_the_cells_of_each_patch(
    shape, patch, cells, step, strength
):
    z = rand(2, 3, *shape).double()
    found = descriptors(z, patch=patch, cells=cells, step=step, strength=strength)
    maps = {"magnitude": [z.abs()], "square": [z**2], "signed": [z.clamp(min=0), -z.clamp(max=0)]}
    maps = torch.cat(maps[strength], 1)
    H, W = (max(side, patch) for side in shape)
    whole = z.new_zeros(2, maps.shape[1], H, W)
    whole[..., : shape[0], : shape[1]] = maps
    c = patch // cells
    tops, lefts = range(0, H - patch + 1, step), range(0, W - patch + 1, step)
    assert found.shape == (2, len(tops), len(lefts), maps.shape[1] * cells**2)
    for (r, top), (s, left) in itertools.product(enumerate(tops), enumerate(lefts)):
        window = whole[..., top : top + patch, left : left + patch]
        expected = window.unflatten(3, (cells, c)).unflatten(2, (cells, c)).mean((3, 5))
        assert_close(found[:, r, s], expected.flatten(1))


def test_normalized_descriptors_have_length_one_and_are_clipped_and_weak_ones_stay_weak():
    d = rand(50, 60).abs().double()
    d[0, 0] = 100
    d[1] *= 1e-3
    d[2] = 0
    found = normalize_descriptors(d, norm_floor=0.5)
    length = found.norm(dim=1)
    strong = d.norm(dim=1) >= 0.5
    assert_close(length[strong], torch.ones_like(length[strong]))
    assert float(length[1]) == pytest.approx(float(d[1].norm()) / 0.5) and length[2] == 0
    # Clipped at 0.2 of the original length.
    others = found[0, 1:].norm()
    assert found[0, 0] / others <= CLIP / (d[0, 1:] / d[0].norm()).norm() + 1e-9
    # A descriptor without large entries keeps its direction.
    assert_close(found[1] / length[1], d[1] / d[1].norm(), rtol=0, atol=2e-2)


# Words.


@pytest.fixture(scope="module")
def cloud():
    return rand(3000, 6) + 4 * rand(12, 6, seed=1)[torch.arange(3000) % 12]


def test_hard_assignment_is_that_of_scikit_learn(cloud):
    book = Codebook.fit(cloud, 12, normalize=False)
    model = KMeans(12, n_init=1, init=book.centers.numpy(), max_iter=1).fit(cloud.numpy())
    model.cluster_centers_ = book.centers.numpy()
    words, shares = book.assign(cloud)
    assert (words[:, 0].numpy() == model.predict(cloud.numpy())).all()
    assert (shares == 1).all() and shares.shape == (3000, 1)
    distance = (cloud - book.centers[words[:, 0]]).square().sum(1)
    assert book.distortion == pytest.approx(float(distance.mean()), rel=1e-3)


def test_soft_assignment_weights_the_nearest_words_by_their_distance(cloud):
    book = Codebook.fit(cloud, 12, normalize=False)
    words, shares = book.assign(cloud, 3)
    squared = torch.cdist(cloud, book.centers).square()
    near = squared.topk(3, largest=False)
    assert (words == near.indices).float().mean() > 0.999
    weights = torch.exp(-near.values / book.distortion)
    assert_close(shares, weights / weights.sum(1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_a_normalizing_codebook_ignores_contrast(cloud):
    d = cloud.abs() + 1
    book = Codebook.fit(d, 8)
    assert (book.assign(d)[0] == book.assign(3 * d)[0]).all()


def test_the_same_seed_gives_the_same_codebook(cloud):
    one, two = (Codebook.fit(cloud, 5, seed=3) for _ in range(2))
    assert torch.equal(one.centers, two.centers) and one.norm_floor == two.norm_floor


@pytest.mark.parametrize("d", [torch.ones(50, 4), rand(3, 4)])
def test_more_words_than_descriptors_are_refused(d):
    with pytest.raises(ValueError, match="words=5: the training images have only [13] different"):
        Codebook.fit(d, 5)


# Pyramids and kernels.


def test_a_pyramid_counts_the_words_in_the_cells_of_all_grids():
    P, V, levels = 200, 7, (1, 2, 4)
    places = torch.rand(P, 2, generator=torch.Generator().manual_seed(0))
    words = torch.randint(V, (P, 1), generator=torch.Generator().manual_seed(1))
    histogram = word_histogram(words, torch.ones(P, 1), places, torch.ones(P), side=4, num_words=V)
    found = pyramid(histogram[None], levels)[0]
    expected = []
    for g, weight in zip(levels, (0.25, 0.25, 0.5), strict=True):
        table = torch.zeros(g, g, V, dtype=torch.float64)
        for (y, x), (word,) in zip(places.tolist(), words.tolist(), strict=True):
            table[int(y * g), int(x * g), word] += weight / P
        expected.append(table.flatten())
    assert_close(found, torch.cat(expected))
    assert float(found.sum()) == pytest.approx(1)


def test_counts_are_raised_to_the_power_in_the_cells_of_each_grid():
    histogram = torch.rand(3, 16, 5, generator=torch.Generator().manual_seed(0))
    found = pyramid(histogram, (1, 2, 4), power=0.5)
    for n, table in enumerate(histogram.view(3, 4, 4, 5).numpy()):
        expected = []
        for g, weight in zip((1, 2, 4), (0.25, 0.25, 0.5), strict=True):
            cells = [np.split(rows, g, 1) for rows in np.split(table, g, 0)]
            roots = np.sqrt([[cell.sum((0, 1)) for cell in row] for row in cells]).ravel()
            expected.append(weight * roots / roots.sum())
        np.testing.assert_allclose(found[n], np.concatenate(expected), rtol=1e-5)


def test_two_pyramids_that_agree_in_finer_cells_match_more():
    one, near, far = torch.zeros(3, 16, 1).unbind(0)
    one[0], near[1], far[15] = 1, 1, 1
    a, b, c = pyramid(torch.stack([one, near, far]))
    same, beside, away = (float(intersection_kernel(a[None], each[None])) for each in (a, b, c))
    assert (same, beside, away) == (1.0, 0.5, 0.25)


def test_an_image_without_patches_has_kernel_zero_with_all_others():
    found = pyramid(torch.stack([torch.zeros(16, 3), torch.ones(16, 3)]))
    assert (
        torch.isfinite(found).all() and float(intersection_kernel(found[:1], found)[0].sum()) == 0
    )


def test_the_intersection_kernel_is_the_sum_of_elementwise_minima():
    a, b = rand(5, 2500).abs().double(), rand(700, 2500, seed=1).abs().double()
    found = intersection_kernel(a, b)
    for n, m in itertools.product(range(5), (0, 300, 699)):
        smaller = sum(min(x, y) for x, y in zip(a[n].tolist(), b[m].tolist(), strict=True))
        assert float(found[n, m]) == pytest.approx(smaller)


def test_the_linear_kernel_is_the_product_of_the_roots():
    a, b = rand(5, 60).abs().double(), rand(7, 60, seed=1).abs().double()
    expected = [[sum((x * y).sqrt().tolist()) for y in b] for x in a]
    assert_close(bhattacharyya_kernel(a, b), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("svm", ["one_vs_rest", "one_vs_one"])
def test_svms_on_kernels_separate_clusters_of_points(svm):
    points = rand(90, 2) + 6 * torch.tensor([[0.0, 0], [1, 0], [0, 1]])[torch.arange(90) % 3]
    kernel, labels = (points @ points.T + 1).double().numpy(), np.arange(90) % 3 + 4
    own, tests = kernel[:60, :60], kernel[60:, :60]
    found = predict_classes(own, labels[:60], tests, C=10.0, svm=svm)
    assert (found == labels[60:]).mean() > 0.9


# Activations of upper layers in the maps of layer 1.


def deep(pooling):
    """Three layers of random filters, with pooling."""
    solver = SolverSettings(method="fista", iterations=8)
    layer = dict(pool=[1, 2, 2], pooling=pooling, target="image", lam=5.0, solver=solver)
    settings = [LayerSettings(n, size, **layer) for n, size in ((4, 5), (6, 3), (8, 3))]
    net = DeconvNet(settings, PreprocessingSettings("grey", []), seed=1)
    net.layer(2).scale.fill_(0.5)
    net.layer(3).scale.fill_(0.7)
    return net


@pytest.fixture(scope="module", params=["after", "in_loop"])
def upper(request):
    net = deep(request.param)
    return net, net.infer(rand(3, 1, 36, 40).mul(0.1).add(0.5).clamp(0, 1))


@pytest.mark.parametrize("layer", [2, 3])
def test_a_projected_activation_reconstructs_as_the_layer_with_all_others_at_zero(upper, layer):
    net, codes = upper
    z = codes.layer(layer).z[1]
    order = z.flatten().abs().argsort(descending=True)[:20]
    found = torch.cat(list(project_strongest(net, codes, 1, layer, 20)))
    assert found.shape == (20, 4, *codes.layer(1).shape[1:])
    first = Deconvolution(net.layer(1).filters)
    whole = net.operator(codes.select(slice(1, 2)), layer)
    for n, place in enumerate(order.tolist()):
        alone = torch.zeros_like(z).flatten()
        alone[place] = z.flatten()[place]
        assert_close(first(found[n : n + 1]), whole(alone.view(1, *z.shape)), rtol=1e-4, atol=1e-6)


def test_all_activations_projected_one_by_one_add_up_to_the_layer(upper):
    net, codes = upper
    count = int((codes.layer(3).z[2] != 0).sum())
    found = list(project_strongest(net, codes, 2, 3, 10**6))
    assert sum(map(len, found)) == count > 16
    whole = projection_to_layer_1(net, codes, 3, torch.tensor([2]))(codes.layer(3).z[2:])
    assert_close(torch.cat(found).sum(0), whole[0], rtol=1e-3, atol=1e-5)


def test_projected_patches_are_non_zero_and_each_activation_has_the_same_weight(upper):
    net, codes = upper
    settings = FeatureSettings(patch=[8], projected_step=2, strongest=5, words=2, neighbours=1)
    parts = list(image_descriptors(net, codes, 0, 2, settings))
    d = torch.cat([part.d for part in parts])
    weights = torch.cat([part.weights for part in parts])
    assert (d != 0).any(1).all() and float(weights.sum()) == pytest.approx(5, rel=1e-5)
    maps = torch.cat(list(project_strongest(net, codes, 0, 2, 5)))
    windows = torch.nn.functional.max_pool2d(maps.abs().amax(1), 8, 2)
    assert len(d) == int((windows > 0).sum()) < windows.numel()
    sums = weights.split((windows > 0).flatten(1).sum(1).tolist())
    assert_close(torch.stack([part.sum() for part in sums]), torch.ones(5))


def test_an_image_without_activations_has_no_projected_patches(upper):
    net, _ = upper
    codes = net.infer(torch.zeros(1, 1, 36, 40))
    assert list(image_descriptors(net, codes, 0, 3, FeatureSettings(words=2, neighbours=1))) == []


def test_patches_outside_the_picture_are_left_out():
    net = DeconvNet([LayerSettings(4, 5)], PreprocessingSettings("grey", []))
    square = torch.zeros(1, 1, 40, 40)
    square[..., 10:30, 5:35] = rand(1, 1, 20, 30).mul(0.1).add(0.5)
    codes = net.infer(square, frames=torch.tensor([[10, 5, 20, 30]]))
    (found,) = image_descriptors(
        net, codes, 0, 1, FeatureSettings(patch=[8], words=2, neighbours=1)
    )
    # An entry at row i paints rows i - 4 to i.
    inside = codes.layer(1).z[..., 10:34, 5:39]
    assert_close(found.d, descriptors(inside, patch=8).flatten(0, 2))
    assert_close(found.positions[0], torch.tensor([4 / 24, 4 / 34]))
    assert_close(found.positions[-1], torch.tensor([20 / 24, 30 / 34]))


def test_patches_of_upper_maps_are_as_large_in_pixels_as_those_of_layer_one(upper):
    net, codes = upper
    settings = FeatureSettings(patch=[16], step=4, upper="maps", words=2, neighbours=1)
    (below,), (above,) = (image_descriptors(net, codes, 0, layer, settings) for layer in (1, 2))
    # Stride 2: windows of 8 places, 2 apart.
    H, W = codes.layer(2).shape[1:]
    assert len(above.d) == ((H - 8) // 2 + 1) * ((W - 8) // 2 + 1)
    assert above.d.shape[1] == 6 * 16 and below.d.shape[1] == 4 * 16
    assert_close(above.positions.amin(0), below.positions.amin(0), rtol=0, atol=0.06)


# Classes that pixels do not separate.


def stripes(angle, random, side=40):
    """Stripes of random phase, contrast and wavelength, with noise: (side, side) in [0, 1]."""
    i, j = np.mgrid[:side, :side]
    wave = (i * np.sin(angle) + j * np.cos(angle)) / random.uniform(4, 6)
    image = random.uniform(0.15, 0.4) * np.sin(2 * np.pi * (wave + random.uniform()))
    return np.clip(0.5 + image + 0.1 * random.standard_normal((side, side)), 0, 1)


def oriented(maps=4, size=7):
    """A network whose filters are lines in several orientations."""
    i, j = np.mgrid[:size, :size] - size // 2
    angles = np.arange(maps) * np.pi / maps
    across = np.stack([i * np.sin(a) + j * np.cos(a) for a in angles])
    lines = np.exp(-(i**2 + j**2) / 8) * np.cos(2 * np.pi * across / 5)
    f = torch.from_numpy(lines - lines.mean((1, 2), keepdims=True)).float()[:, None]
    layer = LayerSettings(maps, size, lam=3.0, solver=FEW)
    net = DeconvNet([layer], PreprocessingSettings("grey", ["mean"]))
    net.layer(1).set_filters(f)
    net.preprocessing.scale.fill_(0.2)
    return net


def test_textures_are_separated_by_words_and_not_by_pixels():
    random = np.random.default_rng(0)
    images = np.stack([stripes(angle, random) for _ in range(24) for angle in ANGLES])
    labels = np.arange(72) % 3
    split = draw_split(labels, CLASSES, train=10, test=None, seed=0)
    net, settings = oriented(), FeatureSettings(patch=[16], words=20, step=4, neighbours=1)
    codes = net.infer(torch.from_numpy(images).float()[:, None])
    windows = [next(image_descriptors(net, codes, n, 1, settings)) for n in range(72)]
    book = Codebook.fit(torch.cat([windows[n].d for n in split.train.tolist()]), 20)
    histograms = [
        word_histogram(*book.assign(each.d), each.positions, each.weights, side=4, num_words=20)
        for each in windows
    ]
    pyramids = pyramid(torch.stack(histograms))
    train, tests = pyramids[split.train], pyramids[split.test]
    kernels = [intersection_kernel(each, train).numpy() for each in (train, tests)]
    found = predict_classes(kernels[0], labels[split.train], kernels[1], C=10.0, svm="one_vs_rest")
    assert (found == labels[split.test]).mean() > 0.9
    pixels = LinearSVC().fit(images[split.train].reshape(30, -1), labels[split.train])
    assert pixels.score(images[split.test].reshape(42, -1), labels[split.test]) < 0.7


# Pyramids of codes.


@pytest.mark.parametrize("shape", [(8, 12), (5, 7), (3, 1)])
def test_maxima_of_both_signs_are_those_of_loops_over_the_cells(shape):
    H, W = shape
    z, levels = rand(2, 3, H, W), (1, 2, 3, 4)
    expected = []
    for g in levels:
        for sign in (1, -1):
            for k, i, j in itertools.product(range(3), range(g), range(g)):
                # Cells that do not divide the map, or more cells than positions, overlap.
                rows = range(i * H // g, -(-(i + 1) * H // g))
                columns = range(j * W // g, -(-(j + 1) * W // g))
                cell = [sign * z[:, k, r, c] for r in rows for c in columns]
                expected.append(torch.stack(cell).amax(0).clamp(min=0))
    found = grid_maxima(z, levels)
    assert found.shape == (2, 2 * 3 * num_cells(levels))
    assert torch.equal(found, torch.stack(expected, 1))


def test_normalized_maxima_have_length_one_in_any_unit_and_zeros_stay_zero():
    maxima = rand(3, 10).abs()
    maxima[2] = 0
    found = normalize_maxima(maxima, 0.5)
    expected = maxima[:2].sqrt() / maxima[:2].sum(1, keepdim=True).sqrt()
    assert_close(found[:2], expected)
    assert found[2].tolist() == 10 * [0]
    for unit in (1e-30, 1e30):
        assert_close(normalize_maxima(unit * maxima, 0.5), found)


# Splits and scores.


def test_a_split_has_the_given_numbers_of_training_and_test_images_of_each_class():
    labels = np.repeat([0, 1, 2], [9, 5, 30])
    split = draw_split(labels, "abc", train=4, test=10, seed=1)
    assert np.bincount(labels[split.train]).tolist() == [4, 4, 4]
    assert np.bincount(labels[split.test]).tolist() == [5, 1, 10]
    assert not set(split.train) & set(split.test)
    again, other = (draw_split(labels, "abc", train=4, test=10, seed=s) for s in (1, 2))
    assert (split.train == again.train).all() and (split.train != other.train).any()


def test_with_a_given_test_set_all_other_images_can_be_training_images():
    labels, fixed = np.tile([0, 1], 10), np.arange(20) >= 10
    split = draw_split(labels, "ab", train=5, test=None, seed=0, is_test=fixed)
    assert sorted(split.train) == list(range(10)) and sorted(split.test) == list(range(10, 20))


def test_all_images_are_used_once_if_a_test_set_is_given_unless_numbers_are():
    own, given = ClassData("images"), ClassData("images", test="others")
    found = [
        (settings.train, settings.test, settings.splits)
        for settings in (
            ClassifySettings(data=own),
            ClassifySettings(data=given),
            ClassifySettings(data=given, train=15),
            ClassifySettings(data=given, test=9),
            ClassifySettings(data=own, train=15, test=None, splits=2),
        )
    ]
    assert found == [(30, 50, 5), (None, None, 1), (15, None, 5), (None, 9, 5), (15, None, 2)]
    labels, fixed = np.tile([0, 1], 10), np.arange(20) >= 10
    split = draw_split(labels, "ab", train=None, test=None, seed=0, is_test=fixed)
    assert sorted(split.train) == list(range(10)) and sorted(split.test) == list(range(10, 20))
    for wrong in ({"train": None}, {"train": 0}, {"test": "many"}, {"splits": None}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
            ClassifySettings(data=own, **wrong)


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="train=5: class b has 5 images, must have at least 6"):
        draw_split(np.repeat([0, 1], [9, 5]), "ab", train=5, test=None, seed=0)


def test_accuracy_is_the_mean_over_classes_however_large_they_are():
    truth, found = np.repeat([0, 1], [90, 10]), np.zeros(100, int)
    matrix = confusion_matrix(truth, found, 2)
    assert matrix.tolist() == [[90, 0], [10, 0]]
    perfect = confusion_matrix(truth, truth, 2)
    scores = Scores(np.stack([matrix, perfect]))
    assert scores.accuracies.tolist() == [0.5, 1.0]
    assert scores.mean == 0.75 and scores.std == pytest.approx(np.std([0.5, 1], ddof=1))
    assert Scores(matrix[None]).std is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(patch=[16, 10]), "patch=[16, 10]: must be multiples of cells=4"),
        (dict(step=0), "step=0: must be at least 1"),
        (dict(levels=[1, 2, 3]), "levels=[1, 2, 3]: must be sides of grids"),
        (dict(levels=[0, 2], features="codes"), "levels=[0, 2]: must be sides of grids"),
        (dict(features="pixels"), "features=pixels: choose one of auto, words, codes"),
        (dict(strength="loud"), "strength=loud: choose one of magnitude"),
        (dict(upper="down"), "upper=down: choose one of project"),
        (dict(words=1), "words=1: must be 2 to 65535"),
        (dict(words=4, neighbours=5), "neighbours=5: must be at most words=4"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FeatureSettings(**settings)


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a network file, three classes to learn and the same to test, and wrong ones."""
    folder = tmp_path_factory.mktemp("classify")
    random = np.random.default_rng(0)

    def write(path, angle):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = stripes(angle, random)[: random.integers(24, 41)]
        Image.fromarray((255 * pixels).astype(np.uint8)).save(path)

    for name, angle in zip(CLASSES, ANGLES, strict=True):
        for n in range(9):
            write(folder / f"images/{name}/{n}.png", angle)
        for n in range(3):
            write(folder / f"others/{name}/{n}.png", angle)
    for path in ("strange/slanted/0.png", "few/a/0.png", "few/b/0.png", "broken/a/0.png"):
        write(folder / path, 0.0)
    (folder / "broken/b").mkdir()
    (folder / "broken/b/1.png").write_bytes(b"no image")
    for n in (2, 3):
        for name in "ab":
            write(folder / f"broken/{name}/{n}.png", 0.0)
    net = oriented()
    solver = SolverSettings(iterations=8)
    below = LayerSettings(4, 7, lam=3.0, pool=[1, 2, 2], solver=solver)
    layers = [below, LayerSettings(5, 3, solver=solver)]
    above = DeconvNet(layers, PreprocessingSettings("grey", ["mean"]))
    above.layers[0].load_state_dict(net.layers[0].state_dict())
    above.preprocessing.scale.fill_(0.2)
    above.save(folder / "net.safetensors")
    tensors, settings = above.to_parts()
    data = dataclasses.asdict(DataSettings("any", "folder", "images", size=None))
    state = {"network": {"tensors": tensors, "settings": settings}, "settings": {"data": data}}
    save_checkpoint(folder / "run/checkpoints", 1, state)
    return folder


COMMON = ("run=net.safetensors", "data.size=40", "words=12", "step=4", "strongest=4", "train=4")


def test_the_command_scores_layers_alone_and_together_and_resumes_with_its_features(script, folder):
    command = ("classify.py", *COMMON, "data.path=images", "splits=2", "layers=[1,2]")
    result = script(folder, *command)
    assert result.code == 0, result.err
    rows = [line for line in result.out.splitlines() if line.startswith("layer")]
    assert [row.split("   ")[0].strip() for row in rows] == ["layer 1", "layer 2"]
    assert "together" in result.out
    scores = strict_json((folder / "classified/scores.json").read_text())
    assert scores["classes"] == list(CLASSES)
    assert scores["scores"]["layer 1"]["mean"] > 0.8
    assert len(scores["scores"]["together"]["splits"]) == 2
    picture = Image.open(folder / "classified/confusion.png")
    assert picture.mode == "RGB" and min(picture.size) > 3 * 20
    # Again, with one file damaged and one missing: the same scores.
    files = sorted((folder / "classified/features").rglob("*.npz"))
    times = {path: path.stat().st_mtime_ns for path in files}
    gone, damaged = files[0], files[-1]
    gone.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-30])
    again = script(folder, *command)
    assert again.out == result.out
    made = {path for path in files if path.stat().st_mtime_ns != times[path]}
    assert {gone, damaged} <= made < set(files)
    faster = script(folder, *command, "svm=one_vs_one", "kernel=linear", "layers=[1]")
    assert faster.code == 0 and {p.stat().st_mtime_ns for p in files} >= set(times.values()) - {
        times[p] for p in made
    }


def test_only_what_depends_on_a_changed_image_is_recomputed(folder, tmp_path, monkeypatch):
    """Also if its file has as many bytes as before."""
    random = np.random.default_rng(1)
    for name, angle in zip(CLASSES, ANGLES, strict=True):
        for n in range(6):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            pixels = (255 * stripes(angle, random)[:32]).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{n}.bmp")
    monkeypatch.setattr(feature_cache, "IMAGES_PER_FILE", 4)
    net = load(folder / "net.safetensors")
    data = ClassData(path=str(tmp_path / "images"), size=40)
    settings = ClassifySettings(
        data=data, layers=[1], words=8, step=4, train=3, test=2, splits=1, codebook_images=4
    )

    def find():
        images = LabelledImages.from_settings(tmp_path, data)
        split = draw_split(images.labels, images.class_names, train=3, test=2, seed=0)
        features = WordHistograms(Task(net, images, [split], [1], settings, tmp_path / "features"))
        features.compute()
        files = {p: p.read_bytes() for p in (tmp_path / "features").rglob("*.npz")}
        return features.histograms(1, 0, split.test), split, images, files

    before, split, images, files = find()
    tested = images.files[split.test[0]]
    size = tested.stat().st_size
    Image.fromarray(np.flipud(np.asarray(Image.open(tested)))).save(tested)
    assert tested.stat().st_size == size
    after, _, _, again = find()
    assert not torch.equal(after[0], before[0]) and torch.equal(after[1:], before[1:])
    changed = [path.name for path in files if again[path] != files[path]]
    assert set(again) == set(files) and len(changed) == 1 and changed[0].startswith("counts")
    # If images that the words were learned from change, everything is recomputed.
    for path in (images.files[n] for n in split.train):
        Image.fromarray(np.flipud(np.asarray(Image.open(path)))).save(path)
    *_, last = find()
    assert all(last[path] != again[path] for path in files if path.name.startswith("codebook"))


@pytest.fixture
def code_pyramids(folder, tmp_path, monkeypatch):
    """Makes the pyramids of padded pictures of the same files, two splits and layers; a copy."""
    monkeypatch.setattr(feature_cache, "IMAGES_PER_FILE", 4)
    net = load(folder / "net.safetensors")
    shutil.copytree(folder / "others", tmp_path / "images")
    data = ClassData(path=str(tmp_path / "images"), size=40)
    settings = ClassifySettings(data=data, features="codes", levels=[1, 2, 3])

    def make(name="features", seeds=2, **processes):
        images = LabelledImages.from_settings(tmp_path, data)
        splits = [
            draw_split(images.labels, CLASSES, train=2 if seeds > 1 else 1, test=1, seed=seed)
            for seed in range(seeds)
        ]
        communicator = SimpleNamespace(
            **{"rank": 0, "world_size": 1, "all_gather": lambda _: None, "is_main": True}
            | processes
        )
        task = Task(net, images, splits, [1, 2], settings, tmp_path / name, communicator)
        return CodePyramids(task)

    return make


def test_code_pyramids_are_the_maxima_within_the_picture_for_every_layer_and_all_splits(
    code_pyramids,
):
    features = code_pyramids()
    features.compute()
    net, images, indices = features.net, features.images, features.cache.indices
    assert len(indices) == 9
    for layer in (1, 2):
        found = features.cache.read(features._feature(layer), indices)
        for index in indices.tolist():
            image, frame = images.read(index)
            assert frame[2] < 40  # rows of padding, if the picture is not square
            codes = net.infer(image[None], frames=torch.tensor([frame]), depth=layer)
            z, top, height = codes.layer(layer).z[0].numpy(), frame[0], frame[2]
            # A coefficient of layer 1 at row r paints rows r - 6 to r; one of layer 2, 3x3 of
            # windows of two rows, paints rows 2 r - 10 to 2 r + 1.
            field = {1: (-6, 0, 1), 2: (-10, 1, 2)}[layer]
            rows = [
                r
                for r in range(z.shape[1])
                if r * field[2] + field[1] >= top and r * field[2] + field[0] < top + height
            ]
            inside = z[:, rows[0] : rows[-1] + 1]
            maxima = [grid_maxima(torch.from_numpy(inside)[None], (1, 2, 3))[0].numpy()]
            np.testing.assert_allclose(found[index], maxima[0], rtol=1e-4, atol=1e-5)
        train, test = features.kernels(layer, 1)
        split, roots = features.splits[1], np.sqrt(found)
        x = roots / np.linalg.norm(roots, axis=1, keepdims=True)
        x = x - x[split.train].mean(0)
        unit = np.square(x[split.train]).sum(1).mean()
        np.testing.assert_allclose(train, x[split.train] @ x[split.train].T / unit, atol=1e-5)
        np.testing.assert_allclose(test, x[split.test] @ x[split.train].T / unit, atol=1e-5)


def test_code_pyramids_resume_and_are_the_same_from_two_processes(code_pyramids):
    def content(features):
        return {
            p.name + p.parent.name: p.read_bytes() for p in features.cache.folder.rglob("*.npz")
        }

    features = code_pyramids()
    features.compute()
    files = content(features)
    assert len(files) == 2 * 3
    for rank in (1, 0):
        code_pyramids("shared", rank=rank, world_size=2).compute()
    assert content(code_pyramids("shared")) == files
    # A damaged file is recomputed, and so is a changed image; nothing else.
    paths = sorted(features.cache.folder.rglob("layer2/*.npz"))
    paths[0].write_bytes(paths[0].read_bytes()[:-30])
    with pytest.raises(ValueError, match="maxima-000000.npz: damaged; run the command again"):
        features.kernels(2, 0)
    image = features.images.files[4]
    Image.fromarray(np.fliplr(np.asarray(Image.open(image)))).save(image)
    times = {path: path.stat().st_mtime_ns for path in features.cache.folder.rglob("*.npz")}
    again, inferred = code_pyramids(), []
    infer = again.cache.infer
    again.cache.infer = lambda n, depth: inferred.append((n.tolist(), depth)) or infer(n, depth)
    again.compute()
    made = {
        f"{path.parent.name} {path.stem}"
        for path, time in times.items()
        if path.stat().st_mtime_ns != time
    }
    assert made == {"layer2 maxima-000000", "layer1 maxima-000004", "layer2 maxima-000004"}
    assert inferred == [([0, 1, 2, 3], 2), ([4], 2), ([], 0)]
    assert content(again)["maxima-000000.npzlayer2"] == files["maxima-000000.npzlayer2"]
    # Other splits add the images that are missing.
    few = code_pyramids("few", seeds=1)
    few.compute()
    assert len(few.cache.indices) == 6
    code_pyramids("few").compute()
    assert content(code_pyramids("few")) == content(again)


def test_the_command_describes_layers_that_code_patches_by_their_codes(script, folder, tmp_path):
    """And layers of convolutions by words, unless they are to be described by codes as well."""
    net = load(folder / "net.safetensors")
    patches = LayerSettings(5, 3, coding="patches", solver=FEW)
    mixed = DeconvNet([net.layer(1).settings, patches], net.preprocessing.settings, seed=0)
    mixed.layers[0].load_state_dict(net.layers[0].state_dict())
    mixed.save(tmp_path / "mixed.safetensors")
    command = ("classify.py", *COMMON[1:], f"run={tmp_path / 'mixed.safetensors'}", "test=2")
    command = (*command, "data.path=images", "splits=1")

    def files_and_scores(*more):
        result = script(folder, *command, *more)
        assert result.code == 0, result.err
        output = Path(more[0].removeprefix("output="))
        files = {p.parent.name + p.name[:6] for p in (folder / output).rglob("*-000000.npz")}
        return files, strict_json((folder / output / "scores.json").read_text())["scores"]

    files, scores = files_and_scores("output=mixed")
    assert files == {"layer1counts", "layer2maxima"}
    assert list(scores) == ["layer 1", "layer 2", "together"]
    files, scores = files_and_scores("output=codes", "features=codes", "levels=[1,3,4]")
    assert files == {"layer1maxima", "layer2maxima"} and scores["layer 1"]["mean"] > 0.6


def test_the_command_takes_a_given_test_set_and_one_codebook(script, folder):
    result = script(
        folder,
        "classify.py",
        *(*COMMON, "data.path=images", "data.test=others", "splits=2", "layers=[1]"),
        *(
            "patch=[8,16]",
            "codebooks=shared",
            "neighbours=2",
            "normalize=false",
            "output=given",
            "data.fit=crop",
        ),
    )
    assert result.code == 0, result.err
    assert "9 tests, 2 splits" in result.out
    scores = strict_json((folder / "given/scores.json").read_text())
    assert scores["scores"]["layer 1"]["mean"] > 0.7


def test_the_layers_of_other_networks_are_evaluated_too(script, folder, tmp_path):
    other = load(folder / "net.safetensors")
    other.layer(1).set_filters(torch.randn(other.layer(1).filters.shape))
    other.save(tmp_path / "other.5.safetensors")
    beside = tmp_path / "other.5.safetensors"
    settings = (*COMMON, "data.path=images", "splits=1", "test=2", "layers=[1]")

    def scores(output, *more):
        result = script(folder, "classify.py", *settings, f"output={output}", *more)
        assert result.code == 0, result.err
        return strict_json((folder / output / "scores.json").read_text())["scores"]

    both = scores("both", f"beside=[{beside}]")
    assert list(both) == ["layer 1", "other.5 layer 1", "together"]
    assert both["other.5 layer 1"] == scores("another", f"run={beside}")["layer 1"]
    twice = script(folder, "classify.py", *settings, f"beside=[{beside},{beside}]", "output=both")
    assert twice.code == 1 and "two networks are called other.5" in twice.err


def test_a_network_without_the_named_layers_adds_all_of_its_own(folder):
    two = load(folder / "net.safetensors")
    one = DeconvNet([two.layer(1).settings], two.preprocessing.settings)
    assert layers_beside(two, [2]) == layers_beside(two, [2, 3]) == [2]
    assert layers_beside(one, [1, 2]) == layers_beside(one, [2]) == [1]


def test_together_is_the_mean_of_the_kernels(monkeypatch):
    split = Split(np.array([0, 1, 2]), np.array([3, 4]))
    table = np.random.default_rng(0).random((2, 5, 3))

    @dataclasses.dataclass
    class Given:
        number: int
        images = LabelledImages([], np.array([0, 1, 0, 1, 0]), ["a", "b"], None, None, "pad")
        splits = (split,)

        def kernels(self, layer, number):
            return np.split(table[self.number], [3])

    seen = []

    def predict(kernel, labels, tests, **_):
        seen.append(np.concatenate([kernel, tests]))
        return np.array([1, 0])

    monkeypatch.setattr("deconvnet.applications.classification.evaluation.predict_classes", predict)
    found = evaluate({"a": (Given(0), 1), "b": (Given(1), 1)}, ClassifySettings())
    assert list(found) == ["a", "b", "together"]
    np.testing.assert_allclose(seen, [table[0], table[1], table.mean(0)])
    assert found["together"].mean == 1


def test_the_kernel_of_two_patch_sizes_is_the_mean_of_their_kernels(folder, tmp_path):
    net = load(folder / "net.safetensors")
    files = sorted((folder / "images").rglob("*.png"))
    labels = np.array([CLASSES.index(path.parent.name) for path in files])
    images = LabelledImages(files, labels, list(CLASSES), None, 40, "pad")
    splits = [draw_split(labels, CLASSES, train=4, test=2, seed=0)]

    def kernels(*patch):
        settings = ClassifySettings(patch=list(patch), words=9, step=4, strongest=3)
        features = WordHistograms(Task(net, images, splits, [1, 2], settings, tmp_path))
        features.compute()
        return [features.kernels(layer, 0)[1] for layer in (1, 2)]

    for both, small, large in zip(kernels(8, 16), kernels(8), kernels(16), strict=True):
        np.testing.assert_allclose(both, (small + large) / 2, atol=1e-6)
        assert np.abs(small - large).max() > 0.05


def test_processes_share_the_images_and_get_the_scores_of_one_process(start, script, folder):
    settings = ("run=run", *COMMON[2:], "data.path=images", "splits=2", "test=2", "layers=[1,2]")
    alone = script(folder, "classify.py", *settings, "output=alone")
    assert alone.code == 0, alone.err
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=2)
    running = [
        start(folder, "classify.py", *settings, "output=both", RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in (0, 1)
    ]
    ends = [each.wait() for each in running]
    assert [end.code for end in ends] == [0, 0], ends
    assert ends[1].out == ""
    found, expected = (
        strict_json((folder / name / "scores.json").read_text())["scores"]
        for name in ("both", "alone")
    )
    assert found == expected


def test_images_keep_their_sizes_if_the_network_was_trained_like_that(script, folder):
    settings = ("run=run", *COMMON[2:], "data.path=images", "splits=1", "test=2", "layers=[1,2]")
    result = script(folder, "classify.py", *settings, "upper=maps", "strength=signed")
    assert result.code == 0, result.err
    assert "6 tests, 1 split;" in result.out and "±" not in result.out
    scores = strict_json((folder / "run/classified/scores.json").read_text())["scores"]
    assert scores["layer 1"]["std"] is None and scores["layer 1"]["mean"] > 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=no"], "data.path=no: no such folder"),
        (["data.path=images/left"], "must have a folder of images for each class, has none"),
        (["data.path=images/left/0.png"], "data.path=images/left/0.png: not a folder"),
        (["data.path=few"], "train=4: class a has 1 images"),
        (["data.path=images", "data.test=strange"], "data.test=strange: must have a folder"),
        (["data.path=broken", "train=1", "splits=9"], "cannot read broken/b/1.png"),
        (["data.path=images", "layers=[3]"], "layer=3: this network has layers 1 to 2"),
        (["data.path=images", "data.size=null"], "data.size=None: a network file does not"),
        (["data.path=images", "svm=none"], "svm=none: choose one of one_vs_rest"),
        (["data.path=images", "kernel=rbf"], "kernel=rbf: choose one of intersection, linear"),
        (["data.path=images", "features=codes", "kernel=intersection"], "choose linear, or auto"),
        (["data.path=images", "words=100000"], "words=100000: must be 2 to 65535"),
        (["data.path=images", "layers=[]"], "give one or several"),
        (["data.path=images", "+word=5"], "did you mean words"),
    ],
)
def test_a_wrong_command_says_what_would_be_right_in_one_line(script, folder, arguments, message):
    result = script(folder, "classify.py", *COMMON, *arguments, "output=wrong")
    assert result.code == 1
    lines = [line for line in (result.out + result.err).splitlines() if line.strip()]
    # A progress bar, if there was one, is cleared.
    said = [line for line in lines if "%|" not in line]
    assert len(said) == 1 and message in said[0]
