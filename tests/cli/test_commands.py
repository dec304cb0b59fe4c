"""The scripts as a user runs them: what they say, leave and return, and the one line they say when
something is wrong."""

import dataclasses
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat

from deconvnet import Events, Learned, load
from deconvnet.cli import doctor, printed_commands
from deconvnet.cli.train import hyperparameters
from deconvnet.cli.unfinished_run import load_run, resume_command
from deconvnet.images.decoding import read_image
from deconvnet.storage.checkpoint_files import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    *("progress=false", "device=cpu"),
    *(f"model.layer{n}.{key}" for n in (1, 2, 3) for key in ("num_maps=4", "filter_size=3")),
    *(f"model.layer{n}.learning.epochs=2" for n in (1, 2, 3)),
    *(f"model.layer{n}.solver.iterations=10" for n in (1, 2, 3)),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory, textures):
    """A folder of four small colour images."""
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(textures(4, 3, 40, 48)):
        save(folder / f"photo-{number}.png", image)
    return folder


def save(path, image):
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)


def on(photos, *arguments):
    return ["data=folder", f"data.path={photos}", "data.size=32", *SMALL, *arguments]


@pytest.fixture(scope="module")
def begun(tmp_path_factory, photos, script):
    """(folder, result) of a command that trained two layers into <folder>/runs/folder."""
    folder = tmp_path_factory.mktemp("begun")
    return folder, script(folder, "train.py", *on(photos, "+layers=2"))


@pytest.fixture
def again(begun, tmp_path):
    """A folder with a copy of that run."""
    shutil.copytree(begun[0] / "runs", tmp_path / "runs")
    return tmp_path


def checkpoints(folder, run="folder"):
    return sorted((folder / "runs" / run / "checkpoints").iterdir())


def state(folder, run="folder"):
    return load(folder / "runs" / run).state_dict()


