"""Conversion of command-line arguments to Hydra's grammar, so that text arrives as typed.

Hydra parses values with its own grammar, in which 1.10 is the number 1.1 and `photo (1).jpg` is
a syntax error. Here a setting whose type is text (a name, a file, a folder, a choice) is taken
literally from the argument that the shell passes, with these exceptions:

- quotes around an entire value are removed, as Hydra does: name='"null"';
- ${key} is the value of another setting;
- null is no value, if the setting is optional;
- [a,b] is a list, if the setting may be one, and a value without brackets is a list of one;
- with -m a comma separates the runs of a sweep, and choice(...), shuffle(...), sort(...), tag(...),
  range(...) and glob(...) are Hydra's functions.

Everything else, such as numbers, is left to Hydra. The same rules apply in YAML files.
"""

from __future__ import annotations

import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deconvnet.cli.setting_keys import (
    Kind,
    has,
    kind_of,
    with_current_key,
    with_current_references,
)

# key=value, with the prefix of the key.
OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_$][\w$.-]*)=(.*)", re.DOTALL)
_DELETION = re.compile(r"~([A-Za-z_$][\w$.-]*)(=.*)?", re.DOTALL)
_QUOTED = re.compile(r"""(["'])(?:(?!\1)[^\\]|\\.)*\1""", re.DOTALL)
# What Hydra reads as text without quotes, apart from its keywords.
PLAIN = re.compile(r"(?:[A-Za-z_/]|\.{1,2}/)[A-Za-z0-9_/.-]*")
KEYWORDS = {"true", "false", "null", "inf", "nan"}
_WORD = re.compile(r"[\w.+-]+")
_NUMBERS = re.compile(r"[-+\d.eE_,\s]+")
_FUNCTION = re.compile(r"(choice|shuffle|sort|tag|range|interval|glob|str)\((.*)\)", re.DOTALL)
_OF_ELEMENTS = ("choice", "shuffle", "sort", "tag")
# Options of Hydra that are followed by a value.
_OPTIONS = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
}
# The long options of Hydra, which may be abbreviated.
_LONG_OPTIONS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run"),
    *("--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir"),
    *("--experimental-rerun", "--info"),
)
# Settings that replace each other: given without the other, each sets that to null, whatever the
# files say.
_REPLACES = {"lam_ratio": "lam", "lam": "lam_ratio"}
# Folders that Hydra itself creates; for others, the code that opens a file expands ~.
_FOLDERS = {"hydra.run.dir", "hydra.sweep.dir"}


def for_hydra(arguments: list[str], schema: type) -> list[str]:
    """The arguments with text settings quoted if Hydra needs quotes, options first.

    Renamed settings get their current names, with a warning. ValueError for a text without value,
    or for a setting with dashes, as in --name mine.
    """
    _check_options(arguments)
    arguments = _options_first(arguments)
    sweep = any(a == "-m" or a.startswith("--mu") or a == "hydra.mode=MULTIRUN" for a in arguments)
    converted, previous = [], ""
    for argument in arguments:
        if previous not in _OPTIONS:
            argument = _override(argument, schema, sweep)
        converted.append(argument)
        previous = argument
    return [*converted, *_replaced(converted, schema)]


def _replaced(arguments: list[str], schema: type) -> list[str]:
    """The arguments that set to null what others replace, unless it is given as well."""
    matches = filter(None, map(OVERRIDE.fullmatch, arguments))
    given = {match[2]: match[3] for match in matches}
    replaced = []
    for key, value in given.items():
        layer, _, name = key.rpartition(".")
        other = f"{layer}.{_REPLACES.get(name)}"
        replaces = name in _REPLACES and has(schema, other) and value.lower() != "null"
        if replaces and other not in given:
            replaced.append(f"{other}=null")
    return replaced


def _check_options(arguments: list[str]) -> None:
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and not any(known.startswith(name) for known in _LONG_OPTIONS):
            right = f"{name[2:]}={value if equals else '...'}"
            raise ValueError(f"{argument}: settings have no dashes; use {right}, --help shows them")


def _options_first(arguments: list[str]) -> list[str]:
    """The arguments with options first, since argparse rejects options between settings."""
    options, settings, previous = [], [], ""
    for argument in arguments:
        is_option = previous in _OPTIONS or (argument.startswith("-") and argument != "-")
        (options if is_option else settings).append(argument)
        previous = argument
    return [*options, *settings]


def _override(argument: str, schema: type, sweep: bool) -> str:
    """Convert an argument that is neither an option nor the value of one."""
    if deleted := _DELETION.fullmatch(argument):
        return f"~{with_current_key(schema, deleted[1])}{deleted[2] or ''}"
    if not (match := OVERRIDE.fullmatch(argument)):
        return argument
    prefix, key, value = match.groups()
    key, value = with_current_key(schema, key), with_current_references(schema, value)
    kind = kind_of(schema, key)
    if kind and not (kind.group and value.startswith("{")):
        if value == "":
            raise ValueError(f"{key}= has no value")
        value = _value(_home(key, value), kind, sweep)
    argument = f"{prefix}{key}={value}"
    return _with_current_inside(argument, key, schema) if value.startswith("{") else argument


