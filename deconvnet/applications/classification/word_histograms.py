"""Pyramids of visual words of labelled images, cached in files, and the kernels of splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deconvnet.applications.classification.feature_cache import Feature, FeatureCache
from deconvnet.applications.classification.image_descriptors import image_descriptors
from deconvnet.applications.classification.spatial_pyramid import (
    KERNELS,
    check_levels,
    pyramid,
    word_histogram,
)
from deconvnet.applications.classification.split_codebooks import SplitCodebooks
from deconvnet.applications.classification.task import Task
from deconvnet.network.codes import Codes

# Pyramids compared at a time, which bounds memory.
PYRAMIDS_AT_A_TIME = 512
# Settings that affect the comparison of images or the computation, but not the histograms.
NOT_HASHED = (
    *("run", "beside", "layers", "features", "power", "kernel", "svm", "C", "chunk", "output"),
    "device",
)


class WordHistograms:
    """The word histograms of all images in the cells of the finest grid, with each codebook.

    Call `compute`, then `histograms` or `kernels`.
    """

    def __init__(self, task: Task):
        settings = task.settings
        check_levels(settings.levels)
        self.net, self.images, self.splits = task.net, task.images, task.splits
        self.layers, self.settings = task.layers, settings
        table = dataclasses.asdict(settings)
        table = {key: value for key, value in table.items() if key not in NOT_HASHED}
        self.cache = FeatureCache(task, table)
        self.codebooks = SplitCodebooks(self.cache, task.layers, settings)
        self.shape = (settings.levels[-1] ** 2, len(settings.patch) * settings.words)

    def compute(self) -> None:
        """Learn the codebooks and compute the histograms that are not yet in files."""
        self.codebooks.learn()
        numbers = range(self.codebooks.count)
        features = [self._feature(layer, number) for layer in self.layers for number in numbers]
        self.cache.compute(features, self._histograms_of_image)

    def histograms(self, layer: int, split: int, indices: np.ndarray) -> Tensor:
        """(N, side^2, V) of these images in a layer, with the codebooks of a split."""
        feature = self._feature(layer, self.codebooks.number(split))
        return torch.from_numpy(self.cache.read(feature, indices)).to(self.net.device)

    def kernels(self, layer: int, number: int) -> list[np.ndarray]:
        """[training images of a split with each other, test images with these], float64."""
        split, settings = self.splits[number], self.settings
        kernel = KERNELS["intersection" if settings.kernel == "auto" else settings.kernel]

        def pyramids(indices: np.ndarray) -> Iterator[Tensor]:
            for start in range(0, len(indices), PYRAMIDS_AT_A_TIME):
                chunk = indices[start : start + PYRAMIDS_AT_A_TIME]
                histograms = self.histograms(layer, number, chunk)
                # A pyramid for each patch size, so that all sizes have the same weight.
                parts = histograms.split(settings.words, 2)
                by_size = [pyramid(part, settings.levels, power=settings.power) for part in parts]
                yield torch.cat(by_size, 1) / len(by_size)

        train = torch.cat(list(pyramids(split.train)))
        test = [kernel(rows, train).numpy() for rows in pyramids(split.test)]
        return [kernel(train, train).numpy(), np.concatenate(test)]

    def _feature(self, layer: int, number: int) -> Feature:
        """The histograms of a layer with one of the codebooks."""
        return Feature(layer, f"counts-{number}", self.shape, self.codebooks.digests[number])

    def _histograms_of_image(
        self, index: int, codes: Codes, position: int, layer: int
    ) -> dict[Feature, np.ndarray]:
        """(side^2, V) of one image of the codes, with the codebooks of its splits."""
        settings = self.settings
        numbers = self.codebooks.numbers(index)
        totals = {n: torch.zeros(self.shape, dtype=torch.float64) for n in numbers}
        for part in image_descriptors(self.net, codes, position, layer, settings):
            first = settings.patch.index(part.patch) * settings.words
            for number in numbers:
                codebook = self.codebooks.codebooks[layer, part.patch][number]
                words, memberships = codebook.assign(part.d, settings.neighbours)
                histogram = word_histogram(
                    *(words, memberships, part.positions, part.weights),
                    side=settings.levels[-1],
                    num_words=settings.words,
                )
                totals[number][:, first : first + settings.words] += histogram.cpu()
        return {self._feature(layer, n): total.float().numpy() for n, total in totals.items()}
