"""What a projection is, whichever network it comes from: pictures, places, values and a report."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deconvnet.support.validation import as_tensor

CHOICES = 3

Units = Sequence[tuple[int, int, int, int]] | Tensor


@dataclass(frozen=True)
class LayerInfo:
    """A layer whose units can be projected, as it answers to one image.

    name: as the projector takes it; kind: the class of the module; shape: (K, H, W), of vectors
    (K, 1, 1); field, stride, offset: pixels that a unit sees, that two neighbours are apart, and
    where the first unit's field begins (negative: before the image), rows and columns; None where
    a unit sees the whole image or this is not known.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    field: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    offset: tuple[int, int] | None = None

    def inside(self, image: tuple[int, int]) -> Tensor:
        """(H, W): whether the field of a unit there lies inside an image of so many pixels."""
        if self.field is None:
            return torch.ones(self.shape[1:], dtype=torch.bool)
        rows, columns = (
            (first >= 0) & (first + field <= pixels)
            for first, field, pixels in (
                (self.offset[axis] + self.stride[axis] * torch.arange(size), field, pixels)
                for axis, (size, field, pixels) in enumerate(
                    zip(self.shape[1:], self.field, image, strict=True)
                )
            )
        )
        return rows[:, None] & columns

    def __str__(self) -> str:
        maps = "x".join(map(str, self.shape))
        field = "the whole image" if self.field is None else "{}x{}".format(*self.field)
        return f"{self.name:28} {self.kind:20} {maps:>14}   {field}"


@dataclass(frozen=True)
class Projection:
    """Some units of a layer in the space of the input, each alone.

    units: (U, 4) image, map, row, column; images: (U, C, H, W) in the space that the network sees
    (normalised, preprocessed), zero where there is nothing; boxes: (U, 4) top, left, bottom, right
    of the receptive fields in pixels, the last two exclusive, clipped to the image; fields: the
    same unclipped, of one size for all units; values: (U,) the activations; report: how faithful.
    """

    units: Tensor
    images: Tensor
    boxes: Tensor
    fields: Tensor
    values: Tensor
    report: ProjectionReport

    def __len__(self) -> int:
        return len(self.units)

    def tiles(self) -> Tensor:
        """(U, C, h, w): the projections, cut to the fields; zeros beyond the image.

        Along an axis where the field is larger than the image the tile is the image.
        """
        return crop(self.images, tile_boxes(self.fields, tuple(self.images.shape[2:])))

    def patches(self, pixels: Tensor) -> Tensor:
        """(U, C, h, w): the same places of the images (N, C, H, W), grey (0.5) beyond them."""
        boxes = tile_boxes(self.fields, tuple(self.images.shape[2:]))
        return crop(pixels[self.units[:, 0].to(pixels.device)], boxes, fill=0.5)


@dataclass(frozen=True)
class UnevenOverlap:
    """A convolution whose transpose paints some pixels with more terms than others.

    It does where its stride does not divide the (dilated) kernel, and leaves a regular pattern, the
    checkerboard, whatever the signal. period: of the pattern in pixels, rows and columns,
    0 if it is not known.
    """

    layer: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    period: tuple[int, int]

    def __str__(self) -> str:
        kernel, stride, period = (
            "x".join(map(str, pair)) for pair in (self.kernel, self.stride, self.period)
        )
        pattern = f": a pattern of {period} pixels" if all(self.period) else ""
        return f"{self.layer} ({kernel} with stride {stride}{pattern})"


@dataclass(frozen=True)
class ProjectionReport:
    """What a projection passed on its way down, and how far it is that of the paper.

    exact: operations that the paper has a rule for; linear: others, linear, reversed by their
    transpose; extended: others, by a rule made in the spirit of the paper's; skipped: contrast
    normalisation; unsupported: no rule, the gradient was used; rectified, switched: how often the
    signal was rectified, and sent through the switches of max pooling; uneven: what may show as a
    checkerboard; overlap: "normalised" if it was divided out.
    """

    method: str
    exact: dict[str, int] = field(default_factory=dict)
    linear: dict[str, int] = field(default_factory=dict)
    extended: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    unsupported: dict[str, int] = field(default_factory=dict)
    rectified: int = 0
    switched: int = 0
    uneven: tuple[UnevenOverlap, ...] = ()
    overlap: str = "sum"

    @property
    def faithful(self) -> bool:
        """Whether every operation has a rule in the paper or is linear."""
        return not (self.extended or self.unsupported) and self.overlap == "sum"

    def __str__(self) -> str:
        lines = [f"{self.method}: rectified {self.rectified}, switched {self.switched} times"]
        for key in ("exact", "linear", "extended", "skipped", "unsupported"):
            counts = getattr(self, key)
            if counts:
                lines.append(f"{key}: {', '.join(f'{k} x{n}' for k, n in sorted(counts.items()))}")
        if self.uneven:
            state = "divided out" if self.overlap == "normalised" else "may show as a checkerboard"
            lines.append(f"uneven overlap, {state}: {', '.join(map(str, self.uneven))}")
        return "; ".join(lines)


