"""Arrays that a rank and its decode workers share: the memory of batches.

It is anonymous (memfd): workers inherit its descriptor, nothing in it has a name that could be left
behind, and it does not count against the size of /dev/shm, which containers keep small.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from multiprocessing import reduction
from typing import Any

import numpy as np

from svfap_dist.config import Config
from svfap_dist.errors import ConfigError

Shape = tuple[str, tuple[int, ...]]  # of an array: type of its numbers, and how many
Shapes = dict[str, Shape]
_ALIGNED = 64  # bytes


class SharedArrays:
    """Arrays in anonymous memory that processes started from this one see, too.

    arrays: by the names of `shapes`, uint8 or int64; the memory lives as long as one of them.

    Raises: ConfigError if there is no room for them.
    """

    def __init__(self, shapes: Mapping[str, Shape], descriptor: int | None = None) -> None:
        self._shapes = dict(shapes)
        sizes = [math.prod(shape) * np.dtype(kind).itemsize for kind, shape in shapes.values()]
        offsets = np.cumsum([0, *(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]).tolist()
        self.num_bytes: int = offsets[-1]
        try:
            if descriptor is None:
                descriptor = os.memfd_create("svfap-clips")
                os.ftruncate(descriptor, self.num_bytes)
            memory = mmap.mmap(descriptor, self.num_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                "No memory for batches",
                where="data.prefetch_bytes",
                found=f"{self.num_bytes} bytes cannot be shared between processes ({error})",
                do="make data.prefetch_bytes or the batch smaller",
            ) from error
        self._descriptor = descriptor
        self.address = np.frombuffer(memory, np.uint8).ctypes.data
        self.arrays = {
            name: np.ndarray(shape, kind, memory, offset)
            for (name, (kind, shape)), offset in zip(shapes.items(), offsets, strict=False)
        }

    def __reduce__(self):  # sent to a process that is being started
        return _attach, (self._shapes, reduction.DupFd(self._descriptor))

    def close(self) -> None:
        """No more processes can be given them."""
        os.close(self._descriptor)


def _attach(shapes: Mapping[str, Shape], shared: Any) -> SharedArrays:
    return SharedArrays(shapes, shared.detach())


def shapes(config: Config, length: int, clips: int, planes: tuple[int, int] | None) -> Shapes:
    """The arrays of `length` batches of so many clips: `rgb`, or what `YuvClips` has, for planes of
    height and width `planes` at most."""
    data = config.data
    batch = (length, clips)
    if planes is None:
        return {"rgb": ("uint8", (*batch, data.num_frames, data.frame_size, data.frame_size, 3))}
    height, width = planes
    half = (*batch, data.num_frames, (height + 1) // 2, (width + 1) // 2)
    return {
        "y": ("uint8", (*batch, data.num_frames, height, width)),
        "u": ("uint8", half),
        "v": ("uint8", half),
        "crops": ("int64", (*batch, 4)),
        "kinds": ("int64", batch),
    }
