"""The features of a layer after several epochs of training, and their file.

For every map and every epoch: the strongest activation over all images, projected to pixel space
(Zeiler and Fergus 2014, figure 4). `while_learning` records them while a layer of a deconvolutional
network learns, `from_checkpoints` computes them from the checkpoints of any network.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.monitoring.strongest_activations import Region
from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.storage.ownership import ForeignFileError
from deconvnet.visualization.projection.feature_projection import crop_box

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evolution:
    """The strongest activations of K maps after E epochs, in pixel space.

    tiles: (E, K, C, h, w), the projections, cropped to the receptive field, or to the image if that
    is smaller; signed, grey (C = 1) or RGB; zeros if the map was not active. epochs: (E,). maps:
    (K,), their numbers, from 0. boxes: (E, K, 4), image, top, left and longer side in pixels, as in
    `PixelFeatures`; image is -1 if the map was not active. values: (E, K), the activations.
    """

    tiles: Tensor
    epochs: tuple[int, ...]
    maps: tuple[int, ...]
    boxes: Tensor
    values: Tensor

    @property
    def images(self) -> Tensor:
        """(E, K): the index of the image of each tile, -1 for none."""
        return self.boxes[..., 0]

    def first_epochs(self, count: int) -> Evolution:
        """The evolution up to the first `count` epochs."""
        first = {key: value[:count] for key, value in vars(self).items() if key != "maps"}
        return replace(self, **first)

    def with_positive_values(self) -> Evolution:
        """The same as if every activation were positive: tiles and values times their sign.

        The strongest activation of a map may be positive in one epoch and negative in the next,
        where its projection has light and dark exchanged although the feature is the same.
        """
        signs = torch.where(self.values < 0, -1, 1)
        tiles = self.tiles * signs[..., None, None, None].to(self.tiles)
        return replace(self, tiles=tiles, values=self.values.abs())

    def save(self, path: Path, key: dict[str, object] | None = None) -> None:
        """Write the evolution to an .npz file, atomically; key: what it depends on.

        Tiles are stored with 11 bits of precision, everything else exactly.
        """
        # Projections of deep networks can exceed the range of float16, so each has its own unit.
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
        if key is not None:
            arrays["key"] = np.array(json.dumps(key))
        save_arrays(path, arrays)


def load_evolution(path: str | Path) -> Evolution:
    """Load a file of `Evolution.save`; raises ValueError for any other file."""
    try:
        arrays = load_arrays(path)
        tiles, units, boxes, values = (
            torch.from_numpy(arrays[name]) for name in ("tiles", "units", "boxes", "values")
        )
        epochs, maps = (tuple(arrays[name].tolist()) for name in ("epochs", "maps"))
        if not tiles.shape[:2] == values.shape == boxes.shape[:2] == (len(epochs), len(maps)):
            raise ValueError("the shapes of its arrays do not match")
        return Evolution(tiles.float() * units[..., None, None, None], epochs, maps, boxes, values)
    except OSError as error:
        reason = error.strerror or "damaged"
        raise ValueError(f"{path}: {reason}; choose a file of features over epochs") from error
    except Exception as error:  # zipfile, zlib and numpy raise their own exceptions
        raise ValueError(
            f"{path}: damaged or not a file of features over epochs ({error})"
        ) from error


def load_cached_evolution(path: Path, key: dict[str, object]) -> Evolution | None:
    """The evolution in a file; None if there is no file, or if its key differs."""
    if not path.exists():
        return None
    evolution = load_evolution(path)
    stored = load_arrays(path).get("key")
    same = stored is not None and json.loads(str(stored)) == json.loads(json.dumps(key))
    return evolution if same else None


def join_evolutions(parts: Sequence[Evolution]) -> Evolution:
    """Join evolutions of the same maps along their epochs."""
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


def append_epoch(path: Path, epoch: Evolution) -> None:
    """Add an epoch to the file of a layer.

    The same and later epochs in the file are dropped: they are from a run that was then set back. A
    file that is damaged, or not ours, is not changed, with a warning.
    """
    earlier = load_if_valid(path)
    count = sum(number < epoch.epochs[0] for number in earlier.epochs) if earlier else 0
    try:
        (join_evolutions([earlier.first_epochs(count), epoch]) if count else epoch).save(path)
    except ForeignFileError as error:
        log.warning("%s (epoch %s is left out)", error, epoch.epochs[0])


def load_if_valid(path: Path) -> Evolution | None:
    """Load the file of a layer; None if there is none or, with a warning, if it is damaged."""
    try:
        return load_evolution(path) if path.exists() else None
    except ValueError as error:
        # A damaged picture must not stop the training.
        log.warning("%s (its epochs are left out)", error)
        return None


def evolution_of_epoch(
    epoch: int, maps: Iterable[int], tiles: Tensor, boxes: Tensor, values: Tensor
) -> Evolution:
    """An evolution of one epoch; tiles: (K, C, h, w), boxes: (K, 4), values: (K,)."""
    parts = (part.cpu()[None] for part in (boxes, values))
    return Evolution(tiles.cpu()[None], (epoch,), tuple(maps), *parts)


def field_boxes(
    images: Tensor, top: Tensor, left: Tensor, field: tuple[int, int], image: Sequence[int]
) -> tuple[Tensor, tuple[int, int]]:
    """Boxes (K, 4) and their (h, w): those of the fields, or of the whole image if that is smaller.

    The box of a square field is square, also around an image that is not.
    """
    size = field
    if max(field) >= max(image):
        top, left = torch.zeros_like(top), torch.zeros_like(left)
        size = (max(image),) * 2 if field[0] == field[1] else tuple(map(min, field, image))
    return torch.stack([images, top, left, torch.full_like(top, max(size))], 1), size


def crop_boxes(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Crop the box of each image: (C, h, w) each."""
    corners = boxes[:, 1:3].tolist()
    return [crop_box(y, *corner, size) for y, corner in zip(images, corners, strict=True)]


def bounding_region(allowed: Tensor) -> Region:
    """The bounding rectangle of the allowed positions (H, W); everything if none is allowed."""
    ends = []
    for axis in (1, 0):
        inside = allowed.any(axis).nonzero()[:, 0]
        ends += (
            [int(inside[0]), int(inside[-1]) + 1] if len(inside) else [0, allowed.shape[1 - axis]]
        )
    return tuple(ends)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().tolist()
