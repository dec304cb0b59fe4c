"""Checkpoints: what is written comes back, and what is damaged never does."""

import errno
import io
import os
import pickle
import random
import signal
import subprocess
import time
import zipfile

import pytest
import torch
from helpers import assert_refused, assert_same, flip, names

from deconvnet.storage.checkpoint_files import (
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.ownership import ForeignFileError

SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from deconvnet.storage.checkpoint_files import save_checkpoint
filters = torch.arange(1_000_000)
for step in range(1, 1_000_000):
    save_checkpoint(Path(sys.argv[1]), step, {"step": step, "filters": filters})
"""


def example_state():
    generator = torch.Generator().manual_seed(0)
    return {
        "layers": [{"f": torch.randn(4, 1, 5, 5, generator=generator), "g": None}, ()],
        "generator": generator.get_state(),
        "shuffle": random.Random(0).getstate(),
        "config": {"lam": 0.1 + 0.2, "name": "früchte", "exact": True, 7: "seven"},
        "scale": torch.tensor(float("inf"), dtype=torch.float64),
    }


def write_archive(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


# Checkpoints: what is written


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 120, example_state())
    assert path == tmp_path / "run" / "checkpoints" / "step-00000120.pt"
    assert_same(load_checkpoint(path), example_state())


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, {"try": 1})
    assert load_checkpoint(save_checkpoint(tmp_path, 1, {"try": 2})) == {"try": 2}
    assert names(tmp_path) == ["step-00000001.pt"]


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, {"step": step}, keep)
    assert names(tmp_path) == [f"step-{step:08d}.pt" for step in range(6 - keep, 6)]


def test_keeping_fewer_than_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=1: keep at least 2"):
        save_checkpoint(tmp_path, 1, {}, keep=1)
    with pytest.raises(ValueError, match="step=-1"):
        save_checkpoint(tmp_path, -1, {})
    assert names(tmp_path) == []


def test_steps_are_ordered_as_numbers_not_as_text(tmp_path):
    for step in (99_999_998, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"step": step})
    assert names(tmp_path) == ["step-100000000.pt", "step-99999999.pt"]
    expected = ({"step": 100_000_000}, tmp_path / "step-100000000.pt")
    assert load_newest_checkpoint(tmp_path) == expected


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    """Two damaged checkpoints of later steps must not push out the only sound ones."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    for step in (20, 30):
        (tmp_path / f"step-{step:08d}.pt").write_bytes(b"")
    save_checkpoint(tmp_path, 15, {"step": 15})
    assert load_newest_checkpoint(tmp_path)[0] == {"step": 15}
    assert (tmp_path / "step-00000010.pt").exists()


def test_of_older_checkpoints_only_those_of_ours_are_deleted(tmp_path):
    others = [".step-00000007.pt.tmp", "step-3.pt", "best.pt", "step-00000000.pt"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    save_checkpoint(tmp_path.with_name("elsewhere"), 1, {})
    linked = tmp_path / "step-00000001.pt"
    linked.symlink_to(tmp_path.with_name("elsewhere") / linked.name)
    for step in (2, 3, 4):
        save_checkpoint(tmp_path, step, {})
    kept = [*others, linked.name, "step-00000003.pt", "step-00000004.pt"]
    assert names(tmp_path) == sorted(kept)
    assert linked.exists()


def test_a_compressed_archive_is_no_checkpoint_whatever_it_would_become(tmp_path):
    path = tmp_path / "step-00000001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**20))
    with pytest.raises(InvalidFileError, match="not a checkpoint"):
        load_checkpoint(path)


def test_an_archive_behind_something_else_is_no_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"n": 1})
    path.write_bytes(bytes(512) + path.read_bytes())
    with pytest.raises(InvalidFileError, match="not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", int, torch.Size([2]), torch.nn.Identity()])
def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path, value):
    with pytest.raises(ValueError, match=r"state\['layers'\]\[1\]\['lam'\] is of type"):
        save_checkpoint(tmp_path, 1, {"layers": [{}, {"lam": value}]})
    assert names(tmp_path) == []


# Checkpoints: writing fails


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_costs_no_older_checkpoint(tmp_path, monkeypatch, call):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left on device: .*step-00000003.pt'") as caught:
        save_checkpoint(tmp_path, 3, {"step": 3})
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
    assert load_newest_checkpoint(tmp_path)[0] == {"step": 2}


