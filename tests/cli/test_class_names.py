"""Names of classes: a list, or a file of names."""

import json

import pytest

from deconvnet.cli.class_names import read_class_names


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "tabby cat\ndog\n\n"),
        ("names.json", json.dumps(["tabby cat", "dog"])),
        ("imagenet.json", json.dumps({"1": ["n02", "dog"], "0": ["n01", "tabby cat"]})),
        ("numbered.json", json.dumps({"0": "tabby cat", "1": "dog"})),
    ],
)
def test_names_are_read_in_the_order_of_the_outputs(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_class_names(str(tmp_path / name)) == ["tabby cat", "dog"]


def test_names_may_be_given_as_a_list_or_not_at_all():
    assert read_class_names(["cat", 7]) == ["cat", "7"]
    assert read_class_names(None) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.txt", b"\xff\xfe\x00", "not a text file; give a file of names or a list"),
        ("names.json", b"[1", "expected a list of names, or an object"),
        ("names.json", b'{"0": "cat", "2": "dog"}', "expected a list of names, or an object"),
        ("names.json", b"3", "expected a list of names, or an object"),
        (None, b"", "No such file or directory; give a file of names"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / (name or "missing")
    if name:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_class_names(str(path))
    assert str(caught.value).startswith(f"labels={path}: {message}")
