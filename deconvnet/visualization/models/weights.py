"""Reading of weight files, without running code in them, and loading them into a network.

A file is identified by its first bytes, not by its name: a Git LFS pointer, an HTML page or a JSON
index often has the name of a weight file, and each needs a different remedy.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
# Keys under which training scripts store the parameters; the first that a file has is read.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net"),
    *("params", "weights", "ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "ema"),
)

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
# The first bytes of files that are not weights, with their type and the remedy.
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run git lfs pull",
    b"\x93NUMPY": "a NumPy array, not a state_dict of names and tensors",
    b"\x89HDF": "HDF5, as Keras writes it; convert it to a state_dict of PyTorch",
    b"GGUF": "GGUF; convert it to a state_dict of PyTorch",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it first",
    b"Rar!": "a RAR archive; unpack it first",
}
# Earlier versions may run code from files that are not zip archives (CVE-2025-32434).
SAFE = (2, 6)


def load_parameters(module: nn.Module, file: Path) -> None:
    """Load the parameters in a file into a network, whatever they are wrapped in."""
    set_parameters(module, load_state_dict(file), file)


def set_parameters(module: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Set the parameters of a network; ValueError, with the names, unless all of them fit.

    If all its names have a prefix in the file (module., backbone., ...), this is removed, and
    parameters of other modules in the file are ignored.
    """
    own = module.state_dict()
    tensors = _without_prefix(tensors, own, file)
    # Files from before 2018 lack the counts of batches, which evaluation does not need.
    counts = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    tensors = counts | tensors
    shapes = [
        f"{name} ({_shape(tensors[name])} in the file, {_shape(own[name])} in the network)"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    differences = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": shapes,
    }
    problems = [f"{what}: {enumerated(names)}" for what, names in differences.items() if names]
    if shapes and len(problems) == 1:
        problems.append("options= builds a network of other sizes, such as {num_classes: 10}")
    if problems:
        raise ValueError(f"weights={file}: not of this network; {'; '.join(problems)}")
    module.load_state_dict(tensors)


def _without_prefix(
    tensors: dict[str, Tensor], own: Mapping[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """The tensors of a network whose names have a prefix in the file, without that prefix."""
    names = dict.fromkeys(name for name in own if not name.endswith("num_batches_tracked"))
    if not names or not names.keys().isdisjoint(tensors):
        return tensors
    longest = max(names, key=len)
    found = {
        prefix: _inside(tensors, prefix)
        for prefix in (name.removesuffix(longest) for name in tensors if name.endswith(longest))
    }
    complete = [prefix for prefix, inner in found.items() if names.keys() <= inner.keys()]
    if len(complete) > 1:
        raise ValueError(
            f"weights={file}: holds this network {len(complete)} times, under "
            f"{enumerated(complete)}; save the state_dict() of one of them"
        )
    return found[complete[0]] if complete else next(iter(found.values()), tensors)


def _inside(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def weights_file(weights: str | Path) -> Path | None:
    """The file that `weights` names; None if it is something else."""
    path = Path(weights).expanduser()
    means_file = isinstance(weights, Path) or path.suffix in WEIGHT_FILES or len(path.parts) > 1
    if path.is_file():
        return path
    if means_file:
        raise ValueError(f"weights={weights}: no such file")
    return None


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """Load the parameters in a file to the CPU, by name, whatever they are wrapped in.

    Reads files of PyTorch (.pt, .pth, .bin) and safetensors, whatever their names. For any other
    file, raises ValueError with one line that says what the file is and what to do.
    """
    with open(file, "rb") as opened:
        first = opened.read(1024)
    try:
        content = _loaded(file, first)
    except _Refused as error:
        raise ValueError(f"weights={file}: {error}") from None
    # A damaged file may fail anywhere in either library.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "nsupported operand" in reason:
            raise ValueError(
                f"weights={file}: a pickle that was not written by torch.save; save a state_dict() "
                "with torch.save"
            ) from error
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in reason:
            raise ValueError(
                f"weights={file}: holds objects that may run code when loaded, such as a whole "
                "pickled network; save its state_dict() instead"
            ) from error
        raise ValueError(
            f"weights={file}: cannot be read and may be truncated; download it again "
            f"({reason[:200]})"
        ) from error
    while isinstance(content, Mapping):
        key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(
            f"weights={file}: not a state_dict of names and tensors, nor one as "
            f"{', '.join(map(repr, WRAPPERS))}"
        )
    return dict(content)


def why_not_weights(file: Path) -> str | None:
    """Why a file cannot hold weights, and the remedy; None if it can."""
    with open(file, "rb") as opened:
        first = opened.read(1024)
    try:
        if not first.startswith(ZIP) and not _is_safetensors(first):
            _check_pickle(first)
    except _Refused as error:
        return str(error)
    return None


class _Refused(Exception):
    """A file does not hold weights; the message says what it is."""


def _loaded(file: Path, first: bytes) -> object:
    if first.startswith(ZIP):
        _check_archive(file)
    elif _is_safetensors(first):
        return safetensors.torch.load_file(file)
    else:
        _check_pickle(first)
    # Pass an open file, because newer versions of torch go by the suffix of a path.
    with open(file, "rb") as opened:
        return torch.load(opened, map_location="cpu", weights_only=True)


def _check_archive(file: Path) -> None:
    """Raise for zip archives that torch.save did not write."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise _Refused(
            "a TorchScript archive; load it with torch.jit.load and save its state_dict()"
        )
    if any(name.endswith(".npy") for name in names):
        raise _Refused("NumPy arrays (.npz), not a state_dict of names and tensors")
    if not any(name.endswith("data.pkl") for name in names):
        content = ", ".join(names[:3]) or "nothing"
        raise _Refused(f"a zip archive of something else ({content}); unpack it first")


def _check_pickle(first: bytes) -> None:
    """Refuse files that are not pickles of torch.save, judging by their first bytes."""
    for start, reason in OTHERS.items():
        if first.startswith(start):
            raise _Refused(reason)
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not first:
        raise _Refused("is empty; download it again")
    if not any(first):
        raise _Refused("begins with zeros, as after an incomplete download; download it again")
    if re.match(rb"<(!doctype|html|head|\?xml|!--)", text, re.IGNORECASE):
        raise _Refused("an HTML or XML page, not the weights; download the file itself")
    if text[:1] in (b"{", b"["):
        raise _Refused("JSON, perhaps the index of a sharded model; give a file of weights")
    if first[257:262] == b"ustar":
        raise _Refused("a tar archive; unpack it first, or save its state_dict() again")
    if not first.startswith(PICKLE):
        raise _Refused(f"not a file of weights: it begins with {first[:12]!r}")
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < SAFE:
        raise _Refused(
            "in the format of PyTorch before 1.6, which PyTorch before 2.6 cannot read safely; "
            "save it again with torch.save, or update PyTorch"
        )


def _is_safetensors(first: bytes) -> bool:
    """Whether a file begins with the length of a header, and the first characters of one."""
    return re.match(rb'\{\s*["}]', first[8:]) is not None and not first.startswith((b"{", b"["))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def enumerated(names: Sequence[str], most: int = 4) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
