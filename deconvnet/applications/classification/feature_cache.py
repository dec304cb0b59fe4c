"""Features of labelled images, computed from their codes and cached in files, so that work resumes.

A folder contains the files of one network and one set of settings. Its name is a digest of all that
they depend on except the content of the images. Each file holds the features of a block of images
and records the content of the images from which it was computed. If an image changes, only the
files that depend on it are recomputed.
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
from deconvnet.applications.classification.labelled_images import LabelledImages
from deconvnet.applications.classification.splits import Split
from deconvnet.monitoring.monitor import hidden
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.support.communicator import SINGLE, Communicator

# Images whose features share a file: indices from a multiple of this to the next.
IMAGES_PER_FILE = 64


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

    settings: those that the features depend on; folder: contains the folder of this cache. chunk:
    images inferred at a time. communicator: processes that share the work, on one machine or with a
    common file system; all must make the same calls.
    """

    def __init__(
        self,
        net: DeconvNet,
        images: LabelledImages,
        splits: list[Split],
        settings: dict[str, object],
        folder: Path,
        *,
        chunk: int,
        communicator: Communicator = SINGLE,
    ):
        self.net, self.images, self.splits, self.chunk = net, images, splits, chunk
        self.communicator = communicator
        self.folder = folder / self._digest(settings)

    def compute(self, features: list[Feature], of_image: FeaturesOfImage) -> None:
        """Compute the features of all images of the splits that are not yet in files.

        Files that are missing, damaged, or from images that have changed are recomputed. All layers
        of a block are computed from one inference.
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
            block = self._read_block(feature, start)
            if block is None:
                path = self._file(feature, start)
                raise ValueError(f"{path}: damaged; run the command again to recompute it")
            result[starts == start] = block[indices[starts == start] - start]
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
        disable = hidden(self.communicator.is_main)
        return tqdm(desc=name, total=total, unit="image", leave=False, disable=disable)

    def _compute_block(
        self, start: int, features: list[Feature], of_image: FeaturesOfImage, bar: tqdm
    ) -> None:
        """Compute the images that share the file that begins at `start`."""
        block = self._block(start)
        layers = sorted({feature.layer for feature in features})
        missing = [n for n in layers if len(block) and not self._is_computed(n, start, features)]
        if not missing:
            bar.update(len(block))
            return
        arrays = {
            feature: np.zeros((IMAGES_PER_FILE, *feature.shape), np.float32)
            for feature in features
            if feature.layer in missing
        }
        for index, codes, position in self.infer(block, max(missing)):
            for layer in missing:
                for feature, values in of_image(index, codes, position, layer).items():
                    arrays[feature][index - start] = values
            bar.update()
        for feature, values in arrays.items():
            write_features(self._file(feature, start), self._key(feature, start), features=values)

    def _is_computed(self, layer: int, start: int, features: list[Feature]) -> bool:
        of_layer = (feature for feature in features if feature.layer == layer)
        return all(self._read_block(feature, start) is not None for feature in of_layer)

    def _read_block(self, feature: Feature, start: int) -> np.ndarray | None:
        shape = (IMAGES_PER_FILE, *feature.shape)
        path, key = self._file(feature, start), self._key(feature, start)
        arrays = read_features(path, key, features=shape)
        return None if arrays is None else arrays["features"]

    # Files and their keys.

    def _block(self, start: int) -> np.ndarray:
        """The images of the splits whose features share the file that begins at `start`."""
        return self.indices[(self.indices >= start) & (self.indices < start + IMAGES_PER_FILE)]

    def _key(self, feature: Feature, start: int) -> str:
        return self.images.key(self._block(start), feature.depends_on)

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