def assert_equal_networks(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def assert_one_line(result, *parts):
    """The user did something wrong: exit code 1 and one line that says what, no traceback."""
    assert result.code == 1, result
    assert result.err.endswith("\n") and result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err + result.out
    for part in parts:
        assert str(part) in result.err


def test_two_layers_are_trained_on_photographs_from_any_folder(tmp_path, script):
    arguments = ["+layers=2", *SMALL, "data.max_images=3", "data.size=32"]
    done = script(tmp_path, ROOT / "scripts" / "train.py", *arguments)
    assert done.code == 0 and done.err == ""
    rows = [line.split() for line in done.out.splitlines() if " dB " in line]
    assert [row[0] for row in rows] == ["1", "2"]
    # A few filters and steps explain little of an image, but something.
    assert all(float(row[1]) > 0.5 for row in rows)
    run = tmp_path / "runs" / "photographs"
    for name in ("pictures/layer2-filters.png", "network.safetensors", ".hydra/config.yaml"):
        assert (run / name).is_file()
    assert f"run={run.relative_to(tmp_path)}" in done.out
    assert load(run).depth == 2


def test_a_finished_run_says_where_its_pictures_and_network_are(begun):
    folder, result = begun
    assert result.code == 0 and result.err == ""
    for path in ("runs/folder/pictures", "runs/folder/network.safetensors"):
        assert path in result.out and (folder / path).exists()
    assert "SNR" in result.out and "tensorboard --logdir runs" in result.out
    assert "4 images of 32x32" in result.out and "layers of 4 and 4 maps" in result.out


def test_the_same_command_resumes_the_run_also_with_more_layers(again, begun, photos, script):
    result = script(again, "train.py", *on(photos, "layers=2"), pictures=False)
    assert result.code == 0
    assert_equal_networks(state(again), state(begun[0]))
    result = script(again, "train.py", *on(photos, "++layers=3", "chunk=2"), pictures=False)
    assert result.code == 0 and len(checkpoints(again)) == 2
    deeper, before = state(again), state(begun[0])
    assert "layers.2.filters" in deeper
    for name in before:
        assert torch.equal(deeper[name], before[name])


def test_runs_are_compared_by_the_settings_of_the_layers_that_they_have():
    layer = {"num_maps": 4, "pool": [1, 2, 2], "solver": {"gap": None, "rho": 2.5}}
    record = {
        "seed": 0,
        "model": {"layer1": layer, "layer2": layer, "layer3": layer},
        "data": {"source": "folder", "download": False, "stream": True, "workers": 2},
    }
    keys = ("num_maps", "pool", "solver.rho")
    expected = {"seed", "data.source", *(f"model.layer{n}.{key}" for n in (1, 2) for key in keys)}
    assert hyperparameters(record, 2).keys() == expected


def test_a_run_can_be_restarted(again, photos, script):
    other = on(photos, "+layers=1", "resume=false", "seed=5")
    result = script(again, "train.py", *other, pictures=False)
    assert result.code == 0
    assert load(again / "runs" / "folder" / "previous-1").depth == 2
    assert load(again / "runs" / "folder").depth == 1


def test_a_sweep_makes_a_folder_for_every_run(tmp_path, photos, script):
    settings = on(photos, "seed=0,1", "+layers=1")
    result = script(tmp_path, "train.py", "-m", *settings, pictures=False)
    assert result.code == 0
    nets = [load(tmp_path / "runs" / "sweep" / f"folder-{n}").layer(1).filters for n in (0, 1)]
    assert not torch.equal(*nets)


def test_help_says_how_many_layers_and_names_every_choice_and_key(tmp_path, script):
    result = script(tmp_path, "train.py", "--help", "all")
    assert result.code == 0 and result.err == ""
    assert "+layers=2" in result.out
    for path in (ROOT / "configs").glob("*/*.yaml"):
        assert path.stem in result.out and path.parent.name in result.out
    for key in ("num_maps", "lam", "max_images", "resume", "chunk"):
        assert key in result.out
    result = script(tmp_path, "reconstruct.py", "--help")
    assert result.code == 0 and "layer=2" in result.out and "images=" in result.out
    assert list(tmp_path.iterdir()) == []


def test_suggest_compares_numbers_of_maps_and_prints_a_command_that_trains(
    tmp_path, textures, script
):
    (tmp_path / "my photos").mkdir()
    for number, image in enumerate(textures(8, 3, 24, 24)):
        save(tmp_path / "my photos" / f"{number}.png", image)
    arguments = ["data=folder", "data.path=my photos", "data.size=24", "filter_size=5", "epochs=1"]
    result = script(tmp_path, "suggest", *arguments, "maps=[2,3]")
    assert result.code == 0 and "8 images of 24x24" in result.out, result
    rows = dict(re.findall(r"^ +(\d+) +([\d.]+)%", result.out, re.MULTILINE))
    (chosen,) = re.findall(r"^ +(\d+) .* suggested$", result.out, re.MULTILINE)
    assert list(rows) == ["2", "3"] and chosen in rows
    assert all(0 < float(share) < 200 for share in rows.values())
    command = shlex.split(result.out.splitlines()[-1].removeprefix("train  "))
    assert f"model.layer1.num_maps={chosen}" in command and "data.path=my photos" in command
    done = script(tmp_path, "train", *command[command.index("data=folder") :], "--cfg", "job")
    assert done.code == 0 and f"num_maps: {chosen}" in done.out and "filter_size: 5" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my photos"]
    result = script(tmp_path, "suggest", *arguments, "maps=[0]")
    assert_one_line(result, "maps=[0]: give a list of numbers of maps")


def test_an_interrupted_run_says_so_and_resumes_to_the_same_filters(
    tmp_path, begun, photos, script, start
):
    folder = tmp_path / "here"
    folder.mkdir()
    # Slow enough to be caught: many epochs of one layer.
    arguments = on(photos, "+layers=1", "model.layer1.learning.epochs=25")
    # The command that resumes must not start over.
    running = start(folder, "train.py", *arguments, "resume=false", pictures=False)
    deadline = time.monotonic() + 60
    found = folder / "runs" / "folder" / "checkpoints"
    while not list(found.glob("step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGINT)
    result = running.wait()
    assert result.code == 130, result
    assert "Traceback" not in result.err and "to resume: " in result.out
    assert arguments[-1] in result.out and "resume=false" not in result.out
    assert not (folder / "runs" / "folder" / "network.safetensors").exists()
    # Other commands use what is there, and say how to go on.
    unfinished = script(folder, "export.py", "run=runs/folder", "output=filters.npz")
    assert unfinished.code == 0 and (folder / "filters.npz").exists()
    first, second, third = unfinished.err.splitlines()
    assert re.fullmatch(
        r"runs/folder is not finished: layer 1 of 1 has learned for \d+ of 25 epochs", first
    )
    assert second == "  its filters so far are used"
    resume = shlex.split(third.removeprefix("  to finish it: "))
    resume = resume[resume.index("data=folder") :]
    assert resume == arguments
    described = script(folder, "info.py", "run=runs/folder").out
    assert f"\nnot finished: {first.partition(': ')[2]}" in described and "resume  " in described
    assert script(folder, "train.py", *resume, pictures=False).code == 0
    assert script(folder, "export.py", "run=runs/folder", "output=filters.npz").err == ""
    whole = tmp_path / "whole"
    whole.mkdir()
    assert script(whole, "train.py", *arguments, pictures=False).code == 0
    assert_equal_networks(state(folder), state(whole))


def test_the_command_that_resumes_a_run_names_its_folder_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(printed_commands, "_call", ("deconvnet", "export"))
    monkeypatch.chdir(tmp_path)
    run, moved = tmp_path / "runs" / "a", tmp_path / "old run"

    def record(folder, **changed):
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        sources = [{"provider": "main", "path": "x"}]
        if "config_dir" in changed:
            sources.append({"provider": "command-line", "path": changed["config_dir"]})
        runtime = {"cwd": str(tmp_path), "output_dir": str(run), "config_sources": sources}
        hydra = {"job": {"name": changed.get("job", "train")}, "mode": changed.get("mode", "RUN")}
        hydra |= {"runtime": runtime, "overrides": {"hydra": ["hydra.mode=RUN"]}}
        typed = ["name=a", "resume=false", "data.path='b (1)'"]
        for name, content in (("hydra", {"hydra": hydra}), ("overrides", typed)):
            (folder / ".hydra" / f"{name}.yaml").write_text(json.dumps(content))
        return resume_command(folder)

    call, typed = ["deconvnet", "train"], ["name=a", "data.path='b (1)'"]
    assert shlex.split(record(run)) == [*call, *typed]
    assert shlex.split(record(moved)) == [*call, *typed, "hydra.run.dir=old run"]
    assert shlex.split(record(run, mode="MULTIRUN")) == [*call, *typed, "hydra.run.dir=runs/a"]
    assert shlex.split(record(run, config_dir="mine")) == [*call, "--config-dir=mine", *typed]
    assert record(run, job="classify") is None and record(run, config_dir="\x1b[2J") is None
    with pytest.raises(ValueError, match=r"stopped before its first checkpoint.*train name=a"):
        record(run)
        load_run(run)
    (run / ".hydra" / "hydra.yaml").write_text("hydra: [")
    assert resume_command(run) is None
    monkeypatch.chdir(run)
    record(run)
    assert resume_command(run).startswith(f"cd {shlex.quote(str(tmp_path))} && deconvnet train na")


def test_every_command_reads_networks_in_the_way_that_says_whether_they_are_finished():
    for path in (ROOT / "deconvnet" / "cli").glob("*.py"):
        if path.stem != "unfinished_run":
            assert not re.search(r"network\.network import .*\bload\b", path.read_text()), path


def test_layers_that_explain_the_image_with_switches_in_the_loop_train_and_resume(
    tmp_path, photos, script
):
    arguments = on(
        photos,
        "+layers=2",
        *(f"model.layer{n}.pooling=in_loop" for n in (1, 2)),
        *(f"model.layer{n}.pool=[2,2,2]" for n in (1, 2)),
        *(f"model.layer{n}.solver.method=fista" for n in (1, 2)),
        *(f"model.layer{n}.learning.update=cg" for n in (1, 2)),
        "model.layer2.connectivity=full",
        "model.layer2.target=image",
        "model.layer2.scale=none",
    )
    result = script(tmp_path, "train.py", *arguments, pictures=False)
    assert result.code == 0 and result.err == "", result
    rows = [line.split() for line in result.out.splitlines() if " dB " in line]
    assert [row[0] for row in rows] == ["1", "2"]
    net = load(tmp_path / "runs" / "folder")
    settings = net.layer(2).settings
    assert (settings.target, settings.pooling, settings.pool) == ("image", "in_loop", [2, 2, 2])
    assert net.layer(2).scale == 1 and net.layer(2).filters.shape == (4, 2, 3, 3)
    # From the checkpoint before the last, as after a damage, and to the same filters.
    expected = state(tmp_path)
    checkpoints(tmp_path)[-1].unlink()
    (tmp_path / "runs" / "folder" / "network.safetensors").unlink()
    assert script(tmp_path, "train.py", *arguments, pictures=False).code == 0
    assert_equal_networks(state(tmp_path), expected)
    result = script(tmp_path, "reconstruct.py", "run=runs/folder", f"images={photos}", "output=out")
    assert result.code == 0 and len(list((tmp_path / "out").glob("*.png"))) == 4
    result = script(tmp_path, "train.py", *arguments, "model.layer2.target=both")
    assert_one_line(result, "model.layer2.target", "image there, both now")


def test_whole_pictures_of_different_shapes_train_resume_and_are_reconstructed(
    tmp_path, textures, script
):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number, shape in enumerate([(40, 24), (20, 36), (32, 32)]):
        save(folder / f"photo-{number}.png", textures(1, 3, *shape, seed=number)[0])
    arguments = on(folder, "data.fit=pad", "preprocessing.contrast_size=5")
    for name, depths in (("once", [2]), ("by-and-by", [1, 2])):
        for depth in depths:
            order = [*arguments, f"layers={depth}", f"name={name}"]
            result = script(tmp_path, "train.py", *order, pictures=False)
            assert result.code == 0 and result.err == "", result
            assert "3 images of 32x32" in result.out
    assert_equal_networks(state(tmp_path, "once"), state(tmp_path, "by-and-by"))
    # Crops of the same pictures are another run.
    result = script(tmp_path, "train.py", *arguments, "layers=2", "name=once", "data.fit=crop")
    assert_one_line(result, "data.fit", "pad there, crop now")
    found = ["run=runs/once", f"images={folder}", "output=out"]
    result = script(tmp_path, "reconstruct.py", *found)
    assert result.code == 0 and len(list((tmp_path / "out").glob("*.png"))) == 3, result


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["model.layer2.target=pixels"], ["model.layer2.target=pixels", "maps, image, both"]),
        (["model.layer2.image_weight=0"], ["model.layer2.image_weight=0", "must be positive"]),
        (["model.layer1.solver.step=-1"], ["model.layer1.solver.step=-1", "must be positive"]),
        (
            ["model.layer1.pool=null", "model.layer1.pooling=in_loop"],
            ["model.layer1.pooling=in_loop: needs pool=[maps, rows, columns]"],
        ),
        (["+layers=9"], ["layers=9: this model defines 3 layers; choose 1 to 3"]),
        (["+layers=0"], ["layers=0", "choose 1 to 3"]),
        (["+layers=two"], ["layers=two: must be a whole number"]),
        (["+layer=2"], ["layer: no such setting", "layers"]),
        (["model.layer1.num_map=3"], ["num_map"]),
        (["model=nope"], ["model/nope", "cvpr2010"]),
        (["data=folder"], ["data.path"]),
        (["data.path=photos"], ["data.path=photos", "add data=folder"]),
        (["data=folder", "data.path=nowhere"], ["data.path=nowhere", "no such folder"]),
        (["device=nosuch"], ["device=nosuch", "cpu"]),
        (["resume=nowhere", *SMALL], ["resume=nowhere", "no checkpoint"]),
        (["model.layer1.num_maps=["], ["no viable"]),
        (["data=[1]"], ["there is no data/[1]", "photographs"]),
        (["name=../../elsewhere"], ["name='../../elsewhere'", "inside runs"]),
        (["name=/tmp/elsewhere"], ["name='/tmp/elsewhere'", "inside runs"]),
    ],
    ids=lambda value: value[-1] if isinstance(value[-1], str) else None,
)
def test_wrong_settings_end_in_one_line_and_leave_no_run(tmp_path, script, arguments, parts):
    folder = tmp_path / "here"
    folder.mkdir()
    assert_one_line(script(folder, "train.py", *arguments), *parts)
    assert set(folder.rglob("*")) <= {folder / "runs"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_graphics_card_that_is_not_there_ends_in_one_line(tmp_path, script):
    assert_one_line(script(tmp_path, "train.py", "device=cuda"), "device=cuda", "device=cpu")


def test_a_folder_without_images_ends_in_one_line(tmp_path, script):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = script(tmp_path, "train.py", *on(empty))
    assert_one_line(result, f"data.path={empty}: no image in this folder")


def test_files_that_are_no_images_are_all_named_in_one_line_or_left_out(tmp_path, photos, script):
    folder = tmp_path / "mixed"
    shutil.copytree(photos, folder)
    (folder / "words.jpg").write_text("these are words")
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:2000])
    result = script(tmp_path, "train.py", *on(folder, "+layers=1"))
    assert_one_line(result, "words.jpg", "cut.jpg", "data.skip_unreadable=true")
    order = on(folder, "+layers=1", "data.skip_unreadable=true")
    result = script(tmp_path, "train.py", *order, pictures=False)
    assert result.code == 0 and "skipped 2 unreadable images" in result.out
    assert "4 images of 32x32" in result.out


