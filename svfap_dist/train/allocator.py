"""What the C library does with memory that a step has freed, when a step runs on CPUs.

Every step asks for the same large tensors again. By default glibc hands blocks of 32 MB and more
back to the system when they are freed, and gets them anew, zeroed page by page, at the next step:
a tenth of the time of a base-size step. Here it is told to keep them. GPUs need none of this, for
torch's own allocator keeps what it has there.
"""

from __future__ import annotations

import ctypes

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
