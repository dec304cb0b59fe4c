"""A survey of all maps on some images: the strongest activation of each map in each image.

The search keeps only the strongest images of a map, but a map is also what it does on all others
(Bolukbasi et al. 2021: the strongest examples alone mislead). One further pass over a sample of the
images gives examples at all levels of activation, histograms, and which maps are active together.

N images of the sample · K maps
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deconvnet.visualization.gallery.exhibits import Histogram
from deconvnet.visualization.projection.projector import Projector
from deconvnet.visualization.search.top_activations import get_image, group_by_size

# Images of the sample.
IMAGES = 100
# Examples of a map: images with a stronger response than these shares of the images with any.
SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2, 0.05)
BINS = 24
# A correlation over fewer images means nothing.
ENOUGH_IMAGES = 8


@dataclass(frozen=True)
class Survey:
    """The strongest activation of every map of one layer in each image of a sample.

    images: (N,), their numbers in the data set; peaks: (N, K), 0 where a map is not active;
    rows, columns: (N, K), the positions of the peaks.
    """

    images: np.ndarray
    peaks: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    def histogram(self, map: int) -> Histogram:
        """The peaks of a map, in bins of equal width from 0 to the largest."""
        peaks = self.peaks[:, map]
        active = peaks[peaks > 0]
        largest = float(active.max(initial=0))
        counts, edges = np.histogram(active, bins=BINS, range=(0, largest or 1))
        return Histogram(counts.tolist(), edges.tolist(), int((peaks <= 0).sum()))

    def spectrum(self, map: int, *, without: Sequence[int] = ()) -> list[tuple[float, int]]:
        """(share, row of the sample): an image at each of SHARES, strongest first.

        share: the fraction of the images with any activation whose peak is lower. No image is
        listed twice, and none of those in `without`.
        """
        peaks = self.peaks[:, map]
        order = np.flatnonzero(peaks > 0)
        order = order[np.argsort(peaks[order], kind="stable")]
        chosen: dict[int, float] = {}
        for share in SHARES:
            rank = int(share * len(order))
            if rank < len(order) and self.images[order[rank]] not in without:
                chosen.setdefault(int(order[rank]), rank / len(order))
        return [(share, row) for row, share in chosen.items()]

    def correlations(self) -> np.ndarray | None:
        """(K, K): the correlation of the peaks of two maps over images; 0 for constant maps, None
        if there are too few images."""
        if len(self.images) < ENOUGH_IMAGES:
            return None
        centred = self.peaks - self.peaks.mean(0)
        norms = np.sqrt((centred**2).sum(0))
        unit = centred / np.where(norms > 0, norms, 1)
        return unit.T @ unit


def survey_layers(
    projector: Projector,
    images: Sequence,
    masks: Callable[[Tensor], dict[str, Tensor]],
    layers: Sequence[str],
    *,
    count: int = IMAGES,
) -> dict[str, Survey]:
    """Survey some layers on `count` images, spread evenly over all.

    masks: from the first image (3, H, W) of each size, by layer, the positions (H, W) to look at;
    all for a layer that is missing.
    """
    numbers = np.unique(
        np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    )
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in layers}
    widths: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    allowed_by_size: dict[torch.Size, dict[str, Tensor]] = {}
    for start in range(0, len(numbers), projector.batch):
        pixels = [get_image(images[int(n)]) for n in numbers[start : start + projector.batch]]
        for group in group_by_size(pixels):
            size = pixels[group[0]].shape
            if size not in allowed_by_size:
                allowed_by_size[size] = masks(pixels[group[0]])
            allowed = allowed_by_size[size]

            def reduce(layer: str, maps: Tensor, allowed: dict = allowed) -> None:
                if layer in allowed:
                    maps = maps.masked_fill(~allowed[layer].to(maps.device), 0)
                peaks, positions = maps.flatten(2).max(2)
                parts[layer].append((peaks.float().clamp(min=0).cpu().numpy(), positions.cpu()))
                widths[layer].append(np.full(peaks.shape, maps.shape[3]))

            x = projector.prepare(torch.stack([pixels[index] for index in group]))
            projector.responses(x, list(layers), reduce)
    surveys = {}
    for layer, found in parts.items():
        peaks, positions = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        width = np.concatenate(widths[layer])
        surveys[layer] = Survey(numbers, peaks, positions // width, positions % width)
    return surveys
