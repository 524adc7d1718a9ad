"""Decode workers that hang, die or do not start, for tests of the pool of their processes.

They decode, but a clip is only the digest of its frames: so they need no torch, which takes a
process seconds to load.
"""

from __future__ import annotations

import os
import signal
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from svfap_dist.data.clips import ClipRequest, ClipWorker, DecodeJob, DecodeResult
from svfap_dist.data.still_images import Move
from svfap_dist.video.frames import Frames
from svfap_dist.video.info import Crop

HANGS, DIES = b"hangs the decoder", b"kills the decoder"


class QuickWorker(ClipWorker):
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _write(
        self, frames: Frames, crop: Crop, request: ClipRequest, number: int, moves: list[Move]
    ) -> None:
        pixels = next(field for field in vars(frames).values() if isinstance(field, np.ndarray))
        digest = zlib.crc32(np.ascontiguousarray(pixels))
        self._shared.arrays["rgb"][request.batch, request.row + number] = digest % 256


class PlantedWorker(QuickWorker):
    """Its decoder hangs on one kind of bytes and dies of another."""

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        for job in jobs:
            if HANGS in job.packed.data:
                time.sleep(600)
            if DIES in job.packed.data:
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(jobs)


class FeederKiller(QuickWorker):
    """Kills the process that decodes: without workers, the feeder."""

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        if any(DIES in job.packed.data for job in jobs):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(jobs)


class UnstartableWorker(ClipWorker):
    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(3)  # as a worker's process starts
