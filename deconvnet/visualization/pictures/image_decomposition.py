"""The decomposition of one image into the activations of a layer, and of these into lower layers.

An image is the sum of its parts, layer by layer (Zeiler et al. 2011, figure 1). Every operator on
the way to pixels is linear once the switches are fixed. The projections of all activations of a
layer therefore add up to the reconstruction, and the projections of everything that supports one
activation in a lower layer add up to the projection of this activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.metrics import snr
from deconvnet.network.network import DeconvNet
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.pictures.canvas import (
    GAP,
    LINE,
    PAPER,
    arrange_tiles,
    hstack,
    quantile_magnitude,
    resize_tiles,
    shade_signed,
    vstack,
    with_title,
)
from deconvnet.visualization.projection.feature_projection import (
    project_fields,
    project_units,
    signed_rgb,
)

# Supporting activations in the layers below, from the first layer down.
COUNTS = (5, 25, 125)
SHOWN_UNITS = 10
# Sizes in pixels.
PANEL = 300
# Next to a panel: three panels wide, and two rows of labelled tiles of half a panel.
ROOM = (PANEL + 2 * LINE + 3 * GAP, 3 * PANEL + 2 * GAP)
LABEL = 96
MOST_ZOOM = 20


@dataclass(frozen=True)
class Activations:
    """M activations of one image: map (from 0), row, column and value, (M,) each."""

    maps: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: slice | Tensor) -> Activations:
        return Activations(
            self.maps[index], self.rows[index], self.columns[index], self.values[index]
        )

    @property
    def positions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(image, map, row, column), (M,) each; the image is 0."""
        return torch.zeros_like(self.maps), self.maps, self.rows, self.columns


def strongest_activations(codes: Codes, layer: int, count: int) -> Activations:
    """The `count` activations of a layer with the largest |z|, strongest first, in one image.

    Zeros are left out, so there may be fewer.
    """
    return _strongest_in(_only(codes).layer(layer).z[0], count)


@plain
def project_activations(net: DeconvNet, codes: Codes, layer: int, units: Activations) -> Tensor:
    """(M, C, H, W): R_l of each separate activation, with its value and the image's switches."""
    projections = list(project_units(net, _only(codes), layer, units.positions, units.values))
    return torch.stack(projections) if projections else codes.y[:0]


@plain
def supporting_activations(
    net: DeconvNet, codes: Codes, layer: int, unit: Activations, *, counts: tuple[int, ...] = COUNTS
) -> list[Activations]:
    """The activations in layers l-1, l-2, ... that support one activation of layer l.

    counts: the number of strongest supporting activations in each of these layers; the result is as
    long as there are layers and counts.

    The activation alone (its value in its position, zeros elsewhere) is projected down with the
    switches of the image, one layer at a time:

        z_(l-1) = U_(l-1) S_l F_l z_l,    z_(l-2) = U_(l-2) S_(l-1) F_(l-1) z_(l-1),    ...

    The supporting activations in a layer are the entries of these maps with the largest magnitude,
    with their coefficients there. The whole activation is projected on, not only these entries, so
    all entries of any layer together have the projection of the activation. The coefficients are
    those that this activation requires, not those inferred in the lower layer.
    """
    levels = supporting_maps(net, codes, layer, unit)
    return [_strongest_in(z, count) for count, z in zip(counts, levels, strict=False)]


def supporting_maps(
    net: DeconvNet, codes: Codes, layer: int, unit: Activations
) -> Iterator[Tensor]:
    """Yield one activation projected to the maps (K, H, W) of layers l-1, l-2, ..., 1."""
    if len(unit) != 1:
        raise ValueError(f"{len(unit)} activations: expected one, as activations[:1]")
    z = codes.y.new_zeros(1, *_only(codes).layer(layer).shape)
    z[0, unit.maps, unit.rows, unit.columns] = unit.values
    for level in range(layer, 1, -1):
        pooled = float(net.layer(level).scale) * net.layer(level).operator()(z)
        z = net.layer(level - 1).unpooling(codes.layer(level - 1))(pooled)
        yield z[0]


