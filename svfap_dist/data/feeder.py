"""Feeder processes: they fill a rank's batches, so that its own process only receives them.

In: a rank's `DataSource`, its ring's shared memory, a range of steps. Out: the `FilledBatch`es of
the steps, in order. Each feeder fills an equal part of the rank's lanes in every batch, with decode
workers and a cache of its own. It gets a message when a buffer is free, and sends one when its part
of a batch is filled: the training thread has no other work per batch, and none per clip.

What a part holds follows from the step alone. So a feeder that dies is replaced by one that fills
its batches again; the others are not affected. Feeders and their workers form a process group
of their own and ignore the signals that stop a run: the rank catches those, saves a checkpoint and
ends its feeders by closing their pipes. A feeder whose rank has died exits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import queue
import signal
import threading
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from svfap_dist import logs, storage
from svfap_dist.data.clips import ClipWorker, SharedArrays
from svfap_dist.data.filler import (
    BatchFiller,
    DataSource,
    FilledBatch,
    Part,
    PendingBatch,
    open_filler,
)
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.processes import exit_with_parent, start_process
from svfap_dist.video.backends import capabilities

_CLOSED = (EOFError, OSError)  # raised by a pipe whose other end is closed
_MAX_DEATHS = 3  # in a row at the same step
_CLOSING_SECONDS = 5.0  # for reads under way to end

log = logging.getLogger(__name__)


def num_feeders(source: DataSource) -> int:
    """Return the number of a rank's feeders: at most data.feeders, and equal parts of its lanes.

    Args:
        source: The rank's data; a batched backend decodes in the rank's process, without feeders.
    """
    config = source.config
    if not config.data.feeders or capabilities(config.decode.backend).batched:
        return 0
    lanes = config.data.num_lanes // source.world.world_size
    return max(n for n in range(1, min(config.data.feeders, lanes) + 1) if lanes % n == 0)


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """What a feeder process fills; picklable only for a process that is started with it."""

    source: DataSource
    shared: SharedArrays  # the ring
    finished: SharedArrays  # "finished": the step after the last one that is filled
    part: Part
    worker: type[ClipWorker]
    steps: range  # all steps of the ring: the n-th uses buffer n % length
    length: int
    first: int  # the first step to fill
    free: int  # steps from `first` on whose buffers are free
    parent: int
    has_logs: bool


class Feeder:
    """A part of a rank's batches, filled by a process that is restarted if it dies.

    Args:
        source: The rank's data.
        shared: Arrays of the ring.
        length: Buffers of the ring.
        steps: To fill; the n-th of them in buffer n % length.
        part: Number of this feeder and how many there are.
        worker: Class that decodes.
    """

    def __init__(
        self,
        source: DataSource,
        shared: SharedArrays,
        length: int,
        steps: range,
        part: Part = (0, 1),
        worker: type[ClipWorker] = ClipWorker,
    ) -> None:
        self._next, self._free_until = steps.start, steps.start + length  # steps
        self._finished = SharedArrays({"finished": ("int64", (1,))})
        self._progress = memoryview(cast(Any, self._finished.arrays["finished"]))
        self._deaths = 0
        self._assignment = _Assignment(
            source,
            shared,
            self._finished,
            part,
            worker,
            steps,
            length,
            first=steps.start,
            free=length,
            parent=os.getpid(),
            has_logs=logs.is_set_up(),
        )
        self._start()

    def _start(self) -> None:
        task = dataclasses.replace(
            self._assignment, first=self._next, free=self._free_until - self._next
        )
        self._progress[0] = self._next
        self._process, self._pipe = start_process(_serve, (task,), may_have_children=True)

    @property
    def num_ready(self) -> int:
        """Return how many batches are filled, without a gap."""
        return max(self._progress[0] - self._next, 0)

    def release(self) -> None:
        """Start to fill the next batch: a buffer is free."""
        self._free_until += 1
        with contextlib.suppress(OSError):  # it has died, which `receive` finds
            self._pipe.send_bytes(b"")

    def receive(self) -> FilledBatch:
        """Wait until the next batch is filled.

        Raises:
            ShardError, StorageError, HealthError, ConfigError: As `BatchFiller` raises them.
            ClusterError: Decode workers cannot be started, or the feeder dies again and again.
        """
        while True:
            try:
                answer = self._pipe.recv()
                break
            except _CLOSED:
                self._restart()
        if isinstance(answer, BaseException):
            raise answer
        self._next, self._deaths = self._next + 1, 0
        filled, requests = answer
        if requests is not None:
            storage.add_request_counts(requests)
        return filled

    def _restart(self) -> None:
        found = self._end(0.0)
        self._deaths += 1
        if self._deaths == _MAX_DEATHS:
            what, where = "Feeder process keeps failing", f"data.feeders, step {self._next}"
            found = f"it {found} {_MAX_DEATHS} times in a row"
            do = "see what it wrote to standard error; if memory is short, lower data.shuffle_block"
            do += " or data.prefetch_bytes; a training script needs "
            do += '`if __name__ == "__main__":` around its calls'
            raise ClusterError(what, where, found, do)
        log.warning(
            "Feeder process of step %d %s; a new one refills its batches.", self._next, found
        )
        self._start()

    def close(self) -> None:
        """End the process and its decode workers."""
        self._end(_CLOSING_SECONDS)
        self._finished.close()

    def _end(self, seconds: float) -> str:
        """End the process, by force after some seconds, and return how it ended."""
        process = self._process
        assert process.pid is not None, "it was started"
        self._pipe.close()
        wait([process.sentinel], seconds)
        # Its group before it is reaped: after that, the system may reuse the number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        return f"ended with code {process.exitcode}"


def _serve(task: _Assignment, pipe: Connection) -> None:
    """Fill batches until the pipe is closed; runs in the feeder process."""
    os.setpgid(0, 0)
    threading.Thread(target=exit_with_parent, args=(task.parent,), daemon=True).start()
    if task.has_logs:
        logs.set_up()
    outcomes: queue.SimpleQueue[PendingBatch | Exception] = queue.SimpleQueue()
    filler = None
    try:
        filler = open_filler(task.source, task.shared, task.part, task.worker)
        sender = threading.Thread(target=_send, args=(filler, task, outcomes, pipe), daemon=True)
        sender.start()
        for number, step in enumerate(range(task.first, task.steps.stop)):
            if number >= task.free:
                pipe.recv_bytes()
            outcomes.put(filler.start(step, (step - task.steps.start) % task.length))
    except _CLOSED:  # the rank has closed the pipe
        pass
    except Exception as error:  # raised again in the rank
        if filler is None:
            pipe.send(_portable(error))
        outcomes.put(error)
    with contextlib.suppress(*_CLOSED):
        while True:
            pipe.recv_bytes()
    if filler is not None:
        filler.close()
    os._exit(0)


def _send(
    filler: BatchFiller,
    task: _Assignment,
    outcomes: queue.SimpleQueue[PendingBatch | Exception],
    pipe: Connection,
) -> None:
    """Send batches as they are filled, up to the first error; a thread of the feeder process."""
    counted, finished = storage.request_counts(), task.finished.arrays["finished"]
    with contextlib.suppress(OSError):  # the rank has closed the pipe
        while True:
            outcome = outcomes.get()
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                filled, before = filler.finish(outcome), counted
            except Exception as error:  # raised again in the rank
                pipe.send(_portable(error))
                return
            counted = storage.request_counts()
            finished[0] = outcome.step + 1
            pipe.send((filled, counted.since(before)))


def _portable(error: Exception) -> Exception:
    """Return the exception, or one of the same text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
