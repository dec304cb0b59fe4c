"""Dictionary learning without a network: streams of batches, encoding, files and refusals."""

import dataclasses
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    Learned,
    LearningSettings,
    SolverSettings,
    learn_filters,
    learn_online,
    load,
    sparse_code,
)
from deconvnet.filters.update import Diverged
from deconvnet.network.layer import Layer, LayerSettings
from deconvnet.operators.convolution import deconvolve
from deconvnet.operators.linear import Deconvolution
from deconvnet.sparse_coding.solve import lam_from_ratio
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import save_network
from deconvnet.support.seeding import seeded_generator


@pytest.fixture
def images(textures):
    y = textures(8, 1, 24, 24)
    return y - y.mean((1, 2, 3), keepdim=True)


def test_learning_from_a_stream_lowers_the_objective_of_unseen_images(images):
    stream = [images[n : n + 2] for n in (0, 2, 4)] * 4
    first = learn_online(stream[:1], 6, filter_size=5, lam=5.0)
    learned = learn_online(iter(stream), 6, filter_size=5, lam=5.0)
    assert len(learned.history) == 12
    unseen = images[6:]
    assert learned.encode(unseen).objective.sum() < 0.99 * first.encode(unseen).objective.sum()
    lengths = torch.linalg.vector_norm(learned.filters, dim=(1, 2, 3))
    assert_close(lengths, torch.ones(6))


def test_encode_uses_the_lam_and_the_prior_of_the_learning(images):
    quick = LearningSettings(epochs=1)
    prior = dict(boundary="circular", non_negative=True, group=2)
    learned = learn_filters(images, 4, filter_size=3, lam=3.0, learning=quick, **prior)
    expected = sparse_code(images, learned.filters, lam=3.0, **prior)
    solution = learned.encode(images)
    assert torch.equal(solution.z, expected.z) and solution.lam == 3.0
    assert (solution.z >= 0).all()


def test_a_lam_ratio_refers_to_the_initial_filters(images):
    layer = Layer(LayerSettings(4, 5), 1, seeded_generator(0, 1))
    layer.initialize(images, seeded_generator(0, 1, 1))
    learned = learn_online([images], 4, filter_size=5, lam_ratio=0.25)
    expected = lam_from_ratio(layer.operator(), images, 0.25)
    assert learned.settings.lam == pytest.approx(expected, rel=1e-5)


def test_the_objective_falls_if_updates_see_all_images_and_visits_come_close_to_the_minimum(caplog):
    learning = LearningSettings(epochs=8, batch_size=None, reinit_unused=False, recenter=False)
    precise = SolverSettings("admm", training_iterations=50)
    for seed, lam in ((0, 0.5), (1, 10.0)):
        noise = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
        y = 3 * F.avg_pool2d(noise, 3, 1, 1)
        for solver in (None, precise):
            learned = learn_filters(y, 8, 5, lam=lam, solver=solver, learning=learning)
            costs = torch.tensor([epoch.objective for epoch in learned.history])
            assert (costs[1:] <= (1 + 1e-4) * costs[:-1]).all(), (seed, lam, solver, costs)
        assert not caplog.records
        rough = learn_filters(y, 8, 5, lam=lam, solver=SolverSettings("admm"), learning=learning)
        # Five iterations are enough for the denser codes alone.
        assert len(caplog.records) == (lam == 0.5), (seed, lam)
        if lam == 0.5:
            # The reason: its maps are not those of the minimum for its filters.
            assert rough.history[-1].objective > 1.1 * rough.encode(y).objective.mean()
            assert "5 iterations of ADMM a visit are too few" in caplog.messages[0]
            assert "training_iterations=50 or more, or method coordinate" in caplog.messages[0]
        caplog.clear()


def test_shifted_and_replaced_filters_may_raise_the_objective_without_a_warning(images, caplog):
    solver = SolverSettings("admm", training_iterations=50)
    learning = LearningSettings(epochs=9, batch_size=None)
    learned = learn_filters(images, 8, 7, lam=20.0, solver=solver, learning=learning)
    costs = [epoch.objective for epoch in learned.history]
    assert any(b > 1.001 * a for a, b in zip(costs, costs[1:], strict=False))
    assert not caplog.records


