"""The result of a projection, for any network: images, receptive fields, values and a report."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deconvnet.support.validation import as_tensor
from deconvnet.visualization.projection.boxes import crop, tile_boxes
from deconvnet.visualization.projection.projection_picture import projection_picture

if TYPE_CHECKING:
    from deconvnet.visualization.projection.projector import Projector

# Names to suggest for one that does not exist.
SUGGESTIONS = 3
# The kind of layers that are the maps of a dictionary.
CONCEPTS = "Concepts"
# What a report says of deconv without switches.
SAME_PICTURE = "no switch is passed, so the picture is the same whatever the image"

Units = Sequence[tuple[int, int, int, int]] | Tensor


@dataclass(frozen=True)
class LayerInfo:
    """A layer whose units can be projected, for images of one size.

    name: the name for the projector; kind: the class of the module; shape: (K, H, W), (K, 1, 1) for
    vectors. field, stride, offset: in pixels, along rows and columns, the size of the receptive
    field of a unit, its distance to that of the next unit, and its start for the first unit, which
    may be negative; None if a unit depends on the whole image, or if unknown. Above upsampling,
    stride and offset may be fractions (see `starts`).
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    field: tuple[int, int] | None = None
    stride: tuple[int | Fraction, int | Fraction] | None = None
    offset: tuple[int | Fraction, int | Fraction] | None = None

    def starts(self, axis: int) -> Tensor:
        """(n,): the first row (axis 0) or column (axis 1) that each row or column of units sees."""
        offset, stride = Fraction(self.offset[axis]), Fraction(self.stride[axis])
        common = math.lcm(offset.denominator, stride.denominator)
        units = torch.arange(self.shape[1 + axis])
        return (int(offset * common) + int(stride * common) * units) // common

    def inside(self, image: tuple[int, int]) -> Tensor:
        """(H, W): whether the field of a unit there lies inside an image of these sides."""
        if self.field is None:
            return torch.ones(self.shape[1:], dtype=torch.bool)
        rows, columns = (
            (first >= 0) & (first + field <= pixels)
            for first, field, pixels in (
                (self.starts(axis), self.field[axis], image[axis]) for axis in (0, 1)
            )
        )
        return rows[:, None] & columns

    def __str__(self) -> str:
        maps = "x".join(map(str, self.shape))
        field = "the whole image" if self.field is None else "{}x{}".format(*self.field)
        return f"{self.name:28} {self.kind:20} {maps:>14}   {field}"


@dataclass(frozen=True)
class Projection:
    """U separate units of a layer, projected to the input space.

    units: (U, 4), image, map, row, column. images: (U, C, H, W), the projections in the space of
    the network's input (normalised, preprocessed); zero where there is no signal. boxes: (U, 4),
    the receptive fields in pixels as top, left, bottom, right, the last two exclusive, clipped to
    the image. fields: (U, 4), the same without clipping, all of one size. values: (U,), the
    activations. report: how faithful the projection is to the paper. source: what was projected, as
    a picture needs it. In a notebook, a projection shows its picture.
    """

    units: Tensor
    images: Tensor
    boxes: Tensor
    fields: Tensor
    values: Tensor
    report: ProjectionReport
    source: Source | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images.shape[2:]))
        return f"Projection({len(self)} units in images of {size} pixels; {self.report})"

    def __len__(self) -> int:
        return len(self.units)

    def picture(self) -> Tensor:
        """(3, H, W) in [0, 1]: each unit's projection, and the image there; see
        `projection_picture`."""
        return projection_picture(self)

    def save(self, path: str | Path) -> None:
        """Write the picture to a PNG file; raises ForeignFileError rather than replace a file that
        this package did not write."""
        from deconvnet.monitoring.monitor import save_picture

        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"{path}: is written as PNG; give a name that ends in .png")
        save_picture(Path(path).expanduser(), self.picture())

    def _repr_png_(self) -> bytes:
        from deconvnet.monitoring.picture_files import png

        return png(self.picture())

    def tiles(self) -> Tensor:
        """(U, C, h, w): the projections, cropped to the fields; zeros beyond the image.

        Along an axis where the field is larger than the image, the tile shows the whole image.
        """
        return crop(self.images, tile_boxes(self.fields, tuple(self.images.shape[2:])))

    def patches(self, pixels: Tensor) -> Tensor:
        """(U, C, h, w): the same crops of the images (N, C, H, W), grey (0.5) beyond them."""
        boxes = tile_boxes(self.fields, tuple(self.images.shape[2:]))
        return crop(pixels[self.units[:, 0].to(pixels.device)], boxes, fill=0.5)


@dataclass(frozen=True)
class Source:
    """What was projected: images x (N, C, H, W), the model's input, from a layer by a projector."""

    projector: Projector
    x: Tensor
    layer: str


