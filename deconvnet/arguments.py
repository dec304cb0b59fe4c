"""The arguments of a command: from what the shell delivers to Hydra's grammar, and back.

Hydra reads a value by a grammar of its own, in which 1.10 is the number 1.1 and `photo (1).jpg` is
a syntax error. Here a setting that is text by its type (a name, a file, a folder, a choice) arrives
as it was typed, once the shell has delivered it in one argument. It follows that

- quotes around a whole value are taken off, as Hydra does: name='"null"';
- ${key} is the value of another setting;
- null is no value, where a setting may have none;
- [a,b] is a list, where there may be several, and a value without brackets is a list of one;
- with -m a comma separates the runs of a sweep, and choice(...), shuffle(...), sort(...), tag(...),
  range(...) and glob(...) are Hydra's functions.

Everything else, such as numbers, is left to Hydra. The same rule holds in YAML files.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.conf import HydraConf
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import MissingConfigException
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Metadata of a field of any type (Hydra has no type for it) that takes one text or a list of them.
TEXTS = {"texts": True}

# key=value, with what stands before the key.
_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_$][\w$.-]*)=(.*)", re.DOTALL)
_QUOTED = re.compile(r"""(["'])(?:(?!\1)[^\\]|\\.)*\1""", re.DOTALL)
# What Hydra reads as text without quotes, apart from its keywords.
_PLAIN = re.compile(r"(?:[A-Za-z_/]|\.{1,2}/)[A-Za-z0-9_/.-]*")
_KEYWORDS = {"true", "false", "null", "inf", "nan"}
_YAML_KEYWORDS = {*_KEYWORDS, "yes", "no", "on", "off", "y", "n"}
_WORD = re.compile(r"[\w.+-]+")
_NUMBERS = re.compile(r"[-+\d.eE_,\s]+")
_FUNCTION = re.compile(r"(choice|shuffle|sort|tag|range|interval|glob|str)\((.*)\)", re.DOTALL)
_OF_ELEMENTS = ("choice", "shuffle", "sort", "tag")
# Options of Hydra that are followed by a value.
_OPTIONS = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
}
# Folders that Hydra itself makes; elsewhere the code that opens a file knows what ~ is.
_FOLDERS = {"hydra.run.dir", "hydra.sweep.dir"}

# What is wanted, by what OmegaConf says of a value of another type.
_WANTED = {
    "to Integer": "a whole number",
    "to Float": "a number",
    "valid bool": "true or false",
    "is not a ListConfig": "a list such as [1,2]",
}

# sys.argv before it was made ready for Hydra.
_typed: list[str] = []


@dataclass(frozen=True)
class _Kind:
    """What a setting takes: text or numbers, one, several or both, and whether null.

    group: it has settings below it, and takes the name of one of the files that set them.
    """

    text: bool
    one: bool
    several: bool
    empty: bool
    group: bool = False


def make_ready(schema: type) -> None:
    """Rewrite sys.argv so that Hydra, whose main comes next, reads text as it was typed.

    schema: the dataclass of the command's settings. Raises ValueError for a text without value.
    """
    _typed[:] = sys.argv
    sys.argv[1:] = for_hydra(sys.argv[1:], schema)
    _read_files_as_typed(schema)
    _compose_once(sys.argv[1:])


def for_hydra(arguments: list[str], schema: type) -> list[str]:
    """The arguments with text settings in quotes wherever Hydra needs them."""
    sweep = any(a == "-m" or a.startswith("--mu") or a == "hydra.mode=MULTIRUN" for a in arguments)
    ready, before = [], ""
    for argument in arguments:
        found = None if before in _OPTIONS else _OVERRIDE.fullmatch(argument)
        kind = found and _kind(schema, found[2])
        if kind and not (kind.group and found[3].startswith("{")):
            prefix, key, value = found.groups()
            if value == "":
                raise ValueError(f"{key}= has no value")
            argument = f"{prefix}{key}={_value(_home(key, value), kind, sweep)}"
        ready.append(argument)
        before = argument
    return ready


