"""The baselines have one interface, and the benchmark of features measures them."""

import gzip
import json
import re
import struct
from dataclasses import replace

import features
import numpy as np
import pytest
import torch
from baselines import (
    Autoencoder,
    KMeansMaps,
    LearnedFilters,
    PatchDictionary,
    PatchPCA,
    RandomFilters,
    RandomPatches,
    SparseMaps,
    WhatWhere,
    correlations,
    draw_patches,
    one_layer,
    patch_layer,
)
from linear_svm import LinearSVM
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler
from sklearn.svm import LinearSVC

from deconvnet import LayerSettings, LearningSettings, PreprocessingSettings
from deconvnet.applications.classification.grid_features import grid_features
from deconvnet.network.network import DeconvNet
from deconvnet.operators.pooling import max_pool
from deconvnet.support.seeding import seeded_generator

GREY = PreprocessingSettings(color="grey", steps=["mean"])
COLOUR = PreprocessingSettings(contrast_size=5)


def sparse(num_maps, size, *, seed=0, preprocessing=GREY):
    net = one_layer(num_maps, size, epochs=1, seed=seed, preprocessing=preprocessing)
    return SparseMaps(net, seed=seed)


def patches(num_maps, size, *, seed=0, preprocessing=GREY):
    net = patch_layer(num_maps, size, epochs=1, seed=seed, preprocessing=preprocessing)
    return SparseMaps(net, seed=seed)


def rectified(kind):
    return lambda *args, **options: kind(*args, rectified=True, **options)


METHODS = {
    "deconvnet": sparse,
    "patches": patches,
    "learned, rectified": rectified(LearnedFilters),
    "random": RandomFilters,
    "random, rectified": rectified(RandomFilters),
    "dictionary": PatchDictionary,
    "dictionary, rectified": rectified(PatchDictionary),
    "pca": PatchPCA,
    "kmeans": KMeansMaps,
    "random patches": RandomPatches,
    "autoencoder": Autoencoder,
}


