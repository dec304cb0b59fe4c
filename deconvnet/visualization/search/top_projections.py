"""Projections of the strongest activations of a layer, with the image patches at their positions.

`projecting` makes them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.visualization.projection.effective_field import EffectiveField
from deconvnet.visualization.projection.projection import ProjectionReport, UnevenOverlap
from deconvnet.visualization.search.projection_grids import layer_grid
from deconvnet.visualization.search.tile_codec import (
    decode_full,
    decode_tiles,
    encode_tiles,
    pack,
    unpack,
)

FORMAT = "deconvnet top projections"
# Files of this format hold one method, and are recomputed.
OLD_FORMAT = "deconvnet exemplars"
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
    shape of a tile has a meaning. patches: (M, k, 3, h, w) uint8, the image in the same window,
    grey beyond its border. scale: the factor by which tiles were reduced, 1 if they are as large as
    the window. effective: the box around each unit that the windows show, None if they show the
    receptive field. reports: of the projections, by method. full: if tiles were reduced, by method
    (M, k) pictures of the projections in the window in full size, as `full_tiles` decodes them;
    full_shape: (h, w) of these, at most 384 pixels a side. checkerboard: (M, k), see
    `checkerboard.checkerboard`, for the first method; NaN if no convolution on the way down has an
    uneven overlap.
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
    full: dict[str, np.ndarray] = field(default_factory=dict)
    full_shape: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        M, k = self.values.shape
        methods, size = " and ".join(self.methods), "x".join(map(str, self.patches.shape[3:]))
        return f"TopProjections({self.layer}: {M} maps, up to {k} units each, {methods}, {size})"

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

    def full_tiles(self, row: int, method: str) -> np.ndarray | None:
        """(n, C, h, w) int8: the projections of the map in this row in full size, in the units of
        `tiles`; None if the tiles have it already, or if the map is dead."""
        count = self.count(row)
        if method not in self.full or not count:
            return None
        return decode_full(self.full[method][row, :count], self.tiles[method].shape[2])

    def without_activations(self) -> TopProjections:
        """The same maps, none of which is ever active."""
        empty = {name: np.full_like(getattr(self, name), EMPTY[name]) for name in EMPTY}
        tiles = {method: np.zeros_like(tiles) for method, tiles in self.tiles.items()}
        return replace(self, **empty, tiles=tiles, full={})

    def _repr_png_(self) -> bytes:
        """The grid of its first maps, which a notebook shows."""
        from deconvnet.monitoring.picture_files import png

        return png(layer_grid(self, range(min(SHOWN_MAPS, len(self.maps)))))

    def save(self, path: Path, key: dict[str, object] | None = None) -> None:
        """Write the projections to an .npz file, atomically; key: what they depend on.

        Large tiles and patches lose a little precision (`tile_codec`); all else is exact.
        """
        header = {
            "format": FORMAT,
            "layer": self.layer,
            "scale": self.scale,
            "effective": self.effective and asdict(self.effective),
            "reports": {method: asdict(report) for method, report in self.reports.items()},
            "full": list(self.full),
            "full_shape": self.full_shape,
            "key": key or {},
        }
        arrays = {name: getattr(self, name) for name in ARRAYS if name != "patches"}
        counts = [self.count(row) for row in range(len(self.maps))]
        for name, tiles in {**self.tiles, "patches": self.patches}.items():
            parts = encode_tiles(tiles, counts)
            arrays |= {f"{name}/{part}": array for part, array in parts.items()}
        for method, pictures in self.full.items():
            parts = pack(pictures)
            arrays |= {f"full/{method}/{part}": array for part, array in parts.items()}
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
    """Load a file of `TopProjections.save`; None if there is no file, or if its key differs."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        arrays = load_arrays(path)
        header = json.loads(str(arrays.pop("header")))
        if header.get("format") == OLD_FORMAT:
            return None
        if header.get("format") != FORMAT:
            raise ValueError("it has another format")
        if key is not None and header["key"] != json.loads(json.dumps(key)):
            return None
        reports = {method: _report(values) for method, values in header["reports"].items()}
        tiles = {name: decode_tiles(_under(name, arrays)) for name in (*reports, "patches")}
        return TopProjections(
            **{name: arrays[name] for name in ARRAYS if name != "patches"},
            patches=tiles.pop("patches"),
            layer=header["layer"],
            tiles=tiles,
            scale=header["scale"],
            effective=header["effective"]
            and EffectiveField(*(tuple(header["effective"][name]) for name in ("offset", "size"))),
            reports=reports,
            # Older files have no projections in full size.
            full={name: unpack(_under(f"full/{name}", arrays)) for name in header.get("full", ())},
            full_shape=tuple(header.get("full_shape", (0, 0))),
        )
    except Exception as error:  # zipfile, zlib, json and numpy have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: damaged or not a file of top projections ({reason}); remove it"
        ) from error


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
