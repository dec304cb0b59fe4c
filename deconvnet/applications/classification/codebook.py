"""Visual words: the k-means codebook of patch descriptors, and soft assignment to its words.

d descriptors (P, D)   V words
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deconvnet.applications.classification.descriptors import normalize_descriptors

# Descriptors shorter than this fraction of the median norm are too weak to be normalised to 1.
WEAK = 0.3
KMEANS_ITERATIONS = 30
# Descriptors compared with the words at a time, which bounds memory.
DESCRIPTORS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Codebook:
    """Visual words (V, D), the centres of k-means.

    norm_floor: of `normalize_descriptors`; None: descriptors are not normalised. distortion: the
    mean squared distance from a descriptor to its nearest word.
    """

    centers: Tensor
    norm_floor: float | None
    distortion: float

    @classmethod
    def fit(cls, d: Tensor, words: int, *, normalize: bool = True, seed: int = 0) -> Codebook:
        """The codebook of descriptors (P, D), which should come from training images only.

        Raises ValueError if fewer than `words` descriptors are distinct.
        """
        norm_floor = None
        if normalize:
            norm = torch.linalg.vector_norm(d, dim=1)
            if not (norm > 0).any():
                raise ValueError("descriptors: all are zero; the maps of these images are empty")
            norm_floor = WEAK * float(norm[norm > 0].median())
            d = normalize_descriptors(d, norm_floor)
        centers, inertia = _kmeans(d.cpu().numpy(), words, seed)
        return cls(torch.from_numpy(centers), norm_floor, inertia / len(d))

    def assign(self, d: Tensor, neighbours: int = 1) -> tuple[Tensor, Tensor]:
        """The nearest words of descriptors (P, D) and their memberships, (P, neighbours) each.

        The memberships of a descriptor are proportional to exp(-distance^2 / distortion) and sum
        to 1; a single neighbour has membership 1 (hard assignment).
        """
        words, memberships = [], []
        half = 0.5 * self.centers.square().sum(1)
        for part in d.split(DESCRIPTORS_AT_A_TIME):
            part = part if self.norm_floor is None else normalize_descriptors(part, self.norm_floor)
            # |d - c|^2 / 2 without |d|^2, which is the same for all words.
            distance = torch.addmm(half, part, self.centers.T, alpha=-1)
            if neighbours == 1:
                words.append(distance.argmin(1, keepdim=True))
                memberships.append(torch.ones_like(distance[:, :1]))
            else:
                nearest = distance.topk(neighbours, largest=False)
                words.append(nearest.indices)
                scale = -2 / max(self.distortion, 1e-12)
                memberships.append((scale * nearest.values).softmax(1))
        return torch.cat(words), torch.cat(memberships)


def _kmeans(d: np.ndarray, words: int, seed: int) -> tuple[np.ndarray, float]:
    """The centres (words, D) of non-empty clusters, and the sum of squared distances.

    Random initialisation is as good as k-means++ and takes a third of the time, but it can leave
    clusters empty; then k-means++ is tried.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    distinct = len(d)
    for init in ("random", "k-means++") if distinct >= words else ():
        with warnings.catch_warnings():
            # Too few distinct descriptors are an error here.
            warnings.simplefilter("ignore", ConvergenceWarning)
            kmeans = KMeans(
                words, init=init, n_init=1, max_iter=KMEANS_ITERATIONS, random_state=seed
            ).fit(d)
        if (distinct := len(np.unique(kmeans.labels_))) == words:
            return kmeans.cluster_centers_, kmeans.inertia_
    raise ValueError(
        f"words={words}: the training images have only {distinct} different descriptors; choose "
        "fewer words, or more images"
    )
