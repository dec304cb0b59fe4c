"""Images that are too large to be explained at once: in tiles that overlap.

Layer 1 needs no tiles on a CPU: `adaptive` solves it as one problem, of which only the entries that
are not zero are kept. Which of two nearly equal entries of a window is its maximum is so the same
for all layers above, wherever tiles begin.

A layer above couples all places of an image, but what happens far away hardly matters: its filters
reach so far, and the maps that answer them a few times as far. So a tile is explained together with
a margin of what is around it, and where the inner parts of two tiles meet one goes over into the
other, so that there is no seam. Tiles begin where windows of pooling begin: every window, and so
every switch, is whole. Where layer 1 must not be solved so (p < 1, pooling in its loop, a GPU), it
is explained in the same tiles.

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

from deconvnet.network.codes import Codes, LayerCodes
from deconvnet.network.layer import Layer
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet, Progress
from deconvnet.sparse_coding.problem import Solution
from deconvnet.sparse_coding.solve import default_solver
from deconvnet.sparse_coding.whole_image import SparseSolution, Thresholds, solve_whole_image
from deconvnet.support.validation import as_number

GIB = 2**30
# The default of `memory`.
MEMORY = 4.0
# The margin of a tile, in reaches of all filters.
REACHES = 6
# Bytes for every number of the maps of a layer while these are inferred, by the solver's method,
# and for every number of a map below that is held as well. Rounded up from measurements at 400x400
# (ADMM, FISTA, coordinate descent; those of the other methods are taken from these).
OF_MAPS = {"admm": 60, "half_quadratic": 60, "fista": 80, "ista": 80, "coordinate": 64}
BESIDE = 24
# Bytes for every pair of maps below, at every place, of the systems that ADMM's z-step solves.
OF_PAIRS = 24
# Bytes for every value of the planes of an image and, where layer 1 is solved without maps, for
# every value and for every map (a tenth of the coefficients being non-zero). Estimates.
OF_PLANES, OF_SOLVING, OF_ENTRIES = 80, 60, 4


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

    What fits is explained as a whole, and is the same to the bit. Else the module says how, and
    docs/restoration.md how near that comes. ValueError, before any work, for an image too large
    even for that. progress(done, total) is called after every tile of every image.
    """
    layer = net.depth if layer is None else layer
    net.layer(layer)
    if len(images) == 0:
        raise ValueError("0 images: must be at least 1")
    size = tuple(images.shape[2:])
    whole = fits(net, size, layer, memory)
    cut = [Tile.whole(*size)] if whole else plan_image(net, size, layer, memory)
    found = []
    for n, image in enumerate(images.split(1)):

        def report(done: int, n: int = n) -> None:
            if progress:
                progress(n * len(cut) + done, len(images) * len(cut))

        made = _at_once if whole else _in_tiles
        found.append(made(net, image, layer, cut, report))
    pixels, y, painted = (
        torch.cat([getattr(each, key) for each in found]) for key in ("pixels", "y", "painted")
    )
    density = sum(each.density for each in found) / len(found)
    return Reconstruction(pixels, y, painted, density, len(found) * len(cut))


def _at_once(
    net: DeconvNet, image: Tensor, layer: int, cut: list[Tile], report: Callable[[int], None]
) -> Reconstruction:
    codes = net.infer(image, depth=layer)
    report(1)
    pixels, density = net.reconstruct(codes), codes.layer(layer).density
    return Reconstruction(pixels, codes.y, net.synthesize(codes, layer), density, 1)


def _in_tiles(
    net: DeconvNet, image: Tensor, layer: int, cut: list[Tile], report: Callable[[int], None]
) -> Reconstruction:
    base = net.infer(image, depth=0)
    first = _first(net, base.y) if _is_sparse(net) else None
    if first is not None and layer == 1:
        painted = base.y - first.residual
        density = len(first.coefficients.g) / math.prod(first.shape)
        report(1)
    else:
        painted, active = torch.zeros_like(base.y), 0.0
        for n, tile in enumerate(cut, 1):
            below = () if first is None else (pooled_part(net, first, tile),)
            codes = Codes(below, base.y[:, :, tile.rows, tile.columns], [])
            while len(codes.layers) < layer:
                codes = net.infer_next_layer(codes)
            share = tile.share.to(painted)
            painted[:, :, tile.rows, tile.columns] += share * net.synthesize(codes, layer)
            active += codes.layer(layer).density * float(share.sum())
            report(n)
        density = active / image[0, 0].numel()
    pixels = net.preprocessing.inverse(painted, base.record).clamp_(0, 1)
    return Reconstruction(pixels, base.y, painted, density, len(cut))


