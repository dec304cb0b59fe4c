"""Histograms of visual words of labelled images, cached in files so that work can be resumed.

A folder contains the files of one network and one set of settings. Its name is a digest of all that
they depend on except the content of the images; each file records the content of the images from
which it was computed. If an image changes, only the files that depend on it are recomputed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.applications.classification.codebook import Codebook
from deconvnet.applications.classification.feature_files import read_features, write_features
from deconvnet.applications.classification.image_descriptors import image_descriptors
from deconvnet.applications.classification.labelled_images import LabelledImages
from deconvnet.applications.classification.settings import ClassifySettings
from deconvnet.applications.classification.spatial_pyramid import KERNELS, pyramid, word_histogram
from deconvnet.applications.classification.splits import Split
from deconvnet.monitoring.monitor import hidden
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.storage import ownership
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.seeding import seeded_generator

# Images whose histograms share a file: indices from a multiple of this to the next.
IMAGES_PER_FILE = 64
# Pyramids compared at a time, which bounds memory.
PYRAMIDS_AT_A_TIME = 512
# Descriptors that a codebook is learned from, for each of its words.
DESCRIPTORS_PER_WORD = 100
# A layer and a patch size in pixels; each pair has its own codebooks.
CodebookKey = tuple[int, int]
# Settings that affect the comparison of images or the computation, but not the histograms.
NOT_HASHED = ("run", "beside", "layers", "power", "kernel", "svm", "C", "chunk", "output", "device")


class WordHistograms:
    """The word histograms of all images in the cells of the finest grid, cached in files.

    Call `learn_codebooks`, then `count_words`, then `histograms` or `kernels`. Files that are
    missing, damaged, or from images that have changed are recomputed. communicator: processes that
    share the work, on one machine or with a common file system; all must make the same calls.
    """

    def __init__(
        self,
        net: DeconvNet,
        images: LabelledImages,
        splits: list[Split],
        layers: list[int],
        settings: ClassifySettings,
        folder: Path,
        communicator: Communicator = SINGLE,
    ):
        self.net, self.images, self.splits, self.communicator = net, images, splits, communicator
        self.layers, self.settings = layers, settings
        self.num_codebooks = 1 if settings.codebooks == "shared" else len(splits)
        self.shape = (settings.levels[-1] ** 2, len(settings.patch) * settings.words)
        self.folder = folder / self._digest()
        self.codebooks: dict[CodebookKey, list[Codebook]] = {}

    def learn_codebooks(self) -> None:
        """Learn or read the codebooks of each layer and patch size from each training set."""
        samples: list[np.ndarray] = []
        for number, split in enumerate(self.splits[: self.num_codebooks]):
            random = np.random.default_rng([self.settings.seed, number])
            count = min(self.settings.codebook_images, len(split.train))
            samples.append(np.sort(random.choice(split.train, count, replace=False)))
        self.codebook_digests = [self.images.key(sample) for sample in samples]
        per_image = -(-DESCRIPTORS_PER_WORD * self.settings.words // len(samples[0]))
        keys = [(layer, patch) for layer in self.layers for patch in self.settings.patch]
        missing = [key for key in keys if not self._read_codebooks(key)]
        if not missing:
            return
        indices = np.unique(np.concatenate(samples))
        blocks = [indices[n : n + IMAGES_PER_FILE] for n in range(0, len(indices), IMAGES_PER_FILE)]
        if self.communicator.world_size > 1:
            # Each rank writes the descriptors of some blocks to files; rank 0 reads them all.
            own_blocks = blocks[self.communicator.rank :: self.communicator.world_size]
            with self._bar("descriptors", sum(map(len, own_blocks))) as bar:
                for block in own_blocks:
                    self._sample_descriptors(block, missing, per_image, bar)
            self.communicator.all_gather(None)
        if self.communicator.is_main:
            self._learn_codebooks(missing, samples, blocks, per_image)
        self.communicator.all_gather(None)
        for key in missing:
            self._read_codebooks(key)

    def count_words(self) -> None:
        """Compute the histograms of all images of the splits that are not yet in files."""
        indices = self.indices
        starts = range(0, len(self.images.files), IMAGES_PER_FILE)[
            self.communicator.rank :: self.communicator.world_size
        ]
        count = int(np.isin(indices // IMAGES_PER_FILE * IMAGES_PER_FILE, list(starts)).sum())
        with self._bar("images", count) as bar:
            for start in starts:
                self._count_block(start, bar)
        self.communicator.all_gather(None)

    def histograms(self, layer: int, split: int, indices: np.ndarray) -> Tensor:
        """(N, side^2, V) of these images in a layer, with the codebooks of a split."""
        codebook = min(split, self.num_codebooks - 1)
        starts = indices // IMAGES_PER_FILE * IMAGES_PER_FILE
        result = np.empty((len(indices), *self.shape), np.float32)
        for start in np.unique(starts).tolist():
            path = self._histogram_file(layer, codebook, start)
            key = self._histogram_key(codebook, start)
            arrays = read_features(path, key, counts=(IMAGES_PER_FILE, *self.shape))
            if arrays is None:
                raise ValueError(f"{path}: damaged; run the command again to recompute it")
            result[starts == start] = arrays["counts"][indices[starts == start] - start]
        return torch.from_numpy(result).to(self.net.device)

    def kernels(self, layer: int, number: int) -> list[np.ndarray]:
        """[training images of a split with each other, test images with these], float64."""
        split, settings = self.splits[number], self.settings
        kernel = KERNELS[settings.kernel]

        def pyramids(indices: np.ndarray) -> Iterator[Tensor]:
            for start in range(0, len(indices), PYRAMIDS_AT_A_TIME):
                chunk = indices[start : start + PYRAMIDS_AT_A_TIME]
                histograms = self.histograms(layer, number, chunk)
                # A pyramid for each patch size, so that all sizes have the same weight.
                parts = histograms.split(settings.words, 2)
                by_size = [pyramid(part, settings.levels, power=settings.power) for part in parts]
                yield torch.cat(by_size, 1) / len(by_size)

        train = torch.cat(list(pyramids(split.train)))
        test = [kernel(rows, train).numpy() for rows in pyramids(split.test)]
        return [kernel(train, train).numpy(), np.concatenate(test)]

    @cached_property
    def indices(self) -> np.ndarray:
        """The images that belong to at least one split."""
        return np.unique(np.concatenate([np.concatenate([s.train, s.test]) for s in self.splits]))

    # Codebooks.

    def _learn_codebooks(
        self,
        missing: list[CodebookKey],
        samples: list[np.ndarray],
        blocks: list[np.ndarray],
        per_image: int,
    ) -> None:
        settings = self.settings
        descriptors: dict[CodebookKey, dict[int, np.ndarray]] = {key: {} for key in missing}
        with self._bar("descriptors", sum(map(len, blocks))) as bar:
            for block in blocks:
                by_key = self._sample_descriptors(block, missing, per_image, bar)
                for key, arrays in by_key.items():
                    descriptors[key].update(zip(block.tolist(), arrays, strict=True))
        for key in missing:
            bar = tqdm(samples, f"words of layer {key[0]}", leave=False, disable=None)
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
                    self._codebook_file(key, number),
                    self.codebook_digests[number],
                    centers=codebook.centers.numpy(),
                    values=[norm_floor, codebook.distortion],
                )
        for key in missing:
            for path in self._codebook_folder(key).glob("windows-*.npz"):
                ownership.remove(path)

    def _sample_descriptors(
        self, block: np.ndarray, keys: list[CodebookKey], per_image: int, bar: tqdm
    ) -> dict[CodebookKey, list[np.ndarray]]:
        """Random descriptors (at most `per_image`, D) of each image of a block.

        They are cached in files until the codebooks are learned, so that interrupted runs resume.
        """
        paths = {key: self._codebook_folder(key) / f"windows-{block[0]:06d}.npz" for key in keys}
        result, content = {}, self.images.key(block)
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
        for index, codes, position in self._infer(block, max(layers)):
            for layer in layers:
                patches = list(image_descriptors(self.net, codes, position, layer, self.settings))
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
        maps = self.net.layer(1 if projected else layer).settings.num_maps
        return maps * self.settings.cells**2 * (1 + (self.settings.strength == "signed"))

    def _read_codebooks(self, key: CodebookKey) -> bool:
        codebooks = []
        for number in range(self.num_codebooks):
            path, digest = self._codebook_file(key, number), self.codebook_digests[number]
            arrays = read_features(path, digest, values=(2,))
            if arrays is None or len(arrays.get("centers", ())) != self.settings.words:
                return False
            norm_floor, distortion = arrays["values"].tolist()
            centers = torch.from_numpy(arrays["centers"]).to(self.net.device)
            norm_floor = None if np.isnan(norm_floor) else norm_floor
            codebooks.append(Codebook(centers, norm_floor, distortion))
        self.codebooks[key] = codebooks
        return True

    # Histograms.

    def _count_block(self, start: int, bar: tqdm) -> None:
        """Compute the histograms of the images that share a file, for all layers and codebooks."""
        block = self._block(start)
        missing = [n for n in self.layers if len(block) and not self._is_counted(n, start)]
        if not missing:
            bar.update(len(block))
            return
        shape = (self.num_codebooks, IMAGES_PER_FILE, *self.shape)
        counts = {layer: np.zeros(shape, np.float32) for layer in missing}
        for index, codes, position in self._infer(block, max(missing)):
            for layer in missing:
                numbers = self._codebooks_of(index)
                histograms = self._image_histograms(codes, position, layer, numbers)
                for number, histogram in histograms.items():
                    counts[layer][number, index - start] = histogram
            bar.update()
        for layer in missing:
            for number in range(self.num_codebooks):
                path = self._histogram_file(layer, number, start)
                key = self._histogram_key(number, start)
                write_features(path, key, counts=counts[layer][number])

    def _image_histograms(
        self, codes: Codes, position: int, layer: int, numbers: list[int]
    ) -> dict[int, np.ndarray]:
        """(side^2, V) float32 of one image of the codes, with each of the given codebooks."""
        settings = self.settings
        totals = {n: torch.zeros(self.shape, dtype=torch.float64) for n in numbers}
        for part in image_descriptors(self.net, codes, position, layer, settings):
            first = settings.patch.index(part.patch) * settings.words
            for number in numbers:
                codebook = self.codebooks[layer, part.patch][number]
                words, memberships = codebook.assign(part.d, settings.neighbours)
                histogram = word_histogram(
                    *(words, memberships, part.positions, part.weights),
                    side=settings.levels[-1],
                    num_words=settings.words,
                )
                totals[number][:, first : first + settings.words] += histogram.cpu()
        return {number: total.float().numpy() for number, total in totals.items()}

    def _infer(self, block: np.ndarray, depth: int) -> Iterator[tuple[int, Codes, int]]:
        """(index, codes, position in the codes) of images; equal sizes are inferred in batches."""
        for start in range(0, len(block), self.settings.chunk):
            chunk = block[start : start + self.settings.chunk].tolist()
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

    def _codebooks_of(self, index: int) -> list[int]:
        """The codebooks of the splits that an image belongs to."""
        if self.num_codebooks == 1:
            return [0]
        return [n for n, split in enumerate(self.splits) if index in split.members]

    def _is_counted(self, layer: int, start: int) -> bool:
        shape = (IMAGES_PER_FILE, *self.shape)
        return all(
            read_features(
                self._histogram_file(layer, number, start),
                self._histogram_key(number, start),
                counts=shape,
            )
            for number in range(self.num_codebooks)
        )

    # Files and their keys.

    def _block(self, start: int) -> np.ndarray:
        """The images of the splits whose histograms share the file that begins at `start`."""
        return self.indices[(self.indices >= start) & (self.indices < start + IMAGES_PER_FILE)]

    def _histogram_key(self, codebook: int, start: int) -> str:
        return self.images.key(self._block(start), self.codebook_digests[codebook])

    def _histogram_file(self, layer: int, codebook: int, start: int) -> Path:
        return self.folder / f"layer{layer}" / f"counts-{codebook}-{start:06d}.npz"

    def _codebook_file(self, key: CodebookKey, number: int) -> Path:
        return self._codebook_folder(key) / f"codebook-{number}.npz"

    def _codebook_folder(self, key: CodebookKey) -> Path:
        return self.folder / f"layer{key[0]}" / f"patch{key[1]}"

    def _digest(self) -> str:
        """A digest of the network, the paths of the images, and the settings that matter."""
        settings = dataclasses.asdict(self.settings)
        table = {key: value for key, value in settings.items() if key not in NOT_HASHED}
        table |= {"size": self.images.size, "fit": self.images.fit}
        paths = [str(path) for path in self.images.files]
        tensors, layers = self.net.to_parts()
        digest = hashlib.sha256(json.dumps([table, paths, layers]).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def _bar(self, name: str, total: int) -> tqdm:
        disable = hidden(self.communicator.is_main)
        return tqdm(desc=name, total=total, unit="image", leave=False, disable=disable)
