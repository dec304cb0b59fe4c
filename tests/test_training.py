"""Training: the objective falls, nothing but the seed decides the filters, and a run that was
stopped, damaged or deepened goes on as if it had not been."""

import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    checkpoint,
    learn_filters,
    load,
    sparse_code,
)
from deconvnet.checkpoint import CheckpointError
from deconvnet.convolution import deconvolve
from deconvnet.learning import normalize
from deconvnet.monitor import Monitor
from deconvnet.network import Layer, seeded
from deconvnet.run import Run
from deconvnet.trainer import Diverged, LayerTrainer
from deconvnet.training import Interrupted, train

FAST = SolverSettings(iterations=20, training_iterations=3)
EXACT = SolverSettings(iterations=300, tolerance=1e-5)

# The two presets of the CVPR 2010 paper, in small.
PAPER = {
    "solver": SolverSettings(method="half_quadratic", iterations=1, z_step="cg"),
    "learning": LearningSettings(
        epochs=2,
        batch_size=1,
        update="cg",
        update_iterations=2,
        init="random",
        norm="plane",
        revive=False,
    ),
    "scale": "max",
}


@pytest.fixture(scope="module")
def b(textures):
    """Grey images without their mean, eight of them."""
    images = textures(8, 1, 24, 24)
    images = images - images.mean((2, 3), keepdim=True)
    return images / images.square().mean().sqrt()


def layer(channels=1, *, num_maps=6, seed=0, epochs=3, batch_size=4, connectivity="full", **other):
    learning = {
        key: other.pop(key)
        for key in ("update", "memory", "init", "norm", "revive", "update_iterations")
        if key in other
    }
    learning = LearningSettings(epochs=epochs, batch_size=batch_size, **learning)
    settings = LayerSettings(
        num_maps,
        5,
        connectivity=connectivity,
        **{"solver": FAST, "learning": learning, **other},
    )
    return Layer(settings, channels, seeded(seed, 1))


def trained(b, *, seed=0, chunk=8, **settings):
    """(filters, statistics of every epoch)."""
    trainer = LayerTrainer(layer(b.shape[1], seed=seed, **settings), b, seed=seed, chunk=chunk)
    history = []
    while not trainer.done:
        history.append(trainer.update())
    return trainer.layer.filters, [stats for stats in history if stats]


def objective(b, f, lam=2.0):
    return float(sparse_code(b, f, lam=lam, settings=EXACT).objective.sum())


def lengths(f, axes=(1, 2, 3)):
    return torch.linalg.vector_norm(f, dim=axes)


def timeless(stats):
    return {key: value for key, value in asdict(stats).items() if "seconds" not in key}


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_objective_of_the_training_set_falls_from_epoch_to_epoch(b, batch_size):
    trainer = LayerTrainer(layer(epochs=5, batch_size=batch_size, init="random"), b)
    values = [objective(b, trainer.layer.filters)]
    while not trainer.done:
        if trainer.update():
            values.append(objective(b, trainer.layer.filters))
    # Each value is inferred anew, to about 1e-4 of the minimum; re-seeded filters cost nothing,
    # their maps having been next to empty.
    for before, after in zip(values, values[1:], strict=False):
        assert after < before * 1.001
    assert values[-1] < 0.85 * values[0]


@pytest.mark.parametrize("norm", ["filter", "plane"])
@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_filters_have_unit_norm_and_their_connections_after_every_update(textures, update, norm):
    b = textures(4, 3, 16, 16) - 0.4
    small = layer(
        3, update=update, norm=norm, num_maps=6, connectivity="singles_and_doubles", init="random"
    )
    trainer = LayerTrainer(small, b)
    while not trainer.done:
        before = small.filters.clone()
        trainer.update()
        planes = small.connectivity.bool()
        assert (small.filters[~planes] == 0).all()
        found = (
            lengths(small.filters, (2, 3))[planes] if norm == "plane" else lengths(small.filters)
        )
        assert_close(found, torch.ones_like(found), rtol=0, atol=1e-6)
        assert not torch.equal(small.filters, before)


