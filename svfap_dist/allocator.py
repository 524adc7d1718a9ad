"""Settings of the C library's allocator that keep the memory of one training step for the next.

Every step allocates the same large tensors. By default glibc returns freed blocks of 32 MB and more
to the system, and gets new ones, zeroed page by page, at the next step: a tenth of the time of a
base-size step on CPUs. GPUs do not need this: torch's own allocator caches their memory.

glibc keeps large blocks in its main arena only. The arenas of other threads consist of heaps of at
most 64 MB, and larger blocks are returned whatever the settings. A process that trains in another
thread than its first, as Ray Train's workers do, has to be started with `ONE_ARENA` in its
environment; without it, `keep_freed_memory` affects only blocks below 64 MB there.
"""

from __future__ import annotations

import ctypes

# Environment variables under which all threads share the main arena.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1
_GROW_BY = 256 << 20  # bytes: room for the largest tensors, so that small ones do not fragment it


def keep_freed_memory() -> bool:
    """Keep freed memory in this process, which then stays as large as its peak.

    Returns:
        False where the C library has no such settings, and nothing has changed.
    """
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except TypeError:  # Windows
        mallopt = None
    if mallopt is None:
        return False
    # No block is mapped on its own, and the heap never shrinks.
    settings = (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _GROW_BY)
    return all(mallopt(parameter, value) for parameter, value in settings)
