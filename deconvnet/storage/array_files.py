"""Array files, `*.npz`, in which results that take long to compute are cached."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deconvnet.storage import ownership

# An .npz file may unpack to this many times its size; beyond that it is treated as a zip bomb.
MAX_RATIO = 200


def save_arrays(
    path: Path,
    arrays: dict[str, np.ndarray],
    *,
    compressed: bool = False,
    ours: Callable[[Path], bool] | None = None,
) -> None:
    """Write arrays to an .npz file; ours: as in `ownership.write`."""
    buffer = io.BytesIO()
    if compressed:
        np.savez_compressed(buffer, **arrays)
        unpacked = sum(array.nbytes for array in arrays.values())
        if unpacked > MAX_RATIO * buffer.tell():
            # Reading would refuse it as a zip bomb.
            compressed, buffer = False, io.BytesIO()
    if not compressed:
        np.savez(buffer, **arrays)
    ownership.write(path, buffer.getbuffer(), ours=ours)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file.

    Raises OSError if it cannot be read, and ValueError if it is not an .npz file or would unpack to
    many times its size.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > 2 * MAX_RATIO * os.path.getsize(path) + 2**20:
            raise ValueError(f"it would unpack to {unpacked} bytes")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many types of exceptions
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
