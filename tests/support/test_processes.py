"""Training in several processes as torchrun starts them: the same network, one folder, and what
happens when one of them is stopped, killed or hangs."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from deconvnet import load
from deconvnet.monitoring.monitor import save_picture
from deconvnet.storage.checkpoint_files import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]

QUICK = [
    *("progress=false", "device=cpu", "data=folder", "data.size=32", "layers=2"),
    *(f"model.layer{n}.{key}" for n in (1, 2) for key in ("num_maps=4", "filter_size=5")),
    *(f"model.layer{n}.solver.iterations=5" for n in (1, 2)),
    *(f"model.layer{n}.learning.epochs=3" for n in (1, 2)),
    *(f"model.layer{n}.learning.batch_size=3" for n in (1, 2)),
]
# Long enough for a test to interfere, in the first layer.
LONG = "model.layer1.learning.epochs=2000"


@pytest.fixture(scope="module")
def place(tmp_path_factory, textures):
    """A folder with a folder `photos` of seven small images."""
    folder = tmp_path_factory.mktemp("place")
    for number, image in enumerate(textures(7, 3, 34, 40)):
        save_picture(folder / "photos" / f"{number}.png", image)
    return folder


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@pytest.fixture
def ranks(place, start):
    """ranks(count, *arguments): the processes of train.py on the photos, started."""

    def run(count, *arguments):
        shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=count)
        shared |= dict(LOCAL_WORLD_SIZE=count, pictures=False)
        command = ["train.py", "data.path=photos", *QUICK, *arguments]
        return [
            start(place, *command, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(count)
        ]

    return run


def learned(place, name):
    return load(place / "runs" / name / "network.safetensors").state_dict()


def assert_equal(one, two):
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


def wait_for(path, seconds=60):
    """Wait until a file matches a pattern."""
    end = time.monotonic() + seconds
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


def signals(running, number, count=1):
    for process in running[:count]:
        os.kill(process.pid, number)


def test_processes_learn_what_one_process_learns_bit_by_bit(place, ranks, script):
    count = 2
    order = ["train.py", "data.path=photos", *QUICK, f"name=alone-{count}"]
    alone = script(place, *order, pictures=False)
    assert alone.code == 0, alone.err
    ends = [process.wait() for process in ranks(count, f"name=shared-{count}")]
    assert [end.code for end in ends] == count * [0], ends
    assert_equal(learned(place, f"shared-{count}"), learned(place, f"alone-{count}"))
    # Rank 0 alone prints, also what ranks exchange.
    first, *others = ends
    assert f"on {count} ranks, cpu" in first.out
    assert (
        "layer 1: ranks exchange one message of 0.01 MB per update, whatever the number of images"
        in first.out
    )
    assert all(end.out == end.err == "" for end in others), others
    names = {path.name for path in (place / "runs" / f"shared-{count}").iterdir()}
    assert names >= {"train.log", ".hydra", "network.safetensors", "checkpoints"}
    assert len([name for name in names if name.startswith("events")]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_save_and_stop_when_one_is_asked_to(place, ranks, number):
    name = f"stopped-{number.name}"
    running = ranks(2, f"name={name}", LONG)
    wait_for(place / "runs" / name / "checkpoints" / "step-*.pt")
    # Rank 1 is asked, and rank 0 saves.
    os.kill(running[1].pid, number)
    ends = [process.wait() for process in running]
    assert [end.code for end in ends] == [130, 130], ends
    assert "stopped and saved; to resume: torchrun --nproc-per-node=2" in ends[0].out
    assert "Traceback" not in ends[0].err + ends[1].err
    checkpoints = sorted((place / "runs" / name / "checkpoints").iterdir())
    step = int(checkpoints[-1].stem.removeprefix("step-"))
    state = load_checkpoint(checkpoints[-1])
    assert state["step"] == step and state["trainer"]["codes"]["images"].tolist() == list(range(7))


def test_if_a_process_dies_the_others_stop_with_one_line(place, ranks):
    running = ranks(2, "name=killed", LONG)
    wait_for(place / "runs" / "killed" / "checkpoints" / "step-*.pt")
    os.kill(running[1].pid, signal.SIGKILL)
    first, second = (process.wait() for process in running)
    assert second.code == -signal.SIGKILL
    assert first.code == 1 and "another rank has failed or does not answer" in first.err
    assert "Traceback" not in first.err


def test_if_a_process_hangs_the_others_time_out(place, ranks):
    running = ranks(2, "name=hung", LONG, "patience=2")
    wait_for(place / "runs" / "hung" / "checkpoints" / "step-*.pt")
    os.kill(running[1].pid, signal.SIGSTOP)
    started = time.monotonic()
    first = running[0].wait()
    assert time.monotonic() - started < 20
    os.kill(running[1].pid, signal.SIGKILL)
    running[1].wait()
    assert first.code == 1 and "another rank has failed or does not answer" in first.err
    assert "Traceback" not in first.err


@pytest.mark.slow
def test_torchrun_restarts_after_a_process_was_killed_and_the_result_is_the_same(
    place, script, start
):
    more = ["model.layer1.learning.epochs=20"]
    order = ["train.py", "data.path=photos", *QUICK, *more, "name=never"]
    alone = script(place, *order, pictures=False)
    assert alone.code == 0, alone.err
    options = ["--nproc-per-node=2", "--max-restarts=2", f"--master-port={free_port()}"]
    command = [ROOT / "scripts" / "train.py", "data.path=photos", *QUICK, *more, "name=often"]
    running = start(place, "torchrun", *options, "--log-dir=logs", *command, pictures=False)
    wait_for(place / "runs" / "often" / "checkpoints" / "step-*.pt")
    workers = subprocess.run(
        ["pgrep", "-P", str(running.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 0, ended
    assert_equal(learned(place, "often"), learned(place, "never"))


@pytest.mark.slow
def test_runs_that_are_killed_at_any_moment_end_with_the_same_result(tmp_path, script):
    options = ["--kills", 2, "--epochs", 3, "--ranks", 2, "--folder", tmp_path / "runs"]
    ended = script(tmp_path, ROOT / "benchmarks" / "kill_and_resume.py", *options, pictures=False)
    assert ended.code == 0, ended
    *_, last = ended.out.splitlines()
    assert last.startswith("2 kills in") and "0 unreadable checkpoints" in last