def test_images_smaller_than_a_filter_end_in_one_line(tmp_path, textures, script):
    folder = tmp_path / "tiny"
    folder.mkdir()
    save(folder / "tiny.png", textures(1, 3, 5, 5)[0])
    arguments = on(folder, "data.size=null", "preprocessing=mean", "model.layer1.filter_size=7")
    result = script(tmp_path, "train.py", *arguments)
    assert_one_line(result, "images of 5x5 are smaller than the 7x7 filters of layer 1")
    result = script(
        tmp_path, "train.py", *on(folder, "data.size=null", "preprocessing.contrast_size=13")
    )
    assert_one_line(result, "5x5", "'contrast'")
    assert not list(tmp_path.rglob("train.log"))  # nor an empty run folder


def test_a_run_of_other_settings_ends_in_one_line_that_names_them(again, photos, script):
    before = [path.read_bytes() for path in checkpoints(again)]
    result = script(again, "train.py", *on(photos, "+layers=2", "model.layer1.lam=9", "seed=4"))
    assert_one_line(result, "model.layer1.lam", "9.0 now", "seed", "resume=false", "name=")
    assert [path.read_bytes() for path in checkpoints(again)] == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    """Turn one bit of the largest tensor, which the archive holds uncompressed."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    # Behind a header of 30 bytes, whose last four are the lengths of the name and of the padding.
    lengths = content[largest.header_offset + 26 : largest.header_offset + 30]
    start = largest.header_offset + 30 + sum(struct.unpack("<HH", lengths))
    content[start + largest.file_size // 2] ^= 4
    path.write_bytes(content)


def infect(path):
    """The checkpoint with a pickle that creates a file when it is loaded without care."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "executed"),)

    changed = path.with_suffix(".new")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = pickle.dumps(Payload(), protocol=2)
            new.writestr(name, content)
    changed.replace(path)


