"""Training one layer: the objective falls, the seed alone decides the filters, and a training that
was stopped resumes exactly."""

from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    learn_filters,
    sparse_code,
)
from deconvnet.filters.care import centring_shifts
from deconvnet.filters.constraint import normalize
from deconvnet.filters.update import Diverged
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.layer import Layer, LayerProblem
from deconvnet.operators.convolution import deconvolve
from deconvnet.operators.pooling import max_pool, pooled_shape, unpool
from deconvnet.storage.checkpoint_files import load_checkpoint, save_checkpoint
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_data import LayerData
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.loop import train
from deconvnet.training.run_folder import RunFolder
from deconvnet.training.warm_starts import WarmStarts

FAST = SolverSettings(iterations=20, training_iterations=3)
EXACT = SolverSettings("coordinate", iterations=300, gap=1e-4)
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
        reinit_unused=False,
    ),
    "scale": "max",
}


@pytest.fixture(scope="module")
def once():
    """once(work, *key): the result of work() for this key, which is computed the first time."""
    results = {}

    def get(work, *key):
        if key not in results:
            results[key] = work()
        return results[key]

    return get


@pytest.fixture(scope="module")
def b(textures):
    """Grey images without their mean, eight of them."""
    images = textures(8, 1, 24, 24)
    images = images - images.mean((2, 3), keepdim=True)
    return images / images.square().mean().sqrt()


def layer(channels=1, *, num_maps=6, seed=0, epochs=3, batch_size=4, connectivity="full", **other):
    learning = {
        key: other.pop(key)
        for key in (
            "update",
            "averaging_epochs",
            "init",
            "norm",
            "reinit_unused",
            "update_iterations",
        )
        if key in other
    }
    learning = LearningSettings(epochs=epochs, batch_size=batch_size, **learning)
    settings = LayerSettings(
        num_maps,
        5,
        connectivity=connectivity,
        **{"solver": FAST, "learning": learning, **other},
    )
    return Layer(settings, channels, seeded_generator(seed, 1))


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
    return {k: v for k, v in asdict(stats).items() if "seconds" not in k and k != "loads"}


@pytest.mark.parametrize("batch_size", [None, 4])
def test_the_objective_of_the_training_set_falls_from_epoch_to_epoch(b, batch_size):
    trainer = LayerTrainer(layer(epochs=5, batch_size=batch_size, init="random"), b)
    values = [objective(b, trainer.layer.filters)]
    while not trainer.done:
        if trainer.update():
            values.append(objective(b, trainer.layer.filters))
    # Each value is inferred from zero maps, to about 1e-4 of the minimum. Redrawn filters cost
    # nothing, because their maps were nearly empty.
    for before, after in zip(values, values[1:], strict=False):
        assert after < before * 1.001
    assert values[-1] < 0.85 * values[0]


@pytest.mark.parametrize("norm", ["filter", "plane"])
@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_filters_have_unit_norm_and_keep_their_connectivity_after_every_update(
    textures, update, norm
):
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
        norms = (
            lengths(small.filters, (2, 3))[planes] if norm == "plane" else lengths(small.filters)
        )
        assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
        assert not torch.equal(small.filters, before)


def test_every_epoch_visits_every_image_in_a_new_order(b):
    trainer = LayerTrainer(layer(epochs=2, batch_size=1), b)
    orders = []
    for _ in range(2):
        visited = []
        for _ in range(8):
            before = trainer.warm_starts[EVERY]
            trainer.update()
            changed = trainer.warm_starts[EVERY] - (0 if before is None else before)
            visited += torch.nonzero(changed.flatten(1).any(1)).flatten().tolist()
        orders.append(visited)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(8))
    assert orders[0] != orders[1]


def test_the_statistics_of_an_epoch_are_those_of_its_visits(b):
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


@pytest.mark.parametrize("reinit_unused", [True, False])
def test_a_dead_filter_is_counted_and_drawn_again(b, reinit_unused):
    trainer = LayerTrainer(layer(batch_size=None, reinit_unused=reinit_unused), b)
    trainer.layer.filters[2] = 0
    stats = trainer.update()
    assert stats.dead == 1 and stats.double == 0
    if not reinit_unused:
        assert (trainer.layer.filters[2] == 0).all()
        return
    assert_close(lengths(trainer.layer.filters), torch.ones(6), rtol=0, atol=1e-6)
    assert (trainer.warm_starts[EVERY][:, 2] == 0).all() and trainer.sums.energy[2] == 0
    assert trainer.update().dead == 0
    assert trainer.warm_starts[EVERY][:, 2].any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_one_of_two_equal_filters_is_counted_and_drawn_again(b, sign, update):
    trainer = LayerTrainer(layer(batch_size=None, update=update), b)
    others = [0, 2, 3, 5]
    # Filters that are equal before an update are equal after it, because their maps are.
    trainer.layer.filters[4] = sign * trainer.layer.filters[1]
    before = trainer.layer.filters.clone()
    stats = trainer.update()
    assert stats.dead == 0 and stats.double == 1
    after = trainer.layer.filters
    similarity = (after[1] * after[4]).sum().abs()
    assert similarity < 0.97
    assert (after[others] - before[others]).abs().max() > 0
    # One of the pair is as it was learned, the other is a new patch with zero maps.
    fresh = [k for k in (1, 4) if not trainer.warm_starts[EVERY][:, k].any()]
    assert len(fresh) == 1


