"""Every command in folders that are full of other people's files, and links to them: whatever it
does, each of these stays, byte for byte, where and what it was."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import snapshot
from PIL import Image

from deconvnet.monitoring.monitor import save_picture
from deconvnet.network.network import load
from deconvnet.storage import ownership

SMALL = (
    *("model.layer1.num_maps=3", "model.layer1.filter_size=5", "model.layer1.learning.epochs=2"),
    *("model.layer2.num_maps=3", "model.layer2.filter_size=3", "model.layer2.learning.epochs=1"),
    *("model.layer1.solver.iterations=3", "model.layer2.solver.iterations=3"),
    *("data.size=24", "preprocessing=mean", "progress=false"),
)
TRAIN = ("train.py", "data=folder", "data.path=photos", *SMALL)
CNN = (
    *("train_cnn.py", "data=folder", "data.path=photos", "epochs=1", "width=2", "max_images=null"),
    *("data.size=64", "progress=false", "hydra.run.dir=place"),
)
CLASSIFY = (
    *("classify.py", "run=net.safetensors", "data.path=photos", "data.size=24", "data.fit=crop"),
    *("train=2", "test=null", "splits=1", "words=5", "patch=[8]", "step=4", "levels=[1]"),
)
VISUALIZE = (
    *("visualize.py", "run=net.safetensors", "images=photos", "control=false", "explorer_images=1"),
    "progress=false",
)
OCCLUSION = (
    *("occlusion.py", "run=net.safetensors", "images=photos", "size=20", "max_images=1"),
    *("square=20", "stride=20"),
)
# What each command writes goes to the folder `place`.
COMMANDS = {
    "train": (*TRAIN, "layers=1", "hydra.run.dir=place"),
    "train with states on the disk": (
        *(*TRAIN, "layers=1", "hydra.run.dir=place", "memory=0", "disk=1"),
    ),
    "reconstruct": ("reconstruct.py", "run=net.safetensors", "images=photos", "output=place"),
    # inpaint.py writes by the same function.
    "denoise": ("denoise.py", "run=net.safetensors", "images=photos/a", "sigma=9", "output=place"),
    "classify": (*CLASSIFY, "output=place"),
    "visualize": (*VISUALIZE, "output=place"),
    "occlusion": (*OCCLUSION, "output=place"),
    "train_cnn": CNN,
}


@pytest.fixture(scope="module")
def home(script, textures, tmp_path_factory):
    """A folder with photographs in two classes, and a network."""
    home = tmp_path_factory.mktemp("home")
    for n, image in enumerate(textures(6, 3, 24, 24)):
        save_picture(home / "photos" / "ab"[n % 2] / f"{n}.png", image)
    result = script(home, *TRAIN, "layers=2", "name=begun", pictures=False)
    assert result.code == 0, result.err
    load(home / "runs" / "begun").save(home / "net.safetensors")
    shutil.rmtree(home / "photos" / ownership.RECORD_FOLDER, ignore_errors=True)
    return home


def copy_of(home, folder):
    """Another user's copy, whose files are as unknown to us as all others."""
    shutil.copytree(
        home, folder, symlinks=True, ignore=shutil.ignore_patterns(ownership.RECORD_FOLDER, "runs")
    )
    return folder


@pytest.fixture(scope="module")
def written(home, script, tmp_path_factory):
    """What each command writes, by its name, as paths in `place`."""
    found = {}

    def of(name):
        if name not in found:
            folder = copy_of(home, tmp_path_factory.mktemp("written") / "home")
            result = script(folder, *COMMANDS[name])
            assert result.code == 0, result.err
            paths = (path.relative_to(folder / "place") for path in snapshot(folder / "place"))
            found[name] = list(paths)
            assert found[name]
        return found[name]

    return of


def occupied(folder, paths):
    """The place with something of the user's at each of these paths: files, links, folders."""
    (folder / "thesis.txt").write_text("mine")
    for n, relative in enumerate(paths):
        path = folder / "place" / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if n % 3 == 0:
            path.write_text("mine")
        elif n % 3 == 1:
            path.symlink_to(folder / "thesis.txt")
        else:
            path.mkdir()
            (path / "mine.txt").write_text("mine")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_and_keeps_the_files_it_would_overwrite(
    home, written, script, tmp_path, name
):
    folder = copy_of(home, tmp_path / "home")
    occupied(folder, [path for path in written(name) if path.suffix])
    before = snapshot(folder)
    result = script(folder, *COMMANDS[name])
    after = snapshot(folder)
    assert before == {path: after.get(path) for path in before}
    assert result.code == 1, result
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in result.err, result.err
    assert str(folder / "place") in last or "place/" in last


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_twice_next_to_foreign_files(home, written, script, tmp_path, name):
    folder = copy_of(home, tmp_path / "home")
    folders = {Path("."), *(path.parent for path in written(name))}
    # A gallery is replaced as a whole, and refuses to be with anything else in it.
    folders = [path for path in folders if path.parts[:1] != ("gallery",)]
    for relative in folders:
        place = folder / "place" / relative
        place.mkdir(parents=True, exist_ok=True)
        for mine in ("notes.txt", "mine.png", "layers", "step-1.pt", ".hidden.tmp", "x.npz"):
            if not (place / mine).exists():
                (place / mine).write_text("mine")
        (place / "a link").symlink_to(folder / "net.safetensors")
    before = snapshot(folder)
    again = ["name=again"] if "train_cnn" not in name else ["hydra.run.dir=other"]
    for more in ([], again if "train" in name else []):
        result = script(folder, *COMMANDS[name], *more)
        assert result.code == 0, result.err
        after = snapshot(folder)
        assert before == {path: after.get(path) for path in before}


def test_results_next_to_their_inputs_do_not_change_the_inputs(home, script, tmp_path):
    """output=photos, output=. and a file named as a result of another."""
    folder = copy_of(home, tmp_path / "home")
    for n, name in enumerate(("0-layer1", "0-compared", "0-2", "0-layer2-parts")):
        pixels = (torch.arange(24 * 24).view(24, 24) * (n + 1) % 256).byte().numpy()
        Image.fromarray(pixels).save(folder / "photos" / "a" / f"{name}.png")
    before = snapshot(folder)
    inpaint = ("inpaint.py", "run=net.safetensors", "missing=0.2")
    commands = {**COMMANDS, "inpaint": inpaint}
    for name, images in (("reconstruct", "images"), ("denoise", "image"), ("inpaint", "image")):
        order = [part for part in commands[name] if not part.startswith(("output", images))]
        result = script(folder, *order, f"{images}=photos/a", "output=photos/a")
        after = snapshot(folder)
        assert before == {path: after.get(path) for path in before}, name
        assert result.code in (0, 1) and "Traceback" not in result.err


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name != "train with states on the disk"]
)
def test_a_list_of_runs_of_somebody_else_is_not_written_over(home, script, tmp_path, name):
    (tmp_path / "multirun.yaml").write_text("mine: 1")
    command, *settings = COMMANDS[name]
    result = script(tmp_path, command, "-m", *settings, "hydra.sweep.dir=.")
    assert result.code == 1 and "multirun.yaml: already exists" in result.err
    assert (tmp_path / "multirun.yaml").read_text() == "mine: 1"