def test_the_image_order_of_every_epoch_is_new_and_visits_every_image(b):
    trainer = LayerTrainer(layer(epochs=2, batch_size=1), b)
    orders = []
    for _ in range(2):
        visited = []
        for _ in range(8):
            before = trainer.codes.clone() if trainer.codes is not None else None
            trainer.update()
            changed = trainer.codes if before is None else trainer.codes - before
            visited += torch.nonzero(changed.flatten(1).any(1)).flatten().tolist()
        orders.append(visited)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]


def test_what_an_epoch_saw_is_the_sum_over_its_visits(b):
    trainer = LayerTrainer(layer(batch_size=None), b)
    solution = sparse_code(
        b,
        trainer.layer.filters.clone(),
        lam=2.0,
        settings=SolverSettings(iterations=3, tolerance=0, adaptive=False),
    )
    stats = trainer.update()
    assert stats.layer == 1 and stats.epoch == 1 and stats.epochs == 3
    assert stats.reconstruction == pytest.approx(solution.reconstruction.mean().item(), rel=1e-5)
    assert stats.sparsity == pytest.approx(solution.sparsity.mean().item(), rel=1e-5)
    assert stats.density == pytest.approx((solution.z != 0).float().mean().item(), rel=1e-5)
    ratio = b.square().sum() / solution.residual.square().sum()
    assert stats.snr == pytest.approx(10 * ratio.log10().item(), abs=1e-3)
    assert stats.objective == stats.reconstruction + stats.sparsity
    assert stats.seconds_per_image > 0


@pytest.mark.parametrize("revive", [True, False])
def test_a_dead_filter_is_noticed_and_started_anew(b, revive):
    trainer = LayerTrainer(layer(batch_size=None, revive=revive), b)
    trainer.layer.filters[2] = 0
    stats = trainer.update()
    assert stats.dead == 1 and stats.double == 0
    if not revive:
        assert (trainer.layer.filters[2] == 0).all()
        return
    assert_close(lengths(trainer.layer.filters), torch.ones(6), rtol=0, atol=1e-6)
    assert (trainer.codes[:, 2] == 0).all() and trainer.sums.energy[2] == 0
    assert trainer.update().dead == 0
    assert trainer.codes[:, 2].any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_of_two_equal_filters_one_is_noticed_and_started_anew(b, sign, update):
    trainer = LayerTrainer(layer(batch_size=None, update=update), b)
    others = [0, 2, 3, 5]
    # Filters that are equal before an update are equal after it, their maps being equal.
    trainer.layer.filters[4] = sign * trainer.layer.filters[1]
    kept = trainer.layer.filters.clone()
    stats = trainer.update()
    assert stats.dead == 0 and stats.double == 1
    found = trainer.layer.filters
    likeness = (found[1] * found[4]).sum().abs()
    assert likeness < 0.97
    assert (found[others] - kept[others]).abs().max() > 0
    # One of the pair is as it was learned, the other is another patch: nothing known of its maps.
    fresh = [k for k in (1, 4) if not trainer.codes[:, k].any()]
    assert len(fresh) == 1


def test_filters_are_left_alone_at_the_end_of_the_last_epoch(b):
    trainer = LayerTrainer(layer(epochs=1, batch_size=None), b)
    trainer.layer.filters[2] = 0
    assert trainer.update().dead == 1
    assert trainer.done and (trainer.layer.filters[2] == 0).all()