@pytest.mark.parametrize("damage", [truncate, flip, infect])
def test_damaged_checkpoints_are_not_loaded_and_end_in_one_line(again, photos, script, damage):
    for path in checkpoints(again):
        damage(path)
    result = script(again, "train.py", *on(photos, "+layers=2"))
    assert_one_line(result, "runs/folder/checkpoints", "none of its 2 checkpoints can be loaded")
    result = script(again, "reconstruct.py", "run=runs/folder", f"images={photos}")
    assert result.code == 1 and "Traceback" not in result.err
    assert "none of its 2 checkpoints can be loaded" in result.err
    assert not (checkpoints(again)[0].parent / "executed").exists()


def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_is_resumed(
    again, begun, photos, script
):
    newest = checkpoints(again)[-1]
    truncate(newest)
    result = script(again, "train.py", *on(photos, "+layers=2"), pictures=False)
    assert result.code == 0 and newest.name in result.out and "falling back" in result.out
    assert_equal_networks(state(again), state(begun[0]))


def test_a_file_in_place_of_the_output_folder_ends_in_one_line(tmp_path, photos, script):
    (tmp_path / "runs").write_text("")
    assert_one_line(script(tmp_path, "train.py", *on(photos)), "runs")


def test_a_network_whose_training_diverges_ends_in_one_line(tmp_path, photos, script):
    result = script(tmp_path, "train.py", *on(photos, "+layers=1", "model.layer1.lam=1e38"))
    assert_one_line(result, "layer 1, epoch 1", "model.layer1.lam")


