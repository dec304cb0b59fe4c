"""A run folder: what it learns from, what may change when it is resumed, and whose files it
holds."""

import math
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers import StopAt, assert_same_network, no_pictures, snapshot
from torch.testing import assert_close

from deconvnet.dictionary import learn_filters
from deconvnet.filters.update import LearningSettings
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.monitoring.monitor import Monitor
from deconvnet.network.layer import LayerSettings
from deconvnet.network.network import DeconvNet, load
from deconvnet.sparse_coding.problem import SolverSettings
from deconvnet.storage import ownership
from deconvnet.storage.checkpoint_files import load_checkpoint, save_checkpoint
from deconvnet.storage.network_files import is_network
from deconvnet.training.loop import Interrupted, train
from deconvnet.training.run_folder import RunFolder, locked_run_folder, training_data
from deconvnet.training.session import Limits
from deconvnet.training.training_set import ImageSource
from deconvnet.training.warm_starts import MAGIC

SOLVER = SolverSettings("fista", iterations=5, training_iterations=2)


def settings_of(epochs=3, **others):
    model = {"layer1": {"learning": {"epochs": epochs}}}
    return {"seed": 0, "model": model, "data": {"path": "photos", "workers": 2}, **others}


def network(epochs=3, num_maps=3):
    learning = LearningSettings(epochs=epochs, batch_size=2)
    layer = LayerSettings(num_maps, 5, solver=SOLVER, learning=learning)
    return DeconvNet([layer], PreprocessingSettings("grey", steps=["mean"]))


@pytest.fixture(scope="module")
def images(textures):
    return textures(5, 3, 16, 16)


def digests_of(images):
    return [image.numpy().tobytes().hex()[:32] for image in images]


def learn(
    folder,
    images,
    settings=None,
    resume="auto",
    *,
    stop=None,
    epochs=3,
    init=None,
    pictures=False,
    **limits,
):
    """The network that a command learns in a folder, or None if it is stopped."""
    run = RunFolder(
        *(folder, settings or settings_of(epochs), resume),
        init=init,
        digests=lambda: digests_of(images),
    )
    net = network(epochs)
    monitor = StopAt(folder, ("update", stop)) if stop else Monitor(folder, progress=False)
    with monitor, nullcontext() if pictures else no_pictures():
        try:
            train(net, ImageSource.from_tensor(images), run, monitor, limits=Limits(**limits))
        except Interrupted:
            return None
    return net


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run: (folder, network)."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, learn(folder, images)


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A folder with a copy of that run, which a test may change."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images: torch.cat([images, images[:1] / 2]), "1 added"),
        (lambda images: torch.cat([images[:1] / 2, images]), "1 added"),
        (lambda images: images[1:], "1 removed"),
        (lambda images: images.flip(0), "their order changed"),
        (lambda images: torch.cat([images[:3], images[3:] / 2]), "2 changed"),
        (lambda images: torch.cat([images[1:], images[:2] / 2]), "2 added, 1 removed"),
    ],
    ids=["added last", "added first", "removed", "order", "changed", "both"],
)
def test_a_run_is_not_resumed_with_other_images(images, tmp_path, change, said):
    learn(tmp_path, images, stop=2)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"has learned from other images .{said}") as caught:
        learn(tmp_path, change(images))
    assert "\n" not in str(caught.value) and f"init={os.path.relpath(tmp_path)}" in str(
        caught.value
    )
    assert snapshot(tmp_path) == before


def test_a_run_on_the_first_files_of_a_folder_says_how_it_is_resumed(images, tmp_path):
    folder = {"data": {"source": "folder", "path": "x", "max_images": 5}}
    learn(tmp_path, images, stop=2, settings=folder)
    with pytest.raises(ValueError, match="first data.max_images=5 .* add data=list data.path=FILE"):
        learn(tmp_path, images.flip(0), settings=folder)


