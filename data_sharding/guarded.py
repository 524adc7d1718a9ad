"""Work on one video after the other, by processes that a video may hang, crash or fill up.

Whatever a video does to the code that looks at it, it does to a process of its own, with a time
limit and a memory limit. A video that hangs or crashes it gets a second chance, for a machine that
was short of memory or time says nothing about a video; after that it is given up, and the rest goes
on. Such a process lives on from video to video.
"""

from __future__ import annotations

import collections
import functools
import itertools
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from data_sharding.sources import SourceVideo
from svfap_dist.parallel.child import CrashedError, HungError, Isolated
from svfap_dist.video.probe import Limits, Reason

_ATTEMPTS = 2
_AHEAD = 2  # videos in memory per process: one at work, one done and waiting
_Result = TypeVar("_Result")


class Guarded(Generic[_Result]):
    """Processes that work on videos; started when needed, kept until closed.

    It can be sent to another process before its first use.

    Args:
        work: video -> result; picklable. What it raises is raised in `each`.
        limits: of time and memory.
        give_up: video, reason and what was seen -> the result of one that hung or crashed twice.
    """

    def __init__(
        self,
        work: Callable[[SourceVideo], _Result],
        limits: Limits,
        give_up: Callable[[SourceVideo, Reason, str], _Result],
        processes: int = 1,
    ) -> None:
        self._work, self._limits, self._give_up = work, limits, give_up
        self._processes = processes
        self._calls = self._fresh_calls()

    def _fresh_calls(self) -> list[Isolated[SourceVideo, _Result]]:
        limits, work = self._limits, functools.partial(_uninterrupted, self._work)
        return [
            Isolated(work, seconds=limits.seconds, memory_bytes=limits.memory_bytes)
            for _ in range(self._processes)
        ]

    def each(self, videos: Iterable[SourceVideo]) -> Generator[tuple[SourceVideo, _Result]]:
        """Each video, in order, and its result. The processes are a little ahead, so that memory
        does not grow with the number of videos.

        Raises: what the work raises.
        """
        waiting: collections.deque[tuple[SourceVideo, Future[_Result]]]
        waiting, rest, idle = collections.deque(), iter(videos), list(self._calls)
        pool = ThreadPoolExecutor(self._processes)

        def one(video: SourceVideo) -> _Result:
            call = idle.pop()
            try:
                return self._attempted(call, video)
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

    def _attempted(self, call: Isolated[SourceVideo, _Result], video: SourceVideo) -> _Result:
        reason: Reason = "crashed"
        found = ""
        for _ in range(_ATTEMPTS):
            try:
                more_seconds = self._limits.seconds_per_mib * video.num_bytes / 2**20
                return call(video, more_seconds=more_seconds)
            except HungError as error:
                reason, found = "hung", str(error)
            except CrashedError as error:
                reason, found = "crashed", str(error)
        return self._give_up(video, reason, found)

    def close(self) -> None:
        """End the processes, whatever they do."""
        ending, self._calls = self._calls, self._fresh_calls()
        for call in ending:
            call.kill()
        for call in ending:
            call.close()


def _uninterrupted(work: Callable[[SourceVideo], _Result], video: SourceVideo) -> _Result:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    return work(video)
