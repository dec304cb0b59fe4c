"""A labelled set of image files put into classes, with what is found on the way kept in files.

Images: the files and their classes. Features: the counts of the words of every image, in a folder
named by a digest of network and settings, so that the same work can be resumed. Every file records
the content of the images that it was made from: if an image has changed, what was computed from it
is recomputed, and the rest stays. judge: the scores of layers, alone and together.
classification.py has the mathematics.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deconvnet.applications.classification.classifier import (
    KERNELS,
    SVMS,
    ClassData,
    Codebook,
    FeatureSettings,
    Scores,
    Split,
    confusion,
    counts,
    image_windows,
    predict,
    pyramid,
)
from deconvnet.images.decoding import digest_file, read_image
from deconvnet.images.files import find_images
from deconvnet.images.fit import crop_to_square, pad_to_square
from deconvnet.monitoring.monitor import hidden
from deconvnet.network.codes import Codes
from deconvnet.network.network import DeconvNet
from deconvnet.storage import ownership
from deconvnet.storage.array_files import load_arrays, save_arrays
from deconvnet.support.communicator import SINGLE, Communicator
from deconvnet.support.seeding import seeded_generator
from deconvnet.training.run_folder import training_data

# Images whose features make one file, and pyramids that are compared at a time.
PIECE = 64
ROWS = 512
# Threads that read files for their digests.
READERS = 4
# How a file of features begins, even a truncated one: an archive of one of these arrays.
ARCHIVE, ARRAYS = b"PK\x03\x04", ("of.npy", "counts.npy", "d.npy", "centers.npy")
# Windows of the training images that a codebook is learned from, for each of its words.
WINDOWS = 100
# Windows of a layer and a side in pixels, which have words of their own.
Kind = tuple[int, int]
# The name of all layers at once.
TOGETHER = "together"
# What changes how images are judged or how the work is done, but not their features.
FREE = ("run", "beside", "layers", "power", "kernel", "svm", "C", "chunk", "output", "device")


@dataclasses.dataclass
class ClassifySettings(FeatureSettings):
    """How classes are learned and tested, in addition to the features."""

    data: ClassData | None = None
    # layers whose features are tried, each alone and all together, such as [1,4]; null: all
    layers: list[int] | None = None
    # training images of each class
    train: int = 30
    # images of each class that are tested, at most; null: all others
    test: int | None = 50
    # how many times training and test images are drawn again
    splits: int = 5
    # seed of what is drawn, and of the codebooks
    seed: int = 0
    # split: a codebook from the training images of every split; shared: that of the first for all,
    # which is faster, but may have seen, without their classes, images that other splits test
    codebooks: str = "split"
    # training images from which a codebook is learned, at most
    codebook_images: int = 300
    # similarity of two pyramids: intersection, or linear (products of square roots; of counts, with
    # power=1)
    kernel: str = "intersection"
    # one_vs_rest, or one_vs_one, which is faster
    svm: str = "one_vs_rest"
    # cost of an error of the support vector machine; kernels are at most 1
    C: float = 10.0
    # images inferred at a time: bounds memory, changes results by rounding only
    chunk: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("train", "test", "splits", "codebook_images", "chunk"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 1")
        named = (("kernel", KERNELS), ("svm", SVMS), ("codebooks", ("split", "shared")))
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


@dataclasses.dataclass(frozen=True)
class Images:
    """Files with their classes; fixed (N,): which are a given test set; size, fit: in pixels."""

    files: list[Path]
    labels: np.ndarray
    names: list[str]
    fixed: np.ndarray | None
    size: int | None
    fit: str

    @classmethod
    def of(cls, run: Path, data: ClassData) -> Images:
        """The images of the settings, fitted as the network of the run has learned from its own."""
        names = _classes("data.path", data.path)
        parts = [(data.path, names)]
        if data.test is not None:
            parts.append((data.test, tested := _classes("data.test", data.test)))
            for name in sorted(set(tested) - set(names)):
                raise ValueError(f"data.test={data.test}: no class {name} in data.path={data.path}")
        paths, labels, fixed = [], [], []
        for number, (path, inside) in enumerate(parts):
            for name in inside:
                found = find_images(Path(path).expanduser() / name)
                paths += found
                labels += len(found) * [names.index(name)]
                fixed += len(found) * [number == 1]
        learned = training_data(run)
        if learned is None and data.size is None:
            raise ValueError("data.size=None: a network file does not say how images were fitted")
        size = data.size if data.size is not None or learned is None else learned.size
        fit = data.fit or (learned.fit if learned else "pad")
        given = np.array(fixed) if data.test is not None else None
        return cls(paths, np.array(labels), names, given, size, fit)

    @cached_property
    def digests(self) -> list[str]:
        """Of the content of every file."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(digest_file, self.files))

    def key(self, indices: np.ndarray, *parts: str) -> str:
        """A digest of the content of some images and of other values."""
        content = [[n, self.digests[n]] for n in indices.tolist()]
        return hashlib.sha256(json.dumps([content, *parts]).encode()).hexdigest()

    def read(self, index: int) -> tuple[Tensor, tuple[int, ...]]:
        """An image (3, H, W) and the frame of the picture in it."""
        image = read_image(self.files[index])
        if self.size is None:
            return image, (0, 0, *image.shape[1:])
        if self.fit == "crop":
            return crop_to_square(image, self.size), (0, 0, self.size, self.size)
        try:
            return pad_to_square(image, self.size)
        except ValueError as error:
            raise ValueError(f"{self.files[index]}: {error}") from None


