"""Training: the objective falls, nothing but the seed decides the filters, and a run that was
stopped, damaged or deepened goes on as if it had not been."""

import signal
import time
from dataclasses import asdict
from functools import partial
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
from deconvnet.learning import normalize, off_center
from deconvnet.monitor import Monitor
from deconvnet.network import Layer, Target, seeded
from deconvnet.pooling import max_pool, pooled_shape, unpool
from deconvnet.run import Run
from deconvnet.trainer import Diverged, LayerTrainer, States
from deconvnet.training import Interrupted, train

FAST = SolverSettings(iterations=20, training_iterations=3)
EXACT = SolverSettings(iterations=300, tolerance=1e-5)
# The images of `b`.
EVERY = torch.arange(8)

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
            before = trainer.codes[EVERY]
            trainer.update()
            changed = trainer.codes[EVERY] - (0 if before is None else before)
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
    assert (trainer.codes[EVERY][:, 2] == 0).all() and trainer.sums.energy[2] == 0
    assert trainer.update().dead == 0
    assert trainer.codes[EVERY][:, 2].any()


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
    fresh = [k for k in (1, 4) if not trainer.codes[EVERY][:, k].any()]
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
    trainer.below[5, 0, 3, 3] = float("inf")
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


# Layers that explain the image, and pooling in the loop of inference

IN_LOOP = {"pool": [2, 2, 2], "pooling": "in_loop"}
WINDOW = (2, 2, 2)


@pytest.fixture(scope="module")
def below(textures):
    """(settings of a first layer, its learned tensors, codes of six images): maps to stand on."""
    images = textures(6, 3, 18, 17)
    first = LayerSettings(
        4,
        5,
        pool=[2, 2, 2],
        pooling="in_loop",
        solver=SolverSettings(method="fista", iterations=20),
        learning=LearningSettings(epochs=1, batch_size=3),
    )
    net = DeconvNet([first], PreprocessingSettings(color="grey"))
    net.preprocessing.fit(images)
    trainer = LayerTrainer(net.layer(1), net.infer(images, depth=0).y)
    trainer.update()
    return first, net.to_parts()[0], net.infer(images)


def second(below, *, method="fista", seed=0, state=None, filters=None, chunk=2, **settings):
    """(network, trainer of its second layer)."""
    first, tensors, codes = below
    learning = {
        key: settings.pop(key)
        for key in ("update", "update_iterations", "epochs", "batch_size", "revive", "recenter")
        if key in settings
    }
    top = LayerSettings(
        5,
        3,
        solver=SolverSettings(method=method, training_iterations=5),
        learning=LearningSettings(**{"epochs": 3, "batch_size": 3, **learning}),
        **{"lam": 5.0, "target": "image", **settings},
    )
    net = DeconvNet([first, top], PreprocessingSettings(color="grey"), seed=seed)
    net.load_parts(tensors)
    net.layer(2).fit_scale(codes.layer(1).pooled)
    trainer = LayerTrainer(
        net.layer(2),
        net.below(codes, 2),
        partial(net.target, codes, 2),
        seed=seed,
        number=2,
        chunk=chunk,
        state=state,
    )
    if filters is not None:
        net.layer(2).filters.copy_(filters)
    return net, trainer


def to_the_end(trainer):
    history = []
    while not trainer.done:
        history.append(trainer.update())
    return [stats for stats in history if stats]


def assert_one_entry_per_window(z, window=WINDOW):
    assert torch.equal(unpool(*max_pool(z, window), z.shape), z) and z.any()