def test_a_run_is_resumed_with_settings_that_do_not_change_what_it_learns(
    finished, images, tmp_path
):
    expected = finished[1]
    learn(tmp_path / "run", images, stop=2)
    data = {"path": "/elsewhere/photos", "workers": 8, "stream": True, "download": True}
    found = learn(tmp_path / "run", images, settings_of(data=data, memory=7, disk=3))
    assert_same_network(found, expected)
    with pytest.raises(ValueError, match="data.size: 96 there, 48 now"):
        learn(tmp_path / "run", images, settings_of(data={**data, "size": 48}))


def test_if_images_cannot_be_compared_their_path_is(images, tmp_path):
    learn(tmp_path, images, stop=2)
    other = settings_of(data={"path": "others", "workers": 2})
    with pytest.raises(ValueError, match="data.path: photos there, others now"):
        RunFolder(tmp_path, other)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_states_move_between_memory_and_disk_without_changing_the_result(
    finished, images, tmp_path, stop
):
    expected = finished[1]
    for name, before, after in (
        ("to the disk", {}, {"memory": 0, "disk": 1}),
        ("larger", {"memory": 0, "disk": 0.01}, {"memory": 0, "disk": 2}),
        ("none", {"memory": 0, "disk": 0.01}, {}),
    ):
        learn(tmp_path / name, images, stop=stop, **before)
        assert_same_network(learn(tmp_path / name, images, **after), expected)
        assert not (tmp_path / name / "states").exists()


def test_a_layer_that_began_without_states_is_resumed_without(images, tmp_path):
    expected = learn(tmp_path / "whole", images, memory=0)
    learn(tmp_path / "run", images, memory=0, stop=4)
    assert_same_network(learn(tmp_path / "run", images, memory=9), expected)


def test_if_states_no_longer_fit_the_error_says_which_limits_would_do(images, tmp_path):
    learn(tmp_path, images, stop=2)
    with pytest.raises(ValueError, match=r"resume with memory=.* or disk=.* \(GiB\)"):
        learn(tmp_path, images, memory=0)


@pytest.mark.parametrize("kind", ["network file", "run folder", "checkpoint"])
def test_a_new_run_starts_from_the_filters_of_another(images, tmp_path, kind):
    first = learn(tmp_path / "one", images)
    source = tmp_path / "one"
    if kind == "network file":
        source = tmp_path / "net.safetensors"
        first.save(source)
    elif kind == "checkpoint":
        source = max((source / "checkpoints").iterdir())
    start = {}

    class Watch(Monitor):
        def layer(self, number, done, total):
            start[number] = net.layer(number).filters.clone()
            super().layer(number, done, total)

    net = network(epochs=5)
    run = RunFolder(tmp_path / "two", settings_of(5), init=str(source))
    with Watch(tmp_path / "two", progress=False) as monitor:
        train(net, images[:3] * 0.9, run, monitor)
    # Up to rounding, because they are normalised again.
    assert_close(start[1], first.layer(1).filters)
    # Once it has begun, it is resumed without init.
    assert RunFolder(tmp_path / "two", settings_of(5), init="gone").initial is None
    with pytest.raises(ValueError, match="init=gone: nothing to start from"):
        RunFolder(tmp_path / "three", settings_of(5), init="gone")


def test_filters_of_another_shape_are_refused_with_both(images, tmp_path):
    network(num_maps=4).save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"filters of 4x1x5x5 .* has filters of 3x1x5x5"):
        learn(tmp_path / "run", images, init=str(tmp_path / "net.safetensors"))


def test_a_run_elsewhere_can_be_extended_by_more_epochs_and_other_images(images, tmp_path, caplog):
    caplog.set_level("INFO")
    first = learn(tmp_path / "one", images)
    before = snapshot(tmp_path / "one")
    more = torch.cat([images, images[:1] / 2])
    longer = learn(tmp_path / "two", more, resume=str(tmp_path / "one"), epochs=6)
    said = "model.layer1.learning.epochs: 3 there, 6 now, images: 1 added; learning starts from its"
    assert said in caplog.text
    # The same as where the filters are named.
    init = learn(tmp_path / "three", more, init=str(tmp_path / "one"), epochs=6)
    assert_same_network(longer, init)
    assert not torch.equal(longer.layer(1).filters, first.layer(1).filters)
    assert snapshot(tmp_path / "one") == before
    # Nothing else may differ.
    other = settings_of(6, seed=3)
    with pytest.raises(ValueError, match="seed: 0 there, 3 now"):
        learn(tmp_path / "four", more, other, resume=str(tmp_path / "one"))


