"""The --help page of a command: each setting with its current value and its meaning.

The meaning of a setting is the comment at its field in the dataclass, its only definition.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from deconvnet.cli.setting_keys import without_none

WIDTH = 80
# Where the meanings begin, unless a key is longer.
COLUMN = 30

NOTES = """\
Quote names and paths for the shell only: 'name=photo (1)'. Write several as a
list: [a,b]. -m runs the command once for each of several values: -m seed=0,1

Your own files of settings: with --config-dir DIR, +GROUP=NAME reads
DIR/GROUP/NAME.yaml, which must begin with the line # @package _global_

"""


def help_page(schema: type, cfg: DictConfig) -> str:
    """Notes for all commands, and the settings with their values in a configuration."""
    values = OmegaConf.to_container(cfg, resolve=False)
    values.pop("hydra", None)
    lines = _section(values, schema, "")
    return f"{NOTES}Settings, with their values under this command line:\n\n" + "\n".join(lines)


def _section(values: dict[str, Any], schema: Any, indent: str) -> Iterator[str]:
    """The settings of a dataclass, or of layers by name."""
    schema, _ = without_none(schema)
    if not is_dataclass(schema):
        yield from _layers(values, get_args(schema)[1], indent)
        return
    types, meanings = get_type_hints(schema), comments(schema)
    for name, value in values.items():
        meaning = meanings.get(name, "")
        if isinstance(value, dict) and name in types and types[name] is not Any:
            yield from _entry(f"{indent}{name}", meaning)
            yield from _section(value, types[name], indent + "  ")
        else:
            needed = value == MISSING
            setting = f"{indent}{name}={'...' if needed else text_of(value)}"
            yield from _entry(setting, f"(needed) {meaning}" if needed else meaning)


def _layers(layers: dict[str, Any], schema: type, indent: str) -> Iterator[str]:
    """The first layer, and how the other layers differ from it."""
    first = next(iter(layers.values()), {})
    for name, values in layers.items():
        if values is first:
            yield f"{indent}{name}"
            yield from _section(values, schema, indent + "  ")
            continue
        different = " ".join(_different(values, first)) or "nothing"
        text = f"{indent}{name}, as {next(iter(layers))} except {different}"
        yield from textwrap.wrap(text, WIDTH, subsequent_indent=indent + "    ", **_WHOLE)


def _different(values: dict[str, Any], others: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        other = others.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _different(value, other, f"{prefix}{name}.")
        elif value != other:
            yield f"{prefix}{name}={text_of(value)}"


_WHOLE = {"break_long_words": False, "break_on_hyphens": False}


def _entry(setting: str, meaning: str) -> list[str]:
    """One setting, with its meaning in the next column or, if the setting is long, below it."""
    lines = textwrap.wrap(meaning, WIDTH - COLUMN, **_WHOLE)
    next_column = lines.pop(0) if lines and len(setting) < COLUMN - 1 else ""
    first = f"{setting:{COLUMN}}{next_column}".rstrip()
    return [first, *(" " * COLUMN + line for line in lines)]


def text_of(value: Any) -> str:
    """A value as typed on a command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{','.join(text_of(element) for element in value)}]"
    return json.dumps(value)


@cache
def comments(schema: type) -> dict[str, str]:
    """The comment at each field of a dataclass, from its source.

    A field without one belongs to the preceding group, whose comment is at its first field.
    """
    meanings: dict[str, str] = {}
    for kind in reversed([kind for kind in schema.__mro__ if is_dataclass(kind)]):
        meanings.update(_comments_of(kind))
    return {field.name: meanings.get(field.name, "") for field in fields(schema)}


def _comments_of(kind: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(kind))
    above, meanings, name = [], {}, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.line
        if token.type == tokenize.COMMENT and line.lstrip().startswith("#"):
            above.append(token.string.lstrip("# "))
        elif token.type == tokenize.COMMENT and name:
            meanings[name] = " ".join([meanings.get(name, ""), token.string.lstrip("# ")]).strip()
        elif token.type == tokenize.NAME and (match := _FIELD.match(line)):
            if match[1] != name and token.string == match[1]:
                name, above, comment = match[1], [], " ".join(above)
                meanings[name] = comment
        elif token.type == tokenize.NAME and line.startswith("    def "):
            break
    return meanings


_FIELD = re.compile(r"    (\w+): ")
