"""Features over the epochs of training: the strongest activations are found for every order of the
images, projected like everything else, and survive interruptions of the run."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
)
from deconvnet.monitoring.strongest_activations import Peaks, Snapshot, SnapshotPlan
from deconvnet.network.codes import Codes
from deconvnet.network.layer import Layer
from deconvnet.storage.checkpoint_files import load_checkpoint, save_checkpoint
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.visualization import pixel_features
from deconvnet.visualization.drawing.canvas import GAP, LINE, PAGE
from deconvnet.visualization.drawing.sheet import CARD, CARD_HEIGHT
from deconvnet.visualization.evolution.evolution import (
    Evolution,
    append_epoch,
    join_evolutions,
    load_evolution,
    load_if_valid,
)
from deconvnet.visualization.evolution.from_checkpoints import project_checkpoints
from deconvnet.visualization.evolution.while_learning import (
    plan_snapshots,
    project_snapshot,
    shown_epochs,
)
from deconvnet.visualization.pictures.evolution_picture import (
    LABEL,
    evolution_cards,
    evolution_picture,
)
from deconvnet.visualization.projection.feature_projection import signed_rgb
from deconvnet.visualization.projection.projector import Projector

FAST = SolverSettings(iterations=15, training_iterations=3)


def strongest(z, first):
    """(image, row, column) of every map by comparing everything with everything; None: nowhere."""
    top, bottom, left, right = first
    found = []
    for maps in z.transpose(0, 1):
        units = [
            (not (top <= i < bottom and left <= j < right), -abs(maps[n, i, j].item()), n, i, j)
            for n, i, j in maps.nonzero().tolist()
        ]
        found.append(min(units)[2:] if units else None)
    return found


def seen(z, order, chunk, first):
    peaks = Peaks.none(z)
    for images in order.split(chunk):
        peaks = peaks.updated(z[images], images, first)
    return peaks


def places(peaks):
    each = zip(*(p.tolist() for p in (peaks.images, peaks.rows, peaks.columns)), strict=True)
    return [None if place == (-1, -1, -1) else place for place in each]


@pytest.mark.parametrize("first", [(0, 5, 0, 6), (1, 4, 2, 4), (2, 3, 5, 6)])
def test_peaks_are_the_strongest_for_every_order_and_batch_size(first):
    generator = torch.Generator().manual_seed(0)
    # Few different magnitudes, so that there are equals everywhere.
    z = torch.randint(-3, 4, (9, 7, 5, 6), generator=generator).float()
    z *= torch.rand(z.shape, generator=generator) < 0.1
    z[:, 2] = 0
    expected = strongest(z, first)
    assert expected[2] is None and any(
        place and not (first[0] <= place[1] < first[1] and first[2] <= place[2] < first[3])
        for place in expected
    ) == (first == (2, 3, 5, 6))
    for chunk in (1, 2, 4, 9):
        order = torch.randperm(9, generator=generator)
        peaks = seen(z, order, chunk, first)
        assert places(peaks) == expected
        for k, place in enumerate(expected):
            assert peaks.values[k] == (z[place[0], k, place[1], place[2]] if place else 0)


def test_peaks_survive_a_checkpoint(tmp_path):
    z = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    half = Peaks.none(z).updated(z[:2], torch.arange(2), (0, 5, 1, 4))
    state = load_checkpoint(save_checkpoint(tmp_path, 1, half.state_dict()))
    again = Peaks.from_state_dict(state, torch.device("cpu"))
    rest = (z[2:], torch.arange(2, 4), (0, 5, 1, 4))
    for name, value in vars(again.updated(*rest)).items():
        assert torch.equal(value, vars(half.updated(*rest))[name]), name


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (12, (1, 2, 5, 10, 12)),
        (64, (1, 2, 5, 10, 20, 30, 40, 64)),
        (100, (1, 2, 5, 10, 20, 30, 40, 64, 100)),
    ],
)
def test_the_epochs_of_figure_4_that_a_layer_reaches_and_its_last_are_shown(epochs, expected):
    assert shown_epochs(epochs) == expected


# While a layer learns


@pytest.fixture(scope="module")
def b(textures):
    """Eight grey images without their mean."""
    images = textures(8, 1, 16, 16)
    return images - images.mean((2, 3), keepdim=True)


def trainer_of(b, plan=None, *, chunk=8, state=None, filters=None, **learning):
    learning = {"epochs": 3, "batch_size": 4, **learning}
    settings = LayerSettings(5, 5, solver=FAST, learning=LearningSettings(**learning))
    layer = Layer(settings, 1, seeded_generator(0, 1))
    if filters is not None:
        layer.filters.copy_(filters)
    return LayerTrainer(layer, b, chunk=chunk, snapshot_plan=plan, state=state)


def snapshots(trainer):
    """The snapshots of all epochs that are left."""
    found = []
    while not trainer.done:
        trainer.update()
        found.append(trainer.snapshot)
    return [snapshot for snapshot in found if snapshot]


def assert_same_snapshots(found, expected):
    assert [snapshot.epoch for snapshot in found] == [snapshot.epoch for snapshot in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.filters, other.filters)
        for name, value in vars(one.peaks).items():
            assert torch.equal(value, vars(other.peaks)[name]), name


PLAN = SnapshotPlan((1, 3), (4, 16, 4, 16))


def test_a_snapshot_holds_the_peaks_of_its_epoch_and_does_not_change_learning(b):
    plain, recorded = (trainer_of(b, w, reinit_unused=False, recenter=False) for w in (None, PLAN))
    for _ in range(2):
        plain.update(), recorded.update()
    snapshot, z = recorded.snapshot, plain.warm_starts[torch.arange(8)]
    assert snapshot.epoch == 1 and torch.equal(snapshot.filters, plain.layer.filters)
    assert places(snapshot.peaks) == strongest(z, PLAN.first)
    plain.update(), recorded.update()
    assert recorded.snapshot is None
    assert [snapshot.epoch for snapshot in snapshots(recorded)] == [3]
    assert snapshots(plain) == []
    assert torch.equal(plain.layer.filters, recorded.layer.filters)


def test_a_snapshot_holds_the_filters_before_they_are_recentred_or_reinitialised(b):
    plan = SnapshotPlan((4,), (0, 20, 0, 20))
    settings = {"epochs": 12, "batch_size": None}
    cared, left = (
        trainer_of(b, plan, reinit_unused=c, recenter=c, **settings) for c in (True, False)
    )
    for trainer in (cared, left):
        for epoch in range(4):
            if epoch == 3:
                # All alike: one of two equal filters is re-initialised; a corner: recentred.
                f = torch.zeros(5, 1, 5, 5)
                f[:, :, 0, 0] = 1
                trainer.layer.set_filters(f)
                for part, state in trainer._states():
                    trainer.warm_starts[part] = torch.zeros_like(state)
            trainer.update()
    assert not torch.equal(cared.layer.filters, left.layer.filters)
    assert_same_snapshots([cared.snapshot], [left.snapshot])
    assert torch.equal(left.snapshot.filters, left.layer.filters)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_snapshots_are_the_same_if_learning_is_interrupted_within_an_epoch(b, tmp_path, stop):
    expected = snapshots(trainer_of(b, PLAN, batch_size=3))
    first = trainer_of(b, PLAN, batch_size=3)
    found = []
    for _ in range(stop):
        first.update()
        found += [first.snapshot] if first.snapshot else []
    state = load_checkpoint(save_checkpoint(tmp_path, stop, first.state_dict()))
    again = trainer_of(b, PLAN, batch_size=3, state=state, filters=first.layer.filters)
    assert again.snapshot is None
    assert_same_snapshots(found + snapshots(again), expected)


def test_peaks_do_not_depend_on_the_chunk_size(b):
    found, expected = (snapshots(trainer_of(b, PLAN, chunk=chunk)) for chunk in (3, 8))
    for one, other in zip(found, expected, strict=True):
        assert places(one.peaks) == places(other.peaks)
        assert_close(one.peaks.values, other.peaks.values, rtol=1e-3, atol=1e-4)


def test_merged_peaks_of_parts_are_those_of_all_images():
    z = torch.randn(9, 6, 7, 7).round()
    z[:, 4] = 0
    z[:, 5, 2:5, 2:5] = 0
    region, numbers = (2, 5, 2, 5), torch.arange(9)
    expected = Peaks.none(z).updated(z, numbers, region)
    for parts in ([[0, 3, 8], [1, 2], [4, 5, 6, 7]], [[5], [6, 7, 8, 0, 1, 2, 3, 4], []]):
        found = Peaks.none(z)
        for part in map(torch.tensor, parts):
            some = Peaks.none(z)
            if len(part):
                some = some.updated(z[part], numbers[part], region)
            found = found.merged(some)
        for key, value in vars(expected).items():
            assert torch.equal(vars(found)[key], value), key


# Projections of what was seen


def network(color="grey", boundary="valid", pool=(1, 2, 2), size=3):
    learning = LearningSettings(epochs=2)
    first = LayerSettings(4, 5, pool=list(pool), boundary=boundary, solver=FAST, learning=learning)
    second = LayerSettings(5, size, lam=5.0, boundary=boundary, solver=FAST, learning=learning)
    return DeconvNet([first, second], PreprocessingSettings(color=color, steps=["mean"]))


def inferred(net, images):
    net.preprocessing.fit(images)
    return net.infer(images)


def snapshot_of(net, codes, layer, epoch=1):
    z, first = codes.layer(layer).z, plan_snapshots(net, lower(codes, layer), layer).first
    peaks = Peaks.none(z).updated(z, torch.arange(len(z)), first)
    return Snapshot(epoch, peaks, net.layer(layer).filters)


def lower(codes, layer):
    """What is known while a layer learns: the layers below."""
    return Codes(codes.layers[: layer - 1], codes.y, codes.record)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    ("color", "boundary", "pool"),
    [
        ("grey", "valid", (1, 2, 2)),
        ("rgb", "valid", (2, 2, 2)),
        ("ycbcr", "valid", (1, 2, 3)),
        ("rgb", "circular", (1, 2, 2)),
    ],
)
def test_a_snapshot_of_a_trained_layer_shows_its_pixel_features(
    textures, layer, color, boundary, pool
):
    """The other way to the same: every layer's dense operator on maps with one entry each."""
    images = textures(10, 3, 24, 20)
    net = network(color, boundary, pool)
    codes = inferred(net, images)
    expected = pixel_features(net, codes, layer)
    found = project_snapshot(net, lower(codes, layer), layer, snapshot_of(net, codes, layer, 7))
    assert found.epochs == (7,) and found.maps == tuple(range(len(expected.values)))
    assert_close(found.tiles[0], signed_rgb(net, expected.tiles), rtol=0, atol=1e-6)
    assert torch.equal(found.boxes[0], expected.boxes)
    assert torch.equal(found.values[0], expected.values)
    assert found.tiles[0].flatten(1).any(1).all()


