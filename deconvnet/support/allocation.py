"""Memory that an iteration frees is kept for its next steps, with the C library of Linux (glibc).

By default glibc returns large blocks to the system as soon as they are free, and the system clears
every page before it is used again. An iteration over arrays of a few MiB or more, which makes and
frees several of them, then spends half of its time or more on that. The main thread is the one that
gains: other threads have arenas whose memory glibc returns in any case.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator

# Of malloc.h, with values to keep all memory, and those that glibc itself arrives at once the
# program has freed a block of 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
_USUAL = {_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 64 << 20, _M_MMAP_THRESHOLD: 32 << 20}

_lock = threading.Lock()
_users = 0


@contextlib.contextmanager
def memory_kept(worthwhile: bool = True) -> Iterator[None]:
    """Keep what is freed meanwhile, and return it to the system in the end.

    Does nothing if it is not `worthwhile`, if the C library is another one, or if the user has set
    its parameters (MALLOC_..., GLIBC_TUNABLES).
    """
    libc = _glibc() if worthwhile else None
    if libc is None:
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def _enter(libc: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set(libc, _KEEP)


def _leave(libc: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _set(libc, _USUAL)
            libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, parameters: dict[int, int]) -> None:
    for name, value in parameters.items():
        libc.mallopt(name, value)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt, libc.malloc_trim  # noqa: B018
    except (OSError, TypeError, AttributeError):
        return None
    return libc
