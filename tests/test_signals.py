"""Signals: the convention, atoms of rank 1 and tapered ones, events, epochs and long recordings."""

import pickle

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.utils.estimator_checks import estimator_checks_generator

from deconvnet import LearningSettings, SolverSettings, learn_filters, learn_online, sparse_code
from deconvnet.filters.constraint import FilterConstraint, taper_window
from deconvnet.filters.statistics import FilterStatistics, gram_product
from deconvnet.filters.update import update_filters
from deconvnet.operators.convolution import deconvolve
from deconvnet.recordings import code_recording, windows
from deconvnet.signals import as_images, as_signals, epochs, factors
from deconvnet.sklearn import DeconvNetTransformer, SignalDictionary

EXACT = SolverSettings("coordinate", iterations=3000, gap=1e-6)
C, L, T = 2, 12, 700


@pytest.fixture(scope="module")
def planted():
    """Atoms (3, C, L) of rank 1, amplitudes >= 0 of them, and the signals (2, C, T) of these."""
    generator = torch.Generator().manual_seed(0)
    time = torch.stack([torch.hann_window(L) * torch.sin(s * torch.arange(L)) for s in (0.6, 1, 2)])
    space = torch.randn(3, C, generator=generator)
    atoms = space[:, :, None] * time[:, None]
    atoms /= atoms.flatten(1).norm(dim=1)[:, None, None]
    z = torch.rand(2, 3, 1, T + L - 1, generator=generator)
    z = torch.where(z > 0.98, 50 * (z - 0.96), torch.zeros_like(z))
    noise = 0.02 * torch.randn(2, C, T, generator=generator)
    return atoms, z, as_signals(deconvolve(z, as_images(atoms))) + noise


@pytest.fixture(scope="module")
def code(planted):
    atoms, _, signals = planted
    return sparse_code(as_images(signals[:1]), as_images(atoms), lam=4.0, settings=EXACT)


def similarity(atoms, filters):
    """The largest correlation of each atom with a filter, over all shifts."""
    found = torch.nn.functional.conv2d(as_images(atoms), filters, padding=(0, L - 1))
    return found.abs().amax((2, 3)).amax(1)


def test_planted_atoms_of_rank_1_are_recovered(planted):
    atoms, _, signals = planted
    learning = LearningSettings(epochs=25, batch_size=2, rank1=True)
    learned = learn_filters(
        as_images(signals), 4, (1, L), lam_ratio=0.05, non_negative=True, learning=learning
    )
    assert similarity(atoms, learned.filters).min() > 0.98
    singular = torch.linalg.svdvals(as_signals(learned.filters))
    assert singular[:, 1].max() < 1e-5
    u, v = factors(learned.filters)
    assert_allclose(u[:, :, None] * v[:, None], as_signals(learned.filters), atol=1e-6)
    assert_allclose(u.norm(dim=1), 1, rtol=1e-5)
    assert (u.gather(1, u.abs().argmax(1, keepdim=True)) > 0).all()
    assert learned.encode(as_images(signals)).z.min() >= 0


