"""What projections start from: units of a layer, or patterns in its maps.

A unit of a layer starts from its own activation. A concept of a dictionary over the layer starts
from what it paints into the maps: its filter, in all channels, around its position.

U projections · N images · K maps of the layer, of H x W positions
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deconvnet.visualization.projection.boxes import crop
from deconvnet.visualization.projection.field_boxes import Box
from deconvnet.visualization.projection.field_geometry import FieldGeometry


@dataclass(frozen=True)
class Footprint:
    """Which positions of the maps of a layer a unit of a dictionary paints, along (rows, columns):
    `size` of them from offset + stride * n for unit n, some of them possibly beyond the border.
    """

    offset: tuple[int, int]
    size: tuple[int, int]
    stride: tuple[int, int]

    def fields(self, geometry: FieldGeometry) -> FieldGeometry:
        """The receptive fields of units with this footprint in a layer with these fields."""
        axes = zip(
            *(geometry.offset, geometry.size, geometry.stride),
            *(self.offset, self.size, self.stride),
            strict=True,
        )
        offsets, sizes, strides = zip(
            *(
                (offset + stride * first, size + int(stride * (count - 1)), stride * step)
                for offset, size, stride, first, count, step in axes
            ),
            strict=True,
        )
        return FieldGeometry(offsets, sizes, strides)


@dataclass(frozen=True)
class Patterns:
    """Patterns in the maps of a layer, in place of units of it.

    signals: (U, K, H, W), what each projection starts from. values: (U,), the activations that they
    belong to. footprint: of each.
    """

    signals: Tensor
    values: Tensor
    footprint: Footprint


@dataclass(frozen=True)
class Starts:
    """What U projections start from.

    units: (U, 4), image, map, row, column: of the layer or, with patterns, of a dictionary over it.
    seeds: (U,), the starting values of units, None for their activations.
    """

    units: Tensor
    seeds: Tensor | None = None
    patterns: Patterns | None = None

    def __len__(self) -> int:
        return len(self.units)

    def select(self, chosen: Tensor) -> Starts:
        """Some of them, by their indices."""
        seeds, patterns = self.seeds, self.patterns
        if seeds is not None:
            seeds = seeds[chosen.to(seeds.device)]
        if patterns is not None:
            at = chosen.to(patterns.signals.device)
            signals, values = patterns.signals[at], patterns.values[at.to(patterns.values.device)]
            patterns = replace(patterns, signals=signals, values=values)
        return Starts(self.units[chosen], seeds, patterns)

    def in_windows(self, units: Tensor, corners: Tensor, size: tuple[int, int]) -> Starts:
        """The same in windows of the images: `units`, (U, 4), as they are counted there; patterns
        cut to windows of the maps, from `corners` (U, 2), of this size."""
        patterns = self.patterns
        if patterns is not None:
            boxes = torch.cat([corners, corners + torch.tensor(size)], 1)
            patterns = replace(patterns, signals=crop(patterns.signals, boxes))
        return replace(self, units=units, patterns=patterns)

    def boxes(self) -> Box:
        """(U, 3, 2): first and last + 1 of the maps, rows and columns that each starts from."""
        first = self.units[:, 1:].numpy()
        size = np.ones(3, np.int64)
        if self.patterns is not None:
            footprint = self.patterns.footprint
            rows, columns = (
                np.array(footprint.offset)[axis] + footprint.stride[axis] * first[:, 1 + axis]
                for axis in (0, 1)
            )
            first = np.stack([np.zeros_like(rows), rows, columns], 1)
            size = np.array([self.patterns.signals.shape[1], *footprint.size])
        return np.stack([first, first + size], 2)

    def values(self, maps: Tensor, n: Tensor) -> Tensor:
        """(U,): the activations; maps: (N, K, H, W); n: (U,), which of these images each is in."""
        if self.patterns is not None:
            return self.patterns.values.to(maps)
        k, i, j = self.units[:, 1:].to(maps.device).unbind(1)
        return maps.detach()[n, k, i, j]

    def signal(self, maps: Tensor, n: Tensor, chosen: Tensor) -> Tensor:
        """(N, K, H, W): what the chosen projections start from, at most one in each image."""
        signal = torch.zeros_like(maps)
        if self.patterns is not None:
            signal[n[chosen]] = self.patterns.signals.to(maps)[chosen]
            return signal
        k, i, j = self.units[:, 1:].to(maps.device).unbind(1)
        values = self.values(maps, n) if self.seeds is None else self.seeds.to(maps)
        signal[n[chosen], k[chosen], i[chosen], j[chosen]] = values[chosen]
        return signal
