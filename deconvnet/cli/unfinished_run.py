"""Runs whose training was interrupted: how far they are, and the command that resumes them."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deconvnet.cli.printed_commands import sibling
from deconvnet.images.decoding import shown_name
from deconvnet.network.network import DeconvNet, load, restore_network
from deconvnet.storage.checkpoint_files import load_newest_checkpoint


@dataclass(frozen=True)
class Unfinished:
    """A run that has not learned all of its layers.

    finished, planned: numbers of layers; layer: that which is being learned, None between layers;
    epoch, epochs: of this layer. command: resumes the run; None if it is not known.
    """

    finished: int
    planned: int
    layer: int | None
    epoch: int
    epochs: int
    command: str | None

    def __str__(self) -> str:
        if self.layer is None:
            return f"{self.finished} of {self.planned} layers learned"
        learned = f"learned for {self.epoch} of {self.epochs} epochs"
        return f"layer {self.layer} of {self.planned} has {learned}"

    @property
    def resume(self) -> str:
        """How to resume the run."""
        return self.command or "the command that began it"


def load_run(path: Path, finished: str = "") -> DeconvNet:
    """The network of a run folder or network file, with a note on stderr if its training was
    interrupted.

    finished: the setting with which this command uses a finished layer {}, for the note.
    """
    newest = load_newest_checkpoint(path / "checkpoints") if path.is_dir() else None
    if newest is None:
        check_begun(path)
        return load(path)
    state, source = newest
    parts = state.get("network", {})
    net = restore_network(source, parts.get("tensors"), parts.get("settings"))
    unfinished = unfinished_run(path, state, net)
    if unfinished is not None and os.environ.get("RANK", "0") == "0":
        print(_note(path, unfinished, finished), file=sys.stderr, flush=True)
    return net


def check_begun(path: Path) -> None:
    """Raise ValueError for the folder of a run that stopped before its first checkpoint."""
    if path.is_dir() and (command := resume_command(path)) is not None:
        raise ValueError(
            f"run={shown_name(str(path))}: training stopped before its first checkpoint; to start "
            f"it again: {command}"
        )


def unfinished_run(path: Path, state: dict[str, Any], net: DeconvNet) -> Unfinished | None:
    """How far a run has come, from its newest state; None if it has learned all of its layers."""
    folder = path if path.is_dir() else path.parent.parent
    trainer = state.get("trainer")
    finished = net.depth - (trainer is not None)
    planned = _planned(folder, state)
    if trainer is None and (finished >= planned or finished == 0):
        return None
    layer = None if trainer is None else net.depth
    epochs = net.layer(net.depth).settings.learning.epochs
    epoch = 0 if trainer is None else trainer.get("epoch", 0)
    return Unfinished(
        finished, max(planned, net.depth), layer, epoch, epochs, resume_command(folder)
    )


def resume_command(folder: Path) -> str | None:
    """The command that resumes the run in a folder, for the shell; None if it does not say."""
    overrides, recorded = _yaml(folder, "overrides"), _yaml(folder, "hydra")
    try:
        recorded = recorded["hydra"]
        runtime = recorded["runtime"]
        if recorded["job"]["name"] != "train" or not Path(runtime["cwd"]).is_dir():
            return None
        typed = [text for text in overrides if text.lstrip("+").partition("=")[0] != "resume"]
        chosen = any(text.startswith("hydra.run.dir=") for text in recorded["overrides"]["hydra"])
        is_there = Path(runtime["output_dir"]).resolve() == folder.resolve()
        if chosen or not is_there or recorded["mode"] != "RUN":
            typed.append(f"hydra.run.dir={os.path.relpath(folder, runtime['cwd'])}")
        sources = runtime["config_sources"]
        own = [source["path"] for source in sources if source["provider"] == "command-line"]
        typed = [*(f"--config-dir={path}" for path in own), *typed]
    except (TypeError, KeyError, AttributeError, IndexError):
        return None
    if not all(text.isprintable() for text in (*typed, runtime["cwd"])):
        return None
    is_here = Path(runtime["cwd"]).resolve() == Path.cwd().resolve()
    call = sibling("train") if is_here else f"cd {shlex.quote(runtime['cwd'])} && deconvnet train"
    return " ".join([call, *map(shlex.quote, typed)])


def _note(path: Path, unfinished: Unfinished, finished: str) -> str:
    """Three lines: how far the run is, what is used of it, and how to resume it."""
    used = "its filters so far are used" if unfinished.layer else "the learned layers are used"
    if unfinished.layer and unfinished.finished and finished:
        number = unfinished.finished
        used += f"; {finished.format(number)} uses layer {number}, which is finished"
    return (
        f"{shown_name(str(path))} is not finished: {unfinished}\n"
        f"  {used}\n"
        f"  to finish it: {unfinished.resume}"
    )


def _planned(folder: Path, state: dict[str, Any]) -> int:
    """The number of layers that the run was to learn."""
    config = _yaml(folder, "config")
    layers = config.get("layers") if isinstance(config, dict) else None
    if isinstance(layers, int):
        return layers
    if (folder / "network.safetensors").exists():
        return 0
    return len(state.get("settings", {}).get("model", {}))


def _yaml(folder: Path, name: str) -> Any:
    """A file of .hydra in a run folder; None if it is missing or damaged."""
    try:
        return yaml.safe_load((folder / ".hydra" / f"{name}.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
