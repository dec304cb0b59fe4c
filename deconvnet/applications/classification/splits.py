"""Random splits of labelled images into training and test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Split:
    """Indices of the training and of the test images, sorted by class."""

    train: np.ndarray
    test: np.ndarray

    @cached_property
    def members(self) -> frozenset[int]:
        return frozenset([*self.train.tolist(), *self.test.tolist()])


def draw_split(
    labels: np.ndarray,
    class_names: Sequence[str],
    *,
    train: int | None,
    test: int | None,
    seed: int,
    is_test: np.ndarray | None = None,
) -> Split:
    """A split with `train` random training images of each class and at most `test` of the others.

    labels: (N,), the class of each image as an index into class_names. test: None for all others.
    train: None for all, if there is a given test set. is_test: (N,), which images belong to a
    given test set; then training images are drawn from the others, and test images from these.
    Raises ValueError naming a class with too few images.
    """
    random = np.random.default_rng(seed)
    train_indices, test_indices = [], []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        candidates = members if is_test is None else members[~is_test[members]]
        least = (train or 1) + (is_test is None)
        if len(candidates) < least:
            raise ValueError(
                f"train={train or 'null'}: class {name} has {len(candidates)} images, must have at "
                f"least {least}" + (" so that one is left to test" if is_test is None else "")
            )
        candidates = random.permutation(candidates)
        if is_test is None:
            others = candidates[train:]
        else:
            others = random.permutation(members[is_test[members]])
        train_indices.append(np.sort(candidates[:train]))
        test_indices.append(np.sort(others[:test]))
    return Split(np.concatenate(train_indices), np.concatenate(test_indices))
