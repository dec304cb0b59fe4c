"""`numba.njit` with a disk cache of compiled code whose failures never stop the program.

numba's own cache ends the program if no folder is writable, if the disk is full, or if a cache file
is damaged. Here compiled code is read from and written to

1. numba's folder: NUMBA_CACHE_DIR if that is set, else `__pycache__` next to the source or the
   user's cache folder;
2. if that is not writable, a folder of this user among the temporary files;
3. if neither is writable, nowhere: every process compiles for itself.

Code from a file is used only if its digest and its signature match. A file that is truncated,
damaged, or written by two processes at once is replaced by newly compiled code.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import pickle
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import event, sigutils
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.serialize import dumps

logger = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """The decorator `numba.njit(**options)` with a cache on disk that cannot fail."""

    def decorate(function: Callable) -> Callable:
        dispatcher = numba.njit(**options)(function)
        # Under NUMBA_DISABLE_JIT numba returns the function itself.
        if hasattr(dispatcher, "_cache"):
            dispatcher._cache = CodeCache(function)
            _ours.add(function)
        return dispatcher

    return decorate


def cache_folder(function: Callable) -> Path | None:
    """Where the code of a function decorated by `compiled` is cached; None: nowhere."""
    cache = getattr(function, "_cache", None)
    return Path(cache.cache_path) if cache and cache.cache_path else None


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Without garbage collection in the meantime.

    While numba makes a million objects, the collector would visit those of the whole program
    several times. Once torch is imported, this takes half a second when compiling, and a tenth when
    numba loads its own modules for the first code from a file.
    """
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()


class _Compilation(event.Listener):
    """Logs, once per process, why a first call takes longer, and pauses the garbage collector."""

    logged = False

    def __init__(self) -> None:
        self._was_collecting: list[bool] = []

    def on_start(self, event: event.Event) -> None:
        if event.data["dispatcher"].py_func not in _ours:
            return
        if not self.logged:
            self.logged = True
            logger.info("compiling loops, once: this takes some seconds")
        # numba holds its lock meanwhile; functions that the loops call are compiled within.
        self._was_collecting.append(gc.isenabled())
        gc.disable()

    def on_end(self, event: event.Event) -> None:
        if event.data["dispatcher"].py_func in _ours and self._was_collecting.pop():
            gc.enable()


# The functions compiled by this module, as opposed to other packages in the process.
_ours: set[Callable] = set()
compilation = _Compilation()
event.register("numba:compile", compilation)


class CodeCache:
    """The cache of one function as numba uses it, in the first folder that works."""

    _warned = False

    def __init__(self, function: Callable):
        self._function = function
        self._usual, self._temporary = _DigestCache.of(function), None

    @property
    def cache_path(self) -> str | None:
        paths = [cache.cache_path for cache in (self._usual, self._temporary) if cache]
        return paths[0] if paths else None

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled code for a signature, or None if no folder has it undamaged."""
        with _collector_paused():
            return self._load(signature, target_context)

    def _load(self, signature: Any, target_context: Any) -> Any:
        for cache in filter(None, (self._usual, self._among_temporary_files(make=False))):
            # Unpickling damaged bytes may raise any exception.
            with contextlib.suppress(Exception):
                code = cache.load_overload(signature, target_context)
                if code is not None and _is_for(code, signature):
                    return code
        return None

    def save_overload(self, signature: Any, code: Any) -> None:
        """Save the code in the first folder that accepts it; else warn, once per process."""
        reason = "no folder for it is writable"
        for find in (lambda: self._usual, self._among_temporary_files):
            cache = find()
            if cache is None:
                continue
            try:
                cache.save_or_replace(signature, code)
                return
            except Exception as error:  # a full disk, a damaged index, a folder in place of a file
                reason = str(error)
        if not CodeCache._warned:
            CodeCache._warned = True
            logger.warning(
                "compiled code cannot be saved on disk and is compiled in every process (%s); "
                "set NUMBA_CACHE_DIR to a writable folder",
                reason,
            )

    def flush(self) -> None:
        """Delete the code in the folders."""
        for cache in filter(None, (self._usual, self._temporary)):
            with contextlib.suppress(OSError):
                cache.flush()

    def _among_temporary_files(self, *, make: bool = True) -> _DigestCache | None:
        if self._temporary is None and (folder := temporary_folder(make=make)):
            self._temporary = _DigestCache.of(self._function, folder)
        return self._temporary


class _DigestCode(CompileResultCacheImpl):
    """Compiled code as bytes, stored with their digest."""

    def reduce(self, code: Any) -> tuple[bytes, bytes]:
        data = dumps(super().reduce(code))
        return hashlib.sha256(data).digest(), data

    def rebuild(self, target_context: Any, stored: tuple[bytes, bytes]) -> Any:
        digest, data = stored
        if hashlib.sha256(data).digest() != digest:
            raise ValueError("damaged code")
        return super().rebuild(target_context, pickle.loads(data))


class _DigestCache(FunctionCache):
    """numba's cache of one function in one folder."""

    _impl_class = _DigestCode

    @classmethod
    def of(cls, function: Callable, folder: Path | None = None) -> _DigestCache | None:
        """The cache in this folder, else in numba's own; None if that is not possible."""
        given = numba.config.CACHE_DIR
        try:
            if folder is not None:
                numba.config.CACHE_DIR = str(folder)
            return cls(function)
        except (RuntimeError, OSError):  # no writable folder, or the source cannot be read
            return None
        finally:
            numba.config.CACHE_DIR = given

    def save_or_replace(self, signature: Any, code: Any) -> None:
        """Save the code; replace the index if it is damaged."""
        try:
            self.save_overload(signature, code)
        except OSError:
            raise
        except Exception:
            self.flush()
            self.save_overload(signature, code)


def temporary_folder(*, make: bool) -> Path | None:
    """The folder of this user for compiled code among the temporary files.

    None if it does not exist and `make` is false, or if it cannot be created; also if it belongs to
    another user or others may write to it, because the code in it is executed.
    """
    user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    try:
        folder = Path(tempfile.gettempdir()) / f"deconvnet-compiled{user}"
        if make:
            folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    ours = not user or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
    return folder if stat.S_ISDIR(status.st_mode) and ours else None


def _is_for(code: Any, signature: Any) -> bool:
    """Whether code takes the arguments of this signature."""
    arguments, _ = sigutils.normalize_signature(signature)
    return tuple(code.signature.args) == tuple(arguments)
