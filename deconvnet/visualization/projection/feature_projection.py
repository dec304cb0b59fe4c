"""Activations of a deconvolutional network in pixel space, each projected separately.

A filter of an upper layer acts on pooled maps, so its appearance in the image depends on the
positions of the maxima below. The feature of a map is therefore shown as in the papers (Zeiler et
al. 2011): find its strongest activation over all images, project only this activation with the
switches of its image, and crop the result to the receptive field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.images.preprocessing import ycbcr_to_rgb
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.arithmetic import Field, receptive_field
from deconvnet.support.torch_modes import plain

# Activations, or images, at a time.
CHUNK = 16
# Bytes of the largest maps of a chunk: the pages of larger arrays are mapped again for each chunk.
MAPS_BYTES = 2**25


@dataclass(frozen=True)
class PixelFeatures:
    """Activations in pixel space, each in a box of its image; often one for every map.

    tiles: (K, C, h, w), the projections in the preprocessed domain; zeros if a map is never active.
    boxes: (K, 4), image index, top, left and the longer side of the tile in pixels of the image;
    top and left are negative if the field reaches beyond the border. values: (K,), the activations.
    """

    tiles: Tensor
    boxes: Tensor
    values: Tensor

    def patches(self, images: Tensor) -> Tensor:
        """(K, C, h, w): the boxes of the images (N, C, H, W); zeros beyond the border."""
        size = tuple(self.tiles.shape[2:])
        corners = self.boxes[:, :3].tolist()
        return torch.stack([crop_box(images[n], top, left, size) for n, top, left in corners])

    def cropped(
        self, image: tuple[int, int], *, energy_share: float = 0.95, tile_share: float = 0.9
    ) -> PixelFeatures:
        """Crop the tiles to smaller squares, all of one size, within images of (H, W) pixels.

        The receptive field of an upper layer is larger than most features, and may be larger than
        the image. The square is centred in the field, but moved into the image. It is
        the smallest square that has at least `energy_share` of the energy of a tile, for at least
        `tile_share` of the tiles with any energy; it is never larger than the field or the image.
        Of a field that is not square, such as that of a signal, the shorter side is cropped only
        where the square is smaller.
        """
        energy = self.tiles.double().square().sum(1)
        total = energy.sum((1, 2))
        active = total > 0
        sums = F.pad(energy.cumsum(1).cumsum(2), (1, 0, 1, 0))
        size, tile = (
            tuple(self.tiles.shape[2:]),
            torch.arange(len(self.tiles), device=energy.device),
        )
        is_square = size[0] == size[1]
        limits = [min(*size, *image)] * 2 if is_square else list(map(min, size, image))
        longest = max(limits)
        field, ends = (torch.tensor(pair, device=energy.device) for pair in (size, limits))
        # In steps of two, so that the square stays centred in the field.
        for side in (*range(2 - max(size) % 2, longest, 2), longest):
            sides = ends.clamp(max=side)
            first = _centred_inside(self.boxes[:, 1:3], field, sides, image) - self.boxes[:, 1:3]
            (top, left), (bottom, right) = (
                torch.minimum(edge.clamp(min=0), field).unbind(1) for edge in (first, first + sides)
            )
            covered = sums[tile, bottom, right] - sums[tile, top, right]
            covered = covered - sums[tile, bottom, left] + sums[tile, top, left]
            if (covered >= energy_share * total)[active].sum() >= tile_share * active.sum():
                break
        h, w = sides.tolist()
        corners = zip(self.tiles, first.tolist(), strict=True)
        tiles = torch.stack([crop_box(y, top, left, (h, w)) for y, (top, left) in corners])
        corners = self.boxes[:, 1:3] + first
        longer = torch.full_like(corners[:, :1], max(h, w))
        return PixelFeatures(tiles, torch.cat([self.boxes[:, :1], corners, longer], 1), self.values)


@plain
def pixel_features(net: DeconvNet, codes: Codes, layer: int) -> PixelFeatures:
    """The strongest activation of every map over the images of the codes, in pixel space.

    Each is projected with its sign and unit magnitude. Activations whose receptive field lies
    inside the image take precedence, because most of a feature is cut off at the border.
    """
    n, i, j, values = _strongest_of_maps(net, codes, layer)
    maps = torch.arange(len(n), device=n.device)
    return project_fields(net, codes, layer, (n, maps, i, j), values.sign(), values)


@plain
def project_fields(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    positions: tuple[Tensor, Tensor, Tensor, Tensor],
    coefficients: Tensor,
    values: Tensor,
) -> PixelFeatures:
    """Activations projected separately and cropped to their fields; arguments: `project_units`."""
    n, _, i, j = positions
    rows, columns = (layer_field(net, layer, axis) for axis in (0, 1))
    corners = rows.offset + rows.stride * i, columns.offset + columns.stride * j
    size = tile_size(rows.size, columns.size)
    boxes = torch.stack([n, *corners, torch.full_like(n, max(size))], 1)
    projected = project_units(net, codes, layer, positions, coefficients)
    tiles = [
        crop_box(y, top, left, size)
        for y, (_, top, left, _) in zip(projected, boxes.tolist(), strict=True)
    ]
    return PixelFeatures(torch.stack(tiles), boxes, values)


def project_units(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    positions: tuple[Tensor, Tensor, Tensor, Tensor],
    coefficients: Tensor,
) -> Iterator[Tensor]:
    """Yield R_l of each of M separate activations, (C, H, W), with the switches of its image.

    positions: image, map, row and column, (M,) each; coefficients: (M,).
    """
    numel = max(math.prod(codes.layer(number).shape) for number in range(1, layer + 1))
    size = max(1, min(CHUNK, MAPS_BYTES // (numel * coefficients.element_size())))
    for chunk in torch.arange(len(coefficients), device=coefficients.device).split(size):
        n, k, i, j = (index[chunk] for index in positions)
        z = coefficients.new_zeros(len(chunk), *codes.layer(layer).shape)
        z[torch.arange(len(chunk), device=z.device), k, i, j] = coefficients[chunk]
        yield from net.operator(codes, layer, n)(z)


def layer_field(net: DeconvNet, layer: int, axis: int) -> Field:
    """The receptive field of the units of a layer, along the rows (axis 0) or the columns (1)."""
    settings = [net.layer(number).settings for number in range(1, layer + 1)]
    pools = [s.pool[1 + axis] if s.pool else 1 for s in settings[:-1]]
    sizes = [s.filter_shape[axis] for s in settings]
    return receptive_field(sizes, pools, [s.boundary for s in settings])


def signed_rgb(net: DeconvNet, f: Tensor) -> Tensor:
    """Signed tiles (K, C, h, w) in the colour planes of a network as signed RGB, or grey (C = 1).

    Of arrays, the three channels with the most energy are red, green and blue
    (`Preprocessing.shown_channels`).
    """
    if net.preprocessing.are_arrays:
        return f[:, net.preprocessing.shown_channels]
    if net.preprocessing.settings.color != "ycbcr":
        return f
    return ycbcr_to_rgb(f) - ycbcr_to_rgb(torch.zeros_like(f))


def signed_filters(net: DeconvNet) -> Tensor:
    """The filters of layer 1 as signed tiles, RGB (K, 3, h, w) or grey (K, 1, h, w).

    Filters of arrays with more than three channels show all of them, `side_by_side`.
    """
    f = net.layer(1).filters
    return signed_rgb(net, f) if f.shape[1] <= 3 else side_by_side(f)


def side_by_side(f: Tensor) -> Tensor:
    """The C channels of filters (K, C, h, w) in one plane (K, 1, H, W), in reading order.

    Zeros lie between them. The channels of filters of one row are the rows, without a gap.
    """
    K, C, h, w = f.shape
    columns, gap = (1, 0) if h == 1 else (math.ceil(math.sqrt(C)), 1)
    rows = -(-C // columns)
    f = torch.cat([f, f.new_zeros(K, rows * columns - C, h, w)], 1)
    f = F.pad(f, (0, gap, 0, gap)).view(K, rows, columns, h + gap, w + gap).transpose(2, 3)
    plane = f.reshape(K, 1, rows * (h + gap), columns * (w + gap))
    return plane[:, :, : plane.shape[2] - gap, : plane.shape[3] - gap]


def shown_pixels(net: DeconvNet, images: Tensor, *, like: Tensor | None = None) -> Tensor:
    """The images (N, C, H, W) that a network takes as RGB pixels (N, 3, H, W) in [0, 1].

    Of arrays, three channels as in `signed_rgb`; the range of each array, or of the array in `like`
    that it reconstructs, becomes [0, 1].
    """
    if net.preprocessing.are_arrays:
        channels = net.preprocessing.shown_channels
        images, like = images[:, channels], (images if like is None else like)[:, channels]
        low, high = like.flatten(1).aminmax(dim=1)
        low, high = low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1)
        images = (images - low) / torch.where(high > low, high - low, torch.ones_like(high))
    return images.expand(-1, 3, -1, -1)


def _strongest_of_maps(
    net: DeconvNet, codes: Codes, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(image, row, column, value), each (K,), of the largest |z| of every map, inside if possible.

    A few images at a time, because dense maps can be far larger than codes.
    """
    layer_codes = codes.layer(layer)
    K, H, W = layer_codes.shape
    fields_inside = _whole_fields(net, layer, (H, W), tuple(codes.y.shape[2:])).to(codes.y.device)
    # Among activations with a whole field; and among all, for maps without any of the former.
    best = [_Best.none(K, codes.y) for _ in range(2)]
    for start in range(0, len(layer_codes), CHUNK):
        z = layer_codes.select(slice(start, start + CHUNK)).z.transpose(0, 1)
        for candidate, allowed in zip(
            best, (fields_inside, torch.ones_like(fields_inside)), strict=True
        ):
            candidate.update(z, allowed, start)
    inside, anywhere = best
    use = inside.strength > 0
    index = torch.where(use, inside.index, anywhere.index)
    value = torch.where(use, inside.value, anywhere.value)
    return index // (H * W), index // W % H, index % W, value


