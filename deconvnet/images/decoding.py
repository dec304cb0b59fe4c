"""Decoding of image files: from bytes to pixels.

    H, W pixels     images (3, H, W) float32 in [0, 1], RGB

Files and members of shards are read in the same way (`Content`): Pillow gets a stream and never a
path, because its faster code for paths does not always give the same pixels. Only FORMATS are
tried, whatever the name of the file, since Pillow supports other formats that start programs. If
Pillow leaves the interpretation of the numbers to its callers, the following rules apply:

- grey is repeated to three planes; transparent pixels become white; of several frames the first is
  used; the EXIF orientation is applied;
- integers of n bits are divided by 2^n - 1, signed ones by 2^(n-1) - 1 and must not be negative;
  signed ones of 32 bits are divided by 65535, since Pillow writes them for 16 bits (its mode I);
  floats must lie in [0, 1]; 0 is white if a TIFF says so, at every depth;
- Pillow reduces 16-bit colour to its upper eight bits.
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
from collections.abc import Callable, Iterator
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

# The environment variable that raises Pillow's limit against decompression bombs.
LIMIT = "DECONVNET_MAX_PIXELS"

DIGEST_CHUNK = 1 << 20  # bytes read at a time for a digest
DECODER_BUFFER = 1 << 16  # bytes read at a time for a decoder, which asks for a few

# TIFF tags, and those of their values that are used below.
COMPRESSION, PHOTOMETRIC, PLANES, SAMPLES = 259, 262, 284, 339
STRIP_BYTES, TILE_BYTES, BITS = 279, 325, 258
WHITE_IS_ZERO, YCBCR, SEPARATE, UNSIGNED, SIGNED = 0, 6, 2, 1, 2

# How many threads are inside `without_ghostscript`, and Pillow's setting before the first entered.
_guard, _guards, _ghostscript = threading.Lock(), 0, None

# Unicode categories that are escaped in names: control characters, surrogates, line breaks.
HIDDEN = ("Cc", "Cs", "Zl", "Zp")


def read_image(path: str | Path) -> Tensor:
    """The image in a file as RGB (3, H, W), float32 in [0, 1]; the first frame if it has several.

    Grey is repeated to three planes, alpha composed over white, and the EXIF orientation applied.
    16-bit grey is divided by 65535; float images must be in [0, 1]. Any failure raises a ValueError
    with one line, "cannot read <path>: <reason>". Images of more than PIL.Image.MAX_IMAGE_PIXELS,
    89 million, are rejected; the environment variable DECONVNET_MAX_PIXELS sets another limit.
    """
    return Content(user_path(path), str(path)).image()


def digest_file(path: str | Path) -> str:
    """SHA-256 of the bytes of a file, 64 hexadecimal digits; ValueError if it cannot be read."""
    return Content(user_path(path), str(path)).digest()


def user_path(path: str | Path) -> Path:
    """A path as the user typed it, with ~ expanded to a home folder if there is one."""
    return Path(os.path.expanduser(path))


@dataclass(frozen=True)
class Content:
    """The bytes of an image: a whole file, or parts of one, as in a shard.

    parts: (offset in the image, offset in the file, length), ascending, with zeros between them.
    """

    path: Path
    name: str  # for messages
    parts: tuple[tuple[int, int, int], ...] | None = None  # None: the whole file
    size: int = 0  # bytes, with parts

    def image(self) -> Tensor:
        """`read_image` of these bytes."""
        # Damaged files make decoders raise any kind of exception; all mean the same here.
        try:
            with self.open() as file:
                return decode(file)
        except Exception as error:
            raise ValueError(f"cannot read {shown_name(self.name)}: {reason(error)}") from error

    def alpha(self) -> Tensor:
        """The opacity (1, H, W) of the pixels in [0, 1], 1 everywhere without transparency.

        ValueError as for `image`.
        """
        try:
            with self.open() as file:
                return _decoded(file, _opacity)
        except Exception as error:
            raise ValueError(f"cannot read {shown_name(self.name)}: {reason(error)}") from error

    def digest(self) -> str:
        """SHA-256 of these bytes, 64 hexadecimal digits; ValueError as for `image`."""
        digest = hashlib.sha256()
        try:
            with self.open() as file:
                while part := file.read(DIGEST_CHUNK):
                    digest.update(part)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {shown_name(self.name)}: {reason(error)}") from error
        return digest.hexdigest()

    def open(self) -> BinaryIO:
        """A stream of these bytes; OSError or ValueError."""
        size = check_file(self.path)
        is_file = self.parts is None
        parts = ((0, 0, size),) if is_file else self.parts
        stream = _Parts(self.path, parts, size if is_file else self.size)
        return io.BufferedReader(stream, DECODER_BUFFER)


class _Parts(io.RawIOBase):
    """A stream of parts of a file, with zeros between them.

    It has no file descriptor, with which libtiff would bypass Pillow.
    """

    def __init__(self, path: Path, parts: tuple[tuple[int, int, int], ...], size: int):
        super().__init__()
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        self.parts, self.size, self.position = parts, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"no offset {start + offset} in a file")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self.size - self.position))
        view = memoryview(buffer)[:count]
        begin, end = self.position, self.position + count
        done = begin
        for offset, source, length in self.parts:
            first, last = max(done, offset), min(end, offset + length)
            if first >= last:
                continue
            view[done - begin : first - begin] = bytes(first - done)
            self.file.seek(source + first - offset)
            bytes_read = self.file.readinto(view[first - begin : last - begin])
            done = first + (bytes_read or 0)
            if done < last:
                if done == begin:
                    raise ValueError(f"the file ends {last - done} bytes too early")
                break
        else:
            view[done - begin :] = bytes(end - done)
            done = end
        self.position = done
        return done - begin

    def close(self) -> None:
        self.file.close()
        super().close()


def check_file(path: str | Path) -> int:
    """The size of a regular file in bytes; ValueError for others, since a pipe may never end."""
    info = os.stat(path)
    if stat.S_ISDIR(info.st_mode):
        raise ValueError("a folder, not a file")
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("not a regular file")
    return info.st_size


def decode(file: BinaryIO) -> Tensor:
    """The image (3, H, W) in an open stream; any exception if it is damaged."""
    return _decoded(file, _pixels)


def _decoded(file: BinaryIO, pixels: Callable[[Image.Image], Tensor]) -> Tensor:
    _apply_limit(os.environ.get(LIMIT))
    if not file.read(1):
        raise ValueError("the file is empty")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            # Pillow only warns of images that take hundreds of megabytes from a small file. Threads
            # share the filters of warnings, so they cannot turn this one into an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=FORMATS)
        with picture:
            width, height = picture.size
            if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(_too_many(f"{width}x{height}", width * height))
            return pixels(picture)
    except Image.DecompressionBombError as error:
        count = int(re.search(r"\d+", str(error))[0])
        raise ValueError(_too_many(str(count), count)) from error


def to_tensor(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """RGB (3, H, W) float32 in [0, 1] of a picture, tensor (1 or 3, H, W) or array (H, W, 3)."""
    if isinstance(image, Image.Image):
        return _pixels(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(np.atleast_3d(image), order="C")).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(f"{type(image).__name__} is not an image")
    if image.dtype == torch.uint8:
        image = image.float() / 255
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
        raise ValueError(f"{image.dtype} of shape {tuple(image.shape)} is not an image")
    image = image.float()
    if not image.isfinite().all():
        raise ValueError("it has pixels that are NaN or infinite")
    low, high = image.aminmax()
    if low < 0 or high > 1:
        raise ValueError(f"it has values from {low:.4g} to {high:.4g}, must be in [0, 1]")
    return image.expand(3, -1, -1).contiguous()


@contextmanager
def without_ghostscript() -> Iterator[None]:
    """Prevent Pillow from starting Ghostscript while other libraries open pictures."""
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
    """A path or name as one line of text that every encoding of Unicode can write.

    Bytes that are not UTF-8 become \\xe9 and so on, and line breaks \\n.
    """
    plain = str(path)
    if plain.isascii() and plain.isprintable():
        return plain
    # Python represents bytes of names that are not text as lone surrogates.
    text = str(path).encode("utf-8", "surrogateescape" if _escaped(path) else "backslashreplace")
    text = text.decode("utf-8", "backslashreplace")
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in HIDDEN else c for c in text)


def reason(error: Exception) -> str:
    """The message of an error in one line, without the path, which the caller adds."""
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
    """Apply the limit once per value, so that programs can still change Pillow's limit later."""
    if text is None:
        return
    if not re.fullmatch(r"[1-9]\d*", text.strip()):
        raise ValueError(f"the environment has {LIMIT}={text!r}: must be a whole number of pixels")
    Image.MAX_IMAGE_PIXELS = int(text)


