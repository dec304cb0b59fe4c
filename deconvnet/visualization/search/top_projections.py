"""Projections of the strongest activations of a layer, with the image patches at their positions.

`projecting` makes them. A file of projections holds their pictures, or, once a page shows these,
refers to the files of the page, so that each picture lies in a folder once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.visualization.projection.effective_field import EffectiveField
from deconvnet.visualization.projection.projection import ProjectionReport, UnevenOverlap
from deconvnet.visualization.search.projection_grids import layer_grid
from deconvnet.visualization.search.tile_codec import (
    decode_photographs,
    decode_signed,
    encode_photographs,
    encode_signed,
    is_picture,
    pack,
    reduced,
    to_bytes,
    unpack,
)

FORMAT = "deconvnet top projections 2"
# Files of these formats hold one method, or every projection twice; they are recomputed.
OLD_FORMATS = ("deconvnet exemplars", "deconvnet top projections")
# Maps that a notebook shows.
SHOWN_MAPS = 16


@dataclass(frozen=True)
class TopProjections:
    """The projections of the k strongest activations of M maps of a layer.

    maps: (M,), the numbers of the maps. units: (M, k, 4), image, map, row, column. values: (M, k),
    the signed activations, NaN where a map has fewer than k. boxes: (M, k, 4), the receptive fields
    as top, left, bottom, right, clipped to the image. windows: (M, k, 4), what tiles and patches
    show, which may reach beyond the image. border: (M, k), whether the receptive field reaches
    beyond the image, so that padding contributes to the activation.

    tiles: by method, the one to show first comes first: (M, k, C, h, w) int8, the projections of
    the activations as signed RGB, or as one plane if the network sees grey; zero beyond the image.
    127 is the magnitude that one in a thousand of the non-zero values of the tile exceeds: only the
    shape of a tile has a meaning. A checkerboard that convolutions with an uneven overlap may leave
    is averaged out if its period is a small part of a tile. patches: (M, k, 3, h, w) uint8, the
    image in the same window, grey beyond its border. scale: the factor by which tiles were reduced,
    1 if they are as large as the window. effective: the box around each unit that the windows show,
    None if they show the receptive field. reports: of the projections, by method. sheets: for each
    map, a WebP picture of its projections in full size by one method after the other, times the
    signs of the activations (`full_tiles`, `drawing.tile_sheet`). There are none if tiles are so
    small that they are stored as they are, and, before they are saved, if tiles were not reduced.
    sheet_tile: (h, w) of these projections, at most 384 pixels a side.
    checkerboard: (M, k), see `checkerboard.checkerboard`, for the first method; NaN if no
    convolution on the way down has an uneven overlap.
    """

    layer: str
    maps: np.ndarray
    units: np.ndarray
    values: np.ndarray
    boxes: np.ndarray
    windows: np.ndarray
    border: np.ndarray
    tiles: dict[str, np.ndarray]
    patches: np.ndarray
    checkerboard: np.ndarray
    scale: float
    effective: EffectiveField | None
    reports: dict[str, ProjectionReport]
    sheets: tuple[bytes, ...] = ()
    sheet_tile: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        M, k = self.values.shape
        methods, size = " and ".join(self.methods), "x".join(map(str, self.patches.shape[3:]))
        return f"TopProjections({self.layer}: {M} maps, up to {k} units each, {methods}, {size})"

    @property
    def border_marks(self) -> np.ndarray:
        """(M, k): the examples to be marked as at the border. None if all are there, as in deep
        layers, whose receptive fields are larger than the image: a mark would then say nothing."""
        return self.border & (not self.all_at_border)

    @property
    def all_at_border(self) -> bool:
        """Whether the receptive field of every example reaches beyond the image."""
        found = np.isfinite(self.values)
        return bool(found.any() and self.border[found].all())

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, the one to show first comes first."""
        return tuple(self.tiles)

    @property
    def report(self) -> ProjectionReport:
        """The report of the first method."""
        return self.reports[self.methods[0]]

    @property
    def signs(self) -> np.ndarray:
        """(M, k) int8: the signs of the activations, 0 where there is none."""
        return np.sign(np.nan_to_num(self.values)).astype(np.int8)

    def count(self, row: int) -> int:
        """The number of activations of the map in this row; 0 if it is dead."""
        return int(np.isfinite(self.values[row]).sum())

    def full_tiles(self, row: int) -> dict[str, np.ndarray]:
        """By method, (n, C, h, w) int8: the projections of the map in this row in full size, times
        the signs of the activations; {} if there are no `sheets`, or if the map is dead."""
        if not self.sheets or not self.count(row):
            return {}
        count, planes = self.count(row), self.tiles[self.methods[0]].shape[2]
        shape = len(self.methods) * count, planes, *self.sheet_tile
        tiles = decode_signed(self.sheets[row], shape).reshape(-1, count, *shape[1:])
        return dict(zip(self.methods, tiles, strict=True))

    def with_sheets(self) -> TopProjections:
        """The same with `sheets`, unless tiles are small."""
        size = self.patches.shape[3:]
        if self.sheets or not is_picture(size):
            return self
        sheets = []
        for row in range(len(self.maps)):
            count = self.count(row)
            tiles = [tiles[row, :count] for tiles in self.tiles.values()]
            signs = np.tile(self.signs[row, :count], len(tiles))
            sheets.append(encode_signed(np.concatenate(tiles), signs) if count else b"")
        return replace(self, sheets=tuple(sheets), sheet_tile=size)

    def without_activations(self) -> TopProjections:
        """The same maps, none of which is ever active."""
        empty = {name: np.full_like(getattr(self, name), EMPTY[name]) for name in EMPTY}
        tiles = {method: np.zeros_like(tiles) for method, tiles in self.tiles.items()}
        return replace(self, **empty, tiles=tiles, sheets=())

    def _repr_png_(self) -> bytes:
        """The grid of its first maps, which a notebook shows."""
        from deconvnet.monitoring.picture_files import png

        return png(layer_grid(self, range(min(SHOWN_MAPS, len(self.maps)))))

    def save(self, path: Path, key: dict[str, object] | None = None) -> None:
        """Write the projections to an .npz file, atomically; key: what they depend on.

        Large tiles and patches lose a little precision (`tile_codec`); all else is exact.
        """
        stored = self.with_sheets()
        header = {
            "format": FORMAT,
            "layer": self.layer,
            "scale": self.scale,
            "effective": self.effective and asdict(self.effective),
            "reports": {method: asdict(report) for method, report in self.reports.items()},
            "sheet_tile": stored.sheet_tile,
            "planes": self.tiles[self.methods[0]].shape[2],
            "key": key or {},
        }
        arrays = {name: getattr(self, name) for name in ARRAYS if name != "patches"}
        counts = [self.count(row) for row in range(len(self.maps))]
        parts = {"patches": encode_photographs(self.patches, counts)}
        # Tiles can be made from the sheets.
        parts |= {"sheets": pack(stored.sheets)} if stored.sheets else {"tiles": self.tiles}
        for name, part in parts.items():
            arrays |= {f"{name}/{key}": array for key, array in part.items()}
        arrays["header"] = np.array(json.dumps(header))
        save_arrays(path, arrays, compressed=True)


