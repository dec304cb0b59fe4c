"""The rule for every path that is written: only what this package made is replaced, moved or
removed.

A folder of results has a hidden folder `.deconvnet` in it, which holds

    made       a record of all files made in the folder and below it: a line of JSON for each,
               [digest, path]; the digest is empty for files that grow, such as a log, and null for
               what was removed
    *.tmp      what is being written
    lock       held by the one process that may write a run

A file is ours if the record nearest above it says so and its content is still what was written. So
a file of the user's is never touched, nor one of ours that somebody has edited since, nor a link:
`write` refuses, `remove` and `move` leave it where it is. Whoever reads sees the old content or the
new one, also after a kill, and a full disk never costs an older file.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import filelock

RECORD_FOLDER = ".deconvnet"
RECORD_FILE = "made"
# In the record, in place of a digest: a file that grows.
GROWS = ""
# How many strangers a message names.
MAX_NAMED = 3
# What file managers leave in every folder that somebody looks into.
FILE_MANAGER_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")

# Bytes of a record: millions of files.
MAX_RECORD = 2**28
# Seconds after which a temporary file is left from a kill: others may write beside the one process
# that has the lock, and theirs are there for moments.
STALE = 3600.0
# What file systems that have no locks answer.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

log = logging.getLogger(__name__)


class ForeignFileError(ValueError):
    """Something that this package did not make is in the way."""


class FolderLockedError(ValueError):
    """Another process is writing to the folder."""


def claim_folder(folder: str | Path) -> Path:
    """Make a folder, if need be, with a record of its own; its absolute path."""
    folder = absolute(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / RECORD_FOLDER
    if os.path.lexists(own) and not _is_own(own):
        raise ForeignFileError(f"{own}: is in the way of the record of results; move it away")
    own.mkdir(exist_ok=True)
    # A run folder may come from somebody else: nothing in it leads us to write elsewhere.
    for name in (RECORD_FILE, "lock", "writer"):
        if os.path.lexists(own / name) and not is_regular(own / name):
            raise ForeignFileError(
                f"{own / name}: is in the way of the record of results; move it away"
            )
    return folder


def absolute(path: str | Path) -> Path:
    """A path from the root, without "..", links not resolved."""
    return Path(os.path.abspath(path))


def write(
    path: str | Path, data: bytes | memoryview, *, ours: Callable[[Path], bool] | None = None
) -> None:
    """Put data at a path, whole or not at all, and record it.

    ours: for files whose content tells who made them, a function that tells; they need no record.
    Raises ForeignFileError if somebody else's file is there, and OSError with the path if it cannot
    be written; what was there before is then intact.
    """
    path = absolute(path)
    if ours is None or not (path.is_file() and not path.is_symlink() and ours(path)):
        check_writable(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        root = _writable_root(path.parent)
        if root is None and ours is None:
            root = claim_folder(path.parent)
        if root is not None:
            # Before the file: after a kill between the two, a file of ours would be a stranger's.
            _record(root, [(_digest(data), path)])
        temporary = _temporary(root, path)
        try:
            _write_synced(temporary, data)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    _record_signature(path)


def check_writable(path: str | Path) -> None:
    """ForeignFileError where something is at a path that may not be replaced."""
    path = absolute(path)
    if os.path.lexists(path) and not is_ours(path):
        raise ForeignFileError(
            f"{path}: is there already and is not as deconvnet wrote it; move it away, or choose "
            "another place"
        )


def check_not_inputs(targets: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """ForeignFileError if a result would overwrite one of its inputs, whatever path leads there."""
    given = {}
    for path in inputs:
        with suppress(OSError):
            given[_identity(os.stat(path))] = path
    for target in targets:
        with suppress(OSError):
            if (source := given.get(_identity(os.stat(target)))) is not None:
                raise ForeignFileError(
                    f"{target}: is an input itself ({source}) and would be written over; choose "
                    "another output=..."
                )


def is_regular(path: str | Path) -> bool:
    """Whether a path is a file itself: no link, and no pipe or device, whose opening may hang."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_ours(path: str | Path) -> bool:
    """Whether a path is a file that this package made and that nobody has changed since."""
    path = absolute(path)
    root = _root(path.parent)
    try:
        found = os.lstat(path)
    except (OSError, ValueError):  # ValueError: a record may speak of names that cannot be
        return False
    if root is None or not stat.S_ISREG(found.st_mode):
        return False
    digests = _digests_by_path(root).get(_relative(root, path), ())
    if GROWS in digests:
        return True
    if not digests:
        return False
    return _signatures.get(path) == _signature(found) or _digest_of(path) in digests


