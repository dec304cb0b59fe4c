"""Images that are read while a network learns: the same ones, the same network, and no more memory
for more of them."""

import io
import json
import tarfile

import pytest
import torch

from deconvnet import (
    DeconvNet,
    LayerSettings,
    LearningSettings,
    PreprocessingSettings,
    SolverSettings,
    load,
)
from deconvnet.images.datasets import load_images, stream_images
from deconvnet.images.sources import DataSettings
from deconvnet.monitoring.monitor import memory_used, save_picture
from deconvnet.training.layer_trainer import LayerTrainer
from deconvnet.training.training_set import ImageSource, TrainingSet
from deconvnet.training.warm_starts import Placement

QUICK = [
    *("progress=false", "device=cpu", "data.size=24", "layers=2"),
    *(f"model.layer{n}.{key}" for n in (1, 2) for key in ("num_maps=4", "filter_size=5")),
    *(f"model.layer{n}.solver.iterations=10" for n in (1, 2)),
    *(f"model.layer{n}.learning.epochs=2" for n in (1, 2)),
    *(f"model.layer{n}.learning.batch_size=3" for n in (1, 2)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, textures):
    """A folder with photos/ in folders a and b, and the same in shards/ of two .tar files."""
    folder = tmp_path_factory.mktemp("place")
    for number, image in enumerate(textures(7, 3, 30, 34)):
        name = f"{'ab'[number > 3]}/{number}.png"
        save_picture(folder / "photos" / name, image)
    (folder / "shards").mkdir()
    for label in "ab":
        with tarfile.open(folder / "shards" / f"{label}.tar", "w") as shard:
            shard.add(folder / "photos" / label, label)
    return folder


def settings_of(place, source, **options):
    kind = {"photos": "folder", "shards": "shards"}[source]
    return DataSettings(
        **{"source": kind, "path": str(place / source), "size": 24, "max_images": None, **options}
    )


@pytest.mark.parametrize("source", ["photos", "shards"])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_streamed_images_equal_those_in_memory_in_any_order(place, source, fit):
    everything = load_images(settings_of(place, "photos", fit=fit))
    stream = stream_images(settings_of(place, source, fit=fit, stream=True, workers=3))
    assert len(stream) == 7
    for numbers in ([0], [6, 2, 3], list(range(7))):
        indices = torch.tensor(numbers)
        stream.prefetch(torch.tensor([2, 5]))
        images, frames = stream.read(indices)
        assert torch.equal(images, everything.images[indices])
        assert (frames is None) == (everything.frames is None)
        assert frames is None or torch.equal(frames, everything.frames[indices])


def test_announced_images_are_read_once_and_dropped_if_they_are_not_requested(place):
    stream = stream_images(settings_of(place, "photos", stream=True))
    numbers = []
    read = stream._read
    stream._read = lambda number: (numbers.append(number), read(number))[1]
    stream.prefetch(torch.tensor([1, 2, 3]))
    stream.prefetch(torch.tensor([2, 3, 4]))
    stream.read(torch.tensor([2, 3]))
    assert numbers.count(2) == numbers.count(3) == 1
    assert set(stream._pending) == {4}


def test_shards_give_the_classes_of_their_folders_and_names(place):
    stream = stream_images(settings_of(place, "shards", stream=True))
    assert [item.name for item in stream.items][::6] == ["a.tar/a/0.png", "b.tar/b/6.png"]
    assert [item.read_label() for item in stream.items] == [*"aaaabbb"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: path.write_bytes(b"no archive at all"),
            "a.tar is not a readable, uncompressed",
        ),
        (lambda path: tarfile.open(path, "w:gz").close(), "a.tar is not a readable, uncompressed"),
        (lambda path: tarfile.open(path, "w").close(), "no image in 1 .tar files"),
        (lambda path: None, "no .tar file in this folder"),
    ],
    ids=["garbage", "compressed", "empty", "none"],
)
def test_a_file_that_is_not_a_shard_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "a.tar")
    with pytest.raises(ValueError, match=message) as error:
        stream_images(DataSettings(source="shards", path=str(tmp_path), size=24, max_images=None))
    assert "\n" not in str(error.value)


def test_an_image_that_cannot_be_read_is_named_when_it_is_read(tmp_path, place):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, data in (("good.png", None), ("bad\n.png", b"rubbish")):
            data = data or (place / "photos" / "a" / "0.png").read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    settings = settings_of(place, "shards", stream=True)
    settings = DataSettings(**{**vars(settings), "path": str(tmp_path)})
    stream = stream_images(settings)
    stream.read(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"cannot read a.tar/bad\\n.png: not an image"):
        stream.read(torch.tensor([0, 1]))
    left = stream_images(DataSettings(**{**vars(settings), "skip_unreadable": True}))
    assert [item.name for item in left.items] == ["a.tar/good.png"]


