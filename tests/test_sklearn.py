"""The transformer: what scikit-learn asks of one, maps and images as the network has them, and
features that are worth something.
"""

import itertools
import pickle
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from deconvnet import (
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    sparse_code,
)
from deconvnet.applications.classification.grid_features import grid_features, num_cells
from deconvnet.network.codes import Codes
from deconvnet.sklearn import DeconvNetTransformer, transformer

QUICK = dict(num_maps=6, filter_size=5, epochs=2)
FEW = LearningSettings(epochs=1)
FEWER = dict(num_maps=3, filter_size=5, epochs=1)


def units(X):
    """Images in units of their own: neither centred nor in [0, 1]."""
    return 40.0 * np.asarray(X, dtype=np.float64) + 300.0


@pytest.fixture(scope="module")
def images(textures):
    return units(textures(12, 1, 16, 14)[:, 0])


@pytest.fixture(scope="module")
def fitted(images):
    return DeconvNetTransformer(**QUICK).fit(images)


@parametrize_with_checks([DeconvNetTransformer(num_maps=3, filter_size=3, epochs=1)])
def test_what_scikit_learn_asks_of_an_estimator_holds(estimator, check):
    check(estimator)


def test_the_package_does_not_import_the_transformer():
    code = "import sys, deconvnet; sys.exit('deconvnet.sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_features_are_the_maps_of_centred_and_scaled_images(fitted, images):
    y = (images - images.mean()) / images.std()
    expected = sparse_code(
        torch.from_numpy(y[:, None]).float(), torch.from_numpy(fitted.filters_), lam=2.0
    )
    features = fitted.transform(images)
    assert features.dtype == np.float32 and 0 < (features != 0).mean() < 0.2
    assert_allclose(features, expected.z.flatten(1).numpy(), atol=1e-3)
    assert fitted.map_shape_ == (6, 20, 18) == tuple(expected.z.shape[1:])
    assert len(fitted.get_feature_names_out()) == features.shape[1]


def test_an_image_has_the_features_alone_that_it_has_among_others(fitted, images):
    together = fitted.transform(images)
    for n in (0, 7):
        assert_allclose(fitted.transform(images[n : n + 1])[0], together[n], atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 14), (1, 16, 14)])
def test_rows_with_an_image_shape_are_the_images(fitted, images, shape):
    rows = images.reshape(12, -1)
    other = DeconvNetTransformer(**QUICK, image_shape=shape).fit(rows)
    expected = fitted.transform(images)
    assert_array_equal(other.transform(rows), expected)
    assert_array_equal(fitted.transform(rows), expected)
    assert_array_equal(fitted.transform(images[:, None]), expected)
    assert other.n_features_in_ == fitted.n_features_in_ == 224


def test_the_units_of_the_images_make_no_difference(fitted, images):
    other = DeconvNetTransformer(**QUICK).fit(-7.0 + 1e-6 * images)
    features, expected = other.transform(-7.0 + 1e-6 * images), fitted.transform(images)
    assert_allclose(features, expected, atol=1e-3)
    back = other.inverse_transform(features)
    assert_allclose((back + 7.0) * 1e6, fitted.inverse_transform(expected), atol=0.1)


def test_filters_are_the_same_for_a_random_state_and_others_for_another(fitted, images):
    again = DeconvNetTransformer(**QUICK).fit(images)
    assert_array_equal(again.filters_, fitted.filters_)
    other = DeconvNetTransformer(**QUICK, random_state=1).fit(images)
    assert np.abs(other.filters_ - fitted.filters_).max() > 0.1


def test_epochs_lower_the_objective(fitted, images):
    assert [stats.epoch for stats in fitted.history_] == [1, 2]
    longer = DeconvNetTransformer(num_maps=6, filter_size=5, epochs=8).fit(images)
    assert longer.history_[-1].objective < 0.98 * fitted.history_[0].objective


def test_a_copy_by_pickle_or_clone_has_the_same_features(fitted, images):
    expected = fitted.transform(images)
    assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(images), expected)
    with_layers = DeconvNetTransformer([LayerSettings(3, 5, learning=FEW)])
    assert_array_equal(
        clone(with_layers).fit_transform(images), with_layers.fit(images).transform(images)
    )


