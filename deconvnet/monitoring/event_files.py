"""Naming and writing of TensorBoard event files.

TensorBoard reads the files of a folder in the order of their names, which begin with the time. The
file of a resumed run hides the events of earlier files beyond the step at which it resumes. If the
clock was set back, the newest file would be read first, and the older ones would hide it. Therefore
no file gets a name with an earlier time than an existing one.

Events are written immediately, in the caller's thread, so a full disk raises an error at once.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deconvnet.storage import ownership

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..*")
_serial = itertools.count()


def event_writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    """A new event file in a folder, recorded as ours.

    purge_step: the events of older files from this step on are hidden.
    """
    from torch.utils.tensorboard import SummaryWriter

    class Writer(SummaryWriter):
        def _get_file_writer(self) -> _EventFile:
            if self.file_writer is None:
                self.file_writer = _EventFile(Path(self.log_dir), self.purge_step)
                self.all_writers = {self.log_dir: self.file_writer}
            return self.file_writer

    return Writer(str(folder), purge_step=purge_step)


class _EventFile:
    """The parts of FileWriter that SummaryWriter needs, without its queue and thread."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        begin = _begin(folder)
        # Continue from this time, even if the clock is behind it.
        self._ahead = max(0.0, begin - time.time())
        name = f"{begin:010d}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"
        self.path = folder / f"events.out.tfevents.{name}"
        ownership.record(self.path)
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115
        self.add_event(Event(file_version="brain.Event:2"), purge_step)
        if purge_step is not None:
            self.add_event(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def add_summary(self, summary: Any, step: int | None = None, walltime: None = None) -> None:
        self.add_event(self._event(summary=summary), step)

    def add_event(self, event: Any, step: int | None = None, walltime: None = None) -> None:
        event.wall_time = time.time() + self._ahead
        if step is not None:
            event.step = int(step)
        try:
            self._file.write(_record(event.SerializeToString()))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def flush(self) -> None:
        """Nothing to do: events are written at once."""

    def close(self) -> None:
        self._file.close()


def _record(data: bytes) -> bytes:
    """The length of the data and the data, each followed by its masked checksum."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """Masked, so that the checksum of data that contain their checksum is not always the same."""
    import google_crc32c

    value = google_crc32c.value(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _begin(folder: Path) -> int:
    """The time in seconds for the name of a new file: now, or just after the newest file."""
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    newest = max((int(name[1]) for name in names if name), default=-1)
    return max(int(time.time()), newest + 1)
