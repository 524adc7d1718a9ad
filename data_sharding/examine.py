"""One video of a source -> a sample for a shard, or why there is none: read, probed, transcoded.

Whatever a video does to the code that looks at it, it does to a process of its own, with a time
limit and a memory limit. A video that hangs or crashes it gets a second chance, for a machine that
was short of memory or time says nothing about a video; after that it is left out like any other
that is broken. Such a process lives on from video to video.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import signal
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

from data_sharding.probe import MIN_FRAMES, Limits, Reason, Rejected, probe
from data_sharding.sources import SourceVideo
from data_sharding.transcode import TrainProfile, TranscodeError, transcode
from svfap_dist.isolated import CrashedError, HungError, Isolated
from svfap_dist.shard_format import VideoInfo
from svfap_dist.storage import StorageMissing

_AHEAD = 2  # videos in memory per process: one being examined, one done and waiting


@dataclasses.dataclass(frozen=True)
class Making:
    """What becomes of each video. train: None for the profile `source`, bytes untouched."""

    min_frames: int = MIN_FRAMES
    limits: Limits = dataclasses.field(default_factory=Limits)
    train: TrainProfile | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video that goes into a shard. num_read: bytes of the source's file."""

    key: str
    suffix: str
    data: bytes
    info: VideoInfo
    num_read: int = 0


class Examiners:
    """Processes that turn videos into samples; started when needed, kept until closed.

    It can be sent to another process before its first use.
    """

    def __init__(self, making: Making, processes: int = 1) -> None:
        self._making, self._processes = making, processes
        self._calls = self._fresh_calls()

    def _fresh_calls(self) -> list[Isolated[SourceVideo, Sample | Rejected]]:
        limits, work = self._making.limits, functools.partial(examine, self._making)
        return [
            Isolated(work, seconds=limits.seconds, memory_bytes=limits.memory_bytes)
            for _ in range(self._processes)
        ]

    def each(
        self, videos: Iterable[SourceVideo]
    ) -> Generator[tuple[SourceVideo, Sample | Rejected]]:
        """Each video, in order, and the sample it makes or why it makes none. The processes are a
        little ahead, so that memory does not grow with the number of videos.

        Raises: StorageError if the store fails, other than by not having a file.
        """
        waiting: collections.deque[tuple[SourceVideo, Future[Sample | Rejected]]]
        waiting, rest, idle = collections.deque(), iter(videos), list(self._calls)
        pool = ThreadPoolExecutor(self._processes)

        def one(video: SourceVideo) -> Sample | Rejected:
            call = idle.pop()
            try:
                return _guarded(call, self._making.limits, video)
            finally:
                idle.append(call)

        try:
            while True:
                for video in itertools.islice(rest, _AHEAD * self._processes - len(waiting)):
                    waiting.append((video, pool.submit(one, video)))
                if not waiting:
                    return
                video, future = waiting.popleft()
                yield video, future.result()
        finally:
            if waiting:  # nobody wants the rest
                self.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """End the processes, whatever they do."""
        ending, self._calls = self._calls, self._fresh_calls()
        for call in ending:
            call.kill()
        for call in ending:
            call.close()


def _guarded(
    call: Isolated[SourceVideo, Sample | Rejected], limits: Limits, video: SourceVideo
) -> Sample | Rejected:
    if video.misfit:
        return Rejected("misplaced", video.misfit)
    if video.num_bytes > limits.file_bytes:
        return Rejected("too_big", f"{video.num_bytes} bytes, more than {limits.file_bytes}")
    first = _attempt(call, limits, video)
    if isinstance(first, Rejected) and first.reason in ("hung", "crashed"):
        return _attempt(call, limits, video)
    return first


def _attempt(
    call: Isolated[SourceVideo, Sample | Rejected], limits: Limits, video: SourceVideo
) -> Sample | Rejected:
    try:
        more_seconds = limits.seconds_per_mib * video.num_bytes / 2**20
        return call(video, more_seconds=more_seconds)
    except HungError as error:
        return Rejected("hung", str(error))
    except CrashedError as error:
        return Rejected("crashed", str(error))


def examine(making: Making, video: SourceVideo) -> Sample | Rejected:
    """Read a video, probe it and, for the profile `train`, transcode it; may hang or crash.

    Raises: StorageError if the store fails, other than by not having the file.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    try:
        data = video.read()
        info = probe(data, making.min_frames, making.limits)
        if isinstance(info, Rejected):
            return info
        info = dataclasses.replace(info, labels=video.labels)
        if making.train is None:
            return Sample(video.key, video.suffix, data, info, len(data))
        stored, info = transcode(data, info, making.train)
        return Sample(video.key, "mp4", stored, info, len(data))
    except StorageMissing as error:
        return Rejected("missing", str(error))
    except TranscodeError as error:
        return Rejected(cast(Reason, error.reason), error.found)
    except MemoryError as error:
        limit = making.limits.memory_bytes
        return Rejected("out_of_memory", f"more than {limit} bytes {error}".rstrip())
