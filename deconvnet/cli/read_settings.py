"""Conversion of Hydra's configuration to the checked settings of a command.

`read_settings` returns dataclasses; no code outside this folder uses Hydra.
"""

from __future__ import annotations

import difflib
import functools
import os
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from deconvnet.cli.help import WIDTH, short_page
from deconvnet.cli.settings import SCHEMAS
from deconvnet.storage import ownership

# Settings that are paths. The code that opens images and data expands theirs itself.
PATHS = {
    *("run", "output", "model", "weights", "resume", "init", "missing", "beside", "checkpoints"),
}


def register() -> None:
    """Register the types of the settings with Hydra, so that it rejects wrong keys and values."""
    OmegaConf.register_new_resolver("inside", _inside, replace=True)
    OmegaConf.register_new_resolver("last_part", _last_part, replace=True)
    register_help(short_page)
    # Hydra copies the store with everything that refers to it, 33 times for a help page, though
    # nothing is added to it after the schemas below.
    ConfigStore.__deepcopy__ = lambda store, _: store
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
    _wrap_choices()


def register_help(page: Callable[[str, type, DictConfig], str]) -> None:
    """Register what --help shows of a command, given its name, schema and configuration."""

    def shown(command: str, *, _root_: DictConfig) -> str:
        return page(command, SCHEMAS[command], _root_)

    OmegaConf.register_new_resolver("help", shown, replace=True)


def _wrap_choices() -> None:
    """Make Hydra wrap the choices of a group in a help page, which it puts into one line."""
    list_choices = Hydra.format_config_groups
    if hasattr(list_choices, "__wrapped__"):
        return

    @functools.wraps(list_choices)
    def wrapped(self: Hydra, predicate: Callable[[str], bool]) -> str:
        lines = list_choices(self, predicate).splitlines()
        return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)

    Hydra.format_config_groups = wrapped


def _inside(name: object) -> str:
    """The name of a run, checked to be a path inside the folder of runs."""
    parts = str(name).replace("\\", "/").split("/")
    forbidden = {".", "..", "~", ownership.RECORD_FOLDER}
    if not str(name).isprintable() or not parts[0] or forbidden & set(parts):
        raise ValueError(f"name={str(name)!r}: must be the name of a folder inside runs")
    return str(name)


def _last_part(model: object) -> str:
    """The name of a model without where it comes from: resnet50 of torchvision/resnet50."""
    name = str(model).replace("\\", "/").rpartition("/")[2].rpartition(":")[2]
    return name.removesuffix(".safetensors")


def read_settings(cfg: DictConfig) -> Any:
    """The checked settings of a command, an object of its schema.

    ValueError names the key, the value and what would be right.
    """
    check_keys(cfg)
    check_complete(cfg)
    for key in cfg:
        if not OmegaConf.is_interpolation(cfg, key) and _has_layers(cfg._get_node(key)):
            _check_layers(cfg[key], key)
    return _expand_home(OmegaConf.to_object(cfg))


def _has_layers(node: Any) -> bool:
    return OmegaConf.is_dict(node) and is_dataclass(node._metadata.element_type)


def _check_layers(layers: DictConfig, key: str) -> None:
    """Add the name of the layer to errors in its settings."""
    for name, layer in layers.items():
        try:
            OmegaConf.to_object(layer)
        except ValueError as error:
            raise ValueError(f"{key}.{name}.{error}") from None


def _expand_home(settings: Any) -> Any:
    """The settings with ~ expanded in paths, since the shell does not expand it in key=~/a."""
    for key in PATHS & set(vars(settings)):
        value = getattr(settings, key)
        paths = value if isinstance(value, list) else [value]
        if all(isinstance(path, str) for path in paths):
            paths = [os.path.expanduser(path) for path in paths]
            setattr(settings, key, paths if isinstance(value, list) else paths[0])
    return settings


def check_complete(cfg: DictConfig) -> None:
    """Raise ValueError if a required value is missing."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{key} has no value: give one with {key}=...")


def check_keys(node: DictConfig, prefix: str = "") -> None:
    """Raise ValueError for unknown keys, which Hydra accepts as +key=value."""
    kind = OmegaConf.get_type(node)
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else list(node)
    for key in node:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"{prefix}{key}: no such setting; {hint}")
        if not OmegaConf.is_interpolation(node, key) and OmegaConf.is_dict(node._get_node(key)):
            check_keys(node[key], f"{prefix}{key}.")
