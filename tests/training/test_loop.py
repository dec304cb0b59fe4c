"""A run that was stopped, damaged or extended resumes exactly and shows every step once."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import StopAt, assert_same_network, no_pictures, shown_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.testing import assert_close

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    load,
)
from deconvnet.monitoring.monitor import METRICS, Monitor
from deconvnet.network.layer import Layer
from deconvnet.storage.checkpoint_files import load_checkpoint, save_checkpoint
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.support.seeding import seeded_generator
from deconvnet.training import training_set
from deconvnet.training.loop import Interrupted, train
from deconvnet.training.run_folder import RunFolder
from deconvnet.training.training_set import ImageSource, TrainingSet
from deconvnet.visualization.evolution.evolution import load_evolution

FAST = SolverSettings(iterations=8, training_iterations=3)


def timeless(stats):
    return {k: v for k, v in asdict(stats).items() if "seconds" not in k and k != "loads"}


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


@pytest.fixture(scope="module")
def images(textures):
    return textures(5, 3, 20, 20)


def train_in(
    folder,
    images,
    depth=2,
    *,
    settings=SETTINGS,
    resume="auto",
    stop=None,
    pictures=False,
    **options,
):
    net = network(depth)
    monitor = StopAt(folder, stop) if stop else Monitor(folder, progress=False, config="some: text")
    with monitor, nullcontext() if pictures else no_pictures():
        results = train(net, images, RunFolder(folder, settings, resume), monitor, **options)
    return net, results


def assert_same_results(results, expected):
    assert [timeless(result) for result in results] == [timeless(result) for result in expected]


def assert_same_evolution(folder, expected):
    """The features of all layers over the epochs, bit by bit."""
    files, expected_files = (sorted((f / "evolution").iterdir()) for f in (folder, expected))
    assert [path.name for path in files] == [path.name for path in expected_files]
    for one, other in zip(
        map(load_evolution, files), map(load_evolution, expected_files), strict=True
    ):
        assert (one.epochs, one.maps) == (other.epochs, other.maps)
        for name in ("tiles", "boxes", "values"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def events(folder):
    accumulator = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "tensors", "histograms"), 0)
    )
    accumulator.Reload()
    return accumulator


def scalars(folder):
    page = events(folder)
    return {
        tag: [(event.step, event.value) for event in page.Scalars(tag)]
        for tag in page.Tags()["scalars"]
        if not any(word in tag for word in ("second", "memory"))
    }


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """An uninterrupted run of two layers: (folder, network, results)."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *train_in(folder, images, pictures=True)


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A folder with a copy of that run, which a test may change."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_leaves_checkpoints_pictures_and_the_network(finished, images):
    folder, net, results = finished
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-00000009.pt", "step-00000012.pt"]
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert pictures == {
        *(
            f"layer{number}-{kind}.png"
            for number in (1, 2)
            for kind in ("filters", "maps", "reconstructed", "evolution")
        ),
        *(
            "layer2-patches.png",
            "layer2-parts.png",
        ),
    }
    assert_same_network(load(folder / "network.safetensors"), net)
    assert_same_network(load(folder), net)
    codes = net.infer(images)
    # Each layer explains maps of unit rms, the first one the preprocessed images.
    assert net.layer(1).scale == 1
    assert_close(net.layer(2).scale, codes.layer(1).pooled.square().mean().sqrt())
    for number, result in enumerate(results, 1):
        assert result.layer == number and result.seconds > 0
        assert result.snr == pytest.approx(net.snr(codes, number), abs=1e-4)
        objective = codes.layer(number).objective.mean().item()
        assert result.objective == pytest.approx(objective, rel=1e-6)
        assert result.density == pytest.approx(codes.layer(number).density, rel=1e-4)