@pytest.mark.parametrize("shape", [(6, 12, 10), (6, 3, 12, 10), (6, 120)])
def test_the_way_back_is_the_image_in_its_shape_and_units_nearer_the_larger_lam(textures, shape):
    channels = 3 if len(shape) == 4 else 1
    X = units(textures(6, channels, 12, 10)).reshape(shape)
    errors = []
    for lam in (1.0, 10.0, 100.0):
        parameters = dict(QUICK, lam=lam, image_shape=(12, 10) if len(shape) == 2 else None)
        model = DeconvNetTransformer(**parameters).fit(X)
        back = model.inverse_transform(model.transform(X))
        assert back.shape == X.shape
        errors.append(np.linalg.norm(back - X) / np.linalg.norm(X - X.mean()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05


def test_two_layers_give_the_maps_of_the_network_and_go_back_through_both(images):
    layers = [LayerSettings(4, 5, learning=FEW), LayerSettings(5, 3, 10.0, learning=FEW)]
    model = DeconvNetTransformer(layers).fit(images)
    net, features = model.net_, model.transform(images)
    y = torch.from_numpy((images - images.mean()) / images.std()).float()[:, None]
    codes = net.infer_next_layer(net.infer_next_layer(Codes((), y, [])))
    assert_allclose(features, codes.layer(2).z.flatten(1).numpy(), atol=1e-3)
    below = codes.layer(1).z.numpy()
    assert float(net.layer(2).scale) == pytest.approx(np.sqrt(np.mean(below**2)), rel=1e-3)
    assert [stats.layer for stats in model.history_] == [1, 2]

    back = model.inverse_transform(features)
    expected = net.synthesize(codes, 2)[:, 0].numpy() * images.std() + images.mean()
    assert_allclose(back, expected, rtol=1e-4)
    assert np.linalg.norm(back - images) < 0.7 * np.linalg.norm(images - images.mean())


def test_where_pooling_has_lost_the_way_back_it_is_refused(fitted, images):
    layers = [LayerSettings(4, 5, pool=[1, 2, 2], learning=FEW), LayerSettings(4, 3, learning=FEW)]
    pooled = DeconvNetTransformer(layers).fit(images)
    with pytest.raises(ValueError, match=r"pool=\[1, 2, 2\] of layer 1: its switches"):
        pooled.inverse_transform(pooled.transform(images))
    # The pooling of the top layer comes after the features.
    top = DeconvNetTransformer(layers[:1]).fit(images)
    assert top.inverse_transform(top.transform(images)).shape == images.shape
    means = clone(fitted).set_params(grid=2).fit(images)
    with pytest.raises(ValueError, match="grid=2: cell means cannot be inverted"):
        means.inverse_transform(means.transform(images))
    with pytest.raises(ValueError, match=r"Z has 4 features, .* have 2160"):
        fitted.inverse_transform(np.zeros((1, 4)))


def test_a_grid_may_change_after_learning_and_gives_the_means_of_the_maps(fitted, images):
    z = np.abs(fitted.transform(images)).reshape(12, *fitted.map_shape_)
    model = pickle.loads(pickle.dumps(fitted)).set_params(grid=(1, 2))
    features = model.transform(images)
    assert features.shape == (12, 6 * 5) and len(model.get_feature_names_out()) == 30
    assert_allclose(features[:, :6], z.mean((2, 3)), rtol=1e-5)
    quarters = [z[:, :, i : i + 10, j : j + 9].mean((2, 3)) for i in (0, 10) for j in (0, 9)]
    assert_allclose(features[:, 6:].reshape(12, 6, 4), np.stack(quarters, 2), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_both_signs_are_pooled_in_cells_of_their_own(fitted, images, pooling):
    z = fitted.transform(images).reshape(12, *fitted.map_shape_)
    model = pickle.loads(pickle.dumps(fitted)).set_params(grid=2, pooling=pooling)
    pool = np.mean if pooling == "mean" else np.max

    def quarters(values):
        cells = [values[:, :, i : i + 10, j : j + 9] for i in (0, 10) for j in (0, 9)]
        return np.stack([pool(cell, axis=(2, 3)) for cell in cells], 2).reshape(12, -1)

    assert_allclose(model.transform(images), quarters(np.abs(z)), rtol=1e-5, atol=1e-9)
    features = model.set_params(split_signs=True).transform(images)
    expected = np.hstack([quarters(np.maximum(sign * z, 0)) for sign in (1, -1)])
    assert_allclose(features, expected, rtol=1e-5, atol=1e-9)
    assert len(model.get_feature_names_out()) == features.shape[1] == 2 * 6 * 4


def test_filters_are_learned_from_a_draw_of_at_most_as_many_images(images):
    some = DeconvNetTransformer(**FEWER, max_images=5, random_state=1).fit(images)
    again = DeconvNetTransformer(**FEWER, max_images=5, random_state=1).fit(images)
    assert_array_equal(some.filters_, again.filters_)
    candidates = itertools.combinations(range(12), 5)
    means = [images[list(chosen)].mean() for chosen in candidates]
    assert (
        np.abs(np.array(means) - some.mean_.item()).min()
        < 1e-9
        < abs(images.mean() - some.mean_.item())
    )
    assert some.transform(images).shape[0] == 12
    everything = [
        DeconvNetTransformer(**FEWER, max_images=most).fit(images).filters_ for most in (None, 12)
    ]
    assert_array_equal(*everything)


def test_cells_are_counted_and_cover_maps_that_they_do_not_divide():
    z = torch.zeros(1, 2, 5, 3)
    z[0, 1, 4, 2] = -6.0
    features = grid_features(z, (1, 2))
    assert num_cells((1, 2)) == 5 and features.shape == (1, 10)
    assert features[0, :2].tolist() == [0.0, pytest.approx(6 / 15)]
    assert features[0, 2:].tolist() == [0] * 7 + [pytest.approx(6 / 6)]
    for grid in (0, (), (2, 0), 1.5, "2"):
        with pytest.raises(ValueError, match="grid=.*: must be a whole number from 1, or several"):
            grid_features(z, grid)
    with pytest.raises(ValueError, match="pooling='sum': choose one of mean, max"):
        grid_features(z, 1, pooling="sum")


@pytest.mark.parametrize(("size", "upright"), [(4, False), (5, True), (7, False)])
def test_signals_have_the_maps_of_filters_of_one_row(size, upright):
    rng = np.random.default_rng(0)
    X = units(np.cumsum(rng.standard_normal((10, 30)), 1))
    given = X[:, :, None] if upright else X
    # Five epochs move filters to the middle of their frame once.
    model = DeconvNetTransformer(num_maps=4, filter_size=size, epochs=5, lam=1.0).fit(given)
    features = model.transform(given)
    f, z = model.filters_.reshape(4, size), features.reshape(10, 4, 30 + size - 1)
    assert model.filters_.shape == ((4, 1, size, 1) if upright else (4, 1, 1, size))
    assert_allclose(np.linalg.norm(f, axis=1), 1, rtol=1e-5)

    painted = np.stack([sum(map(partial(np.convolve, mode="valid"), maps, f)) for maps in z])
    y = (X - X.mean()) / X.std()
    objective = 0.5 * np.square(y - painted).sum() + np.abs(z).sum()
    exact = SolverSettings("coordinate", iterations=2000, gap=1e-4)
    images, filters = torch.from_numpy(y[:, None, None]), torch.from_numpy(f[:, None, None])
    best = sparse_code(images, filters, lam=1.0, settings=exact)
    assert objective == pytest.approx(float(best.objective.sum()), rel=5e-3)

    back = model.inverse_transform(features)
    assert back.shape == given.shape
    assert_allclose(back.reshape(X.shape), painted * X.std() + X.mean(), rtol=1e-4)


def test_planted_filters_of_signals_are_recovered():
    rng = np.random.default_rng(0)
    planted = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 1, -1, 1, -1, 1, 0]]) / [[7**0.5], [5**0.5]]
    z = rng.standard_normal((40, 2, 50)) * (rng.random((40, 2, 50)) < 0.04)
    X = np.stack([sum(map(np.convolve, maps, planted)) for maps in z])
    learned = DeconvNetTransformer(num_maps=3, epochs=12, random_state=1).fit(X).filters_[:, 0, 0]
    for g in planted:
        assert max(np.abs(np.convolve(f, g[::-1])).max() for f in learned) > 0.98


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 1, 1), (4, 6), (4, 3, 3, 5)])
def test_filters_are_at_most_as_large_as_the_image(shape):
    X = np.random.default_rng(0).standard_normal(shape)
    model = DeconvNetTransformer(num_maps=3, epochs=1, lam=1000.0).fit(X)
    sides = {(4, 3, 2): (2, 2), (4, 1, 1): (1, 1), (4, 6): (1, 6), (4, 3, 3, 5): (3, 3)}
    assert model.filters_.shape[2:] == sides[shape]
    assert np.isfinite(model.inverse_transform(model.transform(X))).all()


