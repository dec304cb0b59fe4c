"""Warm starts: the state of inference of each image, from which its next visit starts.

The states are stored in memory or in files of the run folder.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.network.layer import Layer, LayerSettings
from deconvnet.operators.convolution import map_size
from deconvnet.operators.pooling import Window, max_pool, pooled_shape, unpool
from deconvnet.storage.ownership import ForeignFileError, is_regular
from deconvnet.training import sparse_states
from deconvnet.training.layer_data import LayerData

log = logging.getLogger(__name__)

# The first bytes of a warm start file, which identify it as ours.
MAGIC = b"deconvnet states of inference\n".ljust(64, b"\0")
# Bytes of the header of a record: the number of its pass and a checksum, int64 each.
HEADER = 16
# Images whose states are whole at a time when they are saved or loaded.
CHUNK = 8


@dataclass(frozen=True)
class Placement:
    """Whether warm starts are kept, and where: in files of `folder`, or in memory if it is None.

    token: identifies the run, so that files of another run are not read.
    """

    keep: bool = True
    folder: Path | None = None
    token: str = ""


IN_MEMORY = Placement()


def open_warm_starts(images: Tensor, window: Window | None, placement: Placement) -> WarmStarts:
    """Warm starts of these images (N,), empty until they are assigned or loaded."""
    if placement.folder:
        return DiskWarmStarts(images, window, placement.folder, placement.token)
    return WarmStarts(images, window)


def pooling_window(settings: LayerSettings) -> Window | None:
    """The window in which the states of a layer are kept pooled; None if they are kept as maps."""
    return settings.window if settings.solver.method in ("fista", "ista") else None


def warm_starts_size(layer: Layer, data: LayerData) -> int:
    """Bytes of the warm starts of all images of a layer."""
    settings = layer.settings
    size = map_size(data.shape[1:], settings.filter_shape, settings.boundary)
    maps = (settings.num_maps, *size)
    window = pooling_window(settings)
    # A float32 per position, or a float32 and an int64 switch per window.
    per_image = (
        4 * math.prod(maps) if window is None else 12 * math.prod(pooled_shape(maps, window))
    )
    return data.num_images * per_image


class WarmStarts:
    """The states of inference of some images, and scalars that belong to them, in memory.

    images: (N,) their indices, ascending; states are read and assigned by index. window: if given,
    a state is stored as pooled values and switches. This is lossless, as such a state has one
    non-zero value per window, and takes as little as a ninth of the memory.
    """

    def __init__(self, images: Tensor, window: Window | None = None):
        self.images, self.window = images, window
        # (K, H, W) of a state; None until the first is assigned.
        self.shape: tuple[int, ...] | None = None
        # The states (N, K, H, W), or pooled values and switches.
        self.tensors: list[Tensor] = []
        # For each image the last gradient step and ||T||^2, (N, 1, 1, 1); NaN if unknown.
        self.scalars: dict[str, Tensor] = {}

    def __getitem__(self, images: Tensor) -> Tensor | None:
        """The states (n, K, H, W) of these images; None if no state has been assigned yet."""
        if self.shape is None:
            return None
        tensors = [tensor[self._rows(images)] for tensor in self.tensors]
        return tensors[0] if self.window is None else unpool(*tensors, (len(images), *self.shape))

    def __setitem__(self, images: Tensor, state: Tensor) -> None:
        new = (state,) if self.window is None else max_pool(state, self.window)
        if self.shape is None:
            self.shape = tuple(state.shape[1:])
            self.tensors = [tensor.new_zeros(len(self.images), *tensor.shape[1:]) for tensor in new]
            if self.window is not None:
                # The switches of an image must all differ, even before they are assigned.
                self.tensors[1][:] = new[1][:1]
        for tensor, values in zip(self.tensors, new, strict=True):
            tensor[self._rows(images)] = values

    def scalar(self, name: str, images: Tensor) -> Tensor | None:
        """A scalar of these images (n, 1, 1, 1); None unless all of them have one."""
        values = self.scalars.get(name)
        values = None if values is None else values[self._rows(images)]
        return None if values is None or values.isnan().any() else values

    def set_scalar(self, name: str, images: Tensor, values: Tensor) -> None:
        if name not in self.scalars:
            self.scalars[name] = values.new_full((len(self.images), 1, 1, 1), math.nan)
        self.scalars[name][self._rows(images)] = values

    def next_pass(self) -> None:
        """End one pass over the images and begin another."""

    def close(self) -> None:
        """Release files; nothing can be read or assigned afterwards."""

    def state_dict(self) -> dict:
        """The states of all images, without their zeros if that is smaller."""
        sparse = None
        if self.shape is not None and self.tensors and len(self.images):
            sparse = sparse_states.packed(self[images] for images in self.images.split(CHUNK))
        return {
            "images": self.images.cpu(),
            "shape": self.shape,
            "kept": sparse or [tensor.cpu() for tensor in self.tensors],
            "numbers": {name: values.cpu() for name, values in self.scalars.items()},
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Load the states of these images, which may be a subset of those in `state`."""
        rows = torch.searchsorted(state["images"], self.images.cpu())
        self.scalars = {name: values[rows].to(device) for name, values in state["numbers"].items()}
        self._load_states(state, rows, device)

    def _load_states(self, state: dict, rows: Tensor, device: torch.device) -> None:
        kept = state["kept"]
        if isinstance(kept, list):
            self.shape, self.tensors = state["shape"], [part[rows].to(device) for part in kept]
            return
        self.shape, self.tensors = None, []
        for images, part in zip(self.images.split(CHUNK), rows.split(CHUNK), strict=True):
            self[images] = sparse_states.unpacked(kept, part, state["shape"]).to(device)

    def _rows(self, images: Tensor) -> Tensor:
        return torch.searchsorted(self.images, images)


