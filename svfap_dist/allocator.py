"""What the C library does with memory that a step has freed, when a step runs on CPUs.

Every step asks for the same large tensors again. By default glibc hands blocks of 32 MB and more
back to the system when they are freed, and gets them anew, zeroed page by page, at the next step:
a tenth of the time of a base-size step. Here it is told to keep them. GPUs need none of this, for
torch's own allocator keeps what it has there.

glibc keeps large blocks in its main arena only. The arenas of other threads are made of pieces of
64 MB at most, and larger blocks are handed back whatever it is told. A process that trains in
another thread than its first, as Ray Train's workers do, has to be started with `ONE_ARENA` in its
environment; without it `keep_freed_memory` is of use there to blocks below 64 MB at best.
"""

from __future__ import annotations

import ctypes

# Variables of the environment under which all threads share the main arena.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1
_GROW_BY = 256 << 20  # bytes: room for the largest tensors, so that small ones do not wall them in


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for its next use, from now on.

    The process then stays as large as its largest moment. Returns False where the C library is
    another one, and nothing has changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No block is mapped from the system for itself, and the heap is never cut shorter.
    wishes = (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _GROW_BY)
    return all(mallopt(parameter, value) for parameter, value in wishes)
