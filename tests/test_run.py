"""A run folder: what it learns from, what may change when it is resumed, and whose files are in
it."""

import os

import pytest
import torch
from test_files import snapshot
from test_training import StopAt, assert_same_network
from torch.testing import assert_close

from deconvnet import checkpoint, files
from deconvnet.checkpoint import is_network
from deconvnet.corpus import Source
from deconvnet.learning import LearningSettings
from deconvnet.monitor import Monitor
from deconvnet.network import DeconvNet, LayerSettings, load
from deconvnet.preprocessing import PreprocessingSettings
from deconvnet.run import Run, training_data
from deconvnet.solvers import SolverSettings
from deconvnet.states import MAGIC
from deconvnet.training import Interrupted, train

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


def learn(folder, images, settings=None, resume="auto", *, stop=None, epochs=3, init=None, **more):
    """The network that a command learns in a folder, or None where it is stopped."""
    run = Run(
        *(folder, settings or settings_of(epochs), resume),
        init=init,
        digests=lambda: digests_of(images),
    )
    net = network(epochs)
    with StopAt(folder, ("update", stop)) if stop else Monitor(folder, progress=False) as monitor:
        try:
            train(net, Source.of(images), run, monitor, **more)
        except Interrupted:
            return None
    return net


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


def test_a_run_is_resumed_whatever_changes_nothing_of_what_it_learns(images, tmp_path):
    expected = learn(tmp_path / "whole", images)
    learn(tmp_path / "run", images, stop=2)
    data = {"path": "/elsewhere/photos", "workers": 8, "stream": True, "download": True}
    found = learn(tmp_path / "run", images, settings_of(data=data, memory=7, disk=3))
    assert_same_network(found, expected)
    with pytest.raises(ValueError, match="data.size: None there, 48 now"):
        learn(tmp_path / "run", images, settings_of(data={**data, "size": 48}))


def test_where_images_cannot_be_compared_their_path_is(images, tmp_path):
    learn(tmp_path, images, stop=2)
    other = settings_of(data={"path": "others", "workers": 2})
    with pytest.raises(ValueError, match="data.path: photos there, others now"):
        Run(tmp_path, other)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_states_move_between_memory_and_disk_and_nothing_is_different(images, tmp_path, stop):
    expected = learn(tmp_path / "whole", images)
    for name, before, after in (
        ("to the disk", {}, {"memory": 0, "disk": 1}),
        ("larger", {"memory": 0, "disk": 0.01}, {"memory": 0, "disk": 2}),
        ("none", {"memory": 0, "disk": 0.01}, {}),
    ):
        learn(tmp_path / name, images, stop=stop, **before)
        assert_same_network(learn(tmp_path / name, images, **after), expected)
        assert not (tmp_path / name / "states").exists()


def test_a_layer_that_began_without_states_goes_on_without(images, tmp_path):
    expected = learn(tmp_path / "whole", images, memory=0)
    learn(tmp_path / "run", images, memory=0, stop=4)
    assert_same_network(learn(tmp_path / "run", images, memory=9), expected)


def test_where_states_no_longer_fit_it_says_what_would_do(images, tmp_path):
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
    run = Run(tmp_path / "two", settings_of(5), init=str(source))
    with Watch(tmp_path / "two", progress=False) as monitor:
        train(net, images[:3] * 0.9, run, monitor)
    # But for rounding, by which their norms are 1 again.
    assert_close(start[1], first.layer(1).filters)
    # Once it has begun, it is resumed without them.
    assert Run(tmp_path / "two", settings_of(5), init="gone").initial is None
    with pytest.raises(ValueError, match="init=gone: nothing to start from"):
        Run(tmp_path / "three", settings_of(5), init="gone")


def test_filters_of_another_shape_are_refused_with_both(images, tmp_path):
    network(num_maps=4).save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"filters of 4x1x5x5 .* has filters of 3x1x5x5"):
        learn(tmp_path / "run", images, init=str(tmp_path / "net.safetensors"))


def test_a_run_elsewhere_goes_on_learning_with_more_epochs_and_other_images(
    images, tmp_path, caplog
):
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


def test_states_of_others_and_links_are_left_alone(images, tmp_path):
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
    expected = learn(tmp_path / "whole", images)
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


def test_a_run_lives_in_a_folder_of_the_users_and_touches_nothing_in_it(images, tmp_path):
    mine = strangers_folder(tmp_path)
    learn(tmp_path, images, stop=2)
    learn(tmp_path, images)
    learn(tmp_path, images, resume="false")
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
def test_what_is_in_the_way_of_a_run_is_named_before_it_begins(images, tmp_path, name, kind):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    (tmp_path / "thesis.txt").write_text("mine")
    path.write_text("mine") if kind == "file" else path.symlink_to(tmp_path / "thesis.txt")
    before = snapshot(tmp_path)
    for resume in ("auto", "false"):
        # Of a checkpoint that is none, its folder is named.
        named = path.parent if "step" in name and resume == "auto" else path
        with pytest.raises(ValueError, match=str(named)):
            learn(tmp_path / "run", images, resume=resume)
        assert snapshot(tmp_path) == before


def test_a_run_from_before_there_were_records_is_resumed_and_archived(images, tmp_path):
    expected = learn(tmp_path, images)
    for path in (tmp_path / files.OWN).iterdir():
        path.unlink()
    files._written.clear()
    files._read.clear()
    assert_same_network(learn(tmp_path, images), expected)
    learn(tmp_path, images, resume="false")
    assert {"metrics.jsonl", "pictures", "network.safetensors", "checkpoints"} <= {
        path.name for path in (tmp_path / "previous-1").iterdir()
    }


@pytest.mark.parametrize("damage", ["cut off", "a bit", "another", "gone"])
def test_a_damaged_file_of_the_finished_network_is_written_again(images, tmp_path, damage, caplog):
    expected = learn(tmp_path, images)
    path = tmp_path / "network.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "another":
        network(num_maps=2).save(path)
    else:
        data[-3] ^= 8
        path.write_bytes(data[:-9] if damage == "cut off" else data)
    learn(tmp_path, images)
    assert_same_network(load(path), expected)
    assert (damage == "gone") or "it is written again" in caplog.text


def test_a_network_file_is_known_by_its_first_bytes(tmp_path):
    path = tmp_path / "net.safetensors"
    network().save(path)
    assert is_network(path)
    path.write_bytes(path.read_bytes()[:40])
    assert not is_network(path)


def test_a_run_folder_never_says_that_something_is_to_be_downloaded(tmp_path):
    data = {"source": "torchvision", "dataset": "MNIST", "path": "x", "download": True}
    checkpoint.save(tmp_path / "checkpoints", 1, {"settings": {"data": data}})
    assert training_data(tmp_path).download is False
