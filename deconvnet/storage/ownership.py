"""Which files this package may replace, move or remove: only those that it wrote itself.

A folder of results contains a hidden folder `.deconvnet` with

    made       a record of all files written to the folder and below it: one line of JSON for each,
               [digest, path]; the digest is empty for files that grow, such as a log, and null for
               files that were removed
    *.tmp      files being written
    lock       held by the one process that may write a run

A file is ours if the nearest record above it lists it and its content is still what was written. A
user's own file is therefore never touched, nor a file of ours that somebody has edited, nor a link:
`write` raises an error, `remove` and `move` leave it in place. Readers see the old content or the
new one, even after a kill, and a full disk never costs an older file.
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
# In the record, in place of a digest: the file grows.
GROWS = ""
# How many foreign files a message names.
MAX_NAMED = 3
# Files that file managers leave in every folder that somebody opens.
FILE_MANAGER_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")

# The largest record in bytes, enough for millions of files.
MAX_RECORD = 2**28
# Age in seconds from which a temporary file must be left over from a kill. Processes without the
# lock may write to the folder too, but their temporary files exist only for moments.
STALE = 3600.0
# Errors of file systems without locks.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

log = logging.getLogger(__name__)


class ForeignFileError(ValueError):
    """A file that this package did not write is in the way."""


class FolderLockedError(ValueError):
    """Another process is writing to the folder."""


def claim_folder(folder: str | Path) -> Path:
    """Create a folder with its own record unless they exist, and return its absolute path."""
    folder = make_folder(absolute(folder))
    own = folder / RECORD_FOLDER
    if os.path.lexists(own) and not _is_own(own):
        raise ForeignFileError(f"{own}: is in the way of the record of results; move it away")
    own.mkdir(exist_ok=True)
    for name in (RECORD_FILE, "lock", "writer"):
        _check_regular(own / name)
    return folder


def make_folder(folder: Path) -> Path:
    """Create a folder with its parents unless it exists, and return it.

    Raises ForeignFileError if it, or a folder above it, is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        raise ForeignFileError(f"{folder}: must be a folder, but {file} is a file") from error
    return folder


def _check_regular(path: Path) -> None:
    """Refuse a link: a run folder may come from somebody else, and no link in it may lead us to
    write elsewhere."""
    if os.path.lexists(path) and not is_regular(path):
        raise ForeignFileError(f"{path}: is in the way of the record of results; move it away")


def absolute(path: str | Path) -> Path:
    """The absolute path without "..", links not resolved."""
    return Path(os.path.abspath(path))


def write(
    path: str | Path, data: bytes | memoryview, *, ours: Callable[[Path], bool] | None = None
) -> None:
    """Write data to a path, completely or not at all, and record it.

    ours: whether this package wrote a file, judged by its content; such files need no record.
    Raises ForeignFileError if somebody else's file is there, and OSError with the path if it cannot
    be written; in both cases the existing file is intact.
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
            # Record before writing: otherwise a kill in between would leave our file unrecorded.
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
    """Raise ForeignFileError if something is at this path that may not be replaced."""
    path = absolute(path)
    if os.path.lexists(path) and not is_ours(path):
        raise ForeignFileError(
            f"{path}: already exists and is not as deconvnet wrote it; move it away, or choose "
            "another place"
        )


def check_not_inputs(targets: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Raise ForeignFileError if a target is one of the inputs, by whatever path or link."""
    input_paths = {}
    for path in inputs:
        with suppress(OSError):
            input_paths[_identity(os.stat(path))] = path
    for target in targets:
        with suppress(OSError):
            if (source := input_paths.get(_identity(os.stat(target)))) is not None:
                raise ForeignFileError(
                    f"{target}: is an input itself ({source}) and would be overwritten; choose "
                    "another output=..."
                )