@dataclass(frozen=True)
class UnevenOverlap:
    """A convolution whose transpose sums more terms in some pixels than in others.

    This happens if the stride does not divide the (dilated) kernel. It leaves a regular pattern,
    the checkerboard, whatever the signal. period: of the pattern along rows and columns in pixels;
    0 if unknown.
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
    """The operations that a projection passed on its way down, and how faithful it is to the paper.

    Counts of operations by name: exact, those with a rule in the paper; linear, other linear
    operations, reversed by their transpose; extended, those with a rule in the spirit of the paper;
    skipped, contrast normalisation; unsupported, those without a rule, for which the gradient was
    used. rectified, switched: how often the signal was rectified, and sent through the switches of
    max pooling. uneven: convolutions that may leave a checkerboard; overlap: "normalised" if it was
    divided out. reason: why this method was chosen, if it was chosen automatically and is not
    deconv.
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
    reason: str = ""

    @property
    def depends_on_image(self) -> bool:
        """Whether the projection of a unit depends on the image, beyond its scale.

        With deconv, the image enters only through the switches of max pooling, through gates and
        through gradients. Without any of them, all images give the same picture.
        """
        gated = any("gate" in name for name in self.extended)
        rectified = self.rectified and self.method != "deconv"
        return bool(self.switched or rectified or gated or self.unsupported)

    @property
    def faithful(self) -> bool:
        """Whether every operation has a rule in the paper, is linear, or is skipped."""
        return not (self.extended or self.unsupported) and self.overlap == "sum"

    def __str__(self) -> str:
        lines = [f"{self.method}: rectified {self.rectified}, switched {self.switched} times"]
        if self.reason:
            lines.append(f"chosen because {self.reason}")
        if self.rectified and not self.depends_on_image:
            lines.append(SAME_PICTURE)
        for key in ("exact", "linear", "extended", "skipped", "unsupported"):
            counts = getattr(self, key)
            if counts:
                lines.append(f"{key}: {counted(counts)}")
        if self.uneven:
            state = "divided out" if self.overlap == "normalised" else "may show as a checkerboard"
            lines.append(f"uneven overlap, {state}: {', '.join(map(str, self.uneven))}")
        return "; ".join(lines)


def counted(counts: dict[str, int]) -> str:
    """Counts by name, as text."""
    return ", ".join(f"{name} x{count}" for name, count in sorted(counts.items()))


def check_units(
    units: Units, images: int, layer: str, shape: tuple[int, int, int] | None = None
) -> Tensor:
    """Units as a long tensor (U, 4); raises ValueError if one does not exist.

    images: the number of images; shape: (K, H, W) of the layer, if it is known yet.
    """
    try:
        units = torch.as_tensor(units).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"units: expected rows of (image, map, row, column): {error}") from None
    if units.numel() == 0:
        return units.new_zeros(0, 4, dtype=torch.long)
    if units.dim() != 2 or units.shape[1] != 4 or units.is_floating_point():
        raise ValueError(
            f"units are {units.dtype} {tuple(units.shape)}: expected rows of integers (image, map, "
            "row, column)"
        )
    units = units.long()
    if shape is None:
        invalid = units[(units[:, 0] < 0) | (units[:, 0] >= images)]
        if len(invalid):
            raise ValueError(
                f"unit {tuple(invalid[0].tolist())} (image, map, row, column): there are {images} "
                "images"
            )
        return units
    limits = torch.tensor([images, *shape])
    invalid = ((units < 0) | (units >= limits)).any(1).nonzero()
    if len(invalid):
        raise ValueError(
            f"unit {tuple(units[invalid[0, 0]].tolist())} (image, map, row, column): there are "
            f"{images} images, and {layer} has {shape[0]} maps of {shape[1]}x{shape[2]}"
        )
    return units


def check_input(x: Tensor) -> Tensor:
    """Images (N, C, H, W) as a floating-point tensor, from a tensor or a NumPy array."""
    if not isinstance(x, (Tensor, np.ndarray)):
        kind = type(x).__name__
        raise ValueError(f"x is {kind}: expected images (N, C, H, W) of floating point")
    x = as_tensor(x, "x")
    if x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"x is {got}: expected images (N, C, H, W) of floating point")
    return x


def unknown_layer(name: str, names: Sequence[str]) -> ValueError:
    """The error for a layer that does not exist, with similar names."""
    if not isinstance(name, str):
        return ValueError(f"layer {name!r}: must be a name; {suggest_layers('', names)}")
    calls = [other for other in names if other.startswith(f"{name}#")]
    if calls:
        return ValueError(
            f"layer {name!r}: called {len(calls)} times; choose {', '.join(calls[:4])}"
        )
    return ValueError(f"layer {name!r}: no such layer; {suggest_layers(name, names)}")


def suggest_layers(name: str, names: Sequence[str]) -> str:
    """Suggest names that are similar to a name, or list those that exist."""
    if not names:
        return "the model calls no module that gives maps (N, K, H, W) or vectors (N, K)"
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    # layer1.relu may mean layer1.0.relu#0; the last such layers come first, as they are outputs.
    parts = _corrected(name.split("."), names)
    within = [other for other in names if _has_parts(other, parts)][: -SUGGESTIONS - 1 : -1]
    if within or close:
        return f"did you mean {', '.join(within or close)}?"
    more = ", ..." if len(names) > 12 else ""
    return f"there are {', '.join(names[:12])}{more}"


def _corrected(parts: list[str], names: Sequence[str]) -> list[str]:
    """The parts of a dotted name, each as the most similar part of the names: layr1.relu."""
    if len(parts) == 1:
        return parts
    known = sorted({part for name in names for part in name.partition("#")[0].split(".")})
    close = [difflib.get_close_matches(part, known, n=1, cutoff=0.75) for part in parts]
    return [found[0] if found else part for part, found in zip(parts, close, strict=True)]


def _has_parts(name: str, parts: list[str]) -> bool:
    """Whether a dotted name contains some parts, in their order."""
    rest = iter(name.partition("#")[0].split("."))
    return all(part in rest for part in parts)
