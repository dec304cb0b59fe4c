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
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.projection.feature_projection import project_units

# Supporting activations in the layers below, from the first layer down.
COUNTS = (5, 25, 125)


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
    return strongest_in(only_image(codes).layer(layer).z[0], count)


@plain
def project_activations(net: DeconvNet, codes: Codes, layer: int, units: Activations) -> Tensor:
    """(M, C, H, W): R_l of each separate activation, with its value and the image's switches."""
    projections = list(project_units(net, only_image(codes), layer, units.positions, units.values))
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
    return [strongest_in(z, count) for count, z in zip(counts, levels, strict=False)]


def supporting_maps(
    net: DeconvNet, codes: Codes, layer: int, unit: Activations
) -> Iterator[Tensor]:
    """Yield one activation projected to the maps (K, H, W) of layers l-1, l-2, ..., 1."""
    if len(unit) != 1:
        raise ValueError(f"{len(unit)} activations: expected one, as activations[:1]")
    z = codes.y.new_zeros(1, *only_image(codes).layer(layer).shape)
    z[0, unit.maps, unit.rows, unit.columns] = unit.values
    for level in range(layer, 1, -1):
        pooled = float(net.layer(level).scale) * net.layer(level).painting(codes.layer(level))(z)
        z = net.layer(level - 1).unpooling(codes.layer(level - 1))(pooled)
        yield z[0]


def strongest_in(z: Tensor, count: int) -> Activations:
    """The non-zero entries of maps (K, H, W) with the largest magnitude; the first among equals."""
    order = z.abs().flatten().sort(descending=True, stable=True).indices[:count]
    order = order[z.flatten()[order] != 0]
    K, H, W = z.shape
    return Activations(order // (H * W), order // W % H, order % W, z.flatten()[order])


def only_image(codes: Codes) -> Codes:
    if len(codes.y) != 1:
        raise ValueError(
            f"codes of {len(codes.y)} images: expected those of one, codes.select([n])"
        )
    return codes