@pytest.mark.parametrize("init", ["patches", "random"])
def test_the_seed_alone_decides_the_filters(b, init):
    torch.manual_seed(1)
    filters, history = trained(b, init=init)
    torch.manual_seed(2)
    same, same_history = trained(b, init=init)
    other, _ = trained(b, seed=1, init=init)
    assert torch.equal(filters, same)
    assert [timeless(stats) for stats in history] == [timeless(stats) for stats in same_history]
    assert not torch.allclose(filters, other, atol=1e-2)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_number_of_images_inferred_at_a_time_does_not_change_the_filters(b, chunk):
    expected, history = trained(b)
    filters, same = trained(b, chunk=chunk)
    # Sums over images are float64, but the terms of one chunk are added in float32.
    assert_close(filters, expected, rtol=0, atol=1e-5)
    assert same[-1].objective == pytest.approx(history[-1].objective, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_a_trainer_that_was_saved_and_loaded_goes_on_bit_by_bit(b, tmp_path, update, stop):
    settings = {"update": update, "batch_size": 3}
    expected, history = trained(b, **settings)
    first = LayerTrainer(layer(**settings), b)
    stats = [first.update() for _ in range(stop)]
    state = {"trainer": first.state_dict(), "filters": first.layer.filters}
    state = checkpoint.load(checkpoint.save(tmp_path, stop, state))
    same = layer(**settings)
    same.filters.copy_(state["filters"])
    second = LayerTrainer(same, b, state=state["trainer"])
    assert second.updates_done == stop and second.updates == 9
    while not second.done:
        stats.append(second.update())
    assert torch.equal(second.layer.filters, expected)
    assert [timeless(s) for s in stats if s] == [timeless(s) for s in history]


def test_an_objective_that_is_not_finite_stops_before_the_filters_change(b):
    trainer = LayerTrainer(layer(batch_size=None), b.clone())
    trainer.update()
    before = trainer.layer.filters.clone()
    trainer.b[5, 0, 3, 3] = float("inf")
    with pytest.raises(Diverged, match=r"layer 1, epoch 2: .*model\.layer1\.lam \(2\.0\)"):
        trainer.update()
    assert torch.equal(trainer.layer.filters, before)


def test_images_beyond_what_float32_can_square_are_said_to_diverge(b):
    with pytest.raises(Diverged, match="not finite.*extreme values"):
        learn_filters(b * 1e30, 3, 5, lam=1.0)


def test_images_without_any_contrast_are_survived(textures):
    filters, history = trained(torch.zeros(2, 1, 12, 12))
    assert torch.isfinite(filters).all()
    assert history[-1].objective == 0 and history[-1].dead == 6


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_learn_filters_lowers_the_objective_below_that_of_random_filters(b, boundary):
    learning = LearningSettings(epochs=5, init="random")
    learned = learn_filters(b, 6, 5, lam=2.0, boundary=boundary, learning=learning)
    assert learned.filters.shape == (6, 1, 5, 5) and torch.isfinite(learned.filters).all()
    assert_close(lengths(learned.filters), torch.ones(6), rtol=0, atol=1e-6)
    assert [stats.epoch for stats in learned.history] == [1, 2, 3, 4, 5]
    assert learned.history[-1].objective < 0.8 * learned.history[0].objective
    noise = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    random = noise / lengths(noise).view(-1, 1, 1, 1)
    assert objective(b, learned.filters) < 0.8 * objective(b, random)


def test_learn_filters_recovers_planted_filters_up_to_sign_shift_and_order():
    """Four 5x5 filters behind sparse maps, learned from the images alone in frames of 7x7."""
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        planted = normalize(torch.randn(4, 1, 5, 5, generator=generator))
        z = torch.randn(12, 4, 36, 36, generator=generator)
        z = z.sign() * (1 + z.abs()) * (torch.rand(z.shape, generator=generator) < 0.006)
        images = deconvolve(z, planted)
        learning = LearningSettings(epochs=30, batch_size=6)
        found = learn_filters(images, 4, 7, lam=3.0, learning=learning, seed=seed).filters
        alike = torch.nn.functional.conv2d(planted, found, padding=6).abs().amax((2, 3))
        # Every planted filter has a found one of its own, nearly equal at the best shift.
        assert alike.amax(1).min() > 0.98
        assert sorted(alike.argmax(1).tolist()) == [0, 1, 2, 3]


def test_learn_filters_refuses_what_is_not_finite_or_not_images(b):
    wrong = b.clone()
    wrong[0, 0, 0, 0] = float("nan")
    for images in (wrong, b[0]):
        with pytest.raises(ValueError, match=r"finite and \(N, C, H, W\)"):
            learn_filters(images, 3, 5, lam=1.0)
    with pytest.raises(ValueError, match="24x24 are smaller than the 25x25 filters"):
        learn_filters(b, 3, 25, lam=1.0)


@pytest.mark.parametrize("p", [1.0, 0.8])
def test_the_settings_of_the_paper_train_two_layers_to_finite_filters(textures, tmp_path, p):
    layers = [
        LayerSettings(3, 5, lam=1.0, p=p, **PAPER),
        LayerSettings(6, 5, lam=1.0, connectivity="singles_and_doubles", **PAPER),
    ]
    net = DeconvNet(layers, PreprocessingSettings(steps=["mean", "laplacian"], scale="max"))
    with Monitor(progress=False) as monitor:
        results = train(net, textures(2, 3, 20, 20), Run(tmp_path, {}), monitor)
    for number, result in enumerate(results, 1):
        filters = net.layer(number).filters
        assert torch.isfinite(filters).all()
        norms = lengths(filters, (2, 3))[net.layer(number).connectivity.bool()]
        assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-5)
        assert 0 < result.density < 1 and result.objective > 0
    # A short schedule of betas is far from the minimum, but explains something of the images.
    assert results[0].snr > 1


