"""Support vector machines on precomputed kernels."""

from __future__ import annotations

import numpy as np

SVMS = ("one_vs_rest", "one_vs_one")


def predict_classes(
    train_kernel: np.ndarray, labels: np.ndarray, test_kernel: np.ndarray, *, C: float, svm: str
) -> np.ndarray:
    """The predicted classes (M,) of test images.

    train_kernel: (N, N), training images with each other; labels: (N,), their classes; test_kernel:
    (M, N), test images with training images. one_vs_rest, as in the papers: the largest decision
    value wins. one_vs_one: the classifiers of all pairs of classes vote; faster, but less accurate
    with many classes.
    """
    from sklearn.svm import SVC

    if svm not in SVMS:
        raise ValueError(f"svm={svm}: choose one of {', '.join(SVMS)}")
    classes = np.unique(labels)
    classifier = SVC(kernel="precomputed", C=C)
    if svm == "one_vs_one" or len(classes) == 2:
        return classifier.fit(train_kernel, labels).predict(test_kernel)
    margins = [
        classifier.fit(train_kernel, labels == c).decision_function(test_kernel) for c in classes
    ]
    return classes[np.argmax(margins, 0)]