def test_a_run_leaves_its_features_after_some_of_the_epochs(finished):
    folder, net, _ = finished
    evolutions = [load_evolution(folder / "evolution" / f"layer{number}.npz") for number in (1, 2)]
    for e, maps in zip(evolutions, (4, 3), strict=True):
        assert e.epochs == (1, 2) and e.maps == tuple(range(maps))
        assert (e.images >= 0).all() and not torch.equal(e.tiles[0], e.tiles[1])
    # A projection of layer 1 is a filter with the sign of the activation, the last as learned.
    signed = evolutions[0].values[1].sign().view(-1, 1, 1, 1) * net.layer(1).filters
    assert_close(evolutions[0].tiles[1], signed, rtol=0, atol=1e-3)


def test_the_tensorboard_page_has_curves_pictures_and_the_configuration(finished):
    page = events(finished[0])
    tags, pictures = page.Tags(), shown_pictures(page)
    for number in (1, 2):
        for key in ("objective", "reconstruction", "sparsity", "density", "snr", "dead", "double"):
            steps = [event.step for event in page.Scalars(f"layer{number}/{key}")]
            # Updates since the run began: three an epoch, two epochs a layer.
            assert steps == ([3, 6] if number == 1 else [9, 12])
        assert f"layer{number}/seconds_per_image" in tags["scalars"]
        assert f"layer{number}/result/text_summary" in tags["tensors"]
        last = 6 if number == 1 else 12
        # The filters at several steps, so that one sees them develop.
        assert [step for step, _ in pictures[f"0 filters/layer{number}"]] == [last - 3, last]
        # One card for each of the five images.
        assert pictures[f"5 reconstructed/layer{number}"] == [(last, 5)]
        assert pictures[f"4 evolution/layer{number}"] == [(last, 1)]
        assert pictures[f"6 maps/layer{number}"][0][0] == last
        assert f"layer{number}/nonzero z" in tags["histograms"]
        histograms = page.Histograms(f"layer{number}/energy of each map")
        assert [event.step for event in histograms] == [last - 3, last]
        for key in ("snr", "density", "objective", "dead"):
            assert [event.step for event in page.Scalars(f"result/layer{number} {key}")] == [last]
    assert {"1 patches/layer2", "7 parts/layer2"} <= pictures.keys()
    text = page.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "some: text" in text


def test_the_page_opens_on_the_filters_and_every_tag_has_a_description(finished):
    page = events(finished[0])
    tags = page.Tags()
    shown = [tag for kind in ("scalars", "histograms") for tag in tags[kind]]
    shown += shown_pictures(page)
    assert min(shown) == "0 filters/layer1"
    for tag in [*shown, "config/text_summary", "layer1/result/text_summary"]:
        description = page.SummaryMetadata(tag).summary_description
        assert description.endswith("."), tag
        if "text" not in tag:
            assert "The step counts filter updates" in description, tag


def test_runs_are_compared_by_the_results_of_the_layers_that_they_have(finished):
    content = events(finished[0]).SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    keys = ("snr", "density", "objective")
    expected = [f"result/layer{number} {key}" for number in (1, 2) for key in keys]
    assert [info.name.tag for info in experiment.metric_infos] == expected
    assert all(info.display_name and info.description for info in experiment.metric_infos)


def test_the_objective_on_the_page_is_that_of_its_two_terms(finished):
    curves = scalars(finished[0])
    for number in (1, 2):
        terms = (curves[f"layer{number}/{key}"] for key in ("reconstruction", "sparsity"))
        for (_, a), (_, b), (_, whole) in zip(
            *terms, curves[f"layer{number}/objective"], strict=True
        ):
            assert whole == pytest.approx(a + b, rel=1e-6)


def test_adding_a_layer_leaves_the_layers_below_unchanged(finished, images, tmp_path):
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
    with no_pictures(), pytest.raises(MemoryError), Dies(tmp_path, progress=False) as monitor:
        train(network(), images, RunFolder(tmp_path, SETTINGS), monitor)
    # What has not been learned is not saved.
    assert load(tmp_path).depth == 1
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "layer2": {"lam": 0.5}}}
    wider = network()
    wider.layers[1] = Layer(LayerSettings(7, 3, solver=FAST), 4, seeded_generator(0, 2))
    with no_pictures(), Monitor(tmp_path, progress=False) as monitor:
        results = train(wider, images, RunFolder(tmp_path, settings), monitor)
    assert len(results) == 2 and load(tmp_path).layer(2).filters.shape == (7, 4, 3, 3)


