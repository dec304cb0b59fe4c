"""Network files, `*.safetensors`: saving and loading trained networks.

A network file contains the settings and a digest of tensors and settings, since safetensors itself
has no checksum. It cannot contain code. It is written to a temporary file first and then moved into
place, so neither a kill nor a full disk costs an older file.

A file that cannot be trusted raises InvalidFileError: one line with the file, what is wrong and
what to do.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from deconvnet.storage import ownership
from deconvnet.storage.file_checks import InvalidFileError, check_version, read_file

FORMAT = "deconvnet"
VERSION = "1"
# The largest size in bytes of the JSON header of a network file.
MAX_HEADER = 2**24


def save_network(path: Path, tensors: dict[str, Tensor], settings: dict) -> None:
    """Write the tensors and settings of a trained network to a file that is safe to share.

    settings: values that JSON can hold, with text as keys and finite numbers; tuples come back as
    lists.
    """
    path = _network_path(path)
    _check_finite(path, tensors, ValueError)
    try:
        text = json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: settings must be values that JSON can hold: {error}") from error
    # safetensors accepts neither views nor tensors that share memory.
    layout = torch.contiguous_format
    tensors = {name: t.detach().cpu().clone(memory_format=layout) for name, t in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "settings": text,
        "sha256": _digest(tensors, text),
    }
    data = _sorted_header(safetensors.torch.save(tensors, metadata))
    ownership.write(path, data, ours=is_network)


def load_network(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The verified tensors, on the CPU, and settings of a file; else InvalidFileError."""
    path = _network_path(path)
    data = read_file(path)
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__") or {}
        settings = json.loads(metadata.get("settings", "null"))
    except Exception as error:  # from the parser, or from torch for an unknown dtype
        raise InvalidFileError(
            f"{path}: empty, truncated, damaged or not a network file; fetch it again"
        ) from error
    if metadata.get("format") != FORMAT or not isinstance(settings, dict):
        raise InvalidFileError(f"{path}: not a deconvnet network; choose a file of save_network")
    check_version(path, metadata.get("version"), VERSION)
    if metadata.get("sha256") != _digest(tensors, metadata["settings"]):
        raise InvalidFileError(f"{path}: damaged or edited, its digest differs; fetch it again")
    _check_finite(path, tensors, InvalidFileError)
    return {name: tensors[name] for name in sorted(tensors)}, settings


def is_network(path: Path) -> bool:
    """Whether a file is a network file, valid or not, judging by its first bytes."""
    # The header of a foreign file may be any JSON, nested to any depth.
    errors = (OSError, ValueError, RecursionError, AttributeError)
    with suppress(*errors), ownership.open_regular_file(path) as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(size, MAX_HEADER)))
        return header.get("__metadata__", {}).get("format") == FORMAT
    return False


def _sorted_header(data: bytes) -> bytes:
    """A safetensors file with its header sorted, so that equal networks have equal files.

    The order that safetensors writes differs from call to call.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False)
    # Tensors must begin at a multiple of eight bytes.
    text = text.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def _network_path(path: Path) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: must end in .safetensors, not {path.suffix!r}")
    return path


def _digest(tensors: dict[str, Tensor], settings: str) -> str:
    """SHA-256 of the sorted names, the types, shapes and bytes of the tensors, and the settings."""
    names = sorted(tensors)
    table = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([table, settings]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_finite(path: Path, tensors: dict[str, Tensor], kind: type[ValueError]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise kind(f"{path}: tensor {name!r} is not finite; use an earlier network")
