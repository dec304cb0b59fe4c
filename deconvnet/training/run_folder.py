"""Run folders: one folder holds one run, and running the same command again resumes it.

<folder>/checkpoints/step-*.pt    the newest states of the training
<folder>/pictures/                pictures of the learned features, as PNG files
<folder>/evolution/layer*.npz     features of the layers after some epochs
<folder>/network.safetensors      the finished network
<folder>/events.out.tfevents.*    TensorBoard
<folder>/metrics.jsonl            the same numbers and their cost, for other programs
<folder>/train.log                the log; .hydra/ holds the configuration
<folder>/states/                  with disk=: the warm starts of the layer that is being learned
<folder>/previous-N/              earlier runs in this folder

The folder may contain other files as well: only files of a run are replaced, moved or removed
(`storage.ownership`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deconvnet.activations.settings import TrainingData
from deconvnet.storage import ownership
from deconvnet.storage.checkpoint_files import NAME as CHECKPOINT_NAME
from deconvnet.storage.checkpoint_files import (
    is_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import is_network, load_network
from deconvnet.training.checkpoint import check_state, network_parts, parts_of, state_at, typed
from deconvnet.training.resume_check import (
    LEARNED_LONGER,
    different_images,
    different_settings,
    digest_tensor,
    how_to_have_the_first,
)
from deconvnet.training.warm_starts import is_warm_start_file

log = logging.getLogger(__name__)

# The names of the files that a run writes, besides warm starts and archives.
MADE = (
    *("checkpoints/step-*.pt", "pictures/layer*-*.png", "evolution/layer*.npz"),
    *("network.safetensors", "metrics.jsonl", "train.log", ".hydra/*.yaml"),
    *("events.out.tfevents.*", "inference/layer*/events.out.tfevents.*"),
)
# The subset of them that grows, and the subset that every run must write.
GROWING = ("metrics.jsonl", "train.log", "events.out.tfevents.*")
NEEDED = ("metrics.jsonl", "train.log", "evolution/layer*.npz", ".hydra/*.yaml")
FOLDERS = ("checkpoints", "pictures", "evolution", "inference", ".hydra")
# Folders of earlier runs; any other name is the user's.
PREVIOUS = re.compile(r"previous-([0-9]{1,9})")


@contextmanager
def locked_run_folder(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a run folder; FolderLockedError if another process holds it.

    If the run is refused before its first checkpoint, because settings and images do not fit each
    other or an image cannot be read, a folder that was made for it is removed again.
    """
    folder = Path(folder)
    # Hydra makes the folder before a command begins.
    is_new = not os.path.lexists(folder) or not any(folder.iterdir())
    with ownership.locked_folder(folder):
        try:
            yield
        except (ValueError, OSError):
            begun = any((folder / "checkpoints").glob("step-*.pt"))
            if is_new and not begun and not ownership.foreign_files_in(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


class RunFolder:
    """A run folder: its checkpoints, and the rule that one folder holds one run.

    settings: of the run, as nested dicts; a run is resumed only with the same ones. resume: "auto"
    resumes from the newest valid checkpoint of the folder, if there is one; "false" moves an
    earlier run into a subfolder previous-N and starts from the beginning; a path resumes from that
    checkpoint or run folder. If that run learned from other images or for another number of epochs,
    learning starts from its filters. init: a run folder, checkpoint or network file whose filters a
    new run starts from. digests: returns the digests of the training images, in order; it is called
    after all other checks. Without it images are not compared.

    Attributes: state, the checkpoint from which the run resumes, and initial, (tensors, settings)
    of the network from whose filters it starts; None if there is none.

    Raises, before anything is written or moved, ValueError if the folder or path holds a run with
    different settings or images, and ForeignFileError if somebody else's files are in the way.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any] | None = None,
        resume: str = "auto",
        *,
        init: str | None = None,
        digests: Callable[[], Sequence[str]] | None = None,
    ):
        self.folder, self.settings = Path(folder), settings or {}
        self.checkpoints = self.folder / "checkpoints"
        self._check_folders()
        self.state: dict | None = None if resume == "false" else self._load_state(resume)
        if self.state is not None:
            check_state(self.state, self.folder if resume == "auto" else resume)
        self.initial = network_parts(init) if init and self.state is None else None
        self._record_unrecorded()
        self._check_files()
        if resume != "auto":
            self._check_links()
        where = os.path.relpath(self.folder) if resume == "auto" else resume
        differences = self._compare(where, digests, elsewhere=resume != "auto")
        if differences:
            log.info("%s: %s; learning starts from its filters", where, ", ".join(differences))
            self.initial, self.state = parts_of(self.state), None
        # Identifies the warm start files of this run.
        self.token = (self.state or {}).get("token") or os.urandom(8).hex()
        if self.state is not None and resume != "auto":
            self._begin_from(Path(resume))
        elif self.state is None and resume != "auto":
            self.remove_warm_starts()
            self._archive()

    def claim(self) -> None:
        """Record files created in this folder from now on as ours."""
        ownership.claim_folder(self.folder)

    def save(self, step: int, state: dict) -> Path:
        """Write a checkpoint after `step` filter updates."""
        run_state = {"settings": self.settings, "images": self.images, "token": self.token}
        return save_checkpoint(self.checkpoints, step, {**state, **run_state})

    @property
    def network(self) -> Path:
        """The file of the finished network."""
        return self.folder / "network.safetensors"

    @property
    def warm_starts(self) -> Path:
        """The folder of warm starts on disk."""
        return self.folder / "states"

    def remove_warm_starts(self, keep: int | None = None) -> None:
        """Remove the warm starts on disk of all layers except `keep`; they are large, and useless
        once a layer is finished.
        """
        for folder in self.warm_starts.glob("layer*"):
            ours = re.fullmatch(r"layer\d+", folder.name) and not folder.is_symlink()
            if not ours or folder.name == f"layer{keep}":
                continue
            for path in folder.glob("*.states"):
                if is_warm_start_file(path):
                    path.unlink()
            ownership.prune(folder)
        root = self.warm_starts
        if not root.is_symlink() and root.is_dir() and not any(root.iterdir()):
            root.rmdir()

    def evolution(self, layer: int) -> Path:
        """The file of the features of a layer over its epochs."""
        return _evolution(self.folder, layer)

    def _load_state(self, resume: str) -> dict | None:
        if resume == "auto":
            newest = load_newest_checkpoint(self.checkpoints)
            return newest and newest[0]
        path = Path(resume).expanduser()
        if is_network(path):
            raise ValueError(
                f"resume={resume}: a network, and no checkpoint to resume from; "
                f"{typed('init', resume)} starts from its filters"
            )
        state = state_at(path)
        if state is None:
            raise ValueError(
                f"resume={resume}: no checkpoint there; give a run folder or a .pt file"
            )
        return state

    def _record_unrecorded(self) -> None:
        """Record the files of a run that was written before there were records."""
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

    def _check_files(self) -> None:
        """Raise ForeignFileError now, rather than after hours of work, if a file is in the way."""
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
        """Whether a network file belongs to this run, damaged or not, rather than being another
        network that somebody saved there.
        """
        if self.state is None or not is_network(path):
            return False
        try:
            tensors, _ = load_network(path)
        except InvalidFileError:
            return True
        saved = parts_of(self.state)[0]
        return tensors.keys() == saved.keys() and all(
            torch.equal(tensors[name], saved[name]) for name in saved
        )

    def _check_links(self) -> None:
        """Raise ForeignFileError for a run behind links: its files cannot be moved to the archive,
        and would be mistaken for those of the new run.
        """
        for pattern in MADE:
            for path in self.folder.glob(pattern):
                parent = self.folder / path.relative_to(self.folder).parts[0]
                link = next((link for link in (parent, path) if link.is_symlink()), None)
                if link is not None:
                    raise ownership.ForeignFileError(
                        f"{link}: is a link, and the files behind it cannot be archived; move the "
                        "link away, or choose another name=..."
                    )

    def _compare(
        self,
        where: str,
        digests: Callable[[], Sequence[str]] | None,
        *,
        elsewhere: bool,
    ) -> list[str]:
        """Compare settings and images with those of the checkpoint.

        Returns the differences with which learning may start from the filters of a run elsewhere;
        raises ValueError if the run cannot be resumed at all.
        """
        settings = self._different_settings(where, images_compared=digests is not None)
        if settings and not (elsewhere and all(map(LEARNED_LONGER.match, settings))):
            raise ValueError(
                f"{where} holds a run with other settings ({', '.join(settings)}): "
                f"{_alternatives(where)}"
            )
        self.images = digest_tensor(digests()) if digests else None
        images = different_images(self.state, self.images) if self.state is not None else ""
        if images and not elsewhere:
            raise ValueError(
                f"{where} has learned from other images ({images} since then): "
                f"{_alternatives(where)}{how_to_have_the_first(self.state)}"
            )
        return settings + ([f"images: {images}"] if images else [])

    def _different_settings(self, where: str, *, images_compared: bool) -> list[str]:
        if self.state is None:
            return []
        try:
            return different_settings(
                self.state, self.settings, begun=self._begun, images_compared=images_compared
            )
        except TypeError as error:  # invalid keys, or the old and the new name of one
            raise InvalidFileError(
                f"{where}: its checkpoint does not hold a run of this version (settings: {error}); "
                "resume from another one"
            ) from None

    def _begin_from(self, source: Path) -> None:
        """Make the checkpoint that this run resumes from the newest one of this folder."""
        evolution = self._evolution_in(source.expanduser())
        if _folder_of(source.expanduser()).resolve() != self.folder.resolve():
            self.remove_warm_starts()
        self._archive()
        self.claim()
        for number, data in evolution.items():
            ownership.write(self.evolution(number), data)
        self.save(self.state["step"], self.state)

    def _evolution_in(self, source: Path) -> dict[int, bytes]:
        """The files of `evolution` in the run that this one resumes from, by layer."""
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
        """The number of layers that have begun to learn."""
        return self.state["layer"] - (self.state["trainer"] is None)

    def _archive(self) -> None:
        """Move the files of an earlier run into previous-N, its checkpoints last."""
        if not self.checkpoints.exists():
            return
        matches = (PREVIOUS.fullmatch(path.name) for path in self.folder.glob("previous-*"))
        number = 1 + max((int(match[1]) for match in matches if match), default=0)
        archive = ownership.claim_folder(self.folder / f"previous-{number}")
        for path in self.checkpoints.glob("step-*.pt"):
            # A copied checkpoint would be mistaken for a checkpoint of the new run.
            if is_checkpoint(path) and not ownership.is_ours(path):
                ownership.record(path, grows=False)
        recorded = [
            path.relative_to(ownership.absolute(self.folder))
            for path in ownership.own_files_in(self.folder)
        ]
        made = [path for path in recorded if any(path.match(pattern) for pattern in MADE)]
        for path in sorted(made, key=lambda path: (path.parts[0] == "checkpoints", path)):
            if not path.parts[0].startswith("previous-"):
                ownership.move(self.folder / path, archive / path)
        for name in FOLDERS:
            ownership.prune(self.folder / name)
        log.info("the earlier run was moved to %s", self.folder / archive.name)


def training_data(run: str | Path) -> TrainingData | None:
    """The data settings of a run folder; None for a network file.

    The settings in a file never cause a download.
    """
    if not Path(run).is_dir():
        return None
    newest = load_newest_checkpoint(Path(run) / "checkpoints")
    if newest is None:
        return None
    state, path = newest
    try:
        return dataclasses.replace(TrainingData(**state["settings"]["data"]), download=False)
    except (TypeError, KeyError, ValueError) as error:
        raise InvalidFileError(
            f"{path}: its data settings are not valid ({error}); give images of your own"
        ) from None


def recorded_seed(run: str | Path) -> int:
    """The seed of a run folder; 0 if it does not say."""
    newest = load_newest_checkpoint(Path(run) / "checkpoints")
    seed = newest and newest[0].get("settings", {}).get("seed")
    return seed if isinstance(seed, int) else 0


def _alternatives(where: str) -> str:
    """The alternatives to resuming a run, for an error."""
    return (
        f"choose another name=..., with {typed('init', where)} to start from its filters, or "
        "resume=false to archive that run and start from the beginning"
    )


def _folder_of(source: Path) -> Path:
    """The run folder that a checkpoint belongs to, or the folder itself."""
    return source.parent.parent if source.is_file() else source


def _evolution(folder: Path, layer: int) -> Path:
    return folder / "evolution" / f"layer{layer}.npz"
