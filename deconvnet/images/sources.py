"""Sources of images: photographs, a folder, a list of paths, tar shards, torchvision, an array.

A source yields items in an order that depends on nothing but the settings; `datasets` reads them.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from deconvnet.images.arrays import array_items
from deconvnet.images.decoding import Content, reason, shown_name, user_path
from deconvnet.images.files import assignment, files_in, find_images, listed_images
from deconvnet.images.fit import FITS, MAX_SIDE, MIN_SIDE, TrainingScale
from deconvnet.images.item import Item
from deconvnet.images.photographs import SHORT_SIDE
from deconvnet.images.shards import Damage, Member, read_index
from deconvnet.images.torchvision_source import torchvision_items

SOURCES = ("photographs", "folder", "list", "shards", "torchvision", "array")
# The sources whose images may have masks.
MASKED_SOURCES = ("folder", "list", "shards")

# What data.path is, for the sources that need it.
NEEDED_PATHS = {
    "folder": "a folder of images",
    "list": "a text file with one path per line",
    "shards": "a .tar file, or a folder of them",
    "array": "a .npy or .npz file",
}


@dataclass
class DataSettings:
    """Which images to read, and how to bring them to one size."""

    # name of the folder of the run
    name: str = "photographs"
    # photographs | folder | list | shards | torchvision | array
    source: str = "photographs"
    # the folder, file or list of the images; list: a text file with one path per line; shards: a
    # .tar file, or a folder of them; torchvision: the root folder; array: a .npy or .npz file of
    # (N, C, H, W)
    path: str | None = None
    # torchvision: name of the class, such as CIFAR10
    dataset: str | None = None
    # torchvision: value of split=, image_set= or train= ("train", "test")
    split: str | None = None
    # torchvision: allow a download
    download: bool = False
    # side of the square images in pixels; null: leave them as they are, all of one size
    size: int | None = 96
    # how images become squares: crop | pad (the whole picture, with zeros around it)
    fit: str = "crop"
    # photographs: scale factor before they are cropped, above 0 and at most 1
    scale: float = 0.5
    # use at most this many images; null: all. Of photographs, the crops with the most texture; of a
    # folder, files at equal distances in the order of their paths, so of every class; else the
    # first images
    max_images: int | None = 24
    # training: which pixels are seen; the others may have any value. null: all | alpha: those that
    # are not transparent | a folder of masks with the names of the images, black where unseen
    mask: str | None = None
    # skip images that cannot be used, with a warning, instead of stopping
    skip_unreadable: bool = False
    # read images whenever they are needed, not all at the start, for data sets of any size
    stream: bool = False
    # stream: threads that read images ahead
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.name.strip(".") or set(self.name) & set("/\\"):
            raise ValueError(
                f"data.name={self.name!r}: must be the name of a folder, without slashes"
            )
        if self.source not in SOURCES:
            raise ValueError(f"data.source={self.source!r}: choose {', '.join(SOURCES)}")
        if self.source in NEEDED_PATHS and not self.path:
            raise ValueError(
                f"data.path={self.path!r}: data.source={self.source} needs data.path=..., "
                f"{NEEDED_PATHS[self.source]}"
            )
        if self.source == "photographs" and self.path:
            raise ValueError(
                f"data.path={self.path}: not used with data.source=photographs; add data=folder, "
                "data=list, data=shards or data=array"
            )
        if self.source == "torchvision" and not self.dataset:
            raise ValueError("data.dataset=None: data.source=torchvision needs the name of a class")
        if self.source == "photographs" and self.size is None:
            raise ValueError("data.size=None: the photographs differ in size; give a number")
        if self.source == "array" and self.size is not None:
            raise ValueError(f"data.size={self.size}: arrays are not resized; use null")
        if self.size is not None and not MIN_SIDE <= self.size <= MAX_SIDE:
            raise ValueError(
                f"data.size={self.size}: must be at least {MIN_SIDE}, and at most {MAX_SIDE}"
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
        if self.mask is not None and self.source not in MASKED_SOURCES:
            raise ValueError(
                f"data.mask={self.mask}: the images of data.source={self.source} have no masks; "
                f"choose {', '.join(MASKED_SOURCES)}"
            )
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


def training_scale(data: DataSettings) -> TrainingScale | None:
    """The scale of whole images in these training images; None if they are left as they are.

    Photographs are reduced before they are cropped; the images of other sources are resized to the
    size of the crops.
    """
    if data.size is None:
        return None
    if data.source == "photographs":
        return TrainingScale(round(SHORT_SIDE * data.scale), "crop")
    return TrainingScale(data.size, data.fit)


def without_download(settings: DataSettings) -> DataSettings:
    """The same settings without data.download.

    For settings from a file, such as a checkpoint: only a command that the user types may start a
    download.
    """
    return replace(settings, download=False)


def source_items(settings: DataSettings) -> tuple[Iterator[Item], str]:
    """The images to read, and the setting that names their source, for messages.

    Not for data.source=photographs, which are made in memory (`photographs.photograph_crops`).
    """
    if settings.source == "torchvision":
        return torchvision_items(settings), f"data.dataset={settings.dataset}"
    path = settings.path
    if settings.source == "array":
        return array_items(path), assignment(path)
    if settings.source == "shards":
        return _shard_items(path, skip=settings.skip_unreadable), assignment(path)
    if settings.source == "list":
        return _list_items(path), assignment(path)
    return _folder_items(path, settings.max_images), assignment(path)


def _folder_items(path: str, max_images: int | None) -> Iterator[Item]:
    """The images of a folder. With max_images those at equal distances come first, in order, and
    then the others, which take the place of unreadable ones.
    """
    folder = user_path(path)
    files = find_images(path)
    if max_images is not None and max_images < len(files):
        chosen = [n * len(files) // max_images for n in range(max_images)]
        others = sorted(set(range(len(files))) - set(chosen))
        files = [files[n] for n in (*chosen, *others)]
    for file in files:
        name = file.relative_to(folder).as_posix()
        label, slash, _ = name.partition("/")
        yield _item(Content(file, str(file)), name, label if slash else None, path=file)


def _item(content: Content, name: str, label: str | None, path: Path | None = None) -> Item:
    read_label = None if label is None else partial(str, shown_name(label))
    return Item(name, content.image, path, read_label, content.digest, content.alpha)


def _list_items(path: str) -> Iterator[Item]:
    """The images that a text file names; see `listed_images`."""
    for line, image in listed_images(path):
        yield _item(Content(image, str(image)), line, None, path=image)


def _shard_items(path: str, *, skip: bool) -> Iterator[Item]:
    """The images in a .tar file, or in those of a folder, sorted by name; each in its own order.

    Each shard is scanned once for the positions of its images, which can then be read in any order
    without unpacking the shard. skip: yield an unreadable item for damage instead of raising.
    """
    root = user_path(path)
    is_folder = os.path.isdir(root)
    shards = files_in(path, (".tar",)) if is_folder else [root]
    if not shards:
        raise ValueError(f"{assignment(path)}: no .tar file in this folder")
    count = 0
    for shard in shards:
        name = shard.relative_to(root).as_posix() if is_folder else shard.name
        try:
            for member in read_index(shard, name):
                count += 1
                yield _shard_item(member, name, path, skip)
        except OSError as error:
            raise ValueError(f"{assignment(path)}: {shown_name(name)}: {reason(error)}") from error
    if not count:
        raise ValueError(f"{assignment(path)}: no image in {len(shards)} .tar files")


def _shard_item(member: Member | Damage, shard: str, path: str, skip: bool) -> Item:
    if isinstance(member, Damage):
        message = f"{assignment(path)}: {shown_name(shard)} {member.message}"
        if not skip:
            raise ValueError(
                f"{message}; images would be lost (data.skip_unreadable=true uses those that can "
                "be read)"
            )
        return _unreadable_item(shard, message)
    name = f"{shard}/{member.name}"
    if member.content is None:
        return _unreadable_item(name, f"cannot read {shown_name(name)}: {member.problem}")
    label, slash, _ = posixpath.normpath(member.name).lstrip("/").partition("/")
    return _item(member.content, name, label if slash else None)


def _unreadable_item(name: str, message: str) -> Item:
    fail = partial(_fail, message)
    return Item(name, fail, None, None, fail)


def _fail(message: str) -> NoReturn:
    raise ValueError(message)