def test_fewer_layers_in_the_same_folder_equal_those_of_the_deeper_run(
    finished, finished_copy, images
):
    _, expected, results = finished
    net, shallower = train_in(finished_copy, images, depth=1)
    assert_same_results(shallower, results[:1])
    assert torch.equal(net.layer(1).filters, expected.layer(1).filters)


def test_the_same_command_again_trains_nothing_and_returns_the_same(
    finished, finished_copy, images
):
    files = sorted((finished_copy / "checkpoints").iterdir())
    net, results = train_in(finished_copy, images)
    assert_same_network(net, finished[1])
    assert_same_results(results, finished[2])
    assert sorted((finished_copy / "checkpoints").iterdir()) == files


@pytest.mark.parametrize(
    "moment",
    [
        *(("update", 1), ("update", 3), ("update", 5), ("update", 7), ("update", 12)),
        *(("inference", 1), ("inference", 2), ("result", 1)),
    ],
    ids=lambda moment: f"{moment[0]} {moment[1]}",
)
def test_a_run_that_was_stopped_resumes_bit_by_bit(finished, images, tmp_path, moment):
    _, expected, results = finished
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    pictures = moment in (("update", 7), ("result", 1))
    with pytest.raises(Interrupted):
        train_in(tmp_path, images, stop=moment, pictures=pictures)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not (tmp_path / "network.safetensors").exists()
    net, resumed = train_in(tmp_path, images, pictures=pictures)
    assert_same_network(net, expected)
    assert_same_results(resumed, results)
    assert_same_evolution(tmp_path, finished[0])


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


def test_a_run_whose_layers_explain_the_image_resumes_bit_by_bit(images, tmp_path):
    def run(folder, stop=None):
        net = iccv()
        monitor = StopAt(folder, stop) if stop else Monitor(folder, progress=False)
        with monitor, nullcontext() if folder.name == "whole" else no_pictures():
            return net, train(net, images, RunFolder(folder, {}), monitor)

    expected, results = run(tmp_path / "whole")
    assert len(results) == 3 and expected.layer(2).scale == 1 != expected.layer(3).scale
    for stop in (("update", 8), ("inference", 2)):
        folder = tmp_path / f"{stop[0]} {stop[1]}"
        with pytest.raises(Interrupted):
            run(folder, stop)
        net, found = run(folder)
        assert_same_network(net, expected)
        assert_same_results(found, results)
        assert_same_evolution(folder, tmp_path / "whole")
    codes = load(tmp_path / "whole").infer(images)
    for number, result in enumerate(results, 1):
        assert result.snr == pytest.approx(expected.snr(codes, number), abs=1e-4)
        assert result.density == pytest.approx(codes.layer(number).density, rel=1e-4)
    found = scalars(tmp_path / "whole" / "inference" / "layer2")["inference/objective by iteration"]
    values = [value for _, value in found]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(values, values[1:], strict=False))


def age_event_files(folder):
    """The names of event files, by which they are read in order, count seconds: a second less."""
    for path in folder.rglob("events.out.tfevents.*"):
        *kind, seconds, rest = path.name.split(".", 4)
        path.rename(path.with_name(".".join([*kind, str(int(seconds) - 1), rest])))


@pytest.mark.parametrize("stop", [("update", 3), ("update", 8), None])
def test_the_curves_of_a_resumed_run_have_every_point_once(finished, images, tmp_path, stop):
    if stop:
        with pytest.raises(Interrupted):
            train_in(tmp_path, images, stop=stop)
    else:
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    age_event_files(tmp_path)
    train_in(tmp_path, images)
    assert scalars(tmp_path) == scalars(finished[0])


