"""Network files: what is written comes back, and what is damaged never does."""

import errno
import json
import os
import random

import pytest
import safetensors.torch
import torch
from helpers import assert_refused, assert_same, flip, names

from deconvnet.storage import network_files
from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network
from deconvnet.storage.ownership import ForeignFileError

SETTINGS = {"lam": 1e-3, "boundary": None, "exact": True, "window": [2, 3, 3], "name": "früchte"}


def example_tensors():
    filters = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return {"layer1/f": filters, "layer1/g": torch.ones(2, 1, dtype=torch.bool)}


def write_network(path, tensors, **changes):
    """A network file of which single entries of the metadata are wrong, the digest included."""
    settings = json.dumps(SETTINGS)
    digest = network_files._digest(tensors, settings)
    metadata = {"format": "deconvnet", "version": "1", "settings": settings, "sha256": digest}
    path.write_bytes(safetensors.torch.save(tensors, metadata | changes))


def test_equal_networks_have_equal_files(tmp_path):
    for name in "abcdef":
        save_network(tmp_path / f"{name}.safetensors", example_tensors(), SETTINGS)
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 1


def test_a_network_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "new" / "fruit.safetensors"
    base = torch.arange(24.0).view(2, 3, 4)
    saved = example_tensors() | {
        "view": base.transpose(0, 2),
        "same memory": base,
        "trained": torch.ones(2, requires_grad=True),
        "number": torch.tensor(3),
        "none": torch.zeros(0, 5, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    save_network(path, saved, SETTINGS)
    tensors, settings = load_network(path)
    assert settings == SETTINGS and list(settings) == list(SETTINGS)
    assert_same(tensors, {name: saved[name].detach() for name in sorted(saved)})
    assert names(path.parent) == ["fruit.safetensors"]


def test_the_type_of_every_setting_is_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    settings = {"none": None, "yes": True, "one": 1, "float": 1.0, "third": 1 / 3, "list": [1, []]}
    save_network(path, {}, settings)
    assert_same(load_network(path)[1], settings)


def test_settings_that_json_cannot_hold_are_refused(tmp_path):
    for value in (tmp_path, float("nan"), {1}):
        with pytest.raises(ValueError, match="a.safetensors: settings"):
            save_network(tmp_path / "a.safetensors", {}, {"value": value})
    assert names(tmp_path) == []


def test_a_network_file_must_be_named_as_one(tmp_path):
    with pytest.raises(ValueError, match="must end in .safetensors, not '.pt'"):
        save_network(tmp_path / "a.pt", {}, {})
    with pytest.raises(ValueError, match="must end in .safetensors, not ''"):
        load_network(tmp_path / "a")
    assert names(tmp_path) == []


def test_every_flipped_bit_in_a_network_is_found(tmp_path):
    path = tmp_path / "a.safetensors"
    save_network(path, example_tensors(), SETTINGS)
    data = path.read_bytes()
    for bit in range(len(data) * 8):
        path.write_bytes(flip(data, bit))
        assert_refused(load_network, path)


def test_a_network_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_network(path, example_tensors(), SETTINGS)
    data = path.read_bytes()
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert_refused(load_network, path, "truncated")
    path.write_bytes(data + b"\0")
    assert_refused(load_network, path)


def test_what_is_not_a_network_of_ours_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    assert_refused(load_network, path, "No such file")
    path.write_bytes(random.Random(0).randbytes(2000))
    assert_refused(load_network, path, "not a network file")
    for metadata in (None, {}, {"format": "pt"}):
        path.write_bytes(safetensors.torch.save(example_tensors(), metadata))
        assert_refused(load_network, path, "not a deconvnet network")
    write_network(path, example_tensors())
    assert load_network(path)[1] == SETTINGS
    write_network(path, example_tensors(), format="other")
    assert_refused(load_network, path, "not a deconvnet network")
    write_network(path, example_tensors(), version="2")
    assert_refused(load_network, path, "format version '2', but this deconvnet reads '1'")
    write_network(path, example_tensors(), settings=json.dumps(SETTINGS | {"lam": 2.0}))
    assert_refused(load_network, path, "digest")
    write_network(path, example_tensors(), settings="[1]")
    assert_refused(load_network, path, "not a deconvnet network")


def test_tensors_that_are_exchanged_or_reshaped_are_found(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2, 3)}
    digest = network_files._digest(tensors, json.dumps(SETTINGS))
    for changed in (
        {"a": tensors["b"], "b": tensors["a"]},
        {"a": tensors["a"].view(3, 2), "b": tensors["b"]},
        {"a": tensors["a"].int(), "b": tensors["b"]},
        {"a": tensors["a"]},
    ):
        write_network(path, changed, sha256=digest)
        assert_refused(load_network, path, "digest")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_network_that_is_not_finite_is_neither_loaded_nor_saved(tmp_path, value):
    path = tmp_path / "a.safetensors"
    tensors = example_tensors()
    tensors["layer1/f"][1, 0, 2, 2] = value
    with pytest.raises(ValueError, match="'layer1/f' is not finite"):
        save_network(path, tensors, SETTINGS)
    assert not path.exists()
    write_network(path, tensors)
    assert_refused(load_network, path, "'layer1/f' is not finite")


def test_a_failing_disk_leaves_the_older_network(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_network(path, example_tensors(), SETTINGS)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error: .*a.safetensors'"):
        save_network(path, {}, {})
    assert names(tmp_path) == ["a.safetensors"]
    assert_same(load_network(path)[0], example_tensors())


def test_a_foreign_file_in_the_place_of_a_network_stays(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.torch.save({"w": torch.ones(2)}))
    before = path.read_bytes()
    with pytest.raises(ForeignFileError):
        save_network(path, example_tensors(), SETTINGS)
    assert path.read_bytes() == before


def test_a_pipe_in_the_place_of_a_network_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.safetensors")
    with pytest.raises(InvalidFileError, match="not a regular file"):
        load_network(tmp_path / "net.safetensors")


def test_a_file_in_place_of_the_folder_is_an_error_that_names_it(tmp_path):
    folder = tmp_path / "networks"
    folder.write_text("not a folder")
    with pytest.raises(OSError, match="networks"):
        save_network(folder / "a.safetensors", {}, {})
    assert folder.read_text() == "not a folder"