# Runs


def network(depth=2, *, seed=0, **first):
    learning = LearningSettings(epochs=2, batch_size=2)
    layers = [
        LayerSettings(4, 5, pool=[1, 2, 2], solver=FAST, learning=learning, **first),
        LayerSettings(3, 3, solver=FAST, learning=learning),
        LayerSettings(3, 3, solver=FAST, learning=learning),
    ]
    preprocessing = PreprocessingSettings(steps=["mean", "whiten"])
    return DeconvNet(layers[:depth], preprocessing, seed=seed)


SETTINGS = {"seed": 0, "model": {"layer1": {"lam": 2.0}, "layer2": {"lam": 2.0}}}


class StopAt(Monitor):
    """A monitor during which the user presses Ctrl-C, once, at a certain moment."""

    moment = ("advance", 1)

    def __init__(self, folder, moment):
        super().__init__(folder, progress=False)
        self.left = dict([moment])

    def _count(self, kind):
        self.left[kind] = self.left.get(kind, 0) - 1
        if self.left[kind] == 0:
            signal.raise_signal(signal.SIGINT)

    def advance(self):
        super().advance()
        self._count("update")

    def inferred(self, done, total):
        super().inferred(done, total)
        self._count("inference")

    def result(self, result, z, step):
        super().result(result, z, step)
        self._count("result")


@pytest.fixture(scope="module")
def images(textures):
    return textures(5, 3, 20, 20)


def train_in(folder, images, depth=2, *, settings=SETTINGS, resume="auto", stop=None, **options):
    net = network(depth)
    monitor = StopAt(folder, stop) if stop else Monitor(folder, progress=False, config="some: text")
    with monitor:
        results = train(net, images, Run(folder, settings, resume), monitor, **options)
    return net, results


def assert_same_network(found, expected):
    expected = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def assert_same_results(found, expected):
    assert [timeless(result) for result in found] == [timeless(result) for result in expected]


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder):
    found = events(folder)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
        if "seconds" not in tag
    }


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An uninterrupted run of two layers: (folder, network, results)."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *train_in(folder, images)


def test_a_run_leaves_checkpoints_pictures_and_the_network(finished, images):
    folder, net, results = finished
    found = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert found == ["step-00000009.pt", "step-00000012.pt"]
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert pictures == {
        *(f"layer{number}-{kind}.png" for number in (1, 2) for kind in ("filters", "maps")),
        *("layer1-reconstructed.png", "layer2-reconstructed.png", "layer2-patches.png"),
    }
    assert_same_network(load(folder / "network.safetensors"), net)
    assert_same_network(load(folder), net)
    codes = net.infer(images)
    # Each layer explains maps of unit size, and the first the images as they are preprocessed.
    assert net.layer(1).scale == 1
    assert_close(net.layer(2).scale, codes.layer(1).pooled.square().mean().sqrt())
    for number, result in enumerate(results, 1):
        assert result.layer == number and result.seconds > 0
        assert result.snr == pytest.approx(net.snr(codes, number), abs=1e-4)
        objective = codes.layer(number).objective.mean().item()
        assert result.objective == pytest.approx(objective, rel=1e-6)
        assert result.density == pytest.approx(codes.layer(number).density, rel=1e-4)


