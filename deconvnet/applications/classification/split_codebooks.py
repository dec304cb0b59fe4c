"""The codebooks of the splits: visual words learned from the training images of each, in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.applications.classification.codebook import Codebook
from deconvnet.applications.classification.feature_cache import IMAGES_PER_FILE, FeatureCache
from deconvnet.applications.classification.feature_files import read_features, write_features
from deconvnet.applications.classification.image_descriptors import image_descriptors
from deconvnet.applications.classification.settings import ClassifySettings
from deconvnet.monitoring.progress_bar import open_bar
from deconvnet.storage import ownership
from deconvnet.support.seeding import seeded_generator

# Descriptors that a codebook is learned from, for each of its words.
DESCRIPTORS_PER_WORD = 100
# A layer and a patch size in pixels; each pair has its own codebooks.
CodebookKey = tuple[int, int]


class SplitCodebooks:
    """The codebooks of each layer and patch size, one for each split or one for all.

    Call `learn` before all else. digests: of the images that each codebook was learned from.
    """

    def __init__(self, cache: FeatureCache, layers: list[int], settings: ClassifySettings):
        self.cache, self.layers, self.settings = cache, layers, settings
        self.count = 1 if settings.codebooks == "shared" else len(cache.splits)
        self.codebooks: dict[CodebookKey, list[Codebook]] = {}
        self.digests: list[str] = []

    def learn(self) -> None:
        """Learn or read the codebooks of each layer and patch size from each training set."""
        samples: list[np.ndarray] = []
        for number, split in enumerate(self.cache.splits[: self.count]):
            random = np.random.default_rng([self.settings.seed, number])
            count = min(self.settings.codebook_images, len(split.train))
            samples.append(np.sort(random.choice(split.train, count, replace=False)))
        self.digests = [self.cache.images.key(sample) for sample in samples]
        per_image = -(-DESCRIPTORS_PER_WORD * self.settings.words // len(samples[0]))
        keys = [(layer, patch) for layer in self.layers for patch in self.settings.patch]
        missing = [key for key in keys if not self._read(key)]
        if not missing:
            return
        indices = np.unique(np.concatenate(samples))
        blocks = [indices[n : n + IMAGES_PER_FILE] for n in range(0, len(indices), IMAGES_PER_FILE)]
        communicator = self.cache.communicator
        if communicator.world_size > 1:
            # Each rank writes the descriptors of some blocks to files; rank 0 reads them all.
            own_blocks = blocks[communicator.rank :: communicator.world_size]
            with self.cache.progress("descriptors", sum(map(len, own_blocks))) as bar:
                for block in own_blocks:
                    self._sample_descriptors(block, missing, per_image, bar)
            communicator.all_gather(None)
        if communicator.is_main:
            self._learn_missing(missing, samples, blocks, per_image)
        communicator.all_gather(None)
        for key in missing:
            self._read(key)

    def number(self, split: int) -> int:
        """The codebook of a split."""
        return min(split, self.count - 1)

    def numbers(self, index: int) -> list[int]:
        """The codebooks of the splits that an image belongs to."""
        if self.count == 1:
            return [0]
        return [n for n, split in enumerate(self.cache.splits) if index in split.members]

    def _learn_missing(
        self,
        missing: list[CodebookKey],
        samples: list[np.ndarray],
        blocks: list[np.ndarray],
        per_image: int,
    ) -> None:
        settings = self.settings
        descriptors: dict[CodebookKey, dict[int, np.ndarray]] = {key: {} for key in missing}
        with self.cache.progress("descriptors", sum(map(len, blocks))) as bar:
            for block in blocks:
                by_key = self._sample_descriptors(block, missing, per_image, bar)
                for key, arrays in by_key.items():
                    descriptors[key].update(zip(block.tolist(), arrays, strict=True))
        for key in missing:
            bar = open_bar(samples, desc=f"words of layer {key[0]}", leave=False)
            for number, sample in enumerate(bar):
                d = np.concatenate([descriptors[key][n] for n in sample.tolist()])
                codebook = Codebook.fit(
                    torch.from_numpy(d),
                    settings.words,
                    normalize=settings.normalize,
                    seed=settings.seed,
                )
                norm_floor = np.nan if codebook.norm_floor is None else codebook.norm_floor
                write_features(
                    self._file(key, number),
                    self.digests[number],
                    centers=codebook.centers.numpy(),
                    values=[norm_floor, codebook.distortion],
                )
        for key in missing:
            for path in self._folder(key).glob("windows-*.npz"):
                ownership.remove(path)

    def _sample_descriptors(
        self, block: np.ndarray, keys: list[CodebookKey], per_image: int, bar: tqdm
    ) -> dict[CodebookKey, list[np.ndarray]]:
        """Random descriptors (at most `per_image`, D) of each image of a block.

        They are cached in files until the codebooks are learned, so that interrupted runs resume.
        """
        paths = {key: self._folder(key) / f"windows-{block[0]:06d}.npz" for key in keys}
        result, content = {}, self.cache.images.key(block)
        for key, path in paths.items():
            arrays = read_features(path, content, sizes=(len(block),))
            if arrays is not None and "d" in arrays:
                result[key] = np.split(arrays["d"], np.cumsum(arrays["sizes"])[:-1])
        missing = [key for key in keys if key not in result]
        if not missing:
            bar.update(len(block))
            return result
        samples: dict[CodebookKey, list[np.ndarray]] = {key: [] for key in missing}
        layers = sorted({layer for layer, _ in missing})
        net = self.cache.net
        for index, codes, position in self.cache.infer(block, max(layers)):
            for layer in layers:
                patches = list(image_descriptors(net, codes, position, layer, self.settings))
                for size in self.settings.patch:
                    if (layer, size) in missing:
                        parts = [part.d for part in patches if part.patch == size]
                        sample = self._draw_descriptors(parts, per_image, (layer, size), index)
                        samples[layer, size].append(sample)
            bar.update()
        for key in missing:
            sizes = np.array([len(d) for d in samples[key]])
            write_features(paths[key], content, d=np.concatenate(samples[key]), sizes=sizes)
        return {**result, **samples}

    def _draw_descriptors(
        self, parts: list[Tensor], count: int, key: CodebookKey, index: int
    ) -> np.ndarray:
        """At most `count` random non-zero descriptors of an image, as many from each part."""
        generator = seeded_generator(self.settings.seed, *key, index)
        per_part = -(-count // max(1, len(parts)))
        # If the maps are all zero there are no descriptors.
        drawn = [np.empty((0, self._descriptor_size(key[0])), np.float32)]
        for d in parts:
            d = d[(d != 0).any(1)]
            order = torch.randperm(len(d), generator=generator)[:per_part]
            drawn.append(d[order.to(d.device)].cpu().numpy())
        return np.concatenate(drawn)

    def _descriptor_size(self, layer: int) -> int:
        projected = self.settings.upper == "project"
        maps = self.cache.net.layer(1 if projected else layer).settings.num_maps
        return maps * self.settings.cells**2 * (1 + (self.settings.strength == "signed"))

    def _read(self, key: CodebookKey) -> bool:
        codebooks, device = [], self.cache.net.device
        for number in range(self.count):
            path, digest = self._file(key, number), self.digests[number]
            arrays = read_features(path, digest, values=(2,))
            if arrays is None or len(arrays.get("centers", ())) != self.settings.words:
                return False
            norm_floor, distortion = arrays["values"].tolist()
            centers = torch.from_numpy(arrays["centers"]).to(device)
            norm_floor = None if np.isnan(norm_floor) else norm_floor
            codebooks.append(Codebook(centers, norm_floor, distortion))
        self.codebooks[key] = codebooks
        return True

    def _file(self, key: CodebookKey, number: int) -> Path:
        return self._folder(key) / f"codebook-{number}.npz"

    def _folder(self, key: CodebookKey) -> Path:
        return self.cache.folder / f"layer{key[0]}" / f"patch{key[1]}"
