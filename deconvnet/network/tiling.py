"""Inference of images that are too large for memory, in overlapping tiles.

On a CPU, layer 1 needs no tiles: `whole_image` solves it for the whole image and stores only its
non-zero coefficients. Ties between nearly equal maxima of a window are then resolved in the same
way for all layers above, wherever tiles begin.

The layers above couple all positions of an image, but the influence of a pixel decays within a few
times the reach of the filters. Each tile is therefore inferred together with a margin of its
surroundings, and adjacent tiles are blended over their overlap, which leaves no seams. Tiles begin
where pooling windows begin, so that no window is cut. If layer 1 cannot be solved sparsely (p < 1,
pooling in the loop, or on a GPU), it is inferred in the same tiles.

Each tile is inferred by `network` as any image is; this module chooses the size of the tiles and
combines their results.

    memory: in GiB, in addition to the memory of the program itself
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deconvnet.network.codes import Codes, LayerCodes
from deconvnet.network.layer import CONVOLUTION, PATCHES, Layer
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet, Progress
from deconvnet.sparse_coding.problem import Solution
from deconvnet.sparse_coding.solve import default_solver
from deconvnet.sparse_coding.whole_image import SparseSolution, Thresholds, solve_whole_image
from deconvnet.support.validation import as_number

GIB = 2**30
# The default of `memory`.
MEMORY = 4.0
# The margin of a tile, as a multiple of the reach of all filters.
MARGIN_FACTOR = 6
# Bytes per coefficient of the maps of a layer during inference, by solver, and per coefficient of
# the maps below that are held at the same time. Rounded up from measurements at 400x400 (ADMM,
# FISTA, coordinate descent; the other methods use the same numbers).
MAP_BYTES = {"admm": 60, "half_quadratic": 60, "fista": 80, "ista": 80, "coordinate": 64}
HELD_MAP_BYTES = 24
# Bytes per position and pair of input channels, for the systems that the z-step of ADMM solves.
PAIR_BYTES = 24
# Bytes per position and number of a patch: patches, their residual and a copy of each.
PATCH_BYTES = 16
# Bytes per value of the image planes and, if layer 1 is solved sparsely, per value and per map
# (assuming that a tenth of the coefficients are non-zero). Estimates.
PLANE_BYTES, SPARSE_VALUE_BYTES, SPARSE_MAP_BYTES = 80, 60, 4


@dataclass(frozen=True)
class Tile:
    """A part of an image: its rows and columns, and how its pixels are weighted.

    row_weights (rows,), column_weights (columns,): 1 inside, falling to 0 towards the next tile;
    the weights of all tiles sum to 1 at every pixel.
    """

    rows: slice
    columns: slice
    row_weights: Tensor
    column_weights: Tensor

    @classmethod
    def whole(cls, H: int, W: int) -> Tile:
        """The whole image."""
        return cls(slice(0, H), slice(0, W), torch.ones(H), torch.ones(W))

    @property
    def weights(self) -> Tensor:
        """(rows, columns): the weight of every pixel."""
        return self.row_weights[:, None] * self.column_weights


def tiles(size: tuple[int, int], side: int, margin: int, step: int) -> list[Tile]:
    """Tiles of at most side x side pixels, margins included, that cover an image of H x W pixels.

    Neighbours overlap by two margins and are blended over the middle half of the overlap. All tiles
    begin at multiples of `step`. Raises ValueError if the margins fill a tile entirely.
    """
    margin = step * -(-margin // step)
    inner = (side - 2 * margin) // step * step
    if inner < max(step, margin):
        raise ValueError(f"tiles of {side}x{side} pixels: need at least {3 * margin}")
    rows, columns = ([*_tiles_along(length, inner, margin)] for length in size)
    return [Tile(r, c, vertical, horizontal) for r, vertical in rows for c, horizontal in columns]


def _tiles_along(length: int, inner: int, margin: int) -> Iterator[tuple[slice, Tensor]]:
    """The extents of the tiles along one axis, and their weights."""
    count = max(1, -(-(length - 2 * margin) // inner))
    ramp = torch.linspace(0, 1, margin + 2)[1:-1] if margin else torch.ones(0)
    for n in range(count):
        first, last = n == 0, n == count - 1
        start = 0 if first else n * inner
        stop = length if last else (n + 1) * inner + 2 * margin
        weights, edge = torch.ones(stop - start), margin // 2
        if not first:
            weights[:edge], weights[edge : edge + margin] = 0, ramp
        if not last:
            overlap = weights[len(weights) - 2 * margin :]
            overlap[edge : edge + margin], overlap[edge + margin :] = 1 - ramp, 0
        yield slice(start, stop), weights


@dataclass(frozen=True)
class Reconstruction:
    """Images reconstructed from the maps of one layer.

    pixels: (N, 1 or 3, H, W) in [0, 1], or arrays; y, estimate: (N, C, H, W), the preprocessed
    images and their reconstruction; density: fraction of non-zero coefficients; tiles: the number
    of tiles of all images.
    """

    pixels: Tensor
    y: Tensor
    estimate: Tensor
    density: float
    tiles: int

    @property
    def snr(self) -> float:
        """In dB, in the preprocessed domain."""
        return snr(self.y, self.estimate)


@torch.no_grad()
def reconstruct(
    net: DeconvNet,
    images: Tensor,
    layer: int | None = None,
    *,
    memory: float = MEMORY,
    progress: Progress | None = None,
) -> Reconstruction:
    """Images reconstructed from the maps of a layer (default: the highest) within `memory` GiB.

    images: as `DeconvNet.infer` takes them, processed one by one. An image that fits is inferred
    as a whole and equals `net.reconstruct` of `net.infer` bit for bit. A larger one is inferred in
    tiles; docs/restoration.md gives the error of this. Raises ValueError before any work if even
    the smallest tiles do not fit. progress(done, total) is called after every tile of every image.
    """
    layer = net.depth if layer is None else layer
    net.layer(layer)
    if len(images) == 0:
        raise ValueError("0 images: must be at least 1")
    size = tuple(images.shape[2:])
    in_one_piece = fits(net, size, layer, memory)
    layout = [Tile.whole(*size)] if in_one_piece else plan_image(net, size, layer, memory)
    reconstruct_image = _reconstruct_whole if in_one_piece else _reconstruct_in_tiles
    parts = []
    for n, image in enumerate(images.split(1)):

        def report(done: int, n: int = n) -> None:
            if progress:
                progress(n * len(layout) + done, len(images) * len(layout))

        parts.append(reconstruct_image(net, image, layer, layout, report))
    pixels, y, estimate = (
        torch.cat([getattr(part, key) for part in parts]) for key in ("pixels", "y", "estimate")
    )
    density = sum(part.density for part in parts) / len(parts)
    return Reconstruction(pixels, y, estimate, density, len(parts) * len(layout))


@torch.no_grad()
def reconstruct_from(net: DeconvNet, codes: Codes, layer: int) -> Reconstruction:
    """The same for images that were inferred as a whole."""
    pixels, density = net.reconstruct(codes, layer), codes.layer(layer).density
    return Reconstruction(pixels, codes.y, net.synthesize(codes, layer), density, len(codes.y))


def _reconstruct_whole(
    net: DeconvNet, image: Tensor, layer: int, layout: list[Tile], report: Callable[[int], None]
) -> Reconstruction:
    codes = net.infer(image, depth=layer)
    report(1)
    return reconstruct_from(net, codes, layer)


def _reconstruct_in_tiles(
    net: DeconvNet, image: Tensor, layer: int, layout: list[Tile], report: Callable[[int], None]
) -> Reconstruction:
    base = net.infer(image, depth=0)
    first = _solve_first_layer(net, base.y) if _is_sparse(net) else None
    if first is not None and layer == 1:
        estimate = base.y - first.residual
        density = len(first.coefficients.g) / math.prod(first.shape)
        report(1)
    else:
        estimate, active = torch.zeros_like(base.y), 0.0
        for n, tile in enumerate(layout, 1):
            first_codes = () if first is None else (codes_of_tile(net, first, tile),)
            codes = Codes(first_codes, base.y[:, :, tile.rows, tile.columns], [])
            while len(codes.layers) < layer:
                codes = net.infer_next_layer(codes)
            weights = tile.weights.to(estimate)
            estimate[:, :, tile.rows, tile.columns] += weights * net.synthesize(codes, layer)
            active += codes.layer(layer).density * float(weights.sum())
            report(n)
        density = active / image[0, 0].numel()
    pixels = net.preprocessing.pixels(estimate, base.record)
    return Reconstruction(pixels, base.y, estimate, density, len(layout))


def _is_sparse(net: DeconvNet) -> bool:
    """Whether layer 1 can be solved without storing its maps."""
    settings = net.layer(1).settings
    convolves = settings.coding == CONVOLUTION
    return net.device.type == "cpu" and convolves and settings.p == 1 and settings.window is None


def _solve_first_layer(net: DeconvNet, y: Tensor) -> SparseSolution:
    """The sparse solution of layer 1 for one preprocessed image."""
    layer, settings = net.layer(1), net.layer(1).settings
    solver = settings.solver if settings.solver.method == "coordinate" else default_solver(y)
    ones = torch.ones(len(layer.filters)).to(y)
    return solve_whole_image(
        *(layer.operator(), y, Thresholds(ones, ones, settings.group)),
        lam=layer.lam,
        non_negative=settings.non_negative,
        iterations=solver.iterations,
        tolerance=solver.tolerance,
        gap=settings.solver.gap,
    )


def codes_of_tile(net: DeconvNet, first: SparseSolution, tile: Tile) -> LayerCodes:
    """The codes of layer 1 at the positions that contribute to a tile.

    first: the solution of layer 1 for the whole image.
    """
    layer = net.layer(1)
    valid, (h, w) = layer.settings.boundary == "valid", layer.settings.filter_shape
    rows, columns = (
        slice(s.start, s.stop + valid * (side - 1))
        for s, side in ((tile.rows, h), (tile.columns, w))
    )
    z, cost = first.maps(rows, columns), (first.reconstruction, first.sparsity)
    return layer.codes(Solution(z, first.residual, *cost, first.iterations, z))


def fits(net: DeconvNet, size: tuple[int, int], depth: int, memory: float) -> bool:
    """Whether an image of H x W pixels can be inferred as a whole within `memory` GiB."""
    check_memory(memory)
    per_pixel = _plane_bytes(net) + bytes_per_pixel(list(net.layers[:depth]))
    return per_pixel * math.prod(size) <= memory * GIB


def plan_image(net: DeconvNet, size: tuple[int, int], depth: int, memory: float) -> list[Tile]:
    """The tiles of `reconstruct` for an image that does not fit; ValueError if no tiles fit."""
    if not _is_sparse(net):
        return plan(net, size, depth, memory)
    C, K = net.preprocessing.channels, len(net.layer(1).filters)
    planes = (
        (_plane_bytes(net) + SPARSE_VALUE_BYTES * C + SPARSE_MAP_BYTES * K) * math.prod(size) / GIB
    )
    if planes > memory:
        raise_too_large(size, planes, memory)
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
    """The tiles in which layers `first` to `depth` infer an image of H x W pixels in `memory` GiB.

    One tile if the image fits. planes: in GiB, the memory needed in addition to the maps (None: for
    the image planes). If even the smallest tiles do not fit, the ValueError gives their memory.
    """
    check_memory(memory)
    net.check_size(size, depth)
    layers = list(net.layers[:depth])
    if planes is None:
        planes = _plane_bytes(net) * size[0] * size[1] / GIB
    planes *= GIB
    per_pixel = bytes_per_pixel(layers, first)
    if planes + per_pixel * size[0] * size[1] <= memory * GIB:
        return [Tile.whole(*size)]
    margin, step = tile_margin(layers)
    # Tiles never extend beyond the image.
    smallest = min(size[0], 3 * margin + step) * min(size[1], 3 * margin + step)
    needed = (planes + per_pixel * smallest) / GIB
    if needed > memory:
        raise_too_large(size, needed, memory)
    whole_memory = (planes + per_pixel * size[0] * size[1]) / GIB
    for number, layer in enumerate(layers, 1):
        if layer.settings.boundary == "circular":
            raise ValueError(
                f"layer{number}.boundary=circular: an image of {size[0]}x{size[1]} pixels needs "
                f"{whole_memory:.1f} GiB, memory={memory:g} allows "
                "less, and an image that wraps around cannot be split into tiles"
            )
    pixels = (memory * GIB - planes) / per_pixel
    # Tiles of a narrow image, such as a signal, are as narrow as it is.
    side = int(max(math.sqrt(pixels), pixels / min(size)))
    return tiles(size, max(side, 3 * margin + step), margin, step)


def tile_margin(layers: list[Layer]) -> tuple[int, int]:
    """(margin, step) of tiles in pixels: from the reach of the filters, and the pooling windows."""
    reach, step = 0, 1
    for layer in layers:
        reach += (max(layer.settings.filter_shape) - 1) * step
        step *= math.lcm(*layer.settings.pool[1:]) if layer.settings.pool else 1
    margin = max(8, MARGIN_FACTOR * reach)
    return step * -(-margin // step), step


def bytes_per_pixel(layers: list[Layer], first: int = 1) -> int:
    """Bytes per pixel of an image that inference of layer `first` and those above takes."""
    peak, area, coefficients_below = 0.0, 1, 0.0
    for number, layer in enumerate(layers, 1):
        settings = layer.settings
        coefficients = settings.num_maps / area
        decoded = coefficients_below if settings.target != "maps" else 0.0
        if number >= first:
            method = settings.solver.method
            layer_bytes = MAP_BYTES[method] * (coefficients + decoded)
            channels = layer.atoms.shape[1]
            if method in ("admm", "half_quadratic"):
                layer_bytes += PAIR_BYTES * channels**2 / area
            if settings.coding == PATCHES:
                layer_bytes += PATCH_BYTES * channels / area
            peak = max(peak, layer_bytes + HELD_MAP_BYTES * coefficients_below)
        else:
            peak = max(peak, HELD_MAP_BYTES * coefficients)
        coefficients_below += coefficients
        area *= math.prod(settings.pool[1:]) if settings.pool else 1
    return int(peak)


def _plane_bytes(net: DeconvNet) -> int:
    """Bytes per pixel for the planes of an image, of which pictures need at least three."""
    return PLANE_BYTES * max(3, net.preprocessing.channels)


def check_memory(memory: float) -> None:
    """Raise ValueError unless memory is a positive number of GiB."""
    if not 0 < as_number(memory, "memory") < math.inf:
        raise ValueError(f"memory={memory}: is in GiB, must be a positive number")


def raise_too_large(size: tuple[int, int], needed: float, memory: float) -> None:
    """Raise a ValueError that gives the memory that would suffice."""
    raise ValueError(
        f"an image of {size[0]}x{size[1]} pixels needs {needed:.2f} GiB, memory={memory:g} allows "
        f"less: give memory={math.ceil(10 * needed) / 10:g} or more, or a smaller image"
    )