def _too_many(size: str, count: int) -> str:
    return (
        f"{size} pixels are more than {Image.MAX_IMAGE_PIXELS}, which may be a decompression bomb; "
        f"if the image is your own, set the environment variable {LIMIT}={count} (in Python, "
        "PIL.Image.MAX_IMAGE_PIXELS)"
    )


def _pixels(picture: Image.Image) -> Tensor:
    """The image (3, H, W) of a picture that is open and perhaps not yet loaded."""
    # Before loading, after which Pillow no longer knows how the file stored its numbers.
    samples = _Samples.of(picture)
    return to_tensor(samples.array(ImageOps.exif_transpose(picture)))


def _opacity(picture: Image.Image) -> Tensor:
    """(1, H, W): the opacity of the pixels of a picture."""
    if not picture.has_transparency_data:
        return torch.ones(1, picture.height, picture.width)
    picture = ImageOps.exif_transpose(picture)
    picture = picture.convert("LA") if picture.mode == "La" else picture
    alpha = np.array(picture.convert("RGBA").getchannel("A"), dtype=np.float32)
    return torch.from_numpy(alpha)[None] / 255


@dataclass(frozen=True)
class _Samples:
    """How a file stores the numbers of a picture, beyond what Pillow's mode describes."""

    bits: int | None = None  # of a grey value; None: defined by the mode
    signed: bool = False
    inverted: bool = False  # Pillow returns the negative
    swapped: bool = False  # Pillow returns the bytes of a number in the wrong order
    # a grey value or colour that is transparent, in the numbers that Pillow returns
    transparent: int | tuple[int, ...] | None = None

    @classmethod
    def of(cls, picture: Image.Image) -> _Samples:
        if picture.format == "TIFF":
            return cls._of_tiff(picture)
        transparent = picture.info.get("transparency")
        if picture.mode == "P" or not isinstance(transparent, int | tuple):
            return cls()
        raw = _raw_mode(picture)
        if raw in ("L;2", "L;4"):
            # Pillow stretches grey values to 0..255 but not the transparent one.
            transparent *= 255 // (2 ** int(raw[-1]) - 1)
        if picture.mode == "1":
            transparent = 255 * bool(transparent)
        if isinstance(transparent, tuple) and ";16" in raw:
            transparent = tuple(value >> 8 for value in transparent)
        return cls(transparent=transparent)

    @classmethod
    def _of_tiff(cls, picture: Image.Image) -> _Samples:
        tags, raw = picture.tag_v2, _raw_mode(picture)
        bits, kind = (tags.get(tag, (1,)) for tag in (BITS, SAMPLES))
        bits, kind = (value[0] if isinstance(value, tuple) else value for value in (bits, kind))
        packed = bool(picture.tile) and picture.tile[0][0] == "libtiff"
        photometric = tags.get(PHOTOMETRIC, WHITE_IS_ZERO)
        if not packed and bits > 8 and tags.get(PLANES) == SEPARATE and len(picture.getbands()) > 1:
            # Pillow would read each half of such a number as a pixel.
            raise ValueError(
                f"a TIFF of {bits}-bit colour in separate planes without compression; save it "
                "with interleaved planes, or compressed"
            )
        if tags.get(PLANES) == SEPARATE and picture.mode in ("LA", "La", "PA"):
            # Pillow reads only the plane of the pixels, so all would be transparent.
            raise ValueError("a grey TIFF with alpha in a separate plane; save it interleaved")
        if not packed and photometric == YCBCR and len(picture.getbands()) == 3:
            stored = tags.get(STRIP_BYTES) or tags.get(TILE_BYTES) or ()
            if sum(stored) < 3 * math.prod(picture.size):
                raise ValueError("a TIFF of subsampled YCbCr without compression; save it as RGB")
        return cls(
            bits=bits if picture.mode[0] == "I" or kind == SIGNED else None,
            signed=kind == SIGNED,
            # Pillow inverts images of few bits itself; if it ever does so for more, its raw mode
            # will have an I after the semicolon, as for few bits.
            inverted=photometric == WHITE_IS_ZERO
            and picture.mode[0] in "IF"
            and "I" not in raw.partition(";")[2],
            # libtiff returns numbers in the byte order of this machine; Pillow expects the file's.
            swapped=packed and raw in ("I;16BS", "I;32BS", "F;32BF") and _little_endian(),
        )

    def array(self, picture: Image.Image) -> np.ndarray:
        """Floats (H, W) or (H, W, 3), 1 for white, range not yet checked."""
        if picture.mode[0] in "IF" or self.signed:
            values = self._grey(picture)
        elif self.transparent is None and picture.has_transparency_data:
            return _over_white(picture)
        else:
            values = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
        values = 1 - values if self.inverted else values
        return values if self.transparent is None else self._with_white(values, picture)

    def _grey(self, picture: Image.Image) -> np.ndarray:
        values = np.asarray(picture)
        if picture.mode == "F":
            return values.byteswap() if self.swapped else values
        if self.bits is None:
            # 16-bit grey: "I;16" from PNG, "I" from PGM.
            return values.astype(np.float32) / 65535
        kind = f"{'i' if self.signed else 'u'}{2 if self.bits == 12 else self.bits // 8}"
        # Back from 32 bits to the bits of the file; Pillow keeps the bits of unsigned numbers.
        values = values.astype(kind, casting="unsafe")
        values = values.byteswap() if self.swapped else values
        if self.bits == 32:
            return values / (65535 if self.signed else 2**32 - 1)
        return values.astype(np.float32) / (2 ** (self.bits - self.signed) - 1)

    def _with_white(self, values: np.ndarray, picture: Image.Image) -> np.ndarray:
        """The values with transparent pixels set to white."""
        stored = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
        clear = stored == np.array(self.transparent, dtype=np.int64)
        clear = clear.all(-1) if clear.ndim == 3 else clear
        values = values.copy()
        values[clear] = 1
        return values


def _over_white(picture: Image.Image) -> np.ndarray:
    """Floats (H, W, 3) of a picture with transparency."""
    if picture.mode == "La":
        picture = picture.convert("LA")
    pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    color, alpha = pixels[..., :3], pixels[..., 3:]
    return color * alpha + (1 - alpha)


def _raw_mode(picture: Image.Image) -> str:
    """Pillow's raw mode: how the file stores the numbers; "" for pictures in memory."""
    tiles = getattr(picture, "tile", None)
    args = tiles[0][3] if tiles else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _little_endian() -> bool:
    return np.dtype("<i4").isnative
