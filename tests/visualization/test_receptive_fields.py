"""Receptive fields and operations from the autograd graph, compared with an oracle that knows no
operation: pixels that are NaN, and the units that they reach."""

import copy
import logging
import math
from collections import OrderedDict
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.shufflenetv2 import channel_shuffle

from deconvnet.visualization.projection.boxes import tile_boxes
from deconvnet.visualization.projection.operations import read_operations
from deconvnet.visualization.projection.projector import Projector

H, W = 17, 22
# Behind these a unit is taken to see everything: larger than it is, never smaller.
TOO_LARGE = {
    "bicubic",
    "circular padding",
    "convolution with circular padding",
    "index",
    "part assigned",
    "repeat",
    "tokens and back",
    "unbind",
}
# Only the gradient follows the statistics of normalisation.
OPTIONS = {"layer norm of everything": {"method": "gradient"}}
# At the border they see what lies within it.
FOLDED = {
    *("reflection", "replication", "circular padding", "convolution with circular padding"),
    *("convolution with reflection", "convolution with replication"),
}
# Windows, or steps from unit to unit, of several sizes, in turn.
RESIZED = {
    *("adaptive average pool", "adaptive max pool", "bilinear", "bilinear, corners aligned"),
    *("bilinear of a size", "bilinear by 1.5", "nearest", "nearest by 1.5", "nearest of a size"),
    *("nearest-exact down", "nearest-exact up", "pixel shuffle", "enlarged branch"),
    *("enlarged and reduced", "transposed convolution", "transposed convolution, dilated"),
}
UNLIKE = RESIZED | {"rows appended", "spatial gate", "global mean added"}


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


class Permute(Apply):
    def __init__(self, *axes):
        super().__init__(lambda y: y.permute(axes))


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, y):
        return y + self.branch(y)


class Branches(nn.Module):
    """Channels of several branches, one after the other."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, y):
        return torch.cat([branch(y) for branch in self.branches], 1)


class Gated(nn.Module):
    """Squeeze and excitation, or a gate for every place."""

    def __init__(self, channels, *, local=False, gate=nn.Sigmoid):
        super().__init__()
        self.squeeze = nn.Identity() if local else nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Conv2d(channels, channels, 3 if local else 1, padding=int(local))
        self.gate = gate()

    def forward(self, y):
        return y * self.gate(self.linear(self.squeeze(y)))


class Selective(nn.Module):
    """Two branches, weighted by a softmax over them (selective kernels)."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([conv(1), conv(5, padding=2)])
        self.linear, self.gate = conv(1, made=8), nn.Softmax(1)

    def forward(self, y):
        y = torch.stack([branch(y) for branch in self.branches], 1)
        gate = self.linear(y.sum(1).mean((2, 3), keepdim=True))
        return (y * self.gate(gate.unflatten(1, (2, 4)))).sum(1)