def test_a_tile_is_the_whole_image_if_the_field_is_larger(textures):
    images = textures(3, 3, 24, 20)
    net = network(pool=(1, 3, 3), size=8)
    codes = inferred(net, images)
    snapshot = snapshot_of(net, codes, 2)
    found = project_snapshot(net, lower(codes, 2), 2, snapshot)
    assert found.tiles.shape == (1, 5, 1, 24, 24)
    assert found.boxes[0, :, 1:].tolist() == [[0, 0, 24]] * 5
    for k, (n, i, j) in enumerate(places(snapshot.peaks)):
        z = torch.zeros_like(codes.layer(2).z[:1])
        z[0, k, i, j] = snapshot.peaks.values[k].sign()
        painted = net.operator(codes.select([n]), 2)(z)[0]
        assert_close(found.tiles[0, k, :, :, :20], painted, rtol=0, atol=1e-6)
        assert not found.tiles[0, k, :, :, 20:].any()


def test_a_map_that_was_not_active_has_an_empty_tile_and_no_image(textures):
    net = network()
    codes = inferred(net, textures(3, 3, 20, 20))
    snapshot = snapshot_of(net, codes, 2)
    z = codes.layer(2).z.clone()
    z[:, 3] = 0
    peaks = Peaks.none(z).updated(z, torch.arange(3), (0, z.shape[2], 0, z.shape[3]))
    found = project_snapshot(net, lower(codes, 2), 2, replace(snapshot, peaks=peaks))
    assert found.images[0, 3] == -1 and found.values[0, 3] == 0 and not found.tiles[0, 3].any()
    assert (found.images[0, [0, 1, 2, 4]] >= 0).all()


