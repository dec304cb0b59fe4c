"""The features of a layer in pixel space: each map's strongest activation, projected down.

A filter of an upper layer lives on pooled maps; what it looks like in the image depends on where
the maxima below stood. So each is shown as the papers do it (Zeiler et al. 2011): find the
strongest activation of the map over all images, keep the switches of that image, project that one
activation alone, and cut out what it can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.arithmetic import Field, receptive_field
from deconvnet.network import Codes, DeconvNet

CHUNK = 16


@dataclass(frozen=True)
class Features:
    """One tile for every map of a layer.

    tiles: (K, C, S, S) the projection of the strongest activation, with its sign and unit value, in
    the preprocessed domain; zeros where the map is never active. boxes: (K, 4) its place as image
    index, top, left, side S in pixels of the image (top and left may be negative: the field reaches
    beyond the border). values: (K,) the activation.
    """

    tiles: Tensor
    boxes: Tensor
    values: Tensor

    def patches(self, images: Tensor) -> Tensor:
        """(K, C, S, S): what the tiles explain, cut from images (N, C, H, W), zeros beyond."""
        return torch.stack([_cut(images[n], *box) for n, *box in self.boxes.tolist()])


@torch.no_grad()
def pixel_features(net: DeconvNet, codes: Codes, layer: int) -> Features:
    """The strongest activation of every map over the images of the codes, in pixel space.

    Activations whose whole field lies inside the image are preferred: at the border most of a
    feature is cut off.
    """
    z = codes.layer(layer).z
    image_size = tuple(codes.y.shape[2:])
    rows, columns = (_field(net, layer, axis) for axis in (0, 1))
    n, i, j = _strongest(z, rows, columns, image_size)
    values = z[n, torch.arange(z.shape[1], device=z.device), i, j]
    tops, lefts = rows.offset + rows.stride * i, columns.offset + columns.stride * j
    side = max(rows.size, columns.size)
    tiles = []
    for maps in torch.arange(z.shape[1], device=z.device).split(CHUNK):
        images = codes.select(n[maps])
        one = torch.zeros_like(images.layer(layer).z)
        one[torch.arange(len(maps)), maps, i[maps], j[maps]] = values[maps].sign()
        painted = net.operator(images, layer)(one)
        places = zip(painted, tops[maps].tolist(), lefts[maps].tolist(), strict=True)
        tiles += [_cut(y, top, left, side) for y, top, left in places]
    boxes = torch.stack([n, tops, lefts, torch.full_like(n, side)], 1)
    return Features(torch.stack(tiles), boxes, values)


def _field(net: DeconvNet, layer: int, axis: int) -> Field:
    settings = [net.layer(number).settings for number in range(1, layer + 1)]
    pools = [s.pool[1 + axis] if s.pool else 1 for s in settings[:-1]]
    return receptive_field([s.filter_size for s in settings], pools, [s.boundary for s in settings])


def _strongest(
    z: Tensor, rows: Field, columns: Field, image: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(image, row, column), each (K,), of the largest |z| of every map, inside if possible."""
    inside = [
        torch.tensor(
            [first >= 0 and last <= size for first, last in map(field.pixels, range(count))]
        )
        for field, size, count in zip((rows, columns), image, z.shape[2:], strict=True)
    ]
    whole = (inside[0][:, None] & inside[1]).to(z.device)
    strength = z.abs().transpose(0, 1)
    # Whole fields first; cut ones only for maps that have nothing else.
    preferred = strength * whole
    empty = preferred.flatten(1).amax(1) == 0
    strength = torch.where(empty.view(-1, 1, 1, 1), strength, preferred).flatten(1)
    place = strength.argmax(1)
    H, W = z.shape[2:]
    return place // (H * W), place // W % H, place % W


def _cut(image: Tensor, top: int, left: int, side: int) -> Tensor:
    """The square (C, side, side) of an image at a place that may reach beyond it, zeros there."""
    H, W = image.shape[1:]
    padding = (max(-left, 0), max(left + side - W, 0), max(-top, 0), max(top + side - H, 0))
    padded = F.pad(image, padding)
    top, left = max(top, 0), max(left, 0)
    return padded[:, top : top + side, left : left + side]