@plain
def image_parts_picture(net: DeconvNet, codes: Codes, image: Tensor, layer: int) -> Tensor:
    """One image, its strongest activations in a layer, and the supporting activations of the first.

    codes: of this image only; image: (1 or 3, H, W) in [0, 1]. The left side shows activations,
    each alone, cropped to its receptive field and on its own scale; the right side shows their sum.
    Below the strongest activation are its supporting activations in each lower layer, and their
    sum in the position and on the scale of the activation, with the fraction of its squared norm
    that the sum explains.
    """
    y = _only(codes).y
    reconstruction = net.synthesize(codes, layer)
    units = strongest_activations(codes, layer, SHOWN_UNITS)
    projected = project_activations(net, codes, layer, units)
    together = projected.sum(0, keepdim=True)

    def panel(title: str, signed: Tensor, white: Tensor) -> Tensor:
        return _panel(title, shade_signed(signed_rgb(net, signed), white))

    total, white = torch.count_nonzero(codes.layer(layer).z), 3 * y.std().clamp(min=1e-12)
    panels = [
        _panel("image", image[None].expand(-1, 3, -1, -1)),
        panel("preprocessed", y, white),
        panel(
            f"layer {layer}: {total} activations, {snr(y, reconstruction):.1f} dB",
            reconstruction,
            white,
        ),
        panel(f"the strongest {len(units)} of them: {snr(y, together):.1f} dB", together, white),
    ]
    rows = [hstack(panels, GAP)]
    if len(units) == 0:
        return rows[0]

    top, white = projected[:1], quantile_magnitude(signed_rgb(net, projected[:1]))
    name = f"map {units.maps[0]}"
    tiles = _fields(net, codes, layer, units)
    title = f"layer {layer}: the strongest {len(units)} activations, each alone"
    whole = panel(f"layer {layer}, {name}: the strongest of all", top, white)
    rows.append(_parts_and_whole(title, tiles, _labels(units), whole))

    levels = supporting_maps(net, codes, layer, units[:1])
    for level, count, z in zip(range(layer - 1, 0, -1), COUNTS, levels, strict=False):
        supporting = _strongest_in(z, count)
        if len(supporting) == 0:
            break
        together = project_activations(net, codes, level, supporting).sum(0, keepdim=True)
        title = (
            f"layer {level}: the strongest {len(supporting)} of {torch.count_nonzero(z)} parts of "
            f"{name}, each alone"
        )
        labels = _labels(supporting) if len(supporting) <= SHOWN_UNITS else None
        whole = panel(
            f"these {len(supporting)} together: {_explained_fraction(top, together):.0%} of {name}",
            together,
            white,
        )
        tiles = _fields(net, codes, level, supporting)
        rows.append(_parts_and_whole(title, tiles, labels, whole))
    return vstack(rows, 4 * GAP)


def _fields(net: DeconvNet, codes: Codes, layer: int, units: Activations) -> Tensor:
    """Tiles (M, 3, S, S) of activations, each alone, cropped to its field and to the image."""
    fields = project_fields(net, codes, layer, units.positions, units.values, units.values)
    shown = signed_rgb(
        net, fields.cropped(tuple(codes.y.shape[2:]), energy_share=1.0, tile_share=1.0).tiles
    )
    return shade_signed(shown, quantile_magnitude(shown))


def _strongest_in(z: Tensor, count: int) -> Activations:
    """The non-zero entries of maps (K, H, W) with the largest magnitude; the first among equals."""
    order = z.abs().flatten().sort(descending=True, stable=True).indices[:count]
    order = order[z.flatten()[order] != 0]
    K, H, W = z.shape
    return Activations(order // (H * W), order // W % H, order % W, z.flatten()[order])


def _explained_fraction(whole: Tensor, part: Tensor) -> float:
    """1 - |whole - part|^2 / |whole|^2, which is negative if the part is farther away than zero."""
    whole, part = whole.double(), part.double()
    return float(1 - (whole - part).square().sum() / whole.square().sum())


def _labels(units: Activations) -> list[str]:
    pairs = zip(units.maps.tolist(), units.values.tolist(), strict=True)
    return [f"map {number}: {value:+.2g}" for number, value in pairs]


def _panel(title: str, picture: Tensor) -> Tensor:
    h, w = picture.shape[2:]
    return _widened(
        with_title(title, resize_tiles(picture, max(1, PANEL * w // max(h, w)))[0]), PANEL
    )


def _parts_and_whole(title: str, tiles: Tensor, labels: list[str] | None, whole: Tensor) -> Tensor:
    """A row of the picture: tiles (M, 3, h, w), as large as there is room for, and a panel."""
    count, _, h, w = tiles.shape
    line, narrowest = (LINE, LABEL) if labels else (0, 1)

    def width(columns: int) -> int:
        high = (ROOM[0] - GAP) // -(-count // columns) - GAP - line
        wide = (ROOM[1] - GAP) // columns - GAP
        size = min(wide, high * w // h, MOST_ZOOM * w)
        return 0 if wide < narrowest else size // w * w or max(1, size)

    columns = max(range(1, count + 1), key=lambda n: (width(n), -(-count % n), n))
    tiles = resize_tiles(tiles, max(1, width(columns)))
    if labels:
        labelled = [with_title(label, tile) for label, tile in zip(labels, tiles, strict=True)]
        tiles = torch.stack([_widened(tile, max(LABEL, tiles.shape[3])) for tile in labelled])
    return hstack([_widened(with_title(title, arrange_tiles(tiles, columns)), ROOM[1]), whole], GAP)


def _widened(picture: Tensor, width: int) -> Tensor:
    """A picture padded or cut off on the right to exactly this width."""
    return F.pad(picture, (0, width - picture.shape[2]), value=PAPER)


def _only(codes: Codes) -> Codes:
    if len(codes.y) != 1:
        raise ValueError(
            f"codes of {len(codes.y)} images: expected those of one, codes.select([n])"
        )
    return codes