def test_filters_are_not_drawn_again_after_the_last_epoch(b):
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
def test_the_number_of_images_inferred_at_a_time_does_not_change_the_filters(b, once, chunk):
    expected, history = once(lambda: trained(b), "one chunk")
    filters, same = trained(b, chunk=chunk)
    # Sums over images are float64, but the terms of one chunk are added in float32.
    assert_close(filters, expected, rtol=0, atol=1e-5)
    assert same[-1].objective == pytest.approx(history[-1].objective, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_a_trainer_that_was_saved_and_loaded_continues_bit_by_bit(b, once, tmp_path, update, stop):
    settings = {"update": update, "batch_size": 3}
    expected, history = once(lambda: trained(b, **settings), "batches of three", update)
    first = LayerTrainer(layer(**settings), b)
    stats = [first.update() for _ in range(stop)]
    state = {"trainer": first.state_dict(), "filters": first.layer.filters}
    state = load_checkpoint(save_checkpoint(tmp_path, stop, state))
    same = layer(**settings)
    same.filters.copy_(state["filters"])
    second = LayerTrainer(same, b, state=state["trainer"])
    assert second.updates_done == stop and second.updates == 9
    while not second.done:
        stats.append(second.update())
    assert torch.equal(second.layer.filters, expected)
    assert [timeless(s) for s in stats if s] == [timeless(s) for s in history]


def test_an_objective_that_is_not_finite_stops_before_the_filters_change(b):
    images = b.clone()
    trainer = LayerTrainer(layer(batch_size=None), images)
    trainer.update()
    before = trainer.layer.filters.clone()
    images[5, 0, 3, 3] = float("inf")
    with pytest.raises(Diverged, match=r"layer 1, epoch 2: .*model\.layer1\.lam \(2\.0\)"):
        trainer.update()
    assert torch.equal(trainer.layer.filters, before)


@pytest.mark.parametrize("solver", [None, SolverSettings()])
def test_images_whose_squares_overflow_float32_teach_the_same_filters(b, solver):
    learning = LearningSettings(epochs=2)
    plain, large = (
        learn_filters(s * b, 3, filter_size=5, lam_ratio=0.1, solver=solver, learning=learning)
        for s in (1.0, 2.0**100)
    )
    assert torch.equal(large.filters, plain.filters)
    assert large.history[-1].snr == pytest.approx(plain.history[-1].snr)


def test_images_without_contrast_give_finite_filters(textures):
    filters, history = trained(torch.zeros(2, 1, 12, 12))
    assert torch.isfinite(filters).all()
    assert history[-1].objective == 0 and history[-1].dead == 6


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_learn_filters_lowers_the_objective_below_that_of_random_filters(b, boundary):
    learning = LearningSettings(epochs=5, init="random")
    learned = learn_filters(b, 6, filter_size=5, lam=2.0, boundary=boundary, learning=learning)
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
        learned = learn_filters(
            images, 4, filter_size=7, lam=3.0, learning=learning, seed=seed
        ).filters
        similarity = torch.nn.functional.conv2d(planted, learned, padding=6).abs().amax((2, 3))
        # Every planted filter has its own learned one, nearly equal at the best shift.
        assert similarity.amax(1).min() > 0.98
        assert sorted(similarity.argmax(1).tolist()) == [0, 1, 2, 3]


def test_learn_filters_refuses_what_is_not_finite_or_not_images(b):
    wrong = b.clone()
    wrong[0, 0, 0, 0] = float("nan")
    for images, message in ((wrong, "must be finite"), (b[0], r"the shape \(N, C, H, W\)")):
        with pytest.raises(ValueError, match=message):
            learn_filters(images, 3, filter_size=5, lam=1.0)
    with pytest.raises(ValueError, match="24x24 are smaller than the 25x25 filters"):
        learn_filters(b, 3, filter_size=25, lam=1.0)


@pytest.mark.parametrize("p", [1.0, 0.8])
def test_the_settings_of_the_paper_train_two_layers_to_finite_filters(textures, tmp_path, p):
    layers = [
        LayerSettings(3, 5, lam=1.0, p=p, **PAPER),
        LayerSettings(6, 5, lam=1.0, connectivity="singles_and_doubles", **PAPER),
    ]
    net = DeconvNet(layers, PreprocessingSettings(steps=["mean", "laplacian"], scale="max"))
    with Monitor(progress=False) as monitor:
        results = train(net, textures(2, 3, 20, 20), RunFolder(tmp_path, {}), monitor)
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
        for key in (
            "update",
            "update_iterations",
            "epochs",
            "batch_size",
            "reinit_unused",
            "recenter",
        )
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
        LayerData.from_codes(net, codes, 2),
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


def assert_one_value_per_window(z, window=WINDOW):
    assert torch.equal(unpool(*max_pool(z, window), z.shape), z) and z.any()


@pytest.mark.parametrize("target", ["image", "both"])
@pytest.mark.parametrize("update", ["proximal", "cg"])
@pytest.mark.parametrize("pooled", [{}, IN_LOOP], ids=["not pooled", "in the loop"])
def test_the_objective_of_a_layer_that_explains_the_image_falls(below, target, update, pooled):
    codes = below[2]
    # More steps of cg fit a batch with filters of any length, which are normalised afterwards.
    iterations = 10 if update == "proximal" else 1
    net, trainer = second(
        below,
        target=target,
        update=update,
        update_iterations=iterations,
        epochs=3,
        reinit_unused=False,
        recenter=False,
        **pooled,
    )
    before = net.infer_next_layer(codes).layer(2).objective.sum().item()
    history = to_the_end(trainer)
    values = [stats.objective for stats in history]
    assert all(b < a for a, b in zip(values, values[1:], strict=False))
    assert_close(lengths(net.layer(2).filters), torch.ones(5), rtol=0, atol=1e-6)
    # Inferred from zero maps.
    after = net.infer_next_layer(codes).layer(2).objective.sum().item()
    assert after < 0.97 * before


def test_the_statistics_of_a_layer_that_explains_the_image_refer_to_the_image(below):
    net, trainer = second(below, batch_size=None, target="image", update="cg")
    codes = below[2]
    start = net.layer(2).filters.clone()
    solver = SolverSettings(method="fista", iterations=5, tolerance=0)
    solution = net.layer(2).infer(net.layer_problem(codes, 2), settings=solver)
    stats = trainer.update()
    assert not torch.equal(net.layer(2).filters, start)
    assert stats.reconstruction == pytest.approx(solution.reconstruction.mean().item(), rel=1e-4)
    ratio = codes.y.square().sum() / solution.residual.square().sum()
    assert stats.snr == pytest.approx(10 * ratio.log10().item(), abs=1e-2)
    # lam/2 times the squared error of the image, not of the maps.
    assert stats.reconstruction == pytest.approx(
        2.5 * solution.residual.double().square().sum().item() / 6, rel=1e-4
    )


@pytest.mark.parametrize("update", ["proximal", "cg"])
@pytest.mark.parametrize("method", ["fista", "ista"])
def test_states_that_are_kept_pooled_give_the_same_filters_as_states_kept_as_maps(
    below, update, method
):
    settings = {"update": update, "method": method, "epochs": 3, **IN_LOOP}
    net, trainer = second(below, **settings)
    assert trainer.warm_starts.window == WINDOW
    dense_net, dense = second(below, **settings)
    dense.warm_starts = WarmStarts(torch.arange(6))
    history, expected = to_the_end(trainer), to_the_end(dense)
    assert torch.equal(net.layer(2).filters, dense_net.layer(2).filters)
    assert [timeless(s) for s in history] == [timeless(s) for s in expected]
    every = torch.arange(6)
    assert torch.equal(trainer.warm_starts[every], dense.warm_starts[every])
    values = sum(tensor.numel() for tensor in trainer.warm_starts.tensors)
    maps = pooled_shape((5, *dense.warm_starts.shape[1:]), WINDOW)
    assert values == 2 * 6 * torch.Size(maps).numel()
    assert 2 * values < dense.warm_starts.tensors[0].numel()


@pytest.mark.parametrize("method", ["fista", "ista"])
def test_each_visit_starts_from_the_maps_and_the_step_of_the_last(below, method):
    net, trainer = second(below, batch_size=None, chunk=6, method=method, **IN_LOOP)
    trainer.update()
    order = trainer.sampler.batch(1, 0)
    expected = net.layer(2).infer(
        net.layer_problem(below[2], 2, order),
        state=trainer.warm_starts[order],
        step=trainer.warm_starts.scalar("step", order),
        training=True,
    )
    trainer.update()
    assert torch.equal(trainer.warm_starts.scalar("step", order), expected.step)
    states = trainer.warm_starts[order]
    # Except filters that were drawn again at the end of the epoch.
    learned = [k for k in range(5) if states[:, k].any()]
    assert len(learned) > 2 and torch.equal(states[:, learned], expected.z[:, learned])


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
def test_learning_through_the_layers_below_resumes_bit_by_bit(
    below, once, tmp_path, settings, stop
):
    def learned():
        net, trainer = second(below, **settings)
        return net, to_the_end(trainer)

    net, history = once(learned, "resumes", str(settings))
    same, first = second(below, **settings)
    stats = [first.update() for _ in range(stop)]
    state = {"trainer": first.state_dict(), "filters": same.layer(2).filters}
    state = load_checkpoint(save_checkpoint(tmp_path, stop, state))
    again, trainer = second(below, state=state["trainer"], filters=state["filters"], **settings)
    stats += to_the_end(trainer)
    assert torch.equal(again.layer(2).filters, net.layer(2).filters)
    assert [timeless(s) for s in stats if s] == [timeless(s) for s in history]


@pytest.mark.parametrize("update", ["proximal", "cg"])
def test_redrawn_filters_leave_maps_with_one_value_per_window(below, update):
    settings = {"batch_size": None, "update": update, **IN_LOOP}
    net, trainer = second(below, **settings)
    _, other = second(below, reinit_unused=False, **settings)
    every = torch.arange(6)
    for one in (trainer, other):
        one.layer.filters[2] = 0
        assert one.update().dead == 1
    after, expected = trainer.warm_starts[every], other.warm_starts[every]
    assert_one_value_per_window(after)
    fresh = [k for k in range(5) if not after[:, k].any()]
    assert 2 in fresh and len(fresh) < 5
    expected[:, fresh] = 0
    assert torch.equal(after, expected)
    assert_close(lengths(net.layer(2).filters), torch.ones(5), rtol=0, atol=1e-6)
    assert trainer.update().dead == 0
    assert_one_value_per_window(trainer.warm_starts[every])


def test_shifted_filters_leave_maps_with_one_value_per_window(below):
    net, trainer = second(
        below, batch_size=None, epochs=12, reinit_unused=False, update="cg", **IN_LOOP
    )
    for _ in range(3):
        trainer.update()
    before = trainer.warm_starts[torch.arange(6)]
    # After the third epoch, put three filters at a side of their frames.
    off = torch.zeros_like(net.layer(2).filters)
    off[:, :, 1, 1] = 1
    for k, place in {0: (0, 1), 1: (2, 2), 3: (1, 0)}.items():
        off[k] = 0
        off[k, :, place[0], place[1]] = 1
    net.layer(2).set_filters(off)
    moves = centring_shifts(net.layer(2).filters)
    assert moves == {0: (1, 0), 1: (-1, -1), 3: (0, 1)}
    trainer._recenter()
    after = trainer.warm_starts[torch.arange(6)]
    assert_one_value_per_window(after)
    assert centring_shifts(net.layer(2).filters) == {}
    moved = before.clone()
    for k, (rows, columns) in moves.items():
        moved[:, k] = before[:, k].roll((-rows, -columns), (1, 2))
        if rows:
            moved[:, k, slice(-1, None) if rows > 0 else slice(0, 1)] = 0
        if columns:
            moved[:, k, :, slice(-1, None) if columns > 0 else slice(0, 1)] = 0
    # Where several values meet in a window, the largest stays.
    assert torch.equal(after, unpool(*max_pool(moved, WINDOW), moved.shape))
    assert torch.count_nonzero(after) < torch.count_nonzero(moved)


def test_a_layer_explains_its_problem_rather_than_its_input(b):
    trainer = LayerTrainer(
        layer(batch_size=None), LayerData.from_tensor(b, lambda images: LayerProblem(-b[images]))
    )
    negative = layer(batch_size=None)
    plain = LayerTrainer(negative, b)
    assert torch.equal(trainer.layer.filters, plain.layer.filters)
    trainer.update(), plain.update()
    assert_close(trainer.warm_starts[EVERY], -plain.warm_starts[EVERY], rtol=1e-4, atol=1e-5)
    assert_close(trainer.layer.filters, plain.layer.filters, rtol=0, atol=1e-5)
