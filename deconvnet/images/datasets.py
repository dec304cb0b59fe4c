"""Image sets: all in memory, read one by one, or streamed by threads.

    N images · H, W pixels     images (N, 3, H, W) float32 in [0, 1], RGB
    frames (N, 4): top, left, height, width of the picture in its image, zeros around it

`load_images` reads all images at the start, `lazy_images` reads each on access, and `stream_images`
fits them and reads ahead. With data.mask, the first and the last have NaN where a pixel is unseen;
images that are only looked at are whole. Otherwise all three give the same images in the same
order, with the same fingerprint. Nothing here is random.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from functools import cached_property, partial
from operator import getitem

import torch
from torch import Tensor

from deconvnet.images.fit import Crop, check_equal_sizes, fit_image, is_enlarged
from deconvnet.images.item import Item, pixel_digest
from deconvnet.images.mask_files import with_holes
from deconvnet.images.photographs import photograph_crops
from deconvnet.images.preprocessing import Frame
from deconvnet.images.sources import DataSettings, source_items

# Threads that read files for their digests, and how many files they are given at a time.
DIGEST_THREADS, DIGEST_BATCH = 4, 1024

# How images were fitted after they were read, for the fingerprint: a `Crop` as a tuple, or
# ("pad", size); None: not at all.
Fitting = tuple[int | str, ...] | None

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSet:
    """Images of one size in memory."""

    images: Tensor  # (N, 3, H, W) float32 in [0, 1]
    names: tuple[str, ...]  # one for each image
    frames: Tensor | None = None  # (N, 4) int64, see above; None: all pictures fill their images
    # what the images were read from, and how they were fitted; None: `images` is the original
    items: tuple[Item, ...] | None = field(default=None, repr=False)
    fitting: Fitting = None

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`Item.digest` of every image, in order, before it was fitted."""
        if self.items is None:
            return tuple(pixel_digest(image) for image in self.images)
        return _item_digests(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that differ if the images, their order or their size differ.

        Names and paths do not count. Equal for the three ways of reading the same images.
        """
        return _fingerprint(self.digests, self.fitting)


class LazyImages:
    """Images that are read on access: images[i] is (3, H, W) float32 in [0, 1].

    With a crop they have one size. Memory holds only their names and locations. Instances can be
    pickled, so they can be used as a data set for torch.utils.data.DataLoader.
    """

    def __init__(self, items: Sequence[Item], *, crop: Crop | None = None):
        self.items, self.crop = tuple(items), crop

    @classmethod
    def from_set(cls, images: ImageSet, *, crop: Crop | None = None) -> LazyImages:
        """The same interface to images that are in memory; frames are dropped."""
        # All items share the one tensor of all images, so that pickling sends it once.
        items = [
            Item(
                name,
                partial(getitem, images.images, n),
                None,
                None,
                partial(_digest_at, images, n),
            )
            for n, name in enumerate(images.names)
        ]
        return cls(items, crop=crop)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.items)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`Item.digest` of every image, in order, before it is cropped."""
        return _item_digests(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that differ if the images, their order or the crop differ.

        It shows whether results computed image by image still belong to these images: editing an
        image changes it; moving, renaming or copying a folder does not. All files are read once,
        none is decoded.
        """
        return _fingerprint(self.digests, self.crop and astuple(self.crop))

    def label(self, index: int) -> str:
        """The class of an image: that of a torchvision data set, or its subfolder of data.path.

        Raises ValueError if it has none.
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


class StreamedImages:
    """Fitted images that threads read on demand.

    An image that cannot be read raises ValueError on access. `prefetch` announces the next images,
    so that they are ready in time.
    """

    def __init__(self, items: Sequence[Item], settings: DataSettings):
        self.items, self.settings = tuple(items), settings
        self._pool = ThreadPoolExecutor(settings.workers)
        self._pending: dict[int, Future] = {}

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """`Item.digest` of every image, in order; it reads all files once and decodes none."""
        return _item_digests(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """That of `load_images` with the same settings."""
        return _fingerprint(self.digests, _fitting(self.settings))

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (n, 3, H, W) and their frames (n, 4), or None if all pictures fill their images.

        indices: (n,) integers.
        """
        numbers = indices.tolist()
        pending = [self._pending.pop(n, None) or self._pool.submit(self._read, n) for n in numbers]
        images, frames = zip(*(image.result() for image in pending), strict=True)
        check_equal_sizes(images, [self.items[n].name for n in numbers])
        return torch.stack(images), _frames_tensor(frames, images)

    def prefetch(self, indices: Tensor) -> None:
        """Start reading these images, and cancel others that were announced before."""
        numbers = set(indices.tolist())
        for n in self._pending.keys() - numbers:
            self._pending.pop(n).cancel()
        for n in indices.tolist():
            if n not in self._pending:
                self._pending[n] = self._pool.submit(self._read, n)

    def _read(self, number: int) -> tuple[Tensor, Frame]:
        item = self.items[number]
        return _fitted(item.read(), item.name, self.settings)


def load_images(settings: DataSettings) -> ImageSet:
    """The images of the settings, in an order that depends only on the settings."""
    if settings.source == "photographs":
        return _photographs(settings)
    return _read_all(*_training_items(settings), settings)


def sample_photographs(
    max_images: int | None = DataSettings.max_images,
    size: int = DataSettings.size,
    *,
    scale: float = DataSettings.scale,
) -> Tensor:
    """Crops (N, 3, size, size) in [0, 1] of seven photographs, those from which the command
    `deconvnet train` learns unless it gets others.

    The photographs come with scikit-image and scikit-learn, so that nothing is downloaded, and
    nothing is random. Each is reduced by the factor `scale` and cut on a grid of overlapping crops.
    max_images: keep this many, those with the most texture; None: all. For commands these are
    data=photographs with data.max_images, data.size and data.scale.
    """
    return load_images(DataSettings(size=size, scale=scale, max_images=max_images)).images


def lazy_images(settings: DataSettings, *, crop: Crop | None = None) -> LazyImages:
    """The images of the settings in the same order, each read on access.

    crop replaces data.size. Raises ValueError for data.fit=pad, since the frames would be lost.
    With data.skip_unreadable all images are read once at the start, since their numbers must not
    change later.
    """
    if settings.fit == "pad":
        raise ValueError("data.fit=pad: images that are read one by one are cropped; use crop")
    if settings.source == "photographs":
        return LazyImages.from_set(_photographs(settings), crop=crop)
    if crop is None and settings.size is not None:
        crop = Crop(settings.size, settings.size)
    items = _usable_items(settings, lambda item: item.read(), *source_items(settings))
    return LazyImages(items, crop=crop)


def stream_images(settings: DataSettings) -> StreamedImages:
    """The images of `load_images`, in the same order, read on demand.

    With data.skip_unreadable all images are read once at the start, since their numbers must not
    change later.
    """
    items = _usable_items(
        settings,
        lambda item: _fitted(item.read(), item.name, settings),
        *_training_items(settings),
    )
    return StreamedImages(items, settings)


def _photographs(settings: DataSettings) -> ImageSet:
    return ImageSet(*photograph_crops(settings.size, settings.scale, settings.max_images))


def _read_all(items: Iterator[Item], source: str, settings: DataSettings) -> ImageSet:
    """Read up to max_images, fit them to one size, and report all failures at once."""
    images, frames, read_items, failures, enlarged = [], [], [], [], 0
    for item in items:
        try:
            image = item.read()
            fitted, frame = _fitted(image, item.name, settings)
        except ValueError as error:
            failures.append(str(error))
        else:
            read_items.append(item)
            images.append(fitted)
            frames.append(frame)
            enlarged += is_enlarged(image, settings.size, settings.fit)
        done = len(images) if settings.skip_unreadable else len(images) + len(failures)
        if done == settings.max_images:
            break
    _report(failures, source, settings.skip_unreadable, none_left=not images)
    if enlarged:
        logger.warning(
            "%s: %d of %d images are smaller than data.size=%d and were enlarged",
            *(source, enlarged, len(images), settings.size),
        )
    names = tuple(item.name for item in read_items)
    check_equal_sizes(images, names)
    return ImageSet(
        torch.stack(images),
        names,
        _frames_tensor(frames, images),
        tuple(read_items),
        _fitting(settings),
    )


def _training_items(settings: DataSettings) -> tuple[Iterator[Item], str]:
    """`source_items`, with NaN at the pixels that data.mask hides."""
    items, source = source_items(settings)
    return (items if settings.mask is None else with_holes(items, settings.mask)), source


def _usable_items(
    settings: DataSettings, check: Callable[[Item], object], items: Iterator[Item], source: str
) -> list[Item]:
    """Up to max_images of the items; with skip_unreadable only those that pass the check."""
    usable, failures = [], []
    for item in items:
        if len(usable) == settings.max_images:
            break
        if settings.skip_unreadable:
            try:
                check(item)
            except ValueError as error:
                failures.append(str(error))
                continue
        usable.append(item)
    _report(failures, source, settings.skip_unreadable, none_left=not usable)
    return usable


def _report(failures: list[str], source: str, skip: bool, *, none_left: bool) -> None:
    """Raise or warn about images that cannot be used."""
    if not failures:
        return
    listed = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
    if not skip:
        raise ValueError(
            f"{source}: {len(failures)} of the images cannot be used: {listed} "
            "(data.skip_unreadable=true skips them)"
        )
    if none_left:
        raise ValueError(f"{source}: none of the {len(failures)} images can be used: {listed}")
    count = f"{len(failures)} unreadable image{'s' if len(failures) > 1 else ''}"
    logger.warning("%s: skipped %s: %s", source, count, listed)


def _fitted(image: Tensor, name: str, settings: DataSettings) -> tuple[Tensor, Frame]:
    return fit_image(image, name, settings.size, settings.fit)


def _fitting(settings: DataSettings) -> Fitting:
    """The `Fitting` of `fit_image` with these settings."""
    if settings.size is None:
        return None
    if settings.fit == "pad":
        return ("pad", settings.size)
    return astuple(Crop(settings.size, settings.size))


def _frames_tensor(frames: Sequence[Frame], images: Sequence[Tensor]) -> Tensor | None:
    """(N, 4), or None if all pictures fill their images."""
    filled = all(frame[2:] == image.shape[1:] for frame, image in zip(frames, images, strict=True))
    return None if filled else torch.tensor(frames)


def _item_digests(items: Sequence[Item]) -> tuple[str, ...]:
    """The digests of all items; threads compute those of bytes, which mostly wait for the disk."""
    digests = []
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        for start in range(0, len(items), DIGEST_BATCH):
            batch = items[start : start + DIGEST_BATCH]
            pending = [pool.submit(item.digest) if item.has_bytes else None for item in batch]
            # Data sets in memory or with their own readers need not be thread-safe.
            digests += [
                item.digest() if future is None else future.result()
                for item, future in zip(batch, pending, strict=True)
            ]
    return tuple(digests)


def _digest_at(images: ImageSet, index: int) -> str:
    return images.digests[index]


def _fingerprint(digests: tuple[str, ...], fitting: Fitting) -> str:
    return hashlib.sha256(json.dumps([fitting, digests]).encode()).hexdigest()
