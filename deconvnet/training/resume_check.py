"""Comparison of a run's settings and images with those of the checkpoint to resume from."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import torch

from deconvnet.activations.settings import TrainingData
from deconvnet.images.preprocessing import PreprocessingSettings
from deconvnet.network.layer import LayerSettings
from deconvnet.support.renaming import with_current_names
from deconvnet.training.checkpoint import DIGEST

# Settings that do not affect the result, so that a resumed run may have other values.
NOT_COMPARED = {
    *("data.workers", "data.stream", "data.download", "data.name", "data.store", "memory"),
    *("disk", "init"),
}
# Settings of the location of the images; not compared if the images themselves are.
LOCATION = {
    *("data.path", "data.source", "data.dataset", "data.split", "data.max_images", "data.scale"),
    *("data.skip_unreadable", "data.mask"),
}
# If only these settings of another run differ, learning starts from its filters.
LEARNED_LONGER = re.compile(r"model\.layer\d+\.learning\.(epochs|batch_size):")


def different_settings(
    state: dict, settings: dict[str, Any], *, begun: int, images_compared: bool
) -> list[str]:
    """The settings in which a resumed run differs from its checkpoint, one line each:
    "model.layer1.lam: 2.0 there, 1.0 now".

    begun: layers that have begun to learn; the settings of those above may still change.
    """
    # The oldest checkpoints do not identify the images they learned from.
    images_compared = images_compared and state.get("images") is not None
    ignored = NOT_COMPARED | LOCATION if images_compared else NOT_COMPARED
    return [
        line
        for line in _differences(_complete(state["settings"]), _complete(settings))
        if not _is_above(line, begun) and line.partition(":")[0] not in ignored
    ]


def different_images(state: dict, digests: torch.Tensor | None) -> str:
    """How the images (`digest_tensor`) differ from those of a checkpoint, in words; "" if they do
    not, or if either is unknown.
    """
    if digests is None or state.get("images") is None:
        return ""
    return _changes(state["images"].tolist(), digests.tolist())


def how_to_have_the_first(state: dict) -> str:
    """For a run on some files of a folder: how to resume it if an earlier version began it."""
    data = state["settings"].get("data") or {}
    if data.get("source") != "folder" or data.get("max_images") is None:
        return ""
    return (
        f"; earlier versions took the first data.max_images={data['max_images']} files of a folder:"
        " to resume such a run, list them in a file and add data=list data.path=FILE"
    )


def digest_tensor(digests: Sequence[str]) -> torch.Tensor:
    """(N, DIGEST) bytes: the beginning of each hexadecimal digest."""
    data = b"".join(bytes.fromhex(digest)[:DIGEST] for digest in digests)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, DIGEST)


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, possibly of an earlier version, under the current names.

    Settings that it did not have yet are added with their defaults, which change nothing.
    """

    def renamed(values: Any, kind: type, key: str) -> Any:
        if not isinstance(values, dict):
            return values
        with warnings.catch_warnings():
            # `check_state` already warned when it restored the network of the checkpoint.
            warnings.simplefilter("ignore", FutureWarning)
            return _with_defaults(with_current_names(values, kind, key), kind)

    current = dict(settings)
    for key, kind in (("data", TrainingData), ("preprocessing", PreprocessingSettings)):
        if key in current:
            current[key] = renamed(current[key], kind, key)
    if isinstance(current.get("model"), dict):
        current["model"] = {
            name: renamed(layer, LayerSettings, f"model.{name}")
            for name, layer in current["model"].items()
        }
    return current


def _with_defaults(values: dict[str, Any], kind: type) -> dict[str, Any]:
    """The values with the defaults of the settings that they lack."""
    complete = dict(values)
    for entry in fields(kind):
        kind_inside = (
            type(entry.default_factory()) if entry.default_factory is not MISSING else None
        )
        if is_dataclass(kind_inside) and isinstance(values.get(entry.name), dict):
            complete[entry.name] = _with_defaults(values[entry.name], kind_inside)
        elif entry.default is not MISSING:
            complete.setdefault(entry.name, entry.default)
    return complete


def _changes(old: list[list[int]], new: list[list[int]]) -> str:
    """How two lists of digests differ, in words; "" if they are equal."""
    old, new = [bytes(digest) for digest in old], [bytes(digest) for digest in new]
    if old == new:
        return ""
    removed, added = Counter(old) - Counter(new), Counter(new) - Counter(old)
    counts = {"added": added.total(), "removed": removed.total()}
    if len(old) == len(new) and removed.total() == sum(
        a != b for a, b in zip(old, new, strict=True)
    ):
        counts = {"changed": removed.total()}
    words = [f"{count} {what}" for what, count in counts.items() if count]
    return ", ".join(words) if words else "their order changed"


def _differences(old: object, new: object, prefix: str = "") -> list[str]:
    """The differences between two nested dicts, one line for each dotted name."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{prefix}: {old} there, {new} now"]
    keys = sorted({*old, *new})
    return [
        line
        for key in keys
        for line in _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    ]


def _is_above(line: str, layer: int) -> bool:
    """Whether a difference is in the settings of a layer above this one."""
    parts = line.split(":")[0].split(".")
    name = parts[1] if parts[0] == "model" and len(parts) > 1 else ""
    return name.startswith("layer") and name[5:].isdigit() and int(name[5:]) > layer