def test_images_are_reconstructed_from_every_layer(begun, photos, tmp_path, script):
    folder = begun[0]
    for layer in (1, 2):
        result = script(
            tmp_path,
            "reconstruct.py",
            f"run={folder / 'runs' / 'folder'}",
            f"layer={layer}",
            f"images={photos / 'photo-1.png'}",
            "output=out",
        )
        assert result.code == 0, result
        target = Path("out") / f"photo-1-layer{layer}.png"
        assert str(target) in result.out and " dB" in result.out
        found = np.asarray(Image.open(tmp_path / target)) / 255
        expected = np.asarray(Image.open(photos / "photo-1.png")) / 255
        assert found.shape == expected.shape
        # The local mean alone, which preprocessing keeps, brings it this near.
        assert np.abs(found - expected).mean() < 0.15


def test_a_folder_of_images_is_reconstructed_from_a_network_file(again, photos, script):
    network = again / "runs" / "folder" / "network.safetensors"
    shutil.move(network, again / "shared.safetensors")
    result = script(again, "reconstruct.py", "run=shared.safetensors", f"images={photos}")
    assert result.code == 0, result
    names = {path.name for path in (again / "reconstructions").glob("*.*g")}
    assert names == {f"photo-{number}-layer2.png" for number in range(4)}
    listed = f"images=[{photos / 'photo-0.png'},{photos / 'photo-3.png'}]"
    result = script(again, "reconstruct.py", "run=shared.safetensors", listed, "output=listed")
    assert len(list((again / "listed").glob("*.png"))) == 2


