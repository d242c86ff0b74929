"""Keeps freed memory with the process while something is timed.

glibc gives blocks above 32 MiB back to the system as soon as they are freed, and smaller ones by where they lie in the
heap; the next call then pays for every page again (measured: 15 ms for a result of 38 MB, whose convolution takes 3).
A plan's results lie in an arena that stays, so timings of single primitives must not have these page faults.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_USUAL = {_TRIM_THRESHOLD: 64 * 2**20, _MMAP_THRESHOLD: 32 * 2**20, _MMAP_MAX: 65536}
"""What glibc's own adjustment reaches in a process that has used blocks of this size; it cannot be asked."""
_SET_BY_USERS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")

_lock = threading.Lock()
_inside = 0


@contextmanager
def kept_heap() -> Iterator[None]:
    """What is freed inside stays with the process until the end, also of others inside at the same time.

    No effect with C libraries other than glibc, nor where the environment sets what glibc's malloc does.
    """
    global _inside
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or any(name in os.environ for name in _SET_BY_USERS):
        yield
        return
    with _lock:
        _inside += 1
        for parameter, value in _KEEP.items():
            libc.mallopt(parameter, value)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for parameter, value in _USUAL.items():
                    libc.mallopt(parameter, value)
                libc.malloc_trim(0)