def test_the_tensorboard_page_has_curves_pictures_and_the_configuration(finished):
    found = events(finished[0])
    tags = found.Tags()
    for number in (1, 2):
        for key in ("objective", "reconstruction", "sparsity", "density", "snr", "dead", "double"):
            steps = [event.step for event in found.Scalars(f"layer{number}/{key}")]
            # Updates since the run began: three an epoch, two epochs a layer.
            assert steps == ([3, 6] if number == 1 else [9, 12])
        assert f"layer{number}/seconds_per_image" in tags["scalars"]
        assert f"layer{number}/result/text_summary" in tags["tensors"]
        assert f"layer{number}/filters" in tags["images"]
        assert f"layer{number}/reconstructed" in tags["images"]
        assert f"layer{number}/nonzero z" in tags["histograms"]
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "some: text" in text


def test_the_objective_on_the_page_is_that_of_its_two_terms(finished):
    found = scalars(finished[0])
    for number in (1, 2):
        terms = (found[f"layer{number}/{key}"] for key in ("reconstruction", "sparsity"))
        for (_, a), (_, b), (_, whole) in zip(
            *terms, found[f"layer{number}/objective"], strict=True
        ):
            assert whole == pytest.approx(a + b, rel=1e-6)


def test_more_layers_in_the_same_folder_leave_the_first_ones_as_they_are(
    finished, images, tmp_path
):
    _, expected, results = finished
    net, first = train_in(tmp_path, images, depth=1)
    assert_same_results(first, results[:1])
    deeper, both = train_in(tmp_path, images, depth=2)
    assert torch.equal(deeper.layer(1).filters, net.layer(1).filters)
    assert both[0] == first[0]
    assert_same_network(deeper, expected)
    assert_same_results(both, results)


class Dies(Monitor):
    """A monitor of a process that is killed when its second layer begins."""

    def layer(self, number, done, total):
        if number == 2:
            raise MemoryError
        super().layer(number, done, total)


def test_settings_of_a_layer_that_has_not_begun_may_still_change(images, tmp_path):
    with pytest.raises(MemoryError), Dies(tmp_path, progress=False) as monitor:
        train(network(), images, Run(tmp_path, SETTINGS), monitor)
    # What was not learned is not in what was saved.
    assert load(tmp_path).depth == 1
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "layer2": {"lam": 0.5}}}
    wider = network()
    wider.layers[1] = Layer(LayerSettings(7, 3, solver=FAST), 4, seeded(0, 2))
    with Monitor(tmp_path, progress=False) as monitor:
        results = train(wider, images, Run(tmp_path, settings), monitor)
    assert len(results) == 2 and load(tmp_path).layer(2).filters.shape == (7, 4, 3, 3)


def test_fewer_layers_in_the_same_folder_are_those_of_the_deeper_run(finished, images, tmp_path):
    _, expected, results = finished
    train_in(tmp_path, images, depth=2)
    net, found = train_in(tmp_path, images, depth=1)
    assert_same_results(found, results[:1])
    assert torch.equal(net.layer(1).filters, expected.layer(1).filters)


def test_the_same_command_again_trains_nothing_and_gives_the_same(finished, images, tmp_path):
    train_in(tmp_path, images)
    files = sorted((tmp_path / "checkpoints").iterdir())
    net, results = train_in(tmp_path, images)
    assert_same_network(net, finished[1])
    assert_same_results(results, finished[2])
    assert sorted((tmp_path / "checkpoints").iterdir()) == files


@pytest.mark.parametrize(
    "moment",
    [
        *(("update", 1), ("update", 3), ("update", 5), ("update", 7), ("update", 12)),
        *(("inference", 1), ("inference", 2), ("result", 1)),
    ],
    ids=lambda moment: f"{moment[0]} {moment[1]}",
)
def test_a_run_that_was_stopped_goes_on_bit_by_bit(finished, images, tmp_path, moment):
    _, expected, results = finished
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        train_in(tmp_path, images, stop=moment)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not (tmp_path / "network.safetensors").exists()
    net, found = train_in(tmp_path, images)
    assert_same_network(net, expected)
    assert_same_results(found, results)