@pytest.mark.parametrize("target", ["image", "both"])
@pytest.mark.parametrize("update", ["proximal", "cg"])
@pytest.mark.parametrize("pooled", [{}, IN_LOOP], ids=["not pooled", "in the loop"])
def test_a_layer_that_explains_the_image_learns_to(below, target, update, pooled):
    codes = below[2]
    # More steps of cg fit a batch at any length of the filters, and their norm comes after.
    iterations = 10 if update == "proximal" else 1
    net, trainer = second(
        below,
        target=target,
        update=update,
        update_iterations=iterations,
        epochs=4,
        revive=False,
        recenter=False,
        **pooled,
    )
    before = net.extend(codes).layer(2).objective.sum().item()
    history = to_the_end(trainer)
    values = [stats.objective for stats in history]
    assert all(b < a for a, b in zip(values, values[1:], strict=False))
    assert_close(lengths(net.layer(2).filters), torch.ones(5), rtol=0, atol=1e-6)
    # Inferred anew, from zero.
    after = net.extend(codes).layer(2).objective.sum().item()
    assert after < 0.97 * before


def test_what_an_epoch_saw_through_the_layers_below_is_in_terms_of_the_image(below):
    net, trainer = second(below, batch_size=None, target="image", update="cg")
    codes = below[2]
    start = net.layer(2).filters.clone()
    solver = SolverSettings(method="fista", iterations=5, tolerance=0)
    found = net.layer(2).infer(net.target(codes, 2), settings=solver)
    stats = trainer.update()
    assert not torch.equal(net.layer(2).filters, start)
    assert stats.reconstruction == pytest.approx(found.reconstruction.mean().item(), rel=1e-4)
    ratio = codes.y.square().sum() / found.residual.square().sum()
    assert stats.snr == pytest.approx(10 * ratio.log10().item(), abs=1e-2)
    # lam/2 times the squared error of the image, not of the maps.
    assert stats.reconstruction == pytest.approx(
        2.5 * found.residual.double().square().sum().item() / 6, rel=1e-4
    )


@pytest.mark.parametrize("update", ["proximal", "cg"])
@pytest.mark.parametrize("method", ["fista", "ista"])
def test_states_that_are_kept_pooled_give_the_same_filters_as_whole_ones(below, update, method):
    settings = {"update": update, "method": method, "epochs": 5, **IN_LOOP}
    net, trainer = second(below, **settings)
    assert trainer.codes.window == WINDOW
    dense_net, dense = second(below, **settings)
    dense.codes = States(len(dense.below))
    history, expected = to_the_end(trainer), to_the_end(dense)
    assert torch.equal(net.layer(2).filters, dense_net.layer(2).filters)
    assert [timeless(s) for s in history] == [timeless(s) for s in expected]
    every = torch.arange(6)
    assert torch.equal(trainer.codes[every], dense.codes[every])
    kept = sum(tensor.numel() for tensor in trainer.codes.kept)
    assert kept == 2 * 6 * torch.Size(pooled_shape((5, *dense.codes.shape[1:]), WINDOW)).numel()
    assert 2 * kept < dense.codes.kept[0].numel()


def test_states_give_back_what_was_put_in_for_any_images_in_any_order():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 5, 6, 7, generator=generator)
    z = unpool(*max_pool(z * (z.abs() > 1), WINDOW), z.shape)
    for window in (None, WINDOW):
        states = States(5, window)
        assert states[torch.tensor([1, 2])] is None
        states[torch.tensor([3, 1])] = z[[3, 1]]
        # Images that were not visited yet have maps of zeros.
        assert not states[torch.tensor([0, 2, 4])].any()
        assert torch.equal(states[torch.tensor([1, 3])], z[[1, 3]])
        states[torch.tensor([0, 4, 2])] = z[[0, 4, 2]]
        assert torch.equal(states[torch.arange(5)], z)
        given = states[torch.tensor([2])]
        given.zero_()
        assert torch.equal(states[torch.tensor([2])], z[2:3])
        again = States(5, window)
        again.load_state_dict(states.state_dict(), torch.device("cpu"))
        assert torch.equal(again[torch.arange(5)], z)


