"""Activations on disk: shards of safetensors, each of consecutive images.

    <folder>/activations-00000.safetensors, ...    "activations" (n, C, H, W) float32

A shard is computed when one of its images is needed for the first time, and written completely or
not at all, so a process that is stopped loses at most one. Memory holds one shard while it is
written or checked, and otherwise the images that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from deconvnet.storage.file_checks import InvalidFileError
from deconvnet.storage.network_files import load_network, save_network

# Bytes of a shard, unless a single image has more.
SHARD_BYTES = 2**26
# `kind` in the settings of a shard.
ACTIVATIONS = "activations"


class Shards:
    """Activations of this shape (N, C, H, W) in the shards of a folder.

    identity: what they are activations of; a folder with others is refused.
    """

    def __init__(self, folder: Path, shape: torch.Size, identity: str):
        self.folder, self.shape, self.identity = folder, shape, identity
        self.size = max(1, SHARD_BYTES // (4 * math.prod(shape[1:])))
        # Shards whose content was verified.
        self._valid: set[int] = set()
        if self._path(0).exists():
            self._check(0)

    def read(self, numbers: list[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """The activations (n, C, H, W) of the images with these numbers, on the CPU.

        compute: the activations of some images, for shards that do not exist yet.
        """
        activations = torch.empty(len(numbers), *self.shape[1:], dtype=torch.float32)
        by_shard: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            by_shard.setdefault(number // self.size, []).append(row)
        for shard, rows in by_shard.items():
            self._ensure(shard, compute)
            with safetensors.safe_open(self._path(shard), "pt") as file:
                stored = file.get_slice(ACTIVATIONS)
                for row in rows:
                    within = numbers[row] - shard * self.size
                    activations[row] = stored[within : within + 1][0]
        return activations

    def _ensure(self, shard: int, compute: Callable[[list[int]], Tensor]) -> None:
        """Verify a shard, or compute and write it."""
        if shard in self._valid:
            return
        if self._path(shard).exists():
            self._check(shard)
        else:
            images = range(shard * self.size, min((shard + 1) * self.size, self.shape[0]))
            activations = compute(list(images))
            save_network(self._path(shard), {ACTIVATIONS: activations}, self._settings(shard))
        self._valid.add(shard)

    def _check(self, shard: int) -> None:
        """Raise InvalidFileError unless a file is this shard, complete and undamaged."""
        path = self._path(shard)
        _, settings = load_network(path)
        if settings != self._settings(shard):
            raise InvalidFileError(
                f"{path}: holds activations of another model, layer or images; choose another "
                "folder, or remove these files"
            )

    def _settings(self, shard: int) -> dict:
        return {
            "kind": ACTIVATIONS,
            "of": self.identity,
            "shape": list(self.shape),
            "shard": [shard, self.size],
        }

    def _path(self, shard: int) -> Path:
        return self.folder / f"activations-{shard:05d}.safetensors"