@pytest.mark.parametrize("zero_mean", [False, True])
def test_the_nearest_filter_of_rank_1_is_that_of_a_search_over_all_directions(zero_mean):
    f = torch.randn(5, 2, 1, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = FilterConstraint(rank1=True, zero_mean=zero_mean).project(f)
    angle = torch.linspace(0, np.pi, 20001, dtype=torch.float64)
    # For each direction in space, the best pattern in time is the product with the filter.
    g = f - f.mean(3, keepdim=True) if zero_mean else f
    space = torch.stack([angle.cos(), angle.sin()])
    best = torch.einsum("kct,ca->kat", g[:, :, 0], space).norm(dim=2).amax(1)
    assert_allclose((found * f).sum((1, 2, 3)), best, rtol=1e-7)
    assert torch.linalg.matrix_rank(found[:, :, 0], atol=1e-9).tolist() == [1] * 5
    assert_allclose(found.square().sum((1, 2, 3)), 1)


def test_a_tapered_filter_is_the_nearest_one_and_falls_to_zero(planted):
    generator = torch.Generator().manual_seed(2)
    f = torch.randn(3, 2, 1, 16, generator=generator, dtype=torch.float64)
    t = taper_window(0.25, (1, 16))
    assert_allclose(t[0, :5], np.sin(np.pi / 10 * np.array([1, 2, 3, 4, 5])) ** 2)
    assert_allclose(t, t.flip(1))
    for options in ({}, dict(zero_mean=True), dict(rank1=True), dict(rank1=True, zero_mean=True)):
        constraint = FilterConstraint(taper=0.25, **options)
        found = constraint.project(f)
        assert_allclose((found / t).square().sum((1, 2, 3)), 1)
        assert_allclose(constraint.project(found), found, atol=1e-12)
        distance = ((found - f) / t).square().sum((1, 2, 3))
        for _ in range(50):
            near = found + 0.02 * t * torch.randn(f.shape, generator=generator, dtype=f.dtype)
            near = constraint.project(near)
            assert (((near - f) / t).square().sum((1, 2, 3)) >= distance - 1e-9).all()
    parallel = (t.square() * torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)).expand(3, -1, -1, -1)
    for dtype in (torch.float32, torch.float64):
        # Nothing but rounding errors is left of a multiple of t^2.
        assert not FilterConstraint(taper=0.25, zero_mean=True).project(parallel.to(dtype)).any()
    signals = as_images(planted[2])
    learning = LearningSettings(epochs=5, batch_size=2, taper=0.4)
    ends = learn_filters(signals, 3, (1, L), lam_ratio=0.1, learning=learning).filters
    assert ends[..., [0, -1]].abs().max() < 0.1 * ends.abs().max()


def test_the_update_lowers_the_cost_within_a_taper():
    generator = torch.Generator().manual_seed(3)
    f = torch.randn(3, 2, 1, 6, generator=generator, dtype=torch.float64)
    maps = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    gram = torch.stack(
        [
            torch.stack([(maps[k, 5:45] * maps[j, 5 + s : 45 + s]).sum() for s in range(-5, 6)])
            for k in range(3)
            for j in range(3)
        ]
    ).view(3, 3, 1, 11)
    gram = (gram + gram.transpose(0, 1).flip(3)) / 2
    gram[range(3), range(3), 0, 5] += 200
    sums = FilterStatistics(10 * torch.randn(f.shape, generator=generator, dtype=f.dtype), gram)
    constraint = FilterConstraint(taper=0.3)

    def cost(g):
        return float((g * (0.5 * gram_product(gram, (1, 6))(g) - sums.linear)).sum())

    start = constraint.project(f)
    few, many = (update_filters(start, sums, constraint, iterations=n) for n in (3, 300))
    assert cost(many) <= cost(few) < cost(start)
    # At the minimum no filter of the set nearby is better.
    t = constraint.window(f)
    for _ in range(100):
        near = many + 1e-3 * t * torch.randn(f.shape, generator=generator, dtype=f.dtype)
        assert cost(constraint.project(near)) > cost(many) - 1e-9