class Response(nn.Module):
    """Global response normalisation (ConvNeXt V2), on (N, C, H, W)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Identity()
        self.weight, self.bias = (nn.Parameter(torch.ones(1, 4, 1, 1)) for _ in range(2))

    def forward(self, y):
        norm = y.norm(p=2, dim=(2, 3), keepdim=True)
        gate = self.gate(norm / (norm.mean(1, keepdim=True) + 1e-6))
        return y + torch.addcmul(self.bias, self.weight, y * gate)


def in_place_on_a_part(y):
    y = y.clone()
    y[:, 2:].relu_()
    return y


def assign_a_part(y):
    made = torch.zeros_like(y)
    made[:, :, 3:] = y[:, :, :-3]
    return made


def split_and_swap(y):
    first, second = y.chunk(2, 1)
    return torch.cat([second, first], 1)


def halves(y, dim):
    first, second = y.split([7, y.shape[dim] - 7], dim)
    return first, second


class AddedToPart(nn.Module):
    """A convolution, added in place to some of the maps (ghost modules)."""

    def __init__(self):
        super().__init__()
        self.branch = conv(5, made=3, padding=2)

    def forward(self, y):
        part = torch.cat([y, 2 * y], 1)[:, 2:5]
        part += self.branch(y)
        return part


def fold_patches(y):
    N, C = y.shape[:2]
    y = y[:, :, :16, :20].reshape(N, C, 8, 2, 10, 2)
    return y.permute(0, 1, 3, 5, 2, 4).reshape(N, 4 * C, 8, 10)


def merged(y):
    return torch.cat([y[:, 0::2, 0:-1:2], y[:, 0::2, 1::2]], 3)


def up(**options):
    return Apply(lambda y: F.interpolate(y, **options))


def pad(*amounts, mode="constant"):
    return Apply(lambda y: F.pad(y, amounts, mode=mode))


def conv(kernel=3, given=4, made=4, **options):
    return nn.Conv2d(given, made, kernel, **options)


# What comes between a first convolution (3 to 4 channels, 3x3) and a last one (3x3).
NETS = {
    "nothing": nn.Identity(),
    "linear in a row": nn.Sequential(conv(1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()),
    "strided": conv(4, stride=(2, 3), padding=(1, 2)),
    "kernel below stride": conv(1, stride=2),
    "dilated": conv((3, 2), dilation=(2, 3), padding=3),
    "same padding": conv((4, 2), padding="same"),
    "grouped": conv(5, groups=2),
    "depthwise": conv((1, 5), groups=4, stride=2),
    "branches in groups": nn.Sequential(
        Branches(conv(1, 4, 2), conv(7, 4, 2, padding=3)), conv(3, groups=2)
    ),
    "transposed convolution": nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1),
    "transposed convolution, dilated": nn.Sequential(
        nn.MaxPool2d(2), nn.ConvTranspose2d(4, 4, (2, 3), stride=(2, 3), dilation=(3, 2))
    ),
    "transposed convolution, stride 1": nn.ConvTranspose2d(4, 4, 3, groups=2),
    "max pool": nn.MaxPool2d(2),
    "max pool, overlapping": nn.MaxPool2d(3, 2, 1),
    "max pool, ceiling": nn.MaxPool2d((3, 2), 2, ceil_mode=True),
    "max pool, dilated": nn.MaxPool2d(3, 1, dilation=2),
    "average pool": nn.AvgPool2d(2),
    "average pool, ceiling": nn.AvgPool2d(3, (2, 3), 1, ceil_mode=True),
    "adaptive average pool": nn.AdaptiveAvgPool2d((5, 7)),
    "adaptive max pool": nn.AdaptiveMaxPool2d((8, 5)),
    "nearest": up(scale_factor=2),
    "nearest by 1.5": up(scale_factor=1.5),
    "nearest of a size": up(size=(49, 13)),
    "nearest-exact down": up(size=(9, 11), mode="nearest-exact"),
    "nearest-exact up": up(scale_factor=2.3, mode="nearest-exact"),
    "bilinear": up(scale_factor=2, mode="bilinear"),
    "bilinear, corners aligned": up(scale_factor=2, mode="bilinear", align_corners=True),
    "bilinear by 1.5": up(scale_factor=1.5, mode="bilinear"),
    "bilinear of a size": up(size=(11, 40), mode="bilinear"),
    "bicubic": up(scale_factor=2, mode="bicubic"),
    "branches": Branches(conv(1, 4, 1), conv(5, 4, 2, padding=2), nn.MaxPool2d(3, 1, 1)),
    "split": Apply(lambda y: y.split([1, 3], 1)[1]),
    "chunks swapped": nn.Sequential(
        Branches(conv(1, 4, 2), conv(5, 4, 2, padding=2)), Apply(split_and_swap)
    ),
    "rows split": Apply(lambda y: halves(y, 2)[1]),
    "columns split": Apply(lambda y: halves(y, -1)[1]),
    "unbind": Apply(lambda y: torch.stack(y.unbind(1)[::-1], 1)),
    "rows appended": Apply(lambda y: torch.cat(halves(y, 2)[::-1], 2)),
    "slice": Apply(lambda y: y[:, :, 3:-2, 4:]),
    "slice from behind": Apply(lambda y: y[:, :, -9:, -14:-3]),
    "slice with steps": Apply(lambda y: y[:, :, 1::2, ::3]),
    "channel shuffle": nn.Sequential(
        Branches(conv(1, 4, 2), conv(5, 4, 2, padding=2)), Apply(lambda y: channel_shuffle(y, 2))
    ),
    "index": Apply(lambda y: y[:, [2, 0, 1, 3]]),
    "repeat": Apply(lambda y: y.repeat(1, 2, 1, 1)[:, 2:6]),
    "zero padding": pad(1, 2, 3, 4),
    "negative padding": pad(-1, 2, 3, -4),
    "reflection": pad(3, 2, 1, 4, mode="reflect"),
    "replication": pad(3, 2, 1, 4, mode="replicate"),
    "circular padding": pad(3, 2, 1, 4, mode="circular"),
    "convolution with reflection": conv(5, padding=2, padding_mode="reflect"),
    "convolution with replication": conv(5, padding=2, padding_mode="replicate"),
    "convolution with circular padding": conv(5, padding=2, padding_mode="circular"),
    "residual": Residual(conv(3, padding=1), nn.ReLU(), conv(3, padding=1)),
    "residual of a difference": Apply(lambda y: y - F.max_pool2d(y, 5, 1, 2)),
    "broadcast": Apply(lambda y: y + y[:, :1].relu()),
    "squeeze and excitation": Gated(4),
    "hard gates": Gated(4, gate=nn.Hardsigmoid),
    "spatial gate": Gated(4, local=True),
    "global mean added": Apply(lambda y: y + y.mean((2, 3), keepdim=True)),
    "mean over the channels": Apply(lambda y: y * 2 + y.mean(1, keepdim=True)),
    "weighted branches": Selective(),
    "response of whole maps": Response(),
    "in place on a part": Apply(in_place_on_a_part),
    "part assigned": Apply(assign_a_part),
    "pixel shuffle": nn.PixelShuffle(2),
    "pixel unshuffle": nn.Sequential(pad(0, 0, 0, 1), nn.PixelUnshuffle(2)),
    "added to some maps": AddedToPart(),
    "enlarged branch": Residual(conv(3, stride=2, padding=1), up(size=(H, W))),
    "enlarged and reduced": nn.Sequential(up(scale_factor=3), conv(3, stride=2)),
    "patches folded": Apply(fold_patches),
    "response normalisation": nn.LocalResponseNorm(3),
    "channels last": nn.Sequential(
        Permute(0, 2, 3, 1),
        nn.Linear(4, 5),
        nn.GELU(),
        nn.Linear(5, 4, bias=False),
        Permute(0, 3, 1, 2),
    ),
    "channels last, padded and moved": nn.Sequential(
        Permute(0, 2, 3, 1),
        Apply(lambda y: F.pad(y, (0, 0, 2, 1, 0, 3))[:, 1:-1, ::2]),
        Permute(0, 3, 1, 2),
        nn.MaxPool2d(2),
    ),
    "merged patches": nn.Sequential(
        Permute(0, 2, 3, 1), Apply(merged), nn.LayerNorm(8), nn.Linear(8, 4), Permute(0, 3, 1, 2)
    ),
    "layer norm of the channels": nn.Sequential(
        Permute(0, 2, 3, 1), nn.LayerNorm(4), Permute(0, 3, 1, 2)
    ),
    "layer norm of the channels, reversed": Apply(
        lambda y: F.layer_norm(y.permute(0, 3, 2, 1), (4,)).permute(0, 3, 2, 1)
    ),
    "layer norm of everything": nn.LayerNorm([4, H, W]),
    "tokens and back": Apply(lambda y: y.flatten(2).transpose(1, 2).transpose(1, 2).view(y.shape)),
    "rows and columns swapped twice": Apply(lambda y: y.transpose(2, 3).transpose(2, 3) * 1),
}


def network(middle):
    """A convolution, what is to be looked at, and another convolution of 3x3 if there is room."""
    first, middle = nn.Conv2d(3, 4, 3, padding=1), copy.deepcopy(middle)
    with torch.no_grad():
        given = middle(first(torch.zeros(1, 3, H, W)))
    last = nn.Conv2d(given.shape[1], 6, 3, padding=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(first, middle, last)
        for p in net.parameters():
            nn.init.normal_(p)
    return net.double().eval()


def image(height=H, width=W, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)


@torch.no_grad()
def reached(net, x):
    """(4, K, h, w): top, left, bottom, right of the pixels that each unit of a net depends on.

    Rows 0 to r are made not-a-number; the unit is none iff it sees one of them. Gates are held at
    what they are for x.
    """
    hooks, held = [], {}
    for name, gate in net.named_modules():
        if isinstance(gate, nn.Sigmoid | nn.Hardsigmoid | nn.Softmax) or name.endswith("gate"):
            hooks.append(gate.register_forward_hook(lambda m, _, y: held.setdefault(m, y)))
    net(x)
    edges = []
    for flipped in (False, True):
        for axis in (1, 2):
            size = x.shape[axis + 1]
            spoiled = x.repeat(size, 1, 1, 1)
            for last, one in enumerate(spoiled.transpose(2, axis + 1)):
                one[:, slice(-1 - last, None) if flipped else slice(0, last + 1)] = math.nan
            # How much must be spoiled before the first that is seen; all of it if none is.
            clean = (~net(spoiled).isnan()).sum(0)
            edges.append(size - clean if flipped else clean)
    for hook in hooks:
        hook.remove()
    return torch.stack(edges)


def every_unit(shape):
    """Units of the first and the last map: those of the corners, the edges and of the centre."""
    K, h, w = shape
    places = [
        (i, j)
        for i in sorted({0, 1 % h, h // 2, h - 1})
        for j in sorted({0, 1 % w, w // 2, w - 2 if w > 1 else 0, w - 1})
    ]
    return [(0, k, i, j) for k in (0, K - 1) for i, j in places]


def boxes_of(net, x, layer, units, **options):
    found = Projector(net, strict=False, **options)(x, layer, units, seeds=torch.ones(len(units)))
    return found


@pytest.fixture(scope="module")
def seen():
    """seen(name): (net, image, units, what the oracle says of them, their projections), once."""
    known = {}

    def find(name):
        if name not in known:
            net, x = network(NETS[name]), image()
            edges = reached(net, x)
            units = every_unit(edges.shape[1:])
            expected = torch.stack([edges[:, k, i, j] for _, k, i, j in units])
            expected[(expected[:, 2:] <= expected[:, :2]).any(1)] = 0
            found = project(net, x, units, **OPTIONS.get(name, {}))
            known[name] = net, x, units, expected, found
        return known[name]

    return find


def project(net, x, units, **options):
    return Projector(net, strict=False, **options)(x, "2", units, seeds=torch.ones(len(units)))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", NETS)
def test_a_box_is_what_a_unit_sees(name, seen):
    *_, expected, found = seen(name)
    if name in TOO_LARGE:
        assert (found.boxes[:, :2] <= expected[:, :2]).all()
        assert (found.boxes[:, 2:] >= expected[:, 2:]).all()
        assert (found.boxes != expected).any(), "this is exact and could leave the list"
    else:
        assert found.boxes.tolist() == expected.tolist()


@pytest.mark.parametrize("name", sorted(NETS.keys() - UNLIKE - TOO_LARGE))
def test_unclipped_fields_have_one_size_and_contain_the_box_when_clipped(name, seen):
    net, x, units, _, found = seen(name)
    sizes = found.fields[:, 2:] - found.fields[:, :2]
    assert (sizes == sizes[0]).all()
    if name not in FOLDED:
        some = found.boxes.any(1)
        assert (found.boxes >= found.fields)[some, :2].all()
        assert (found.boxes <= found.fields)[some, 2:].all()
    # They are those of `layers`, which finds them in another way.
    projector = Projector(net, strict=False, **OPTIONS.get(name, {}))
    info = {layer.name: layer for layer in projector.layers(x)}["2"]
    if info.field is not None:
        assert tuple(sizes[0].tolist()) == info.field
        places = torch.tensor(units)[:, 2:]
        first = torch.tensor(info.offset) + torch.tensor(info.stride) * places
        assert found.fields[:, :2].tolist() == first.tolist()
    else:
        assert (sizes[0] >= torch.tensor([H, W])).all()


@pytest.mark.parametrize("name", sorted(RESIZED))
def test_the_fields_of_resized_maps_hold_what_a_unit_sees_and_little_more(name, seen):
    net, x, units, expected, _ = seen(name)
    info = {layer.name: layer for layer in Projector(net, strict=False).layers(x)}["2"]
    if name == "enlarged branch":  # 17 rows from 9, so the two branches do not fit together
        assert info.stride[0] == 0 and info.stride[1] == 1
        return
    places = torch.tensor(units)[:, 2:]
    slack = []
    for axis, size in enumerate((H, W)):
        first = info.starts(axis)[places[:, axis]]
        last = first + info.field[axis]
        assert (first.clamp(0) <= expected[:, axis]).all()
        assert (last.clamp(max=size) >= expected[:, 2 + axis]).all()
        middle = (first >= 0) & (last <= size)
        slack += [info.field[axis] - (expected[:, 2 + axis] - expected[:, axis])[middle]]
    # A unit may see one pixel less than another, or what the taps of a kernel leave out.
    assert min(int(part.min()) for part in slack if len(part)) <= 1


def test_maps_that_are_enlarged_by_two_have_a_stride_of_half_a_pixel():
    layers = Projector(nn.Sequential(up(scale_factor=2), conv(given=3)).double()).layers(image())
    enlarged, convolved = layers
    assert (enlarged.field, enlarged.stride) == ((1, 1), (Fraction(1, 2),) * 2)
    assert enlarged.starts(0).tolist()[:5] == [0, 0, 1, 1, 2]
    assert (convolved.field, convolved.stride) == ((2, 2), (Fraction(1, 2),) * 2)
    assert convolved.starts(1).tolist()[:4] == [0, 0, 1, 1]


@pytest.mark.parametrize("name", NETS)
def test_projections_stay_inside_their_boxes_and_tiles_are_of_one_size(name, seen):
    *_, found = seen(name)
    rows, columns = torch.arange(H), torch.arange(W)
    for projected, (top, left, bottom, right) in zip(
        found.images, found.boxes.tolist(), strict=True
    ):
        inside = ((rows >= top) & (rows < bottom))[:, None] & (columns >= left) & (columns < right)
        assert not projected[:, ~inside].any()
    assert found.images.any()
    # All of a projection is in its tile, unless it is mirrored at the border.
    if name not in FOLDED:
        assert_close(found.tiles().sum((1, 2, 3)), found.images.sum((1, 2, 3)))


def test_tiles_of_fields_of_several_sizes_have_the_fields_in_their_centre():
    fields = torch.tensor([[2, 3, 6, 9], [4, -1, 9, 3], [-3, 5, 0, 8]])
    boxes = tile_boxes(fields, (20, 20))
    assert (boxes[:, 2:] - boxes[:, :2]).tolist() == [[5, 6]] * 3
    assert (boxes[:, :2] <= fields[:, :2]).all() and (boxes[:, 2:] >= fields[:, 2:]).all()
    middles = [box[:, :2] + box[:, 2:] for box in (boxes, fields)]
    assert (middles[0] - middles[1]).abs().max() <= 1
    # An axis that is shorter than the largest is the tile.
    assert tile_boxes(fields, (20, 6))[:, [1, 3]].tolist() == [[0, 6]] * 3


@torch.no_grad()
def bisected(net, layer, x, unit):
    """top, left, bottom, right of what a unit of a net depends on, in a few passes of 4 images."""
    _, k, i, j = unit
    size = torch.tensor([*x.shape[2:]] * 2)
    # How much of each side can be spoiled and the unit still is a number: between these.
    least, most = torch.zeros(4, dtype=torch.long), size.clone()
    got = []
    hook = net.get_submodule(layer).register_forward_hook(lambda *args: got.append(args[2]))
    while (least < most).any():
        spoiled, middle = x.repeat(4, 1, 1, 1), (least + most) // 2
        top, left, bottom, right = (middle + 1).tolist()
        spoiled[0, :, :top] = spoiled[1, :, :, :left] = math.nan
        spoiled[2, :, -bottom:] = spoiled[3, :, :, -right:] = math.nan
        net(spoiled)
        seen = got.pop()[:, k, i, j].isnan()
        most = torch.where(seen, middle, most)
        least = torch.where(seen, least, torch.minimum(middle + 1, most))
    hook.remove()
    return [*least[:2].tolist(), *(size - least)[2:].tolist()]


def small_convnext():
    blocks = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
    return models.convnext.ConvNeXt(blocks, num_classes=3)


@pytest.mark.parametrize(
    ("make", "layer", "size"),
    [
        (models.squeezenet1_1, "features.7", (65, 50)),
        (models.resnet18, "layer2.0", (41, 34)),
        (models.shufflenet_v2_x0_5, "stage3.0", (49, 42)),
        (small_convnext, "features.3.0", (49, 42)),
    ],
)
def test_boxes_in_networks_of_torchvision_are_what_units_see(make, layer, size):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make().eval()
    if make is models.resnet18:  # without its large part
        net = nn.Sequential(OrderedDict(list(net.named_children())[:6]))
    net, x = net.double(), image(*size)
    projector = Projector(net)
    h, w = projector.responses(x, [layer])[layer].shape[2:]
    units = [(0, 3, 0, 0), (0, 0, h // 2, w // 2), (0, 1, h - 1, w - 2)]
    found = projector(x, layer, units)
    assert found.boxes.tolist() == [bisected(net, layer, x, unit) for unit in units]


def test_units_that_see_the_whole_image_have_no_field():
    net = nn.Sequential(conv(given=3), nn.AdaptiveAvgPool2d(1), conv(1), nn.Flatten(), nn.ReLU())
    projector = Projector(net.double())
    first, *others = projector.layers(image())
    assert first.field == (3, 3) and first.stride == (1, 1) and first.offset == (0, 0)
    assert all(layer.field is layer.stride is layer.offset is None for layer in others)
    assert others[-1].shape == (4, 1, 1)
    for layer in others:
        assert projector(image(), layer.name, [(0, 1, 0, 0)]).boxes.tolist() == [[0, 0, H, W]]


def test_the_part_that_a_module_returns_is_the_part_that_is_seen():
    """A module may give the second part of a split: then its own graph begins with that."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = Branches(conv(1, 3, 2), conv(7, 3, 2, padding=3))
            self.part = Apply(lambda y: y.chunk(2, 1)[1])
            self.right = Apply(lambda y: y.split(10, 3)[1])

        def forward(self, x):
            return self.right(self.part(self.both(x)))

    projector = Projector(Net().double())
    unit = [(0, 1, 8, 5)]
    assert projector(image(), "part", unit).boxes.tolist() == [[5, 2, 12, 9]]
    assert projector(image(), "right", unit).boxes.tolist() == [[5, 12, 12, 19]]
    assert projector(image(), "both", [(0, 1, 8, 5)]).boxes.tolist() == [[8, 5, 9, 6]]


