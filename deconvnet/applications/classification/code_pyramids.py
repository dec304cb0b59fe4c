"""Max pyramids of the codes of labelled images, cached in files, and the kernels of splits.

The coefficients of a layer are themselves the words (Yang et al. 2009, "Linear spatial pyramid
matching using sparse coding"; Bo et al. 2011, hierarchical matching pursuit): an image is described
by the largest positive and the largest negative coefficient of each map in each cell of a pyramid.
Nothing is learned from the images, so the features of an image are the same in all splits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deconvnet.applications.classification.feature_cache import Feature, FeatureCache
from deconvnet.applications.classification.grid_features import grid_maxima, num_cells
from deconvnet.applications.classification.picture_maps import picture_maps
from deconvnet.applications.classification.task import Task
from deconvnet.network.codes import Codes

# Pyramids read and compared at a time, which bounds memory.
PYRAMIDS_AT_A_TIME = 512


class CodePyramids:
    """The signed maxima of each map of all images in the cells of the grids `settings.levels`.

    Call `compute`, then `kernels`.
    """

    def __init__(self, task: Task):
        settings = task.settings
        if settings.kernel == "intersection":
            raise ValueError("kernel=intersection: with features=codes choose linear, or auto")
        self.net, self.images, self.splits = task.net, task.images, task.splits
        self.layers, self.settings = task.layers, settings
        self.cache = FeatureCache(task, {"features": "codes", "levels": settings.levels})

    def compute(self) -> None:
        """Compute the maxima that are not yet in files."""
        self.cache.compute([self._feature(n) for n in self.layers], self._maxima_of_image)

    def kernels(self, layer: int, number: int) -> list[np.ndarray]:
        """[training images of a split with each other, test images with these], float64.

        The linear kernel of pyramids from which the mean of the training images is subtracted,
        scaled such that a training image has a mean product of 1 with itself. Thus C and the mean
        of several kernels do not depend on how much all images have in common.
        """
        split = self.splits[number]
        train = torch.cat(list(self._pyramids(layer, split.train)))
        mean = train.mean(0)
        train -= mean
        variance = train.square().sum(1, dtype=torch.float64).mean().clamp(min=1e-12)

        def products(rows: Tensor) -> np.ndarray:
            return ((rows @ train.T).double() / variance).cpu().numpy()

        test = [products(rows - mean) for rows in self._pyramids(layer, split.test)]
        return [products(train), np.concatenate(test)]

    def _pyramids(self, layer: int, indices: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(indices), PYRAMIDS_AT_A_TIME):
            chunk = indices[start : start + PYRAMIDS_AT_A_TIME]
            maxima = torch.from_numpy(self.cache.read(self._feature(layer), chunk))
            yield normalize_maxima(maxima.to(self.net.device), self.settings.power)

    def _feature(self, layer: int) -> Feature:
        maps = self.net.layer(layer).settings.num_maps
        return Feature(layer, "maxima", (2 * maps * num_cells(self.settings.levels),))

    def _maxima_of_image(
        self, index: int, codes: Codes, position: int, layer: int
    ) -> dict[Feature, np.ndarray]:
        z = picture_maps(self.net, codes, position, layer)
        maxima = grid_maxima(z, self.settings.levels)[0]
        return {self._feature(layer): maxima.cpu().numpy()}


def normalize_maxima(maxima: Tensor, power: float) -> Tensor:
    """Pyramids (N, D) of length 1: maxima (N, D) >= 0 raised to a power, which evens them out.

    An image without coefficients stays zero.
    """
    # Divided by the largest first, so that no square overflows or underflows.
    largest = maxima.amax(1, keepdim=True).clamp(min=torch.finfo(maxima.dtype).tiny)
    pyramids = (maxima / largest) ** power
    return torch.nn.functional.normalize(pyramids, dim=1)