def _with_current_inside(argument: str, key: str, schema: type) -> str:
    """An argument such as model.layer1.learning={epochs: 3} with the current names inside."""
    try:
        override = OverridesParser.create().parse_override(argument)
        settings = override.value()
    except HydraException:  # Hydra reports the error itself
        return argument
    if not isinstance(settings, dict):
        return argument
    current = _current_settings(settings, key, schema)
    if current == settings:
        return argument
    return f"{argument.partition('=')[0]}={Override._get_value_element_as_str(current)}"


def _current_settings(settings: dict, key: str, schema: type) -> dict:
    current = {}
    for name, value in settings.items():
        below = with_current_key(schema, f"{key}.{name}")
        if isinstance(value, dict):
            value = _current_settings(value, below, schema)
        current[below.rpartition(".")[2]] = value
    return current


# Conversion of values to Hydra's grammar.


def _value(text: str, kind: Kind, sweep: bool) -> str:
    if not sweep:
        return _element(text, kind)
    if match := _FUNCTION.fullmatch(text):
        name, inside = match.groups()
        if name == "choice":
            return _value(inside, kind, sweep)
        return _function(text) if kind.text else text
    return ",".join(_element(part, kind) for part in _parts(text, nested=True))


def _function(text: str) -> str:
    """A Hydra function of texts; Hydra writes its results without quotes and parses them again."""
    if not (match := _FUNCTION.fullmatch(text)):
        converted = _text(text)
        needs_more = converted == f"'{text}'" and _WORD.fullmatch(text)
        return quoted(converted) if needs_more else converted
    name, inside = match.groups()
    if name not in _OF_ELEMENTS:
        return text
    keyword = re.compile(r"(reverse|list|tags|sweep)\s*=")
    parts = _parts(inside, nested=True)
    return f"{name}({','.join(p if keyword.match(p) else _function(p) for p in parts)})"


def _element(text: str, kind: Kind) -> str:
    """A single value of a setting, outside a sweep."""
    if kind.empty and text.lower() == "null":
        return text
    if not kind.text:
        return f"[{text}]" if _NUMBERS.fullmatch(text) else text
    if kind.several and text.startswith("[") and text.endswith("]"):
        parts = _parts(text[1:-1])
        return f"[{','.join(_text(part) for part in parts if part)}]"
    if not kind.one:
        is_reference = text.startswith("${") and text.endswith("}")
        return text if is_reference else f"[{_text(text)}]"
    return _text(text)


def _text(text: str) -> str:
    """A single text, quoted if Hydra would not take it literally."""
    if _QUOTED.fullmatch(text) or (PLAIN.fullmatch(text) and text.lower() not in KEYWORDS):
        return text
    return quoted(text if _interpolates(text) else text.replace("${", r"\${"))


def quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _interpolates(text: str) -> bool:
    """Whether each ${ of a text is the beginning of a reference."""
    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException:
        return False
    return True


def has_meaning(text: str) -> bool:
    """Whether a text has a special meaning in any setting, and needs quotes to be literal."""
    several = text.startswith("[") and text.endswith("]")
    return several or "${" in text or text.lower() == "null" or bool(_QUOTED.fullmatch(text))


def _home(key: str, value: str) -> str:
    return str(Path(value).expanduser()) if key in _FOLDERS and value[0] == "~" else value


def _parts(text: str, nested: bool = False) -> list[str]:
    """The parts of a text separated by commas, without the spaces around them.

    Commas in quotes and in ${...} do not separate, nor, if nested, those in brackets of any kind;
    unpaired brackets are ordinary characters.
    """
    parts, begin, position, open_ = [], 0, 0, []
    pairs = {"${": "}", **({"(": ")", "[": "]", "{": "}"} if nested else {})}
    while position < len(text):
        blank = not text[begin:position].strip() and not open_
        if blank and (quotation := _QUOTED.match(text, position)):
            position = quotation.end()
            continue
        two, one = text[position : position + 2], text[position]
        if two == "${" or one in pairs:
            open_.append(pairs["${" if two == "${" else one])
            position += 1 + (two == "${")
            continue
        if open_ and one == open_[-1]:
            open_.pop()
        elif one == "," and not open_:
            parts.append(text[begin:position])
            begin = position + 1
        position += 1
    if open_:
        return [text.strip()] if nested else [part.strip() for part in text.split(",")]
    return [part.strip() for part in (*parts, text[begin:])]
