"""Reading and probing many videos: in this process, or in several, with the same result.

Order is kept, and only a few videos per worker are in flight, so memory does not grow with the data
set. Workers are spawned, not forked: a forked copy of an S3 client hangs.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import multiprocessing
import signal
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from data_sharding.probe import Rejected, probe
from data_sharding.sources import SourceVideo
from svfap_dist.errors import ShardError
from svfap_dist.shard_format import VideoInfo
from svfap_dist.storage import StorageMissing

_IN_FLIGHT_PER_WORKER = 2  # one being probed, one read and waiting


@dataclasses.dataclass(frozen=True)
class Probed:
    """A video, its bytes (none if it is left out), and what the probe said."""

    video: SourceVideo
    data: bytes
    result: VideoInfo | Rejected


def probe_all(videos: Iterable[SourceVideo], min_frames: int, workers: int) -> Generator[Probed]:
    """Read and probe videos, in their order; `workers` up to 1 means in this process.

    Raises: StorageError if the store fails; ShardError if a worker process dies.
    """
    if workers <= 1:
        for video in videos:
            yield Probed(video, *_read_and_probe(video, min_frames))
        return
    waiting: collections.deque[tuple[SourceVideo, Future[tuple[bytes, VideoInfo | Rejected]]]]
    waiting, rest = collections.deque(), iter(videos)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_leave_ctrl_c_to_the_parent
    )
    try:
        while True:
            room = workers * _IN_FLIGHT_PER_WORKER - len(waiting)
            for video in itertools.islice(rest, room):
                waiting.append((video, pool.submit(_read_and_probe, video, min_frames)))
            if not waiting:
                return
            video, future = waiting[0]
            probed = Probed(video, *future.result())
            waiting.popleft()
            yield probed
    except BrokenProcessPool as error:
        keys = ", ".join(video.key for video, _ in waiting)
        raise ShardError(
            "A worker process died while probing videos",
            where=f"one of {keys}",
            found="killed from outside, out of memory, or crashed by a video",
            do="run again with --workers 1 to see which; move a video that crashes it away",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_and_probe(video: SourceVideo, min_frames: int) -> tuple[bytes, VideoInfo | Rejected]:
    if video.misfit:
        return b"", Rejected("misplaced", video.misfit)
    try:
        data = video.read()
    except StorageMissing as error:
        return b"", Rejected("missing", str(error))
    result = probe(data, min_frames)
    return (b"" if isinstance(result, Rejected) else data), result