@pytest.mark.parametrize("stop", [("update", 3), ("update", 8), None])
def test_the_curves_of_a_run_that_went_on_have_every_point_once(finished, images, tmp_path, stop):
    if stop:
        with pytest.raises(Interrupted):
            train_in(tmp_path, images, stop=stop)
    else:
        train_in(tmp_path, images)
    time.sleep(1.1)  # the names of event files, by which they are read in order, count seconds
    train_in(tmp_path, images)
    assert scalars(tmp_path) == scalars(finished[0])


def test_what_came_after_the_checkpoint_that_a_run_goes_on_from_is_not_shown_twice(
    finished, images, tmp_path
):
    train_in(tmp_path, images)
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.unlink()
    time.sleep(1.1)
    train_in(tmp_path, images)
    assert scalars(tmp_path) == scalars(finished[0])
    curve = Path("inference") / "layer2"
    assert scalars(tmp_path / curve) == scalars(finished[0] / curve)


def test_the_course_of_inference_is_shown_to_the_end_of_every_layer(finished):
    for number in (1, 2):
        found = scalars(finished[0] / "inference" / f"layer{number}")
        assert len(found) == 3
        for points in found.values():
            assert [step for step, _ in points] == list(range(1, 21))
        objective = [value for _, value in found["inference/objective by iteration"]]
        assert objective[-1] < 0.9 * objective[0] and objective[-1] < 1.01 * min(objective)


def test_a_run_that_is_stopped_after_every_update_still_arrives(finished, images, tmp_path):
    count = 0
    while True:
        try:
            net, results = train_in(tmp_path, images, stop=("update", 1))
            break
        except Interrupted:
            count += 1
    assert count == 12
    assert_same_network(net, finished[1])
    assert_same_results(results, finished[2])


def test_a_second_request_to_stop_acts_at_once(images, tmp_path):
    class Impatient(StopAt):
        def _count(self, kind):
            if kind == "update":
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Impatient(tmp_path, ("update", 1)) as monitor:
        train(network(), images, Run(tmp_path, SETTINGS), monitor)


def test_a_run_of_other_settings_is_refused_with_the_keys_that_differ(images, tmp_path):
    train_in(tmp_path, images, depth=1)
    other = {"seed": 1, "model": {"layer1": {"lam": 5.0}, "layer2": {"lam": 2.0}}, "extra": True}
    with pytest.raises(ValueError) as caught:
        Run(tmp_path, other)
    message = str(caught.value)
    assert str(tmp_path) in message and "resume=false" in message and "name=" in message
    assert "seed: 0 there, 1 now" in message
    assert "model.layer1.lam: 2.0 there, 5.0 now" in message
    assert "extra" in message and "layer2" not in message and "\n" not in message


def test_settings_of_an_upper_layer_that_has_begun_are_refused(images, tmp_path):
    with pytest.raises(Interrupted):
        train_in(tmp_path, images, stop=("update", 7))
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "layer2": {"lam": 0.5}}}
    with pytest.raises(ValueError, match=r"model\.layer2\.lam: 2\.0 there, 0\.5 now"):
        Run(tmp_path, settings)


def test_without_resuming_the_earlier_run_is_put_aside_whole(images, tmp_path):
    first, _ = train_in(tmp_path, images, depth=1)
    names = {path.name for path in tmp_path.iterdir()}
    other = {**SETTINGS, "seed": 7}
    again, _ = train_in(tmp_path, images, depth=1, settings=other, resume="false", seed=7)
    assert {path.name for path in (tmp_path / "previous-1").iterdir()} == names
    assert_same_network(load(tmp_path / "previous-1"), first)
    assert not torch.equal(load(tmp_path).layer(1).filters, first.layer(1).filters)
    Run(tmp_path, SETTINGS, "false")
    assert_same_network(load(tmp_path / "previous-2"), again)
    assert_same_network(load(tmp_path / "previous-1"), first)