class DiskWarmStarts(WarmStarts):
    """Warm starts in files of a folder, for more images than memory holds.

    A checkpoint stores for each image the pass in which its state was written. Later passes must
    not overwrite that state, so passes rotate over three files: at any moment up to two of them
    hold states that the last checkpoint refers to. All ranks share the files. The record of each
    image has a fixed position in them: the number of the pass, a checksum, and the state. If a
    record that the checkpoint refers to is missing or damaged, the inference of that image starts
    from zero maps.

    token: identifies the records of this run. Raises ForeignFileError if a file that is not ours is
    in the way.
    """

    NUM_FILES = 3

    def __init__(self, images: Tensor, window: Window | None, folder: Path, token: str = ""):
        super().__init__(images, window)
        self.folder, self.mark = folder, zlib.crc32(token.encode())
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [_open_file(folder / f"{number}.states") for number in range(self.NUM_FILES)]
        self.warned = False
        # Passes count from 1, because holes in a file read as 0.
        self.current_pass = 1
        # (N,) the pass in which the state of each image was written; -1 for none.
        self.passes = torch.full((len(images),), -1)

    def __getitem__(self, images: Tensor) -> Tensor | None:
        if self.shape is None:
            return None
        states = torch.zeros(len(images), *self.shape, dtype=torch.float32)
        passes = self.passes[self._rows(images).cpu()].tolist()
        for n, (image, number) in enumerate(zip(images.tolist(), passes, strict=True)):
            if number >= 0:
                states[n] = self._read(image, number)
        return states.to(images.device)

    def __setitem__(self, images: Tensor, state: Tensor) -> None:
        if state.dtype != torch.float32:
            raise ValueError(f"states are {state.dtype}: in files they must be float32")
        self.shape = tuple(state.shape[1:])
        new = (state,) if self.window is None else max_pool(state, self.window)
        new = [tensor.cpu().numpy() for tensor in new]
        for n, image in enumerate(images.tolist()):
            body = b"".join(tensor[n].tobytes() for tensor in new)
            record = self._header(image, self.current_pass, body) + body
            self._write(record, len(MAGIC) + image * len(record))
        self.passes[self._rows(images).cpu()] = self.current_pass

    def next_pass(self) -> None:
        # Continue a pass that wrote nothing; otherwise three files would not suffice.
        self.current_pass += bool((self.passes == self.current_pass).any())

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []

    def state_dict(self) -> dict:
        for file in self.files:
            os.fsync(file)
        return {**super().state_dict(), "kept": [self.passes.clone()], "now": self.current_pass}

    def _load_states(self, state: dict, rows: Tensor, device: torch.device) -> None:
        if "now" not in state:
            return self._import(state)
        (passes,), self.current_pass = state["kept"], state["now"]
        self.shape, self.passes = state["shape"], passes[rows]
        missing = [n for n, number in enumerate(self.passes.tolist()) if not self._has(n, number)]
        self.passes[missing] = -1
        if missing:
            log.warning(
                "%s does not have the states of %d images that the checkpoint refers to: their "
                "inference starts from the beginning",
                *(self.folder, len(missing)),
            )

    def _import(self, state: dict) -> None:
        """Write the states of a checkpoint that were kept in memory to the files."""
        memory = WarmStarts(self.images.cpu(), self.window)
        memory.load_state_dict(state, torch.device("cpu"))
        self.shape = None
        if memory.shape is not None:
            for images in memory.images.split(CHUNK):
                self[images.to(self.images.device)] = memory[images]

    def _has(self, n: int, number: int) -> bool:
        """Whether the record of pass `number` exists, or none is needed."""
        if number < 0:
            return True
        file, size = self.files[number % self.NUM_FILES], sum(self._sizes)
        offset = len(MAGIC) + int(self.images[n]) * size
        complete = os.fstat(file).st_size >= offset + size
        return complete and os.pread(file, 8, offset) == np.int64(number).tobytes()

    def _header(self, image: int, number: int, body: bytes) -> bytes:
        """The header of a record: its pass, and a checksum of run, image, pass and content."""
        key = np.array([image, number], np.int64).tobytes()
        checksum = zlib.crc32(body, zlib.crc32(key, self.mark))
        return np.array([number, checksum], np.int64).tobytes()

    @property
    def _sizes(self) -> list[int]:
        """Bytes of the parts of a record: its header and the tensors."""
        if self.window is None:
            return [HEADER, 4 * math.prod(self.shape)]
        windows = math.prod(pooled_shape(self.shape, self.window))
        return [HEADER, 4 * windows, 8 * windows]

    def _read(self, image: int, number: int) -> Tensor:
        sizes = self._sizes
        offset = len(MAGIC) + image * sum(sizes)
        record = bytearray(os.pread(self.files[number % self.NUM_FILES], sum(sizes), offset))
        header, body = record[:HEADER], record[HEADER:]
        if len(record) < sum(sizes) or header != self._header(image, number, body):
            self._warn_of_damage()
            return torch.zeros(self.shape)
        if self.window is None:
            return torch.frombuffer(body, dtype=torch.float32).view(self.shape)
        shape = pooled_shape(self.shape, self.window)
        values = torch.frombuffer(body[: sizes[1]], dtype=torch.float32)
        switches = torch.frombuffer(body[sizes[1] :], dtype=torch.int64)
        return unpool(values.view(1, *shape), switches.view(1, *shape), (1, *self.shape))[0]

    def _warn_of_damage(self) -> None:
        if not self.warned:
            log.warning(
                "%s has records that are damaged or of another run: the inference of those images "
                "starts from the beginning",
                self.folder,
            )
        self.warned = True

    def _write(self, record: bytes, offset: int) -> None:
        view = memoryview(record)
        try:
            while view:
                written = os.pwrite(self.files[self.current_pass % self.NUM_FILES], view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise OSError(
                f"{self.folder}: {error.strerror}: the states of inference do not fit; make room, "
                "then run the same command again to resume"
            ) from None


def is_warm_start_file(path: Path) -> bool:
    """Whether a path is a regular file of warm starts that this package wrote."""
    with suppress(OSError):
        if is_regular(path):
            with open(path, "rb") as file:
                return file.read(len(MAGIC)) == MAGIC
    return False


def merge_state_dicts(parts: list[dict]) -> dict:
    """The warm starts of all ranks merged into the state of a single rank."""
    # The shape is unknown on a rank without images.
    parts = [part for part in parts if len(part["images"])]
    images = torch.cat([part["images"] for part in parts])
    order = images.argsort()
    names = {name for part in parts for name in part["numbers"]}

    def merged(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    def scalars(name: str, part: dict) -> Tensor:
        unknown = torch.full((len(part["images"]), 1, 1, 1), math.nan, dtype=torch.float32)
        return part["numbers"].get(name, unknown)

    kept = [part["kept"] for part in parts]
    if any(isinstance(states, dict) for states in kept):
        states = sparse_states.merged(
            [
                sparse_states.packed(part, always=True) if isinstance(part, list) else part
                for part in kept
            ],
            order,
        )
    else:
        states = [merged(list(tensors)) for tensors in zip(*kept, strict=True)]
    return {
        "images": images[order],
        "shape": parts[0]["shape"],
        "kept": states,
        "numbers": {name: merged([scalars(name, part) for part in parts]) for name in names},
        **({"now": max(part["now"] for part in parts)} if "now" in parts[0] else {}),
    }


def _open_file(path: Path) -> int:
    """A descriptor of a file of warm starts, which is created if it does not exist."""
    with suppress(FileNotFoundError):
        status = os.lstat(path)
        # Another rank may have created it a moment ago.
        empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
        if not empty and not is_warm_start_file(path):
            raise ForeignFileError(
                f"{path}: is in the way of the states of inference; move it away (if an earlier "
                "deconvnet wrote it, the inference of its images then starts from the beginning)"
            )
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.pwrite(file, MAGIC, 0)
    except OSError as error:
        os.close(file)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return file
