"""The arguments of a command: from what the shell delivers to Hydra's grammar, and back.

Hydra parses values with its own grammar, in which 1.10 is the number 1.1 and `photo (1).jpg` is
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

import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deconvnet.cli.setting_keys import Kind, kind_of, with_current_key, with_current_references

# key=value, with what stands before the key.
_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_$][\w$.-]*)=(.*)", re.DOTALL)
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
# Folders that Hydra itself makes; elsewhere the code that opens a file knows what ~ is.
_FOLDERS = {"hydra.run.dir", "hydra.sweep.dir"}


def for_hydra(arguments: list[str], schema: type) -> list[str]:
    """The arguments with text settings in quotes wherever Hydra needs them, options first.

    Settings that were renamed have their current names, with a warning. ValueError for a text
    without value.
    """
    arguments = _options_first(arguments)
    sweep = any(a == "-m" or a.startswith("--mu") or a == "hydra.mode=MULTIRUN" for a in arguments)
    ready, before = [], ""
    for argument in arguments:
        if before not in _OPTIONS:
            argument = _override(argument, schema, sweep)
        ready.append(argument)
        before = argument
    return ready


def _options_first(arguments: list[str]) -> list[str]:
    """The arguments in an order in which argparse, too, accepts options between settings."""
    options, settings, before = [], [], ""
    for argument in arguments:
        is_option = before in _OPTIONS or (argument.startswith("-") and argument != "-")
        (options if is_option else settings).append(argument)
        before = argument
    return [*options, *settings]


def _override(argument: str, schema: type, sweep: bool) -> str:
    """One argument that is no option, nor the value of one."""
    if deleted := _DELETION.fullmatch(argument):
        return f"~{with_current_key(schema, deleted[1])}{deleted[2] or ''}"
    if not (match := _OVERRIDE.fullmatch(argument)):
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
    except HydraException:  # Hydra says so itself
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


# From what was typed to Hydra's grammar.


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
    """A function of Hydra over texts, whose results it writes without quotes and reads again."""
    if not (match := _FUNCTION.fullmatch(text)):
        ready = _text(text)
        return quoted(ready) if ready == f"'{text}'" and _WORD.fullmatch(text) else ready
    name, inside = match.groups()
    if name not in _OF_ELEMENTS:
        return text
    named = re.compile(r"(reverse|list|tags|sweep)\s*=")
    parts = _parts(inside, nested=True)
    return f"{name}({','.join(p if named.match(p) else _function(p) for p in parts)})"


def _element(text: str, kind: Kind) -> str:
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
        if blank and (quotation := _QUOTED.match(text, place)):
            place = quotation.end()
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
