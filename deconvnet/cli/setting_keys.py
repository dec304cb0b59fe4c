"""The dotted keys of a command's settings: their types, and the current names of old ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.conf import HydraConf

from deconvnet.support.renaming import current_name

_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
# Metadata of a field that accepts one text or a list of texts, for which Hydra has no type.
TEXTS = {"texts": True}
# Other spellings of settings, accepted without a warning.
SPELLINGS = {"image": "images"}


@dataclass(frozen=True)
class Kind:
    """The values that a setting accepts: text or numbers, one, several or both, and null.

    group: it has settings below it, and accepts the name of one of the files that set them.
    """

    text: bool
    one: bool
    several: bool
    empty: bool
    group: bool = False


@cache
def kind_of(schema: type, key: str) -> Kind | None:
    """The values that a dotted key accepts; None if Hydra parses them."""
    if key.startswith("hydra."):
        schema, key = HydraConf, key.removeprefix("hydra.")
    field = annotation_of(schema, key)
    if field is None:
        return None
    annotation, metadata = field
    annotation, empty = without_none(annotation)
    if metadata is TEXTS or metadata.get("texts"):
        return Kind(text=True, one=True, several=True, empty=True)
    if annotation is str:
        return Kind(text=True, one=True, several=False, empty=empty)
    if get_origin(annotation) is list:
        text = get_args(annotation)[0] is str
        numbers = get_args(annotation)[0] in (int, float)
        return Kind(text, one=False, several=True, empty=empty) if text or numbers else None
    if "." not in key and schema is not HydraConf and has_keys(annotation):
        return Kind(text=True, one=True, several=False, empty=True, group=True)
    return None


def has(schema: type, key: str) -> bool:
    """Whether a command has a setting with this dotted key."""
    return annotation_of(schema, key) is not None


def annotation_of(schema: type, key: str) -> tuple[Any, Any] | None:
    """The type of a dotted key and the metadata of its field."""
    annotation, metadata = schema, {}
    for part in key.split("."):
        annotation, _ = without_none(annotation)
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


def without_none(annotation: Any) -> tuple[Any, bool]:
    """A type without None, and whether None was one of its choices."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else Any, type(None) in get_args(annotation)


def has_keys(annotation: Any) -> bool:
    return is_dataclass(annotation) or get_origin(annotation) is dict


def keys_of(schema: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a command, with layer1 for every layer."""
    if get_origin(schema) is dict:
        yield from keys_of(get_args(schema)[1], f"{prefix}layer1.")
    elif is_dataclass(schema):
        for name, annotation in get_type_hints(schema).items():
            inside = without_none(annotation)[0]
            if has_keys(inside):
                yield from keys_of(inside, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}"


def with_current_key(schema: type, key: str, where: str = "") -> str:
    """A dotted key with the current names of renamed settings, with a warning, and with their
    usual spelling.

    where: the file that has the key, for the warning.
    """
    current = _current_key(schema, key)
    if current not in (key, ".".join(SPELLINGS.get(name, name) for name in key.split("."))):
        prefix = f"{where}: " if where else ""
        message = f"{prefix}{key} is now called {current}; the old name will go"
        warnings.warn(message, FutureWarning, stacklevel=2)
    return current


def with_current_references(schema: type, text: str) -> str:
    """A text in which ${key} refers to settings by their current names."""
    return _REFERENCE.sub(lambda match: f"${{{_current_key(schema, match[1])}}}", text)


@cache
def _current_key(schema: Any, key: str) -> str:
    names, level = [], schema
    for name in key.split("."):
        level, _ = without_none(level)
        if is_dataclass(level):
            known = get_type_hints(level)
            name = current_name(level, name)
            if name not in known and SPELLINGS.get(name) in known:
                name = SPELLINGS[name]
            level = known.get(name)
        elif get_origin(level) is dict:
            level = get_args(level)[1]
        else:
            level = None
        names.append(name)
    return ".".join(names)
