"""A run folder: one folder holds one run, and the same command again goes on with it.

<folder>/checkpoints/step-*.pt    the newest states of the training
<folder>/pictures/                what was learned, as PNG files
<folder>/evolution/layer*.npz     features of the layers after some epochs
<folder>/network.safetensors      the finished network
<folder>/events.out.tfevents.*    TensorBoard
<folder>/metrics.jsonl            the same numbers and what they cost, for programs
<folder>/states/                  where inference goes on, of the layer that learns, with disk=
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from deconvnet import checkpoint
from deconvnet.data import DataSettings

log = logging.getLogger(__name__)


class Run:
    """A run folder: its checkpoints, and the rule that one folder holds one run.

    resume: "auto" goes on from the newest valid checkpoint of the folder, if there is one; "false"
    moves an earlier run into a folder previous-N inside and starts anew; a path starts from that
    checkpoint file or run folder.
    """

    def __init__(self, folder: Path, settings: dict, resume: str = "auto"):
        self.folder, self.settings = Path(folder), settings
        self.checkpoints = self.folder / "checkpoints"
        self.state: dict | None = None
        if resume == "false":
            self.forget_states()
            self._put_aside()
        else:
            self.state = self._find(resume)
        if self.state is not None:
            self._check_settings(self.folder if resume == "auto" else resume)
            if resume != "auto":
                # The newest checkpoint of the folder must be the one that this run goes on from.
                kept = self._evolution_in(Path(resume))
                if _folder_of(Path(resume)).resolve() != self.folder.resolve():
                    self.forget_states()
                self._put_aside()
                for number, data in kept.items():
                    checkpoint.write(self.evolution(number), data)
                self.save(self.state["step"], self.state)

    def save(self, step: int, state: dict) -> Path:
        """Write a checkpoint after `step` filter updates."""
        return checkpoint.save(self.checkpoints, step, {**state, "settings": self.settings})

    @property
    def network(self) -> Path:
        """The file of the finished network."""
        return self.folder / "network.safetensors"

    @property
    def states(self) -> Path:
        """The folder of the states of inference that are kept on the disk."""
        return self.folder / "states"

    def forget_states(self, keep: int | None = None) -> None:
        """Remove the states on the disk, which are large and of use to nobody else, of all layers
        but one.
        """
        if not self.states.is_dir():
            return
        for folder in self.states.iterdir():
            if folder.name != f"layer{keep}":
                shutil.rmtree(folder)
        if not any(self.states.iterdir()):
            self.states.rmdir()

    def evolution(self, layer: int) -> Path:
        """The file of the features of a layer over its epochs."""
        return _evolution(self.folder, layer)

    def _find(self, resume: str) -> dict | None:
        if resume == "auto":
            found = checkpoint.newest(self.checkpoints)
            return found and found[0]
        path = Path(resume)
        if path.is_file():
            return checkpoint.load(path)
        found = checkpoint.newest(path / "checkpoints")
        if found is None:
            raise ValueError(
                f"resume={resume}: no checkpoint there; give a run folder or a .pt file"
            )
        return found[0]

    def _evolution_in(self, source: Path) -> dict[int, bytes]:
        """The files of `evolution` that the run has which this one goes on from, by layer."""
        folder = _folder_of(source)
        layers = range(1, self._begun + 1)
        paths = {number: _evolution(folder, number) for number in layers}
        return {number: path.read_bytes() for number, path in paths.items() if path.is_file()}

    @property
    def _begun(self) -> int:
        """How many layers had begun to learn."""
        return self.state["layer"] - (self.state["trainer"] is None)

    def _check_settings(self, where: Path | str) -> None:
        different = [
            key
            for key in _differences(self.state["settings"], self.settings)
            if not _is_above(key, self._begun)
        ]
        if different:
            raise ValueError(
                f"{where} holds a run of other settings ({', '.join(different)}): choose "
                "another name=..., or resume=false to put that run aside and start anew"
            )

    def _put_aside(self) -> None:
        """Move what an earlier run left into previous-N."""
        kept = {".hydra", "train.log", self.states.name}
        old = [p for p in self.folder.glob("*") if p.name not in kept and "previous-" not in p.name]
        if not self.checkpoints.exists():
            return
        numbers = (path.name.removeprefix("previous-") for path in self.folder.glob("previous-*"))
        number = 1 + max((int(n) for n in numbers if n.isdigit()), default=0)
        aside = self.folder / f"previous-{number}"
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        log.info("the earlier run was moved to %s", aside)


def training_data(run: str | Path) -> DataSettings | None:
    """What the network of a run folder has learned from; None if that is a network file."""
    if not Path(run).is_dir():
        return None
    found = checkpoint.newest(Path(run) / "checkpoints")
    return DataSettings(**found[0]["settings"]["data"]) if found else None


def _folder_of(source: Path) -> Path:
    """The run folder that a checkpoint file belongs to, or the folder that is given."""
    return source.parent.parent if source.is_file() else source


def _evolution(folder: Path, layer: int) -> Path:
    return folder / "evolution" / f"layer{layer}.npz"


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two nested dicts."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix}: {old} there, {new} now"]
    keys = sorted({*old, *new})
    return [
        line
        for key in keys
        for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    ]


def _is_above(key: str, layer: int) -> bool:
    """Whether a setting belongs to a layer whose training has not begun."""
    parts = key.split(":")[0].split(".")
    name = parts[1] if parts[0] == "model" and len(parts) > 1 else ""
    return name.startswith("layer") and name[5:].isdigit() and int(name[5:]) > layer
