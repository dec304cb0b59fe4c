"""Labelled image files: a folder with a subfolder of images for each class."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from deconvnet.applications.classification.settings import ClassData
from deconvnet.images.decoding import digest_file, read_image
from deconvnet.images.files import find_images
from deconvnet.images.fit import crop_to_square, pad_to_square
from deconvnet.training.run_folder import training_data

# Threads that read files to compute their digests.
DIGEST_THREADS = 4


@dataclass(frozen=True)
class LabelledImages:
    """Image files and their classes.

    labels: (N,), indices into class_names. is_test: (N,), which images belong to a given test set;
    None if there is no such set. size, fit: to which size in pixels and how images are fitted;
    size None: they keep their own.
    """

    files: list[Path]
    labels: np.ndarray
    class_names: list[str]
    is_test: np.ndarray | None
    size: int | None
    fit: str

    @classmethod
    def from_settings(cls, run: Path, data: ClassData) -> LabelledImages:
        """The images of the settings, fitted to a size like the training images of a run."""
        class_names = _class_names("data.path", data.path)
        folders = [(data.path, class_names)]
        if data.test is not None:
            test_names = _class_names("data.test", data.test)
            for name in sorted(set(test_names) - set(class_names)):
                raise ValueError(f"data.test={data.test}: no class {name} in data.path={data.path}")
            folders.append((data.test, test_names))
        files, labels, is_test = [], [], []
        for number, (folder, names) in enumerate(folders):
            for name in names:
                paths = find_images(Path(folder).expanduser() / name)
                files += paths
                labels += len(paths) * [class_names.index(name)]
                is_test += len(paths) * [number == 1]
        trained_on = training_data(run)
        if trained_on is None and data.size is None:
            raise ValueError(
                "data.size=None: a network file does not record how images were fitted"
            )
        size = data.size if data.size is not None or trained_on is None else trained_on.size
        fit = data.fit or (trained_on.fit if trained_on else "pad")
        test_mask = np.array(is_test) if data.test is not None else None
        return cls(files, np.array(labels), class_names, test_mask, size, fit)

    @cached_property
    def digests(self) -> list[str]:
        """The digest of the content of each file."""
        with ThreadPoolExecutor(DIGEST_THREADS) as pool:
            return list(pool.map(digest_file, self.files))

    def key(self, indices: np.ndarray) -> str:
        """A digest of the content of some images."""
        content = [[n, self.digests[n]] for n in indices.tolist()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def read(self, index: int) -> tuple[Tensor, tuple[int, ...]]:
        """An image (3, H, W), and the frame (top, left, height, width) of the picture in it."""
        image = read_image(self.files[index])
        if self.size is None:
            return image, (0, 0, *image.shape[1:])
        if self.fit == "crop":
            return crop_to_square(image, self.size), (0, 0, self.size, self.size)
        try:
            return pad_to_square(image, self.size)
        except ValueError as error:
            raise ValueError(f"{self.files[index]}: {error}") from None


def _class_names(key: str, path: str) -> list[str]:
    """The sorted names of the folders in a folder, of which there must be at least two."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{key}={path}: {'not a folder' if folder.exists() else 'no such folder'}")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        present = names[0] if names else "none"
        raise ValueError(
            f"{key}={path}: must have a folder of images for each class, has {present}"
        )
    return names
