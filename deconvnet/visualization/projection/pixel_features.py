"""The features of a layer in pixel space: each map's strongest activation, projected down.

A filter of an upper layer lives on pooled maps; what it looks like in the image depends on where
the maxima below stood. So each is shown as the papers do it (Zeiler et al. 2011): find the
strongest activation of the map over all images, keep the switches of that image, project that one
activation alone, and cut out what it can reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.images.preprocessing import ycbcr_to_rgb
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.operators.arithmetic import Field, receptive_field
from deconvnet.support.modes import plain

CHUNK = 16


@dataclass(frozen=True)
class PixelFeatures:
    """Some activations in pixel space, each in a square of its image; often one for every map.

    tiles: (K, C, S, S) the projections, in the preprocessed domain; zeros where a map is never
    active. boxes: (K, 4) their places as image index, top, left, side S in pixels of the image (top
    and left may be negative: the field reaches beyond the border). values: (K,) the activations.
    """

    tiles: Tensor
    boxes: Tensor
    values: Tensor

    def patches(self, images: Tensor) -> Tensor:
        """(K, C, S, S): what the tiles explain, cut from images (N, C, H, W), zeros beyond."""
        return torch.stack([crop_square(images[n], *box) for n, *box in self.boxes.tolist()])

    def cropped(
        self, image: tuple[int, int], *, share: float = 0.95, among: float = 0.9
    ) -> PixelFeatures:
        """The same in smaller squares of images of (H, W) pixels, of one size for all tiles.

        The field of an upper layer is larger than what most of its features paint, and may be
        larger than the image. The square is about the middle of the field, moved where it would
        reach beyond the image, and the smallest with at least `share` of the energy in `among` of
        all tiles that have any; never larger than the field or the image.
        """
        energy = self.tiles.double().square().sum(1)
        total = energy.sum((1, 2))
        active = total > 0
        sums = F.pad(energy.cumsum(1).cumsum(2), (1, 0, 1, 0))
        size, tile = self.tiles.shape[2], torch.arange(len(self.tiles), device=energy.device)
        limit = min(size, *image)
        # Steps of two: the middle of the square stays the middle of the field.
        for side in (*range(2 - size % 2, limit, 2), limit):
            first = _inside(self.boxes[:, 1:3], size, side, image) - self.boxes[:, 1:3]
            (top, left), (bottom, right) = (
                edge.clamp(0, size).unbind(1) for edge in (first, first + side)
            )
            kept = sums[tile, bottom, right] - sums[tile, top, right]
            kept = kept - sums[tile, bottom, left] + sums[tile, top, left]
            if (kept >= share * total)[active].sum() >= among * active.sum():
                break
        places = zip(self.tiles, first.tolist(), strict=True)
        tiles = torch.stack([crop_square(y, top, left, side) for y, (top, left) in places])
        corners = self.boxes[:, 1:3] + first
        sides = torch.full_like(corners[:, :1], side)
        return PixelFeatures(tiles, torch.cat([self.boxes[:, :1], corners, sides], 1), self.values)


@plain
def pixel_features(net: DeconvNet, codes: Codes, layer: int) -> PixelFeatures:
    """The strongest activation of every map over the images of the codes, in pixel space.

    Each with its sign and unit value. Activations whose whole field lies inside the image are
    preferred: at the border most of a feature is cut off.
    """
    n, i, j, values = _strongest_of_maps(net, codes, layer)
    maps = torch.arange(len(n), device=n.device)
    return project_fields(net, codes, layer, (n, maps, i, j), values.sign(), values)


@plain
def project_fields(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    places: tuple[Tensor, Tensor, Tensor, Tensor],
    coefficients: Tensor,
    values: Tensor,
) -> PixelFeatures:
    """Each of some activations alone, cut to its field; places, coefficients as `project_each`."""
    n, _, i, j = places
    rows, columns = (layer_field(net, layer, axis) for axis in (0, 1))
    corners = rows.offset + rows.stride * i, columns.offset + columns.stride * j
    boxes = torch.stack([n, *corners, torch.full_like(n, max(rows.size, columns.size))], 1)
    painted = project_units(net, codes, layer, places, coefficients)
    tiles = [crop_square(y, *box) for y, (_, *box) in zip(painted, boxes.tolist(), strict=True)]
    return PixelFeatures(torch.stack(tiles), boxes, values)


def project_units(
    net: DeconvNet,
    codes: Codes,
    layer: int,
    places: tuple[Tensor, Tensor, Tensor, Tensor],
    coefficients: Tensor,
) -> Iterator[Tensor]:
    """R_l of each of some activations alone, (C, H, W), with the switches of its own image.

    places: image, map, row, column, (M,) each; coefficients: (M,).
    """
    for chunk in torch.arange(len(coefficients), device=coefficients.device).split(CHUNK):
        n, k, i, j = (index[chunk] for index in places)
        one = coefficients.new_zeros(len(chunk), *codes.layer(layer).shape)
        one[torch.arange(len(chunk), device=one.device), k, i, j] = coefficients[chunk]
        yield from net.operator(codes.select(n), layer)(one)


def layer_field(net: DeconvNet, layer: int, axis: int) -> Field:
    """The pixels that a unit of a layer reaches, along the rows (axis 0) or the columns (1)."""
    settings = [net.layer(number).settings for number in range(1, layer + 1)]
    pools = [s.pool[1 + axis] if s.pool else 1 for s in settings[:-1]]
    return receptive_field([s.filter_size for s in settings], pools, [s.boundary for s in settings])


def signed_rgb(net: DeconvNet, f: Tensor) -> Tensor:
    """Signed tiles in the network's colour planes as signed red, green and blue."""
    if net.preprocessing.settings.color != "ycbcr":
        return f
    return ycbcr_to_rgb(f) - ycbcr_to_rgb(torch.zeros_like(f))


