"""One try at a sample: its bytes fetched, its clips cut and written to their rows of a batch.

In: `Wish`es, which say what to read and which random streams cut it. Out: an `Attempt` for each;
that a sample is no use is a value, for whoever asked to try another or to leave it out. Threads of
a `Ring` call this, side by side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from svfap_dist.data.device_cutter import DeviceCutter
from svfap_dist.data.stream import BadSample, SampleReader
from svfap_dist.data.workers import Key, Task, Workers


@dataclasses.dataclass(frozen=True)
class Wish:
    """A sample to be fetched and cut; the other fields are those of `Task`."""

    index: int
    window: Key | None
    crops: tuple[Key, ...]
    batch: int
    row: int
    augments: tuple[Key, ...] = ()


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What became of reading a sample and cutting clips out of it."""

    index: int
    key: str
    bad: BadSample | None  # None: there are clips
    fetch_seconds: float
    decode_seconds: float = 0.0
    shares: tuple[float, ...] = ()  # of each clip in the sample's scores


def attempt(
    reader: SampleReader, workers: Workers | DeviceCutter, wishes: Sequence[Wish]
) -> list[Attempt]:
    """Fetch samples and have their clips cut.

    Raises: ShardError and StorageError from reading; ClusterError if workers cannot be started.
    """
    attempts: list[Attempt] = []
    tasks: list[Task] = []
    for wish in wishes:
        began = time.perf_counter()
        packed = reader.fetch(wish.index)
        bad = packed if isinstance(packed, BadSample) else None
        attempts.append(Attempt(wish.index, packed.key, bad, time.perf_counter() - began))
        if not isinstance(packed, BadSample):
            place = wish.batch, wish.row
            tasks.append(Task(packed, wish.window, wish.crops, *place, wish.augments))
    outcomes = iter(workers(tasks) if tasks else [])
    for number, fetched in enumerate(attempts):
        if fetched.bad is None:
            done = next(outcomes)
            attempts[number] = dataclasses.replace(
                fetched, bad=done.bad, decode_seconds=done.seconds, shares=done.shares
            )
    return attempts
