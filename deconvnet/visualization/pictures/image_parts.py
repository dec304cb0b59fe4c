"""The parts of one image: which activations of a layer describe it, and what each is made of.

The activations with the largest coefficients are a poor choice: many lie at the border, where a
filter sees only a few pixels, and neighbours of one map repeat each other. The parts are therefore
chosen by what they add to the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.network.codes import Codes
from deconvnet.network.layer import CONVOLUTION
from deconvnet.network.network import DeconvNet
from deconvnet.support.torch_modes import plain
from deconvnet.visualization.pictures.image_decomposition import (
    Activations,
    only_image,
    strongest_in,
    supporting_maps,
)
from deconvnet.visualization.projection.feature_projection import (
    PixelFeatures,
    crop_box,
    layer_field,
    project_fields,
    tile_size,
)

MOST_PARTS = 12
SHARE = 0.5
# Activations of a map among which its part is chosen, and of a layer among which those are chosen
# that support one activation of the layer above.
CANDIDATES = 6
SUPPORTERS = 30
# Two parts of one place: the fraction of the side of their fields by which they may overlap along
# both axes.
OVERLAP = 0.5
# The fraction of units that must lie inside the image; else parts may reach beyond the border.
ENOUGH = 0.25
# The energy of a part inside its box.
IN_BOX = 0.9
# Children of a part, and of each of its children: 5, 25, 125, as in the paper.
CHILDREN = 5


@dataclass(frozen=True)
class ImageParts:
    """M activations of a layer that together describe an image, those that add most first.

    units: one of each map. fields: their projections, each in its receptive field. shares: (M,),
    the fraction of the energy of the layer's reconstruction R_l z that the first 1, 2, ..., M of
    them explain: 1 - ||R_l z - their sum||^2 / ||R_l z||^2. complete: whether this reaches the
    share that was asked for.
    """

    units: Activations
    fields: PixelFeatures
    shares: Tensor
    complete: bool

    def __len__(self) -> int:
        return len(self.units)

    def __str__(self) -> str:
        share = percent(float(self.shares[-1])) if len(self) else "none"
        number = "1 part" if len(self) == 1 else f"{len(self)} parts"
        return f"{number}, with {share} of the energy of the reconstruction"


@plain
def image_parts(
    net: DeconvNet, codes: Codes, layer: int, *, count: int = MOST_PARTS, share: float = SHARE
) -> ImageParts:
    """At most `count` parts of the image of the codes, as many as explain `share` of the energy.

    Each part in turn is the activation whose projection brings the sum of all parts closest to the
    reconstruction R_l z. At most one activation of each map is taken, among its strongest.

    If the receptive fields of at least a quarter of the layer's units lie inside the image, so do
    those of the parts, and no two parts are in the same place (`OVERLAP`). The fields of higher
    layers are about as large as the image; there at least half of a field lies inside along each
    axis.
    """
    z = only_image(codes).layer(layer).z
    whole = net.operator(codes, layer)(z)[0]
    inside, mostly = _fields_inside(net, layer, tuple(z.shape[2:]), tuple(whole.shape[1:]))
    local = bool(inside.double().mean() >= ENOUGH)
    allowed = (inside if local else mostly).to(z.device)
    units = _strongest_of_each_map(z[0] * allowed, CANDIDATES)
    fields = separate_fields(net, codes, layer, units)
    excludes = units.maps[:, None] == units.maps
    if local and len(units):
        corners = fields.boxes[:, 1:3]
        size = torch.tensor(fields.tiles.shape[2:], device=z.device)
        apart = ((corners[:, None] - corners).abs() >= (1 - OVERLAP) * size).any(2)
        excludes = excludes | ~apart
    order, shares = _explaining(whole, fields, excludes, count, share)
    chosen = torch.tensor(order, dtype=torch.long, device=z.device)
    complete = bool(shares) and shares[-1] >= share
    return ImageParts(
        units[chosen],
        select_features(fields, chosen),
        torch.tensor(shares, dtype=torch.float64),
        complete,
    )


@plain
def count_explaining(net: DeconvNet, codes: Codes, layer: int, share: float = SHARE) -> int:
    """The least number of strongest activations that explain `share` of the energy of R_l z."""
    z = only_image(codes).layer(layer).z
    operator = net.operator(codes, layer)
    whole, order = operator(z), z.abs().flatten().argsort(descending=True, stable=True)
    low, high = 0, int(torch.count_nonzero(z))
    while high - low > 1:
        middle = (low + high) // 2
        strongest = torch.zeros_like(z).flatten()
        strongest[order[:middle]] = z.flatten()[order[:middle]]
        if explained(whole, operator(strongest.view_as(z))) >= share:
            high = middle
        else:
            low = middle
    return high


@dataclass(frozen=True)
class Generation:
    """The activations in one layer that support those in the layer above, at most 5 for each.

    units: M activations. places: (M,), their places in the tree: those that support the activation
    in place p above are in 5 p, 5 p + 1, ..., the first of them explain most. roots: (M,), the
    activation at the top of the tree that each supports.
    """

    layer: int
    units: Activations
    places: Tensor
    roots: Tensor


@plain
def family_tree(
    net: DeconvNet, codes: Codes, layer: int, units: Activations, *, depth: int = 3
) -> list[Generation]:
    """The activations in layers l-1, l-2, ... that support each of some activations of layer l.

    When an activation alone is projected to the layer below, with the switches of the image, its
    children are those coefficients there whose sum comes closest to it in pixels, chosen one after
    another among the largest. `supporting_activations` ranks all coefficients by magnitude.
    """
    places = roots = torch.arange(len(units), device=units.values.device)
    generations = []
    for level in range(layer - 1, max(layer - 1 - depth, 0), -1):
        children = [_children(net, codes, level + 1, units[n : n + 1]) for n in range(len(units))]
        numbers = [torch.arange(len(found), device=places.device) for found in children]
        counts = torch.tensor([len(found) for found in children], device=places.device)
        places = (CHILDREN * places).repeat_interleave(counts) + torch.cat(numbers)
        roots = roots.repeat_interleave(counts)
        units = _joined(children)
        generations.append(Generation(level, units, places, roots))
    return generations


def together(net: DeconvNet, codes: Codes, layer: int, units: Activations) -> Tensor:
    """(1, C, H, W): R_l of several activations of a layer at once."""
    z = codes.y.new_zeros(1, *codes.layer(layer).shape)
    z.index_put_(units.positions, units.values, accumulate=True)
    return net.operator(codes, layer)(z)


def explained(whole: Tensor, part: Tensor) -> float:
    """1 - |whole - part|^2 / |whole|^2, which is negative if the part is farther away than zero."""
    whole, part = whole.double(), part.double()
    return float(1 - (whole - part).square().sum() / whole.square().sum().clamp(min=1e-300))


def percent(share: float) -> str:
    """A share in percent, with two significant digits: 87%, 2.3%, 0.046%."""
    value = 100 * share
    return f"{value:.0f}%" if abs(value) >= 9.95 else f"{value:.2g}%"


def separate_fields(net: DeconvNet, codes: Codes, layer: int, units: Activations) -> PixelFeatures:
    """The projections of activations of one image, each alone, cropped to their fields.

    R_l is linear, so activations whose fields do not overlap are projected together and then cut
    apart, which is many times faster.
    """
    boundaries = {net.layer(number).settings.boundary for number in range(1, layer + 1)}
    # At other boundaries fields continue at the opposite side, or are mirrored.
    if len(units) == 0 or not boundaries <= {"valid", "zero"}:
        return _fields_one_by_one(net, codes, layer, units)
    rows, columns = (layer_field(net, layer, axis) for axis in (0, 1))
    size = tile_size(rows.size, columns.size)
    tops, lefts = (
        (field.offset + field.stride * index).tolist()
        for field, index in ((rows, units.rows), (columns, units.columns))
    )
    corners = list(zip(tops, lefts, strict=True))
    boxes = torch.tensor([(0, *corner, max(size)) for corner in corners], device=codes.y.device)
    if layer == 1 and net.layer(1).settings.coding == CONVOLUTION:
        return PixelFeatures(_painted_filters(net, units, boxes, codes.y), boxes, units.values)
    tiles = [codes.y.new_zeros(0)] * len(units)
    for group in _disjoint(corners, size):
        projected = together(net, codes, layer, units[torch.tensor(group)])[0]
        for index in group:
            tiles[index] = crop_box(projected, *corners[index], size)
    return PixelFeatures(torch.stack(tiles), boxes, units.values)


def energy_boxes(features: PixelFeatures, image: tuple[int, int], share: float = IN_BOX) -> Tensor:
    """(M, 4): top, left, bottom, right of the rectangles with most of the energy of each tile.

    Along each axis, what is cut off at both ends together has at most 1 - share of the energy. The
    boxes lie inside the image of (H, W) pixels.
    """
    energy = features.tiles.double().square().sum(1)
    edges = []
    for axis, other in ((1, 2), (2, 1)):
        profile = energy.sum(other)
        below = profile.cumsum(1) / profile.sum(1, keepdim=True).clamp(min=1e-300)
        first = (below <= (1 - share) / 2).sum(1)
        last = profile.shape[1] - (below >= (1 + share) / 2 - 1e-12).sum(1) + 1
        corner, size = features.boxes[:, axis], image[axis - 1]
        edges.append(((corner + first).clamp(0, size - 1), (corner + last).clamp(1, size)))
    (top, bottom), (left, right) = edges
    bottom, right = torch.maximum(bottom, top + 1), torch.maximum(right, left + 1)
    return torch.stack([top, left, bottom, right], 1)


def square_boxes(boxes: Tensor, image: tuple[int, int]) -> Tensor:
    """(M, 4): boxes of one size around the centres of others (M, 4), moved into the image.

    They are square, unless the image is too small, and nine in ten of the others fit into them.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1).sort().values
    side = int(sides[int(0.9 * (len(sides) - 1))])
    limits = torch.tensor(image, device=boxes.device)
    sizes = limits.clamp(max=side)
    corners = (boxes[:, :2] + boxes[:, 2:] - sizes) // 2
    corners = corners.clamp(min=torch.zeros_like(limits), max=limits - sizes)
    return torch.cat([corners, corners + sizes], 1)