def tile_boxes(fields: Tensor, image: tuple[int, int]) -> Tensor:
    """(U, 4) of one size: fields as they are, or the image along an axis that is shorter than they.

    Where fields differ (above an enlargement or an adaptive pooling), as large as the largest.
    """
    boxes = fields.clone()
    for axis, size in enumerate(image if len(boxes) else ()):
        lengths = boxes[:, axis + 2] - boxes[:, axis]
        longest = lengths.max()
        boxes[:, axis] -= (longest - lengths) // 2
        boxes[:, axis + 2] = boxes[:, axis] + longest
        if longest >= size:
            boxes[:, axis], boxes[:, axis + 2] = 0, size
    return boxes


def crop(images: Tensor, boxes: Tensor, *, fill: float = 0.0) -> Tensor:
    """(U, C, h, w) from images (U, C, H, W): boxes (U, 4) of one size, which may reach beyond."""
    parts = []
    H, W = images.shape[2:]
    for image, (top, left, bottom, right) in zip(images, boxes.tolist(), strict=True):
        inside = image[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        outside = (
            *(min(max(-left, 0), right - left), min(max(right - W, 0), right - left)),
            *(min(max(-top, 0), bottom - top), min(max(bottom - H, 0), bottom - top)),
        )
        parts.append(F.pad(inside, outside, value=fill))
    return torch.stack(parts) if parts else images[:0]


def check_units(
    units: Units, images: int, layer: str, shape: tuple[int, int, int] | None = None
) -> Tensor:
    """Units as a long tensor (U, 4), if all of them exist; shape: of the layer, if it is known."""
    try:
        found = torch.as_tensor(units).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"units: expected rows of (image, map, row, column): {error}") from None
    if found.numel() == 0:
        return found.new_zeros(0, 4, dtype=torch.long)
    if found.dim() != 2 or found.shape[1] != 4 or found.is_floating_point():
        raise ValueError(
            f"units are {found.dtype} {tuple(found.shape)}: expected rows of integers (image, map, "
            "row, column)"
        )
    found = found.long()
    if shape is None:
        wrong = found[(found[:, 0] < 0) | (found[:, 0] >= images)]
        if len(wrong):
            raise ValueError(
                f"unit {tuple(wrong[0].tolist())} (image, map, row, column): there are {images} "
                "images"
            )
        return found
    limits = torch.tensor([images, *shape])
    wrong = ((found < 0) | (found >= limits)).any(1).nonzero()
    if len(wrong):
        raise ValueError(
            f"unit {tuple(found[wrong[0, 0]].tolist())} (image, map, row, column): there are "
            f"{images} images, and {layer} has {shape[0]} maps of {shape[1]}x{shape[2]}"
        )
    return found


def check_input(x: Tensor) -> Tensor:
    """Images (N, C, H, W) of floating point as a tensor, from one or from a numpy array."""
    if not isinstance(x, (Tensor, np.ndarray)):
        kind = type(x).__name__
        raise ValueError(f"x is {kind}: expected images (N, C, H, W) of floating point")
    x = as_tensor(x, "x")
    if x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"x is {got}: expected images (N, C, H, W) of floating point")
    return x


def unknown_layer(name: str, names: Sequence[str]) -> ValueError:
    """The error for a layer that does not exist, with the names that are close to it."""
    calls = [known for known in names if known.startswith(f"{name}#")]
    if calls:
        return ValueError(
            f"layer {name!r}: called {len(calls)} times; choose {', '.join(calls[:4])}"
        )
    return ValueError(f"layer {name!r}: no such layer; {suggest_layers(name, names)}")


def _has_parts(known: str, parts: list[str]) -> bool:
    """Whether a dotted name has all of some parts, in their order."""
    rest = iter(known.partition("#")[0].split("."))
    return all(part in rest for part in parts)


def suggest_layers(name: str, names: Sequence[str]) -> str:
    """What may be meant by a name, or which names there are."""
    if not names:
        return "the model calls no module that gives maps (N, K, H, W) or vectors (N, K)"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    # layer1.relu is part of layer1.0.relu#0; of several the last, whose output is that of the part.
    within = [known for known in names if _has_parts(known, name.split("."))][: -CHOICES - 1 : -1]
    if within or close:
        return f"did you mean {', '.join(within or close)}?"
    more = ", ..." if len(names) > 12 else ""
    return f"there are {', '.join(names[:12])}{more}"
