"""The strongest activations of every map of some layers, in one pass over a data set of any size.

    K maps · k activations for each map · N images

Every image contributes at most one activation to a map: its strongest. The pass keeps only a table
of a few kilobytes. The result does not depend on how many images go through the network at a time:
among equal activations, the one in the earlier image comes first. Tables of parts of a data set,
such as those of several processes, are merged by the same rule.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.search_region import searched_units

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

FORMAT = "deconvnet strongest activations"
SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class TopActivations:
    """The strongest activations of every map of one layer, strongest first.

    values: (K, k), with fewer columns if there were fewer than k images; images: (K, k), their
    indices in the data set; rows, columns: (K, k), positions in the map. Over all `num_images`
    images: active_images (K,), the number of images on which the map was active; peak_sum (K,), the
    sum of the strongest activation in each image; density_sum (K,), the sum of the fraction of
    active positions in each image.
    """

    values: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    num_images: int
    active_images: np.ndarray
    peak_sum: np.ndarray
    density_sum: np.ndarray

    def __repr__(self) -> str:
        K, k = self.values.shape
        return (
            f"TopActivations({K} maps, {int(self.dead.sum())} of them dead, the {k} strongest in "
            f"{self.num_images} images)"
        )

    @property
    def dead(self) -> np.ndarray:
        """(K,): whether no image has activated the map."""
        return self.active_images == 0

    def units(self, map: int) -> list[tuple[int, int, int, int]]:
        """(image, map, row, column) of the activations of one map that are above zero."""
        columns = (self.values, self.images, self.rows, self.columns)
        table = zip(*(column[map].tolist() for column in columns), strict=True)
        return [(image, map, row, column) for value, image, row, column in table if value > 0]


# The names of the fields in files.
STORED = {
    "num_images": "seen",
    "active_images": "active",
    "peak_sum": "total",
    "density_sum": "density",
}


@dataclass(frozen=True)
class SearchState:
    """The state of a search after `done` images: a table for each layer, and what identifies it.

    key: what the tables depend on; a search only resumes from a state with the same key.
    """

    tops: dict[str, TopActivations]
    done: int
    key: dict[str, object] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the state to an .npz file, atomically."""
        arrays = {
            f"{number}/{STORED.get(entry.name, entry.name)}": getattr(top, entry.name)
            for number, top in enumerate(self.tops.values())
            for entry in fields(TopActivations)
        }
        header = {"format": FORMAT, "layers": list(self.tops), "done": self.done, "key": self.key}
        save_arrays(path, {"header": np.array(json.dumps(header)), **arrays})

    @classmethod
    def load(cls, path: Path) -> SearchState:
        """Load what `save` wrote; raises ValueError in one line for any other file."""
        try:
            arrays = load_arrays(path)
            header = json.loads(str(arrays["header"]))
            if header.get("format") != FORMAT:
                raise ValueError("it has another format")
            tops = {
                layer: _from_arrays(arrays, number) for number, layer in enumerate(header["layers"])
            }
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file of strongest activations") from None
        except Exception as error:  # zipfile, zlib, json and numpy have errors of their own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path}: damaged or not a file of strongest activations ({reason}); remove it"
            ) from error
        return cls(tops, header["done"], header["key"])


def _from_arrays(arrays: dict[str, np.ndarray], number: int) -> TopActivations:
    names = [entry.name for entry in fields(TopActivations)]
    values = {name: arrays[f"{number}/{STORED.get(name, name)}"] for name in names}
    return TopActivations(**{**values, "num_images": int(values["num_images"])})


def find_top_activations(
    projector: Projector,
    images: Sequence,
    layers: Sequence[str],
    *,
    k: int = 9,
    inside: bool = False,
    batch: int = 8,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    path: Path | None = None,
    key: dict[str, object] | None = None,
    progress: Progress | None = None,
) -> dict[str, TopActivations]:
    """Search a data set for the strongest activations of these layers.

    images: a data set whose items are images (3, H, W) in [0, 1], or pairs (image, label); an item
    must be the same every time it is read. k: activations to keep for each map. inside: search only
    units that see little padding: those of `searched_units`. batch: images per forward pass;
    workers: processes that read images. shard: (rank, ranks), to search every ranks-th image
    starting with the rank-th; the result is {} if the shard is empty. path: a file for the state of
    the search, from which a stopped search resumes. key: whatever else the result depends on, such
    as the digest of the network, as JSON values; a file with another key is not used.
    """
    if len(images) == 0 or k < 1 or batch < 1:
        raise ValueError(f"{len(images)} images, k={k}, batch={batch}: all must be at least 1")
    rank, ranks = shard
    order = range(rank, len(images), ranks)
    key = {
        **(key or {}),
        "images": len(images),
        "layers": list(layers),
        "k": k,
        "inside": inside,
        "shard": [*shard],
    }
    # As JSON returns it: with lists for tuples.
    key = json.loads(json.dumps(key))
    state = saved = _load_state(path, key)
    saved_at = time.monotonic()
    if progress and state.done:
        progress(state.done, len(order))
    masks: dict[torch.Size, dict[str, Tensor]] = {}
    remaining = _ImageSubset(images, order[state.done :])
    loader = DataLoader(remaining, batch_size=batch, num_workers=workers, collate_fn=list)
    try:
        for items in loader:
            for item in items:
                if isinstance(item, ValueError):
                    raise item
            numbers = torch.tensor(order[state.done : state.done + len(items)])
            tops = dict(state.tops)
            for group in group_by_size(items):
                size = items[group[0]].shape
                if inside and size not in masks:
                    masks[size] = _region_masks(projector, items[group[0]], layers)
                pixels = torch.stack([items[index] for index in group])
                new = _search(projector, pixels, numbers[group], layers, masks.get(size, {}))
                before = {name: [tops[name]] if name in tops else [] for name in new}
                tops = {name: _merge_tables([*before[name], new[name]], k) for name in new}
            state = SearchState(tops, state.done + len(items), key)
            if path is not None and time.monotonic() - saved_at > SAVE_SECONDS:
                state.save(path)
                saved, saved_at = state, time.monotonic()
            if progress:
                progress(state.done, len(order))
    finally:
        # Save the tables of an interrupted search, too.
        if path is not None and state is not saved:
            state.save(path)
    return state.tops


