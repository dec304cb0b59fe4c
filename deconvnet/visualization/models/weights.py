"""Parameters of networks in files from others, read without running any code in them.

The first bytes of a file say what it is; its name does not. A Git LFS pointer, an HTML page or a
JSON index often has the name of the weights that it stands for, and each needs a different remedy.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

# Keys under which others store the parameters.
WRAPPERS = ("state_dict", "model_state_dict", "model")

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
# The first bytes of files that are not weights, and what to do about them.
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
# In earlier versions, files that are not zip archives could run code all the same (CVE-2025-32434).
SAFE = (2, 6)


def load_state_dict(file: Path) -> dict[str, Tensor]:
    """The names and tensors in a file, however they are wrapped, on the CPU.

    Of PyTorch (.pt, .pth, .bin) or of safetensors, whatever its name. ValueError in one line for
    any other file, with what it is and what to do.
    """
    with open(file, "rb") as opened:
        first = opened.read(1024)
    try:
        found = _loaded(file, first)
    except _Refused as error:
        raise ValueError(f"weights={file}: {error}") from None
    # Damaged files fail anywhere in either library.
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
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(
            f"weights={file}: not a state_dict of names and tensors, nor one as "
            f"{', '.join(map(repr, WRAPPERS))}"
        )
    return dict(found)


def why_not_weights(file: Path) -> str | None:
    """Why a file cannot hold parameters, and what to do about it; None if it can."""
    with open(file, "rb") as opened:
        first = opened.read(1024)
    try:
        if not first.startswith(ZIP) and not _is_safetensors(first):
            _check_pickle(first)
    except _Refused as error:
        return str(error)
    return None


class _Refused(Exception):
    """A file does not hold parameters."""


def _loaded(file: Path, first: bytes) -> object:
    if first.startswith(ZIP):
        _check_archive(file)
    elif _is_safetensors(first):
        return safetensors.torch.load_file(file)
    else:
        _check_pickle(first)
    # By its content: newer versions go by the suffix of a path.
    with open(file, "rb") as opened:
        return torch.load(opened, map_location="cpu", weights_only=True)


def _check_archive(file: Path) -> None:
    """Refuse zip archives that torch.save did not write."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        raise _Refused(
            "a TorchScript archive; load it with torch.jit.load and save its state_dict()"
        )
    if any(name.endswith(".npy") for name in names):
        raise _Refused("NumPy arrays (.npz), not a state_dict of names and tensors")
    if not any(name.endswith("data.pkl") for name in names):
        some = ", ".join(names[:3]) or "nothing"
        raise _Refused(f"a zip archive of something else ({some}); unpack it first")


def _check_pickle(first: bytes) -> None:
    """Refuse what is not a pickle of torch.save, judging by its first bytes."""
    for start, says in OTHERS.items():
        if first.startswith(start):
            raise _Refused(says)
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
