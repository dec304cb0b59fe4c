"""Codes as events: the non-zero coefficients of maps as a table, instead of dense arrays.

N images · K maps · h, w filter · M events, the non-zero coefficients of all images
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.convolution import Boundary, check_boundary
from deconvnet.support.validation import as_tensor

# `kind` in the settings of a file written by `Events.save`.
EVENTS = "events"
COLUMNS = ("image", "map", "row", "column")
INTEGERS = (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Events:
    """The non-zero coefficients of maps: coefficient m is value[m] at one place of one map.

        z[image[m], map[m], row[m], column[m]] = value[m],      z = 0 elsewhere

    image, map, row, column: (M,) int64, counted from 0, on the device of value (M,). shape: that of
    z, (N, K, rows, columns). filter_size (h, w) and boundary: those of the code, if it is one of
    `sparse_code`. The events of a solution are sorted by image, map, row and column. `len` is M. An
    index selects rows of the table: a number, a slice, a mask (M,), or several numbers, as in
    `events[events.map == 3]`.
    """

    image: Tensor
    map: Tensor
    row: Tensor
    column: Tensor
    value: Tensor
    shape: tuple[int, int, int, int]
    filter_size: tuple[int, int] | None = None
    boundary: Boundary | None = None

    def __post_init__(self) -> None:
        for name in (*COLUMNS, "value"):
            column = as_tensor(getattr(self, name), name)
            object.__setattr__(self, name, column if name == "value" else _integers(column, name))
            if column.ndim != 1 or len(column) != len(self.image):
                raise ValueError(
                    f"{name} of shape {tuple(column.shape)}: must be (M,) like image, of shape "
                    f"{tuple(self.image.shape)}"
                )
        object.__setattr__(self, "shape", _sizes(self.shape, 4, "shape"))
        if self.filter_size is not None:
            object.__setattr__(self, "filter_size", _sizes(self.filter_size, 2, "filter_size"))
        if self.boundary is not None:
            check_boundary(self.boundary)
        for name, size in zip(COLUMNS, self.shape, strict=True):
            numbers = getattr(self, name)
            if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
                raise ValueError(
                    f"{name} from {int(numbers.min())} to {int(numbers.max())}: must lie in 0 to "
                    f"{size - 1}, for maps of the shape {self.shape}"
                )

    @classmethod
    def of_maps(
        cls,
        z: Tensor,
        *,
        filter_size: tuple[int, int] | None = None,
        boundary: Boundary | None = None,
    ) -> Events:
        """The events of maps z (N, K, rows, columns) of any floating dtype."""
        z = as_tensor(z, "z")
        if z.ndim != 4:
            raise ValueError(f"z of shape {tuple(z.shape)}: expected maps (N, K, rows, columns)")
        indices = z.nonzero().T.contiguous()
        return cls(*indices, z[tuple(indices)], tuple(z.shape), filter_size, boundary)

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, events: int | slice | Tensor) -> Events:
        # One event is a table of one row, so that loops over events end.
        events = [events] if isinstance(events, (int, np.integer)) else events
        columns = {name: getattr(self, name)[events] for name in (*COLUMNS, "value")}
        return dataclasses.replace(self, **columns)

    def __repr__(self) -> str:
        return f"Events({len(self)} of maps {'x'.join(map(str, self.shape))})"

    def of_images(self, images: int | slice) -> Events:
        """The events of one image, or of a slice of the images, which are then counted from 0."""
        N = self.shape[0]
        if isinstance(images, slice):
            chosen = range(N)[images]
        elif -N <= images < N:
            chosen = [range(N)[images]]
        else:
            raise ValueError(f"images={images}: must lie in {-N} to {N - 1}, for {N} images")
        number = torch.full((N,), -1, device=self.value.device)
        number[list(chosen)] = torch.arange(len(chosen), device=number.device)
        events = self[number[self.image] >= 0]
        return dataclasses.replace(
            events, image=number[events.image], shape=(len(chosen), *self.shape[1:])
        )

    def maps(self) -> Tensor:
        """The maps z (N, K, rows, columns), equal to those of the solution in every bit.

        Except that a negative zero is a zero.
        """
        z = self.value.new_zeros(self.shape)
        z[self.image, self.map, self.row, self.column] = self.value
        return z

    def corners(self) -> Tensor:
        """(M, 2) int64: row and column of the first pixel, at the top left, that each event paints.

        For a signal of one row, the column is the time at which the filter begins. With boundary
        "valid" the pixel is (row-h+1, column-w+1) and may lie beyond the top or left border, that
        is, be negative; so it may with "zero" and "reflect", where it is (row-(h-1)//2,
        column-(w-1)//2). With "circular" it is (row, column), and what leaves the image enters on
        the other side. Raises ValueError if the filter size or the boundary is unknown.
        """
        if self.filter_size is None or self.boundary is None:
            raise ValueError(
                f"filter_size={self.filter_size}, boundary={self.boundary}: must be given to place "
                "events in the image, for example by Events.of_maps(z, filter_size=..., "
                "boundary=...)"
            )
        place = torch.stack([self.row, self.column], 1)
        if self.boundary == "circular":
            return place
        size = place.new_tensor(self.filter_size)
        return place - (size - 1 if self.boundary == "valid" else (size - 1) // 2)

    def centres(self) -> Tensor:
        """(M, 2) int64: row and column of the pixel on which the centre of each filter lies.

        ((h-1)//2, (w-1)//2) beyond the corner: with boundary "valid" (row-h//2, column-w//2),
        which lies beyond the border if less than half of the filter is visible; with "zero" and
        "reflect" (row, column). Raises ValueError as `corners` does.
        """
        corners = self.corners()
        centres = corners + (corners.new_tensor(self.filter_size) - 1) // 2
        if self.boundary == "circular":
            centres %= centres.new_tensor(self.shape[2:])
        return centres

    def to_numpy(self) -> np.ndarray:
        """A structured array (M,) with the fields image, map, row, column and value.

        `pandas.DataFrame` takes it as it is.
        """
        columns = {name: getattr(self, name).cpu().numpy() for name in COLUMNS}
        # numpy has no bfloat16.
        value = self.value.float() if self.value.dtype == torch.bfloat16 else self.value
        columns["value"] = value.cpu().numpy()
        table = np.empty(len(self), [(name, column.dtype) for name, column in columns.items()])
        for name, column in columns.items():
            table[name] = column
        return table

    def save(self, path: str | Path) -> None:
        """Write the table to a .safetensors file, safe to share and to load.

        Indices are stored in the smallest integers that hold them, so a float32 event takes 12
        bytes if no side exceeds 32,768. Raises ValueError if a value is not finite.
        """
        from deconvnet.storage.network_files import save_network

        if not torch.isfinite(self.value).all():
            raise ValueError(f"{path}: events must be finite: there are NaN or infinite values")
        tensors = {
            name: getattr(self, name).to(_smallest(size))
            for name, size in zip(COLUMNS, self.shape, strict=True)
        }
        settings = {
            "kind": EVENTS,
            "shape": self.shape,
            "filter_size": self.filter_size,
            "boundary": self.boundary,
        }
        save_network(Path(path), {**tensors, "value": self.value}, settings)

    @classmethod
    def load(cls, path: str | Path) -> Events:
        """The events of a file of `save`, on the CPU.

        Raises InvalidFileError, in one line, for any other file.
        """
        from deconvnet.storage.file_checks import InvalidFileError
        from deconvnet.storage.network_files import load_network

        tensors, settings = load_network(Path(path))
        if settings.pop("kind", None) != EVENTS:
            raise InvalidFileError(
                f"{path}: holds no events of Events.save; a network is read by deconvnet.load"
            )
        try:
            return cls(**tensors, **settings)
        except Exception as error:  # invalid settings may fail anywhere
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidFileError(f"{path}: not events of this version ({reason})") from None


def _integers(column: Tensor, name: str) -> Tensor:
    if column.dtype not in INTEGERS:
        raise ValueError(f"{name} must be integers, got {column.dtype}: use {name}.long()")
    return column.long()


def _sizes(value: Any, number: int, name: str) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(sizes) != number or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise ValueError(f"{name}={value!r}: must be {number} whole numbers")
    return sizes


def _smallest(size: int) -> torch.dtype:
    """The smallest integer type for the numbers 0 to size - 1."""
    return next(dtype for dtype in INTEGERS if size - 1 <= torch.iinfo(dtype).max)