def test_steps_are_known_where_every_image_has_had_one():
    states = States(4)
    assert states.step(torch.tensor([0])) is None
    states.set_step(torch.tensor([2, 0]), torch.tensor([0.2, 0.1]).view(2, 1, 1, 1))
    assert states.step(torch.tensor([0, 2])).flatten().tolist() == pytest.approx([0.1, 0.2])
    assert states.step(torch.tensor([0, 1])) is None
    again = States(4)
    again.load_state_dict(states.state_dict(), torch.device("cpu"))
    assert again.step(torch.tensor([2])).item() == pytest.approx(0.2)
    assert again.step(torch.tensor([3])) is None


@pytest.mark.parametrize("method", ["fista", "ista"])
def test_each_visit_begins_with_the_maps_and_the_steps_of_the_last(below, method):
    net, trainer = second(below, batch_size=None, chunk=6, method=method, **IN_LOOP)
    trainer.update()
    order = torch.randperm(6, generator=seeded(0, 2, 2, 1))
    expected = net.layer(2).infer(
        net.target(below[2], 2, order),
        state=trainer.codes[order],
        step=trainer.codes.step(order),
        training=True,
    )
    trainer.update()
    assert torch.equal(trainer.codes.step(order), expected.step)
    kept = trainer.codes[order]
    # But for filters that were started anew at the end of the epoch.
    learned = [k for k in range(5) if kept[:, k].any()]
    assert len(learned) > 2 and torch.equal(kept[:, learned], expected.z[:, learned])


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"update": "cg", **IN_LOOP},
        {"update": "proximal", "target": "both", **IN_LOOP},
        {"update": "proximal", "method": "ista"},
        {"update": "cg", "method": "admm", **IN_LOOP},
    ],
    ids=lambda settings: " ".join(str(v) for v in settings.values() if isinstance(v, str)),
)
def test_learning_through_the_layers_below_goes_on_bit_by_bit(below, tmp_path, settings, stop):
    net, trainer = second(below, **settings)
    history = to_the_end(trainer)
    same, first = second(below, **settings)
    stats = [first.update() for _ in range(stop)]
    state = {"trainer": first.state_dict(), "filters": same.layer(2).filters}
    state = checkpoint.load(checkpoint.save(tmp_path, stop, state))
    again, trainer = second(below, state=state["trainer"], filters=state["filters"], **settings)
    stats += to_the_end(trainer)
    assert torch.equal(again.layer(2).filters, net.layer(2).filters)
    assert [timeless(s) for s in stats if s] == [timeless(s) for s in history]


@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_filters_that_are_started_anew_leave_maps_with_one_entry_per_window(below, update):
    settings = {"batch_size": None, "update": update, **IN_LOOP}
    net, trainer = second(below, **settings)
    _, other = second(below, revive=False, **settings)
    every = torch.arange(6)
    for one in (trainer, other):
        one.layer.filters[2] = 0
        assert one.update().dead == 1
    after, expected = trainer.codes[every], other.codes[every]
    assert_one_entry_per_window(after)
    fresh = [k for k in range(5) if not after[:, k].any()]
    assert 2 in fresh and len(fresh) < 5
    expected[:, fresh] = 0
    assert torch.equal(after, expected)
    assert_close(lengths(net.layer(2).filters), torch.ones(5), rtol=0, atol=1e-6)
    assert trainer.update().dead == 0
    assert_one_entry_per_window(trainer.codes[every])