class Features:
    """The counts of words of all images in the cells of the finest grid, kept in files.

    A folder holds what belongs together, named by a digest of all that it depends on but for the
    content of the images, which every file knows. Files that are damaged, cut off or of images
    that have changed are made again. communicator: processes that share the work, of one machine or
    with one file system; all of them make the same calls.
    """

    def __init__(
        self,
        net: DeconvNet,
        images: Images,
        splits: list[Split],
        layers: list[int],
        settings: ClassifySettings,
        folder: Path,
        communicator: Communicator = SINGLE,
    ):
        self.net, self.images, self.splits, self.communicator = net, images, splits, communicator
        self.layers, self.settings = layers, settings
        self.books = 1 if settings.codebooks == "shared" else len(splits)
        self.shape = (settings.levels[-1] ** 2, len(settings.patch) * settings.words)
        self.folder = folder / self._digest()
        self.codebooks: dict[Kind, list[Codebook]] = {}

    def learn_codebooks(self) -> None:
        """Find, or read, the words of every kind, from training images of every split."""
        images, words = self.settings.codebook_images, self.settings.words
        chosen: list[np.ndarray] = []
        for number, split in enumerate(self.splits[: self.books]):
            random = np.random.default_rng([self.settings.seed, number])
            some = min(images, len(split.train))
            chosen.append(np.sort(random.choice(split.train, some, replace=False)))
        self.book_keys = [self.images.key(of) for of in chosen]
        each = -(-WINDOWS * words // len(chosen[0]))
        kinds = [(layer, patch) for layer in self.layers for patch in self.settings.patch]
        missing = [kind for kind in kinds if not self._read_codebooks(kind)]
        if not missing:
            return
        used = np.unique(np.concatenate(chosen))
        pieces = [used[start : start + PIECE] for start in range(0, len(used), PIECE)]
        if self.communicator.world_size > 1:
            # Each some of them into files; from these the first finds the words.
            mine = pieces[self.communicator.rank :: self.communicator.world_size]
            with self._bar("windows", sum(map(len, mine))) as bar:
                for piece in mine:
                    self._samples(piece, missing, each, bar)
            self.communicator.all_gather(None)
        if self.communicator.is_main:
            self._learn_codebooks(missing, chosen, pieces, each)
        self.communicator.all_gather(None)
        for kind in missing:
            self._read_codebooks(kind)

    def _learn_codebooks(
        self, missing: list[Kind], chosen: list[np.ndarray], pieces: list[np.ndarray], each: int
    ) -> None:
        words = self.settings.words
        samples: dict[Kind, dict[int, np.ndarray]] = {kind: {} for kind in missing}
        with self._bar("windows", sum(map(len, pieces))) as bar:
            for piece in pieces:
                found = self._samples(piece, missing, each, bar)
                for kind, arrays in found.items():
                    samples[kind].update(zip(piece.tolist(), arrays, strict=True))
        for kind in missing:
            for number, of in enumerate(
                tqdm(chosen, f"words of layer {kind[0]}", leave=False, disable=None)
            ):
                d = torch.from_numpy(np.concatenate([samples[kind][n] for n in of.tolist()]))
                book = Codebook.fit(
                    d, words, normalize=self.settings.normalize, seed=self.settings.seed
                )
                floor = np.nan if book.floor is None else book.floor
                arrays = {"centers": book.centers.numpy(), "values": [floor, book.spread]}
                _write(self._codebook(kind, number), self.book_keys[number], **arrays)
        for kind in missing:
            for path in self._of(kind).glob("windows-*.npz"):
                ownership.remove(path)

    def count_words(self) -> None:
        """Count, or find counted, the words of all images of the splits."""
        used = self.used
        starts = range(0, len(self.images.files), PIECE)[
            self.communicator.rank :: self.communicator.world_size
        ]
        with self._bar("images", int(np.isin(used // PIECE * PIECE, list(starts)).sum())) as bar:
            for start in starts:
                piece = self._used_in(start)
                missing = [n for n in self.layers if len(piece) and not self._counted(n, start)]
                if not missing:
                    bar.update(len(piece))
                    continue
                found = {n: np.zeros((self.books, PIECE, *self.shape), np.float32) for n in missing}
                for index, codes, place in self._codes(piece, max(missing)):
                    for layer in missing:
                        histograms = self._histograms(codes, place, layer, self._books_of(index))
                        for book, histogram in histograms.items():
                            found[layer][book, index - start] = histogram
                    bar.update()
                for layer in missing:
                    for book in range(self.books):
                        path, key = self._piece(layer, book, start), self._piece_key(book, start)
                        _write(path, key, counts=found[layer][book])
        self.communicator.all_gather(None)

    def counts(self, layer: int, split: int, indices: np.ndarray) -> Tensor:
        """(N, side^2, V) of some images in a layer under the codebook of a split."""
        book = min(split, self.books - 1)
        pieces = indices // PIECE * PIECE
        result = np.empty((len(indices), *self.shape), np.float32)
        for start in np.unique(pieces).tolist():
            path, key = self._piece(layer, book, start), self._piece_key(book, start)
            found = _read(path, key, counts=(PIECE, *self.shape))
            if found is None:
                raise ValueError(f"{path}: damaged; start again")
            result[pieces == start] = found["counts"][indices[pieces == start] - start]
        return torch.from_numpy(result).to(self.net.device)

    def kernels(self, layer: int, number: int) -> list[np.ndarray]:
        """[training images of a split with each other, its tests with these], float64."""
        split, settings = self.splits[number], self.settings
        overlap = KERNELS[settings.kernel]

        def pyramids(indices: np.ndarray) -> Iterator[Tensor]:
            for start in range(0, len(indices), ROWS):
                some = self.counts(layer, number, indices[start : start + ROWS])
                # Of windows of each size by itself, so that all sizes weigh the same.
                parts = some.split(settings.words, 2)
                sizes = [pyramid(part, settings.levels, power=settings.power) for part in parts]
                yield torch.cat(sizes, 1) / len(sizes)

        train = torch.cat(list(pyramids(split.train)))
        tests = [overlap(rows, train).numpy() for rows in pyramids(split.test)]
        return [overlap(train, train).numpy(), np.concatenate(tests)]

    def _samples(
        self, piece: np.ndarray, kinds: list[Kind], each: int, bar: tqdm
    ) -> dict[Kind, list[np.ndarray]]:
        """Random windows of some images, (at most `each`, D) for every one of them, by kind.

        Kept until the codebooks are there, so that an interrupted run goes on.
        """
        paths = {kind: self._of(kind) / f"windows-{piece[0]:06d}.npz" for kind in kinds}
        result, key = {}, self.images.key(piece)
        for kind, path in paths.items():
            found = _read(path, key, sizes=(len(piece),))
            if found is not None and "d" in found:
                result[kind] = np.split(found["d"], np.cumsum(found["sizes"])[:-1])
        missing = [kind for kind in kinds if kind not in result]
        if not missing:
            bar.update(len(piece))
            return result
        samples: dict[Kind, list[np.ndarray]] = {kind: [] for kind in missing}
        layers = sorted({layer for layer, _ in missing})
        for index, codes, place in self._codes(piece, max(layers)):
            for layer in layers:
                found = list(image_windows(self.net, codes, place, layer, self.settings))
                for patch in self.settings.patch:
                    if (layer, patch) in missing:
                        parts = [part.d for part in found if part.patch == patch]
                        kept = self._some(parts, each, (layer, patch), index)
                        samples[layer, patch].append(kept)
            bar.update()
        for kind in missing:
            sizes = np.array([len(d) for d in samples[kind]])
            _write(paths[kind], key, d=np.concatenate(samples[kind]), sizes=sizes)
        return {**result, **samples}

    def _some(self, parts: list[Tensor], each: int, kind: Kind, index: int) -> np.ndarray:
        """At most `each` random windows of an image that are not zero, as many of every part."""
        generator = seeded_generator(self.settings.seed, *kind, index)
        share = -(-each // max(1, len(parts)))
        # Maps that are all zero have no windows.
        kept = [np.empty((0, self._width(kind[0])), np.float32)]
        for d in parts:
            d = d[(d != 0).any(1)]
            order = torch.randperm(len(d), generator=generator)[:share]
            kept.append(d[order.to(d.device)].cpu().numpy())
        return np.concatenate(kept)

    def _width(self, layer: int) -> int:
        """How many numbers a descriptor has."""
        projected = self.settings.upper == "project"
        maps = self.net.layer(1 if projected else layer).settings.num_maps
        return maps * self.settings.cells**2 * (1 + (self.settings.strength == "signed"))

    def _histograms(
        self, codes: Codes, place: int, layer: int, books: list[int]
    ) -> dict[int, np.ndarray]:
        """(side^2, V) float32 of one image of the codes under each of some codebooks."""
        settings = self.settings
        total = {book: torch.zeros(self.shape, dtype=torch.float64) for book in books}
        for part in image_windows(self.net, codes, place, layer, settings):
            first = settings.patch.index(part.patch) * settings.words
            for book in books:
                words, shares = self.codebooks[layer, part.patch][book].assign(
                    part.d, settings.neighbours
                )
                found = counts(
                    words,
                    shares,
                    part.places,
                    part.weights,
                    side=settings.levels[-1],
                    size=settings.words,
                )
                total[book][:, first : first + settings.words] += found.cpu()
        return {book: histogram.float().numpy() for book, histogram in total.items()}

    def _codes(self, piece: np.ndarray, depth: int) -> Iterator[tuple[int, Codes, int]]:
        """(index, codes, place in them) of some images; those of one size are inferred together."""
        for start in range(0, len(piece), self.settings.chunk):
            chunk = piece[start : start + self.settings.chunk].tolist()
            images, frames = zip(*map(self.images.read, chunk), strict=True)
            alike = len({image.shape for image in images}) == 1
            groups = [list(range(len(chunk)))] if alike else [[n] for n in range(len(chunk))]
            for group in groups:
                stack = torch.stack([images[n] for n in group])
                inside = torch.tensor([frames[n] for n in group])
                filled = bool((inside[:, 2:] == torch.tensor(stack.shape[2:])).all())
                codes = self.net.infer(stack, frames=None if filled else inside, depth=depth)
                for place, n in enumerate(group):
                    yield chunk[n], codes, place

    def _books_of(self, index: int) -> list[int]:
        """The codebooks of the splits that an image takes part in."""
        if self.books == 1:
            return [0]
        return [n for n, split in enumerate(self.splits) if index in split.members]

    def _read_codebooks(self, kind: Kind) -> bool:
        books = []
        for number in range(self.books):
            found = _read(self._codebook(kind, number), self.book_keys[number], values=(2,))
            if found is None or len(found.get("centers", ())) != self.settings.words:
                return False
            floor, spread = found["values"].tolist()
            centers = torch.from_numpy(found["centers"]).to(self.net.device)
            books.append(Codebook(centers, None if np.isnan(floor) else floor, spread))
        self.codebooks[kind] = books
        return True

    def _counted(self, layer: int, start: int) -> bool:
        shape = (PIECE, *self.shape)
        return all(
            _read(self._piece(layer, book, start), self._piece_key(book, start), counts=shape)
            for book in range(self.books)
        )

    @cached_property
    def used(self) -> np.ndarray:
        """The images that take part in some split."""
        return np.unique(np.concatenate([np.concatenate([s.train, s.test]) for s in self.splits]))

    def _used_in(self, start: int) -> np.ndarray:
        return self.used[(self.used >= start) & (self.used < start + PIECE)]

    def _piece_key(self, book: int, start: int) -> str:
        """What the counts of a piece under a codebook depend on."""
        return self.images.key(self._used_in(start), self.book_keys[book])

    def _of(self, kind: Kind) -> Path:
        return self.folder / f"layer{kind[0]}" / f"patch{kind[1]}"

    def _codebook(self, kind: Kind, number: int) -> Path:
        return self._of(kind) / f"codebook-{number}.npz"

    def _piece(self, layer: int, book: int, start: int) -> Path:
        return self.folder / f"layer{layer}" / f"counts-{book}-{start:06d}.npz"

    def _digest(self) -> str:
        """A digest of the network, the paths of the images, and the settings that matter."""
        table = {k: v for k, v in dataclasses.asdict(self.settings).items() if k not in FREE}
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


def judge(found: dict[str, tuple[Features, int]], settings: ClassifySettings) -> dict[str, Scores]:
    """The scores of every layer, given by a name with the features that it belongs to, and, if
    there are several, of the mean of their kernels, by the name TOGETHER.

    All features are those of the same images and splits.
    """
    first = next(iter(found.values()))[0]
    labels, classes = first.images.labels, len(first.images.names)
    matrices: dict[str, list[np.ndarray]] = {}
    steps = tqdm(desc="splits", total=len(first.splits) * len(found), leave=False, disable=None)
    for number, split in enumerate(first.splits):
        together = 0
        for index, (name, (features, layer)) in enumerate(found.items()):
            kernels = features.kernels(layer, number)
            together = together + np.concatenate(kernels) / len(found)
            tried = {name: kernels}
            if 0 < index == len(found) - 1:
                tried[TOGETHER] = np.split(together, [len(split.train)])
            for tried_name, (own, tests) in tried.items():
                given = predict(own, labels[split.train], tests, C=settings.C, svm=settings.svm)
                matrix = confusion(labels[split.test], given, classes)
                matrices.setdefault(tried_name, []).append(matrix)
            steps.update()
    steps.close()
    return {name: Scores(np.stack(each)) for name, each in matrices.items()}


def _classes(key: str, path: str) -> list[str]:
    """The names of the folders in a folder, sorted, of which there must be two."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{key}={path}: {'not a folder' if folder.exists() else 'no such folder'}")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        found = names[0] if names else "none"
        raise ValueError(f"{key}={path}: must have a folder of images for each class, has {found}")
    return names


def _write(path: Path, key: str, **arrays: object) -> None:
    named = {name: np.asarray(value) for name, value in arrays.items()}
    of = {"of": np.array(key)}
    save_arrays(path, {**of, **named}, compressed=True, ours=_is_features)


def _is_features(path: Path) -> bool:
    """Whether a file is ours, intact or not: a damaged one is recomputed."""
    try:
        with ownership.open_regular_file(path) as file:
            head = file.read(64)
    except (OSError, ValueError):
        return False
    return head.startswith(ARCHIVE) and head[30:].startswith(tuple(map(str.encode, ARRAYS)))


def _read(path: Path, key: str, **shapes: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """The arrays of a file, the named ones of these shapes; None if the file is damaged or missing,
    or was computed for another key.
    """
    try:
        arrays = load_arrays(path)
    except (OSError, ValueError):
        return None
    sound = all(name in arrays and arrays[name].shape == shapes[name] for name in shapes)
    return arrays if sound and str(arrays.get("of")) == key else None
