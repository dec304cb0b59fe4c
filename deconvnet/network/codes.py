"""Codes, the result of inference: the maps of every layer for a batch of images.

N images · K maps · H, W size of a map · C channels of the images
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
    """The maps of one layer, pooled.

    pooled: the maps after pooling (z itself if there is none); switches: the positions of the
    maxima, as `pooling.max_pool` returns them (None if there is no pooling); shape: (K, H, W) of z;
    reconstruction, sparsity: (N,) float64, the two terms of the objective; dense: z, stored only if
    pooling dropped coefficients or signs were split, so that `pooled` has 2K maps. If the switches
    were inferred with the maps, pooling drops none, and with 3x3x3 windows the codes take a ninth
    of the memory of z. norms: (N, 1, H, W), by which each patch of the input was divided (None: 1).
    """

    pooled: Tensor
    switches: Tensor | None
    shape: tuple[int, int, int]
    reconstruction: Tensor
    sparsity: Tensor
    dense: Tensor | None = field(default=None, repr=False)
    norms: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.pooled)

    def __repr__(self) -> str:
        maps, pooled = ("x".join(map(str, shape)) for shape in (self.shape, self.pooled.shape[1:]))
        pool = "" if self.switches is None else f", pooled to {pooled}"
        return f"LayerCodes({len(self)} images, maps {maps}{pool}, {self.density:.2%} non-zero)"

    @property
    def z(self) -> Tensor:
        """The sparse maps z (N, K, H, W)."""
        if self.dense is not None:
            return self.dense
        if self.switches is None:
            return self.pooled
        return unpool(self.pooled, self.switches, (len(self.pooled), *self.shape))

    @property
    def values(self) -> Tensor:
        """(M,): all non-zero coefficients of z."""
        return self._stored[self._stored != 0]

    @property
    def _stored(self) -> Tensor:
        """A tensor with all non-zero coefficients of z."""
        return self.pooled if self.dense is None else self.dense

    @property
    def objective(self) -> Tensor:
        """(N,): lam/2 ||A z - b||^2 + sum |z|^p."""
        return self.reconstruction + self.sparsity

    @property
    def density(self) -> float:
        """The fraction of coefficients of z that are non-zero."""
        count = len(self) * torch.Size(self.shape).numel()
        return float(torch.count_nonzero(self._stored)) / max(count, 1)

    def select(self, images: Images) -> LayerCodes:
        """The codes of the given images, by their indices."""
        selected = {key: value[images] for key, value in vars(self).items() if _is_tensor(value)}
        return replace(self, **selected)

    def to(self, device: torch.device | str) -> LayerCodes:
        """The codes on another device."""
        moved = {key: value.to(device) for key, value in vars(self).items() if _is_tensor(value)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Codes:
    """The maps of every layer for a batch of images.

    y: (N, C, H, W), the preprocessed images; record: for the inverse of the preprocessing. mask:
    (N, 1, H, W), which weights the errors of the images; y has stand-ins where it is 0. None: all
    pixels count alike.
    """

    layers: tuple[LayerCodes, ...]
    y: Tensor
    record: Record = field(repr=False)
    mask: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        lines = [f"Codes({len(self.y)} images {'x'.join(map(str, self.y.shape[1:]))}"]
        lines += [f"  layer {number}: {layer!r}" for number, layer in enumerate(self.layers, 1)]
        return "\n".join(lines) + ")"

    def select(self, images: Images) -> Codes:
        """The codes of the given images, by their indices."""
        layers = tuple(layer.select(images) for layer in self.layers)
        record = [{key: value[images] for key, value in step.items()} for step in self.record]
        mask = None if self.mask is None else self.mask[images]
        return Codes(layers, self.y[images], record, mask)

    def pooled_only(self) -> Codes:
        """The codes without maps before pooling, which no projection from a layer above needs."""
        layers = tuple(replace(layer, dense=None) for layer in self.layers)
        return replace(self, layers=layers)

    def with_layer(self, layer: LayerCodes) -> Codes:
        """The codes with those of the next layer."""
        return replace(self, layers=(*self.layers, layer))

    def to(self, device: torch.device | str) -> Codes:
        """The codes on another device."""
        record = [{key: value.to(device) for key, value in step.items()} for step in self.record]
        layers = tuple(layer.to(device) for layer in self.layers)
        mask = None if self.mask is None else self.mask.to(device)
        return Codes(layers, self.y.to(device), record, mask)

    def layer(self, number: int) -> LayerCodes:
        """The codes of one layer, counted from 1."""
        if not 1 <= number <= len(self.layers):
            existing = f"layers 1 to {len(self.layers)}" if self.layers else "no layers"
            raise ValueError(f"layer={number}: these codes have {existing}")
        return self.layers[number - 1]


def join(parts: list[LayerCodes]) -> LayerCodes:
    """The codes of several batches of images concatenated."""
    joined = {
        key: torch.cat([getattr(part, key) for part in parts])
        for key, value in vars(parts[0]).items()
        if _is_tensor(value)
    }
    return replace(parts[0], **joined)


def join_codes(parts: list[Codes]) -> Codes:
    """The codes of several batches of images of one size concatenated."""
    if len(parts) == 1:  # whole maps are large: no copy of them
        return parts[0]
    layers = tuple(
        join(list(layer)) for layer in zip(*(part.layers for part in parts), strict=True)
    )
    record = [
        {key: torch.cat([step[key] for step in steps]) for key in steps[0]}
        for steps in zip(*(part.record for part in parts), strict=True)
    ]
    masks = [part.mask for part in parts]
    mask = None if masks[0] is None else torch.cat(masks)
    return Codes(layers, torch.cat([part.y for part in parts]), record, mask)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