def is_regular(path: str | Path) -> bool:
    """Whether a path is a regular file: no link, and no pipe or device, which may block."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_ours(path: str | Path) -> bool:
    """Whether this package wrote the file and nobody has changed it since."""
    path = absolute(path)
    root = _root(path.parent)
    try:
        info = os.lstat(path)
    except (OSError, ValueError):  # ValueError: a record may contain impossible names
        return False
    if root is None or not stat.S_ISREG(info.st_mode):
        return False
    digests = _digests_by_path(root).get(_relative(root, path), ())
    if GROWS in digests:
        return True
    if not digests:
        return False
    return _signatures.get(path) == _signature(info) or _digest_of(path) in digests


def foreign_files(paths: Iterable[Path]) -> list[Path]:
    """Those of the given files that are not ours."""
    roots: dict[Path, Path | None] = {}
    foreign = []
    for path in paths:
        parent = absolute(path).parent
        if parent not in roots:
            roots[parent] = _root(parent)
        if roots[parent] is None or not is_ours(path):
            foreign.append(path)
    return foreign


def record(path: str | Path, *, grows: bool = True) -> None:
    """Record as ours a file that another library writes for us, such as a log.

    grows: whether its content may change; otherwise only its present content is ours.
    """
    path = absolute(path)
    root = _writable_root(path.parent) or claim_folder(path.parent)
    digest = GROWS if grows else _digest_of(path)
    if digest is not None:
        _record(root, [(digest, path)])


def append(path: str | Path, text: str) -> None:
    """Append text to a file that grows; ForeignFileError if somebody else wrote it."""
    path = absolute(path)
    if not os.path.lexists(path):
        record(path)
    check_writable(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def remove(path: str | Path) -> bool:
    """Remove a file if it is ours, and return whether it was."""
    path = absolute(path)
    if not is_ours(path) or _through_link(path):
        return False
    path.unlink(missing_ok=True)
    _record(_root(path.parent), [(None, path)])
    return True


def own_files_in(folder: str | Path) -> list[Path]:
    """The files in the record of a folder that still exist and are ours."""
    folder = absolute(folder)
    paths = [folder / relative for relative in _digests_by_path(folder) if _inside(relative)]
    return [path for path in paths if is_ours(path) and not _through_link(path)]


def move(path: str | Path, target: str | Path) -> bool:
    """Move a file with its record to a free path if it is ours, and return whether it was."""
    path, target = absolute(path), absolute(target)
    if not is_ours(path) or _through_link(path):
        return False
    if os.path.lexists(target):
        raise ForeignFileError(f"{target}: already exists; move it away")
    digests = _digests_by_path(_root(path.parent))[_relative(_root(path.parent), path)]
    target.parent.mkdir(parents=True, exist_ok=True)
    root = _writable_root(target.parent) or claim_folder(target.parent)
    _record(root, [(digest, target) for digest in digests])
    os.rename(path, target)
    _record(_root(path.parent), [(None, path)])
    return True


def foreign_files_in(folder: str | Path) -> list[Path]:
    """All entries in a folder and below it that are not ours: files, links and others."""
    folder = absolute(folder)
    foreign = []
    for parent, folders, names in os.walk(folder):
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = [name for name in folders if name != RECORD_FOLDER and name not in linked]
        paths = [Path(parent, name) for name in names + linked if name not in FILE_MANAGER_FILES]
        foreign += [path for path in paths if not is_ours(path)]
    return sorted(foreign)


@contextmanager
def rebuilt_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which then replaces the one at the path as a whole.

    Raises ForeignFileError before anything is done if that folder holds foreign files.
    """
    folder = absolute(folder)
    root = _writable_root(folder.parent) or claim_folder(folder.parent)
    new, old = (root / RECORD_FOLDER / f"{folder.name}.{kind}" for kind in ("new", "old"))
    # Left by a kill between the two renames below.
    if old.exists() and not os.path.lexists(folder):
        os.rename(old, folder)
    check_replaceable(folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        # Somebody may have added files to the old folder in the meantime.
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
    """Raise ForeignFileError unless the path is free or a folder of our files alone."""
    folder = absolute(folder)
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ForeignFileError(f"{folder}: is not a folder that deconvnet made; move it away")
    if foreign := foreign_files_in(folder):
        names = ", ".join(path.relative_to(folder).as_posix() for path in foreign[:MAX_NAMED])
        more = ", ..." if len(foreign) > MAX_NAMED else ""
        raise ForeignFileError(
            f"{folder}: would be replaced, but contains files that deconvnet did not make "
            f"({names}{more}); move them away, or choose another place"
        )


def prune(folder: str | Path) -> None:
    """Remove the empty folders among a folder and its subfolders."""
    folder = absolute(folder)
    if folder.is_symlink() or not folder.is_dir():
        return
    for child in list(folder.iterdir()):
        if child.is_dir() and not child.is_symlink() and child.name != RECORD_FOLDER:
            prune(child)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def locked_folder(folder: str | Path, *, part: str = "", elsewhere: str = "name") -> Iterator[None]:
    """Hold the lock of a folder; FolderLockedError if another process holds it.

    part: the name of a part of the folder, which has a lock of its own. elsewhere: the setting that
    chooses another folder, for the error.
    """
    folder = claim_folder(folder)
    prefix = f"{part}." if part else ""
    writer = folder / RECORD_FOLDER / f"{prefix}writer"
    lock = filelock.FileLock(folder / RECORD_FOLDER / f"{prefix}lock", blocking=False)
    for path in (writer, Path(lock.lock_file)):
        _check_regular(path)
    try:
        lock.acquire()
    except filelock.Timeout:
        who = "unknown"
        with suppress(OSError):
            who = writer.read_text(errors="replace")[:100]
        raise FolderLockedError(
            f"{folder / part}: another process ({who}) is writing to this folder; wait until it "
            f"ends, or choose another folder with {elsewhere}=..."
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        # Missing locks are no reason to stop.
        log.warning("%s: the file system has no locks; let no other process write there", folder)
        yield
        return
    try:
        writer.write_text(f"process {os.getpid()} on {platform.node()}")
        for leftover in (folder / RECORD_FOLDER).glob("*.tmp"):
            with suppress(OSError):
                if is_regular(leftover) and os.lstat(leftover).st_mtime < time.time() - STALE:
                    leftover.unlink()
        yield
    finally:
        # The work is done: a failing disk must not raise now.
        with suppress(OSError):
            writer.unlink(missing_ok=True)
        lock.release()


def read_regular_file(path: str | Path) -> bytes:
    """The content of a regular file.

    Raises ValueError for a pipe, a device or a folder, which might block, and OSError as usual.
    """
    with open_regular_file(path) as file:
        return file.read()


@contextmanager
def open_regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; errors as in `read_regular_file`."""
    path = Path(path)
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path}: not a regular file")
        yield file


# The metadata of each file when this process wrote it: if unchanged, so is the file, which then
# need not be read again.
_signatures: dict[Path, tuple[int, ...]] = {}
# For each record: its inode, the number of bytes read, and the digests by path.
_records: dict[Path, tuple[int, int, dict[str, set[str]]]] = {}


def _root(folder: Path) -> Path | None:
    """The folder with the nearest record, this one or one above it."""
    return next(
        (parent for parent in (folder, *folder.parents) if _is_own(parent / RECORD_FOLDER)), None
    )


def _writable_root(folder: Path) -> Path | None:
    """The folder with the nearest record if we may write to it, else None.

    The folder may lie inside somebody else's folder of results.
    """
    root = _root(folder)
    return root if root is not None and os.access(root / RECORD_FOLDER, os.W_OK) else None


def _is_own(path: Path) -> bool:
    """Whether a path is a folder itself rather than a link to one."""
    return path.is_dir() and not path.is_symlink()


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _inside(relative: str) -> bool:
    """Whether a path in a record, which may come from others, stays inside its folder."""
    return not relative.startswith("/") and ".." not in Path(relative).parts


def _through_link(path: Path) -> bool:
    """Whether a folder between a file and its record is a link, so the file lies elsewhere."""
    root = _root(path.parent)
    between = itertools.takewhile(lambda parent: parent != root, path.parents)
    return any(parent.is_symlink() for parent in between)


def _digests_by_path(root: Path) -> dict[str, set[str]]:
    """The digests in a record by path.

    A file may have several: a kill between recording and writing leaves the older content.
    """
    path = root / RECORD_FOLDER / RECORD_FILE
    if os.path.lexists(path) and not is_regular(path):
        raise ForeignFileError(f"{path}: is in the way of the record of results; move it away")
    try:
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            if info.st_size > MAX_RECORD:
                raise ForeignFileError(
                    f"{path}: too large for a record ({info.st_size} bytes); move it away"
                )
            inode, offset, entries = _records.get(path, (-1, 0, {}))
            if inode != info.st_ino or offset > info.st_size:
                offset, entries = 0, {}
            file.seek(offset)
            text = file.read()
    except FileNotFoundError:
        return {}
    complete = text[: text.rfind(b"\n") + 1]
    for line in complete.splitlines():
        # A kill may have truncated a line.
        with suppress(ValueError, TypeError, RecursionError):
            digest, name = json.loads(line)
            if digest is None:
                entries.pop(name, None)
            elif isinstance(name, str) and isinstance(digest, str):
                entries.setdefault(name, set()).add(digest)
    _records[path] = info.st_ino, offset + len(complete), entries
    return entries


def _record(root: Path, files: list[tuple[str | None, Path]]) -> None:
    """Append lines to the record, synced to disk before the files are written."""
    recorded = _digests_by_path(root)
    lines = [
        json.dumps([digest, name]) + "\n"
        for digest, path in files
        if digest not in recorded.get(name := _relative(root, path), ())
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
    """A path for a temporary file on the same file system as `path`."""
    if root is not None and os.stat(root / RECORD_FOLDER).st_dev == os.stat(path.parent).st_dev:
        # Random, since processes on two machines may have the same number.
        return root / RECORD_FOLDER / f"{os.getpid()}-{os.urandom(6).hex()}.tmp"
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    # mkstemp makes files readable by their owner only; use the permissions of other files.
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
    if os.name == "nt":  # Windows cannot open folders
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


def _signature(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of(path: Path) -> str | None:
    """The digest of the content of a file; None if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()