def test_runs_put_aside_are_never_mixed_when_an_older_one_was_deleted(tmp_path):
    for number in range(4):
        checkpoint.save(tmp_path / "checkpoints", number, {"layer": 1, "settings": {}})
        Run(tmp_path, {}, "false")
        if number == 1:
            checkpoint_file = next((tmp_path / "previous-1" / "checkpoints").iterdir())
            checkpoint_file.unlink()
            (tmp_path / "previous-1" / "checkpoints").rmdir()
            (tmp_path / "previous-1").rmdir()
    asides = [path for path in tmp_path.iterdir() if path.name.startswith("previous-")]
    assert len(asides) == 3
    for aside in asides:
        assert len(list((aside / "checkpoints").iterdir())) == 1


def test_a_run_that_ended_before_its_network_was_written_writes_it(finished, images, tmp_path):
    train_in(tmp_path, images)
    (tmp_path / "network.safetensors").unlink()
    train_in(tmp_path, images)
    assert_same_network(load(tmp_path / "network.safetensors"), finished[1])


def test_a_run_can_go_back_to_an_older_checkpoint_of_its_own(finished, images, tmp_path):
    train_in(tmp_path, images)
    older = min((tmp_path / "checkpoints").iterdir())
    with pytest.raises(Interrupted):
        train_in(tmp_path, images, resume=str(older), stop=("update", 1))
    net, results = train_in(tmp_path, images)
    assert_same_network(net, finished[1])
    assert_same_results(results, finished[2])
    assert_same_network(load(tmp_path / "previous-1"), finished[1])


def test_nothing_is_put_aside_where_there_is_no_run(tmp_path):
    run = Run(tmp_path, SETTINGS, "false")
    assert run.state is None and list(tmp_path.iterdir()) == []


def test_a_run_can_go_on_from_the_checkpoint_or_the_folder_of_another(finished, images, tmp_path):
    with pytest.raises(Interrupted):
        train_in(tmp_path / "one", images, stop=("update", 4))
    file = max((tmp_path / "one" / "checkpoints").iterdir())
    for name, resume in (("two", file), ("three", tmp_path / "one")):
        net, results = train_in(tmp_path / name, images, resume=str(resume))
        assert_same_network(net, finished[1])
        assert_same_results(results, finished[2])
    with pytest.raises(ValueError, match="resume=nowhere: no checkpoint there"):
        Run(tmp_path / "four", SETTINGS, "nowhere")


def test_a_damaged_newest_checkpoint_costs_some_updates_and_nothing_else(
    finished, images, tmp_path, caplog
):
    with pytest.raises(Interrupted):
        train_in(tmp_path, images, stop=("update", 8))
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    net, results = train_in(tmp_path, images)
    assert newest.name in caplog.text and "falling back" in caplog.text
    assert_same_network(net, finished[1])
    assert_same_results(results, finished[2])


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(images, tmp_path):
    train_in(tmp_path, images, depth=1)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be loaded"):
        Run(tmp_path, SETTINGS)


def test_images_of_one_colour_are_trained_on_without_a_crash(tmp_path):
    with Monitor(tmp_path, progress=False) as monitor:
        results = train(network(), torch.full((2, 3, 20, 20), 0.5), Run(tmp_path, {}), monitor)
    assert [result.dead for result in results] == [4, 3]
    assert (tmp_path / "network.safetensors").exists()


def test_training_in_another_thread_works_without_stop_requests(images, tmp_path, finished):
    from threading import Thread

    found = []
    thread = Thread(target=lambda: found.append(train_in(tmp_path, images)))
    thread.start()
    thread.join()
    assert_same_network(found[0][0], finished[1])


@pytest.mark.parametrize("color", ["grey", "ycbcr"])
def test_networks_of_every_colour_train_and_are_pictured(textures, tmp_path, color):
    net = DeconvNet(
        [
            LayerSettings(3, 5, pool=[2, 2, 2], solver=FAST, learning=LearningSettings(epochs=1)),
            LayerSettings(3, 3, solver=FAST, learning=LearningSettings(epochs=1)),
        ],
        PreprocessingSettings(color=color),
    )
    with Monitor(tmp_path, progress=False) as monitor:
        train(net, textures(2, 3, 20, 20), Run(tmp_path, {}), monitor)
    assert len(list((tmp_path / "pictures").iterdir())) == 7