@dataclass
class _Best:
    """The strongest activation of every map so far; among equals, the first.

    index: of the activation in the maps (N, H, W) of all images, flattened.
    """

    strength: Tensor
    index: Tensor
    value: Tensor

    @classmethod
    def none(cls, K: int, like: Tensor) -> _Best:
        return cls(
            like.new_full((K,), -1.0),
            torch.zeros(K, dtype=torch.long, device=like.device),
            like.new_zeros(K),
        )

    def update(self, z: Tensor, allowed: Tensor, start: int) -> None:
        """z: (K, N, H, W), of the images from index `start`; allowed: (H, W), where to search."""
        strength, index = (z.abs() * allowed).flatten(1).max(1)
        value = z.flatten(1).gather(1, index[:, None])[:, 0]
        better = strength > self.strength
        index = index + start * allowed.numel()
        self.strength = torch.where(better, strength, self.strength)
        self.index = torch.where(better, index, self.index)
        self.value = torch.where(better, value, self.value)


def _whole_fields(
    net: DeconvNet, layer: int, shape: tuple[int, int], image: tuple[int, int]
) -> Tensor:
    """(H, W): whether the receptive field of a unit there lies inside the image."""
    rows, columns = (
        torch.tensor([first >= 0 and last <= size for first, last in map(field.pixels, range(n))])
        for field, n, size in zip(
            (layer_field(net, layer, 0), layer_field(net, layer, 1)), shape, image, strict=True
        )
    )
    return rows[:, None] & columns


def tile_size(height: int, width: int) -> tuple[int, int]:
    """(h, w) of the tiles of a receptive field: a square, unless one side is more than twice as
    long as the other, as in signals."""
    longer = max(height, width)
    return (height, width) if longer > 2 * min(height, width) else (longer, longer)


def _centred_inside(
    corners: Tensor, field: Tensor, sides: Tensor, image: tuple[int, int]
) -> Tensor:
    """Corners (K, 2) of boxes with two `sides`, centred in larger ones and moved into the image."""
    room = torch.tensor(image, device=corners.device) - sides
    return (corners + (field - sides) // 2).clamp(min=torch.zeros_like(room), max=room)


def crop_box(image: Tensor, top: int, left: int, size: tuple[int, int]) -> Tensor:
    """A box (C, h, w) of an image, which may reach beyond it; zeros there. size: (h, w)."""
    (H, W), (h, w) = image.shape[1:], size
    padding = (max(-left, 0), max(left + w - W, 0), max(-top, 0), max(top + h - H, 0))
    padded = F.pad(image, padding)
    top, left = max(top, 0), max(left, 0)
    return padded[:, top : top + h, left : left + w]
