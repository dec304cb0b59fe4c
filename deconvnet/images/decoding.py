"""What the bytes of a file become in pixels.

    H, W pixels     images (3, H, W) float32 in [0, 1], RGB

Files and members of shards are read in the same way (`Content`): Pillow is given a stream and never
a path, because its faster ways of reading a path do not always give the same pixels. Only the
formats of SUFFIXES are tried, whatever a file is called: Pillow knows others that start programs.
Where Pillow leaves a meaning of the numbers to its callers, this module decides:

- grey is repeated to three planes; what is transparent shows white; of several frames it takes the
  first; the orientation that the camera noted is applied;
- integers of n bits are divided by 2^n - 1, signed ones by 2^(n-1) - 1 and must not be negative;
  those of 32 bits with a sign by 65535, since Pillow writes them for 16 bits (its mode I);
  floats must lie in [0, 1]; 0 is white where a TIFF says so, at every depth;
- of 16-bit colour Pillow keeps the upper eight bits.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import threading
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import EpsImagePlugin, Image, ImageOps
from torch import Tensor

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm"),
)
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# The environment variable for images larger than Pillow's limit against decompression bombs.
LIMIT = "DECONVNET_MAX_PIXELS"

DIGESTED = 1 << 20  # bytes that are read at a time for a digest
BUFFERED = 1 << 16  # and for an image, whose decoder wants a few at a time

# Tags of TIFF, and those of their values that are named below.
COMPRESSION, PHOTOMETRIC, PLANES, SAMPLES = 259, 262, 284, 339
STRIP_BYTES, TILE_BYTES, BITS = 279, 325, 258
WHITE_IS_ZERO, YCBCR, SEPARATE, UNSIGNED, SIGNED = 0, 6, 2, 1, 2

# How many threads are within `without_ghostscript`, and the setting of Pillow before the first.
_guard, _guards, _ghostscript = threading.Lock(), 0, None

# Categories of characters that are escaped in names: control, surrogate, line breaks.
HIDDEN = ("Cc", "Cs", "Zl", "Zp")


def read_image(path: str | Path) -> Tensor:
    """The image of a file as RGB (3, H, W), float32 in [0, 1]; of several frames the first.

    Grey is repeated to three planes, alpha composed over white, the EXIF orientation applied.
    16-bit grey is divided by 65535; float images must be in [0, 1]. Any failure is a ValueError of
    one line, "cannot read <path>: <reason>". An image of more than PIL.Image.MAX_IMAGE_PIXELS, 89
    million, is refused; the environment variable DECONVNET_MAX_PIXELS sets another limit.
    """
    return Content(user_path(path), str(path)).image()


def digest_file(path: str | Path) -> str:
    """SHA-256 of the bytes of a file, 64 hexadecimal digits, as of every image of a folder.

    ValueError in one line where it cannot be read.
    """
    return Content(user_path(path), str(path)).digest()


def user_path(path: str | Path) -> Path:
    """A path as it was typed, with ~ for the home of a user where there is one of that name."""
    return Path(os.path.expanduser(path))


@dataclass(frozen=True)
class Content:
    """The bytes of an image: those of a file, or some parts of it, as in a shard.

    parts: (place in the image, place in the file, length), ascending; between them are zeros.
    """

    path: Path
    name: str  # for messages
    parts: tuple[tuple[int, int, int], ...] | None = None  # None: the whole file
    size: int = 0  # bytes, with parts

    def image(self) -> Tensor:
        """`read_image` of these bytes."""
        # Decoders fail with every kind of exception on damaged files: all mean the same here.
        try:
            with self.open() as file:
                return decode(file)
        except Exception as error:
            raise ValueError(f"cannot read {shown_name(self.name)}: {reason(error)}") from error

    def digest(self) -> str:
        """SHA-256 of these bytes, 64 hexadecimal digits; ValueError in one line, as of `image`."""
        found = hashlib.sha256()
        try:
            with self.open() as file:
                while part := file.read(DIGESTED):
                    found.update(part)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {shown_name(self.name)}: {reason(error)}") from error
        return found.hexdigest()

    def open(self) -> BinaryIO:
        """A stream of these bytes; OSError or ValueError."""
        size = check_file(self.path)
        whole = self.parts is None
        parts = ((0, 0, size),) if whole else self.parts
        stream = _Parts(self.path, parts, size if whole else self.size)
        return io.BufferedReader(stream, BUFFERED)


class _Parts(io.RawIOBase):
    """A stream of some parts of a file, with zeros between them.

    It has no number of an open file, by which libtiff would read past Pillow.
    """

    def __init__(self, path: Path, parts: tuple[tuple[int, int, int], ...], size: int):
        super().__init__()
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        self.parts, self.size, self.place = parts, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"no place {start + offset} in a file")
        self.place = start + offset
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        wanted = max(0, min(len(buffer), self.size - self.place))
        view = memoryview(buffer)[:wanted]
        begin, end = self.place, self.place + wanted
        done = begin
        for place, source, length in self.parts:
            first, last = max(done, place), min(end, place + length)
            if first >= last:
                continue
            view[done - begin : first - begin] = bytes(first - done)
            self.file.seek(source + first - place)
            count = self.file.readinto(view[first - begin : last - begin])
            done = first + (count or 0)
            if done < last:
                if done == begin:
                    raise ValueError(f"the file ends {last - done} bytes too early")
                break
        else:
            view[done - begin :] = bytes(end - done)
            done = end
        self.place = done
        return done - begin

    def close(self) -> None:
        self.file.close()
        super().close()


def check_file(path: str | Path) -> int:
    """The bytes of a file, which must be one: to read a pipe or a device might never end."""
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        raise ValueError("a folder, not a file")
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("not a regular file")
    return info.st_size


def decode(file: BinaryIO) -> Tensor:
    """The image (3, H, W) of an open stream; any exception where it is damaged."""
    _apply_limit(os.environ.get(LIMIT))
    if not file.read(1):
        raise ValueError("the file is empty")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            # Pillow only warns of images that take hundreds of megabytes from a small file. What is
            # to become of warnings all threads share, so that it is no way to an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=FORMATS)
        with picture:
            width, height = picture.size
            if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(_too_many(f"{width}x{height}", width * height))
            return _pixels(picture)
    except Image.DecompressionBombError as error:
        count = int(re.search(r"\d+", str(error))[0])
        raise ValueError(_too_many(str(count), count)) from error


def to_tensor(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """RGB (3, H, W) float32 in [0, 1] of a picture, a (3 or 1, H, W) tensor, an (H, W, 3) array."""
    if isinstance(image, Image.Image):
        return _pixels(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(np.atleast_3d(image), order="C")).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(f"{type(image).__name__} is no image")
    if image.dtype == torch.uint8:
        image = image.float() / 255
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
        raise ValueError(f"{image.dtype} of shape {tuple(image.shape)} is no image")
    image = image.float()
    if not image.isfinite().all():
        raise ValueError("it has pixels that are NaN or infinite")
    low, high = image.aminmax()
    if low < 0 or high > 1:
        raise ValueError(f"it has values from {low:.4g} to {high:.4g}, must be in [0, 1]")
    return image.expand(3, -1, -1).contiguous()


@contextmanager
def without_ghostscript() -> Iterator[None]:
    """Keep Pillow from starting Ghostscript while other libraries open pictures."""
    global _guards, _ghostscript
    with _guard:
        if _guards == 0:
            _ghostscript, EpsImagePlugin.gs_binary = EpsImagePlugin.gs_binary, False
        _guards += 1
    try:
        yield
    finally:
        with _guard:
            _guards -= 1
            if _guards == 0:
                EpsImagePlugin.gs_binary = _ghostscript


def shown_name(path: object) -> str:
    """A path or name as text of one line that every encoding of Unicode can write.

    Bytes that are no UTF-8 become \\xe9 and so on, and what breaks a line \\n.
    """
    plain = str(path)
    if plain.isascii() and plain.isprintable():
        return plain
    # Python keeps bytes of names that are no text as lone surrogates.
    text = str(path).encode("utf-8", "surrogateescape" if _escaped(path) else "backslashreplace")
    text = text.decode("utf-8", "backslashreplace")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in HIDDEN else c for c in text)


def reason(error: Exception) -> str:
    """The message of an error in one line, without the path that the caller names."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image that Pillow can read as one of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shown_name(" ".join(str(error).split())) or type(error).__name__