def test_points_after_the_checkpoint_of_a_resumed_run_are_not_shown_twice(
    finished, finished_copy, images
):
    newest = max((finished_copy / "checkpoints").iterdir())
    newest.unlink()
    age_event_files(finished_copy)
    train_in(finished_copy, images)
    assert scalars(finished_copy) == scalars(finished[0])
    curve = Path("inference") / "layer2"
    assert scalars(finished_copy / curve) == scalars(finished[0] / curve)


@pytest.mark.parametrize("stop", [("update", 3), ("update", 8), None])
def test_the_metrics_of_a_resumed_run_have_every_line_once(finished, images, tmp_path, stop):
    def lines(folder):
        metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        timed = ("seconds_per_image", "loads")
        metrics = [{k: v for k, v in line.items() if k not in timed} for line in metrics]
        return [
            {**line, "result": {**line["result"], "seconds": 0}} if "result" in line else line
            for line in metrics
        ]

    if stop:
        with pytest.raises(Interrupted):
            train_in(tmp_path, images, stop=stop)
        # What a kill in the middle of a line leaves.
        with open(tmp_path / METRICS, "a") as file:
            file.write('{"step": 100000, "layer": 7}\n{"step": 1000')
    else:
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    train_in(tmp_path, images)
    assert lines(tmp_path) == lines(finished[0])
    assert [line["layer"] for line in lines(tmp_path)] == [1, 1, 1, 2, 2, 2]


def test_the_metrics_hold_the_cost_of_every_epoch(finished):
    first = json.loads((finished[0] / METRICS).read_text().splitlines()[0])
    (load,) = first["loads"]
    assert set(load["seconds"]) == {"inference", "sums", "exchange", "update"}
    assert all(seconds >= 0 for seconds in load["seconds"].values())
    assert load["seconds"]["inference"] > 0
    # In MB: this process with torch in it.
    assert 50 < load["memory"] < 50_000
    total = sum(load["seconds"].values())
    assert first["seconds_per_image"] == pytest.approx(total / 5)


