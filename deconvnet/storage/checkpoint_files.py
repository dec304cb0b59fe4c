"""Checkpoint files: writing the state of a run, and verifying it before it is loaded.

A checkpoint, `step-00000120.pt`, is written by torch.save. It is written to a temporary file first
and then moved into place, so neither a kill nor a full disk costs an older checkpoint. Loading runs
no code that the file contains. It also tests the checksums in the archive, which torch.load
ignores, so a flipped bit never goes unnoticed.

A file that cannot be trusted raises InvalidFileError: one line with the file, what is wrong and
what to do.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from deconvnet.storage import ownership
from deconvnet.storage.file_checks import InvalidFileError, check_version, read_file

FORMAT = "deconvnet checkpoint"
VERSION = 1
NAME = re.compile(r"step-(\d{8,})\.pt")

# The first bytes of a zip archive.
ZIP = b"PK\x03\x04"
# A checkpoint truncated before this many bytes contains no part of the state.
EMPTY_SIZE = 256

logger = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write the state to `folder/step-00000120.pt` and return that path.

    state: dicts, lists and tuples of str, int, float, bool, None and tensors, nested at will.
    Keeps the newest `keep` checkpoints up to this step and deletes older ones. Checkpoints of later
    steps, left by a run that was set back, are neither counted nor deleted. Raises OSError with the
    path if it cannot be written; the older checkpoints are then intact.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: keep at least 2, in case the newest is damaged")
    if step < 0:
        raise ValueError(f"step={step}: steps are counted from 0")
    _check_plain(state, "state")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "state": state}, buffer)
    ownership.write(path, buffer.getbuffer(), ours=is_checkpoint)
    # Later checkpoints may be damaged ones that the run fell back from: counting them would keep
    # them and delete sound ones.
    reached = [(number, older) for number, older in _checkpoints(folder) if number <= step]
    for _, older in reached[:-keep]:
        if not older.is_symlink() and is_checkpoint(older):
            older.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict:
    """The verified state of a checkpoint, with tensors on the CPU; else InvalidFileError."""
    path = Path(path)
    data = read_file(path)
    damage = f"{path}: empty, truncated, damaged or not a checkpoint; resume from an older one"
    try:
        # torch reads anything that begins differently as an older format, with fewer safeguards.
        if not data.startswith(ZIP):
            raise zipfile.BadZipFile("no zip archive")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # torch.save does not compress, so a compressed archive may be a bomb.
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise zipfile.BadZipFile("compressed")
            damaged = archive.testzip()
    except Exception as error:  # damaged archives raise many types of exceptions
        raise InvalidFileError(damage) from error
    if damaged is not None:
        raise InvalidFileError(f"{path}: damaged in {damaged!r}; resume from an older checkpoint")
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise InvalidFileError(
            f"{path}: contains objects that may run code when loaded, which no checkpoint does; "
            "find out where it comes from"
        ) from error
    except Exception as error:  # other archives may fail anywhere in torch.load
        raise InvalidFileError(damage) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InvalidFileError(f"{path}: not a deconvnet checkpoint; choose a step-*.pt of a run")
    check_version(path, content.get("version"), VERSION)
    if "state" not in content:
        raise InvalidFileError(damage)
    return content["state"]


def load_newest_checkpoint(folder: Path) -> tuple[dict, Path] | None:
    """The state and the path of the newest valid checkpoint; None if there are no checkpoints.

    Warns about newer ones that are damaged. Raises InvalidFileError if all are damaged, since a new
    run would overwrite what may be worth repairing.
    """
    folder = Path(folder)
    checkpoints = _checkpoints(folder)
    for _, path in reversed(checkpoints):
        try:
            return load_checkpoint(path), path
        except InvalidFileError as error:
            logger.warning("%s (falling back to the checkpoint before it)", error)
    if not checkpoints:
        return None
    raise InvalidFileError(
        f"{folder}: none of its {len(checkpoints)} checkpoints can be loaded, see the warnings; "
        "restore one from a copy, or move them away to start again"
    )


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint, valid or not, judging by its first bytes."""
    with suppress(OSError, ValueError), ownership.open_regular_file(path) as file:
        # torch.save writes the pickle first, uncompressed, and it begins with the format.
        begin = file.read(4096)
        # A file truncated before the format contains nothing worth keeping.
        is_stump = len(begin) < EMPTY_SIZE and begin[: len(ZIP)] == ZIP[: len(begin)]
        return is_stump or (begin.startswith(ZIP) and FORMAT.encode() in begin)
    return False


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The steps and paths of the checkpoints in a folder, oldest first."""
    paths = _files_named(folder, NAME)
    return sorted((int(NAME.fullmatch(path.name)[1]), path) for path in paths)


def _files_named(folder: Path, pattern: re.Pattern) -> list[Path]:
    # A folder that cannot be listed must raise, or it would look like a run without checkpoints.
    try:
        return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    except FileNotFoundError:
        return []


def _check_plain(value: object, where: str) -> None:
    """Raise ValueError for objects that torch.save writes but `load_checkpoint` cannot read."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in (str, int, float, bool, type(None)):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ValueError(
            f"{where} is of type {kind}: a checkpoint holds dict, list, tuple, str, int, float, "
            "bool, None and tensors"
        )