def test_parts_are_drawn_at_the_scale_of_the_training_images(begun, tmp_path, textures, script):
    save(tmp_path / "large.png", textures(1, 3, 66, 80)[0])
    given = ("run=runs/folder", f"images={tmp_path / 'large.png'}", "parts=true")
    result = script(begun[0], "reconstruct.py", *given, f"output={tmp_path / 'out'}")
    assert result.code == 0, result
    first, *rest = result.out.splitlines()
    assert first.startswith("larger images are reduced to 32 pixels along the short side")
    assert "parts, with" in rest[1]
    with Image.open(tmp_path / "out" / "large-layer2.png") as picture:
        assert picture.size == (39, 32)
    assert (tmp_path / "out" / "large-layer2-parts.png").is_file()
    # A network file that was sent to somebody else records the scale, too.
    shutil.copy(begun[0] / "runs" / "folder" / "network.safetensors", tmp_path / "net.safetensors")
    file = (f"run={tmp_path / 'net.safetensors'}", *given[1:], f"output={tmp_path / 'file'}")
    assert script(begun[0], "reconstruct.py", *file).out.splitlines()[0] == first
    as_it_is = ("rescale=false", f"output={tmp_path / 'whole'}")
    result = script(begun[0], "reconstruct.py", *given, *as_it_is)
    assert result.code == 0 and "reduced" not in result.out
    with Image.open(tmp_path / "whole" / "large-layer2.png") as picture:
        assert picture.size == (80, 66)


