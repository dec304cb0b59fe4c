"""A run folder: one folder holds one run, and the same command again resumes it.

<folder>/checkpoints/step-*.pt    the newest states of the training
<folder>/pictures/                what was learned, as PNG files
<folder>/evolution/layer*.npz     features of the layers after some epochs
<folder>/network.safetensors      the finished network
<folder>/events.out.tfevents.*    TensorBoard
<folder>/metrics.jsonl            the same numbers and what they cost, for programs
<folder>/train.log                what was said, and .hydra/ the configuration
<folder>/states/                  with disk=: the states of inference of the layer that learns
<folder>/previous-N/              earlier runs of this folder

A folder may hold other things, too: only what a run made is replaced, moved or removed (`files`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from deconvnet.images.datasets import DataSettings
from deconvnet.network.network import network_of
from deconvnet.storage import ownership
from deconvnet.storage.checkpoint_files import NAME as CHECKPOINT_NAME
from deconvnet.storage.checkpoint_files import (
    is_checkpoint,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from deconvnet.storage.integrity import InvalidFileError
from deconvnet.storage.network_files import is_network, load_network
from deconvnet.training.warm_starts import is_warm_start_file

log = logging.getLogger(__name__)

# Settings that change nothing of what is learned, so that a run may be resumed with others.
FREE = {"data.workers", "data.stream", "data.download", "data.name", "memory", "disk", "init"}
# And those that say where the images are, where the images themselves can be compared.
BY_IMAGES = {
    *("data.path", "data.source", "data.dataset", "data.split", "data.max_images", "data.scale"),
    "data.skip_unreadable",
}
# What a run writes beside states and archives, as far as it can be told from its names.
MADE = (
    *("checkpoints/step-*.pt", "pictures/layer*-*.png", "evolution/layer*.npz"),
    *("network.safetensors", "metrics.jsonl", "train.log", ".hydra/*.yaml"),
    *("events.out.tfevents.*", "inference/layer*/events.out.tfevents.*"),
)
# Of these the ones that grow, and those without which a run cannot be.
GROWING = ("metrics.jsonl", "train.log", "events.out.tfevents.*")
NEEDED = ("metrics.jsonl", "train.log", "evolution/layer*.npz", ".hydra/*.yaml")
FOLDERS = ("checkpoints", "pictures", "evolution", "inference", ".hydra")
# If only these settings of a run elsewhere differ, learning continues from its filters.
LEARNED_LONGER = re.compile(r"model\.layer\d+\.learning\.(epochs|batch_size):")
# Earlier runs; what is called otherwise is a user's.
PREVIOUS = re.compile(r"previous-([0-9]{1,9})")
# Bytes of the digest of an image that a checkpoint keeps.
DIGEST = 8


class RunFolder:
    """A run folder: its checkpoints, and the rule that one folder holds one run.

    resume: "auto" resumes from the newest valid checkpoint of the folder, if there is one; "false"
    moves an earlier run into a folder previous-N inside and starts from the beginning; a path
    resumes from that checkpoint file or run folder. Where that has learned from other images or for
    another number of epochs, learning starts from its filters. init: a run folder, checkpoint or
    network file whose filters a new run starts from. digests: of the images that are learned from,
    in their order, asked for when all else has been checked; without them images are not compared.

    state: what the run resumes from; initial: (tensors, settings) of the network whose filters it
    starts from; None where there is nothing of the kind.

    Raises ValueError, before anything is written or moved, where the folder or the path holds a run
    of other settings or images, and ForeignFileError where files of somebody else are in the way.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        resume: str = "auto",
        *,
        init: str | None = None,
        digests: Callable[[], Sequence[str]] | None = None,
    ):
        self.folder, self.settings = Path(folder), settings
        self.checkpoints = self.folder / "checkpoints"
        self._check_folders()
        self.state: dict | None = None if resume == "false" else self._find(resume)
        if self.state is not None:
            _check_state(self.state, self.folder if resume == "auto" else resume)
        self.initial = _parts(init) if init and self.state is None else None
        self._adopt()
        self._check_place()
        if resume != "auto":
            self._check_links()
        where = os.path.relpath(self.folder) if resume == "auto" else resume
        other = self._other_settings(where, elsewhere=resume != "auto", by_images=digests)
        self.images = digests and _as_tensor(digests())
        other += self._other_images(where, elsewhere=resume != "auto")
        if other:
            log.info("%s: %s; learning starts from its filters", where, ", ".join(other))
            self.initial, self.state = _network_of(self.state), None
        # What states of inference on the disk are marked with.
        self.token = (self.state or {}).get("token") or os.urandom(8).hex()
        if self.state is not None and resume != "auto":
            self._begin_from(Path(resume))
        elif self.state is None and resume != "auto":
            self.remove_warm_starts()
            self._archive()

    def claim(self) -> None:
        """Keep a record of what is made in this folder from here on."""
        ownership.claim_folder(self.folder)

    def save(self, step: int, state: dict) -> Path:
        """Write a checkpoint after `step` filter updates."""
        mine = {"settings": self.settings, "images": self.images, "token": self.token}
        return save_checkpoint(self.checkpoints, step, {**state, **mine})

    @property
    def network(self) -> Path:
        """The file of the finished network."""
        return self.folder / "network.safetensors"

    @property
    def states(self) -> Path:
        """The folder of the states of inference that are kept on the disk."""
        return self.folder / "states"

    def remove_warm_starts(self, keep: int | None = None) -> None:
        """Remove the states of inference on the disk, which are large and of use to nobody else, of
        all layers but one.
        """
        for folder in self.states.glob("layer*"):
            ours = re.fullmatch(r"layer\d+", folder.name) and not folder.is_symlink()
            if not ours or folder.name == f"layer{keep}":
                continue
            for path in folder.glob("*.states"):
                if is_warm_start_file(path):
                    path.unlink()
            ownership.prune(folder)
        if not self.states.is_symlink() and self.states.is_dir() and not any(self.states.iterdir()):
            self.states.rmdir()

    def evolution(self, layer: int) -> Path:
        """The file of the features of a layer over its epochs."""
        return _evolution(self.folder, layer)

    def _find(self, resume: str) -> dict | None:
        if resume == "auto":
            found = load_newest_checkpoint(self.checkpoints)
            return found and found[0]
        path = Path(resume).expanduser()
        if is_network(path):
            raise ValueError(
                f"resume={resume}: a network, and no checkpoint to resume from; "
                f"{_typed('init', resume)} starts from its filters"
            )
        found = _state_at(path)
        if found is None:
            raise ValueError(
                f"resume={resume}: no checkpoint there; give a run folder or a .pt file"
            )
        return found

    def _adopt(self) -> None:
        """Record the files of a run from before there was a record of them."""
        if (self.folder / ownership.RECORD_FOLDER / ownership.RECORD_FILE).exists():
            return
        if not any(is_checkpoint(path) for path in self.checkpoints.glob("step-*.pt")):
            return
        self.claim()
        for pattern in MADE:
            for path in self.folder.glob(pattern):
                if path.is_file() and not path.is_symlink():
                    ownership.record(path, grows=any(path.match(name) for name in GROWING))

    def _check_folders(self) -> None:
        for name in FOLDERS:
            path = self.folder / name
            if os.path.lexists(path) and not path.is_dir():
                raise ownership.ForeignFileError(
                    f"{path}: is in the way of a folder of this run; move it away"
                )

    def _check_place(self) -> None:
        """Refuse a folder in which a file is in the way, before hours of work."""
        for pattern in NEEDED:
            for path in self.folder.glob(pattern):
                ownership.check_writable(path)
        step = -1 if self.state is None else self.state["step"]
        for path in self.checkpoints.glob("step-*.pt"):
            if not CHECKPOINT_NAME.fullmatch(path.name):
                continue
            ahead = path.stem.removeprefix("step-") > f"{step:08d}"
            if ahead and not is_checkpoint(path):
                ownership.check_writable(path)
        if not self._is_replaceable(self.network):
            ownership.check_writable(self.network)

    def _is_replaceable(self, path: Path) -> bool:
        """Whether a file in the place of the finished network is that of this run, if damaged, and
        no other network that somebody has put there.
        """
        if self.state is None or not is_network(path):
            return False
        try:
            tensors, _ = load_network(path)
        except InvalidFileError:
            return True
        known = _network_of(self.state)[0]
        return tensors.keys() == known.keys() and all(
            torch.equal(tensors[name], known[name]) for name in known
        )

    def _check_links(self) -> None:
        """Refuse to archive what lies behind links: it would stay where it is, and be taken for a
        part of the new run.
        """
        for pattern in MADE:
            for path in self.folder.glob(pattern):
                folder = self.folder / path.relative_to(self.folder).parts[0]
                linked = next((each for each in (folder, path) if each.is_symlink()), None)
                if linked is not None:
                    raise ownership.ForeignFileError(
                        f"{linked}: is a link, and what lies behind it cannot be archived; move "
                        "the link away, or choose another name=..."
                    )

    def _begin_from(self, source: Path) -> None:
        """Make the newest checkpoint of this folder the one that this run resumes from."""
        kept = self._evolution_in(source.expanduser())
        if _folder_of(source.expanduser()).resolve() != self.folder.resolve():
            self.remove_warm_starts()
        self._archive()
        self.claim()
        for number, data in kept.items():
            ownership.write(self.evolution(number), data)
        self.save(self.state["step"], self.state)

    def _evolution_in(self, source: Path) -> dict[int, bytes]:
        """The files of `evolution` of the run that this one resumes from, by layer."""
        folder = _folder_of(source)
        layers = range(1, self._begun + 1)
        paths = {number: _evolution(folder, number) for number in layers}
        return {
            number: ownership.read_regular_file(path)
            for number, path in paths.items()
            if path.is_file()
        }

    @property
    def _begun(self) -> int:
        """How many layers had begun to learn."""
        return self.state["layer"] - (self.state["trainer"] is None)

    def _other_settings(
        self, where: Path | str, *, elsewhere: bool, by_images: object
    ) -> list[str]:
        """The settings that differ where learning continues from the filters of another run;
        ValueError where a run with these settings cannot be resumed.
        """
        if self.state is None:
            return []
        # Of the oldest runs no checkpoint says which images they have learned from.
        known = by_images and self.state.get("images") is not None
        free = FREE | BY_IMAGES if known else FREE
        different = [
            line
            for line in _differences(self.state["settings"], self.settings)
            if not _is_above(line, self._begun) and line.partition(":")[0] not in free
        ]
        continues = elsewhere and all(LEARNED_LONGER.match(line) for line in different)
        if different and not continues:
            raise ValueError(
                f"{where} holds a run of other settings ({', '.join(different)}): {_ways_on(where)}"
            )
        return different

    def _other_images(self, where: Path | str, *, elsewhere: bool) -> list[str]:
        """How the images differ where learning continues from the filters of another run."""
        if self.state is None or self.images is None or self.state.get("images") is None:
            return []
        changes = _changes(self.state["images"].tolist(), self.images.tolist())
        if changes and not elsewhere:
            raise ValueError(
                f"{where} has learned from other images ({changes} since then): {_ways_on(where)}"
            )
        return [f"images: {changes}"] if changes else []

    def _archive(self) -> None:
        """Move what an earlier run made into previous-N, its checkpoints last."""
        if not self.checkpoints.exists():
            return
        found = (PREVIOUS.fullmatch(path.name) for path in self.folder.glob("previous-*"))
        number = 1 + max((int(match[1]) for match in found if match), default=0)
        archive = ownership.claim_folder(self.folder / f"previous-{number}")
        for path in self.checkpoints.glob("step-*.pt"):
            # A copy that somebody put here would be taken for a checkpoint of the new run.
            if is_checkpoint(path) and not ownership.is_ours(path):
                ownership.record(path, grows=False)
        made = [
            path.relative_to(ownership.absolute(self.folder))
            for path in ownership.own_files_in(self.folder)
        ]
        own = [path for path in made if any(path.match(pattern) for pattern in MADE)]
        for path in sorted(own, key=lambda path: (path.parts[0] == "checkpoints", path)):
            if not path.parts[0].startswith("previous-"):
                ownership.move(self.folder / path, archive / path)
        for name in FOLDERS:
            ownership.prune(self.folder / name)
        log.info("the earlier run was moved to %s", self.folder / archive.name)


