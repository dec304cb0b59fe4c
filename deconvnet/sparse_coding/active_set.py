"""What the compiled loops work on: the filters, where they paint, and the active coefficients.

C channels   K maps   h, w filter   G maps of a group
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Up to this many rows, columns, channels or maps of a group the compiler knows the number and
# unrolls the loop: it takes seconds for some hundred, and refuses more than a thousand.
UNROLLED = 64


class Footprint(NamedTuple):
    """Along one axis, the pixels that an impulse at each place of the maps paints, and the taps.

    pixel, tap, length (places, runs): consecutive taps fall on consecutive pixels, in one run or,
    where maps continue beyond their border, up to three; a run of length 0 is empty. first
    (places,): the pixel of tap 0 where all taps form one run and there is no other, else -1.
    """

    pixel: np.ndarray
    tap: np.ndarray
    length: np.ndarray
    first: np.ndarray


class Grid(NamedTuple):
    """Where impulses paint an image, and how much of it counts: mask (C, H, W), or empty."""

    rows: Footprint
    columns: Footprint
    mask: np.ndarray


class Filters(NamedTuple):
    """f (K, C, h, w) in groups of G maps; planes (K, C): the non-zero channels of each, then -1.

    C, h, w and G are tuples of that many Nones: the length of a tuple is part of its type, so the
    compiler knows it and unrolls the loop. Above UNROLLED, where unrolling wins nothing, they are
    arrays of that length, and one compiled loop serves all sizes.
    """

    f: np.ndarray
    planes: np.ndarray
    C: tuple[None, ...] | np.ndarray
    h: tuple[None, ...] | np.ndarray
    w: tuple[None, ...] | np.ndarray
    G: tuple[None, ...] | np.ndarray

    @classmethod
    def from_array(cls, f: np.ndarray, group: int) -> Filters:
        empty = ~f.any((2, 3))
        order = empty.argsort(1, kind="stable")
        planes = np.where(np.take_along_axis(empty, order, 1), -1, order).astype(np.int32)
        return cls(f, planes, *map(_with_length, (*f.shape[1:], group)))


class ActiveSet(NamedTuple):
    """Some coefficients of the maps of an image, n of them.

    group g, row i and column j (n,) int32; their values z (n, G); the curvature L (n,) of the data
    term and the weight (n,) of the prior.
    """

    g: np.ndarray
    i: np.ndarray
    j: np.ndarray
    z: np.ndarray
    L: np.ndarray
    weight: np.ndarray

    def take(self, index: np.ndarray) -> ActiveSet:
        return ActiveSet(*(column[index] for column in self))

    def join(self, other: ActiveSet) -> ActiveSet:
        return ActiveSet(*map(np.concatenate, zip(self, other, strict=True)))


def footprint(boundary: str, pixels: int, taps: int) -> Footprint:
    """The footprint of filters of this many taps along an axis of this many pixels.

    The places of the maps are those of `convolution.deconvolve`.
    """
    places = np.arange(pixels + taps - 1 if boundary == "valid" else pixels)
    centre = (taps - 1) // 2
    shift = {"valid": taps - 1, "circular": 0, "zero": centre, "reflect": centre}[boundary]
    # The positions of a place in a frame that continues beyond its borders, in rising order.
    at = [places]
    if boundary == "circular":
        at = [places - pixels, places]
    elif boundary == "reflect":
        left, right = -places, 2 * (pixels - 1) - places
        # The border itself is not repeated.
        at = [np.where(places > 0, left, -taps), places]
        at += [np.where(places < pixels - 1, right, pixels + taps)]
    corner = np.stack(at, 1) - shift
    tap = np.clip(-corner, 0, taps)
    length = np.clip(pixels - corner, 0, taps) - tap
    if boundary == "circular":
        # Taps before those that wrap.
        corner, tap, length = (run[:, ::-1] for run in (corner, tap, length))
    length = np.maximum(length, 0)
    single = (length > 0).sum(1) == 1
    first = np.where(single & (length == taps).any(1), (corner * (length == taps)).sum(1), -1)
    runs = (np.ascontiguousarray(run, np.int32) for run in (np.maximum(corner, 0), tap, length))
    return Footprint(*runs, first.astype(np.int32))


def _with_length(number: int) -> tuple[None, ...] | np.ndarray:
    return (None,) * number if number <= UNROLLED else np.zeros(number, np.bool_)
