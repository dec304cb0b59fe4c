"""Reading of YAML files: text settings are taken literally, and old names of settings work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from deconvnet.cli.arguments import KEYWORDS, PLAIN
from deconvnet.cli.setting_keys import kind_of, with_current_key, with_current_references

# Words that YAML does not read as text.
_YAML_KEYWORDS = {*KEYWORDS, "yes", "no", "on", "off", "y", "n"}
_SWEEP = "hydra.sweeper.params"


def read_files_as_written(schema: type) -> None:
    """Make Hydra read YAML files through `as_written`.

    schema: the dataclass of the command's settings.
    """

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
            changed = as_written(source, schema, package, str(path))
            if changed != source:
                result.config = OmegaConf.create(changed)
            return result

    SourcesRegistry.instance().types["file"] = FileConfigSource


def check_names(arguments: list[str], configs: Path) -> None:
    """Raise ValueError for files of the user that are hidden by files of deconvnet.

    configs: the folder of the files that come with the package.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    folder = parser.parse_known_args(arguments)[0].config_dir
    for path in sorted(Path(folder).glob("*/*.yaml")) if folder else ():
        if (configs / path.relative_to(folder)).exists():
            raise ValueError(
                f"{path}: deconvnet has a file of this name, which would hide it; give it another"
            )


def as_written(source: str, schema: type, package: str = "", where: str = "") -> str:
    """A YAML text with quotes around the text settings that lack them: name: 1.10.

    Renamed settings get their current names, with a warning. package: the dotted key of the
    settings in the text. where: its file, for the warning and for the ValueError if both the old
    and the new name of one setting are given.
    """
    edits = {}
    for node, text in _edits(yaml.compose(source), schema, package, where):
        edits[node.start_mark.index, node.end_mark.index] = text
    for (start, end), text in sorted(edits.items(), reverse=True):
        source = source[:start] + text + source[end:]
    return with_current_references(schema, source)


def _edits(
    node: yaml.Node | None, schema: type, key: str, where: str
) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """Scalars of a YAML text, and their replacements."""
    if not isinstance(node, yaml.MappingNode):
        yield from ((scalar, _quoted(scalar)) for scalar in _texts(node, schema, key))
        return
    names = [_current_name(name.value, schema, key, where) for name, _ in node.value]
    for (name, value), current in zip(node.value, names, strict=True):
        if current != name.value:
            if names.count(current) > 1:
                raise ValueError(
                    f"{where}: {name.value} is another name of {current}; give {current} alone"
                )
            yield name, current
        # << merges settings of the same level.
        below = key if current == "<<" else f"{key}.{current}".lstrip(".")
        several = current == "<<" and isinstance(value, yaml.SequenceNode)
        for part in value.value if several else [value]:
            yield from _edits(part, schema, below, where)


def _current_name(name: str, schema: type, key: str, where: str) -> str:
    """The current name of a setting below a dotted key; in the list of a sweep its full key."""
    if key == _SWEEP:
        return with_current_key(schema, name, where)
    current = with_current_key(schema, f"{key}.{name}".lstrip("."), where)
    return current[len(key) + 1 :] if key else current


def _texts(node: yaml.Node | None, schema: type, key: str) -> list[yaml.ScalarNode]:
    """The plain scalars at a dotted key that are text settings."""
    kind = kind_of(schema, key) if key and _is_not_hydra(key) else None
    if kind is None or not kind.text or kind.group:
        return []
    several = isinstance(node, yaml.SequenceNode)
    return [
        scalar
        for scalar in (node.value if several else [node])
        if isinstance(scalar, yaml.ScalarNode)
        and scalar.style is None
        and scalar.value.lower() not in ("", "~", "null")
        and (scalar.value.lower() in _YAML_KEYWORDS or not PLAIN.fullmatch(scalar.value))
    ]


def _quoted(scalar: yaml.ScalarNode) -> str:
    return json.dumps(scalar.value, ensure_ascii=False)


def _is_not_hydra(key: str) -> bool:
    return key.partition(".")[0] not in ("hydra", "defaults")