def training_data(run: str | Path) -> DataSettings | None:
    """What the network of a run folder has learned from; None if that is a network file.

    Nothing is ever downloaded because a file says so.
    """
    if not Path(run).is_dir():
        return None
    found = load_newest_checkpoint(Path(run) / "checkpoints")
    if found is None:
        return None
    try:
        return dataclasses.replace(DataSettings(**found[0]["settings"]["data"]), download=False)
    except (TypeError, KeyError, ValueError) as error:
        raise InvalidFileError(
            f"{found[1]}: what it says of its images is no data settings ({error}); give images "
            "of your own"
        ) from None


def _parts(init: str) -> tuple[dict, dict]:
    """(tensors, settings) of the network of a run folder, a checkpoint or a network file."""
    path = Path(init).expanduser()
    if path.suffix == ".safetensors" and path.exists() and not path.is_dir():
        parts = load_network(path)
        network_of(path, *parts)
        return parts
    found = _state_at(path)
    if found is None:
        raise ValueError(
            f"init={init}: nothing to start from there; give a run folder, a .pt or a .safetensors "
            "file"
        )
    _check_state(found, path)
    return _network_of(found)


def _check_state(state: object, where: str | Path) -> None:
    """InvalidFileError where a checkpoint, which may be a stranger's, holds no state of a run."""
    kinds = {"settings": dict, "network": dict, "layer": int, "step": int, "results": list}
    kinds |= {"trainer": dict | None, "token": str | None}
    state = state if isinstance(state, dict) else {}
    wrong = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    wrong += [key for key in ("layer", "step") if key not in wrong and state[key] < 0]
    if isinstance(state.get("trainer"), dict) and not isinstance(
        state["trainer"].get("codes"), dict
    ):
        wrong.append("trainer")
    images = state.get("images")
    if images is not None and not _is_digests(images):
        wrong.append("images")
    if wrong:
        raise InvalidFileError(
            f"{where}: its checkpoint is no state of a run of this version ({', '.join(wrong)}); "
            "resume from another one"
        )
    network_of(where, state["network"].get("tensors"), state["network"].get("settings"))