def foreign_files(paths: Iterable[Path]) -> list[Path]:
    """Those of some files that are not ours."""
    roots: dict[Path, Path | None] = {}
    found = []
    for path in paths:
        parent = absolute(path).parent
        if parent not in roots:
            roots[parent] = _root(parent)
        if roots[parent] is None or not is_ours(path):
            found.append(path)
    return found


def record(path: str | Path, *, grows: bool = True) -> None:
    """Say of a file that others write for us, a log or TensorBoard's, that it is ours.

    grows: whether it may change; else it is ours as it is now.
    """
    path = absolute(path)
    root = _writable_root(path.parent) or claim_folder(path.parent)
    digest = GROWS if grows else _digest_of(path)
    if digest is not None:
        _record(root, [(digest, path)])


def append(path: str | Path, text: str) -> None:
    """Add text to a file that grows; ForeignFileError where that is a stranger's."""
    path = absolute(path)
    if not os.path.lexists(path):
        record(path)
    check_writable(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def remove(path: str | Path) -> bool:
    """Remove a file if it is ours; whether it was."""
    path = absolute(path)
    if not is_ours(path) or _through_link(path):
        return False
    path.unlink(missing_ok=True)
    _record(_root(path.parent), [(None, path)])
    return True


def own_files_in(folder: str | Path) -> list[Path]:
    """The files that the record of a folder speaks of, those that are still there and ours."""
    folder = absolute(folder)
    paths = [folder / relative for relative in _digests_by_path(folder) if _inside(relative)]
    return [path for path in paths if is_ours(path) and not _through_link(path)]


def move(path: str | Path, target: str | Path) -> bool:
    """Move a file that is ours to a place where nothing is, with its record; whether it was."""
    path, target = absolute(path), absolute(target)
    if not is_ours(path) or _through_link(path):
        return False
    if os.path.lexists(target):
        raise ForeignFileError(f"{target}: is there already; move it away")
    digests = _digests_by_path(_root(path.parent))[_relative(_root(path.parent), path)]
    target.parent.mkdir(parents=True, exist_ok=True)
    root = _writable_root(target.parent) or claim_folder(target.parent)
    _record(root, [(digest, target) for digest in digests])
    os.rename(path, target)
    _record(_root(path.parent), [(None, path)])
    return True


def foreign_files_in(folder: str | Path) -> list[Path]:
    """What is in a folder, and below it, that is not ours: files, links, whatever else."""
    folder = absolute(folder)
    found = []
    for parent, folders, names in os.walk(folder):
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = [name for name in folders if name != RECORD_FOLDER and name not in linked]
        paths = [Path(parent, name) for name in names + linked if name not in FILE_MANAGER_FILES]
        found += [path for path in paths if not is_ours(path)]
    return sorted(found)


@contextmanager
def rebuilt_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of the one at a path, whole or not at
    all.

    ForeignFileError, before anything is done, where that holds anything but files of ours.
    """
    folder = absolute(folder)
    root = _writable_root(folder.parent) or claim_folder(folder.parent)
    new, old = (root / RECORD_FOLDER / f"{folder.name}.{kind}" for kind in ("new", "old"))
    # A kill between the two renamings below.
    if old.exists() and not os.path.lexists(folder):
        os.rename(old, folder)
    check_replaceable(folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        # What somebody has put there in the meantime.
        check_replaceable(folder)
        files = [path for path in new.rglob("*") if path.is_file()]
        _record(root, [(_digest_of(path), folder / path.relative_to(new)) for path in files])
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: str | Path) -> None:
    """ForeignFileError where something is at a path but a folder that holds files of ours alone."""
    folder = absolute(folder)
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ForeignFileError(f"{folder}: is not a folder that deconvnet made; move it away")
    if foreign := foreign_files_in(folder):
        named = ", ".join(path.relative_to(folder).as_posix() for path in foreign[:MAX_NAMED])
        more = ", ..." if len(foreign) > MAX_NAMED else ""
        raise ForeignFileError(
            f"{folder}: would be replaced, but holds what deconvnet did not make ({named}{more}); "
            "move that away, or choose another place"
        )


def prune(folder: str | Path) -> None:
    """Remove a folder if nothing is left in it, and the folders in it likewise."""
    folder = absolute(folder)
    if folder.is_symlink() or not folder.is_dir():
        return
    for child in list(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and child.name != RECORD_FOLDER:
            prune(child)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """Within it no other process gets a lock on this folder; FolderLockedError where one has it."""
    folder = claim_folder(folder)
    writer = folder / RECORD_FOLDER / "writer"
    lock = filelock.FileLock(folder / RECORD_FOLDER / "lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        who = "unknown"
        with suppress(OSError):
            who = writer.read_text(errors="replace")[:100]
        raise FolderLockedError(
            f"{folder}: another process ({who}) is writing to this folder; wait until it has "
            "ended, or choose another one with name=..."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        # That must not stop the work.
        log.warning("%s: the file system has no locks: let no other process write there", folder)
        yield
        return
    try:
        writer.write_text(f"process {os.getpid()} on {platform.node()}")
        for left in (folder / RECORD_FOLDER).glob("*.tmp"):
            with suppress(OSError):
                if is_regular(left) and os.lstat(left).st_mtime < time.time() - STALE:
                    left.unlink()
        yield
    finally:
        # What the work has done is done, also if the disk fails now.
        with suppress(OSError):
            writer.unlink(missing_ok=True)
        lock.release()


def read_regular_file(path: str | Path) -> bytes:
    """The content of a regular file; ValueError for a pipe, a device or a folder, which would hang
    or never end, OSError as usual.
    """
    with open_regular_file(path) as file:
        return file.read()


@contextmanager
def open_regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file to read; errors as in `read`."""
    path = Path(path)
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path}: not a regular file")
        yield file