@pytest.fixture(scope="module", autouse=True)
def few_patches():
    """Dictionaries are learned from few patches, in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("baselines.DICTIONARY_PATCHES", 500)
        yield


@pytest.fixture(scope="module")
def images(textures):
    return textures(10, 1, 14, 12)


@pytest.fixture(scope="module", params=METHODS)
def method(request, images):
    """Each of them, learned from the first six images."""
    return METHODS[request.param](6, 5, preprocessing=GREY).fit(images[:6])


def is_of_patches(method):
    return isinstance(method, SparseMaps) and method.net.layer(1).settings.coding == "patches"


def test_maps_have_an_entry_for_every_place_where_a_filter_touches_the_image(method, images):
    z = method.maps(images)
    places = (14, 12) if is_of_patches(method) else (18, 16)
    assert z.shape == (10, 6, *places) and z.dtype == torch.float32
    assert z.isfinite().all() and (z.abs().amax((0, 2, 3)) > 0).sum() >= 4
    assert not z.requires_grad


def test_an_image_has_the_maps_alone_that_it_has_among_others(method, images):
    together, alone = method.maps(images), method.maps(images[7:8])
    assert torch.allclose(together[7:8], alone, atol=1e-4 * float(together.abs().max()))


@pytest.mark.parametrize("kind", METHODS)
def test_a_seed_gives_the_same_maps_and_another_seed_others(kind, images):
    def maps(seed):
        torch.manual_seed(len(drawn))  # of the global generator nothing may depend
        drawn.append(METHODS[kind](6, 5, seed=seed, preprocessing=GREY).fit(images[:6]))
        return drawn[-1].maps(images[6:])

    drawn = []
    first, again, other = maps(0), maps(0), maps(1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_colour_images_go_through_every_method(kind, textures):
    images = textures(4, 3, 12, 12)
    z = METHODS[kind](5, 3, preprocessing=COLOUR).fit(images).maps(images)
    side = 12 if kind == "patches" else 14
    assert z.shape == (4, 5, side, side) and z.abs().max() > 0


def test_the_maps_of_a_network_are_those_of_its_own_inference_at_any_layer(images):
    few = LearningSettings(epochs=1)
    layers = [LayerSettings(4, 5, pool=[1, 2, 2], learning=few), LayerSettings(6, 3, learning=few)]
    net = DeconvNet(layers, GREY, seed=3)
    first = net.layer(2).filters.clone()
    method = SparseMaps(net).fit(images)
    assert not torch.equal(net.layer(2).filters, first)
    assert float(net.layer(2).scale) != 1
    codes = net.infer(images, chunk=3)
    for number in (1, 2):
        expected = codes.layer(number).z
        found = SparseMaps(net, number).maps(images)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert method.maps(images).shape[1] == 6


def test_random_filters_differ_from_ours_by_the_filters_alone(images):
    """With the learned filters in their place the maps are ours; and so are LearnedFilters."""
    ours, random = sparse(6, 5).fit(images), RandomFilters(6, 5, preprocessing=GREY).fit(images)
    f = random.filters.clone()
    assert torch.allclose(f.square().sum((1, 2, 3)), torch.ones(6), atol=1e-5)
    assert not torch.allclose(random.maps(images), ours.maps(images), atol=0.1)
    random.filters.copy_(ours.net.layer(1).filters)
    assert torch.equal(random.maps(images), ours.maps(images))
    learned = LearnedFilters(6, 5, epochs=1, preprocessing=GREY).fit(images)
    assert torch.allclose(learned.filters, ours.net.layer(1).filters, atol=1e-6)


def test_rectified_maps_are_correlations_shrunk_by_the_root_mean_square_of_their_map(images):
    method = RandomFilters(4, 3, rectified=True, threshold=0.5, preprocessing=GREY).fit(images)
    y = method.preprocessing(images)[0].double().numpy()
    padded = np.pad(y, ((0, 0), (0, 0), (2, 2), (2, 2)), "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    c = np.einsum("ncijhw,kchw->nkij", windows, method.filters.double().numpy())
    t = 0.5 * np.sqrt(np.square(c).mean((0, 2, 3)))[:, None, None]
    expected = np.sign(c) * np.maximum(np.abs(c) - t, 0)
    assert np.allclose(method.maps(images).numpy(), expected, atol=1e-5)
    assert (expected > 0).any() and (expected < 0).any()
    whole = RandomFilters(4, 3, rectified=True, threshold=0, preprocessing=GREY).fit(images)
    assert torch.equal(whole.maps(images), correlations(torch.tensor(y).float(), whole.filters))


def test_maps_of_principal_components_are_those_of_scikit_learn_at_each_patch(images):
    method = PatchPCA(6, 5, seed=2, preprocessing=GREY).fit(images)
    y = method.preprocessing(images)[0]
    patches = draw_patches(y, 5, 50_000, seeded_generator(2, 2)).flatten(1).double().numpy()
    # By the eigenvectors of the covariance, which involve no solver; signs are arbitrary.
    mean = patches.mean(0)
    variances, directions = np.linalg.eigh(np.cov(patches.T))
    z = method.maps(images).numpy()
    for n, i, j in [(0, 0, 0), (3, 9, 7), (9, 4, 2)]:
        patch = y[n, 0, i : i + 5, j : j + 5].flatten().double().numpy()
        expected = np.abs((patch - mean) @ directions[:, ::-1][:, :6])
        assert np.allclose(np.abs(z[n, :, i + 4, j + 4]), expected, atol=1e-4)
        fitted = PCA(6, svd_solver="full").fit(patches).transform(patch[None])[0]
        assert np.allclose(z[n, :, i + 4, j + 4], fitted, atol=1e-4)


def test_triangles_of_k_means_are_those_of_distances_computed_one_by_one(images):
    method = KMeansMaps(6, 5, preprocessing=GREY).fit(images)
    y = method.preprocessing(images)[0].double().numpy()
    W, mean, centroids = (
        t.double().numpy() for t in (method.whitening, method.mean, method.centroids)
    )
    z = method.maps(images).numpy()
    assert 0.2 < (z == 0).mean() < 0.8  # about half of all centroids are farther than the mean
    padded = np.pad(y[:, 0], ((0, 0), (4, 4), (4, 4)), "edge")
    for n, i, j in [(0, 0, 0), (3, 10, 5), (9, 17, 15), (5, 4, 9)]:
        patch = padded[n, i : i + 5, j : j + 5].flatten()
        even = (patch - patch.mean()) / np.sqrt(patch.var() + method.floor)
        x = W @ (even - mean)
        distances = np.array([np.sqrt(np.square(x - c).sum()) for c in centroids])
        expected = np.maximum(0, distances.mean() - distances)
        assert np.allclose(z[n, :, i, j], expected, atol=1e-4)


def test_maps_of_random_patches_are_soft_thresholds_of_products_with_white_patches(images):
    method = RandomPatches(6, 5, preprocessing=GREY).fit(images)
    kmeans = KMeansMaps(6, 5, preprocessing=GREY).fit(images)
    y = method.preprocessing(images)[0]
    patches = draw_patches(y, 5, 50_000, seeded_generator(0, 2)).flatten(1)
    # The same white patches as those of k-means, some of which are the filters.
    assert torch.equal(method._white(patches), kmeans._white(patches))
    similarity = torch.nn.functional.normalize(method._white(patches)) @ method.centroids.T
    assert torch.allclose(similarity.amax(0), torch.ones(6), atol=1e-5)
    z = method.maps(images)
    for n, i, j in [(3, 10, 5), (5, 4, 9)]:
        x = method._white(y[n, 0, i - 4 : i + 1, j - 4 : j + 1].reshape(1, 25))[0].double()
        c = (method.centroids.double() @ x).numpy()
        expected = np.sign(c) * np.maximum(np.abs(c) - 0.25, 0)
        assert np.allclose(z[n, :, i, j], expected, atol=1e-5)


def test_what_k_means_sees_is_white_and_does_not_depend_on_brightness_or_contrast(images):
    method = KMeansMaps(6, 5, preprocessing=GREY).fit(images)
    patches = draw_patches(method.preprocessing(images)[0], 5, 20_000, seeded_generator(9)).flatten(
        1
    )
    before = np.linalg.eigvalsh(np.cov(method._normalised(patches).double().numpy().T))
    after = np.linalg.eigvalsh(np.cov(method._white(patches).double().numpy().T))
    # v / (v + 0.1): the mean of a patch is gone, large variances become 1.
    assert np.allclose(after, before / (before + 0.1), atol=0.05) and after[-1] > 0.9
    strong = patches[patches.var(1) > 20 * method.floor]
    changed = method._normalised(3 * strong + 7)
    assert torch.allclose(changed, method._normalised(strong), rtol=0.03, atol=1e-3)


def test_the_autoencoder_learns_and_every_epoch_paints_the_images_better(images):
    method = Autoencoder(8, 5, epochs=12, batch_size=2, preprocessing=GREY).fit(images)
    assert len(method.history) == 12 and method.history[-1] < 0.5 * method.history[0]
    y = method.preprocessing(images)[0]
    with torch.no_grad():
        error = float((method.model(y) - y).square().mean())
    # Painted by the filters after the last step, so below the mean over the last epoch's batches.
    assert error < 1.1 * method.history[-1] and error < 0.5 * float(y.square().mean())
    assert (method.maps(images) >= 0).all()


def test_the_decoder_puts_every_maximum_back_where_it_was(images):
    """By loops over windows: neither the package's pooling nor its deconvolution."""
    model = WhatWhere(3, 1, 3, 2, seeded_generator(0))
    y = images[:2] - images[:2].mean()
    with torch.no_grad():
        z = model.encode(y)
        pooled, switches = model.pool(z)
        painted = model(y).numpy()
    largest, places = max_pool(z, (1, 2, 2))
    assert torch.equal(pooled, largest)
    assert torch.equal(switches[pooled > 0], places[pooled > 0])
    kept = np.zeros(z.shape, np.float32)
    for n, k, i, j in np.ndindex(2, 3, 8, 7):
        window = z[n, k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].numpy()
        a, b = np.unravel_index(window.argmax(), window.shape)
        kept[n, k, 2 * i + a, 2 * j + b] = window[a, b]
    expected, f = np.zeros((2, 18, 16)), model.down.detach().numpy()
    for n, k, i, j in zip(*np.nonzero(kept), strict=True):
        expected[n, i : i + 3, j : j + 3] += kept[n, k, i, j] * f[k, 0]
    assert np.allclose(painted[:, 0], expected[:, 2:-2, 2:-2], atol=1e-5)
    # All in the first place of its window instead is another image: switches matter.
    forgotten = 4 * (switches // 4)
    with torch.no_grad():
        assert not np.allclose(model.decode(pooled, forgotten, z.shape).numpy(), painted, atol=1e-2)


def test_gradients_of_the_autoencoder_are_those_of_finite_differences():
    model = WhatWhere(2, 1, 3, 2, seeded_generator(1)).double()
    y = torch.randn(1, 1, 6, 5, generator=seeded_generator(2), dtype=torch.float64)

    def loss(*parameters):
        named = dict(zip(("up", "bias", "down"), parameters, strict=True))
        return (torch.func.functional_call(model, named, (y,)) - y).square().sum()

    values = [p.detach().clone().requires_grad_() for p in (model.up, model.bias, model.down)]
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchPCA(26, 5, preprocessing=GREY), "num_maps=26: must be at most 25"),
        (lambda: KMeansMaps(0, 5), "num_maps=0: must be a whole number from 1"),
        (lambda: Autoencoder(4, 5, epochs=0), "epochs=0: must be a whole number from 1"),
        (lambda: Autoencoder(4, 5, rate=0.0), "rate=0.0: must be positive"),
        (lambda: RandomFilters(4, 5, threshold=-1), "threshold=-1: must not be negative"),
        (lambda: SparseMaps(one_layer(2, 3), 2), "layer=2: this network has layers 1 to 1"),
        (lambda: KMeansMaps(4, 5).maps(torch.zeros(1, 1, 9, 9)), "KMeansMaps: has not learned yet"),
        (lambda: PatchPCA(4, 15).fit(torch.zeros(2, 1, 14, 20)), "filter_size=15: .* of 14x20"),
        (lambda: KMeansMaps(4, 5).fit(torch.full((2, 1, 9, 9), 9.0)), "must be in \\[0, 1\\]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_fashion(folder, train=40, test=20):
    """Four classes of 28x28 images, told by the bright quarter; half of the files are gzipped."""
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 4
        images = random.integers(0, 60, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            i, j = 14 * (label // 2), 14 * (label % 2)
            image[i : i + 14, j : j + 14] += 150
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return folder


def run(monkeypatch, capsys, tmp_path, *given):
    monkeypatch.chdir(tmp_path)
    features.main([*map(str, given), "--threads", "1"])
    return capsys.readouterr().out


def test_the_harness_prints_a_row_for_each_method_and_writes_what_it_measured(
    monkeypatch, capsys, tmp_path
):
    write_fashion(tmp_path)
    asked = "--dataset fashion --train 40 --test 20 --maps 4 --size 5 --epochs 1 --repeats 2"
    methods = ["--methods", "pixels", "pca", "random-rectified"]
    out = run(monkeypatch, capsys, tmp_path, *asked.split(), "--root", tmp_path, *methods)
    found = json.loads((tmp_path / "runs/benchmark/features-fashion.json").read_text())
    assert found["train"] == 40 and found["test"] == 20
    results = found["results"]
    assert [len(results[name]) for name in methods[1:]] == [1, 2, 2]
    for name in methods[1:]:
        assert min(run["accuracy"] for run in results[name]) == 1.0
        assert f"| {name} | 100.0%" in out
    assert results["pca"][0]["features"] == 4 * 16
    assert results["pca"][0]["seconds_per_image"] > 0 and results["pixels"][0]["features"] == 784
    assert 0 < results["random-rectified"][0]["density"] < 0.7


def test_images_of_idx_files_are_the_bytes_in_their_order(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5))
    for name in ("a-ubyte", "b.gz"):
        write_idx(tmp_path / name, array)
        assert (features.read_idx(tmp_path / name) == array).all()
    (tmp_path / "cut").write_bytes((tmp_path / "a-ubyte").read_bytes()[:-1])
    for wrong in ("cut", "empty"):
        (tmp_path / "empty").touch()
        with pytest.raises(ValueError, match=f"{wrong}: not an IDX file of bytes, or cut off"):
            features.read_idx(tmp_path / wrong)


def test_what_is_chosen_for_the_classifier_comes_from_the_training_images_alone():
    """A feature that only tells labels after its root is taken asks for the root."""
    random = np.random.default_rng(0)
    labels = np.arange(300) % 3
    known = random.random((300, 6))
    known[np.arange(300), labels] += 0.4
    known = torch.from_numpy(known**14).float()
    chosen = features.choose(known, labels)
    assert chosen["power"] == 0.5 and chosen["c"] in features.C
    assert features.choose(known.clone(), labels) == chosen


def test_the_linear_machine_is_that_of_scikit_learn():
    A = torch.randn(90, 7, generator=seeded_generator(0)) * torch.arange(7) / 3
    labels = np.arange(90) % 3 + 5
    A[:, 2] += torch.from_numpy(labels)
    machine = LinearSVM.fit(A, labels, C=0.3)
    expected = LinearSVC(C=0.3, dual=False, tol=1e-8).fit(A.double().numpy(), labels)
    decisions = (A @ machine.w + machine.b).numpy()
    assert np.allclose(decisions, expected.decision_function(A), atol=2e-3)
    assert machine.score(A, labels) == expected.score(A, labels) > 0.5
    start = LinearSVM.fit(A, labels, C=0.01)
    again = LinearSVM.fit(A, labels, C=0.3, start=start)
    assert torch.allclose(again.w, machine.w, atol=2e-3)


def test_features_are_divided_by_their_maxima_in_training():
    known, unknown = torch.rand(8, 3), torch.rand(4, 3)
    known[:, 1] = 0
    expected = MaxAbsScaler().fit(known.sqrt().numpy())
    found = features.scaled(known.clone(), unknown.clone(), 0.5)
    for part, given in zip(found, (known, unknown), strict=True):
        assert np.allclose(part, expected.transform(given.sqrt().numpy()), rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_signs_have_features_of_their_own_only_where_maps_have_both(images, pooling):
    options = features.arguments(["--grid", "2", "--pooling", pooling, "--split-signs"])
    signed = RandomPatches(6, 5, preprocessing=GREY).fit(images)
    found, density = features.features(signed, images, options)
    z = signed.maps(images)
    cells = grid_features(z, 2, pooling=pooling, split_signs=True)
    assert torch.equal(found, cells) and found.shape == (10, 2 * 6 * 4)
    assert density == pytest.approx(float((z != 0).double().mean()))
    positive = KMeansMaps(6, 5, preprocessing=GREY).fit(images)
    assert features.features(positive, images, options)[0].shape == (10, 6 * 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--methods pca magic", "--methods magic: choose from pixels, deconvnet"),
        ("--train 1", "--train 1: must be at least"),
        ("--steps blur", r"preprocessing.steps=\['blur'\]"),
        ("--device abacus", "device=abacus: no such device"),
        ("--train 1700", "error: test=500: digits has only 97 images"),
        ("--dataset fashion --root nowhere", "error: root=nowhere: no train-images-idx3-ubyte"),
    ],
)
def test_invalid_options_give_a_one_line_error_with_the_valid_ones(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        features.main([*given.split(), "--threads", "1"])
    last = capsys.readouterr().err.strip().splitlines()[-1:]
    assert re.search(message, str(ended.value.code) + " ".join(last))


# Of 400 digits somewhere, by other writers than the 400 that the classifier has seen, filters that
# were learned have 73% right, random ones with the same inference 56% (of the 800 after them, with
# maps nearer the minimum, 87% and 72%).
FLOOR = 0.64


def score(method, images, labels):
    layer = method.net.layer(1).settings
    layer.solver = replace(layer.solver, tolerance=1e-2)
    known = grid_features(method.maps(images), 1).numpy()
    classifier = make_pipeline(
        FunctionTransformer(np.sqrt), MaxAbsScaler(), LogisticRegression(max_iter=500)
    )
    return classifier.fit(known[:400], labels[:400]).score(known[400:], labels[400:])


def test_learned_features_tell_digits_anywhere_and_random_filters_do_not_reach_the_floor():
    images, labels = (array[:800] for array in features.digits(shifted=True))
    plain = PreprocessingSettings(color="grey", steps=[])
    net = one_layer(32, 5, epochs=3, preprocessing=plain)
    learned = score(SparseMaps(net).fit(images[:200]), images, labels)
    random = score(RandomFilters(32, 5, preprocessing=plain).fit(images[:200]), images, labels)
    assert learned > FLOOR > random, (learned, random)
    assert learned > random + 0.1