# The fields of `TopProjections` that are arrays (M, k, ...), with their values where a map has
# fewer than k activations.
EMPTY = {
    "units": -1,
    "values": np.nan,
    "boxes": -1,
    "windows": -1,
    "border": False,
    "patches": 128,
    "checkerboard": np.nan,
}
ARRAYS = ("maps", *EMPTY)


def load_top_projections(path: Path, key: dict[str, object] | None = None) -> TopProjections | None:
    """Load a file of `TopProjections.save`; None if there is no file, or if its key differs.

    With a key, also None if a picture that the file refers to is missing or has changed; without
    one, a ValueError.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        arrays = load_arrays(path)
        header = json.loads(str(arrays["header"]))
        if header.get("format") in OLD_FORMATS:
            return None
        if header.get("format") != FORMAT:
            raise ValueError("it has another format")
        if key is not None and header["key"] != json.loads(json.dumps(key)):
            return None
        sheets = _sheets(path, arrays, header)
        if sheets is not None:
            return _loaded(arrays, header, sheets)
    except Exception as error:  # zipfile, zlib, json and numpy have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: damaged or not a file of top projections ({reason}); remove it"
        ) from error
    if key is None:
        (name, _), *_ = filter(None, header["pictures"])
        raise ValueError(
            f"{path}: its pictures are those of a page, {name} and others, which are missing or "
            "have changed; visualize again"
        )
    return None


def refer_to_pictures(path: Path, files: Sequence[Path | None]) -> None:
    """Remove the sheets from a file of projections, which are also in these files.

    files: for each map, None if it is dead. They are found again by their paths from the folder of
    the file, and are recognised by their content.
    """
    arrays = load_arrays(path)
    header = json.loads(str(arrays["header"]))
    pictures = [
        file and [os.path.relpath(file, path.parent).replace(os.sep, "/"), _digest(file)]
        for file in files
    ]
    if header.get("pictures") == pictures:
        return
    arrays["header"] = np.array(json.dumps({**header, "pictures": pictures}))
    kept = {name: array for name, array in arrays.items() if not name.startswith("sheets/")}
    save_arrays(path, kept, compressed=True)


def _sheets(path: Path, arrays: dict[str, np.ndarray], header: dict) -> tuple[bytes, ...] | None:
    """The pictures of a file, from itself or from the files that it refers to; None if one of these
    is missing or has changed."""
    if "pictures" not in header:
        return tuple(unpack(_under("sheets", arrays))) if "sheets/sizes" in arrays else ()
    sheets = []
    for name, digest in (picture or ("", "") for picture in header["pictures"]):
        file = path.parent / name
        if name and not (file.is_file() and _digest(file) == digest):
            return None
        sheets.append(file.read_bytes() if name else b"")
    return tuple(sheets)


def _loaded(
    arrays: dict[str, np.ndarray], header: dict, sheets: tuple[bytes, ...]
) -> TopProjections:
    reports = {method: _report(values) for method, values in header["reports"].items()}
    patches = decode_photographs(_under("patches", arrays))
    if sheets:
        shape = (*patches.shape[:2], header["planes"], *patches.shape[3:])
        tiles = {method: np.zeros(shape, np.int8) for method in reports}
    else:
        tiles = {method: arrays[f"tiles/{method}"] for method in reports}
    effective = header["effective"]
    result = TopProjections(
        **{name: arrays[name] for name in ARRAYS if name != "patches"},
        patches=patches,
        layer=header["layer"],
        tiles=tiles,
        scale=header["scale"],
        effective=effective
        and EffectiveField(*(tuple(effective[name]) for name in ("offset", "size"))),
        reports=reports,
        sheets=sheets,
        sheet_tile=tuple(header["sheet_tile"]),
    )
    for row in range(len(result.maps)):
        for method, full in result.full_tiles(row).items():
            signs = result.signs[row, : len(full), None, None, None]
            tiles[method][row, : len(full)] = _as_tiles(full * signs, patches.shape[3:])
    return result


def _as_tiles(full: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Projections (n, C, H, W) int8 in the size of tiles, with their full range again."""
    if full.shape[2:] == size:
        return full
    return to_bytes(reduced(torch.from_numpy(full).float(), size))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _under(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin with this one and a slash, without it."""
    start = f"{name}/"
    return {key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)}


def _report(values: dict) -> ProjectionReport:
    """The inverse of `asdict` and JSON."""
    pairs = ("kernel", "stride", "period")
    uneven = tuple(
        UnevenOverlap(overlap["layer"], *(tuple(overlap[name]) for name in pairs))
        for overlap in values["uneven"]
    )
    return ProjectionReport(**{**values, "uneven": uneven})