def _is_sparse(net: DeconvNet) -> bool:
    """Whether layer 1 can be solved without its maps."""
    settings = net.layer(1).settings
    return net.device.type == "cpu" and settings.p == 1 and settings.window is None


def _first(net: DeconvNet, y: Tensor) -> SparseSolution:
    """Layer 1 of one preprocessed image."""
    layer, settings = net.layer(1), net.layer(1).settings
    solver = settings.solver if settings.solver.method == "coordinate" else default_solver(y)
    ones = torch.ones(len(layer.filters)).to(y)
    return solve_whole_image(
        *(layer.operator(), y, Thresholds(ones, ones, settings.group)),
        lam=settings.lam,
        non_negative=settings.non_negative,
        iterations=solver.iterations,
        tolerance=solver.tolerance,
        gap=settings.solver.gap,
    )


def pooled_part(net: DeconvNet, first: SparseSolution, tile: Tile) -> LayerCodes:
    """The codes of layer 1 that paint a tile; first: a solution that knows maps, shape, cost."""
    layer = net.layer(1)
    more = layer.settings.filter_size - 1 if layer.settings.boundary == "valid" else 0
    rows, columns = (slice(of.start, of.stop + more) for of in (tile.rows, tile.columns))
    z, cost = first.maps(rows, columns), (first.reconstruction, first.sparsity)
    return layer.codes(Solution(z, first.residual, *cost, first.iterations, z))


def fits(net: DeconvNet, size: tuple[int, int], depth: int, memory: float) -> bool:
    """Whether an image of H x W pixels can be explained at once."""
    check_memory(memory)
    each = OF_PLANES * 3 + bytes_of_a_pixel(list(net.layers[:depth]))
    return each * math.prod(size) <= memory * GIB


def plan_image(net: DeconvNet, size: tuple[int, int], depth: int, memory: float) -> list[Tile]:
    """The tiles of `reconstruct` for an image that does not fit; ValueError if even they do not."""
    if not _is_sparse(net):
        return plan(net, size, depth, memory)
    C, K = net.preprocessing.channels, len(net.layer(1).filters)
    planes = (OF_PLANES * 3 + OF_SOLVING * C + OF_ENTRIES * K) * math.prod(size) / GIB
    if planes > memory:
        refuse(size, planes, memory)
    net.check_size(size, depth)
    if depth == 1:
        return [Tile.whole(*size)]
    return plan(net, size, depth, memory, first=2, planes=planes)


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
    net.check_size(size, depth)
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
    for number, layer in enumerate(layers, 1):
        if layer.settings.boundary == "circular":
            raise ValueError(
                f"layer{number}.boundary=circular: an image of {size[0]}x{size[1]} pixels needs "
                f"{(planes + each * size[0] * size[1]) / GIB:.1f} GiB, memory={memory:g} allows "
                "less, and an image that wraps around cannot be cut into tiles"
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
            method = settings.solver.method
            own = OF_MAPS[method] * (numbers + through)
            if method in ("admm", "half_quadratic"):
                own += OF_PAIRS * layer.filters.shape[1] ** 2 / area
            most = max(most, own + BESIDE * beside)
        else:
            most = max(most, BESIDE * numbers)
        beside += numbers
        area *= math.prod(settings.pool[1:]) if settings.pool else 1
    return int(most)


def check_memory(memory: float) -> None:
    if not 0 < as_number(memory, "memory") < math.inf:
        raise ValueError(f"memory={memory}: is in GiB, must be a positive number")


def refuse(size: tuple[int, int], needed: float, memory: float) -> None:
    """ValueError that says what would be enough."""
    raise ValueError(
        f"an image of {size[0]}x{size[1]} pixels needs {needed:.2f} GiB, memory={memory:g} allows "
        f"less: give memory={math.ceil(10 * needed) / 10:g} or more, or a smaller image"
    )
