"""One try at a sample: its bytes fetched, its clips cut and written to their rows of a batch.

In: which samples, and what to cut out of each. Out: a `Try` for each; that a sample is no use is a
value, for whoever asked to try another or to leave it out. Threads of a `Ring` call this, side by
side.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from svfap_dist.data.device_cutter import DeviceCutter
from svfap_dist.data.workers import Cut, Task, Workers
from svfap_dist.shards.reader import BadSample, SampleReader


@dataclasses.dataclass(frozen=True)
class Try:
    """What became of reading a sample and cutting clips out of it."""

    index: int
    key: str
    bad: BadSample | None  # None: there are clips
    fetch_seconds: float
    decode_seconds: float = 0.0
    shares: tuple[float, ...] = ()  # of each clip in the sample's scores


def try_samples(
    reader: SampleReader, workers: Workers | DeviceCutter, wanted: Sequence[tuple[int, Cut]]
) -> list[Try]:
    """Fetch samples, by their index, and have their clips cut.

    Raises: ShardError and StorageError from reading; ClusterError if workers cannot be started.
    """
    tries: list[Try] = []
    tasks: list[Task] = []
    for index, cut in wanted:
        began = time.perf_counter()
        packed = reader.fetch(index)
        bad = packed if isinstance(packed, BadSample) else None
        tries.append(Try(index, packed.key, bad, time.perf_counter() - began))
        if not isinstance(packed, BadSample):
            tasks.append(Task(packed, cut))
    outcomes = iter(workers(tasks) if tasks else [])
    for number, fetched in enumerate(tries):
        if fetched.bad is None:
            done = next(outcomes)
            tries[number] = dataclasses.replace(
                fetched, bad=done.bad, decode_seconds=done.seconds, shares=done.shares
            )
    return tries


def try_sample(reader: SampleReader, workers: Workers | DeviceCutter, index: int, cut: Cut) -> Try:
    """The same for one."""
    (tried,) = try_samples(reader, workers, [(index, cut)])
    return tried