def test_foreign_states_and_links_are_left_alone(finished, images, tmp_path):
    """A folder called states, a link to a large disk, and what is in it."""
    scratch = tmp_path / "scratch"
    for name in ("layer1/data.csv", "layer2/0.states", "layerX/0.states", "precious/thesis.txt"):
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text("mine")
    (scratch / "notes.txt").write_text("mine")
    (scratch / "layer9").symlink_to(scratch / "precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / "states").symlink_to(scratch)
    before = snapshot(scratch)
    expected = finished[1]
    learn(run, images, memory=0, disk=1, stop=2)
    states = [path for path in (scratch / "layer1").iterdir() if path.suffix == ".states"]
    assert states and all(path.read_bytes().startswith(MAGIC) for path in states)
    assert_same_network(learn(run, images, memory=0, disk=1), expected)
    learn(run, images, resume="false")
    assert snapshot(scratch) == before and os.readlink(run / "states") == str(scratch)


def strangers_folder(folder):
    """A project of the user's with folders of our names."""
    for name in ("states/california/data.csv", "pictures/holiday.png", "notes.txt", "README"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "link").symlink_to(folder / "notes.txt")
    (folder / "previous-notes").mkdir()
    (folder / "events.out.tfevents.1.host").write_text("mine")
    return snapshot(folder)


def test_a_run_in_a_folder_with_the_users_files_touches_none_of_them(images, tmp_path):
    mine = strangers_folder(tmp_path)
    learn(tmp_path, images, stop=2, pictures=True)
    learn(tmp_path, images, pictures=True)
    learn(tmp_path, images, resume="false", pictures=True)
    after = snapshot(tmp_path)
    assert mine == {path: content for path, content in after.items() if path in mine}
    assert (tmp_path / "previous-1" / "checkpoints").is_dir()
    assert not (tmp_path / "previous-1" / "notes.txt").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "network.safetensors", "train.log", ".hydra/config.yaml"),
        *("evolution/layer1.npz", "checkpoints", "pictures", "checkpoints/step-00000009.pt"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_files_in_the_way_of_a_run_are_named_before_it_begins(images, tmp_path, name, kind):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("mine")
    path.write_text("mine") if kind == "file" else path.symlink_to(tmp_path / "thesis.txt")
    before = snapshot(tmp_path)
    for resume in ("auto", "false"):
        # If a checkpoint is not one, its folder is named.
        named = path.parent if "step" in name and resume == "auto" else path
        with pytest.raises(ValueError, match=str(named)):
            learn(tmp_path / "run", images, resume=resume)
        assert snapshot(tmp_path) == before


def test_a_run_from_before_there_were_records_is_resumed_and_archived(images, tmp_path):
    expected = learn(tmp_path, images, pictures=True)
    for path in (tmp_path / ownership.RECORD_FOLDER).iterdir():
        path.unlink()
    ownership._signatures.clear()
    ownership._records.clear()
    assert_same_network(learn(tmp_path, images, pictures=True), expected)
    learn(tmp_path, images, resume="false", pictures=True)
    assert {"metrics.jsonl", "pictures", "network.safetensors", "checkpoints"} <= {
        path.name for path in (tmp_path / "previous-1").iterdir()
    }


@pytest.mark.parametrize("damage", ["cut off", "a bit", "another", "gone"])
def test_a_damaged_file_of_the_finished_network_is_written_again(
    finished, finished_copy, images, damage, caplog
):
    _, expected = finished
    path = finished_copy / "network.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "another":
        network(num_maps=2).save(path)
    else:
        data[-3] ^= 8
        path.write_bytes(data[:-9] if damage == "cut off" else data)
    learn(finished_copy, images)
    assert_same_network(load(path), expected)
    assert (damage == "gone") or "it is written again" in caplog.text


def test_a_network_file_is_recognised_by_its_first_bytes(tmp_path):
    path = tmp_path / "net.safetensors"
    network().save(path)
    assert is_network(path)
    path.write_bytes(path.read_bytes()[:40])
    assert not is_network(path)


def test_a_run_folder_never_causes_a_download(tmp_path):
    data = {"source": "torchvision", "dataset": "MNIST", "path": "x", "download": True}
    save_checkpoint(tmp_path / "checkpoints", 1, {"settings": {"data": data}})
    assert training_data(tmp_path).download is False


@pytest.mark.parametrize("name", ["network.safetensors", "checkpoints/step-00000001.pt"])
@pytest.mark.parametrize("resume", ["auto", "false"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(finished_copy, images, name, resume):
    (finished_copy / name).unlink(missing_ok=True)
    os.mkfifo(finished_copy / name)
    if "step" in name and resume == "auto":
        learn(finished_copy, images)  # from the newer one
    else:
        with pytest.raises(ownership.ForeignFileError, match=name):
            learn(finished_copy, images, resume=resume)


@pytest.mark.parametrize("finished", [False, True])
def test_another_network_in_the_place_of_the_finished_one_is_not_overwritten(
    images, tmp_path, finished
):
    if finished:
        learn(tmp_path / "run", images)
        (tmp_path / "run" / "network.safetensors").unlink()
    (tmp_path / "run").mkdir(exist_ok=True)
    network(num_maps=2).save(tmp_path / "mine.safetensors")
    (tmp_path / "mine.safetensors").rename(tmp_path / "run" / "network.safetensors")
    before = snapshot(tmp_path)
    with pytest.raises(ownership.ForeignFileError, match="network.safetensors"):
        learn(tmp_path / "run", images)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoints", "pictures", "evolution", "inference"])
def test_files_behind_links_are_neither_archived_nor_overwritten(images, tmp_path, name):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "disk")
    expected = learn(tmp_path / "run", images, pictures=True)
    before = snapshot(tmp_path)
    with pytest.raises(ownership.ForeignFileError, match=f"{name}: is a link"):
        learn(tmp_path / "run", images, resume="false", epochs=1, pictures=True)
    assert snapshot(tmp_path) == before
    assert_same_network(learn(tmp_path / "run", images, pictures=True), expected)


def test_a_checkpoint_that_was_copied_into_a_run_is_archived_with_it(images, tmp_path):
    learn(tmp_path / "long", images, epochs=5)
    learn(tmp_path / "run", images)
    for path in (tmp_path / "long" / "checkpoints").glob("*.pt"):
        (tmp_path / "run" / "checkpoints" / path.name).write_bytes(path.read_bytes())
    expected = learn(tmp_path / "run", images, resume="false", epochs=2)
    assert_same_network(learn(tmp_path / "run", images, epochs=2), expected)
    assert len(list((tmp_path / "run" / "previous-1" / "checkpoints").iterdir())) == 4


def test_a_damaged_line_of_the_metrics_costs_only_this_line(images, tmp_path):
    learn(tmp_path, images, stop=6)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:9] + b"\xff\0\n" + b"".join(lines[1:]) + b'{"step"')
    learn(tmp_path, images)
    assert len(lines) == 2
    assert path.read_bytes().splitlines(keepends=True)[0] == lines[1]


