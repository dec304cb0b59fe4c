"""Where images come from: photographs of installed packages, a folder, a list, tar shards,
torchvision.

    N images · H, W pixels     images (N, 3, H, W) float32 in [0, 1], RGB
    frames (N, 4): top, left, height, width of the picture in its image, zeros around it

This module decides what a file, whatever its kind, becomes in pixels: grey is repeated to three
planes, transparency shows white, the camera's orientation is applied. It decides what becomes of
files that cannot be read, and how images of many sizes get one. Nothing here is random. Images are
read all at once (`load_images`), or when they are asked for, of a set of any size: one by one
(`lazy_images`), or fitted and some at a time (`stream_images`).
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property, partial
from operator import getitem
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deconvnet.images.decoding import (
    SUFFIXES,
    Content,
    check_file,
    digest_file,
    read_image,
    reason,
    shown_name,
    to_tensor,
    user_path,
    without_ghostscript,
)
from deconvnet.images.decoding import decode as _decoded  # noqa: F401 - programs know it by this name
from deconvnet.images.preprocessing import Frame, local_moments
from deconvnet.images.shards import Damage, Member, read_index
from deconvnet.storage.ownership import foreign_files

SOURCES = ("photographs", "folder", "list", "shards", "torchvision")
FITS = ("crop", "pad")
INTERPOLATIONS = ("bicubic", "bilinear")

CHUNK = 1 << 20  # bytes of a list that are looked at to know that it is one

READERS = 4  # threads that read files for their digests
MANY = 1024  # files that wait for them at most

# What is done to the images of a set after they are read: that of a `Crop`, or ("pad", size).
Fitting = tuple[int | str, ...] | None

SMALLEST = 8  # pixels: the least side of an image, and of a picture in its square
LARGEST = 100_000  # a side of more can only be a mistake

logger = logging.getLogger(__name__)


@dataclass
class DataSettings:
    name: str = "photographs"  # names the folder of the run
    source: str = "photographs"  # photographs | folder | list | shards | torchvision
    # folder; list: text file, one path a line; shards: a .tar file, or a folder of such;
    # torchvision: root folder
    path: str | None = None
    dataset: str | None = None  # torchvision: name of the class, such as CIFAR10
    split: str | None = None  # torchvision: for its split=, image_set= or train= ("train", "test")
    download: bool = False  # torchvision: allow a download
    size: int | None = 96  # side of the squares in pixels; null: as they are, all the same
    fit: str = "crop"  # to those squares: crop | pad, whole pictures of any shape and zeros around
    scale: float = 0.35  # photographs: factor of reduction before they are cropped, 0 to 1
    max_images: int | None = 32  # photographs: that many of most texture; else the first; null: all
    skip_unreadable: bool = False  # leave out files that cannot be used, with a warning
    stream: bool = False  # read images at every visit, not all at the start: any number of them
    workers: int = 2  # stream: threads that read images ahead

    def __post_init__(self) -> None:
        if not self.name.strip(".") or set(self.name) & set("/\\"):
            raise ValueError(
                f"data.name={self.name!r}: must be the name of a folder, without slashes"
            )
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r}: choose {', '.join(SOURCES)}")
        if self.source in ("folder", "list", "shards") and not self.path:
            raise ValueError(f"data.path={self.path!r}: data.source={self.source} needs a path")
        if self.source == "torchvision" and not self.dataset:
            raise ValueError("data.dataset=None: data.source=torchvision needs the name of a class")
        if self.source == "photographs" and self.size is None:
            raise ValueError("data.size=None: the photographs differ in size, a number is needed")
        if self.size is not None and not SMALLEST <= self.size <= LARGEST:
            raise ValueError(
                f"data.size={self.size}: must be at least {SMALLEST}, and at most {LARGEST}"
            )
        if self.fit not in FITS:
            raise ValueError(f"data.fit={self.fit!r}: choose {', '.join(FITS)}")
        if self.fit == "pad" and self.source == "photographs":
            raise ValueError(
                "data.fit=pad: the images of data.source=photographs are crops; use crop, or "
                "another source"
            )
        if self.fit == "pad" and self.size is None:
            raise ValueError("data.size=None: data.fit=pad needs the side of the squares")
        if self.stream and self.source == "photographs":
            raise ValueError(
                "data.stream=true: the images of data.source=photographs are made in memory; "
                "choose folder, list, shards or torchvision"
            )
        if self.workers < 1:
            raise ValueError(f"data.workers={self.workers}: must be at least 1")
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale={self.scale}: must be above 0 and at most 1")
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(
                f"data.max_images={self.max_images}: must be at least 1, or null for all"
            )


@dataclass(frozen=True)
class Item:
    name: str  # becomes `shown_name` of it
    read: Callable[[], Tensor]  # the image (3, H, W), or ValueError in one line
    path: Path | None = None  # of its file, if it has one of its own
    read_label: Callable[[], str] | None = None  # its class, or ValueError in one line
    # SHA-256 of its content, or ValueError in one line; None: of its file, or else of its pixels
    read_digest: Callable[[], str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", shown_name(self.name))

    def digest(self) -> str:
        """64 hexadecimal digits that two images share only if they have the same content.

        Of the bytes of its file or of its member of a shard, which are not decoded; of the pixels
        where there are no bytes, as in torchvision's data sets.
        """
        if self.read_digest is not None:
            return self.read_digest()
        return _pixel_digest(self.read()) if self.path is None else digest_file(self.path)

    @property
    def has_bytes(self) -> bool:
        return self.read_digest is not None or self.path is not None


@dataclass(frozen=True)
class ImageSet:
    images: Tensor  # (N, 3, H, W) float32 in [0, 1]
    names: tuple[str, ...]  # one for every image
    frames: Tensor | None = None  # (N, 4) int64, see above; None: all pictures fill their images
    # what the images were read from, and what was done to fit them; None: nothing, they are theirs
    items: tuple[Item, ...] | None = field(default=None, repr=False)
    fitting: Fitting = None

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`Item.digest` of every image, in order: of what was read, before it was fitted."""
        if self.items is None:
            return tuple(_pixel_digest(image) for image in self.images)
        return _digests(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that differ where the images, their order or their size differ.

        Names and places do not count. Equal for the three ways of reading the same images.
        """
        return _fingerprint(self.digests, self.fitting)


@dataclass(frozen=True)
class Crop:
    """The middle of an image as a network of fixed input size takes it.

    The short side becomes `resize` pixels, as in `fit_size`; of that the square of `size` pixels in
    the middle is kept.
    """

    resize: int
    size: int
    interpolation: str = "bicubic"  # bicubic | bilinear

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"crop.size={self.size}: must be at least 1")
        if self.resize < self.size:
            raise ValueError(
                f"crop.resize={self.resize}: must be at least crop.size={self.size}, the side of "
                "the square that is cut out of it"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"crop.interpolation={self.interpolation!r}: choose {', '.join(INTERPOLATIONS)}"
            )

    def __call__(self, image: Tensor) -> Tensor:
        """(3, size, size) of an image (3, H, W)."""
        square = fit_size(image, self.resize, interpolation=self.interpolation)
        # Rounded as torchvision does it, so that networks see the pixels they were trained on.
        first = round((self.resize - self.size) / 2)
        return square[:, first : first + self.size, first : first + self.size]


class LazyImages:
    """Images that are read when they are asked for: images[i] is (3, H, W) float32 in [0, 1].

    Of one size if there is a crop. Takes as little memory for a million images as their names do,
    and can be sent to other processes: a data set for torch.utils.data.DataLoader.
    """

    def __init__(self, items: Sequence[Item], *, crop: Crop | None = None):
        self.items, self.crop = tuple(items), crop

    @classmethod
    def of(cls, images: ImageSet, *, crop: Crop | None = None) -> LazyImages:
        """The same interface to images that are in memory; frames are left out."""
        # All items hold the one tensor of all images, so that sending them sends it once.
        items = [
            Item(
                name,
                partial(getitem, images.images, n),
                None,
                None,
                partial(_nth_digest, images, n),
            )
            for n, name in enumerate(images.names)
        ]
        return cls(items, crop=crop)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.items)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`Item.digest` of every image, in order: of what is read, before it is cropped."""
        return _digests(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that differ where the images, their order or the crop differ.

        For numbers that were computed image by image to be trusted later: an image that is
        corrected under its old name changes it; a folder that is moved, renamed or copied does not.
        All files are read for it once, none is decoded.
        """
        return _fingerprint(self.digests, self.crop and astuple(self.crop))

    def label(self, index: int) -> str:
        """The class of an image: of a torchvision data set its own, of a folder the folder inside.

        ValueError where it has none.
        """
        item = self.items[index]
        if item.read_label is None:
            raise ValueError(f"{item.name}: has no class; classes are the folders in data.path")
        return item.read_label()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        image = self.items[index].read()
        return image if self.crop is None else self.crop(image)


def load_images(settings: DataSettings) -> ImageSet:
    """The images of the settings, in an order that depends on nothing else."""
    if settings.source == "photographs":
        return _photographs(settings)
    return _read_items(*_items(settings), settings)


def lazy_images(settings: DataSettings, *, crop: Crop | None = None) -> LazyImages:
    """The images of the settings in the same order, each read when it is asked for.

    crop takes the place of data.size. data.fit=pad is refused, since its frames would be lost. With
    data.skip_unreadable all files are read once at the start: which image has which number must not
    change afterwards.
    """
    if settings.fit == "pad":
        raise ValueError("data.fit=pad: images that are read one by one are cropped; use crop")
    if settings.source == "photographs":
        return LazyImages.of(_photographs(settings), crop=crop)
    if crop is None and settings.size is not None:
        crop = Crop(settings.size, settings.size)
    return LazyImages(_kept_items(settings, lambda item: item.read()), crop=crop)


class StreamedImages:
    """Fitted images that are read when they are asked for, by some threads.

    One that cannot be read is a ValueError in one line when it is asked for. `ahead` says which
    will be asked for next, so that they are there when their turn has come.
    """

    def __init__(self, items: Sequence[Item], settings: DataSettings):
        self.items, self.settings = tuple(items), settings
        self._pool = ThreadPoolExecutor(settings.workers)
        self._coming: dict[int, Future] = {}

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`Item.digest` of every image, in order; all files are read for it once, none decoded."""
        return _digests(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """That of `load_images` with the same settings."""
        return _fingerprint(self.digests, _fitting(self.settings))

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (n, 3, H, W) and their frames (n, 4), None where all fill their images."""
        numbers = indices.tolist()
        found = [self._coming.pop(n, None) or self._pool.submit(self._one, n) for n in numbers]
        images, frames = zip(*(each.result() for each in found), strict=True)
        _check_one_size(list(images), [self.items[n].name for n in numbers])
        filled = all(f[2:] == i.shape[1:] for f, i in zip(frames, images, strict=True))
        return torch.stack(images), None if filled else torch.tensor(frames)

    def ahead(self, indices: Tensor) -> None:
        """Begin to read these, if that has not begun; what else was announced is forgotten."""
        numbers = set(indices.tolist())
        for n in self._coming.keys() - numbers:
            self._coming.pop(n).cancel()
        for n in indices.tolist():
            if n not in self._coming:
                self._coming[n] = self._pool.submit(self._one, n)

    def _one(self, number: int) -> tuple[Tensor, Frame]:
        item = self.items[number]
        return _fit(item.read(), item.name, self.settings)


def stream_images(settings: DataSettings) -> StreamedImages:
    """The images of `load_images`, in the same order, read when they are asked for.

    With data.skip_unreadable all are read once at the start to know which are left out: which image
    has which number must not change afterwards.
    """
    items = _kept_items(settings, lambda item: _fit(item.read(), item.name, settings))
    return StreamedImages(items, settings)


def find_images(path: str | Path, *, key: str = "data.path") -> list[Path]:
    """The image files of a folder and of the folders in it, sorted; SUFFIXES says which they are.

    Hidden files and folders are left out. Links to folders are followed, but none is entered twice.
    So are pictures that this package has made, where there are others: results that lie among the
    images that they were made from. A folder of nothing else is read as it is.
    key: the setting that named the folder, for messages.
    """
    found = _files(path, SUFFIXES, key)
    if not found:
        raise ValueError(f"{_given(path, key)}: no image in this folder ({' '.join(SUFFIXES)})")
    images = foreign_files(found) or found
    if len(images) < len(found):
        made = len(found) - len(images)
        logger.warning("%s: %d pictures that deconvnet made are left out", _given(path, key), made)
    return images


def without_download(settings: DataSettings) -> DataSettings:
    """The same settings, which fetch nothing from the network.

    For those that come out of a file, such as the checkpoint of a run: only the command that a user
    types may say data.download=true.
    """
    return replace(settings, download=False)


def _files(path: str | Path, suffixes: tuple[str, ...], key: str = "data.path") -> list[Path]:
    """The files of a folder and of those in it whose names end so, sorted; see `find_images`."""
    folder = user_path(path)
    try:
        is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
    except FileNotFoundError:
        raise ValueError(f"{_given(path, key)}: no such folder") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{_given(path, key)}: cannot be read: {reason(error)}") from error
    if not is_folder:
        hint = ""
        if key == "data.path":
            hint = (
                "; data.source=shards reads .tar files, data.source=list the files that a text "
                "file names"
            )
        raise ValueError(f"{_given(path, key)}: not a folder{hint}")

    def stop(error: OSError) -> None:
        raise ValueError(
            f"{_given(path, key)}: {shown_name(error.filename)} cannot be listed: {error.strerror}"
        )

    found, entered = [], set()
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        try:
            identity = os.stat(parent)
        except OSError as error:
            stop(error)
        if (identity.st_dev, identity.st_ino) in entered:
            folders.clear()
            continue
        entered.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        wanted = (name for name in files if name.lower().endswith(suffixes))
        found += [Path(parent, name) for name in wanted if not name.startswith(".")]
    return sorted(found)


def _given(path: str | Path, key: str = "data.path") -> str:
    return f"{key}={shown_name(path)}"


def _digests(items: Sequence[Item]) -> tuple[str, ...]:
    """Of all items: those that are bytes are read by some threads, whose time the disk takes."""
    found = []
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(items), MANY):
            some = items[start : start + MANY]
            pending = [pool.submit(item.digest) if item.has_bytes else None for item in some]
            # Data sets in memory or of other readers need not stand several threads.
            found += [
                item.digest() if coming is None else coming.result()
                for item, coming in zip(some, pending, strict=True)
            ]
    return tuple(found)


def _pixel_digest(image: Tensor) -> str:
    pixels = image.cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(pixels.shape)} {pixels.dtype}".encode())
    digest.update(pixels.view(torch.uint8).numpy())
    return digest.hexdigest()


def _nth_digest(images: ImageSet, index: int) -> str:
    return images.digests[index]


def _fingerprint(digests: tuple[str, ...], fitting: Fitting) -> str:
    return hashlib.sha256(json.dumps([fitting, digests]).encode()).hexdigest()


def image_files(images: object, *, key: str = "images") -> list[Path]:
    """The image files that a setting names: one, those of a folder, or those of a list of both.

    key: the setting, for messages.
    """
    if isinstance(images, Sequence) and not isinstance(images, str):
        return [path for item in images for path in image_files(item, key=key)]
    path = user_path(str(images))
    return find_images(path, key=key) if os.path.isdir(path) else [path]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name for the pictures of every file: its stem, numbered where another has it already.

    No two are equal, not even where capitals or the way to write an accent do not count, as on the
    file systems of Windows and macOS. A file has the same name in whatever order the paths come.
    """
    order = sorted(range(len(paths)), key=lambda n: str(paths[n]))
    stems = [shown_name(path.stem) for path in paths]
    names: dict[int, str] = {}
    taken: set[str] = set()
    # Whoever can have its own name has it, before others are given numbers that might be one.
    for n in order:
        if _folded(stems[n]) not in taken:
            taken.add(_folded(stems[n]))
            names[n] = stems[n]
    counts: dict[str, int] = {}
    for n in order:
        if n in names:
            continue
        count = counts.get(_folded(stems[n]), 1) + 1
        while _folded(f"{stems[n]}-{count}") in taken:
            count += 1
        counts[_folded(stems[n])] = count
        names[n] = f"{stems[n]}-{count}"
        taken.add(_folded(names[n]))
    return [names[n] for n in range(len(paths))]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def fit_size(image: Tensor, size: int, *, interpolation: str = "bicubic") -> Tensor:
    """The centre of the image (3, H, W) as (3, size, size): its short side becomes `size`.

    Cropped first, so that a long thin image does not become huge; then resampled by an antialiased
    kernel and clamped to [0, 1], which the bicubic one oversteps at edges.
    """
    height, width = image.shape[1:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    image = image[:, top : top + short, left : left + short]
    return _resize(image, size, size, interpolation)


def pad_size(image: Tensor, size: int) -> tuple[Tensor, Frame]:
    """The whole image in the middle of (3, size, size), its longer side `size`, and its frame.

    Around it are zeros. Resampled like `fit_size`; a side that would fall below 8 pixels, too few
    for what preprocessing needs at a border, is a ValueError.
    """
    longer = max(image.shape[1:])
    height, width = (round(length * size / longer) for length in image.shape[1:])
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"{image.shape[1]}x{image.shape[2]} pixels become {height}x{width} in a square of "
            f"data.size={size}: both must be at least {SMALLEST}"
        )
    top, left = (size - height) // 2, (size - width) // 2
    square = image.new_zeros(3, size, size)
    square[:, top : top + height, left : left + width] = _resize(image, height, width)
    return square, (top, left, height, width)


def _resize(image: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    resized = functional.interpolate(image[None], (height, width), mode=mode, antialias=True)
    return resized[0].clamp(0, 1)


def _items(settings: DataSettings) -> tuple[Iterator[Item], str]:
    """What there is to read, and the setting that it came from, for messages."""
    if settings.source == "torchvision":
        return _torchvision_items(settings), f"data.dataset={settings.dataset}"
    path, source = settings.path, _given(settings.path)
    if settings.source == "shards":
        return _shard_items(path, skip=settings.skip_unreadable), source
    return {"folder": _folder_items, "list": _list_items}[settings.source](path), source


def _kept_items(settings: DataSettings, check: Callable[[Item], object]) -> list[Item]:
    """The items of the settings; with skip_unreadable those that pass, with a warning of others."""
    items, source = _items(settings)
    kept, failures = [], []
    for item in items:
        if len(kept) == settings.max_images:
            break
        if settings.skip_unreadable:
            try:
                check(item)
            except ValueError as error:
                failures.append(str(error))
                continue
        kept.append(item)
    _report(failures, source, settings.skip_unreadable, none_left=not kept)
    return kept


def _read_items(items: Iterator[Item], source: str, settings: DataSettings) -> ImageSet:
    """Reads up to max_images, fits them to one size, and reports all that failed at once."""
    images, frames, kept, failures, enlarged = [], [], [], [], 0
    for item in items:
        try:
            image = item.read()
            fitted, frame = _fit(image, item.name, settings)
        except ValueError as error:
            failures.append(str(error))
        else:
            kept.append(item)
            images.append(fitted)
            frames.append(frame)
            enlarged += _is_enlarged(image, settings)
        done = len(images) if settings.skip_unreadable else len(images) + len(failures)
        if done == settings.max_images:
            break
    _report(failures, source, settings.skip_unreadable, none_left=not images)
    if enlarged:
        logger.warning(
            "%s: %d of %d images are smaller than data.size=%d and were enlarged",
            *(source, enlarged, len(images), settings.size),
        )
    names = [item.name for item in kept]
    _check_one_size(images, names)
    filled = all(frame[2:] == image.shape[1:] for frame, image in zip(frames, images, strict=True))
    return ImageSet(
        torch.stack(images),
        tuple(names),
        None if filled else torch.tensor(frames),
        tuple(kept),
        _fitting(settings),
    )


def _fitting(settings: DataSettings) -> Fitting:
    """What `_fit` does, in the words of `Crop` where it is one."""
    if settings.size is None:
        return None
    if settings.fit == "pad":
        return ("pad", settings.size)
    return astuple(Crop(settings.size, settings.size))


def _fit(image: Tensor, name: str, settings: DataSettings) -> tuple[Tensor, Frame]:
    """The image as data.size and data.fit want it, and its frame."""
    if settings.fit == "pad":
        try:
            return pad_size(image, settings.size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if settings.size is not None:
        image = fit_size(image, settings.size)
    return image, (0, 0, *image.shape[1:])


def _is_enlarged(image: Tensor, settings: DataSettings) -> bool:
    """Whether the side that becomes data.size is smaller."""
    side = max(image.shape[1:]) if settings.fit == "pad" else min(image.shape[1:])
    return settings.size is not None and side < settings.size


def _check_one_size(images: list[Tensor], names: list[str]) -> None:
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            (a, b), (c, d) = images[0].shape[1:], image.shape[1:]
            raise ValueError(
                f"data.size=None: all images must have one size, but {names[0]} has {a}x{b} pixels "
                f"and {name} {c}x{d}; a number in data.size crops or, with data.fit=pad, pads them"
            )


def _report(failures: list[str], source: str, skip: bool, *, none_left: bool) -> None:
    if not failures:
        return
    listed = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
    if not skip:
        raise ValueError(
            f"{source}: {len(failures)} of the images cannot be used: {listed} "
            "(data.skip_unreadable=true leaves them out)"
        )
    if none_left:
        raise ValueError(f"{source}: none of the {len(failures)} images can be used: {listed}")
    logger.warning("%s: left out %d unreadable images: %s", source, len(failures), listed)


def _folder_items(path: str) -> Iterator[Item]:
    folder = user_path(path)
    for file in find_images(path):
        name = file.relative_to(folder).as_posix()
        label, slash, _ = name.partition("/")
        yield _item(Content(file, str(file)), name, label if slash else None, path=file)


def _item(content: Content, name: str, label: str | None, path: Path | None = None) -> Item:
    read_label = None if label is None else partial(str, shown_name(label))
    return Item(name, content.image, path, read_label, content.digest)


def _list_items(path: str) -> Iterator[Item]:
    """The lines of a text file of paths, which are relative to it; "#" starts a comment line."""
    file = user_path(path)
    lines = re.split(r"\r\n|\r|\n", _text(file, path))
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise ValueError(f"{_given(path)}: this list names no image")
    for line in lines:
        # Spaces around a name are a part of it only where there is such a file.
        if line != line.strip() and not os.path.lexists(file.parent / user_path(line)):
            line = line.strip()
        image = file.parent / user_path(line)
        yield _item(Content(image, str(image)), line, None, path=image)


def _text(file: Path, path: str) -> str:
    """The content of a list; bytes that are no UTF-8 are those of names of files that are none."""
    try:
        check_file(file)
        with open(file, "rb") as stream:
            data = stream.read(CHUNK)
            if b"\0" in data:
                raise ValueError("it has zero bytes, which no text in UTF-8 has")
            data += stream.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"{_given(path)}: not a readable text file: {reason(error)}") from error
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _shard_items(path: str, *, skip: bool) -> Iterator[Item]:
    """The images in a .tar file, or in those of a folder, sorted by their names: shard after shard,
    each in its order.

    The shards are gone through once for where everything is. Then an image is read by itself,
    whatever the order: no shard is unpacked, and no buffer is shuffled. skip: damage is an image
    that cannot be read, not an error.
    """
    place = user_path(path)
    whole = os.path.isdir(place)
    shards = _files(path, (".tar",)) if whole else [place]
    if not shards:
        raise ValueError(f"{_given(path)}: no .tar file in this folder")
    count = 0
    for shard in shards:
        name = shard.relative_to(place).as_posix() if whole else shard.name
        try:
            for member in read_index(shard, name):
                count += 1
                yield _shard_item(member, name, path, skip)
        except OSError as error:
            raise ValueError(f"{_given(path)}: {shown_name(name)}: {reason(error)}") from error
    if not count:
        raise ValueError(f"{_given(path)}: no image in {len(shards)} .tar files")


def _shard_item(member: Member | Damage, shard: str, path: str, skip: bool) -> Item:
    if isinstance(member, Damage):
        message = f"{_given(path)}: {shown_name(shard)} {member.message}"
        if not skip:
            raise ValueError(
                f"{message}; images would be lost (data.skip_unreadable=true takes those that can "
                "be read)"
            )
        return _unreadable(shard, message)
    name = f"{shard}/{member.name}"
    if member.content is None:
        return _unreadable(name, f"cannot read {shown_name(name)}: {member.problem}")
    label, slash, _ = posixpath.normpath(member.name).lstrip("/").partition("/")
    return _item(member.content, name, label if slash else None)


def _unreadable(name: str, message: str) -> Item:
    stop = partial(_stop, message)
    return Item(name, stop, None, None, stop)


def _stop(message: str) -> NoReturn:
    raise ValueError(message)


def _torchvision_items(settings: DataSettings) -> Iterator[Item]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ValueError(f"data.source=torchvision needs torchvision installed: {error}") from error

    names = [name for name in datasets.__all__ if inspect.isclass(getattr(datasets, name))]
    if settings.dataset not in names:
        lower = {name.lower(): name for name in names}
        close = [lower[key] for key in difflib.get_close_matches(settings.dataset.lower(), lower)]
        raise ValueError(
            f"data.dataset={settings.dataset}: torchvision has no such data set; "
            + (f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names)}")
        )
    kind = getattr(datasets, settings.dataset)
    arguments = _torchvision_arguments(kind, settings)
    try:
        samples = kind(**arguments)
        count = len(samples)
    # Each class has its own exceptions for missing files, archives, packages or no network.
    except Exception as error:
        tried = f"data.dataset={settings.dataset}: cannot be opened"
        remedy = f"set data.download=true or put the files under data.path={settings.path}"
        if settings.download:
            tried += " with data.download=true"
            remedy = f"put the files under data.path={settings.path} if they cannot be fetched"
        raise ValueError(f"{tried}: {reason(error)}; {remedy}") from error
    # Those of a folder have files, whose bytes tell them apart without decoding them.
    files = samples.samples if isinstance(samples, datasets.DatasetFolder) else None
    for index in range(count):
        read = partial(_sample_image, samples, index, settings.dataset)
        read_label = partial(_sample_label, samples, index, settings.dataset)
        path = None if files is None else Path(files[index][0])
        yield Item(f"{settings.dataset}-{index}", read, path, read_label)


def _torchvision_arguments(kind: type, settings: DataSettings) -> dict:
    """The arguments of this class, and of its bases, to which EMNIST and others pass them on."""
    known = {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}
    arguments = {}
    if "root" in inspect.signature(kind).parameters:
        if not settings.path:
            raise ValueError(f"data.path=None: data.dataset={settings.dataset} needs a root folder")
        arguments["root"] = user_path(settings.path)
    if "download" in known:
        arguments["download"] = settings.download
    if "loader" in known:
        # Its files are read as those of a folder are: upright, and of the same formats.
        arguments["loader"] = read_image
    if settings.split is not None:
        key = next((key for key in ("split", "image_set", "train") if key in known), None)
        if key is None:
            raise ValueError(
                f"data.split={settings.split}: {settings.dataset} has no splits; use null"
            )
        if key == "train" and settings.split not in ("train", "test"):
            raise ValueError(f"data.split={settings.split}: {settings.dataset} has train and test")
        arguments[key] = settings.split == "train" if key == "train" else settings.split
    return arguments


def _sample_image(samples, index: int, dataset: str) -> Tensor:
    try:
        with without_ghostscript():
            sample = samples[index]
        image = sample[0] if isinstance(sample, (tuple, list)) else sample
        return to_tensor(image)
    except Exception as error:
        raise ValueError(f"cannot read sample {index} of {dataset}: {reason(error)}") from error


def _sample_label(samples, index: int, dataset: str) -> str:
    """The name of the class of a sample, or its number in data sets without names."""
    try:
        with without_ghostscript():
            number = int(samples[index][1])
    except Exception as error:
        raise ValueError(
            f"data.dataset={dataset}: its samples have no class: {reason(error)}"
        ) from error
    names = getattr(samples, "classes", None)
    return shown_name(names[number] if names else number)


def _photographs(settings: DataSettings) -> ImageSet:
    """Crops of the photographs that come with scikit-image and scikit-learn, those of most texture.

    Every photograph is reduced by data.scale and cut on a regular grid whose crops overlap.
    """
    crops, names = [], []
    for name, photograph in _reduced_photographs(settings.scale):
        tops, lefts = (_grid(length, settings.size) for length in photograph.shape[1:])
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                crops.append(photograph[:, top : top + settings.size, left : left + settings.size])
                names.append(f"{name}-{row}-{column}")
    if not crops:
        raise ValueError(
            f"data.size={settings.size}: larger than every photograph at "
            f"data.scale={settings.scale}; choose a smaller size or a larger scale"
        )
    images = torch.stack(crops)
    order = _texture(images).argsort(descending=True, stable=True)
    kept = order[: settings.max_images].sort().values
    return ImageSet(images[kept], tuple(names[index] for index in kept))


def _reduced_photographs(scale: float) -> Iterator[tuple[str, Tensor]]:
    try:
        from skimage import data, transform
        from sklearn.datasets import load_sample_images

        photographs = {
            "astronaut": data.astronaut(),
            "chelsea": data.chelsea(),
            "coffee": data.coffee(),
            "rocket": data.rocket(),
            "motorcycle": data.stereo_motorcycle()[0],
        }
        samples = load_sample_images()
    except ImportError as error:
        raise ValueError(
            "data.source=photographs needs scikit-image and scikit-learn "
            f"(pip install scikit-image scikit-learn): {error}"
        ) from error
    photographs |= {
        Path(file).stem: image
        for file, image in zip(samples.filenames, samples.images, strict=True)
    }
    for name, photograph in photographs.items():
        reduced = transform.rescale(photograph, scale, anti_aliasing=True, channel_axis=2)
        pixels = torch.from_numpy(np.ascontiguousarray(reduced.transpose(2, 0, 1)))
        yield name, pixels.float().clamp(0, 1)


def _grid(length: int, size: int) -> list[int]:
    """Where the crops begin along one axis, evenly from end to end; nowhere if it is too short."""
    if length < size:
        return []
    count = max(1, round(1.6 * (length / size - 1)) + 1)
    return np.linspace(0, length - size, count).round().astype(int).tolist()


def _texture(images: Tensor) -> Tensor:
    """The median over the pixels of the local standard deviation, (N,), of images (N, 3, H, W)."""
    deviations = [local_moments(image, 13, 4.773)[1] for image in images.split(1)]
    return torch.cat(deviations).flatten(1).median(1).values
