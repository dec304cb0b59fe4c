"""Files that outlive a run: its checkpoints, to resume from, and trained networks, to share.

This module decides how a file is written so that a kill or a full disk never costs an older one,
and how it is verified so that a damaged or hostile one is never loaded:

- Whatever is written goes to a temporary file, to the disk, and then over the target's name, if
  what is there is ours (`files`): checkpoints and networks are known by their content.
- A checkpoint, `step-00000120.pt`, is a file of torch.save. No code in it is run, and no flipped
  bit loads a changed state: torch.load ignores the checksums in the archive, `load` tests them.
- A network, `*.safetensors`, carries its settings and a digest of tensors and settings, since
  safetensors itself has no checksum. It cannot hold code at all: it is the file to share.

A file that cannot be trusted raises CheckpointError: one line with the file, what is wrong and what
to do.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from deconvnet.storage import ownership

CHECKPOINT_FORMAT = "deconvnet checkpoint"
CHECKPOINT_VERSION = 1
NETWORK_FORMAT = "deconvnet"
NETWORK_VERSION = "1"

CHECKPOINT_NAME = re.compile(r"step-(\d{8,})\.pt")
# How many times its size an .npz file may hold.
MOST_RATIO = 200
# Bytes of a checkpoint in which nothing of the state is said yet.
STUMP = 256
# How a zip archive begins, and the most bytes of JSON that a network file may begin with.
ZIP = b"PK\x03\x04"
MOST_HEADER = 2**24

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A file that is damaged, of another format or unsafe to load."""


