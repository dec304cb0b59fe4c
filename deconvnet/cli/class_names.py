"""Names of classes, as given in a setting: a list, or a file that lists them."""

from __future__ import annotations

import json
from pathlib import Path


def read_class_names(labels: list[str] | str | None) -> list[str] | None:
    """The names of the classes in the order of the network's outputs; None if none are given.

    labels: the names, or a file of them: one name a line, a JSON list, or the JSON object of
    ImageNet, {"0": ["n01440764", "tench"], ...}. Raises ValueError if the file is none of these.
    """
    if labels is None or not isinstance(labels, str):
        return labels and [str(name) for name in labels]
    path = Path(labels).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"labels={labels}: {reason}; give a file of names or a list") from None
    if path.suffix.lower() != ".json":
        names = text.splitlines()
        while names and not names[-1].strip():
            names.pop()
        return [name.strip() for name in names]
    try:
        return _names_in_json(json.loads(text))
    except (TypeError, ValueError, KeyError, IndexError):
        raise ValueError(
            f"labels={labels}: expected a list of names, or an object of numbers and names"
        ) from None


def _names_in_json(content: object) -> list[str]:
    entries = content
    if isinstance(content, dict):
        entries = [content[str(number)] for number in range(len(content))]
    if not isinstance(entries, list):
        raise TypeError
    # ImageNet's entries are [identifier, name].
    return [entry[-1] if isinstance(entry, list) else str(entry) for entry in entries]
