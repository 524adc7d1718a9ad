"""Process videos in child processes, which a video may hang, crash or fill up.

In: videos and a function of one. Out: each video with its result, in order. The code that reads a
video runs in a child process with a time limit and a memory limit, which lives on from video to
video. A video that hangs or crashes it gets a second chance, for a machine that was short of memory
or time says nothing about the video; after that it is rejected, and the others are processed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Generic, TypeVar

from data_sharding.sources import SourceVideo
from svfap_dist.parallel.processes import CrashedError, HungError, ProcessPool, ordered_map
from svfap_dist.video.probe import Limits, Reason

_ATTEMPTS = 2
_AHEAD = 2  # videos in memory per process: one at work, one done and waiting
_Result = TypeVar("_Result")


class VideoPool(Generic[_Result]):
    """Processes that work on videos: started on demand, kept until closed; picklable until then.

    Args:
        work: Video -> result; picklable. `map` raises what it raises.
        limits: Limits of time and memory.
        reject: Video, reason and what was seen -> the result of one that hung or crashed twice.
        processes: How many work at a time.
    """

    def __init__(
        self,
        work: Callable[[SourceVideo], _Result],
        limits: Limits,
        reject: Callable[[SourceVideo, Reason, str], _Result],
        processes: int = 1,
    ) -> None:
        self._work, self._limits, self._reject = work, limits, reject
        self._processes = processes
        self._pool: ProcessPool[SourceVideo, _Result] | None = None

    def map(self, videos: Iterable[SourceVideo]) -> Generator[tuple[SourceVideo, _Result]]:
        """Yield each video with its result, in order; few are in flight, so memory is bounded.

        Args:
            videos: Taken as the processes get to them.
        """
        limits = self._limits
        pool = self._pool = self._pool or ProcessPool(
            self._work, self._processes, seconds=limits.seconds, memory_bytes=limits.memory_bytes
        )

        def attempt(video: SourceVideo) -> _Result:
            reason: Reason = "crashed"
            found = ""
            more_seconds = limits.seconds_per_mib * video.num_bytes / 2**20
            for _ in range(_ATTEMPTS):
                try:
                    return pool(video, more_seconds=more_seconds)
                except HungError as error:
                    reason, found = "hung", str(error)
                except CrashedError as error:
                    reason, found = "crashed", str(error)
            return self._reject(video, reason, found)

        threads = self._processes
        try:
            yield from ordered_map(
                attempt, videos, threads=threads, limit=_AHEAD * threads, stop=pool.kill
            )
        except BaseException:  # GeneratorExit too: the processes were killed
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do; a later `map` starts others."""
        if pool := self._pool:
            self._pool = None
            pool.close()