def test_images_without_anything_have_no_features_and_come_back(images):
    flat = np.full((5, 8, 8), 3.25)
    model = DeconvNetTransformer(**QUICK).fit(flat)
    features = model.transform(flat)
    assert not features.any()
    assert_allclose(model.inverse_transform(features), flat)


def test_preprocessing_is_that_of_the_network(textures):
    X = textures(6, 3, 24, 24).numpy()
    model = DeconvNetTransformer(**QUICK, preprocessing=PreprocessingSettings(color="ycbcr"))
    features = model.fit(X).transform(X)
    codes = model.net_.infer(torch.from_numpy(X))
    assert_allclose(features, codes.layer(1).z.flatten(1).numpy(), atol=1e-4)
    painted = model.net_.synthesize(codes, 1) * model.net_.preprocessing.scale
    assert_allclose(model.inverse_transform(features), painted.numpy(), atol=1e-4)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        model.transform(255 * X)


def test_colour_that_turns_grey_comes_back_as_one_plane(textures):
    X = textures(4, 3, 12, 12).numpy()
    grey = PreprocessingSettings(color="grey", steps=["mean"])
    model = DeconvNetTransformer(**QUICK, preprocessing=grey)
    assert model.fit(X).inverse_transform(model.transform(X)).shape == (4, 1, 12, 12)
    model.set_params(image_shape=(3, 12, 12)).fit(X.reshape(4, -1))
    assert model.inverse_transform(model.transform(X)).shape == (4, 144)