def test_events_of_signals_are_times_of_atoms_and_epochs_are_cut_around_them(planted, code):
    signals = planted[2][:1]
    events = code.events()
    at = events.corners()[:, 1]
    cut = epochs(signals, events, before=3, after=L)
    assert cut.shape == (len(events), C, 3 + L)
    for m in (0, len(events) // 2, len(events) - 1):
        for time in range(-3, L):
            where = int(at[m]) + time
            if 0 <= where < T:
                assert torch.equal(cut[m, :, 3 + time], signals[0, :, where])
            else:
                assert cut[m, :, 3 + time].isnan().all()
    assert len(epochs(signals, events[:0], before=0, after=5)) == 0


class Watched:
    """A recording that notes how much of it is read at once."""

    def __init__(self, array):
        self.array, self.shape, self.most = array, array.shape, 0

    def __getitem__(self, index):
        piece = self.array[index]
        self.most = max(self.most, piece.shape[1])
        return piece


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("chunk", [50, 333])
def test_a_recording_in_pieces_has_the_code_of_the_whole(planted, code, chunk, non_negative):
    atoms, _, signals = planted
    recording = Watched(signals[0].numpy())
    if non_negative:
        images, filters = as_images(signals[:1]), as_images(atoms)
        code = sparse_code(images, filters, lam=4.0, settings=EXACT, non_negative=True)
    found = code_recording(
        recording,
        as_images(atoms),
        lam=4.0,
        settings=EXACT,
        chunk=chunk,
        ahead=60,
        non_negative=non_negative,
    )
    assert found.objective == pytest.approx(float(code.objective), rel=1e-5)
    assert 0 <= found.gap < 1e-4 * found.objective
    assert_allclose(found.events.maps(), code.z, atol=1e-3)
    assert found.events.shape == tuple(code.z.shape) and recording.most <= chunk + 60 + 2 * L
    expected = code.events()
    assert torch.equal(found.events.column, expected.column)


@pytest.mark.parametrize("group", [1, 3])
def test_a_recording_with_holes_has_the_code_of_the_whole_for_every_prior(planted, group):
    atoms, _, signals = planted
    y, f = signals[0].clone(), as_images(atoms)
    mask = torch.ones(1, T)
    mask[:, 200:290], mask[:, 400:450] = 0, 0.5
    y[:, 200:290] = torch.nan
    weights = torch.tensor([1.0, 1.0, 1.0] if group == 3 else [1.0, 2.0, 0.5])
    settings = SolverSettings("coordinate", iterations=500, gap=1e-5)
    options = dict(weights=weights, group=group, non_negative=group == 1, settings=settings)
    whole = sparse_code(as_images(y[None]), f, lam_ratio=0.05, mask=mask[None, None], **options)
    found = code_recording(y, f, lam_ratio=0.05, mask=mask, chunk=150, ahead=60, **options)
    assert found.lam == pytest.approx(whole.lam, rel=1e-5)
    assert found.objective == pytest.approx(float(whole.objective), rel=3e-5)
    assert 0 <= found.gap < 1e-4 * found.objective
    assert_allclose(found.events.maps(), whole.z, atol=0.02)


def test_the_code_of_a_recording_in_pieces_is_no_worse_than_that_of_the_whole_for_p_below_1(
    planted,
):
    atoms, _, signals = planted
    f = as_images(atoms)
    for p in (0.0, 0.5):
        options = dict(lam=20.0, p=p, settings=SolverSettings("coordinate", iterations=50))
        whole = sparse_code(as_images(signals[:1]), f, **options)
        found = code_recording(signals[0], f, chunk=100, ahead=60, **options)
        assert found.objective < 1.03 * float(whole.objective)
        assert found.gap is None and "above the minimum" not in str(found)
        z = found.events.maps()
        residual = as_images(signals[:1]) - deconvolve(z, f)
        value = 10 * residual.square().sum() + (z[z != 0].abs() ** p).sum()
        assert found.objective == pytest.approx(float(value), rel=1e-5)


def test_the_gap_of_a_recording_in_pieces_bounds_what_the_junctions_cost(planted):
    atoms, _, signals = planted
    settings = SolverSettings("fista", iterations=3)
    filters = as_images(atoms)
    rough = code_recording(signals[0], filters, lam=4.0, settings=settings, chunk=100, ahead=1)
    best = sparse_code(as_images(signals[:1]), filters, lam=4.0, settings=EXACT)
    above = rough.objective - float(best.objective)
    assert 1e-3 * rough.objective < above <= rough.gap
    z = rough.events.maps()
    residual = as_images(signals[:1]) - deconvolve(z, filters)
    assert rough.objective == pytest.approx(
        float(2.0 * residual.square().sum() + z.abs().sum()), rel=1e-5
    )


def test_atoms_are_learned_from_windows_of_a_recording(planted):
    atoms, _, signals = planted
    recording = (1000 * signals[0]).round().short().numpy()
    batches = list(windows(recording, 200, count=5, batch_size=2))
    assert [tuple(batch.shape) for batch in batches] == [(2, C, 1, 200)] * 2 + [(1, C, 1, 200)]
    again = list(windows(recording, 200, count=5, batch_size=2))
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))
    assert any((recording[:, i : i + 200] == batches[0][0, :, 0].numpy()).all() for i in range(T))
    mask = np.ones((1, T))
    mask[:, ::3] = 0
    masked = next(windows(recording, 200, count=5, batch_size=2, mask=mask))
    assert masked[1].shape == batches[0].shape
    assert torch.equal(masked[0], batches[0] * masked[1]) and 0.6 < masked[1].mean() < 0.7
    learned = learn_online(
        windows(recording, 200, count=120), 4, (1, L), lam_ratio=0.1, non_negative=True
    )
    assert similarity(atoms, learned.filters).mean() > 0.9


