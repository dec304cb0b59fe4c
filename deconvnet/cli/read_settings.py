"""From Hydra's configuration to the checked settings of a command.

After `read_settings` the rest of the package sees dataclasses only; nothing outside of this folder
knows Hydra.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from deconvnet.cli.help import help_page
from deconvnet.cli.settings import SCHEMAS
from deconvnet.storage import ownership

# Settings that are paths. The code that opens images and data expands theirs itself.
PATHS = {
    *("run", "output", "model", "weights", "resume", "init", "missing", "beside", "checkpoints"),
}


def register() -> None:
    """Make the types of the settings known to Hydra, so that wrong keys and values are refused."""
    OmegaConf.register_new_resolver("inside", _inside, replace=True)
    OmegaConf.register_new_resolver("help", _help, replace=True)
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)


def _inside(name: object) -> str:
    """The name of a run as a path below the folder of runs: no way out of it."""
    parts = str(name).replace("\\", "/").split("/")
    no_name = {".", "..", "~", ownership.RECORD_FOLDER}
    if not str(name).isprintable() or not parts[0] or no_name & set(parts):
        raise ValueError(f"name={str(name)!r}: must be the name of a folder inside runs")
    return str(name)


def _help(command: str, *, _root_: DictConfig) -> str:
    """The end of a command's --help page, in which Hydra puts values for names after a dollar."""
    return help_page(SCHEMAS[command], _root_).replace("$", "$$")


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
    """Let an error in the settings of a layer name the layer."""
    for name, layer in layers.items():
        try:
            OmegaConf.to_object(layer)
        except ValueError as error:
            raise ValueError(f"{key}.{name}.{error}") from None


def _expand_home(settings: Any) -> Any:
    """The settings with ~ as the home folder in paths: the shell leaves it as it is in key=~/a."""
    for key in PATHS & set(vars(settings)):
        value = getattr(settings, key)
        paths = value if isinstance(value, list) else [value]
        if all(isinstance(path, str) for path in paths):
            paths = [os.path.expanduser(path) for path in paths]
            setattr(settings, key, paths if isinstance(value, list) else paths[0])
    return settings


def check_complete(cfg: DictConfig) -> None:
    """Refuse a configuration that leaves a value to the user, who has not given it."""
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{key} has no value: give one with {key}=...")


def check_keys(node: DictConfig, prefix: str = "") -> None:
    """Refuse keys that are no settings: Hydra itself lets +key=value add anything anywhere."""
    kind = OmegaConf.get_type(node)
    known = [field.name for field in fields(kind)] if is_dataclass(kind) else list(node)
    for key in node:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"{prefix}{key}: no such setting; {hint}")
        if not OmegaConf.is_interpolation(node, key) and OmegaConf.is_dict(node._get_node(key)):
            check_keys(node[key], f"{prefix}{key}.")
