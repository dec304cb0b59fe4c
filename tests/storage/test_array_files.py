"""Files of arrays: what is written comes back, and zip bombs are refused."""

import os

import numpy as np
import pytest

from deconvnet.storage.array_files import load_arrays, save_arrays


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_come_back_however_well_they_shrink(tmp_path, compressed):
    arrays = {"zeros": np.zeros((1000, 1000)), "some": np.arange(6.0), "text": np.array("früchte")}
    path = tmp_path / "a.npz"
    save_arrays(path, arrays, compressed=compressed)
    found = load_arrays(path)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


def test_arrays_that_would_fill_the_memory_are_refused_unread(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, zeros=np.zeros(2**24))
    with pytest.raises(ValueError, match="would unpack to 134217"):
        load_arrays(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError):
        load_arrays(path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="not a regular file"):
        load_arrays(tmp_path / "pipe.npz")