def setting(key: str, value: object) -> str:
    """`key=value` as a user types it into a shell, which then arrives as it is here."""
    text = str(value)
    if isinstance(value, str | Path) and _has_meaning(text):
        text = _quoted(text.replace("${", r"\${"))
    return shlex.quote(f"{key}={text}")


def beside(script: str) -> str:
    """Another script of the folder of the one that runs, as typed in a shell."""
    return shlex.quote(str(Path(_typed[0] if _typed else "scripts/train.py").with_name(script)))


def again(*without: str) -> str:
    """The command that was typed, for the shell, without some of its settings."""
    kept = [a for a in _typed or sys.argv if a.lstrip("+").partition("=")[0] not in without]
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    launcher = ["python"] if alone else ["torchrun", f"--nproc-per-node={here}"]
    return shlex.join([*launcher, *kept])


def has(schema: type, key: str) -> bool:
    """Whether a command has a setting of this dotted key."""
    return _annotation(schema, key) is not None


def explain(error: BaseException, schema: type) -> str | None:
    """In one line what is wrong with the arguments that Hydra refused; None where it says so."""
    message = str(error)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^'/]+)/(.*)'$", message, re.MULTILINE)
        return found and _no_choice(found[1], found[2], sorted(error.options or ()))
    if found := re.search(r"Could not override '([^']*)'\.$", message, re.MULTILINE):
        return _no_setting(schema, found[1])
    if found := re.search(r"Could not override '([^'@]*)'\. No match in the defaults", message):
        below = _annotation(schema, found[1])
        names = [field.name for field in fields(below[0])] if below else []
        return names and f"{found[1]}: is no setting itself; there are " + ", ".join(
            f"{found[1]}.{name}" for name in names
        )
    if found := re.match(r"Error merging override \+*(.*)$", message, re.MULTILINE):
        message = f"{message} {error.__cause__}"
        wanted = next((right for said, right in _WANTED.items() if said in message), None)
        return wanted and f"{found[1]}: must be {wanted}"
    if (found := re.search(r"Error parsing override '(.*)'\n", message)) and "=" not in found[1]:
        return f"{found[1]}: settings are given as key=value; --help shows them"
    return None


# What a setting takes.


@cache
def _kind(schema: type, key: str) -> _Kind | None:
    """What a dotted key takes; None if that is for Hydra to read."""
    if key.startswith("hydra."):
        schema, key = HydraConf, key.removeprefix("hydra.")
    found = _annotation(schema, key)
    if found is None:
        return None
    annotation, metadata = found
    annotation, empty = _without_none(annotation)
    if metadata is TEXTS or metadata.get("texts"):
        return _Kind(text=True, one=True, several=True, empty=True)
    if annotation is str:
        return _Kind(text=True, one=True, several=False, empty=empty)
    if get_origin(annotation) is list:
        text = get_args(annotation)[0] is str
        numbers = get_args(annotation)[0] in (int, float)
        return _Kind(text, one=False, several=True, empty=empty) if text or numbers else None
    if "." not in key and schema is not HydraConf and _has_keys(annotation):
        return _Kind(text=True, one=True, several=False, empty=True, group=True)
    return None