def cut_fields(features: PixelFeatures, boxes: Tensor) -> Tensor:
    """The tiles (M, C, h, w) of activations in boxes (M, 4) of one size, zero beyond the fields."""
    tiles = []
    for tile, (_, top, left, _), (first, second, bottom, right) in zip(
        features.tiles, features.boxes.tolist(), boxes.tolist(), strict=True
    ):
        size = bottom - first, right - second
        tiles.append(crop_box(tile, first - top, second - left, size))
    return torch.stack(tiles)


def select_features(features: PixelFeatures, chosen: Tensor | slice) -> PixelFeatures:
    """Some of the activations in pixel space, by their indices."""
    return PixelFeatures(features.tiles[chosen], features.boxes[chosen], features.values[chosen])


def _children(net: DeconvNet, codes: Codes, layer: int, unit: Activations) -> Activations:
    """The activations in the layer below that explain one activation best."""
    candidates = strongest_in(next(supporting_maps(net, codes, layer, unit)), SUPPORTERS)
    fields = separate_fields(net, codes, layer - 1, candidates)
    whole = together(net, codes, layer, unit)[0]
    excludes = torch.eye(len(candidates), dtype=torch.bool, device=whole.device)
    order, _ = _explaining(whole, fields, excludes, CHILDREN, 1.0)
    return candidates[torch.tensor(order, dtype=torch.long, device=whole.device)]