def test_channels_that_torch_shuffles_are_all_seen():
    net = nn.Sequential(Branches(conv(1, 3, 2), conv(9, 3, 2, padding=4)), nn.ChannelShuffle(2))
    try:
        found = Projector(net.double())(image(), "1", [(0, 0, 8, 8)])
    except RuntimeError as error:
        pytest.skip(str(error))  # PyTorch 2.2 has no derivative of it
    assert found.boxes.tolist() == [[4, 4, 13, 13]]


def test_a_branch_that_does_not_lead_to_a_unit_adds_nothing_to_its_box():
    net = nn.Sequential(Branches(conv(1, 3, 2), conv(9, 3, 2, padding=4)), conv(3, groups=2))
    found = Projector(net.double())(image(), "1", [(0, 0, 8, 8), (0, 3, 8, 8)])
    assert found.boxes.tolist() == [[8, 8, 11, 11], [4, 4, 15, 15]]


def test_gates_open_the_whole_image_only_if_they_are_followed():
    net, x = network(NETS["squeeze and excitation"]), image()
    unit = [(0, 1, 9, 9)]
    assert project(net, x, unit).boxes.tolist() == [[7, 7, 12, 12]]
    for options in ({"gates": "gradient"}, {"method": "gradient"}):
        assert project(net, x, unit, **options).boxes.tolist() == [[0, 0, H, W]]


def test_layers_in_place_are_listed_with_their_original_fields():
    net = nn.Sequential(conv(given=3), nn.ReLU(inplace=True), conv(), nn.ReLU(inplace=True))
    assert [layer.field for layer in Projector(net.double()).layers(image())] == [
        (3, 3),
        (3, 3),
        (5, 5),
        (5, 5),
    ]


def test_reading_leaves_nothing_behind_in_the_graph():
    """Zeros that are sent down to see what is done in place leave no hooks and no gradients."""
    net, x = network(NETS["in place on a part"]).requires_grad_(False), image().requires_grad_()
    y = net(x)
    before = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    found = read_operations(y)
    assert found.exact == {"convolution": 2, "relu": 1}
    assert all(p.grad is None for p in (x, *net.parameters()))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], before)


def test_large_networks_are_listed_quickly(caplog):
    """One walk for all layers: a walk for each took half a minute for this network."""
    import time

    net, x = models.densenet121(), torch.zeros(1, 3, 32, 32)
    start = time.process_time()
    with caplog.at_level(logging.WARNING):
        layers = Projector(net).layers(x)
    assert time.process_time() - start < 10
    assert len(layers) > 400 and not caplog.records
