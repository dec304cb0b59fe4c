"""Where in an image a map is active: the maps of the strongest activations of a layer, small.

M maps · k strongest activations of each
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from deconvnet.visualization.projection.projection import LayerInfo
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import get_image

# Larger maps are reduced to this side by max pooling.
SIDE = 32


@dataclass(frozen=True)
class Heat:
    """A map over its image: values (H, W) uint8, 255 for the strongest activation of the map in the
    data set; box: top, left, bottom, right in pixels of the image of what the values cover, which
    may reach beyond it."""

    values: np.ndarray
    box: tuple[float, float, float, float]


def heats(
    projector: Projector,
    images: Sequence,
    layer: str,
    units: np.ndarray,
    values: np.ndarray,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[tuple[int, int], Heat]:
    """{(row, rank): heat} of the strongest activations of some maps of a layer.

    images: the data set that was searched; units: (M, k, 4), image, map, row, column, -1 for none;
    values: (M, k), the activations. Every image passes the network once.
    """
    of_image: dict[int, list[tuple[int, int]]] = {}
    for row, rank in zip(*np.nonzero(units[:, :, 0] >= 0), strict=True):
        of_image.setdefault(int(units[row, rank, 0]), []).append((int(row), int(rank)))
    found, infos = {}, {}
    for done, (image, places) in enumerate(sorted(of_image.items()), 1):
        pixels = get_image(images[image])
        x = projector.prepare(pixels[None])
        size = tuple(pixels.shape[1:])
        if size not in infos:
            infos[size] = next(info for info in projector.layers(x) if info.name == layer)
        numbers = [int(units[row, rank, 1]) for row, rank in places]

        def reduce(_: str, maps: Tensor, numbers: list[int] = numbers) -> Tensor:
            return pooled(maps[:, numbers].float().clamp(min=0))[0].cpu()

        small, box = projector.responses(x, [layer], reduce)[layer], covered(infos[size], size)
        for (row, rank), z in zip(places, small, strict=True):
            strongest = max(float(np.abs(values[row, 0])), 1e-12)
            shares = (z / strongest).clamp(0, 1)
            found[row, rank] = Heat((255 * shares).round().byte().numpy(), box)
        if progress:
            progress(done, len(of_image))
    return found


def covered(info: LayerInfo, image: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box of an image (H, W) that the pooled maps of a layer cover, if every unit covers the
    pixels around the centre of its field; the whole image if units have no place of their own."""
    first, last = [], []
    for axis, count in enumerate(info.shape[1:]):
        step = _step(count)
        positions = -(-count // step) * step
        offset, stride = 0.0, image[axis] / count
        if info.field is not None:
            stride = float(info.stride[axis])
            offset = float(info.offset[axis]) + (info.field[axis] - stride) / 2
        first.append(offset)
        last.append(offset + stride * positions)
    return (*first, *last)


def pooled(maps: Tensor) -> Tensor:
    """Maps (N, K, H, W), not negative, reduced by max pooling to sides of at most SIDE."""
    steps = [_step(side) for side in maps.shape[2:]]
    (down, right) = ((-side) % step for side, step in zip(maps.shape[2:], steps, strict=True))
    return F.max_pool2d(F.pad(maps, (0, right, 0, down)), steps)


def _step(side: int) -> int:
    """How many positions along an axis become one."""
    return -(-side // SIDE)
