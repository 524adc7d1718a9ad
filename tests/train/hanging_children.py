"""Child processes of a rank that hang, once in a run: a decode worker, a feeder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

from svfap_dist.data.clips import ClipWorker, DecodeJob, DecodeResult
from svfap_dist.data.run_order import RunOrder

TIME_FILE = "SVFAP_TEST_HANG"  # variable with the path; the process that hangs writes the time
_STEPS = 30  # that a feeder prepares before it hangs


def _hang_once() -> None:
    try:
        with open(os.environ[TIME_FILE], "x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return
    time.sleep(600)


class HangingWorker(ClipWorker):
    """Never returns from its first job."""

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        _hang_once()
        return super().__call__(jobs)


class HangingFeeder(ClipWorker):
    """Decodes as usual; the process that creates it, a feeder, hangs in the order of samples."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        slots, calls = RunOrder.slots, []

        def hanging(self: RunOrder, *place: int) -> Any:
            calls.append(place)
            if len(calls) == _STEPS:
                _hang_once()
            return slots(self, *place)

        mock.patch.object(RunOrder, "slots", hanging).start()