def merge_top_activations(
    parts: Sequence[dict[str, TopActivations]], *, k: int = 9
) -> dict[str, TopActivations]:
    """Merge the tables of the parts of a data set into those of the whole."""
    parts = [part for part in parts if part]
    return {layer: _merge_tables([part[layer] for part in parts], k) for layer in parts[0]}


class _ImageSubset:
    """A subset of the images of a data set. An image that cannot be read is returned as its error:
    an error raised in a worker process would arrive with a traceback as its message."""

    def __init__(self, images: Sequence, numbers: range):
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Tensor | ValueError:
        try:
            return get_image(self.images[self.numbers[index]])
        except ValueError as error:
            return error


def _load_state(path: Path | None, key: dict[str, object]) -> SearchState:
    """The saved state of this search; an empty state if there is none."""
    if path is not None and Path(path).exists():
        state = SearchState.load(path)
        if state.key == key:
            return state
        log.info("%s is from another search and is recomputed", path)
    return SearchState({}, 0, key)


def get_image(item: object) -> Tensor:
    """The image of an item of a data set, which is an image or a pair (image, label)."""
    return item[0] if isinstance(item, tuple | list) else item


def group_by_size(images: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of images that can go through the network together: consecutive, of one size."""
    group: list[int] = []
    for index, image in enumerate(images):
        if group and images[group[0]].shape != image.shape:
            yield group
            group = []
        group.append(index)
    yield group


def _search(
    projector: Projector,
    pixels: Tensor,
    numbers: Tensor,
    layers: Sequence[str],
    masks: dict[str, Tensor],
) -> dict[str, TopActivations]:
    """The tables of pixels (N, 3, H, W), with one column for each image.

    numbers: (N,), the indices of the images in the data set; masks: by layer, the positions (H, W)
    to search.
    """
    x = projector.prepare(pixels)
    numbers = numbers.numpy()

    def reduce(layer: str, maps: Tensor) -> TopActivations:
        """The strongest units of maps (N, K, H, W)."""
        mask = masks.get(layer)
        searched = maps if mask is None else maps.masked_fill(~mask.to(maps.device), -torch.inf)
        values, positions = searched.flatten(2).max(2)
        density = (maps > 0).double().mean((2, 3)).sum(0).cpu().numpy()
        values, positions = values.float().T.cpu().numpy(), positions.T.cpu().numpy()
        invalid = ~np.isfinite(values).all(0)
        if invalid.any():
            image = int(numbers[invalid.argmax()])
            raise ValueError(f"layer {layer!r}: not finite on image {image} of the data set")
        return TopActivations(
            values,
            np.broadcast_to(numbers, values.shape),
            positions // maps.shape[3],
            positions % maps.shape[3],
            num_images=len(numbers),
            active_images=(values > 0).sum(1),
            peak_sum=values.astype(np.float64).sum(1),
            density_sum=density,
        )

    return projector.responses(x, list(layers), reduce)


def _region_masks(projector: Projector, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Masks (H, W) of the units of each layer that are searched in an image (3, H, W)."""
    infos = projector.layers(projector.prepare(image[None]))
    size = tuple(image.shape[1:])
    return {info.name: searched_units(info, size) for info in infos if info.name in layers}


def _merge_tables(tables: list[TopActivations], k: int) -> TopActivations:
    """One table with the k strongest activations; among equals, those in earlier images."""
    values, images, rows, columns = (
        np.concatenate([getattr(table, name) for table in tables], 1)
        for name in ("values", "images", "rows", "columns")
    )
    order = np.lexsort((images, -values))[:, :k]
    top = (np.take_along_axis(array, order, 1) for array in (values, images, rows, columns))
    sums = {name: sum(getattr(table, name) for table in tables) for name in STORED}
    return TopActivations(*top, **sums)
