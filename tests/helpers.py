"""What tests of several folders share."""

import contextlib
import copy
import json
import os
import signal

import pytest
import torch

from deconvnet.monitoring.monitor import Monitor
from deconvnet.storage import ownership
from deconvnet.storage.file_checks import InvalidFileError


def snapshot(folder):
    """Everything below a folder but our own records, with the targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if ownership.RECORD_FOLDER in path.parts:
            continue
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = path.read_bytes(), path.stat().st_ino
        else:
            found[path] = None
    return found


def shown_pictures(page):
    """The pictures of a loaded TensorBoard event file: {tag: [(step, number of samples), ...]}."""
    tags = [
        tag
        for tag in page.Tags()["tensors"]
        if page.SummaryMetadata(tag).plugin_data.plugin_name == "images"
    ]
    # The first two strings are the width and the height.
    return {
        tag: [(e.step, len(e.tensor_proto.string_val) - 2) for e in page.Tensors(tag)]
        for tag in tags
    }


# Functions that draw, and what each returns where nothing is drawn.
NO_PICTURES = {
    "deconvnet.training.loop.layer_cards": {},
    "deconvnet.training.loop.load_if_valid": None,
    "deconvnet.training.loop._show_filters": None,
}


@contextlib.contextmanager
def no_pictures():
    """Training that draws no pictures, which takes most of a tiny run; for tests that look at none.

    Curves, metrics and the features over the epochs are as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_PICTURES.items():
            patch.setattr(name, lambda *_, value=value: copy.copy(value))
        yield


class StopAt(Monitor):
    """A monitor during which the user presses Ctrl-C, once, at a certain moment."""

    moment = ("advance", 1)

    def __init__(self, folder, moment):
        super().__init__(folder, progress=False)
        self.left = dict([moment])

    def _count(self, kind):
        self.left[kind] = self.left.get(kind, 0) - 1
        if self.left[kind] == 0:
            signal.raise_signal(signal.SIGINT)

    def advance(self):
        super().advance()
        self._count("update")

    def inferred(self, done, total):
        super().inferred(done, total)
        self._count("inference")

    def result(self, result, z, step):
        super().result(result, z, step)
        self._count("result")


def assert_same_network(found, expected):
    expected = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def strict_json(text):
    """What a JSON text holds, for a reader that knows neither NaN nor Infinity."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def flip(data, bit):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_refused(load_it, path, reason=""):
    """The file is refused in one line that names it and gives the reason."""
    with pytest.raises(InvalidFileError) as caught:
        load_it(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "; " in message and "\n" not in message
    assert reason in message
