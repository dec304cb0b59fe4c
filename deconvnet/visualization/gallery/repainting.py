"""Repainting: a reconstruction of a deconvolutional network as a sum of single activations.

R_l is linear once the switches are fixed (`network.operator`), so the reconstruction R_l z is the
sum of the projections of all activations. A page can therefore repaint it with any of them left out
by adding and subtracting tiles, without the network.

    reconstruction = tile_1 + ... + tile_U + group_1 + ... + rest       U activations

The strongest are separate; a reconstruction has thousands more, so the next ones are projected in
groups, each of which has three times as many as all before it. Everything is rounded to integers
here (`rest` to 16 bits, all else to 8), and `rest` is what the rounded pictures leave, so that the
sum in the page is the reconstruction up to 16 bits.
"""

from __future__ import annotations

import base64

import numpy as np
import torch
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.visualization.gallery.exhibits import Repainting
from deconvnet.visualization.projection.feature_projection import project_units, signed_rgb

# Activations that can be switched on and off, and the number of values of all their tiles together.
ACTIVATIONS = 80
LARGEST = 450_000
# The last rank of a group, relative to that of the group before.
GROWTH = 4
# Values below this fraction of the largest in a tile would be rounded to zero.
VISIBLE = 0.5 / 127


def repainting(net: DeconvNet, codes: Codes, layer: int, *, count: int = ACTIVATIONS) -> Repainting:
    """The reconstruction of one image by a layer, separated into its strongest activations.

    codes: of one image; count: how many activations, fewer if their tiles would be too large.
    """
    z = codes.layer(layer).z
    if len(z) != 1:
        raise ValueError(f"codes of {len(z)} images: expected one")
    total = int(torch.count_nonzero(z))
    order = z.abs().flatten().argsort(descending=True, stable=True)[:total]
    rest = net.synthesize(codes, layer)[0].double().cpu().numpy()
    k, i, j = _positions(order[:count], z)
    values = z.flatten()[order[:count]]
    tiles, boxes = [], []
    for projection in project_units(net, codes, layer, (torch.zeros_like(k), k, i, j), values):
        top, left, bottom, right = box = _support(projection)
        tile = projection[:, top:bottom, left:right].cpu().numpy()
        if sum(t.size for t in tiles) + tile.size > LARGEST:
            break
        rest[:, top:bottom, left:right] -= _rounded(tile)
        tiles.append(tile)
        boxes.append(box)
    groups, first = [], len(tiles)
    while GROWTH * first < total:
        chosen = order[first : GROWTH * first]
        alone = torch.zeros_like(z).flatten()
        alone[chosen] = z.flatten()[chosen]
        picture = net.operator(codes, layer)(alone.view_as(z))[0].cpu().numpy()
        rest -= _rounded(picture)
        groups.append((first + 1, GROWTH * first, picture))
        first *= GROWTH
    planes = torch.eye(len(rest), device=net.device)[:, :, None, None]
    return Repainting(
        codes.y[0].cpu().numpy(),
        rest.astype(np.float32),
        tiles,
        boxes,
        k[: len(tiles)].tolist(),
        values[: len(tiles)].tolist(),
        rgb=signed_rgb(net, planes)[..., 0, 0].expand(-1, 3).T.cpu().numpy(),
        white=float(3 * codes.y.std().clamp(min=1e-12)),
        total=total,
        groups=groups,
    )


def repainting_data(shown: Repainting) -> dict:
    """A repainting as JSON values: pictures as 8-bit integers (`rest`: 16-bit) in base64, each with
    the factor that gives its values."""

    def encoded(values: np.ndarray, kind: type) -> dict:
        integers, factor = _to_integers(values, kind)
        text = base64.b64encode(integers.astype(np.dtype(kind).newbyteorder("<")).tobytes())
        return {"data": text.decode(), "factor": factor}

    return {
        "size": list(shown.image.shape),
        "image": encoded(shown.image, np.int8),
        "rest": encoded(shown.rest, np.int16),
        "rgb": np.asarray(shown.rgb, dtype=float).round(6).tolist(),
        "white": shown.white,
        "total": shown.total,
        "parts": [
            {"map": int(k), "value": float(value), "box": list(box), **encoded(tile, np.int8)}
            for k, value, box, tile in zip(
                shown.maps, shown.values, shown.boxes, shown.tiles, strict=True
            )
        ],
        "groups": [
            {"first": first, "last": last, **encoded(picture, np.int8)}
            for first, last, picture in shown.groups
        ],
    }


def _positions(order: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, rows and columns of flattened indices of maps (1, K, H, W)."""
    H, W = z.shape[2:]
    return order // (H * W), order // W % H, order % W


def _support(projection: Tensor) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the pixels that do not vanish in 8 bits; at least one pixel."""
    magnitude = projection.abs().amax(0)
    visible = magnitude > VISIBLE * magnitude.max()
    if not visible.any():
        return 0, 0, 1, 1
    rows, columns = (visible.any(axis).nonzero()[:, 0] for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _to_integers(values: np.ndarray, kind: type) -> tuple[np.ndarray, float]:
    """(integers, factor): values = integers * factor up to rounding, over the range of the type."""
    largest = float(np.abs(values).max(initial=0))
    factor = largest / np.iinfo(kind).max or 1.0
    return np.rint(values / factor).astype(kind), factor


def _rounded(values: np.ndarray) -> np.ndarray:
    """Values as the page has them, after 8 bits."""
    integers, factor = _to_integers(values, np.int8)
    return integers.astype(np.float64) * factor
