"""The strongest activations of every map of some layers, over a data set of any size, in one pass.

    K maps · k kept for each · N images     one activation of an image for each map, its strongest

A table of a few kilobytes is all that is kept. It does not depend on how many images go through the
network at a time: of equal activations the one of the earlier image comes first. Tables of parts of
a data set, as processes beside each other make them, are merged by the same rule.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.visualization.projection.projector import Projector

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

FORMAT = "deconvnet strongest activations"
SAVE_SECONDS = 20.0
# The share of the units of a layer that are enough to leave out those at the border.
ENOUGH = 0.25


@dataclass(frozen=True)
class TopActivations:
    """The strongest activations of every map of one layer, strongest first.

    values: (K, k), fewer columns where there were fewer images; images: (K, k) their numbers in the
    data set; rows, columns: (K, k) the places in the map. Over all `seen` images: active (K,), on
    how many the map was active; total (K,), the sum of its strongest activations; density (K,), the
    sum of the shares of its places that were active.
    """

    values: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    seen: int
    active: np.ndarray
    total: np.ndarray
    density: np.ndarray

    @property
    def dead(self) -> np.ndarray:
        """(K,): maps that no image has activated."""
        return self.active == 0

    def units(self, map: int) -> list[tuple[int, int, int, int]]:
        """(image, map, row, column) of the activations kept for one map, those above zero."""
        kept = zip(
            *(each[map].tolist() for each in (self.values, self.images, self.rows, self.columns)),
            strict=True,
        )
        return [(image, map, row, column) for value, image, row, column in kept if value > 0]


@dataclass(frozen=True)
class SearchState:
    """The tables of some layers after `done` images of a pass, and the pass they belong to."""

    tops: dict[str, TopActivations]
    done: int
    key: dict[str, object] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it to an .npz file, whole or not at all."""
        arrays = {
            f"{number}/{entry.name}": getattr(top, entry.name)
            for number, top in enumerate(self.tops.values())
            for entry in fields(TopActivations)
        }
        header = {"format": FORMAT, "layers": list(self.tops), "done": self.done, "key": self.key}
        save_arrays(path, {"header": np.array(json.dumps(header)), **arrays})

    @classmethod
    def load(cls, path: Path) -> SearchState:
        """What `save` wrote; ValueError in one line where the file is anything else."""
        try:
            arrays = load_arrays(path)
            header = json.loads(str(arrays["header"]))
            if header.get("format") != FORMAT:
                raise ValueError("of another kind")
            tops = {
                layer: TopActivations(
                    **{e.name: arrays[f"{number}/{e.name}"] for e in fields(TopActivations)}
                )
                for number, layer in enumerate(header["layers"])
            }
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file of strongest activations") from None
        except Exception as error:  # zipfile, zlib, json and numpy have errors of their own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path}: damaged or not a file of strongest activations ({reason}); remove it"
            ) from error
        tops = {layer: replace(top, seen=int(top.seen)) for layer, top in tops.items()}
        return cls(tops, header["done"], header["key"])


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
    """The strongest activations of some layers over a data set.

    images: a data set whose items are images (3, H, W) in [0, 1], or (image, label), the same each
    time they are asked for. k: kept for each map. inside: only of the units whose receptive field
    lies inside the image, in layers that have enough of them (a quarter); at the border most of
    what a unit sees is padding. batch: images at a time, workers: processes that read them. shard:
    (rank, ranks), every ranks-th image from the rank-th on; {} if there are none for it. path:
    where the pass is saved every now and then, and goes on from if it was stopped; key: what else
    the table depends on, such as the digest of the network, in what JSON can hold: a file with
    another key is not gone on with.
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
    # As it comes back from a file, where there are no tuples.
    key = json.loads(json.dumps(key))
    state = saved = _resumed(path, key)
    saved_at = time.monotonic()
    if progress and state.done:
        progress(state.done, len(order))
    allowed: dict[torch.Size, dict[str, Tensor]] = {}
    rest = _Some(images, order[state.done :])
    loader = DataLoader(rest, batch_size=batch, num_workers=workers, collate_fn=list)
    try:
        for found in loader:
            for error in found:
                if isinstance(error, ValueError):
                    raise error
            numbers = torch.tensor(order[state.done : state.done + len(found)])
            tops = dict(state.tops)
            for some in group_by_size(found):
                size = found[some[0]].shape
                if inside and size not in allowed:
                    allowed[size] = _allowed(projector, found[some[0]], layers)
                new = _strongest(projector, found, some, numbers, layers, allowed.get(size, {}))
                known = {name: [tops[name]] if name in tops else [] for name in new}
                tops = {name: _joined([*known[name], new[name]], k) for name in new}
            state = SearchState(tops, state.done + len(found), key)
            if path is not None and time.monotonic() - saved_at > SAVE_SECONDS:
                state.save(path)
                saved, saved_at = state, time.monotonic()
            if progress:
                progress(state.done, len(order))
    finally:
        # Also what a pass has found that is stopped here.
        if path is not None and state is not saved:
            state.save(path)
    return state.tops


def merge_top_activations(
    parts: Sequence[dict[str, TopActivations]], *, k: int = 9
) -> dict[str, TopActivations]:
    """The tables of a whole data set from those of its parts."""
    parts = [part for part in parts if part]
    return {layer: _joined([part[layer] for part in parts], k) for layer in parts[0]}


class _Some:
    """Some images of a data set. One that cannot be read comes as its error: raised in another
    process it would come with a traceback for its message."""

    def __init__(self, images: Sequence, numbers: range):
        self.images, self.numbers = images, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor | ValueError:
        try:
            return get_image(self.images[self.numbers[place]])
        except ValueError as error:
            return error


def _resumed(path: Path | None, key: dict[str, object]) -> SearchState:
    if path is not None and Path(path).exists():
        found = SearchState.load(path)
        if found.key == key:
            return found
        log.info("%s is from another pass and is recomputed", path)
    return SearchState({}, 0, key)


def get_image(item: object) -> Tensor:
    """The image of what a data set gives, an image or (image, label)."""
    return item[0] if isinstance(item, tuple | list) else item


def group_by_size(images: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of images that can go through a network together: neighbours of one size."""
    some: list[int] = []
    for place, image in enumerate(images):
        if some and images[some[0]].shape != image.shape:
            yield some
            some = []
        some.append(place)
    yield some