# Of files that this process wrote: what the file system said of them then, so that they need not
# be read again to know that nobody has changed them.
_signatures: dict[Path, tuple[int, ...]] = {}
# Of every record: which file it is, how far it was read, and what it says.
_records: dict[Path, tuple[int, int, dict[str, set[str]]]] = {}


def _root(folder: Path) -> Path | None:
    """The folder with the nearest record, this one or one above it."""
    return next(
        (above for above in (folder, *folder.parents) if _is_own(above / RECORD_FOLDER)), None
    )


def _writable_root(folder: Path) -> Path | None:
    """The same for a new entry; None where that is the record of somebody else, whose folder this
    one is in.
    """
    root = _root(folder)
    return root if root is not None and os.access(root / RECORD_FOLDER, os.W_OK) else None


def _is_own(path: Path) -> bool:
    """Whether a path is a folder, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _inside(relative: str) -> bool:
    """Whether a path of a record, which may be a stranger's, leads to a place in its folder."""
    return not relative.startswith("/") and ".." not in Path(relative).parts


def _through_link(path: Path) -> bool:
    """Whether a folder between a file and its record is a link, so that the file lies elsewhere."""
    root = _root(path.parent)
    between = itertools.takewhile(lambda above: above != root, path.parents)
    return any(above.is_symlink() for above in between)


def _digests_by_path(root: Path) -> dict[str, set[str]]:
    """The digests of every file by its path, of which the last is what it should be; earlier ones
    are those of a kill between record and file.
    """
    path = root / RECORD_FOLDER / RECORD_FILE
    if os.path.lexists(path) and not is_regular(path):
        raise ForeignFileError(f"{path}: is in the way of the record of results; move it away")
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size > MAX_RECORD:
                raise ForeignFileError(f"{path}: {found.st_size} bytes are no record; move it away")
            inode, offset, entries = _records.get(path, (-1, 0, {}))
            if inode != found.st_ino or offset > found.st_size:
                offset, entries = 0, {}
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return {}
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        # A line that a kill has cut off says nothing.
        with suppress(ValueError, TypeError, RecursionError):
            digest, name = json.loads(line)
            if digest is None:
                entries.pop(name, None)
            elif isinstance(name, str) and isinstance(digest, str):
                entries.setdefault(name, set()).add(digest)
    _records[path] = found.st_ino, offset + len(whole), entries
    return entries


def _record(root: Path, files: list[tuple[str | None, Path]]) -> None:
    """Add lines to the record, on the disk before the files that they speak of."""
    known = _digests_by_path(root)
    lines = [
        json.dumps([digest, name]) + "\n"
        for digest, path in files
        if digest not in known.get(name := _relative(root, path), ())
    ]
    if not lines:
        return
    descriptor = os.open(
        root / RECORD_FOLDER / RECORD_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644
    )
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = memoryview(("\n" * torn + "".join(lines)).encode())
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(root: Path | None, path: Path) -> Path:
    """A new file on the file system of a path."""
    if root is not None and os.stat(root / RECORD_FOLDER).st_dev == os.stat(path.parent).st_dev:
        # Processes of two machines may have one number.
        return root / RECORD_FOLDER / f"{os.getpid()}-{os.urandom(6).hex()}.tmp"
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    # That is readable by its owner alone, unlike what a program writes by itself.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)
    return Path(name)


def _write_synced(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _record_signature(path: Path) -> None:
    _signatures[path] = _signature(os.lstat(path))


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of(path: Path) -> str | None:
    """The digest of what a file holds; None where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