@pytest.mark.parametrize("key", ["resume", "init"])
def test_a_file_that_a_run_cannot_start_from_is_named_and_not_waited_for(images, tmp_path, key):
    os.mkfifo(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("pipe.pt", "pipe.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: not a regular file"):
            learn(tmp_path / "run", images, **{key: str(tmp_path / name)})
    network().save(tmp_path / "a net.safetensors")
    if key == "resume":
        with pytest.raises(ValueError, match="a network, .*; 'init=.*a net.safetensors' starts"):
            learn(tmp_path / "run", images, resume=str(tmp_path / "a net.safetensors"))


JUNK = {
    "network": lambda state: state.pop("network"),
    "layer": lambda state: state.update(layer="x"),
    "step": lambda state: state.update(step=-5),
    "settings": lambda state: state.update(settings=[1]),
    "settings: ": lambda state: state["settings"].update({5: 1}),
    "images": lambda state: state.update(images=torch.zeros(3)),
    "token": lambda state: state.update(token=5),
    "trainer": lambda state: state.update(trainer={"a": 1}),
    "unexpected": lambda state: state.update(results=[{"a": 1}]),
    "not finite": lambda state: state["network"]["tensors"]["layers.0.filters"].fill_(math.nan),
    "shape": lambda state: state["network"]["tensors"].update({"layers.0.filters": torch.ones(1)}),
}


@pytest.mark.parametrize("said", JUNK)
def test_a_checkpoint_that_holds_something_else_is_an_error_in_one_line(
    finished_copy, images, said
):
    for path in (finished_copy / "checkpoints").iterdir():
        state = load_checkpoint(path)
        JUNK[said](state)
        save_checkpoint(finished_copy / "checkpoints", int(path.stem[5:]), state, keep=9)
    with pytest.raises(ValueError, match=f"version .*{said}"):
        learn(finished_copy, images)


def test_a_run_cannot_start_from_filters_without_a_network(images, tmp_path):
    learned = learn_filters(images, 3, filter_size=5, lam=1.0, learning=LearningSettings(epochs=1))
    learned.save(tmp_path / "filters.safetensors")
    with pytest.raises(ValueError, match="holds filters of learn_filters"):
        learn(tmp_path / "run", images, init=str(tmp_path / "filters.safetensors"))


@pytest.mark.parametrize("size", [0, 3, 100])
def test_a_truncated_newest_checkpoint_is_written_again(finished, finished_copy, images, size):
    _, expected = finished
    newest = max((finished_copy / "checkpoints").iterdir())
    os.truncate(newest, size)
    assert_same_network(learn(finished_copy, images), expected)
    load_checkpoint(newest)


def test_invalid_data_settings_in_a_checkpoint_are_a_one_line_error(tmp_path):
    for data in (5, {"source": "nothing"}, {"a": 1}):
        save_checkpoint(tmp_path / "checkpoints", 1, {"settings": {"data": data}})
        with pytest.raises(ValueError, match="its data settings are not valid"):
            training_data(tmp_path)


def test_the_users_folders_named_like_earlier_runs_are_skipped(images, tmp_path):
    learn(tmp_path, images)
    for name in ("previous-\u00b2", "previous-" + "9" * 200, "previous-3"):
        (tmp_path / name).write_text("mine")
    learn(tmp_path, images, resume="false")
    assert (tmp_path / "previous-4" / "checkpoints").is_dir()
    assert (tmp_path / "previous-3").read_text() == "mine"


@pytest.mark.parametrize("kept", [None, "notes.txt", "checkpoints/step-00000002.pt", "folder"])
def test_a_run_that_is_refused_at_once_leaves_no_folder_of_its_own(tmp_path, kept):
    folder = tmp_path / "run"
    if kept == "folder":
        (folder / "pictures").mkdir(parents=True)
    with pytest.raises(ValueError, match="filters"), locked_run_folder(folder):
        RunFolder(folder).claim()
        ownership.append(folder / "train.log", "begun")
        if kept == "notes.txt":
            (folder / kept).write_text("of the user")
        elif kept and kept != "folder":
            save_checkpoint(folder / "checkpoints", 2, {})
        raise ValueError("images are smaller than the filters")
    assert folder.exists() == (kept is not None)
    assert not kept or (folder / "train.log").exists()