def _is_digests(images: object) -> bool:
    return (
        isinstance(images, torch.Tensor)
        and images.dtype == torch.uint8
        and images.ndim == 2
        and images.shape[1] == DIGEST
    )


def _ways_on(where: Path | str) -> str:
    """What to do instead of resuming a run."""
    return (
        f"choose another name=..., with {_typed('init', where)} to start from its filters, or "
        "resume=false to archive that run and start from the beginning"
    )


def _state_at(path: Path) -> dict | None:
    """The state in a checkpoint, or in the newest of a run folder; None where there is none."""
    if path.exists() and not path.is_dir():
        return load_checkpoint(path)
    found = load_newest_checkpoint(path / "checkpoints")
    return found and found[0]


def _typed(key: str, path: Path | str) -> str:
    """A setting as it is typed in a shell."""
    return shlex.quote(f"{key}={path}")


def _network_of(state: dict) -> tuple[dict, dict]:
    return state["network"]["tensors"], state["network"]["settings"]


def _as_tensor(digests: Sequence[str]) -> torch.Tensor:
    """(N, DIGEST) bytes: the beginning of each digest, which is hexadecimal."""
    data = b"".join(bytes.fromhex(digest)[:DIGEST] for digest in digests)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, DIGEST)


def _changes(old: list[list[int]], new: list[list[int]]) -> str:
    """How two lists of images differ, in words; empty where they do not."""
    old, new = [bytes(digest) for digest in old], [bytes(digest) for digest in new]
    if old == new:
        return ""
    gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
    counts = {"added": come.total(), "removed": gone.total()}
    if len(old) == len(new) and gone.total() == sum(a != b for a, b in zip(old, new, strict=True)):
        counts = {"changed": gone.total()}
    said = [f"{count} {what}" for what, count in counts.items() if count]
    return ", ".join(said) if said else "their order changed"


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