# Files


def some_evolution(epochs=(1, 2), maps=(0, 4, 9), side=5, planes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    E, K = len(epochs), len(maps)
    tiles = torch.randn(E, K, planes, side, side, generator=generator)
    boxes = torch.randint(0, 50, (E, K, 4), generator=generator)
    return Evolution(tiles, epochs, maps, boxes, torch.randn(E, K, generator=generator))


def assert_same(found, expected):
    assert (found.epochs, found.maps) == (expected.epochs, expected.maps)
    for name in ("tiles", "boxes", "values"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_file_keeps_everything_and_tiles_of_any_magnitude_to_eleven_bits(tmp_path):
    e = some_evolution()
    e.tiles[0, 0] *= 1e-20
    e.tiles[1, 2] *= 1e20
    e.tiles[1, 1] = 0
    e.save(tmp_path / "folder" / "e.npz")
    found = load_evolution(tmp_path / "folder" / "e.npz")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {".deconvnet", "e.npz"}
    assert_same(replace(found, tiles=e.tiles), e)
    limits = e.tiles.abs().amax((2, 3, 4), keepdim=True) * 2.0**-11
    assert ((found.tiles - e.tiles).abs() <= limits).all()
    # What was read and written again is what was read.
    found.save(tmp_path / "again.npz")
    assert_same(load_evolution(tmp_path / "again.npz"), found)


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path):
    path = tmp_path / "e.npz"
    some_evolution().save(path)
    whole = path.read_bytes()
    files = {
        "cut off": whole[:-200],
        "flipped": bytes([*whole[:200], whole[200] ^ 8, *whole[201:]]),
        "empty": b"",
        "text": b"not at all",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "other.npz", tiles=np.zeros(3))
    with np.load(path) as file:
        np.savez(tmp_path / "short.npz", **{**file, "values": np.zeros((1, 3))})
    for name in (*files, "other.npz", "short.npz", "missing.npz", "."):
        with pytest.raises(ValueError, match="file of features over epochs") as caught:
            load_evolution(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_epochs_are_appended_and_later_epochs_are_dropped(tmp_path):
    path = tmp_path / "evolution" / "layer1.npz"
    columns = {n: some_evolution((n,), seed=n) for n in (1, 2, 5, 10)}
    for n in (1, 2, 5, 10):
        append_epoch(path, columns[n])
    written = load_evolution(path)
    assert written.epochs == (1, 2, 5, 10)
    # A run that went back to an epoch before the second, and sees another future.
    other = some_evolution((2,), seed=20)
    append_epoch(path, other)
    found = load_evolution(path)
    assert found.epochs == (1, 2)
    assert torch.equal(found.tiles[0], written.tiles[0])
    assert torch.equal(found.values, torch.cat([columns[1].values, other.values]))
    # A layer that starts over may have other maps.
    append_epoch(path, some_evolution((1,), maps=(0, 1, 2, 3), side=7))
    assert load_evolution(path).tiles.shape == (1, 4, 3, 7, 7)


def test_a_damaged_file_loses_its_epochs_but_does_not_stop_the_training(tmp_path, caplog):
    path = tmp_path / "layer1.npz"
    assert load_if_valid(path) is None and not caplog.records
    path.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        append_epoch(path, some_evolution((5,)))
    assert "its epochs are left out" in caplog.text and "epoch 5 is left out" in caplog.text
    assert caplog.text.count(str(path)) >= 2 and path.read_bytes() == b"damaged"
    path.unlink()
    append_epoch(path, some_evolution((6,)))
    assert load_if_valid(path).epochs == (6,)


def test_evolutions_of_different_networks_are_not_joined():
    e = some_evolution()
    for other in (some_evolution((3,), maps=(0, 4, 8)), some_evolution((3,), side=6)):
        with pytest.raises(ValueError, match="epoch 3 has 3 maps in tiles of.*one network"):
            join_evolutions([e, other])


# Any network, over its checkpoints


def cnn(seed, maps=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, maps, 3, padding=1),
        nn.ReLU(),
    )


@pytest.fixture(scope="module")
def x(textures):
    return textures(11, 3, 30, 26) - 0.4


def test_the_evolution_of_a_network_is_its_strongest_projections_checkpoint_by_checkpoint(x):
    models = [cnn(0), cnn(1)]
    e = project_checkpoints(map(Projector, models), x, "4", epochs=(10, 20))
    assert e.epochs == (10, 20) and e.maps == tuple(range(6))
    # The field of a unit: 5 pixels at a stride of 2, pooled by 2, three of them at a stride of 4.
    assert e.tiles.shape == (2, 6, 3, 15, 15)
    active = 0
    for column, model in enumerate(models):
        responses = model(x).detach()
        for k in range(6):
            value, place = responses[:, k].flatten().max(0)
            n, i, j = map(int, np.unravel_index(int(place), responses[:, k].shape))
            assert e.images[column, k] == (n if value > 0 else -1)
            assert e.values[column, k].item() == pytest.approx(value.item(), rel=1e-5)
            if value > 0:
                active += 1
                one = Projector(model)(x[n : n + 1], "4", [(0, k, i, j)])
                top, left, side = e.boxes[column, k, 1:].tolist()
                assert [top, left, top + side, left + side] == one.fields[0].tolist()
                canvas = nn.functional.pad(one.images[0], (20, 20, 20, 20))
                expected = canvas[:, 20 + top : 20 + top + side, 20 + left : 20 + left + side]
                assert_close(e.tiles[column, k], expected, rtol=1e-4, atol=1e-6)
    assert active >= 8


def test_units_whose_field_lies_inside_the_image_are_preferred_on_request(x):
    model = cnn(0)
    e = project_checkpoints([Projector(model)], x, "4", maps=range(6), inside=True)
    responses = model(x).detach()
    # Fields of 15 at a stride of 4 from -5 on, in images of 30x26.
    places = [[i for i in range(7) if -5 + 4 * i >= 0 and 10 + 4 * i <= size] for size in (30, 26)]
    whole = responses[:, :, places[0]][:, :, :, places[1]].amax((0, 2, 3))
    best = responses.amax((0, 2, 3))
    assert (whole > 0).any() and (whole < best).any()
    assert_close(e.values[0], torch.where(whole > 0, whole, best.clamp(min=0)))


def test_one_network_may_load_the_weights_of_each_checkpoint_in_turn(x):
    model, states = cnn(0), [cnn(seed).state_dict() for seed in (0, 1)]

    def projectors():
        for state in states:
            model.load_state_dict(state)
            yield Projector(model)

    expected = project_checkpoints([Projector(cnn(0)), Projector(cnn(1))], x, "3")
    assert expected.epochs == (1, 2)
    assert_same(project_checkpoints(projectors(), x, "3"), expected)


def test_a_data_set_is_prepared_for_the_network_image_by_image(x):
    pixels = x + 0.4
    projector = Projector(cnn(0))
    expected = project_checkpoints([projector], projector.prepare(pixels), "3")
    assert_same(project_checkpoints([projector], list(pixels), "3"), expected)
    labelled = [(image, 7) for image in pixels]
    assert_same(project_checkpoints([projector], labelled, "3"), expected)


@pytest.mark.parametrize("layer", ["3", "4"], ids=["before the rectifier", "after"])
def test_maps_that_are_never_active_have_no_image_and_default_maps_are_evenly_spaced(x, layer):
    model = cnn(0, maps=40)
    with torch.no_grad():
        model[3].bias[:] = torch.where(torch.arange(40) == 13, -100.0, 100.0)
    e = project_checkpoints([Projector(model)], x[:3], layer)
    assert e.maps == (0, 3, 5, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 36, 39)
    assert e.images[0].ge(0).tolist() == [k != 13 for k in e.maps]
    assert e.tiles[0].flatten(1).any(1).tolist() == [k != 13 for k in e.maps]
    assert e.values[0, 5] == 0
    chosen = project_checkpoints([Projector(model)], x[:3], layer, maps=[13, 39])
    assert_same(
        chosen,
        replace(
            e,
            maps=(13, 39),
            **{name: getattr(e, name)[:, [5, 15]] for name in ("tiles", "boxes", "values")},
        ),
    )
    nothing = project_checkpoints([Projector(model)], x[:3], layer, maps=[13])
    assert not nothing.tiles.any() and nothing.tiles.shape == (1, 1, 3, 15, 15)


@pytest.mark.parametrize("layer", [1, 2])
def test_checkpoints_of_a_deconvnet_show_its_pixel_features(textures, layer):
    images = textures(4, 3, 24, 20)
    net = network("ycbcr")
    codes = inferred(net, images)
    expected = pixel_features(net, codes, layer)
    e = project_checkpoints([Projector(net)], images, f"layer{layer}")
    assert torch.equal(e.boxes[0], expected.boxes)
    assert_close(e.values[0], expected.values, rtol=1e-4, atol=1e-5)
    tiles = signed_rgb(net, expected.tiles * expected.values.abs()[:, None, None, None])
    assert_close(e.tiles[0], tiles, rtol=1e-4, atol=1e-5)


def test_mismatched_input_is_refused_in_one_line(x):
    projector, broken = Projector(cnn(0)), Projector(cnn(0))
    broken.model[3].weight.data[2] = torch.nan
    run = partial(project_checkpoints, x=x[:2], layer="4")
    for arguments, message in (
        ({"projectors": []}, "0 projectors: expected at least one"),
        ({"projectors": [projector], "epochs": [1, 2]}, r"1 projectors.*epochs=\[1, 2\]"),
        ({"projectors": [projector] * 2, "epochs": [1]}, r"epochs=\[1\]: fewer than"),
        ({"projectors": [projector], "maps": [2, 6]}, r"maps=\[2, 6\]: layer 4 has maps 0 to 5"),
        ({"projectors": [projector], "maps": []}, r"maps=\[\]"),
        ({"projectors": [projector], "x": []}, "x: no images"),
        ({"projectors": [projector], "x": [x[0], x[1, :, :20]]}, "x: images of different sizes"),
        ({"projectors": [projector, broken]}, "layer 4: its responses at checkpoint 2 are not"),
        ({"projectors": [projector, Projector(cnn(1, maps=5))]}, "epoch 2 has 5 maps"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run(**arguments)
        assert "\n" not in str(caught.value)


# Pictures


def tile_of(picture, row, column, side):
    """The pixels of a tile in a picture of one column of maps."""
    top, left = 2 * LINE + GAP + row * (side + LINE + GAP), LABEL + column * (side + GAP)
    return picture[:, top : top + side, left : left + side]


def test_the_picture_has_a_row_for_a_map_and_a_column_for_an_epoch():
    e = some_evolution((1, 2, 5), maps=(0, 1, 2, 7), side=7, planes=1)
    e = replace(e, values=e.values.abs())
    e.tiles[1, 2] = 0
    picture = evolution_picture(e)
    assert picture.shape[1] == 2 * LINE + 4 * (84 + LINE + GAP)
    assert picture.shape[2] >= LABEL + 3 * (84 + GAP)
    assert picture.min() >= 0 and picture.max() <= 1
    for row in range(4):
        for column in range(3):
            shown = tile_of(picture, row, column, 84)[:, ::12, ::12]
            tile = e.tiles[column, row]
            assert (shown == 0.5).all() == (row == 2 and column == 1)
            # Grey is zero, and within the range shown brightness is the value.
            within = (shown > 0) & (shown < 1)
            scale = ((shown - 0.5) / tile)[within]
            assert_close(scale, scale.mean().expand_as(scale), equal_nan=True)
            assert torch.equal((shown > 0.5), (tile > 0).expand(3, -1, -1))


def test_a_feature_whose_activation_changes_its_sign_looks_the_same():
    e = some_evolution((1, 2), side=7)
    e.tiles[1], e.values[:] = -e.tiles[0], torch.tensor([[2.0, -3.0, 1.0], [-2.0, 4.0, -1.0]])
    positive = e.with_positive_values()
    assert torch.equal(positive.values, e.values.abs())
    assert torch.equal(positive.tiles[0], positive.tiles[1])
    assert torch.equal(positive.tiles[0, 0], e.tiles[0, 0])
    assert torch.equal(positive.tiles[0, 1], -e.tiles[0, 1])
    picture = evolution_picture(e)
    for row in range(3):
        assert torch.equal(*(tile_of(picture, row, column, 84) for column in (0, 1)))


def test_evolutions_on_cards_are_small_and_show_every_map():
    for epochs in (1, 4, 8):
        e = some_evolution(tuple(range(1, epochs + 1)), maps=tuple(range(20)), side=17)
        cards = evolution_cards(e)
        assert all(card.shape[1] <= CARD_HEIGHT and card.shape[2] <= CARD for card in cards)
        height = sum(card.shape[1] for card in cards)
        assert len(cards) <= 6 and height > 0


def test_the_magnitude_of_a_tile_does_not_change_the_picture():
    e = some_evolution((1, 2), side=6)
    scaled = replace(e, tiles=e.tiles * torch.tensor([1e-6, 1.0]).view(2, 1, 1, 1, 1))
    assert_close(evolution_picture(scaled), evolution_picture(e), rtol=0, atol=1e-5)


def test_the_image_is_named_below_a_tile_where_it_changes():
    e = some_evolution((1, 2, 5), side=7)
    e.boxes[..., 0] = torch.tensor([[3, 3, 3], [3, 4, -1], [3, 4, 3]])
    picture, named = evolution_picture(e), []
    for row in range(3):
        for column in range(3):
            top = 2 * LINE + GAP + row * (84 + LINE + GAP) + 84
            left = LABEL + column * (84 + GAP)
            if (picture[:, top : top + LINE, left : left + 84] < 0.5).any():
                named.append((row, column))
    assert named == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 2)]


@pytest.mark.parametrize(("maps", "rows"), [(3, [0, 10, 19]), (1, [0]), (40, list(range(20)))])
def test_a_picture_shows_evenly_spaced_maps(maps, rows):
    e = some_evolution((1,), maps=tuple(range(20)), side=5)
    few = replace(
        e,
        maps=tuple(rows),
        **{name: getattr(e, name)[:, rows] for name in ("tiles", "boxes", "values")},
    )
    shown, expected = evolution_picture(e, maps=maps), evolution_picture(few, maps=40)
    # But for the title, which may be the widest of all.
    shown, expected = shown[:, LINE:], expected[:, LINE:]
    width = min(shown.shape[2], expected.shape[2])
    assert torch.equal(shown[:, :, :width], expected[:, :, :width])
    assert (shown[:, :, width:] == 1).all() and (expected[:, :, width:] == 1).all()


def test_pictures_of_large_tiles_and_many_epochs_stay_small():
    for epochs, side in ((9, 120), (1, 120), (9, 7)):
        e = some_evolution(tuple(range(1, epochs + 1)), maps=tuple(range(16)), side=side, planes=1)
        height, width = evolution_picture(e).shape[1:]
        assert width <= PAGE and height * width < 2e6


def test_a_picture_without_any_row_is_refused():
    with pytest.raises(ValueError, match="maps=0"):
        evolution_picture(some_evolution(), maps=0)