def test_reinitialised_filters_keep_the_norm_of_the_settings(images):
    color = images.repeat(1, 2, 1, 1)
    # So sparse that most filters stay unused.
    planes = LearningSettings(norm="plane")
    learned = learn_online([color] * 3, 12, filter_size=5, lam_ratio=0.9, learning=planes)
    assert learned.history[-1].dead > 0
    lengths = torch.linalg.vector_norm(learned.filters, dim=(2, 3))
    assert_close(lengths, torch.ones(12, 2))


@pytest.mark.parametrize("learn", [learn_filters, lambda y, *a, **k: learn_online([y], *a, **k)])
def test_contradicting_settings_are_refused_before_anything_is_learned(images, learn):
    with pytest.raises(ValueError, match="lam_ratio=None: give one of the two"):
        learn(images, 4, filter_size=5)
    with pytest.raises(ValueError, match="lam_max_quantile=0.5: needs lam_ratio instead of lam"):
        learn(images, 4, filter_size=5, lam=1.0, lam_max_quantile=0.5)
    with pytest.raises(ValueError, match="learning.zero_mean=True: filter_size=1"):
        learn(images, 4, filter_size=1, lam=1.0, learning=LearningSettings(zero_mean=True))
    with pytest.raises(ValueError, match="solver.gap=0.1: needs p=1"):
        learn(images, 4, filter_size=5, lam=1.0, p=0.5, solver=SolverSettings(gap=0.1))
    with pytest.raises(ValueError, match="group=3: must divide"):
        learn(images, 4, filter_size=5, lam=1.0, group=3)


def test_a_stream_is_refused_without_batches_or_with_one_that_is_not_finite(images):
    with pytest.raises(ValueError, match="batches: there are none"):
        learn_online([], 4, filter_size=5, lam=1.0)
    with pytest.raises(ValueError, match="batch 2: must be finite"):
        learn_online([images, images * float("nan")], 4, filter_size=5, lam=1.0)
    with pytest.raises(ValueError, match="averaging_batches=0: must be at least 1 batch"):
        learn_online([images], 4, filter_size=5, lam=1.0, averaging_batches=0)


def test_filters_that_require_gradients_code_images_as_others_do(images):
    f = learn_online([images], 4, filter_size=5, lam=3.0).filters
    expected = sparse_code(images, f, lam=3.0).z
    assert torch.equal(sparse_code(images, torch.nn.Parameter(f), lam=3.0).z, expected)


