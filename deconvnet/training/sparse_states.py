"""States of inference that are mostly zero, as the places and values of their coefficients.

For checkpoints: the maps of all images together are larger than anything else in them.

    counts (N,) int64     coefficients of each image
    places (P,) int32     their places in the flattened maps, image after image
    values (P,)           the coefficients
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

SparseStates = dict[str, Tensor]


def packed(chunks: Iterable[Tensor], *, always: bool = False) -> SparseStates | None:
    """The states (n, K, H, W) of all chunks; unless `always`, None if they take more bytes than the
    maps.
    """
    parts, used, dense = [], 0, 0
    for states in chunks:
        for z in states.cpu():
            z = z.flatten()
            places = z.nonzero()[:, 0]
            parts.append((places.int(), z[places]))
            used += len(places) * (z.itemsize + 4)
        dense += states.nbytes
        # As soon as it shows: maps that are not sparse would take long.
        if used > dense and not always:
            return None
    counts = torch.tensor([len(places) for places, _ in parts])
    places, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return {"counts": counts, "places": places, "values": values}


def unpacked(sparse: SparseStates, images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The states (n, K, H, W) of these images, by their rows; shape: (K, H, W)."""
    ends = sparse["counts"].cumsum(0).tolist()
    states = sparse["values"].new_zeros(len(images), *shape)
    for z, n in zip(states.flatten(1), images.tolist(), strict=True):
        part = slice(ends[n] - int(sparse["counts"][n]), ends[n])
        z[sparse["places"][part].long()] = sparse["values"][part]
    return states


def merged(parts: list[SparseStates], order: Tensor) -> SparseStates:
    """The states of all parts in another order of their images."""
    counts = torch.cat([part["counts"] for part in parts])

    def in_order(tensors: list[Tensor]) -> Tensor:
        by_image = torch.cat(tensors).split(counts.tolist())
        return torch.cat([by_image[n] for n in order.tolist()])

    reordered = {key: in_order([part[key] for part in parts]) for key in ("places", "values")}
    return {"counts": counts[order], **reordered}
