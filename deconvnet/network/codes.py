"""What inference found: the maps of every layer for a batch of images, and the way back to pixels.

N images · K maps · H, W size of a map · C channels of what is explained
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deconvnet.images.preprocessing import Record
from deconvnet.operators.pooling import unpool

Images = Tensor | slice
ALL = slice(None)


@dataclass(frozen=True)
class LayerCodes:
    """What inference found in one layer.

    pooled: the maps after pooling (z itself without it); switches: where the pooled values stood,
    as `pooling.max_pool` gives them (None without pooling); shape: (K, H, W) of z; reconstruction,
    sparsity: (N,) the two terms of the objective, float64; dense: z, only where pooling has dropped
    some of it. Where the switches were inferred with the maps it drops nothing, and 3x3x3 pooling
    then takes a ninth of the memory of z.
    """

    pooled: Tensor
    switches: Tensor | None
    shape: tuple[int, int, int]
    reconstruction: Tensor
    sparsity: Tensor
    dense: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.pooled)

    def __repr__(self) -> str:
        maps, pooled = ("x".join(map(str, shape)) for shape in (self.shape, self.pooled.shape[1:]))
        pool = "" if self.switches is None else f", pooled to {pooled}"
        return f"LayerCodes({len(self)} images, maps {maps}{pool}, {self.density:.2%} not zero)"

    @property
    def z(self) -> Tensor:
        """The sparse maps (N, K, H, W)."""
        if self.dense is not None:
            return self.dense
        if self.switches is None:
            return self.pooled
        return unpool(self.pooled, self.switches, (len(self.pooled), *self.shape))

    @property
    def values(self) -> Tensor:
        """All entries of z that are not zero."""
        return self._kept[self._kept != 0]

    @property
    def _kept(self) -> Tensor:
        """All entries of z that may not be zero."""
        return self.pooled if self.dense is None else self.dense

    @property
    def objective(self) -> Tensor:
        """(N,): lam/2 ||A z - b||^2 + sum |z|^p."""
        return self.reconstruction + self.sparsity

    @property
    def density(self) -> float:
        """The share of the entries of z that are not zero."""
        entries = len(self) * torch.Size(self.shape).numel()
        return float(torch.count_nonzero(self._kept)) / max(entries, 1)

    def select(self, images: Images) -> LayerCodes:
        """The codes of some images."""
        chosen = {key: value[images] for key, value in vars(self).items() if _is_tensor(value)}
        return replace(self, **chosen)

    def to(self, device: torch.device | str) -> LayerCodes:
        """The codes on another device."""
        moved = {key: value.to(device) for key, value in vars(self).items() if _is_tensor(value)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Codes:
    """The maps of every layer for a batch of images, and what it takes to get back to their pixels.

    y: (N, C, H, W) the preprocessed images; record: what preprocessing needs to undo itself.
    """

    layers: tuple[LayerCodes, ...]
    y: Tensor
    record: Record = field(repr=False)

    def __repr__(self) -> str:
        lines = [f"Codes({len(self.y)} images {'x'.join(map(str, self.y.shape[1:]))}"]
        lines += [f"  layer {number}: {layer!r}" for number, layer in enumerate(self.layers, 1)]
        return "\n".join(lines) + ")"

    def select(self, images: Images) -> Codes:
        """The codes of some images, by their indices."""
        layers = tuple(layer.select(images) for layer in self.layers)
        record = [{key: value[images] for key, value in step.items()} for step in self.record]
        return Codes(layers, self.y[images], record)

    def to(self, device: torch.device | str) -> Codes:
        """The codes on another device."""
        record = [{key: value.to(device) for key, value in step.items()} for step in self.record]
        return Codes(tuple(layer.to(device) for layer in self.layers), self.y.to(device), record)

    def layer(self, number: int) -> LayerCodes:
        """The codes of one layer, counted from 1."""
        if not 1 <= number <= len(self.layers):
            have = f"layers 1 to {len(self.layers)}" if self.layers else "no layers"
            raise ValueError(f"layer={number}: these codes have {have}")
        return self.layers[number - 1]


def join(parts: list[LayerCodes]) -> LayerCodes:
    """The codes of several batches as one."""
    joined = {
        key: torch.cat([getattr(part, key) for part in parts])
        for key, value in vars(parts[0]).items()
        if _is_tensor(value)
    }
    return replace(parts[0], **joined)


def join_codes(parts: list[Codes]) -> Codes:
    """The codes of several batches of images of one size as one."""
    layers = tuple(join(list(each)) for each in zip(*(part.layers for part in parts), strict=True))
    steps = zip(*(part.record for part in parts), strict=True)
    record = [{key: torch.cat([step[key] for step in each]) for key in each[0]} for each in steps]
    return Codes(layers, torch.cat([part.y for part in parts]), record)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
