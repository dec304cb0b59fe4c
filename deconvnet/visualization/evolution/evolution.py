"""The features of a layer after several epochs of training, and the file that holds them.

For every map and every epoch: the strongest activation over all images, projected to pixel space
(Zeiler and Fergus 2014, figure 4). `snapshots` records them while a layer of a deconvolutional
network learns, `checkpoints` takes them from the checkpoints of any network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.monitoring.peaks import Region
from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.storage.ownership import ForeignFileError
from deconvnet.visualization.projection.pixel_features import crop_square

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evolution:
    """The strongest activations of some maps after some epochs, in pixel space.

    tiles: (E, K, C, S, S) the projections, each cut to its field or to the image if that is
    smaller; signed, grey (C = 1) or red, green, blue; zeros where the map was not active.
    epochs: (E,). maps: (K,) their numbers, from 0. boxes: (E, K, 4) image, top, left, side S in
    pixels, as in `Features`; image -1 where the map was not active. values: (E, K) the activations.
    """

    tiles: Tensor
    epochs: tuple[int, ...]
    maps: tuple[int, ...]
    boxes: Tensor
    values: Tensor

    @property
    def images(self) -> Tensor:
        """(E, K): the image of each tile, -1 for none."""
        return self.boxes[..., 0]

    def head(self, count: int) -> Evolution:
        """The first columns alone."""
        chosen = {key: value[:count] for key, value in vars(self).items() if key != "maps"}
        return replace(self, **chosen)

    def save(self, path: Path) -> None:
        """Write it to an .npz file, whole or not at all: tiles with eleven bits of precision, the
        rest exactly."""
        # Projections of deep networks can be beyond the range of float16: each in units of its own.
        units = self.tiles.float().flatten(2).abs().amax(2)
        units[units == 0] = 1
        arrays = {
            "tiles": (self.tiles.float() / units[..., None, None, None]).half().cpu().numpy(),
            "units": units.cpu().numpy(),
            "epochs": np.array(self.epochs),
            "maps": np.array(self.maps),
            "boxes": self.boxes.cpu().numpy(),
            "values": self.values.cpu().numpy(),
        }
        save_arrays(path, arrays)


def load_evolution(path: str | Path) -> Evolution:
    """What `Evolution.save` wrote; ValueError where the file is anything else."""
    try:
        found = load_arrays(path)
        tiles, units, boxes, values = (
            torch.from_numpy(found[name]) for name in ("tiles", "units", "boxes", "values")
        )
        epochs, maps = (tuple(found[name].tolist()) for name in ("epochs", "maps"))
        if not tiles.shape[:2] == values.shape == boxes.shape[:2] == (len(epochs), len(maps)):
            raise ValueError("its arrays do not fit together")
        return Evolution(tiles.float() * units[..., None, None, None], epochs, maps, boxes, values)
    except OSError as error:
        reason = error.strerror or "damaged"
        raise ValueError(f"{path}: {reason}; choose a file of features over epochs") from error
    except Exception as error:  # zipfile, zlib and numpy have a dozen kinds
        raise ValueError(
            f"{path}: damaged or not a file of features over epochs ({error})"
        ) from error


def join_evolutions(parts: Sequence[Evolution]) -> Evolution:
    """The columns of several evolutions of the same maps as one."""
    maps, shape = parts[0].maps, parts[0].tiles.shape[1:]
    for part in parts:
        if (part.maps, part.tiles.shape[1:]) != (maps, shape):
            raise ValueError(
                f"epoch {part.epochs[0]} has {len(part.maps)} maps in tiles of "
                f"{tuple(part.tiles.shape[2:])}, epoch {parts[0].epochs[0]} {len(maps)} in tiles "
                f"of {tuple(shape[1:])}: expected checkpoints of one network and images of one size"
            )
    tiles, boxes, values = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("tiles", "boxes", "values")
    )
    return Evolution(tiles, tuple(e for part in parts for e in part.epochs), maps, boxes, values)


def append_epoch(path: Path, column: Evolution) -> None:
    """Write one more column to the file of a layer.

    From its epoch on the file is forgotten: that was left by a run which then went back. A file
    that is damaged, or somebody else's, stays as it is, with a warning.
    """
    known = load_if_valid(path)
    kept = sum(epoch < column.epochs[0] for epoch in known.epochs) if known else 0
    try:
        (join_evolutions([known.head(kept), column]) if kept else column).save(path)
    except ForeignFileError as error:
        log.warning("%s (epoch %s is left out)", error, column.epochs[0])


def load_if_valid(path: Path) -> Evolution | None:
    """What is in the file of a layer; None if there is none or, with a warning, a damaged one."""
    try:
        return load_evolution(path) if path.exists() else None
    except ValueError as error:
        # Some columns of a picture are no reason to stop a training.
        log.warning("%s (its columns are left out)", error)
        return None


def evolution_of_epoch(
    epoch: int, maps: Iterable[int], tiles: Tensor, boxes: Tensor, values: Tensor
) -> Evolution:
    """An evolution of one epoch, tiles (K, C, S, S), boxes (K, 4), values (K,)."""
    parts = (part.cpu()[None] for part in (boxes, values))
    return Evolution(tiles.cpu()[None], (epoch,), tuple(maps), *parts)


def square_boxes(
    images: Tensor, top: Tensor, left: Tensor, side: int, image: Sequence[int]
) -> Tensor:
    """(K, 4) squares around fields of this side, or around the whole image if it is smaller."""
    if side >= max(image):
        top, left, side = torch.zeros_like(top), torch.zeros_like(left), max(image)
    return torch.stack([images, top, left, torch.full_like(top, side)], 1)


def crop_boxes(images: Tensor, boxes: Tensor) -> list[Tensor]:
    """(C, S, S) each: the box of each image."""
    return [crop_square(y, *box) for y, (_, *box) in zip(images, boxes.tolist(), strict=True)]


def bounding_region(allowed: Tensor) -> Region:
    """The rectangle of the places (H, W) that are allowed; all if none is."""
    ends = []
    for axis in (1, 0):
        inside = allowed.any(axis).nonzero()[:, 0]
        ends += (
            [int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, allowed.shape[1 - axis]]
        )
    return tuple(ends)


def evenly_spaced(count: int, most: int) -> list[int]:
    """Up to `most` of `count` numbers, the same distance apart."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