def _strongest_of_maps(
    net: DeconvNet, codes: Codes, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(image, row, column, value), each (K,), of the largest |z| of every map, inside if possible.

    Some images at a time: the maps of all of them can be far larger than their codes.
    """
    found = codes.layer(layer)
    K, H, W = found.shape
    whole = _whole_fields(net, layer, (H, W), tuple(codes.y.shape[2:])).to(codes.y.device)
    # First of the activations whose field is whole, then of all, for maps that have no other.
    best = [_Best.none(K, codes.y) for _ in range(2)]
    for start in range(0, len(found), CHUNK):
        z = found.select(slice(start, start + CHUNK)).z.transpose(0, 1)
        for kept, allowed in zip(best, (whole, torch.ones_like(whole)), strict=True):
            kept.update(z, allowed, start)
    inside, anywhere = best
    use = inside.strength > 0
    place, value = (
        torch.where(use, a, b)
        for a, b in ((inside.place, anywhere.place), (inside.value, anywhere.value))
    )
    return place // (H * W), place // W % H, place % W, value


@dataclass
class _Best:
    """The strongest activation of every map so far; of equals the first."""

    strength: Tensor
    place: Tensor
    value: Tensor

    @classmethod
    def none(cls, K: int, like: Tensor) -> _Best:
        return cls(
            like.new_full((K,), -1.0),
            torch.zeros(K, dtype=torch.long, device=like.device),
            like.new_zeros(K),
        )

    def update(self, z: Tensor, allowed: Tensor, start: int) -> None:
        """z: (K, N, H, W), the first image being number `start`; allowed: (H, W)."""
        strength, place = (z.abs() * allowed).flatten(1).max(1)
        value = z.flatten(1).gather(1, place[:, None])[:, 0]
        better = strength > self.strength
        place = place + start * allowed.numel()
        self.strength = torch.where(better, strength, self.strength)
        self.place = torch.where(better, place, self.place)
        self.value = torch.where(better, value, self.value)


def _whole_fields(
    net: DeconvNet, layer: int, shape: tuple[int, int], image: tuple[int, int]
) -> Tensor:
    """(H, W): whether the field of an activation there lies wholly inside the image."""
    rows, columns = (
        torch.tensor([first >= 0 and last <= size for first, last in map(field.pixels, range(n))])
        for field, n, size in zip(
            (layer_field(net, layer, 0), layer_field(net, layer, 1)), shape, image, strict=True
        )
    )
    return rows[:, None] & columns


def _inside(corners: Tensor, size: int, side: int, image: tuple[int, int]) -> Tensor:
    """Corners (K, 2) of squares in the middle of larger ones, moved into the image."""
    room = torch.tensor(image, device=corners.device) - side
    return (corners + (size - side) // 2).clamp(min=torch.zeros_like(room), max=room)


def crop_square(image: Tensor, top: int, left: int, side: int) -> Tensor:
    """The square (C, side, side) of an image at a place that may reach beyond it, zeros there."""
    H, W = image.shape[1:]
    padding = (max(-left, 0), max(left + side - W, 0), max(-top, 0), max(top + side - H, 0))
    padded = F.pad(image, padding)
    top, left = max(top, 0), max(left, 0)
    return padded[:, top : top + side, left : left + side]
