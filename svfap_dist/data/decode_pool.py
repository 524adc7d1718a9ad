"""Decode jobs in processes that can be killed, so that no video ends a run.

In: jobs from any number of threads. Out: their outcomes; a job whose process hung or died is a bad
sample. Decoders on the device (`device_worker`) are called in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from svfap_dist.data.clips import ClipWorker, DecodeJob, DecodeResult
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.processes import CrashedError, HungError, ProcessPool, StartError
from svfap_dist.shards.format import BadSample

_WORKER_BYTES = 8 << 30  # address space that a worker may use to decode


class ClipDecoder(Protocol):
    """Does decode jobs for any number of threads."""

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        """Do jobs and return their outcomes, in order.

        Args:
            jobs: Done together.
        """
        ...

    def interrupt(self) -> None:
        """Make jobs under way, and later ones, raise CancelledError."""
        ...

    def close(self) -> None:
        """End processes and threads, when no thread calls any more."""
        ...


class DecodePool:
    """Killable processes that do jobs; any number of threads may call it.

    A video that hangs or crashes its decoder costs one sample, and the next job a new process.
    Without processes, the calling thread does the job with the same code, so the bits are the same.

    Args:
        worker: Does jobs.
        num_processes: How many; 0: none.
        seconds: Deadline of a job.
        niceness: By how much their priority is below that of this process.
    """

    def __init__(
        self, worker: ClipWorker, num_processes: int, seconds: float, niceness: int = 0
    ) -> None:
        self._worker, self._seconds = worker, seconds
        self._pool: ProcessPool[Sequence[DecodeJob], list[DecodeResult]] | None = None
        if num_processes:
            self._pool = ProcessPool(
                worker,
                num_processes,
                seconds=seconds,
                memory_bytes=_WORKER_BYTES,
                niceness=niceness,
            )

    def interrupt(self) -> None:
        """See `ClipDecoder.interrupt`; the processes are killed."""
        if self._pool:
            self._pool.kill()

    def close(self) -> None:
        """See `ClipDecoder.close`."""
        if self._pool:
            self._pool.close()

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        """Do jobs in the next idle worker.

        Args:
            jobs: Sent together.

        Raises:
            ClusterError: Workers cannot be started.
            CancelledError: After `interrupt`.
        """
        if self._pool is None:
            return self._worker(jobs)
        began = time.perf_counter()
        try:
            return self._pool(jobs)
        except StartError as error:
            what = "Decode workers cannot be started"
            do = "see what the worker wrote to standard error; a training script needs "
            do += '`if __name__ == "__main__":` around its calls'
            raise ClusterError(what, "data.decode_workers", str(error), do) from error
        except HungError:
            reason, detail = "hung", f"the decoder gave no answer for {self._seconds:g} s"
        except CrashedError as error:
            reason, detail = "crashed", f"the decoder died: {error}"
        if len(jobs) > 1:  # one of them is the cause: find it
            return [result for job in jobs for result in self([job])]
        bad = BadSample(jobs[0].packed.index, jobs[0].packed.key, reason, detail)
        return [DecodeResult(bad, time.perf_counter() - began)]