def test_a_run_folder_named_by_a_number_is_a_run_folder(again, photos, script):
    (again / "runs" / "folder").rename(again / "2024")
    result = script(again, "reconstruct.py", "run=2024", f"images={photos}", "output=7")
    assert result.code == 0, result
    assert len(list((again / "7").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["layer=3"], ["layer=3: this network has layers 1 to 2"]),
        (["layer=0"], ["layer=0"]),
        (["layer=one"], ["layer=one", "whole number"]),
        (["layer=true"], ["layer=true", "whole number"]),
        (["images=nowhere.jpg"], ["nowhere.jpg", "No such file"]),
        (["run=nowhere"], ["nowhere: no such run folder or network file"]),
        (["run=runs"], ["runs: no checkpoint in this folder"]),
        (["device=nosuch"], ["device=nosuch"]),
        (["run=runs/folder/train.log"], ["train.log", ".safetensors"]),
        (["output=runs/folder/train.log"], ["train.log"]),
        (["leyer=1"], ["leyer"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else None,
)
def test_wrong_settings_of_a_reconstruction_end_in_one_line(
    begun, photos, script, arguments, parts
):
    right = {"run": "run=runs/folder", "images": f"images={photos}"}
    given = {argument.split("=")[0] for argument in arguments}
    arguments = [value for key, value in right.items() if key not in given] + arguments
    assert_one_line(script(begun[0], "reconstruct.py", *arguments), *parts)


@pytest.mark.parametrize("key", ["run", "images"])
def test_a_reconstruction_without_what_it_needs_says_what(begun, photos, script, key):
    right = {"run": "run=runs/folder", "images": f"images={photos}"}
    del right[key]
    assert_one_line(script(begun[0], "reconstruct.py", *right.values()), key)


def test_images_too_small_for_the_network_cannot_be_reconstructed(
    begun, tmp_path, textures, script
):
    save(tmp_path / "tiny.png", textures(1, 3, 2, 9)[0])
    result = script(
        begun[0], "reconstruct.py", "run=runs/folder", f"images={tmp_path / 'tiny.png'}"
    )
    assert_one_line(result, "2x9")


def test_a_checkpoint_holds_the_settings_in_plain_words(begun):
    settings = load_checkpoint(checkpoints(begun[0])[-1])["settings"]
    assert settings["model"]["layer1"]["num_maps"] == 4
    assert settings["data"]["size"] == 32


def test_info_describes_runs_networks_filters_and_events(begun, tmp_path, script):
    described = script(begun[0], "info.py", "run=runs/folder")
    assert described.code == 0 and described.err == ""
    assert "2 of 3 layers learned" in described.out and "layers=3" in described.out
    table = [line.split() for line in described.out.splitlines() if "4x3x3" in line]
    assert [row[:3] for row in table] == [["2", "4", "4x3x3"]]
    assert all(len(line) <= 80 for line in described.out.splitlines())
    net = load(begun[0] / "runs/folder")
    layer = net.layer(1)
    Learned(layer.filters, [], layer.settings).save(tmp_path / "filters.safetensors")
    z = torch.zeros(1, 4, 8, 8)
    z[0, 1, 2, 3] = 1
    Events.of_maps(z, filter_size=(3, 3), boundary="zero").save(tmp_path / "events.safetensors")
    for name, words in (("filters", "3x3x3"), ("events", "events of a code")):
        found = script(tmp_path, "info.py", f"run={name}.safetensors")
        assert found.code == 0 and words in found.out, found
    file = checkpoints(begun[0])[-1]
    assert "a checkpoint" in script(begun[0], "info.py", f"run={file}").out


@pytest.mark.parametrize("name", ["nothing", "photo.safetensors", "empty"])
def test_info_on_what_is_no_run_and_no_network_ends_in_one_line(name, tmp_path, script):
    (tmp_path / "photo.safetensors").write_bytes(b"no network")
    (tmp_path / "empty").mkdir()
    assert_one_line(script(tmp_path, "info.py", f"run={name}"), name)


def test_exported_filters_and_maps_are_those_of_the_network(begun, photos, tmp_path, script):
    net = load(begun[0] / "runs/folder")
    for suffix, read in ((".npz", np.load), (".mat", loadmat)):
        file = tmp_path / f"out{suffix}"
        result = script(begun[0], "export.py", "run=runs/folder", f"output={file}")
        assert result.code == 0 and "filters2" in result.out, result
        arrays = read(file)
        assert np.array_equal(arrays["filters2"], net.layer(2).filters.numpy())
        assert float(np.squeeze(arrays["lam1"])) == net.layer(1).lam
    given = ["run=runs/folder", f"images={photos}", "layer=1", f"output={tmp_path / 'maps.npz'}"]
    assert script(begun[0], "export.py", *given).code == 0
    maps = np.load(tmp_path / "maps.npz")
    z = net.infer(read_image(photos / "photo-2.png")[None], depth=1).layer(1).z[0].numpy()
    assert len(maps.files) == 4 and np.array_equal(maps["photo-2"], z)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["output=filters.txt"], ["output=filters.txt", ".npz or .mat"]),
        (["output=x.npz", "layer=1"], ["layer=1", "images"]),
        (["output=x.npz", "images=photo.png", "layer=3"], ["layer=3", "layers 1 to 2"]),
        (["output=mine.npz"], ["mine.npz"]),
    ],
)
def test_a_wrong_export_ends_in_one_line_and_leaves_files_alone(
    arguments, parts, begun, tmp_path, script
):
    (tmp_path / "mine.npz").write_bytes(b"mine")
    result = script(tmp_path, "export.py", f"run={begun[0] / 'runs/folder'}", *arguments)
    assert_one_line(result, *parts)
    assert (tmp_path / "mine.npz").read_bytes() == b"mine"


