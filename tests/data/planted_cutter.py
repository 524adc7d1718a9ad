"""Decode workers for tests of what becomes of the processes.

They decode, but a clip is only the digest of its frames: so they need no torch, which takes a
process seconds to load.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from typing import Any

import numpy as np

from svfap_dist.data.workers import Cut, Cutter, Outcome, Task
from svfap_dist.video.frames import Frames
from svfap_dist.video.views import Crop

HANGS, DIES = b"hangs the decoder", b"kills the decoder"


class QuickCutter(Cutter):
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _put(self, frames: Frames, crop: Crop, cut: Cut, number: int) -> None:
        pixels = next(field for field in vars(frames).values() if isinstance(field, np.ndarray))
        digest = zlib.crc32(np.ascontiguousarray(pixels))
        self._shared.arrays["rgb"][cut.batch, cut.row + number] = digest % 256


class PlantedCutter(QuickCutter):
    """Its decoder hangs on one kind of bytes and dies of another."""

    def __call__(self, task: Task) -> Outcome:
        if HANGS in task.packed.data:
            time.sleep(600)
        if DIES in task.packed.data:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(task)


class UnstartableCutter(Cutter):
    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(3)  # as a worker's process starts