def test_labels_choose_the_number_of_maps():
    X, labels = load_digits(n_class=3, return_X_y=True)
    X, labels = X[:60], labels[:60]
    search = GridSearchCV(
        make_pipeline(
            DeconvNetTransformer(filter_size=3, epochs=1, image_shape=(8, 8), grid=3),
            MaxAbsScaler(),
            LogisticRegression(),
        ),
        {"deconvnettransformer__num_maps": np.array([1, 8])},
        cv=2,
    )
    search.fit(X, labels)
    assert search.best_params_ == {"deconvnettransformer__num_maps": 8}
    assert cross_val_score(search.best_estimator_, X, labels, cv=3).mean() > 0.9


def test_a_frame_of_pandas_goes_in_and_comes_out(images):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(images.reshape(12, -1)).add_prefix("pixel")
    model = DeconvNetTransformer(**QUICK, image_shape=(16, 14), grid=1)
    features = model.set_output(transform="pandas").fit_transform(frame)
    assert list(features.columns) == [f"deconvnettransformer{n}" for n in range(6)]
    assert list(model.feature_names_in_) == list(frame.columns)


@pytest.fixture(scope="module")
def shifted():
    """300 digits of 8x8, shuffled, each at a random place of 13x13 pixels, and their labels."""
    rng = np.random.RandomState(0)
    digits, labels = load_digits(return_X_y=True)
    chosen = rng.permutation(len(digits))[:300]
    X = np.zeros((300, 13, 13))
    for image, digit, (i, j) in zip(X, digits[chosen], rng.randint(0, 6, (300, 2)), strict=True):
        image[i : i + 8, j : j + 8] = digit.reshape(8, 8)
    return X, labels[chosen]