def _fields_inside(
    net: DeconvNet, layer: int, shape: tuple[int, int], image: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(H, W) twice: the units whose fields lie inside the image, and those at least half of whose
    fields do along each axis, or as much as the image has room for."""
    inside, mostly = [], []
    for axis in (0, 1):
        field, size = layer_field(net, layer, axis), image[axis]
        first = field.offset + field.stride * torch.arange(shape[axis])
        visible = (first + field.size).clamp(max=size) - first.clamp(min=0)
        inside.append(visible == field.size)
        mostly.append(2 * visible >= min(field.size, size))
    return inside[0][:, None] & inside[1], mostly[0][:, None] & mostly[1]


def _strongest_of_each_map(z: Tensor, count: int) -> Activations:
    """The `count` strongest activations of every map of z (K, H, W); zeros are left out."""
    K, H, W = z.shape
    values, index = z.abs().flatten(1).sort(descending=True, stable=True)
    maps, ranks = torch.nonzero(values[:, :count], as_tuple=True)
    index = index[maps, ranks]
    return Activations(maps, index // W, index % W, z.flatten(1)[maps, index])


def _explaining(
    whole: Tensor, fields: PixelFeatures, excludes: Tensor, count: int, share: float
) -> tuple[list[int], list[float]]:
    """The candidates that explain an image (C, H, W), one after another, and the shares so far.

    excludes: (P, P), the candidates that must not follow each of them; itself is one. A candidate
    p, with the residual r of the image, reduces ||r||^2 by 2 <r, p> - ||p||^2.
    """
    h, w = fields.tiles.shape[2:]
    residual = F.pad(whole.double(), (w, w, h, h))
    energy = float(residual.square().sum())
    windows = [(top + h, left + w) for _, top, left, _ in fields.boxes.tolist()]
    tiles = fields.tiles.double()
    norms = tiles.square().sum((1, 2, 3))
    order, shares, free = [], [], torch.ones(len(windows), dtype=torch.bool)
    while len(order) < count and free.any() and not (shares and shares[-1] >= share):
        seen = torch.stack([residual[:, top : top + h, left : left + w] for top, left in windows])
        gains = (2 * (seen * tiles).sum((1, 2, 3)) - norms).cpu().where(free, -torch.inf)
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        top, left = windows[best]
        residual[:, top : top + h, left : left + w] -= tiles[best]
        order.append(best)
        shares.append(1 - float(residual.square().sum()) / energy)
        free &= ~excludes[best].cpu()
    return order, shares


def _disjoint(corners: list[tuple[int, int]], size: tuple[int, int]) -> Iterator[list[int]]:
    """Groups of indices of boxes of size (h, w) that do not overlap within a group."""
    groups: list[list[int]] = []
    for index, (top, left) in enumerate(corners):
        for group in groups:
            apart = (
                abs(top - corners[other][0]) >= size[0] or abs(left - corners[other][1]) >= size[1]
                for other in group
            )
            if all(apart):
                group.append(index)
                break
        else:
            groups.append([index])
    yield from groups


def _painted_filters(net: DeconvNet, units: Activations, boxes: Tensor, y: Tensor) -> Tensor:
    """The tiles (M, C, h, w) of activations of layer 1: scaled filters, zero beyond the image."""
    tiles = net.layer(1).filters[units.maps] * units.values.view(-1, 1, 1, 1)
    (H, W), (h, w) = y.shape[2:], tiles.shape[2:]
    rows = boxes[:, 1:2] + torch.arange(h, device=y.device)
    columns = boxes[:, 2:3] + torch.arange(w, device=y.device)
    visible = ((rows >= 0) & (rows < H))[:, :, None] & ((columns >= 0) & (columns < W))[:, None]
    return tiles * visible[:, None]


def _fields_one_by_one(
    net: DeconvNet, codes: Codes, layer: int, units: Activations
) -> PixelFeatures:
    if len(units) == 0:
        empty = codes.y.new_zeros(0, codes.y.shape[1], 1, 1)
        return PixelFeatures(empty, units.maps.new_zeros(0, 4), units.values)
    return project_fields(net, codes, layer, units.positions, units.values, units.values)


def _joined(parts: list[Activations]) -> Activations:
    return Activations(
        *(
            torch.cat([getattr(part, key) for part in parts])
            for key in ("maps", "rows", "columns", "values")
        )
    )