def test_images_of_whole_numbers_and_of_half_precision_are_refused_by_name(images):
    for given, name in ((images.int(), "int32"), (images.half(), "float16")):
        with pytest.raises(
            ValueError, match=f"images must be float32 or float64, got torch.{name}"
        ):
            sparse_code(given, torch.ones(4, 1, 5, 5), lam=1.0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have(images):
    from deconvnet.support import thread_pool

    thread_pool._pool(1).submit(int).result()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        thread_pool._pool(1).submit(int).result()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def planted(seed):
    """(images (24, 1, 32, 32), the four 5x5 filters of which they are sparse sums)."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(4, 1, 5, 5, generator=generator)
    f = f / torch.linalg.vector_norm(f, dim=(2, 3), keepdim=True)
    strength = torch.randn(24, 4, 32, 32, generator=generator)
    where = torch.rand(24, 4, 32, 32, generator=generator) < 0.02
    y = deconvolve(strength * where, f, boundary="circular")
    return y + 0.01 * torch.randn(y.shape, generator=generator), f


def worst_match(f, learned):
    """The correlation of each planted filter with the best learned one: the worst of these."""
    return float(F.conv2d(F.pad(learned, (4,) * 4), f).abs().amax((2, 3)).amax(0).min())


def test_a_stream_recovers_planted_filters_that_start_off_centre():
    images, f = planted(100)
    prior = dict(lam_ratio=0.1, boundary="circular")
    stream = images.split(4) * 7
    centred = learn_online(iter(stream), 4, filter_size=7, **prior)
    fixed_frame = LearningSettings(recenter=False)
    fixed = learn_online(stream, 4, filter_size=7, **prior, learning=fixed_frame)
    assert worst_match(f, centred.filters) > 0.99 > 0.95 > worst_match(f, fixed.filters)
    assert centred.history[-1].objective < 0.9 * fixed.history[-1].objective


def learners(images):
    return {
        "images": lambda *a, **k: learn_filters(images, *a, **k),
        "stream": lambda *a, **k: learn_online(images.split(2), *a, **k),
    }


@pytest.mark.parametrize("learner", ["images", "stream"])
def test_learning_starts_from_given_filters(images, learner):
    learn, quick = learners(images)[learner], LearningSettings(epochs=1)
    before = learn_filters(images, 4, filter_size=5, lam=5.0, learning=LearningSettings(epochs=6))
    fresh = learn(4, filter_size=5, lam=5.0, learning=quick)
    more = learn(filters=before.filters, lam=5.0, learning=quick)
    assert more.filters.shape == (4, 1, 5, 5) and more.settings.num_maps == 4
    assert more.encode(images).objective.sum() < fresh.encode(images).objective.sum()
    # Neither the norm of given filters matters nor the type of the array.
    longer = learn(
        4, filter_size=5, filters=3 * before.filters.double().numpy(), lam=5.0, learning=quick
    )
    assert_close(longer.filters, more.filters, rtol=0, atol=1e-4)


@pytest.mark.parametrize("learner", ["images", "stream"])
def test_a_lam_ratio_refers_to_the_given_filters(images, learner):
    quick = LearningSettings(epochs=1)
    f = learn_filters(images, 4, filter_size=5, lam=5.0, learning=quick).filters
    first = images if learner == "images" else images[:2]
    ratio = dict(lam_ratio=0.25, lam_max_quantile=0.5)
    learned = learners(images)[learner](filters=f, **ratio, learning=LearningSettings(epochs=1))
    expected = lam_from_ratio(Deconvolution(f), first, **ratio)
    assert learned.settings.lam == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("learner", ["images", "stream"])
def test_given_filters_are_projected_onto_the_constraint(images, learner):
    f = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    for key in ("non_negative", "zero_mean"):
        learning = LearningSettings(epochs=1, update_iterations=1, **{key: True})
        learned = learners(images)[learner](filters=f, lam=5.0, learning=learning)
        f_learned = learned.filters
        assert_close(f_learned.square().sum((1, 2, 3)), torch.ones(4))
        means = f_learned.mean((2, 3)).abs().max()
        assert f_learned.min() >= 0 if key == "non_negative" else means < 1e-6


WRONG_FILTERS = {
    "maps": (dict(filters=torch.ones(4, 1, 5, 5), num_maps=6), "num_maps=6: .* have 4"),
    "size": (dict(filters=torch.ones(4, 1, 5, 5), filter_size=7), "filter_size=7: .* have 5"),
    "channels": (dict(filters=torch.ones(4, 3, 5, 5)), r"filters must have the shape \(K, 1, h, w"),
    "flat": (dict(filters=torch.ones(5, 5)), r"filters must have the shape \(K, 1, h, w\)"),
    "list": (dict(filters=[[1.0]]), "filters must be a tensor or a numpy array, got a list"),
    "none": (dict(filters=torch.ones(0, 1, 5, 5)), "filters must not be empty"),
    "nan": (dict(filters=torch.full((4, 1, 5, 5), torch.nan)), "filters must be finite"),
    "zero": (dict(filters=torch.eye(4).view(4, 1, 2, 2) * 0), r"filters\[0\]: must not be zero"),
    "negative": (
        dict(
            filters=torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 3),
            learning=LearningSettings(non_negative=True),
        ),
        r"filters\[1\]: nothing is left of it under learning.non_negative=True",
    ),
    "neither": (dict(), "num_maps=None, filter_size=None: give both, or filters to start from"),
}


@pytest.mark.parametrize("kind", WRONG_FILTERS)
@pytest.mark.parametrize("learner", ["images", "stream"])
def test_initial_filters_that_do_not_fit_are_refused(images, learner, kind):
    arguments, message = WRONG_FILTERS[kind]
    with pytest.raises(ValueError, match=message):
        learners(images)[learner](lam=5.0, **arguments)


def test_learned_filters_learn_more_from_the_same_and_from_other_images(images):
    few = LearningSettings(epochs=2, zero_mean=True)
    prior = dict(boundary="circular", non_negative=True, group=2)
    first = learn_filters(images[:4], 4, filter_size=3, lam_ratio=0.1, learning=few, **prior)
    for more in (first.learn_more(images[4:]), first.learn_more_online(images.split(2))):
        assert more.settings.lam == first.settings.lam
        assert (more.settings.boundary, more.settings.group) == ("circular", 2)
        assert more.settings.non_negative and more.settings.learning == few
        assert more.filters.mean((2, 3)).abs().max() < 1e-6
        assert more.history[:2] == first.history and len(more.history) > 2
        assert more.encode(images).objective.sum() < first.encode(images).objective.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learned_filters_are_the_same_bits_after_saving_and_loading(images, dtype, tmp_path):
    y = images[:4, :, :16, :16].to(dtype)
    prior = dict(p=0.8, boundary="circular", non_negative=True, group=2)
    learning = LearningSettings(epochs=2, norm="plane")
    learned = learn_filters(y, 4, filter_size=3, lam=1 / 3, learning=learning, **prior)
    learned.save(tmp_path / "learned.safetensors")
    loaded = Learned.load(str(tmp_path / "learned.safetensors"))
    assert torch.equal(loaded.filters, learned.filters) and loaded.filters.dtype == dtype
    assert loaded.settings == learned.settings and loaded.history == learned.history
    few = SolverSettings(iterations=60)
    assert torch.equal(*(each.encode(y, settings=few).z for each in (loaded, learned)))
    assert len(loaded.learn_more(y).history) == 4
    stream = learn_online([y], 4, filter_size=5, lam_ratio=0.1)
    stream.save(tmp_path / "stream.safetensors")
    assert Learned.load(tmp_path / "stream.safetensors").history == stream.history


def test_files_that_hold_no_filters_are_refused_in_one_line(images, tmp_path):
    learned = learn_online([images], 4, filter_size=5, lam=5.0)
    path, network = tmp_path / "learned.safetensors", tmp_path / "network.safetensors"
    learned.save(path)
    DeconvNet([LayerSettings(4, 5)]).save(network)
    data = path.read_bytes()
    damaged = {
        "truncated": data[:-5],
        "empty": b"",
        "flipped": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    }
    for name, content in damaged.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    other = {"kind": "filters", "layer": {"num_maps": 4}, "history": []}
    save_network(tmp_path / "other.safetensors", {"filters": learned.filters}, other)
    sizes = {**other, "layer": dataclasses.asdict(LayerSettings(6, 5))}
    save_network(tmp_path / "sizes.safetensors", {"filters": learned.filters}, sizes)
    for file, message in (
        (network, "holds no filters of Learned.save; a network is read by deconvnet.load"),
        *((tmp_path / f"{name}.safetensors", "damaged") for name in damaged),
        (tmp_path / "other.safetensors", "not filters of this version"),
        (tmp_path / "sizes.safetensors", r"not filters of this version .*shape \(4, 1, 5, 5\)"),
        (tmp_path / "nothing.safetensors", "No such file"),
    ):
        with pytest.raises(InvalidFileError, match=message) as refused:
            Learned.load(file)
        assert "\n" not in str(refused.value) and file.name in str(refused.value)
    with pytest.raises(InvalidFileError, match="not a network; use deconvnet.Learned.load"):
        load(path)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        learned.save(tmp_path / "learned.pt")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("learner", ["images", "stream"])
def test_learning_whose_objective_is_not_finite_stops_and_says_what_to_do(images, learner):
    where = "epoch 1" if learner == "images" else "batch 1"
    message = rf"{where}: the objective is not finite; lower lam \(5\) .* in the images$"
    with pytest.raises(Diverged, match=message):
        learners(images.double() * 1e200)[learner](4, filter_size=5, lam=5.0)