def test_a_full_disk_costs_no_older_checkpoint(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        if subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("needs the right to mount a small file system")
    except FileNotFoundError:
        pytest.skip("needs the mount command")
    try:
        save_checkpoint(tmp_path, 1, {"f": torch.zeros(50_000)})
        save_checkpoint(tmp_path, 2, {"f": torch.zeros(50_000)})
        with pytest.raises(OSError, match="No space left on device: .*step-00000003.pt'"):
            save_checkpoint(tmp_path, 3, {"f": torch.zeros(200_000)})
        assert names(tmp_path) == ["step-00000001.pt", "step-00000002.pt"]
        assert load_newest_checkpoint(tmp_path)[1].name == "step-00000002.pt"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_in_place_of_the_folder_is_an_error_that_names_it(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.write_text("not a folder")
    with pytest.raises(OSError, match="checkpoints"):
        save_checkpoint(folder, 1, {})
    with pytest.raises(OSError, match="checkpoints"):
        load_newest_checkpoint(folder)
    assert folder.read_text() == "not a folder"


def test_a_kill_during_a_save_leaves_only_checkpoints_that_load(tmp_path, start):
    program = tmp_path / "program.py"
    program.write_text(SAVE_FOREVER)
    folders = [tmp_path / str(number) for number in range(3)]
    for number, folder in enumerate(folders):
        running = start(tmp_path, program, folder)
        try:
            deadline = time.monotonic() + 60
            while not (folder.exists() and any(folder.glob("step-*.pt"))):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.05 + 0.0137 * number)
        finally:
            os.kill(running.pid, signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
    for folder in folders:
        paths = list(folder.glob("step-*.pt"))
        assert 1 <= len(paths) <= 3
        for path in paths:
            state = load_checkpoint(path)
            assert path.name == f"step-{state['step']:08d}.pt"
            assert torch.equal(state["filters"], torch.arange(1_000_000))


# Checkpoints: what is read


def test_a_flipped_bit_in_the_contents_of_a_checkpoint_is_found(tmp_path):
    path = save_checkpoint(tmp_path, 1, example_state())
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    bits = [data.index(c) * 8 + bit for c in contents if len(c) > 2 for bit in range(len(c) * 8)]
    for bit in random.Random(0).sample(bits, 40):
        path.write_bytes(flip(data, bit))
        assert_refused(load_checkpoint, path)


def test_no_flipped_bit_loads_a_changed_checkpoint(tmp_path):
    """Padding and time stamps of the archive have no checksum; a flip there must change nothing."""
    path = save_checkpoint(tmp_path, 1, example_state())
    data = path.read_bytes()
    refused = 0
    for bit in random.Random(1).sample(range(len(data) * 8), 300):
        path.write_bytes(flip(data, bit))
        try:
            state = load_checkpoint(path)
        except InvalidFileError:
            refused += 1
        else:
            assert_same(state, example_state())
    assert refused > 200


def test_a_checkpoint_cut_short_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, example_state())
    data = path.read_bytes()
    for length in (0, 1, 4, 100, len(data) // 2, len(data) - 22, len(data) - 1):
        path.write_bytes(data[:length])
        assert_refused(load_checkpoint, path, "truncated")


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(random.Random(0).randbytes(2000))
    assert_refused(load_checkpoint, path, "not a checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "a sound archive of something else")
    assert_refused(load_checkpoint, path, "not a checkpoint")
    torch.save({"state": {}}, path, _use_new_zipfile_serialization=False)
    assert_refused(load_checkpoint, path, "not a checkpoint")
    for content in ({"state": {}}, [1, 2], torch.zeros(2)):
        write_archive(path, content)
        assert_refused(load_checkpoint, path, "not a deconvnet checkpoint")
    path.unlink()
    assert_refused(load_checkpoint, path, "No such file")


@pytest.mark.parametrize("version", [0, 2, None])
def test_a_checkpoint_of_another_format_version_is_refused(tmp_path, version):
    path = tmp_path / "step-00000001.pt"
    write_archive(path, {"format": "deconvnet checkpoint", "version": version, "state": {}})
    assert_refused(load_checkpoint, path, f"format version {version}, but this deconvnet reads 1")


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    path, proof = tmp_path / "step-00000001.pt", tmp_path / "proof"
    payload = Payload(f"touch {proof}")
    write_archive(path, {"format": "deconvnet checkpoint", "version": 1, "state": payload})
    assert_refused(load_checkpoint, path, "may run code")
    raw = tmp_path / "step-00000002.pt"
    raw.write_bytes(pickle.dumps(payload))
    assert_refused(load_checkpoint, raw, "not a checkpoint")
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the payload must be one that works"


# The newest checkpoint


def test_there_is_no_newest_checkpoint_without_checkpoints(tmp_path):
    assert load_newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / ".step-00000001.pt.tmp").write_bytes(b"half")
    (tmp_path / "best.pt").write_bytes(b"other")
    assert load_newest_checkpoint(tmp_path) is None


def test_a_sound_newest_checkpoint_is_taken_without_a_warning(tmp_path, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step})
    assert load_newest_checkpoint(tmp_path) == ({"step": 2}, tmp_path / "step-00000002.pt")
    assert caplog.records == []


def test_damaged_checkpoints_are_named_and_the_one_before_them_is_taken(tmp_path, caplog):
    states = [{"f": torch.full((9,), step)} for step in range(4)]
    paths = [save_checkpoint(tmp_path, step, state, keep=4) for step, state in enumerate(states)]
    paths[3].write_bytes(paths[3].read_bytes()[:-30])
    data = paths[2].read_bytes()
    position = data.index(torch.full((9,), 2).numpy().tobytes())
    paths[2].write_bytes(flip(data, position * 8))
    state, path = load_newest_checkpoint(tmp_path)
    assert path == paths[1] and torch.equal(state["f"], torch.full((9,), 1))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert str(paths[3]) in warnings[0] and str(paths[2]) in warnings[1]


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_run(tmp_path, caplog):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {}).write_bytes(b"")
    with pytest.raises(InvalidFileError, match="none of its 2 checkpoints can be loaded") as caught:
        load_newest_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(caplog.records) == 2


def test_a_foreign_file_in_the_place_of_a_checkpoint_stays(tmp_path):
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(b"mine")
    with pytest.raises(ForeignFileError):
        save_checkpoint(tmp_path, 1, {})
    assert path.read_bytes() == b"mine"


def test_a_pipe_in_the_place_of_a_checkpoint_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "step-00000001.pt")
    with pytest.raises(InvalidFileError, match="not a regular file"):
        load_checkpoint(tmp_path / "step-00000001.pt")
