"""What is remembered of images from one visit to the next, where inference goes on."""

from __future__ import annotations

import logging
import math
import os
import stat
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deconvnet.operators.pooling import Window, max_pool, pooled_shape, unpool
from deconvnet.storage.ownership import ForeignFileError, is_regular

log = logging.getLogger(__name__)

# The first bytes of a file of states, by which it is recognised as ours.
MAGIC = b"deconvnet states of inference\n".ljust(64, b"\0")
# A record begins with the number of its pass and a checksum.
HEADER = 16


class WarmStarts:
    """The state of inference of images, so that each visit starts where the last one ended, and
    numbers that go with it.

    images: their indices, ascending, by which they are asked for. A state is kept as maps; with a
    window as pooled maps and switches, which is all that such a state is and takes a ninth of the
    memory.
    """

    def __init__(self, images: Tensor, window: Window | None = None):
        self.images, self.window = images, window
        self.shape: tuple[int, ...] | None = None
        self.kept: list[Tensor] = []
        # Of every image the gradient step that served it, and ||T||^2: (N, 1, 1, 1), NaN for none.
        self.numbers: dict[str, Tensor] = {}

    def __getitem__(self, part: Tensor) -> Tensor | None:
        if self.shape is None:
            return None
        kept = [tensor[self._rows(part)] for tensor in self.kept]
        return kept[0] if self.window is None else unpool(*kept, (len(part), *self.shape))

    def __setitem__(self, part: Tensor, state: Tensor) -> None:
        new = (state,) if self.window is None else max_pool(state, self.window)
        if self.shape is None:
            self.shape = tuple(state.shape[1:])
            self.kept = [tensor.new_zeros(len(self.images), *tensor.shape[1:]) for tensor in new]
            if self.window is not None:
                # No two switches of an image may be the same.
                self.kept[1][:] = new[1][:1]
        for tensor, values in zip(self.kept, new, strict=True):
            tensor[self._rows(part)] = values

    def scalar(self, name: str, part: Tensor) -> Tensor | None:
        """A number of these images (N, 1, 1, 1), if all have one."""
        values = self.numbers.get(name)
        values = None if values is None else values[self._rows(part)]
        return None if values is None or values.isnan().any() else values

    def set_scalar(self, name: str, part: Tensor, values: Tensor) -> None:
        if name not in self.numbers:
            self.numbers[name] = values.new_full((len(self.images), 1, 1, 1), math.nan)
        self.numbers[name][self._rows(part)] = values

    def state_dict(self) -> dict:
        return {
            "images": self.images.cpu(),
            "shape": self.shape,
            "kept": [tensor.cpu() for tensor in self.kept],
            "numbers": {name: values.cpu() for name, values in self.numbers.items()},
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Take from the states of at least these images what belongs to them."""
        rows = torch.searchsorted(state["images"], self.images.cpu())
        self.shape = state["shape"]
        self.kept = [tensor[rows].to(device) for tensor in state["kept"]]
        self.numbers = {name: v[rows].to(device) for name, v in state["numbers"].items()}

    def next_pass(self) -> None:
        """One pass over the images is over, and another begins."""

    def close(self) -> None:
        """Nothing more is asked for."""

    def _rows(self, part: Tensor) -> Tensor:
        return torch.searchsorted(self.images, part)


class DiskWarmStarts(WarmStarts):
    """The same in files of a folder, for more of them than memory holds.

    A checkpoint knows of every image in which pass its state was written. What is written after it
    must leave that as it is, so passes take three files in turn: at any moment two of them may hold
    what the last checkpoint speaks of. All ranks share the files, in which every image has its own
    place for a record: the number of the pass, a checksum, and the state. Where a file does not
    have the record of a checkpoint, or has a damaged one, inference starts from the beginning.

    run: what the records are marked with, so that those of another run are not taken for them.
    Raises ForeignFileError where a file is in the way that is none of states.
    """

    NUM_FILES = 3

    def __init__(self, images: Tensor, window: Window | None, folder: Path, run: str = ""):
        super().__init__(images, window)
        self.folder, self.mark = folder, zlib.crc32(run.encode())
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [_opened(folder / f"{number}.states") for number in range(self.NUM_FILES)]
        self.warned = False
        # What was never written reads as 0.
        self.now = 1
        # Of every image the pass in which its state was written, -1 for none.
        self.passes = torch.full((len(images),), -1)

    def __getitem__(self, part: Tensor) -> Tensor | None:
        if self.shape is None:
            return None
        found = torch.zeros(len(part), *self.shape, dtype=torch.float32)
        passes = self.passes[self._rows(part).cpu()].tolist()
        for n, (image, turn) in enumerate(zip(part.tolist(), passes, strict=True)):
            if turn >= 0:
                found[n] = self._read(image, turn)
        return found.to(part.device)

    def __setitem__(self, part: Tensor, state: Tensor) -> None:
        if state.dtype != torch.float32:
            raise ValueError(f"states are {state.dtype}: in files they must be float32")
        self.shape = tuple(state.shape[1:])
        new = (state,) if self.window is None else max_pool(state, self.window)
        new = [tensor.cpu().numpy() for tensor in new]
        for n, image in enumerate(part.tolist()):
            body = b"".join(tensor[n].tobytes() for tensor in new)
            record = self._header(image, self.now, body) + body
            self._write(record, len(MAGIC) + image * len(record))
        self.passes[self._rows(part).cpu()] = self.now

    def next_pass(self) -> None:
        # One that has written nothing goes on, or else three files would not be enough.
        self.now += bool((self.passes == self.now).any())

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files = []

    def state_dict(self) -> dict:
        for file in self.files:
            os.fsync(file)
        return {**super().state_dict(), "kept": [self.passes.clone()], "now": self.now}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        super().load_state_dict(state, torch.device("cpu"))
        self.numbers = {name: values.to(device) for name, values in self.numbers.items()}
        if "now" not in state:
            return self._take_over(state)
        (self.passes,), self.kept, self.now = self.kept, [], state["now"]
        lost = [n for n, turn in enumerate(self.passes.tolist()) if not self._has(n, turn)]
        self.passes[lost] = -1
        if lost:
            log.warning(
                "%s does not have the states of %d images that the checkpoint refers to: their "
                "inference starts from the beginning",
                *(self.folder, len(lost)),
            )

    def _take_over(self, state: dict) -> None:
        """Write down the states of a checkpoint that has them in itself, which were in memory."""
        memory = WarmStarts(self.images.cpu(), self.window)
        memory.load_state_dict(state, torch.device("cpu"))
        self.shape, self.kept = None, []
        if memory.shape is not None:
            for part in memory.images.split(8):
                self[part.to(self.images.device)] = memory[part]

    def _has(self, n: int, turn: int) -> bool:
        """Whether there is the record of a pass, if there has to be one."""
        if turn < 0:
            return True
        file, size = self.files[turn % self.NUM_FILES], sum(self._sizes)
        place = len(MAGIC) + int(self.images[n]) * size
        whole = os.fstat(file).st_size >= place + size
        return whole and os.pread(file, 8, place) == np.int64(turn).tobytes()

    def _header(self, image: int, turn: int, body: bytes) -> bytes:
        """Of a record: its pass, and a checksum of whose it is and of what it says."""
        whose = np.array([image, turn], np.int64).tobytes()
        check = zlib.crc32(body, zlib.crc32(whose, self.mark))
        return np.array([turn, check], np.int64).tobytes()

    @property
    def _sizes(self) -> list[int]:
        """Bytes of the parts of a record: its header and the tensors."""
        if self.window is None:
            return [HEADER, 4 * math.prod(self.shape)]
        entries = math.prod(pooled_shape(self.shape, self.window))
        return [HEADER, 4 * entries, 8 * entries]

    def _read(self, image: int, turn: int) -> Tensor:
        sizes = self._sizes
        place = len(MAGIC) + image * sum(sizes)
        record = bytearray(os.pread(self.files[turn % self.NUM_FILES], sum(sizes), place))
        header, body = record[:HEADER], record[HEADER:]
        if len(record) < sum(sizes) or header != self._header(image, turn, body):
            self._warn_of_damage()
            return torch.zeros(self.shape)
        if self.window is None:
            return torch.frombuffer(body, dtype=torch.float32).view(self.shape)
        shape = pooled_shape(self.shape, self.window)
        values = torch.frombuffer(body[: sizes[1]], dtype=torch.float32)
        places = torch.frombuffer(body[sizes[1] :], dtype=torch.int64)
        return unpool(values.view(1, *shape), places.view(1, *shape), (1, *self.shape))[0]

    def _warn_of_damage(self) -> None:
        if not self.warned:
            log.warning(
                "%s has records that are damaged or of another run: the inference of those images "
                "starts from the beginning",
                self.folder,
            )
        self.warned = True

    def _write(self, record: bytes, place: int) -> None:
        view = memoryview(record)
        try:
            while view:
                written = os.pwrite(self.files[self.now % self.NUM_FILES], view, place)
                view, place = view[written:], place + written
        except OSError as error:
            raise OSError(
                f"{self.folder}: {error.strerror}: the states of inference do not fit; make room, "
                "then run the same command again to resume"
            ) from None


def is_warm_start_file(path: Path) -> bool:
    """Whether a path is a file of states of inference, no link to one."""
    with suppress(OSError):
        if is_regular(path):
            with open(path, "rb") as file:
                return file.read(len(MAGIC)) == MAGIC
    return False


def _opened(path: Path) -> int:
    """A descriptor of a file of states, new or of ours."""
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        # Another rank may have made it a moment ago.
        empty = stat.S_ISREG(found.st_mode) and found.st_size == 0
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


def merge_state_dicts(parts: list[dict]) -> dict:
    """The states of the images of all ranks as those of one."""
    # A rank without images has nothing of any shape.
    parts = [part for part in parts if len(part["images"])]
    images = torch.cat([part["images"] for part in parts])
    order = images.argsort()
    names = {name for part in parts for name in part["numbers"]}

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    def numbers(name: str, part: dict) -> Tensor:
        none = torch.full((len(part["images"]), 1, 1, 1), math.nan, dtype=torch.float32)
        return part["numbers"].get(name, none)

    return {
        "images": images[order],
        "shape": parts[0]["shape"],
        "kept": [joined(list(each)) for each in zip(*(p["kept"] for p in parts), strict=True)],
        "numbers": {name: joined([numbers(name, part) for part in parts]) for name in names},
        **({"now": max(part["now"] for part in parts)} if "now" in parts[0] else {}),
    }
