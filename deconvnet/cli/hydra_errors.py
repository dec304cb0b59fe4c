"""One-line messages, with the remedy, for arguments that Hydra rejects."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass

from hydra.errors import MissingConfigException

from deconvnet.cli.printed_commands import setting
from deconvnet.cli.setting_keys import annotation_of, has_keys, keys_of, without_none

# The expected type, by the message of OmegaConf for a value of another type.
_EXPECTED = {
    "to Integer": "a whole number",
    "to Float": "a number",
    "valid bool": "true or false",
    "is not a ListConfig": "a list such as [1,2]",
}


def explain_refusal(error: BaseException, schema: type) -> str | None:
    """The one-line reason why Hydra rejected the arguments; None if Hydra's message gives it."""
    message = str(error)
    if isinstance(error, MissingConfigException):
        match = re.search(r"Could not find '([^'/]+)/(.*)'$", message, re.MULTILINE)
        return match and _no_choice(match[1], match[2], sorted(error.options or ()))
    if match := re.search(r"Could not override '([^']*)'\.$", message, re.MULTILINE):
        return _no_setting(schema, match[1])
    if match := re.search(r"Could not override '([^'@]*)'\. No match in the defaults", message):
        below = annotation_of(schema, match[1])
        if below is None and (plus := re.search(r"use (\+\S+=.*)$", message, re.MULTILINE)):
            return f"{match[1]}: needs a plus: use {plus[1]}"
        names = [field.name for field in fields(below[0])] if below else []
        return names and f"{match[1]}: is no setting itself; there are " + ", ".join(
            f"{match[1]}.{name}" for name in names
        )
    if match := re.match(r"In '(.*?)': .* raised while composing config:$", message, re.MULTILINE):
        return _in_file(schema, match[1], message)
    if match := re.match(r"Error merging override \+*(.*)$", message, re.MULTILINE):
        message = f"{message} {error.__cause__}"
        expected = next((kind for words, kind in _EXPECTED.items() if words in message), None)
        return expected and f"{match[1]}: must be {expected}"
    if (match := re.search(r"Error parsing override '(.*)'\n", message)) and "=" not in match[1]:
        return f"{match[1]}: settings are given as key=value; --help shows them"
    return None


def _no_setting(schema: type, key: str) -> str:
    """The message for an unknown key, with suggestions."""
    if annotation_of(schema, key) is not None:
        parent, _, name = key.rpartition(".")
        while parent and annotation_of(schema, parent) is not None and "." in parent:
            parent, _, name = parent.rpartition(".")
        return f"{key}: {parent or 'the configuration'} has no {name} here"
    prefix, level, rest = "", schema, key.split(".")
    while len(rest) > 1 and (below := annotation_of(schema, f"{prefix}{rest[0]}")) is not None:
        if not has_keys(without_none(below[0])[0]):
            break
        prefix, level, rest = f"{prefix}{rest[0]}.", without_none(below[0])[0], rest[1:]
    known = [field.name for field in fields(level)] if is_dataclass(level) else []
    everywhere = [path for path in keys_of(schema) if path.split(".")[-1] == rest[-1]]
    if layer := re.match(r"model\.(layer\d+)\.", key):
        everywhere = [path.replace("layer1", layer[1]) for path in everywhere]
    close = [prefix + name for name in difflib.get_close_matches(rest[0], known, n=1)]
    if meant := everywhere or close:
        return f"{key}: no such setting; did you mean {' or '.join(meant)}?"
    there = f"; there are {', '.join(prefix + name for name in known)}" if known else ""
    return f"{key}: no such setting{there}"


def _in_file(schema: type, name: str, message: str) -> str | None:
    """The error in a YAML file; name: its group and name."""
    key = re.search(r"full_key: (\S+)$", message, re.MULTILINE)
    if key and f"Key '{key[1].rpartition('.')[2]}' not in" in message:
        return f"{name}.yaml: {_no_setting(schema, key[1])}"
    expected = next((kind for words, kind in _EXPECTED.items() if words in message), None)
    return key and expected and f"{name}.yaml: {key[1]}: must be {expected}"


def _no_choice(group: str, name: str, choices: list[str]) -> str:
    files = f"; for images of your own: data=folder {setting('data.path', name)}"
    return (
        f"{group}={name}: there is no {group}/{name}; choose {', '.join(choices)}"
        f"{files if group == 'data' and 'folder' in choices else ''}"
    )
