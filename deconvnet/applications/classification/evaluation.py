"""Classification accuracy of the features of each layer, and of all layers together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deconvnet.applications.classification.code_pyramids import CodePyramids
from deconvnet.applications.classification.settings import ClassifySettings
from deconvnet.applications.classification.splits import Split
from deconvnet.applications.classification.svm import predict_classes
from deconvnet.applications.classification.word_histograms import WordHistograms
from deconvnet.monitoring.progress_bar import open_bar

# Features of the layers of one network.
LayerFeatures = WordHistograms | CodePyramids

# The name of the scores of all layers combined.
TOGETHER = "together"


def evaluate(
    layers: dict[str, tuple[LayerFeatures, int]], settings: ClassifySettings
) -> dict[str, Scores]:
    """The scores of each layer and, if there are several, of the mean of their kernels (TOGETHER).

    layers: by name, the features of a network and the number of a layer; all features are of the
    same images and splits.
    """
    first = next(iter(layers.values()))[0]
    confusions: dict[str, list[np.ndarray]] = {}
    bar = open_bar(desc="splits", total=len(first.splits) * len(layers), leave=False)
    for number, split in enumerate(first.splits):
        mean_kernel = 0
        for name, (features, layer) in layers.items():
            kernels = features.kernels(layer, number)
            mean_kernel = mean_kernel + np.concatenate(kernels) / len(layers)
            confusions.setdefault(name, []).append(_confusion(kernels, split, first, settings))
            bar.update()
        if len(layers) > 1:
            kernels = np.split(mean_kernel, [len(split.train)])
            confusions.setdefault(TOGETHER, []).append(_confusion(kernels, split, first, settings))
    bar.close()
    return {name: Scores(np.stack(matrices)) for name, matrices in confusions.items()}


def _confusion(
    kernels: list[np.ndarray], split: Split, features: LayerFeatures, settings: ClassifySettings
) -> np.ndarray:
    """The confusion matrix of a split, from its training and its test kernel."""
    train_kernel, test_kernel = kernels
    images = features.images
    predicted = predict_classes(
        train_kernel, images.labels[split.train], test_kernel, C=settings.C, svm=settings.svm
    )
    return confusion_matrix(images.labels[split.test], predicted, len(images.class_names))


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(num_classes, num_classes): how many images of class i were predicted to be of class j."""
    counts = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """The accuracies of one layer. confusions: (splits, classes, classes), one matrix per split."""

    confusions: np.ndarray

    @property
    def class_accuracies(self) -> np.ndarray:
        """(splits, classes): the fraction of correctly classified test images of a class.

        NaN if a split has no test image of the class.
        """
        correct = np.diagonal(self.confusions, axis1=1, axis2=2)
        tested = self.confusions.sum(2)
        return np.where(tested > 0, correct / np.maximum(tested, 1), np.nan)

    @property
    def accuracies(self) -> np.ndarray:
        """(splits,): the mean over the classes, with equal weights whatever their size."""
        return np.nanmean(self.class_accuracies, 1)

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def std(self) -> float | None:
        """The standard deviation over the splits; None for a single split."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else None