def save(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """The path of the checkpoint just written, `folder/step-00000120.pt`.

    state: dicts, lists and tuples of str, int, float, bool, None and tensors, nested as you like.
    Raises OSError with the path where it cannot be written; the older checkpoints are then intact.
    Of the checkpoints up to this step the newest `keep` stay. Those of later steps, left behind by
    a run that went back, are neither counted nor deleted.
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
    torch.save({"format": CHECKPOINT_FORMAT, "version": CHECKPOINT_VERSION, "state": state}, buffer)
    ownership.write(path, buffer.getbuffer(), ours=is_checkpoint)
    # Later ones may be the damaged ones that the run fell back from: counting them would leave them
    # and delete the sound ones.
    reached = [(number, older) for number, older in _checkpoints(folder) if number <= step]
    for _, older in reached[:-keep]:
        if not older.is_symlink() and is_checkpoint(older):
            older.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict:
    """The state in a checkpoint, verified, with its tensors on the CPU; else CheckpointError."""
    path = Path(path)
    data = _read(path)
    damage = f"{path}: empty, truncated, damaged or not a checkpoint; resume from an older one"
    try:
        # torch takes anything that begins otherwise for a format of old, which it reads with fewer
        # guards.
        if not data.startswith(ZIP):
            raise zipfile.BadZipFile("no zip archive")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # torch.save does not compress: what is small on the disk is small in memory, too.
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise zipfile.BadZipFile("compressed")
            damaged = archive.testzip()
    except Exception as error:  # which of a dozen kinds depends on the byte that is wrong
        raise CheckpointError(damage) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged in {damaged!r}; resume from an older checkpoint")
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds objects that may run code when loaded, which no checkpoint does; "
            "find out where it comes from"
        ) from error
    except Exception as error:  # an archive of something else fails anywhere in torch.load
        raise CheckpointError(damage) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: not a deconvnet checkpoint; choose a step-*.pt of a run")
    _check_version(path, content.get("version"), CHECKPOINT_VERSION)
    if "state" not in content:
        raise CheckpointError(damage)
    return content["state"]


def newest(folder: Path) -> tuple[dict, Path] | None:
    """The state of the newest sound checkpoint in the folder and its path; None if there is none.

    Warns about every newer one that is damaged. Raises CheckpointError if all of them are: a run
    that then started anew would overwrite what may be worth repairing.
    """
    folder = Path(folder)
    found = _checkpoints(folder)
    for _, path in reversed(found):
        try:
            return load(path), path
        except CheckpointError as error:
            logger.warning("%s (falling back to the checkpoint before it)", error)
    if not found:
        return None
    raise CheckpointError(
        f"{folder}: none of its {len(found)} checkpoints can be loaded, see the warnings; "
        "restore one from a copy, or move them away to start anew"
    )


def save_network(path: Path, tensors: dict[str, Tensor], settings: dict) -> None:
    """Writes the tensors and settings of a trained network to a file that is safe to share.

    settings: what JSON can hold, with text as keys and finite numbers; tuples come back as lists.
    """
    path = _network_path(path)
    _check_finite(path, tensors, ValueError)
    try:
        text = json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: settings must be values that JSON can hold: {error}") from error
    # safetensors takes neither views nor two names for one memory.
    layout = torch.contiguous_format
    tensors = {name: t.detach().cpu().clone(memory_format=layout) for name, t in tensors.items()}
    metadata = {
        "format": NETWORK_FORMAT,
        "version": NETWORK_VERSION,
        "settings": text,
        "sha256": _digest(tensors, text),
    }
    data = _sorted_header(safetensors.torch.save(tensors, metadata))
    ownership.write(path, data, ours=is_network)


def load_network(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors, on the CPU, and settings of a network file, verified; else CheckpointError."""
    path = _network_path(path)
    data = _read(path)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__") or {}
        settings = json.loads(metadata.get("settings", "null"))
    except Exception as error:  # the parser's own error, or torch's for a type it does not know
        raise CheckpointError(
            f"{path}: empty, truncated, damaged or not a network file; fetch it again"
        ) from error
    if metadata.get("format") != NETWORK_FORMAT or not isinstance(settings, dict):
        raise CheckpointError(f"{path}: not a deconvnet network; choose a file of save_network")
    _check_version(path, metadata.get("version"), NETWORK_VERSION)
    if metadata.get("sha256") != _digest(tensors, metadata["settings"]):
        raise CheckpointError(f"{path}: damaged or edited, its digest differs; fetch it again")
    _check_finite(path, tensors, CheckpointError)
    return {name: tensors[name] for name in sorted(tensors)}, settings


def save_arrays(
    path: Path,
    arrays: dict[str, np.ndarray],
    *,
    compressed: bool = False,
    ours: Callable[[Path], bool] | None = None,
) -> None:
    """Write arrays to an .npz file by `files.write`, whose argument `ours` is."""
    buffer = io.BytesIO()
    if compressed:
        np.savez_compressed(buffer, **arrays)
        whole = sum(array.nbytes for array in arrays.values())
        if whole > MOST_RATIO * buffer.tell():
            # What shrinks more than that would be refused as a bomb.
            compressed, buffer = False, io.BytesIO()
    if not compressed:
        np.savez(buffer, **arrays)
    ownership.write(path, buffer.getbuffer(), ours=ours)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; OSError, or ValueError where it is anything else, also where it
    would unpack to many times its size.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            whole = sum(info.file_size for info in archive.infolist())
        if whole > 2 * MOST_RATIO * os.path.getsize(path) + 2**20:
            raise ValueError(f"it would unpack to {whole} bytes")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def is_network(path: Path) -> bool:
    """Whether a file is a network file, sound or not, as far as its first bytes tell."""
    # Of a file of others the header may be any JSON, however deep.
    errors = (OSError, ValueError, RecursionError, AttributeError)
    with suppress(*errors), ownership.opened(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, MOST_HEADER)))
        return header.get("__metadata__", {}).get("format") == NETWORK_FORMAT
    return False


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint, sound or not, as far as its first bytes tell."""
    with suppress(OSError, ValueError), ownership.opened(path) as file:
        # torch.save puts the pickle first, uncompressed, and its first words say what it is.
        begin = file.read(4096)
        # What is left of one that was cut off before them, perhaps nothing, is no loss to anybody.
        stump = len(begin) < STUMP and begin[: len(ZIP)] == ZIP[: len(begin)]
        return stump or (begin.startswith(ZIP) and CHECKPOINT_FORMAT.encode() in begin)
    return False


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header in one order: the library's own differs from call to call,
    and files of equal networks would differ.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False)
    # Tensors begin at a multiple of eight bytes.
    text = text.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def _read(path: Path) -> bytes:
    # Read once and as a whole, so that what is verified is what is loaded.
    try:
        return ownership.read(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; choose a file to read") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; choose a file to read") from error


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in the folder with their steps, oldest first; none if there is no folder."""
    paths = _matching(folder, CHECKPOINT_NAME)
    return sorted((int(CHECKPOINT_NAME.fullmatch(path.name)[1]), path) for path in paths)


def _matching(folder: Path, pattern: re.Pattern) -> list[Path]:
    # A folder that cannot be listed must raise: it would look like a run without checkpoints.
    try:
        return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    except FileNotFoundError:
        return []


def _network_path(path: Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a network file must end in .safetensors, not {path.suffix!r}")
    return path


def _digest(tensors: dict[str, Tensor], settings: str) -> str:
    """SHA-256 over the names, sorted, types, shapes and bytes of tensors, and the settings."""
    names = sorted(tensors)
    table = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([table, settings]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_plain(value: object, where: str) -> None:
    """Refuses what torch.save would write but `load` not read, before anything is lost."""
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


def _check_finite(path: Path, tensors: dict[str, Tensor], kind: type[ValueError]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise kind(f"{path}: tensor {name!r} is not finite; use one from before that")


def _check_version(path: Path, found: object, known: object) -> None:
    if found != known:
        raise CheckpointError(
            f"{path}: format version {found!r}, but this deconvnet reads {known!r}; "
            "use the deconvnet that wrote it"
        )