def test_what_digits_are_is_in_their_maps_and_less_in_those_of_random_filters(shifted):
    X, labels = shifted
    model = DeconvNetTransformer(filter_size=5, epochs=3, grid=1).fit(X[:100])

    def score(features):
        classifier = make_pipeline(
            FunctionTransformer(np.sqrt), MaxAbsScaler(), LogisticRegression(max_iter=300)
        )
        return classifier.fit(features[:200], labels[:200]).score(features[200:], labels[200:])

    learned = score(model.transform(X))
    layer = model.net_.layer(1)
    noise = torch.randn(layer.filters.shape, generator=torch.Generator().manual_seed(0))
    layer.set_filters(noise)
    random, pixels = score(model.transform(X)), score(X.reshape(300, -1))
    assert learned > random + 0.05 and learned > pixels + 0.4, (learned, random, pixels)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_maps=0), "num_maps=0: must be a whole number from 1"),
        (dict(filter_size=2.5), "filter_size=2.5: must be a whole number"),
        (dict(epochs="3"), "epochs='3': must be a whole number"),
        (dict(batch_size=0), "batch_size=0: must be a whole number"),
        (dict(lam=-1.0), "lam=-1.0: must be positive"),
        (dict(lam="high"), "lam='high': must be a positive number"),
        (dict(grid=0), "grid=0: must be a whole number from 1"),
        (dict(grid=2, pooling="sum"), "pooling='sum': choose one of mean, max"),
        (dict(pooling="max"), "pooling=max: needs a grid"),
        (dict(split_signs=True), "split_signs=True: needs a grid"),
        (dict(max_images=0), "max_images=0: must be a whole number from 1, or None"),
        (dict(layers=[]), r"layers=\[\]: must be a list of LayerSettings, at least one"),
        (dict(layers=[7]), r"layers=\[7\]: must be a list of LayerSettings"),
        (dict(image_shape=16), r"image_shape=16: must be \(H, W\) or \(C, H, W\)"),
        (dict(image_shape=(14, 16)), r"image_shape=\(14, 16\): X has images of \(16, 14\)"),
        (dict(device="abacus"), "device=abacus: no such device"),
        (dict(preprocessing="contrast"), "preprocessing='contrast': must be None or Prep"),
        (dict(preprocessing=PreprocessingSettings()), "color=rgb: X has one channel; use grey"),
        (dict(layers=[LayerSettings(2, 15)]), "smaller than the 15x15 filters of layer 1"),
    ],
)
def test_wrong_settings_are_refused_by_name(images, wrong, message):
    with pytest.raises(ValueError, match=message):
        DeconvNetTransformer(**{**QUICK, **wrong}).fit(images)


def test_images_of_another_shape_are_refused(fitted, images):
    with pytest.raises(ValueError, match=r"images of \(14, 16\), but fit had"):
        fitted.transform(images.transpose(0, 2, 1))
    with pytest.raises(ValueError, match=r"images of \(16, 14, 3\): the number of channels comes"):
        DeconvNetTransformer().fit(np.stack([images] * 3, -1))
    with pytest.raises(ValueError, match=r"images of \(2, 16, 14\): .*must be 1 or 3"):
        grey = PreprocessingSettings("grey")
        DeconvNetTransformer(preprocessing=grey).fit(np.stack([images] * 2, 1))
    with pytest.raises(
        ValueError, match=r"image_shape=\(16, 15\): X has rows of 224 numbers, not 240"
    ):
        DeconvNetTransformer(image_shape=(16, 15)).fit(images.reshape(12, -1))


def test_rows_that_may_be_square_images_are_taken_for_signals_with_a_warning(images, caplog):
    transformer._warn_of_rows_of_images.cache_clear()
    rows = images[:, :8, :8].reshape(12, 64)
    signals = DeconvNetTransformer(num_maps=2, filter_size=3, epochs=1)
    signals.fit(rows)
    assert signals.image_shape_ == (1, 1, 64)
    assert caplog.messages == [
        "X has rows of 64 numbers, taken for signals: if they are images, give "
        "image_shape=(8, 8); image_shape=(1, 64) says that they are signals"
    ]
    caplog.clear()
    signals.set_params(image_shape=(1, 64)).fit(rows)
    DeconvNetTransformer(num_maps=2, filter_size=3, epochs=1).fit(rows[:, :60])
    assert not caplog.messages
