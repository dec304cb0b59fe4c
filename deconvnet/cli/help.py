"""The --help page of a command: settings with their current values and their meanings.

The meaning of a setting is the comment at its field in the dataclass, its only definition. `--help`
fits on a screen: of a command with more settings, it has the most important ones, and the first
sentence of their meanings. `--help all` has everything.
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

from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

from deconvnet.cli.setting_keys import annotation_of, keys_of, without_none

WIDTH = 80
# Where the meanings begin, unless a key is longer.
COLUMN = 30

# The most important settings of commands that have more than fit on a screen.
FIRST = {
    "train": (
        *("data", "data.path", "data.size", "data.max_images", "preprocessing"),
        *("model", "layers", "model.layer1.num_maps", "model.layer1.filter_size"),
        *("model.layer1.lam", "model.layer1.learning.epochs"),
        *("name", "resume", "init", "device"),
    ),
    "suggest": (
        *("data", "data.path", "data.size", "data.max_images", "preprocessing"),
        *("maps", "filter_size", "lam", "epochs", "seed", "progress", "device"),
    ),
    "visualize": (
        *("run", "model", "weights", "images", "max_images", "layers", "maps", "k", "method"),
        *("size", "control", "explorer_images", "output", "device"),
    ),
    "occlusion": (
        *("run", "model", "weights", "images", "max_images", "layer", "map", "label"),
        *("square", "stride", "size", "output", "device"),
    ),
    "correspondence": (
        *("boxes", "run", "model", "weights", "layers", "draws", "within", "output", "device"),
    ),
    "classify": (
        *("run", "data.path", "data.test", "features", "layers", "train", "test", "splits"),
        *("words", "levels", "beside", "output", "device"),
    ),
    "train_cnn": (
        *("data", "data.path", "data.dataset", "data.download", "data.size", "color", "max_images"),
        *("width", "epochs", "batch", "learning_rate", "name", "device"),
    ),
}

NOTES = """\
Quote names and paths for the shell only: 'name=photo (1)'. Write several as a
list: [a,b]. -m runs the command once for each of several values: -m seed=0,1

Your own files of settings: with --config-dir DIR, +GROUP=NAME reads
DIR/GROUP/NAME.yaml, which must begin with the line # @package _global_"""


def full_page(command: str, schema: type, cfg: DictConfig) -> str:
    """The help page of `--help all`, with the values of a configuration.

    A template for Hydra, which fills in the choices of groups.
    """
    heading = "Settings, with their values under this command line:"
    parts = [cfg.hydra.help.header, cfg.hydra.help.footer, NOTES, heading]
    return "\n\n".join([part for part in parts if part] + [all_settings(schema, cfg)])


def short_page(command: str, schema: type, cfg: DictConfig) -> str:
    """The help page of `--help`, which fits on a screen; a template for Hydra."""
    if command in FIRST:
        lines = [line for key in FIRST[command] for line in _first(key, schema, cfg)]
        settings = _escaped("\n".join(lines))
        what = f"All {len(list(keys_of(schema)))} settings"
        what += ", and more examples" if cfg.hydra.help.footer else ""
    else:
        settings, what = all_settings(schema, cfg), "Lists, quotes, and files of settings"
    more = f"{what}: deconvnet {command.replace('_', '-')} --help all"
    return "\n\n".join([cfg.hydra.help.header, settings, more])


def all_settings(schema: type, cfg: DictConfig) -> str:
    """All settings, with their values in a configuration and their meanings."""
    return _escaped("\n".join(_section(_values(cfg), schema, "")))


def _values(cfg: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg, resolve=False)
    values.pop("hydra", None)
    return values


def _escaped(text: str) -> str:
    """A text as Hydra's template for it."""
    return text.replace("$", "$$")


def _first(key: str, schema: type, cfg: DictConfig) -> list[str]:
    """One of the first settings, with its meaning in short, and what null or auto means if that is
    its value."""
    above, _, name = key.rpartition(".")
    owner = without_none(annotation_of(schema, above)[0])[0] if above else schema
    meaning = _in_short(comments(owner)[name])
    if chosen := OmegaConf.select(cfg, f"hydra.runtime.choices.{key}"):
        options = GlobalHydra.instance().config_loader().get_group_options(key)
        meaning = meaning.replace("a choice above", ", ".join(options))
        return _entry(f"{key}={chosen}", meaning)
    value: Any = _values(cfg)
    for part in key.split("."):
        value = value[part]
    if value in (None, "auto"):
        default = re.search(_MEANING.format(text_of(value)), comments(owner)[name])
        meaning += f"; {default[0]}" if default else ""
    return _setting(key, value, meaning)


_MEANING = r"\b{}: .+?(?=;| \||[.] |[.]?$)"


def _in_short(meaning: str) -> str:
    """The first sentence of a meaning, without parentheses."""
    return re.sub(r" \([^()]*\)", "", re.split(r"[;.] ", meaning)[0].rstrip("."))


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
            yield from _setting(f"{indent}{name}", value, meaning)


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


def _setting(key: str, value: Any, meaning: str) -> list[str]:
    """One setting with its value."""
    if value == MISSING:
        return _entry(f"{key}=...", f"(needed) {meaning}")
    return _entry(f"{key}={text_of(value)}", meaning)


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
