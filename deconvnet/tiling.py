"""Images that are too large to be explained at once: in tiles that overlap.

A layer couples all places of an image, but what happens far away hardly matters: its filters reach
so far, and the maps that answer them a few times as far. So a tile is explained together with a
margin of what is around it, and where the inner parts of two tiles meet one goes over into the
other, so that there is no seam. Tiles begin where windows of pooling begin: every window, and so
every switch, is whole.

Mathematics stays where it was: `network` explains a tile as it explains any image. This module
decides how large tiles are and how their results are put together.

    memory: in GiB, what the work may take at a time beside the program itself
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.codes import Codes
from deconvnet.network import DeconvNet, Layer, Progress, snr

GIB = 2**30
# What commands and functions take for `memory` unless they are told.
MEMORY = 4.0
# The margin of a tile, in reaches of all filters.
REACHES = 4
# Bytes for every number of the maps of a layer while these are inferred, by the solver's method;
# and for every number of a map below that is there beside it. Measured, and rounded up.
OF_MAPS = {"admm": 60, "half_quadratic": 60, "fista": 80, "ista": 80, "coordinate": 48}
BESIDE = 24
# Bytes for every value of the planes of an image.
OF_PLANES = 80


@dataclass(frozen=True)
class Tile:
    """A part of an image: which rows and columns are explained, and how much of them counts.

    down (rows,), right (columns,): 1 inside, falling to 0 where another tile takes over; those of
    all tiles sum to 1 at every pixel.
    """

    rows: slice
    columns: slice
    down: Tensor
    right: Tensor

    @classmethod
    def whole(cls, H: int, W: int) -> Tile:
        """All of an image."""
        return cls(slice(0, H), slice(0, W), torch.ones(H), torch.ones(W))

    @property
    def share(self) -> Tensor:
        """(rows, columns): how much every pixel counts."""
        return self.down[:, None] * self.right


def tiles(size: tuple[int, int], side: int, margin: int, step: int) -> list[Tile]:
    """Tiles of side x side pixels at most, margins included, that cover an image of H x W pixels.

    Neighbours overlap by two margins, of which the middle half goes from one to the other. All
    begin at multiples of `step`. ValueError where the side leaves nothing beside the margins.
    """
    margin = step * -(-margin // step)
    inner = (side - 2 * margin) // step * step
    if inner < max(step, margin):
        raise ValueError(f"tiles of {side}x{side} pixels: need at least {3 * margin}")
    rows, columns = ([*_along(length, inner, margin)] for length in size)
    return [Tile(r, c, down, right) for r, down in rows for c, right in columns]


def _along(length: int, inner: int, margin: int) -> Iterator[tuple[slice, Tensor]]:
    """The tiles along one axis: what is explained, and how much of it counts."""
    count = max(1, -(-(length - 2 * margin) // inner))
    middle = torch.linspace(0, 1, margin + 2)[1:-1] if margin else torch.ones(0)
    for n in range(count):
        first, last = n == 0, n == count - 1
        start = 0 if first else n * inner
        stop = length if last else (n + 1) * inner + 2 * margin
        counts, edge = torch.ones(stop - start), margin // 2
        if not first:
            counts[:edge], counts[edge : edge + margin] = 0, middle
        if not last:
            overlap = counts[len(counts) - 2 * margin :]
            overlap[edge : edge + margin], overlap[edge + margin :] = 1 - middle, 0
        yield slice(start, stop), counts


@dataclass(frozen=True)
class Reconstruction:
    """What the maps of one layer make of an image.

    pixels: (N, 1 or 3, H, W) in [0, 1]; y, painted: (N, C, H, W) the preprocessed image, and what
    the layer makes of it; density: share of the entries of z that are not zero; tiles: how many
    there were.
    """

    pixels: Tensor
    y: Tensor
    painted: Tensor
    density: float
    tiles: int

    @property
    def snr(self) -> float:
        """In dB, preprocessed domain."""
        return snr(self.y, self.painted)


@torch.no_grad()
def reconstruct(
    net: DeconvNet,
    images: Tensor,
    layer: int | None = None,
    *,
    memory: float = MEMORY,
    progress: Progress | None = None,
) -> Reconstruction:
    """Images (N, 1 or 3, H, W) in [0, 1], one by one, from the maps of a layer (default: the
    highest), as `net.infer` and `net.reconstruct` make them, but in no more than `memory` GiB.

    What fits is explained as a whole, and is the same to the bit. Else it is explained in tiles:
    preprocessing is that of the whole image, and the maps are as near to it as the solver of the
    network goes to its minimum. ValueError, before any work, for an image too large even for that.
    progress(done, total) hears of every tile of every image.
    """
    layer = net.depth if layer is None else layer
    net.layer(layer)
    if len(images) == 0:
        raise ValueError("0 images: must be at least 1")
    cut = plan(net, tuple(images.shape[2:]), layer, memory)
    found = []
    for n, image in enumerate(images.split(1)):

        def report(done: int, n: int = n) -> None:
            if progress:
                progress(n * len(cut) + done, len(images) * len(cut))

        found.append(_reconstruct(net, image, layer, cut, report))
    pixels, y, painted = (
        torch.cat([getattr(each, key) for each in found]) for key in ("pixels", "y", "painted")
    )
    density = sum(each.density for each in found) / len(found)
    return Reconstruction(pixels, y, painted, density, len(found) * len(cut))


def _reconstruct(
    net: DeconvNet, image: Tensor, layer: int, cut: list[Tile], report: Callable[[int], None]
) -> Reconstruction:
    base = net.infer(image, depth=0)
    painted, active = torch.zeros_like(base.y), 0.0
    for n, tile in enumerate(cut, 1):
        codes = Codes((), base.y[:, :, tile.rows, tile.columns], [])
        for _ in range(layer):
            codes = net.extend(codes)
        share = tile.share.to(painted)
        painted[:, :, tile.rows, tile.columns] += share * net.paint(codes, layer)
        active += codes.layer(layer).density * float(share.sum())
        report(n)
    pixels = net.preprocessing.inverse(painted, base.record).clamp_(0, 1)
    return Reconstruction(pixels, base.y, painted, active / image[0, 0].numel(), len(cut))


def plan(
    net: DeconvNet,
    size: tuple[int, int],
    depth: int,
    memory: float,
    *,
    first: int = 1,
    planes: float | None = None,
) -> list[Tile]:
    """The tiles in which the layers from `first` to `depth` explain an image of H x W pixels within
    `memory` GiB; one, if that is enough. planes: in GiB, what is needed beside the maps.
    ValueError says how much even the smallest tiles would take.
    """
    check_memory(memory)
    layers = list(net.layers[:depth])
    if planes is None:
        planes = OF_PLANES * 3 * size[0] * size[1] / GIB
    planes *= GIB
    each = bytes_of_a_pixel(layers, first)
    if planes + each * size[0] * size[1] <= memory * GIB:
        return [Tile.whole(*size)]
    margin, step = margin_of(layers)
    # Beyond the image there is nothing to look at.
    least = min(size[0], 3 * margin + step) * min(size[1], 3 * margin + step)
    needed = (planes + each * least) / GIB
    if needed > memory:
        refuse(size, needed, memory)
    for number, each_layer in enumerate(layers, 1):
        if each_layer.settings.boundary == "circular":
            raise ValueError(
                f"layer{number}.boundary=circular: an image of {size[0]}x{size[1]} pixels needs "
                f"{(planes + each * size[0] * size[1]) / GIB:.1f} GiB, memory={memory} allows "
                "less, and one that goes on at its other side cannot be cut into tiles"
            )
    side = int(math.sqrt((memory * GIB - planes) / each))
    return tiles(size, max(side, 3 * margin + step), margin, step)


def margin_of(layers: list[Layer]) -> tuple[int, int]:
    """(margin, step) of tiles in pixels: what the filters reach, and where windows begin."""
    reach, step = 0, 1
    for layer in layers:
        reach += (layer.settings.filter_size - 1) * step
        step *= math.lcm(*layer.settings.pool[1:]) if layer.settings.pool else 1
    margin = max(8, REACHES * reach)
    return step * -(-margin // step), step


def bytes_of_a_pixel(layers: list[Layer], first: int = 1) -> int:
    """What it takes to infer layers of a network from `first` on, for every pixel of an image."""
    most, area, beside = 0.0, 1, 0.0
    for number, layer in enumerate(layers, 1):
        settings = layer.settings
        numbers = settings.num_maps / area
        through = beside if settings.target != "maps" else 0.0
        if number >= first:
            own = OF_MAPS[settings.solver.method] * (numbers + through)
            most = max(most, own + BESIDE * beside)
        else:
            most = max(most, BESIDE * numbers)
        beside += numbers
        area *= math.prod(settings.pool[1:]) if settings.pool else 1
    return int(most)


def check_memory(memory: float) -> None:
    if not 0 < memory < math.inf:
        raise ValueError(f"memory={memory}: is in GiB, must be a positive number")


def refuse(size: tuple[int, int], needed: float, memory: float) -> None:
    """ValueError that says what would be enough."""
    raise ValueError(
        f"an image of {size[0]}x{size[1]} pixels needs {needed:.2f} GiB, memory={memory} allows "
        f"less: give memory={math.ceil(10 * needed) / 10:g} or more, or a smaller image"
    )