def test_a_rising_objective_is_warned_of(images, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("deconvnet.training.loop.RISE", 0.0)
    train_in(tmp_path, images)
    warnings = [r.message for r in caplog.records if "has risen" in r.message]
    # In the second of two epochs.
    assert len(warnings) == 2 and warnings[0].startswith(
        "layer 1, epoch 2: the objective has risen from"
    )


def test_the_curve_of_inference_is_shown_for_every_layer(finished):
    for number in (1, 2):
        found = scalars(finished[0] / "inference" / f"layer{number}")
        assert len(found) == 3
        for points in found.values():
            assert [step for step, _ in points] == list(range(1, FAST.iterations + 1))
        objective = [value for _, value in found["inference/objective by iteration"]]
        assert objective[-1] < 0.9 * objective[0] and objective[-1] < 1.01 * min(objective)


def test_a_run_that_is_stopped_after_every_update_still_finishes(finished, images, tmp_path):
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
    assert_same_evolution(tmp_path, finished[0])


@pytest.fixture
def handles_interrupts():
    """SIGINT as Python handles it, also where the shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handles_interrupts")
def test_a_second_request_to_stop_acts_at_once(images, tmp_path):
    class Impatient(StopAt):
        def _count(self, kind):
            if kind == "update":
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), Impatient(tmp_path, ("update", 1)) as monitor:
        train(network(), images, RunFolder(tmp_path, SETTINGS), monitor)


def test_a_run_with_other_settings_is_refused_and_the_differing_keys_are_named(images, tmp_path):
    train_in(tmp_path, images, depth=1)
    other = {"seed": 1, "model": {"layer1": {"lam": 5.0}, "layer2": {"lam": 2.0}}, "extra": True}
    with pytest.raises(ValueError) as caught:
        RunFolder(tmp_path, other)
    message = str(caught.value)
    assert os.path.relpath(tmp_path) in message and "resume=false" in message and "name=" in message
    assert "seed: 0 there, 1 now" in message
    assert "model.layer1.lam: 2.0 there, 5.0 now" in message
    assert "extra" in message and "layer2" not in message and "\n" not in message


def test_other_settings_of_an_upper_layer_that_has_begun_are_refused(images, tmp_path):
    with pytest.raises(Interrupted):
        train_in(tmp_path, images, stop=("update", 7))
    settings = {**SETTINGS, "model": {**SETTINGS["model"], "layer2": {"lam": 0.5}}}
    with pytest.raises(ValueError, match=r"model\.layer2\.lam: 2\.0 there, 0\.5 now"):
        RunFolder(tmp_path, settings)


def test_without_resuming_the_earlier_run_is_archived_whole(images, tmp_path):
    first, _ = train_in(tmp_path, images, depth=1, pictures=True)
    names = {path.name for path in tmp_path.iterdir()}
    other = {**SETTINGS, "seed": 7}
    again, _ = train_in(tmp_path, images, depth=1, settings=other, resume="false", seed=7)
    assert {path.name for path in (tmp_path / "previous-1").iterdir()} == names
    assert_same_network(load(tmp_path / "previous-1"), first)
    assert not torch.equal(load(tmp_path).layer(1).filters, first.layer(1).filters)
    RunFolder(tmp_path, SETTINGS, "false")
    assert_same_network(load(tmp_path / "previous-2"), again)
    assert_same_network(load(tmp_path / "previous-1"), first)


def test_archived_runs_are_never_mixed_when_an_older_one_was_deleted(tmp_path):
    for number in range(4):
        save_checkpoint(tmp_path / "checkpoints", number, {"layer": 1, "settings": {}})
        RunFolder(tmp_path, {}, "false")
        if number == 1:
            shutil.rmtree(tmp_path / "previous-1")
    asides = [path for path in tmp_path.iterdir() if path.name.startswith("previous-")]
    assert len(asides) == 3
    for aside in asides:
        assert len(list((aside / "checkpoints").iterdir())) == 1


def test_a_run_that_ended_before_its_network_was_written_writes_it(finished, finished_copy, images):
    (finished_copy / "network.safetensors").unlink()
    train_in(finished_copy, images)
    assert_same_network(load(finished_copy / "network.safetensors"), finished[1])


def test_a_run_can_resume_from_an_older_checkpoint_of_its_own(finished, finished_copy, images):
    older = min((finished_copy / "checkpoints").iterdir())
    with pytest.raises(Interrupted):
        train_in(finished_copy, images, resume=str(older), stop=("update", 1))
    net, results = train_in(finished_copy, images)
    assert_same_network(net, finished[1])
    assert_same_results(results, finished[2])
    assert_same_evolution(finished_copy, finished[0])
    assert_same_network(load(finished_copy / "previous-1"), finished[1])


def test_nothing_is_archived_if_there_is_no_run(tmp_path):
    run = RunFolder(tmp_path, SETTINGS, "false")
    assert run.state is None and list(tmp_path.iterdir()) == []


def test_a_run_can_resume_from_the_checkpoint_or_the_folder_of_another(finished, images, tmp_path):
    with pytest.raises(Interrupted):
        train_in(tmp_path / "one", images, stop=("update", 4))
    file = max((tmp_path / "one" / "checkpoints").iterdir())
    for name, resume in (("two", file), ("three", tmp_path / "one")):
        net, results = train_in(tmp_path / name, images, resume=str(resume))
        assert_same_network(net, finished[1])
        assert_same_results(results, finished[2])
        assert_same_evolution(tmp_path / name, finished[0])
    with pytest.raises(ValueError, match="resume=nowhere: no checkpoint there"):
        RunFolder(tmp_path / "four", SETTINGS, "nowhere")


def test_a_run_that_resumes_from_a_lone_checkpoint_has_only_later_columns(
    finished, images, tmp_path
):
    with pytest.raises(Interrupted):
        train_in(tmp_path / "one", images, stop=("update", 4))
    file = max((tmp_path / "one" / "checkpoints").iterdir()).rename(tmp_path / "step-00000004.pt")
    net, _ = train_in(tmp_path / "two", images, resume=str(file))
    assert_same_network(net, finished[1])
    found = [load_evolution(tmp_path / "two" / "evolution" / f"layer{n}.npz") for n in (1, 2)]
    assert [e.epochs for e in found] == [(2,), (1, 2)]


def test_only_layers_that_had_begun_are_taken_from_another_run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "one")
    checkpoints, evolution = (tmp_path / "one" / name for name in ("checkpoints", "evolution"))
    state = load_checkpoint(max(checkpoints.iterdir()))
    earlier = save_checkpoint(checkpoints, 6, {**state, "layer": 2, "step": 6, "trainer": None})
    RunFolder(tmp_path / "two", SETTINGS, str(earlier))
    (copy,) = (tmp_path / "two" / "evolution").iterdir()
    assert copy.name == "layer1.npz"
    assert copy.read_bytes() == (evolution / "layer1.npz").read_bytes()


def test_a_damaged_newest_checkpoint_costs_only_the_updates_since_the_one_before(
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
    assert_same_evolution(tmp_path, finished[0])


def test_a_run_whose_checkpoints_are_all_damaged_is_not_overwritten(images, tmp_path):
    train_in(tmp_path, images, depth=1)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InvalidFileError, match="none of its 2 checkpoints can be loaded"):
        RunFolder(tmp_path, SETTINGS)


def test_training_on_images_of_one_colour_does_not_crash(tmp_path):
    with Monitor(tmp_path, progress=False) as monitor:
        results = train(
            network(), torch.full((2, 3, 20, 20), 0.5), RunFolder(tmp_path, {}), monitor
        )
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
def test_networks_train_and_draw_pictures_in_every_colour_mode(textures, tmp_path, color):
    net = DeconvNet(
        [
            LayerSettings(3, 5, pool=[2, 2, 2], solver=FAST, learning=LearningSettings(epochs=1)),
            LayerSettings(3, 3, solver=FAST, learning=LearningSettings(epochs=1)),
        ],
        PreprocessingSettings(color=color),
    )
    with Monitor(tmp_path, progress=False) as monitor:
        train(net, textures(2, 3, 20, 20), RunFolder(tmp_path, {}), monitor)
    assert len(list((tmp_path / "pictures").iterdir())) == 10


def test_without_a_monitor_the_page_of_a_run_is_in_its_folder(finished, images, tmp_path):
    train(network(depth=1), images, RunFolder(tmp_path))
    expected = {tag: curve for tag, curve in scalars(finished[0]).items() if "layer1" in tag}
    assert {tag: curve for tag, curve in scalars(tmp_path).items() if "layer1" in tag} == expected


def test_whole_maps_are_held_only_for_the_images_that_pictures_choose_from(textures, monkeypatch):
    monkeypatch.setattr(training_set, "SHOWN_BYTES", 0)
    monkeypatch.setattr(training_set, "LEAST_SHOWN", 2)
    images = textures(5, 3, 16, 16)
    net = DeconvNet([LayerSettings(4, 5, pool=[1, 2, 2])])
    data = TrainingSet(net, ImageSource.from_tensor(images), chunk=2)
    data.fit_preprocessing()
    data.hold_codes(torch.arange(5), 0)
    for _ in data.infer_next_layer(1):
        pass
    assert data.codes.layer(1).dense is None and data.shown.tolist() == [0, 4]
    z = net.infer(images[[0, 2, 4]], chunk=1).layer(1).z
    assert torch.allclose(data.gather_codes(data.shown, 1).layer(1).z, z[[0, 2]], atol=1e-5)
    # Others are inferred again.
    assert torch.allclose(data.gather_codes(torch.tensor([2]), 1).layer(1).z, z[[1]], atol=1e-5)
