"""A decode worker whose decoder hangs on one kind of bytes and dies of another."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from svfap_dist.data.workers import Cutter, Outcome, Task

HANGS, DIES = b"hangs the decoder", b"kills the decoder"


class PlantedCutter(Cutter):
    def __call__(self, task: Task) -> Outcome:
        if HANGS in task.packed.data:
            time.sleep(600)
        if DIES in task.packed.data:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(task)


class UnstartableCutter(Cutter):
    def __setstate__(self, state: dict[str, Any]) -> None:
        os._exit(3)  # as a worker's process starts