def _escaped(path: object) -> bool:
    """Whether all surrogates stand for bytes, as in names of files."""
    return all("\udc80" <= c <= "\udcff" for c in str(path) if "\ud800" <= c <= "\udfff")


@lru_cache(maxsize=1)
def _apply_limit(text: str | None) -> None:
    """Once for each value, so that a program can still set Pillow's own limit later."""
    if text is None:
        return
    if not re.fullmatch(r"[1-9]\d*", text.strip()):
        raise ValueError(f"the environment has {LIMIT}={text!r}: must be a whole number of pixels")
    Image.MAX_IMAGE_PIXELS = int(text)


def _too_many(said: str, count: int) -> str:
    return (
        f"{said} pixels are more than {Image.MAX_IMAGE_PIXELS}, which may be a decompression bomb; "
        f"if the image is your own, set the environment variable {LIMIT}={count} (in Python, "
        "PIL.Image.MAX_IMAGE_PIXELS)"
    )


def _pixels(picture: Image.Image) -> Tensor:
    """The image (3, H, W) of a picture that is open and perhaps not yet loaded."""
    # Before it is loaded, after which Pillow forgets how the numbers stood in the file.
    samples = _Samples.of(picture)
    return to_tensor(samples.array(ImageOps.exif_transpose(picture)))


