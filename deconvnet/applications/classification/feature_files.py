"""Cache files of features, with a key of the data from which they were computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deconvnet.storage import ownership
from deconvnet.storage.array_files import load_arrays, save_arrays

# The beginning of our files, even truncated ones: a ZIP archive with one of these arrays first.
ARCHIVE, ARRAYS = b"PK\x03\x04", ("of.npy", "features.npy", "d.npy", "centers.npy")


def write_features(path: Path, key: str, **arrays: object) -> None:
    """Save arrays with the key of the data from which they were computed."""
    contents = {"of": np.array(key)}
    contents |= {name: np.asarray(value) for name, value in arrays.items()}
    save_arrays(path, contents, compressed=True, ours=_is_feature_file)


def read_features(path: Path, key: str, **shapes: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it is missing, damaged or was computed for another key.

    shapes: the required shapes of the arrays with these names.
    """
    try:
        arrays = load_arrays(path)
    except (OSError, ValueError):
        return None
    valid = all(name in arrays and arrays[name].shape == shapes[name] for name in shapes)
    return arrays if valid and str(arrays.get("of")) == key else None


def _is_feature_file(path: Path) -> bool:
    """Whether a file is ours, intact or not: a damaged one is recomputed."""
    try:
        with ownership.open_regular_file(path) as file:
            head = file.read(64)
    except (OSError, ValueError):
        return False
    return head.startswith(ARCHIVE) and head[30:].startswith(tuple(map(str.encode, ARRAYS)))