def test_the_transformer_takes_signals_of_several_channels(planted):
    rows = np.tile(planted[2].numpy().reshape(2, -1), (2, 1))
    model = DeconvNetTransformer(
        num_maps=3, filter_size=(1, L), epochs=1, image_shape=(C, 1, T), device="cpu"
    ).fit(rows)
    assert model.filters_.shape == (3, C, 1, L) and model.map_shape_ == (3, 1, T + L - 1)
    back = model.inverse_transform(model.transform(rows))
    assert np.linalg.norm(back - rows) < 0.7 * np.linalg.norm(rows)


SMALL = SignalDictionary(num_maps=1, filter_size=2, lam_ratio=0.9, epochs=1, device="cpu")
# Of the checks of scikit-learn (all hold) those of input and output; the others take two seconds.
CHECKS = [
    "check_n_features_in",
    "check_dtype_object",
    "check_transformer_data_not_an_array",
    "check_transformer_general",
    "check_transformer_get_feature_names_out",
    "check_transformer_preserve_dtypes",
]


@pytest.mark.parametrize("name", CHECKS)
def test_a_dictionary_is_a_transformer_of_scikit_learn(name):
    for estimator, check in estimator_checks_generator(SMALL):
        if check.func.__name__ == name:
            check(estimator)


def test_a_dictionary_finds_the_activations_of_the_learner_in_signals_of_any_units(planted):
    atoms, _, signals = planted
    X = 1e-6 * signals.numpy().astype(np.float64) + np.array([[3.0], [-1.0]])
    model = SignalDictionary(
        4, L, lam_ratio=0.05, rank1=True, taper=0.2, epochs=25, batch_size=2, device="cpu"
    ).fit(X)
    assert model.atoms_.shape == (4, C, L) and model.map_shape_ == (4, T + L - 1)
    assert similarity(atoms, as_images(model.atoms_)).min() > 0.95
    assert_allclose(model.u_[:, :, None] * model.v_[:, None], model.atoms_, atol=1e-6)
    Z = model.transform(X)
    y = torch.from_numpy((X - X.mean((0, 2))[:, None]) / model.scale_).float()
    expected = sparse_code(
        as_images(y), as_images(model.atoms_), lam=model.learned_.settings.lam, non_negative=True
    )
    assert_allclose(Z, expected.z.flatten(1), atol=1e-4)
    assert len(model.encode(X).events()) == (Z != 0).sum() and Z.min() == 0
    back = model.inverse_transform(Z)
    assert back.shape == X.shape
    assert np.linalg.norm(back - X) < 0.3 * np.linalg.norm(X - X.mean((0, 2))[:, None])
    same = pickle.loads(pickle.dumps(model)).set_params(intervals=3)
    parts = np.split(Z.reshape(2, 4, -1)[..., : 3 * ((T + L - 1) // 3)], 3, axis=2)
    assert_allclose(same.transform(X)[:, 1::3], parts[1].mean(2), atol=2e-3)
    assert len(same.get_feature_names_out()) == 12
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(ValueError, match="intervals=3: means cannot be inverted"):
        same.inverse_transform(Z)
    with pytest.raises(ValueError, match=r"X has trials of \(1400,\), but fit had \(2, 700\)"):
        model.transform(X.reshape(2, -1))


def test_wrong_arguments_are_refused_in_one_line(planted, code):
    atoms, _, signals = planted
    f, y = as_images(atoms), signals[0]
    events = code.events()
    for call, message in (
        (lambda: as_images(y), r"shape \(N, C, T\).* got \(2, 700\): use signals\[:, None\]"),
        (lambda: as_images([y]), "a list of 1 tensors of .*: torch.stack"),
        (lambda: as_images([y.numpy()]), r"a list of 1 ndarray: use np.stack\(signals\)"),
        (lambda: as_images(y.tolist()), r"a list of 2 list: use np.array\(signals\)"),
        (
            lambda: learn_filters(signals, 2, (1, 5), lam=1.0),
            r"or images\[:, :, None\] for signals",
        ),
        (lambda: LearningSettings(taper="hann"), "learning.taper='hann': must be a number"),
        (lambda: LearningSettings(rank1="yes"), "learning.rank1='yes': must be True or False"),
        (lambda: as_images(y[0]), r"use signals\[None, None\]"),
        (lambda: as_signals(torch.zeros(1, 2, 3, 4)), "must have one row"),
        (lambda: epochs(signals, events, before=1, after=5), "must be those of signals"),
        (
            lambda: epochs(signals[:1], events, before=-1, after=5),
            "before=-1: must be a whole number from 0",
        ),
        (lambda: epochs(signals[:1], events.value, before=0, after=5), "events=.*must be Events"),
        (lambda: factors(atoms), r"filters must have one row, \(K, C, 1, L\)"),
        (lambda: epochs(signals[:1], events, before=0, after=0), "after=0: must be"),
        (lambda: next(windows(y, 701, count=1)), "length=701: the recording has 700 times"),
        (lambda: next(windows(signals, 5, count=1)), r"shape \(C, T\)"),
        (lambda: code_recording(y, f, lam=0.0), "lam=0.0: must be positive"),
        (lambda: code_recording(y, f), "lam=None, lam_ratio=None: give one of the two"),
        (lambda: code_recording(y, f, lam_ratio=1.5), r"lam_ratio=1.5: must lie in \(0, 1\]"),
        (
            lambda: code_recording(y, f, lam=1.0, mask=y[:, 1:]),
            r"mask of shape \(2, 699\) does not",
        ),
        (lambda: code_recording(y, f, lam=1.0, mask=-y.abs()), "mask: times 0 to 0 have values"),
        (lambda: code_recording(y, f, lam=1.0, weights=[1.0]), r"expected \(3,\), one for each"),
        (lambda: code_recording(y, f, lam=1.0, group=2), "group=2: must divide the 3 maps"),
        (lambda: code_recording(y, f, lam_ratio=0.1, p=0.5), "p=0.5: only the prior with p=1"),
        (lambda: code_recording(y, f, lam=1.0, p=0.5, settings=EXACT), "only a minimum for p=1"),
        (lambda: code_recording(y, f, lam=1.0, chunk=20), "chunk=20: must be at least twice"),
        (lambda: code_recording(y, f[:, :1], lam=1.0), r"\(K, 2, h, w\)"),
        (lambda: code_recording(y[:, :5], f, lam=1.0), "recording of 5 times"),
        (lambda: code_recording(y * float("nan"), f, lam=1.0), "times 0 to 0 have NaN"),
        (lambda: SMALL.fit(signals[None]), r"X of the shape .*: must be \(N, C, T\), trials"),
        (lambda: SignalDictionary(filter_size=0).fit(signals), "filter_size=0: must be at least 1"),
        (lambda: SignalDictionary(num_maps=0.5).fit(signals), "num_maps=0.5: must be a whole"),
        (lambda: SignalDictionary(intervals=0).fit(signals), "intervals=0: must be at least 1"),
        (lambda: SignalDictionary(lam_ratio=2).fit(signals), r"lam_ratio=2: must lie in \(0, 1"),
        (lambda: SignalDictionary(taper=0.7).fit(signals), "taper=0.7: must lie between 0"),
        (lambda: LearningSettings(rank1=True, non_negative=True), "learning.rank1=True: not with"),
        (lambda: LearningSettings(rank1=True, norm="plane"), "rank1=True: not with norm=plane"),
        (lambda: LearningSettings(taper=0.6), "learning.taper=0.6: must lie between 0 and 0.5"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