def _strongest(
    projector: Projector,
    images: list[Tensor],
    some: list[int],
    numbers: Tensor,
    layers: Sequence[str],
    allowed: dict[str, Tensor],
) -> dict[str, TopActivations]:
    """The table of some images of a batch, with a column for each; allowed: places by layer."""
    x = projector.prepare(torch.stack([images[place] for place in some]))
    numbers = numbers[some].numpy()

    def reduce(layer: str, maps: Tensor) -> TopActivations:
        """Of maps (N, K, H, W) their strongest units."""
        mask = allowed.get(layer)
        searched = maps if mask is None else maps.masked_fill(~mask.to(maps.device), -torch.inf)
        values, places = searched.flatten(2).max(2)
        density = (maps > 0).double().mean((2, 3)).sum(0)
        values, places, density = (
            each.cpu().numpy() for each in (values.float().T, places.T, density)
        )
        wrong = ~np.isfinite(values).all(0)
        if wrong.any():
            image = int(numbers[wrong.argmax()])
            raise ValueError(f"layer {layer!r}: not finite on image {image} of the data set")
        return TopActivations(
            values,
            np.broadcast_to(numbers, values.shape),
            places // maps.shape[3],
            places % maps.shape[3],
            len(numbers),
            (values > 0).sum(1),
            values.astype(np.float64).sum(1),
            density,
        )

    return projector.responses(x, list(layers), reduce)


def _allowed(projector: Projector, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """(H, W) for the layers that have enough units whose fields lie inside an image (3, H, W)."""
    infos = projector.layers(projector.prepare(image[None]))
    masks = {
        info.name: info.inside(tuple(image.shape[1:])) for info in infos if info.name in layers
    }
    return {name: mask for name, mask in masks.items() if mask.float().mean() >= ENOUGH}


def _joined(tables: list[TopActivations], k: int) -> TopActivations:
    """One table: the k strongest of all, of equals those of earlier images."""
    values, images, rows, columns = (
        np.concatenate([getattr(table, name) for table in tables], 1)
        for name in ("values", "images", "rows", "columns")
    )
    order = np.lexsort((images, -values))[:, :k]
    kept = (np.take_along_axis(each, order, 1) for each in (values, images, rows, columns))
    sums = (
        sum(getattr(table, name) for table in tables)
        for name in ("seen", "active", "total", "density")
    )
    return TopActivations(*kept, *sums)
