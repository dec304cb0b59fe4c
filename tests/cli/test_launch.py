"""Whatever ends a command that is not a fault of the package ends it in one line."""

import errno
import logging
import os
import signal
import sys
from dataclasses import dataclass

import pytest
import torch

from deconvnet.cli import errors
from deconvnet.cli.errors import one_line_errors
from deconvnet.cli.launch import run as run_main
from deconvnet.cli.settings import AblateConfig, TrainConfig, VisualizeConfig


@dataclass
class Small:
    """The settings of a command that has none to lower."""

    run: str = "x"


@pytest.fixture
def launch(monkeypatch, capsys):
    """launch(error, schema): the code and the line with which a command ends that raises it."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(errors, "WANTS_TRACEBACK", False)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def run(error, schema=TrainConfig):
        def main():
            with one_line_errors(ValueError, OSError):
                if callable(error) and not isinstance(error, type):
                    error()
                raise error

        with pytest.raises(SystemExit) as caught:
            run_main(main, schema, ("deconvnet", "train"))
        said, code = capsys.readouterr().err, caught.value.code
        return (1, f"{code}\n") if isinstance(code, str) else (code, said)

    return run


def full_disk(path=None):
    return OSError(errno.ENOSPC, "No space left on device", path)


def allocate():
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("lam=-1:\nmust be positive"), "error: lam=-1: must be positive\n"),
        (full_disk("runs/a.png"), "error: [Errno 28] No space left on device: 'runs/a.png'\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error: 'utf-8'"),
        (MemoryError(), "error: out of memory: lower chunk= or memory= or data.size="),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "error: out of memory: lower chunk="),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "error: out of memory"),
        (RuntimeError("std::bad_alloc"), "error: out of memory"),
        (allocate, "error: out of memory"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_situation_of_the_user_ends_in_one_line(launch, error, expected):
    code, said = launch(error)
    assert code == 1 and said.startswith(expected) and said.count("\n") == 1, said


def test_out_of_memory_names_settings_that_the_command_has(launch):
    assert "lower batch= or max_images=" in launch(MemoryError(), VisualizeConfig)[1]
    assert launch(MemoryError(), Small)[1] == "error: out of memory: use smaller images\n"
    assert "lower chunk= or count=" in launch(MemoryError(), AblateConfig)[1]


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a bug"), TypeError("a bug")])
def test_faults_of_the_package_keep_their_traceback(launch, error):
    with pytest.raises(type(error)):
        launch(error)


def test_ctrl_c_at_any_moment_ends_without_a_traceback(launch):
    assert launch(KeyboardInterrupt) == (130, "stopped\n")


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(launch, monkeypatch):
    closed = []
    monkeypatch.setattr(os, "dup2", lambda one, other: closed.append(other))
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    assert launch(BrokenPipeError(errno.EPIPE, "Broken pipe")) == (141, "")
    assert closed == [1]
    # Neither does logging complain.
    assert not logging.raiseExceptions


def test_characters_that_the_terminal_lacks_are_no_error(tmp_path, script):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from deconvnet.cli import launch, settings\n"
        "for stream in (sys.stdout, sys.stderr): stream.reconfigure(encoding='ascii')\n"
        "launch.run(lambda: print('\\udcff ±'), settings.TrainConfig, ('deconvnet', 'train'))",
        encoding="utf-8",
    )
    result = script(tmp_path, program)
    assert (result.code, result.out, result.err) == (0, "\\udcff \\xb1\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["hydra.launcher._target_=x", "-m"],
        ["hydra/launcher=nope"],
        ["seed=${seed}"],
        ["model=${model}"],
        ["hydra.run.dir=${nope}"],
        ["--config-dir=nowhere"],
        ["--config-name=nowhere"],
    ],
    ids=str,
)
def test_arguments_that_hydra_does_not_expect_end_in_one_line(tmp_path, script, arguments):
    result = script(tmp_path, "train.py", *arguments)
    assert result.code == 1 and "Traceback" not in result.err, result.err
    assert result.err.count("\n") == 1 and len(result.err) < 600, result.err


def test_ctrl_c_is_heard_again_once_the_libraries_are_loaded(launch):
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        assert launch(lambda: os.kill(os.getpid(), signal.SIGINT)) == (130, "stopped\n")
        # Signals that the shell ignores stay ignored.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert launch(ValueError("x")) == (1, "error: x\n")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
