"""Data structures of the compiled loops: filters, the pixels they paint, and active coefficients.

C channels   K maps   h, w filter   G maps of a group
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np


class Footprint(NamedTuple):
    """Along one axis, the pixels that an impulse at each position of the maps paints, and the taps.

    pixel, tap, length (positions, runs): consecutive taps fall on consecutive pixels, in one run
    or, if maps continue beyond their border, up to three; a run of length 0 is empty. first
    (positions,): the pixel of tap 0 if a single run has all taps, else -1.
    """

    pixel: np.ndarray
    tap: np.ndarray
    length: np.ndarray
    first: np.ndarray

    def repeated(self, number: int) -> Footprint:
        """The same if each pixel and each tap is this many numbers, side by side."""
        first = np.where(self.first < 0, -1, number * self.first)
        runs = (number * run for run in (self.pixel, self.tap, self.length))
        return Footprint(*runs, first.astype(np.int32))


class Grid(NamedTuple):
    """The footprints of both axes of an image, and its mask (C, H, W), empty if there is none."""

    rows: Footprint
    columns: Footprint
    mask: np.ndarray


class Filters(NamedTuple):
    """f (K, C, h, w); planes (K, C): the non-zero channels of each filter, then -1."""

    f: np.ndarray
    planes: np.ndarray

    @classmethod
    def from_array(cls, f: np.ndarray) -> Filters:
        empty = ~f.any((2, 3))
        order = empty.argsort(1, kind="stable")
        planes = np.where(np.take_along_axis(empty, order, 1), -1, order).astype(np.int32)
        return cls(f, planes)


class ActiveSet(NamedTuple):
    """The n coefficients of an image's maps in the working set.

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


@functools.lru_cache(maxsize=8)
def footprint(boundary: str, pixels: int, taps: int) -> Footprint:
    """The footprint of filters of this many taps along an axis of this many pixels.

    The positions of the maps are those of `convolution.deconvolve`.
    """
    positions = np.arange(pixels + taps - 1 if boundary == "valid" else pixels)
    centre = (taps - 1) // 2
    shift = {"valid": taps - 1, "circular": 0, "zero": centre, "reflect": centre}[boundary]
    # Each position and its copies beyond the borders, in increasing order.
    copies = [positions]
    if boundary == "circular":
        copies = [positions - pixels, positions]
    elif boundary == "reflect":
        left, right = -positions, 2 * (pixels - 1) - positions
        # The border itself is not repeated.
        copies = [np.where(positions > 0, left, -taps), positions]
        copies += [np.where(positions < pixels - 1, right, pixels + taps)]
    corner = np.stack(copies, 1) - shift
    tap = np.clip(-corner, 0, taps)
    length = np.clip(pixels - corner, 0, taps) - tap
    if boundary == "circular":
        # Put the taps that do not wrap first.
        corner, tap, length = (run[:, ::-1] for run in (corner, tap, length))
    length = np.maximum(length, 0)
    single = (length > 0).sum(1) == 1
    first = np.where(single & (length == taps).any(1), (corner * (length == taps)).sum(1), -1)
    runs = (np.ascontiguousarray(run, np.int32) for run in (np.maximum(corner, 0), tap, length))
    return Footprint(*runs, first.astype(np.int32))