def test_filters_that_are_moved_leave_maps_with_one_entry_per_window(below):
    net, trainer = second(below, batch_size=None, epochs=12, revive=False, update="cg", **IN_LOOP)
    for _ in range(3):
        trainer.update()
    before = trainer.codes[torch.arange(6)]
    # The third epoch is over; let three filters sit at a side of their frames.
    off = torch.zeros_like(net.layer(2).filters)
    off[:, :, 1, 1] = 1
    for k, place in {0: (0, 1), 1: (2, 2), 3: (1, 0)}.items():
        off[k] = 0
        off[k, :, place[0], place[1]] = 1
    net.layer(2).set_filters(off)
    moves = off_center(net.layer(2).filters)
    assert moves == {0: (1, 0), 1: (-1, -1), 3: (0, 1)}
    trainer._recenter()
    after = trainer.codes[torch.arange(6)]
    assert_one_entry_per_window(after)
    assert off_center(net.layer(2).filters) == {}
    moved = before.clone()
    for k, (rows, columns) in moves.items():
        moved[:, k] = before[:, k].roll((-rows, -columns), (1, 2))
        if rows:
            moved[:, k, slice(-1, None) if rows > 0 else slice(0, 1)] = 0
        if columns:
            moved[:, k, :, slice(-1, None) if columns > 0 else slice(0, 1)] = 0
    # Of those that now meet in a window the strongest is left.
    assert torch.equal(after, unpool(*max_pool(moved, WINDOW), moved.shape))
    assert torch.count_nonzero(after) < torch.count_nonzero(moved)


def test_a_target_of_its_own_is_explained_in_place_of_what_is_below(b):
    trainer = LayerTrainer(layer(batch_size=None), b, lambda images: Target(-b[images]))
    negative = layer(batch_size=None)
    plain = LayerTrainer(negative, b)
    assert torch.equal(trainer.layer.filters, plain.layer.filters)
    trainer.update(), plain.update()
    assert_close(trainer.codes[EVERY], -plain.codes[EVERY], rtol=1e-4, atol=1e-5)
    assert_close(trainer.layer.filters, plain.layer.filters, rtol=0, atol=1e-5)


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
        *(
            "layer1-reconstructed.png",
            "layer2-reconstructed.png",
            "layer2-patches.png",
            "layer2-parts.png",
        ),
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


def iccv(depth=3):
    """Layers that all explain the image, with switches inferred in the loop."""
    solver = SolverSettings(method="fista", iterations=10, training_iterations=3)
    pooled = {"pool": [2, 2, 2], "pooling": "in_loop", "target": "image", "solver": solver}
    layers = [
        LayerSettings(
            4, 5, learning=LearningSettings(epochs=2, batch_size=2, update="cg"), **pooled
        ),
        LayerSettings(
            4, 3, scale="none", learning=LearningSettings(epochs=2, batch_size=2), **pooled
        ),
        LayerSettings(
            3,
            2,
            target="both",
            solver=solver,
            learning=LearningSettings(epochs=1, batch_size=None, update="cg"),
        ),
    ]
    return DeconvNet(layers[:depth], PreprocessingSettings(steps=["mean"]))


def test_a_run_whose_layers_explain_the_image_goes_on_bit_by_bit(images, tmp_path):
    def run(folder, stop=None):
        net = iccv()
        monitor = StopAt(folder, stop) if stop else Monitor(folder, progress=False)
        with monitor:
            return net, train(net, images, Run(folder, {}), monitor)

    expected, results = run(tmp_path / "whole")
    assert len(results) == 3 and expected.layer(2).scale == 1 != expected.layer(3).scale
    for stop in (("update", 8), ("inference", 2)):
        folder = tmp_path / f"{stop[0]} {stop[1]}"
        with pytest.raises(Interrupted):
            run(folder, stop)
        net, found = run(folder)
        assert_same_network(net, expected)
        assert_same_results(found, results)
    codes = load(tmp_path / "whole").infer(images)
    for number, result in enumerate(results, 1):
        assert result.snr == pytest.approx(expected.snr(codes, number), abs=1e-4)
        assert result.density == pytest.approx(codes.layer(number).density, rel=1e-4)
    found = scalars(tmp_path / "whole" / "inference" / "layer2")["inference/objective by iteration"]
    values = [value for _, value in found]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(values, values[1:], strict=False))


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
    assert len(list((tmp_path / "pictures").iterdir())) == 8