def test_the_doctor_solves_problems_of_known_answer(tmp_path, script):
    result = script(tmp_path, "doctor.py", "device=cpu")
    assert result.code == 0 and result.err == "", result
    assert result.out.count("\nok ") == 4 and "all is well" in result.out
    assert torch.__version__ in result.out


def test_a_reader_that_stops_early_ends_a_command_silently(begun):
    read, write = os.pipe()
    os.close(read)
    call = [sys.executable, "-u", str(ROOT / "scripts/info.py"), "run=runs/folder"]
    done = subprocess.run(call, cwd=begun[0], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_exported_images_have_names_of_their_own(begun, photos, tmp_path, script):
    for name in ("file", "a-1", "a_1"):
        shutil.copy(photos / "photo-0.png", tmp_path / f"{name}.png")
    given = [f"run={begun[0] / 'runs/folder'}", "images=[file.png,a-1.png,a_1.png]"]
    assert script(tmp_path, "export.py", *given, "output=maps.npz").code == 0
    assert sorted(np.load(tmp_path / "maps.npz").files) == ["a-1", "a_1", "file_"]
    assert_one_line(script(tmp_path, "export.py", *given, "output=maps.mat"), "a-1 and a_1")
    assert not (tmp_path / "maps.mat").exists()


def test_the_doctor_fails_if_a_solver_is_wrong_or_torchvision_cannot_be_imported(
    monkeypatch, capsys
):
    right = doctor.sparse_code

    def wrong(*arguments, settings, **options):
        solution = right(*arguments, settings=settings, **options)
        return dataclasses.replace(solution, z=solution.z + (settings.method == "fista"))

    monkeypatch.setattr(doctor, "sparse_code", wrong)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert not doctor.examine(torch.device("cpu"))
    found = capsys.readouterr().out
    assert "WRONG   fista on cpu" in found and "FAILED  import torchvision: " in found