@dataclass(frozen=True)
class _Samples:
    """How the numbers of a picture stand in its file, as far as its mode does not say it."""

    bits: int | None = None  # of a grey value; None: as its mode says
    signed: bool = False
    inverted: bool = False  # Pillow gives the negative
    swapped: bool = False  # Pillow gives the bytes of a number in the wrong order
    # a grey value or colour that is transparent, in the numbers that Pillow gives
    hole: int | tuple[int, ...] | None = None

    @classmethod
    def of(cls, picture: Image.Image) -> _Samples:
        if picture.format == "TIFF":
            return cls._of_tiff(picture)
        hole = picture.info.get("transparency")
        if picture.mode == "P" or not isinstance(hole, int | tuple):
            return cls()
        raw = _raw_mode(picture)
        if raw in ("L;2", "L;4"):
            # Pillow stretches the grey values to 0..255 and leaves the one that is transparent.
            hole *= 255 // (2 ** int(raw[-1]) - 1)
        if picture.mode == "1":
            hole = 255 * bool(hole)
        if isinstance(hole, tuple) and ";16" in raw:
            hole = tuple(value >> 8 for value in hole)
        return cls(hole=hole)

    @classmethod
    def _of_tiff(cls, picture: Image.Image) -> _Samples:
        tags, raw = picture.tag_v2, _raw_mode(picture)
        bits, kind = (tags.get(tag, (1,)) for tag in (BITS, SAMPLES))
        bits, kind = (value[0] if isinstance(value, tuple) else value for value in (bits, kind))
        packed = bool(picture.tile) and picture.tile[0][0] == "libtiff"
        photometric = tags.get(PHOTOMETRIC, WHITE_IS_ZERO)
        if not packed and bits > 8 and tags.get(PLANES) == SEPARATE and len(picture.getbands()) > 1:
            # Pillow takes every half of such a number for a pixel.
            raise ValueError(
                f"a TIFF of {bits}-bit colour in separate planes without compression; save it "
                "with interleaved planes, or compressed"
            )
        if tags.get(PLANES) == SEPARATE and picture.mode in ("LA", "La", "PA"):
            # Pillow reads the plane of the pixels only, so that all of them would be transparent.
            raise ValueError("a grey TIFF with alpha in a separate plane; save it interleaved")
        if not packed and photometric == YCBCR and len(picture.getbands()) == 3:
            stored = tags.get(STRIP_BYTES) or tags.get(TILE_BYTES) or ()
            if sum(stored) < 3 * math.prod(picture.size):
                raise ValueError("a TIFF of subsampled YCbCr without compression; save it as RGB")
        return cls(
            bits=bits if picture.mode[0] == "I" or kind == SIGNED else None,
            signed=kind == SIGNED,
            # Pillow inverts few bits itself; if it comes to do so with more, its name of the order
            # of the bits will have an I after the semicolon, as for few.
            inverted=photometric == WHITE_IS_ZERO
            and picture.mode[0] in "IF"
            and "I" not in raw.partition(";")[2],
            # libtiff hands over numbers as this machine has them, Pillow reads those of the file.
            swapped=packed and raw in ("I;16BS", "I;32BS", "F;32BF") and _little_endian(),
        )

    def array(self, picture: Image.Image) -> np.ndarray:
        """Floats (H, W) or (H, W, 3), 1 for white, the range not yet checked."""
        if picture.mode[0] in "IF" or self.signed:
            found = self._grey(picture)
        elif self.hole is None and picture.has_transparency_data:
            return _over_white(picture)
        else:
            found = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
        found = 1 - found if self.inverted else found
        return found if self.hole is None else self._with_hole(found, picture)

    def _grey(self, picture: Image.Image) -> np.ndarray:
        values = np.asarray(picture)
        if picture.mode == "F":
            return values.byteswap() if self.swapped else values
        if self.bits is None:
            # 16-bit grey: "I;16" from PNG, "I" from PGM.
            return values.astype(np.float32) / 65535
        kind = f"{'i' if self.signed else 'u'}{2 if self.bits == 12 else self.bits // 8}"
        # What was widened to 32 bits goes back; of numbers without a sign Pillow has the bits.
        values = values.astype(kind, casting="unsafe")
        values = values.byteswap() if self.swapped else values
        if self.bits == 32:
            return values / (65535 if self.signed else 2**32 - 1)
        return values.astype(np.float32) / (2 ** (self.bits - self.signed) - 1)

    def _with_hole(self, found: np.ndarray, picture: Image.Image) -> np.ndarray:
        values = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
        clear = values == np.array(self.hole, dtype=np.int64)
        clear = clear.all(-1) if clear.ndim == 3 else clear
        found = found.copy()
        found[clear] = 1
        return found


def _over_white(picture: Image.Image) -> np.ndarray:
    """Floats (H, W, 3) of a picture with transparency."""
    if picture.mode == "La":
        picture = picture.convert("LA")
    pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    color, alpha = pixels[..., :3], pixels[..., 3:]
    return color * alpha + (1 - alpha)


def _raw_mode(picture: Image.Image) -> str:
    """Pillow's name of how the numbers stand in the file; "" of what is in memory."""
    tiles = getattr(picture, "tile", None)
    args = tiles[0][3] if tiles else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _little_endian() -> bool:
    return np.dtype("<i4").isnative
