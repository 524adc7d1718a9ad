"""One group of videos -> one shard with its index and its marker: the unit of work of the fleet.

The same code runs in this process, in worker processes and in Ray tasks. It needs nothing but
its group and the options, tells what became of the videos, and does no harm when it is run twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import TracebackType

from data_sharding import markers
from data_sharding.examine import Making, Sample, examiners
from data_sharding.markers import Marker, Tally
from data_sharding.pack import pack
from data_sharding.plan import Group
from svfap_dist.video.probe import Rejected


@dataclasses.dataclass(frozen=True)
class ShardJobSpec:
    """What is the same for all shards of a data set: where they go and how they are made."""

    url: str
    making: Making
    options_digest: str


class ShardMaker:
    """Makes one shard after the other, as a context manager; `processes` examine the videos.

    It can be sent to another process before its first use.
    """

    def __init__(self, job: ShardJobSpec, processes: int = 1) -> None:
        self._job, self._examiners = job, examiners(job.making, processes)

    def __enter__(self) -> ShardMaker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._examiners.close()

    def __call__(
        self, group: Group, on_video: Callable[[Tally], None] = lambda tally: None
    ) -> Tally:
        """Read, probe, transcode and pack the videos of a group, upload the shard, then its marker.

        on_video: called after each video with what became of those so far.

        Raises: StorageError if the store or the local temporary folder cannot be read or written.
        """
        tally = Tally()
        rejected: list[dict[str, str]] = []

        def samples() -> Iterator[Sample]:
            for video, result in examined:
                tally.count(result)
                on_video(tally)
                if isinstance(result, Rejected):
                    row = {"key": video.key, "where": video.where}
                    rejected.append({**row, "reason": result.reason, "detail": result.detail})
                else:
                    yield result

        job = self._job
        with contextlib.closing(self._examiners.map(group.videos)) as examined:
            entry = pack(samples(), job.url, group.name)
        digest = markers.group_digest(group, job.options_digest)
        marker = Marker(digest, entry, tally, tuple(rejected), group.keys, group.digests)
        markers.store(job.url, group.number, marker)
        return tally
