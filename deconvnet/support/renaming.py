"""Renamed settings: the old name still works, with a warning that gives the new one.

A settings class lists its old names once, in its decorator. Its constructor then accepts them, and
so do the files and command lines that are read through `with_current_names`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Settings = TypeVar("Settings", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[Settings], Settings]:
    """A decorator for a settings dataclass; names: old="new".

    The constructor accepts the old names, and those of its parents, with a FutureWarning. It raises
    TypeError if it gets the old and the new name of one setting.
    """

    def decorate(settings: Settings) -> Settings:
        construct, current = settings.__init__, getattr(settings, "RENAMED", {}) | names

        @functools.wraps(construct)
        def __init__(self: Any, *values: Any, **fields: Any) -> None:
            construct(self, *values, **_current(fields, current, settings.__name__))

        settings.__init__ = __init__
        settings.RENAMED = current
        return settings

    return decorate


def renamed_arguments(**names: str) -> Callable[[Function], Function]:
    """The same for the keyword arguments of a function: the old names work, with a warning."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*values: Any, **fields: Any) -> Any:
            return function(*values, **_current(fields, names, function.__name__))

        return call

    return decorate


def current_name(settings: type, name: str) -> str:
    """The current name of a setting of this class; names that were never renamed are returned."""
    return getattr(settings, "RENAMED", {}).get(name, name)


def with_current_names(fields: Mapping[str, Any], settings: type, where: str) -> dict[str, Any]:
    """The fields of a settings class, read from a file, under their current names.

    fields: as written, with the fields of nested settings as mappings. where: the file or key, for
    the warning. Names that belong to no field are left for the constructor to refuse.
    """
    current = _current(dict(fields), getattr(settings, "RENAMED", {}), where)
    types = typing.get_type_hints(settings)
    for name, value in current.items():
        nested = _settings_class(types.get(name))
        if nested is not None and isinstance(value, Mapping):
            current[name] = with_current_names(value, nested, f"{where}.{name}")
    return current


def _current(fields: dict[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    for old in [name for name in fields if name in names]:
        new = names[old]
        if new in fields:
            raise TypeError(f"{where}: {old} is the old name of {new}; give {new} alone")
        warnings.warn(
            f"{where}: {old} is now called {new}; the old name will go", FutureWarning, stacklevel=4
        )
        fields = {new if name == old else name: value for name, value in fields.items()}
    return fields


def _settings_class(annotation: Any) -> type | None:
    """The dataclass in an annotation such as `Settings` or `Settings | None`."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None