def test_a_network_learns_the_same_from_images_in_memory_in_files_and_in_shards(place, script):
    runs = {
        "memory": ["data=folder", "data.path=photos"],
        "files": ["data=folder", "data.path=photos", "data.stream=true"],
        "shards": ["data=shards", "data.path=shards", "data.workers=3"],
    }
    networks = {}
    for name, order in runs.items():
        result = script(place, "train.py", *QUICK, *order, f"name={name}", pictures=False)
        assert result.code == 0, result.err
        networks[name] = load(place / "runs" / name / "network.safetensors").state_dict()
    for name in ("files", "shards"):
        for key, tensor in networks["memory"].items():
            assert torch.equal(networks[name][key], tensor), (name, key)
    lines = [
        (place / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in networks
    ]
    objectives = [[json.loads(line).get("objective") for line in run] for run in lines]
    assert objectives[0] == objectives[1] == objectives[2]


ONE_LAYER = [*QUICK, "data=folder", "data.path=photos", "layers=1"]


@pytest.fixture(scope="module")
def within(place, script):
    """The result of a command that learned a layer whose states fit, into runs/kept."""
    return script(place, "train.py", *ONE_LAYER, "name=kept", pictures=False)


def test_if_states_do_not_fit_every_visit_infers_from_the_beginning(place, script, within):
    assert within.code == 0 and "from the beginning" not in within.out
    beyond = script(place, "train.py", *ONE_LAYER, "name=anew", "memory=0", pictures=False)
    assert beyond.code == 0, beyond.err
    assert (
        "layer 1: the states of inference of 7 images would take 8.18e-05 GiB, which is more than "
        "memory=0: every visit infers from the beginning" in beyond.out
    )
    networks = [load(place / "runs" / name) for name in ("kept", "anew")]
    filters = [net.layer(1).filters for net in networks]
    assert not torch.equal(*filters)
    # Both learn: the final maps explain the images about equally well.
    lines = [
        json.loads((place / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("kept", "anew")
    ]
    assert lines[1]["result"]["objective"] < 1.2 * lines[0]["result"]["objective"]


def test_states_on_disk_do_not_change_the_result(place, script, within):
    order = ONE_LAYER
    on_disk = script(place, "train.py", *order, "name=beside", "memory=0", "disk=1", pictures=False)
    assert within.code == on_disk.code == 0, on_disk.err
    assert "which is more than memory=0: they are kept in " in on_disk.out
    assert "runs/beside/states/layer1, at most 0.000245 GiB" in on_disk.out
    one, two = (load(place / "runs" / name).state_dict() for name in ("kept", "beside"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not (place / "runs" / "beside" / "states").exists()
    # An archived run does not take its states along.
    states = place / "runs" / "beside" / "states" / "layer1"
    states.mkdir(parents=True)
    again = script(place, "train.py", *order, "name=beside", "resume=false", pictures=False)
    assert again.code == 0 and not list((place / "runs" / "beside").rglob("states"))
    small = script(place, "train.py", *order, "name=small", "memory=0", "disk=1e-4", pictures=False)
    assert "every visit infers from the beginning" in small.out


@pytest.mark.slow
def test_memory_is_constant_over_a_hundred_thousand_images(tmp_path):
    """Images are made on request; the memory is that of the process, over the epoch."""
    number = 100_000
    pictures = torch.rand(64, 1, 8, 8)
    visited = set()

    def read(indices):
        visited.update(indices.tolist())
        return pictures[indices % 64].expand(-1, 3, -1, -1), None

    solver = SolverSettings(iterations=1, training_iterations=1)
    learning = LearningSettings(epochs=1, batch_size=2000)
    plain = PreprocessingSettings("grey", steps=["mean"])
    net = DeconvNet([LayerSettings(2, 3, solver=solver, learning=learning)], plain)
    training_set = TrainingSet(net, ImageSource(number, read), chunk=2000, hold=False)
    training_set.hold_codes(training_set.own_images(1), 0)
    trainer = LayerTrainer(
        net.layer(1), training_set.layer_data(1), chunk=2000, placement=Placement(keep=False)
    )
    used = []
    while not trainer.done:
        trainer.update()
        used.append(memory_used(torch.device("cpu")))
    assert len(visited) == number
    # All images would take 77 MB and their maps 80 MB.
    assert used[-1] - used[len(used) // 10] < 20
