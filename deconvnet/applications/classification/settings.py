"""The settings of classification: the images, their features, and how classes are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from deconvnet.applications.classification.descriptors import STRENGTHS
from deconvnet.applications.classification.spatial_pyramid import KERNELS, check_levels
from deconvnet.applications.classification.svm import SVMS
from deconvnet.images.fit import FITS, MAX_SIDE, MIN_SIDE
from deconvnet.support.validation import as_positive_integer

# What suits the layer or the images.
AUTO = "auto"
FEATURES = (AUTO, "words", "codes")
UPPER = ("project", "maps")


@dataclass
class ClassData:
    """The labelled images: a folder with a subfolder of images for each class."""

    # a folder that holds a folder of images for each class
    path: str
    # a folder of test images with the same classes; null: test other images of `path`
    test: str | None = None
    # side of the square images in pixels, and how images become squares (fit): crop | pad; null: as
    # in the training of the network
    size: int | None = None
    fit: str | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not MIN_SIDE <= self.size <= MAX_SIDE:
            raise ValueError(
                f"data.size={self.size}: must be from {MIN_SIDE} to {MAX_SIDE}, or null"
            )
        if self.fit is not None and self.fit not in FITS:
            raise ValueError(f"data.fit={self.fit}: choose {', '.join(FITS)}, or null")


@dataclass
class FeatureSettings:
    """How an image becomes a spatial pyramid of visual words, or of the maxima of its codes."""

    # what describes a layer: words, the counts of visual words in the cells of the pyramid; codes,
    # the largest positive and negative coefficient of each map in the cells; auto: codes for layers
    # that code patches, words for others
    features: str = AUTO
    # sides of patches in pixels; each size has its own codebook
    patch: list[int] = field(default_factory=lambda: [16, 24])
    # cells along a side of a patch
    cells: int = 4
    # pixels from patch to patch
    step: int = 2
    # the same for maps that are projected from upper layers
    projected_step: int = 4
    # what a coefficient contributes: magnitude |z|, square z^2, or signed (max(0, z) and max(0, -z)
    # separately)
    strength: str = "magnitude"
    # true: descriptors of length 1, clipped at 0.2, as in SIFT; false: not normalised
    normalize: bool = True
    # layers above the first: project their strongest activations, one by one, to the maps of layer
    # 1, or describe their maps as in layer 1 (maps)
    upper: str = "project"
    # how many activations of an image to project, the strongest ones
    strongest: int = 50
    # size of a codebook
    words: int = 1000
    # number of nearest words among which a descriptor is divided; 1: hard assignment
    neighbours: int = 5
    # sides of the grids of the pyramid; with words, all must divide the last
    levels: list[int] = field(default_factory=lambda: [1, 2, 4])
    # counts and maxima in a cell are raised to this power before they are compared, so that many
    # patches with one word count little more than a few; 1: unchanged (the papers)
    power: float = 0.5

    def __post_init__(self) -> None:
        sizes = ("cells", "step", "projected_step", "strongest", "words", "neighbours")
        for key in sizes:
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        if not self.patch or any(side < 1 or side % self.cells for side in self.patch):
            raise ValueError(f"patch={self.patch}: must be multiples of cells={self.cells}")
        if not 2 <= self.words <= 65535:
            raise ValueError(f"words={self.words}: must be 2 to 65535")
        if self.neighbours > self.words:
            raise ValueError(f"neighbours={self.neighbours}: must be at most words={self.words}")
        named = (("features", FEATURES), ("strength", STRENGTHS), ("upper", UPPER))
        for key, choices in named:
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)}: choose one of {', '.join(choices)}")
        if not 0 < self.power <= 1:
            raise ValueError(f"power={self.power}: must be above 0 and at most 1")
        check_levels(self.levels, nested=self.features != "codes")


@dataclass
class ClassifySettings(FeatureSettings):
    """The settings of features, and how classes are learned and tested."""

    data: ClassData | None = None
    # layers whose features are tested, each alone and all together, such as [1,4]; null: all
    layers: list[int] | None = None
    # training images of each class; auto: 30, or all if data.test is given; null: all
    train: Any = AUTO
    # at most this many test images of each class; auto: 50, or all of data.test; null: all that are
    # not used for training
    test: Any = AUTO
    # number of random splits into training and test images; auto: 5, or 1 if all images are used
    splits: Any = AUTO
    # seed of the splits and of the codebooks
    seed: int = 0
    # split: learn the codebooks of each split from its own training images; shared: use those of
    # the first split for all, which is faster, but they may depend on images (not on their classes)
    # that other splits test
    codebooks: str = "split"
    # at most this many training images to learn a codebook from
    codebook_images: int = 300
    # similarity of two pyramids: intersection, of words alone | linear, of words the sum of the
    # products of square roots (with power=1, of counts) | auto: intersection of words, linear of
    # codes
    kernel: str = AUTO
    # one_vs_rest, or one_vs_one, which is faster
    svm: str = "one_vs_rest"
    # C of the support vector machine; kernel values are at most 1
    C: float = 10.0
    # images inferred at a time: bounds memory, changes results by rounding only
    chunk: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_numbers_of_images()
        for key in ("codebook_images", "chunk"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        named = (("kernel", (*KERNELS, AUTO)), ("svm", SVMS), ("codebooks", ("split", "shared")))
        for key, choices in named:
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}={getattr(self, key)}: choose one of {', '.join(choices)}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must not be negative")
        if not 0 < self.C < math.inf:
            raise ValueError(f"C={self.C}: must be a positive number")
        if self.layers is not None and not (
            self.layers and len(set(self.layers)) == len(self.layers)
        ):
            raise ValueError(f"layers={self.layers}: give one or several, each once, or null")

    def _set_numbers_of_images(self) -> None:
        """Replace auto by numbers, and check train, test and splits."""
        is_given = self.data is not None and self.data.test is not None
        self.train = (None if is_given else 30) if self.train == AUTO else self.train
        self.test = (None if is_given else 50) if self.test == AUTO else self.test
        if self.train is None and not is_given:
            raise ValueError("train=null: uses all images for training; give data.test=FOLDER too")
        if self.splits == AUTO:
            self.splits = 1 if self.train is None and self.test is None else 5
        for key in ("train", "test", "splits"):
            if getattr(self, key) is not None or key == "splits":
                setattr(self, key, as_positive_integer(getattr(self, key), key))