def _annotation(schema: type, key: str) -> tuple[Any, Any] | None:
    """The type of a dotted key and the metadata of its field."""
    annotation, metadata = schema, {}
    for part in key.split("."):
        annotation, _ = _without_none(annotation)
        if is_dataclass(annotation):
            field = {field.name: field for field in fields(annotation)}.get(part)
            if field is None:
                return None
            annotation, metadata = get_type_hints(annotation)[part], field.metadata
        elif get_origin(annotation) is dict:
            annotation, metadata = get_args(annotation)[1], {}
        else:
            return None
    return annotation, metadata


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """A type without None, and whether None was one of its choices."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else Any, type(None) in get_args(annotation)


def _has_keys(annotation: Any) -> bool:
    return is_dataclass(annotation) or get_origin(annotation) is dict


# From what was typed to Hydra's grammar.


def _value(text: str, kind: _Kind, sweep: bool) -> str:
    if not sweep:
        return _element(text, kind)
    if found := _FUNCTION.fullmatch(text):
        name, inside = found.groups()
        if name == "choice":
            return _value(inside, kind, sweep)
        return _function(text) if kind.text else text
    return ",".join(_element(part, kind) for part in _parts(text, nested=True))


def _function(text: str) -> str:
    """A function of Hydra over texts, whose results it writes without quotes and reads again."""
    if not (found := _FUNCTION.fullmatch(text)):
        ready = _text(text)
        return _quoted(ready) if ready == f"'{text}'" and _WORD.fullmatch(text) else ready
    name, inside = found.groups()
    if name not in _OF_ELEMENTS:
        return text
    named = re.compile(r"(reverse|list|tags|sweep)\s*=")
    parts = _parts(inside, nested=True)
    return f"{name}({','.join(p if named.match(p) else _function(p) for p in parts)})"


def _element(text: str, kind: _Kind) -> str:
    """One value of a setting, no sweep."""
    if kind.empty and text.lower() == "null":
        return text
    if not kind.text:
        return f"[{text}]" if _NUMBERS.fullmatch(text) else text
    if kind.several and text.startswith("[") and text.endswith("]"):
        parts = _parts(text[1:-1])
        return f"[{','.join(_text(part) for part in parts if part)}]"
    if not kind.one:
        whole = text.startswith("${") and text.endswith("}")
        return text if whole else f"[{_text(text)}]"
    return _text(text)


def _text(text: str) -> str:
    """One text, in quotes if Hydra would read it otherwise."""
    if _QUOTED.fullmatch(text) or (_PLAIN.fullmatch(text) and text.lower() not in _KEYWORDS):
        return text
    return _quoted(text if _interpolates(text) else text.replace("${", r"\${"))


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _interpolates(text: str) -> bool:
    """Whether each ${ of a text is the beginning of a reference."""
    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException:
        return False
    return True


def _has_meaning(text: str) -> bool:
    """Whether a text is read otherwise than as it is typed, in some setting."""
    several = text.startswith("[") and text.endswith("]")
    return several or "${" in text or text.lower() == "null" or bool(_QUOTED.fullmatch(text))


def _home(key: str, value: str) -> str:
    return str(Path(value).expanduser()) if key in _FOLDERS and value[0] == "~" else value


def _parts(text: str, nested: bool = False) -> list[str]:
    """What commas separate, without the spaces around it.

    Commas in quotes and in ${...} do not count, nor, if nested, those in brackets of any kind;
    where these are not in pairs they are no brackets.
    """
    parts, begin, place, open_ = [], 0, 0, []
    pairs = {"${": "}", **({"(": ")", "[": "]", "{": "}"} if nested else {})}
    while place < len(text):
        blank = not text[begin:place].strip() and not open_
        if blank and (quoted := _QUOTED.match(text, place)):
            place = quoted.end()
            continue
        two, one = text[place : place + 2], text[place]
        if two == "${" or one in pairs:
            open_.append(pairs["${" if two == "${" else one])
            place += 1 + (two == "${")
            continue
        if open_ and one == open_[-1]:
            open_.pop()
        elif one == "," and not open_:
            parts.append(text[begin:place])
            begin = place + 1
        place += 1
    if open_:
        return [text.strip()] if nested else [part.strip() for part in text.split(",")]
    return [part.strip() for part in (*parts, text[begin:])]


# From what is wrong to what would be right.


def _no_setting(schema: type, key: str) -> str:
    """Say what a key that is none of a command could have meant."""
    if _annotation(schema, key) is not None:
        parent, _, name = key.rpartition(".")
        while parent and _annotation(schema, parent) is not None and "." in parent:
            parent, _, name = parent.rpartition(".")
        return f"{key}: {parent or 'the configuration'} has no {name} here"
    prefix, level, rest = "", schema, key.split(".")
    while len(rest) > 1 and (below := _annotation(schema, f"{prefix}{rest[0]}")) is not None:
        if not _has_keys(_without_none(below[0])[0]):
            break
        prefix, level, rest = f"{prefix}{rest[0]}.", _without_none(below[0])[0], rest[1:]
    known = [field.name for field in fields(level)] if is_dataclass(level) else []
    everywhere = [path for path in _paths(schema) if path.split(".")[-1] == rest[-1]]
    if layer := re.match(r"model\.(layer\d+)\.", key):
        everywhere = [path.replace("layer1", layer[1]) for path in everywhere]
    close = [prefix + name for name in difflib.get_close_matches(rest[0], known, n=1)]
    if meant := everywhere or close:
        return f"{key}: no such setting; did you mean {' or '.join(meant)}?"
    there = f"; there are {', '.join(prefix + name for name in known)}" if known else ""
    return f"{key}: no such setting{there}"


def _paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a command, with layer1 for every layer."""
    if get_origin(schema) is dict:
        yield from _paths(get_args(schema)[1], f"{prefix}layer1.")
    elif is_dataclass(schema):
        for name, annotation in get_type_hints(schema).items():
            inside = _without_none(annotation)[0]
            if _has_keys(inside):
                yield from _paths(inside, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


def _no_choice(group: str, name: str, choices: list[str]) -> str:
    files = f"; for images of your own: data=folder {setting('data.path', name)}"
    return (
        f"{group}={name}: there is no {group}/{name}; choose {', '.join(choices)}"
        f"{files if group == 'data' and 'folder' in choices else ''}"
    )


# sys.argv is ready; what Hydra does with it.

_get_mode = Hydra.get_mode


def _compose_once(arguments: list[str]) -> None:
    """Let Hydra compose the configuration once where nobody has set hydra.mode.

    It does so a first time only to read this key, which takes as long as all the rest.
    """
    plain = all(
        argument[0] != "-" and "hydra" not in argument for argument in arguments if argument
    )
    Hydra.get_mode = (lambda *_, **__: None) if plain else _get_mode


# The same in YAML files.


def _read_files_as_typed(schema: type) -> None:
    """Let Hydra read YAML files so that text settings hold what is written, without quotes too."""

    class FileConfigSource(file_config_source.FileConfigSource):  # Hydra asks for this name
        def load_config(self, config_path: str) -> ConfigResult:
            path = Path(self.path, self._normalize_file_name(config_path))
            try:
                result = super().load_config(config_path)
            except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
                what = " ".join(str(error).split())
                raise ValueError(f"{path}: is no configuration in YAML: {what}") from None
            group = "/".join(Path(config_path).parts[:-1])
            package = result.header.get("package") or group
            package = "" if package == "_global_" else package.replace("/", ".")
            source = path.read_text(encoding="utf-8")
            changed = as_typed(source, schema, package)
            if changed != source:
                result.config = OmegaConf.create(changed)
            return result

    SourcesRegistry.instance().types["file"] = FileConfigSource


def as_typed(source: str, schema: type, package: str = "") -> str:
    """A YAML text with quotes around the text settings that lack them: name: 1.10.

    package: the dotted key of what the text holds.
    """
    for node in sorted(
        _text_nodes(yaml.compose(source), schema, package), key=lambda node: -node.start_mark.index
    ):
        start, end = node.start_mark.index, node.end_mark.index
        source = source[:start] + json.dumps(node.value, ensure_ascii=False) + source[end:]
    return source


def _text_nodes(node: yaml.Node | None, schema: type, key: str) -> set[yaml.ScalarNode]:
    """The plain scalars of a YAML text that are text settings."""
    if isinstance(node, yaml.MappingNode):
        pairs = ((f"{key}.{name.value}".lstrip("."), value) for name, value in node.value)
        return set().union(*(_text_nodes(value, schema, below) for below, value in pairs))
    kind = _kind(schema, key) if key and _is_not_hydra(key) else None
    if kind is None or not kind.text or kind.group:
        return set()
    several = isinstance(node, yaml.SequenceNode)
    return {
        scalar
        for scalar in (node.value if several else [node])
        if isinstance(scalar, yaml.ScalarNode)
        and scalar.style is None
        and scalar.value.lower() not in ("", "~", "null")
        and (scalar.value.lower() in _YAML_KEYWORDS or not _PLAIN.fullmatch(scalar.value))
    }


def _is_not_hydra(key: str) -> bool:
    return key.partition(".")[0] not in ("hydra", "defaults")
