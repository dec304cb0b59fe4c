"""The command line: `deconvnet COMMAND key=value ...`.

This module does not import torch, so that `deconvnet --help` is fast, and so that the environment
variables of torch's threads are set before torch is loaded.
"""

from __future__ import annotations

import difflib
import os
import shutil
import signal
import sys
from pathlib import Path

from deconvnet import __version__

# The commands and their summaries. Their modules in this folder have the same names.
COMMANDS = {
    "train": "Learn a network from images, layer by layer, and show it.",
    "suggest": "Suggest how many maps layer 1 needs for your images.",
    "visualize": "Show what the maps of a network, or of any CNN, respond to.",
    "occlusion": "Cover parts of images, and see what a map and the class lose.",
    "correspondence": "Measure whether features represent parts of objects.",
    "reconstruct": "Reconstruct images from the feature maps of one layer.",
    "faithfulness": "Measure what a network keeps if codes replace a layer.",
    "stability": "Measure which filters are learned again from other seeds.",
    "ablate": "Measure what the switches of max pooling contribute.",
    "denoise": "Remove noise from images.",
    "inpaint": "Fill in missing pixels of images.",
    "classify": "Measure how well features separate classes of images.",
    "train-cnn": "Train a small convolutional network to visualize.",
    "info": "Say what a run folder or a network file holds.",
    "export": "Write filters or feature maps to a .npz or .mat file.",
    "doctor": "Check the installation: versions, devices, caches, solvers.",
}

HELP = """\
Learn a hierarchy of visual features from unlabelled images, and see what they
are: deconvolutional networks and convolutional sparse coding.

  deconvnet COMMAND key=value ...

{commands}

  deconvnet COMMAND --help      what the command does, and its main settings
  deconvnet COMMAND --help all  all its settings
  deconvnet --completion        a script for bash and zsh; Tab then completes
  deconvnet --version           the version of deconvnet

Start with: deconvnet train +layers=2"""


def main() -> None:
    """The console command `deconvnet`; also `python -m deconvnet`."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("--help", "-h", "help"):
        _print(_help())
    elif first in ("--version", "-V"):
        _print(f"deconvnet {__version__}")
    elif first == "--completion":
        from deconvnet.cli.completion import script

        _print(script())
    elif first.replace("_", "-") in COMMANDS:
        call = (*_program(sys.argv[0]), first)
        sys.argv[1:] = sys.argv[2:]
        run(first.replace("_", "-"), call)
    else:
        raise SystemExit(f"deconvnet {first}: no such command; {_right_command(first)}")


def run(command: str, call: tuple[str, ...] = ()) -> None:
    """Run a command with the settings in sys.argv.

    call: how the user typed the command, for commands that it prints; by default the running
    script.
    """
    # On a busy machine, OpenMP threads that spin while they wait cost up to ten times the time; on
    # an idle machine a short spin is as fast.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Ctrl-C while libraries are loaded ends the program silently; `launch` handles it later.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from deconvnet.cli.launch import launch

    launch(command, call or ("python", sys.argv[0]))


def _print(text: str) -> None:
    """Print a text to a reader that may stop before its end, as in `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in COMMANDS.items()]
    return HELP.format(commands="\n".join(lines))


def _program(path: str) -> tuple[str, ...]:
    """How the user called this program, whose file is at `path`."""
    if Path(path).name == "__main__.py":
        return "python", "-m", "deconvnet"
    name = Path(path).stem
    program = shutil.which(name)
    return (name,) if program and Path(program).resolve() == Path(path).resolve() else (path,)


def _right_command(name: str) -> str:
    """A suggestion for a name that is not a command."""
    if "=" in name or name.startswith("+"):
        return f"the command comes first, as in: deconvnet train {name}"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(COMMANDS)}"
