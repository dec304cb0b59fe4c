"""Features of labelled images, computed from their codes and cached in files, so that work resumes.

A folder contains the files of one network and one set of settings. Its name is a digest of all that
they depend on except the content of the images. Each file holds the features of a block of images
and records the content of each, so that only what is missing or has changed is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from deconvnet.applications.classification.feature_files import read_features, write_features
from deconvnet.applications.classification.task import Task
from deconvnet.monitoring.progress_bar import open_bar
from deconvnet.network.codes import Codes

# Images whose features share a file: indices from a multiple of this to the next.
IMAGES_PER_FILE = 64
# The type of arrays of SHA-256 digests of images.
DIGESTS = "U64"


@dataclass(frozen=True)
class Feature:
    """One float32 array for each image, computed from its codes in a layer.

    name: distinguishes the features of a layer, also in the names of files. depends_on: a digest of
    what it was computed from apart from the image, the network and the settings.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    depends_on: str = ""


# From the index of an image, codes, the position of the image in them, and the number of a layer,
# to features of that layer; a feature that is left out is zero for the image.
FeaturesOfImage = Callable[[int, Codes, int, int], dict[Feature, np.ndarray]]


class FeatureCache:
    """Features of all images of the splits, cached in files.

    settings: those that the features depend on.
    """

    def __init__(self, task: Task, settings: dict[str, object]):
        self.net, self.images, self.splits = task.net, task.images, task.splits
        self.chunk, self.communicator = task.settings.chunk, task.communicator
        self.folder = task.folder / self._digest(settings)

    def compute(self, features: list[Feature], of_image: FeaturesOfImage) -> None:
        """Compute the features of all images of the splits that are not yet in files.

        Files that are damaged, and images that have changed, are computed again. All layers of an
        image are computed from one inference.
        """
        indices, communicator = self.indices, self.communicator
        starts = range(0, len(self.images.files), IMAGES_PER_FILE)
        starts = starts[communicator.rank :: communicator.world_size]
        count = int(np.isin(indices // IMAGES_PER_FILE * IMAGES_PER_FILE, list(starts)).sum())
        with self.progress("images", count) as bar:
            for start in starts:
                self._compute_block(start, features, of_image, bar)
        communicator.all_gather(None)

    def read(self, feature: Feature, indices: np.ndarray) -> np.ndarray:
        """(N, *shape) float32: a computed feature of these images."""
        starts = indices // IMAGES_PER_FILE * IMAGES_PER_FILE
        result = np.empty((len(indices), *feature.shape), np.float32)
        for start in np.unique(starts).tolist():
            content, values = self._read_block(feature, start)
            images = indices[starts == start]
            if not self._is_current(content, start, images).all():
                path = self._file(feature, start)
                raise ValueError(f"{path}: damaged; run the command again to recompute it")
            result[starts == start] = values[images - start]
        return result

    def infer(self, indices: np.ndarray, depth: int) -> Iterator[tuple[int, Codes, int]]:
        """(index, codes, position in the codes) of images; equal sizes are inferred in batches."""
        for start in range(0, len(indices), self.chunk):
            chunk = indices[start : start + self.chunk].tolist()
            images, frames = zip(*map(self.images.read, chunk), strict=True)
            same_size = len({image.shape for image in images}) == 1
            groups = [list(range(len(chunk)))] if same_size else [[n] for n in range(len(chunk))]
            for group in groups:
                batch = torch.stack([images[n] for n in group])
                frame = torch.tensor([frames[n] for n in group])
                unpadded = bool((frame[:, 2:] == torch.tensor(batch.shape[2:])).all())
                codes = self.net.infer(batch, frames=None if unpadded else frame, depth=depth)
                for position, n in enumerate(group):
                    yield chunk[n], codes, position

    @cached_property
    def indices(self) -> np.ndarray:
        """The images that belong to at least one split."""
        return np.unique(np.concatenate([np.concatenate([s.train, s.test]) for s in self.splits]))

    def progress(self, name: str, total: int) -> tqdm:
        """A progress bar of images, which only the first process shows."""
        show = self.communicator.is_main
        return open_bar(show=show, desc=name, total=total, unit="image", leave=False)

    def _compute_block(
        self, start: int, features: list[Feature], of_image: FeaturesOfImage, bar: tqdm
    ) -> None:
        """Compute the images that share the file that begins at `start`."""
        indices = self.indices
        block = indices[(indices >= start) & (indices < start + IMAGES_PER_FILE)]
        stored = {feature: self._read_block(feature, start) for feature in features}
        missing: dict[int, set[int]] = {feature.layer: set() for feature in features}
        for feature, (content, _) in stored.items():
            missing[feature.layer] |= set(block[~self._is_current(content, start, block)].tolist())
        depth = max((layer for layer, images in missing.items() if images), default=0)
        to_infer = np.array(sorted(set().union(*missing.values())), dtype=int)
        bar.update(len(block) - len(to_infer))
        for index, codes, position in self.infer(to_infer, depth):
            for layer in (layer for layer, images in missing.items() if index in images):
                computed = of_image(index, codes, position, layer)
                for feature, (content, values) in stored.items():
                    if feature.layer == layer:
                        content[index - start] = self.images.digests[index]
                        values[index - start] = computed.get(feature, 0)
            bar.update()
        for feature, (content, values) in stored.items():
            if missing[feature.layer]:
                path = self._file(feature, start)
                write_features(path, feature.depends_on, features=values, content=content)

    def _read_block(self, feature: Feature, start: int) -> tuple[np.ndarray, np.ndarray]:
        """The digests of the images of a file, empty for those it lacks, and their features."""
        shape = (IMAGES_PER_FILE, *feature.shape)
        path, key = self._file(feature, start), feature.depends_on
        arrays = read_features(path, key, features=shape, content=(IMAGES_PER_FILE,))
        if arrays is None:
            return np.full(IMAGES_PER_FILE, "", DIGESTS), np.zeros(shape, np.float32)
        return arrays["content"].astype(DIGESTS), arrays["features"]

    def _is_current(self, content: np.ndarray, start: int, indices: np.ndarray) -> np.ndarray:
        """Which of these images a file with this content has, as they are now."""
        current = np.array([self.images.digests[n] for n in indices.tolist()], DIGESTS)
        return content[indices - start] == current

    def _file(self, feature: Feature, start: int) -> Path:
        return self.folder / f"layer{feature.layer}" / f"{feature.name}-{start:06d}.npz"

    def _digest(self, settings: dict[str, object]) -> str:
        """A digest of the network, the paths of the images, and the settings."""
        table = {**settings, "size": self.images.size, "fit": self.images.fit}
        paths = [str(path) for path in self.images.files]
        tensors, layers = self.net.to_parts()
        digest = hashlib.sha256(json.dumps([table, paths, layers]).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]
