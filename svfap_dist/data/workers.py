"""From a packed sample to clips in a batch's memory: done by processes beside the rank.

In: a `Task`, a sample's bytes and the names of the random streams that cut it. Out: uint8 frames,
written straight into memory that the rank shares, and how that went. A video that hangs its
decoder or brings it down costs one sample: the worker is killed, the next task starts another.
Without workers the rank's own threads do the same work by the same code, so the bits are the same.

Shared memory is anonymous (memfd): workers inherit its descriptor, nothing in it has a name that
could be left behind, and it does not count against the size of /dev/shm, which containers keep
small.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import queue
import threading
import time
from concurrent.futures import CancelledError
from multiprocessing import reduction
from typing import Any

import numpy as np

from svfap_dist.config import Config
from svfap_dist.data.clips import fixed_clip, random_clips
from svfap_dist.data.decode_cpu import TooShortError, WrongSizeError
from svfap_dist.data.stream import BadSample, PackedSample, unpack
from svfap_dist.errors import ClusterError, ConfigError, DecodeError
from svfap_dist.isolated import CrashedError, HungError, Isolated
from svfap_dist.rng import Stream

Key = tuple[int | str, ...]  # of a random stream
_REASONS = {TooShortError: "too_short", WrongSizeError: "wrong_size"}
_WORKER_BYTES = 8 << 30  # address space of a worker beside the shared memory


class SharedBlock:
    """Anonymous memory that processes started from this one see, too.

    bytes: all of it, uint8 [N]; it lives as long as an array on it.

    Raises: ConfigError if there is no room for it.
    """

    def __init__(self, num_bytes: int, descriptor: int | None = None) -> None:
        try:
            if descriptor is None:
                descriptor = os.memfd_create("svfap-clips")
                os.ftruncate(descriptor, num_bytes)
            self.bytes = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
        except (OSError, ValueError) as error:
            raise ConfigError(
                "No memory for batches",
                where="data.prefetch_bytes",
                found=f"{num_bytes} bytes cannot be shared between processes ({error})",
                do="make data.prefetch_bytes or the batch smaller",
            ) from error
        self._descriptor = descriptor

    def __reduce__(self):  # sent to a process that is being started
        shared = reduction.DupFd(self._descriptor)
        return _attach, (len(self.bytes), shared)

    def close(self) -> None:
        """No more processes can be given it."""
        os.close(self._descriptor)


def _attach(num_bytes: int, shared: Any) -> SharedBlock:
    return SharedBlock(num_bytes, shared.detach())


@dataclasses.dataclass(frozen=True)
class Task:
    """Clips to be cut out of a sample.

    window: key of the stream that chooses the random window; None: the fixed clip of evaluation.
    crops: keys of the streams of each clip's crop. offset: where the first clip goes in the block;
    the others follow it.
    """

    packed: PackedSample
    window: Key | None
    crops: tuple[Key, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """bad: why there are no clips; None: they are in the block."""

    bad: BadSample | None
    seconds: float  # of opening, decoding and cutting


class Cutter:
    """Does tasks in whichever process it is called; may be sent to one that is being started."""

    def __init__(self, config: Config, block: SharedBlock) -> None:
        self._config, self._block = config, block

    def __call__(self, task: Task | None) -> Outcome:
        """Do a task; None: nothing, to see whether the process is there."""
        began = time.perf_counter()
        bad = self._cut(task) if task else None
        return Outcome(bad, time.perf_counter() - began)

    def _cut(self, task: Task) -> BadSample | None:
        sample = unpack(task.packed)
        if isinstance(sample, BadSample):
            return sample
        try:
            if task.window is None:
                clips = [fixed_clip(sample.video, sample.info, self._config)]
            else:
                window, crops = Stream(*task.window), [Stream(*key) for key in task.crops]
                clips = random_clips(sample.video, sample.info, self._config, window, crops)
        except DecodeError as error:
            reason = _REASONS.get(type(error), "undecodable")
            return BadSample(sample.index, sample.key, reason, str(error))
        except MemoryError:
            return BadSample(sample.index, sample.key, "too_large", "memory of the worker is full")
        start = task.offset
        for clip in clips:
            pixels = np.asarray(clip)
            self._block.bytes[start : start + pixels.size] = pixels.reshape(-1)
            start += pixels.size
        return None


class Workers:
    """`data.decode_workers` processes that do tasks; any number of threads may call it.

    With none, the calling thread does the task itself.
    """

    def __init__(self, config: Config, block: SharedBlock) -> None:
        cutter, count = Cutter(config, block), config.data.decode_workers
        self._cutter, self._seconds = cutter, config.data.decode_seconds
        memory = _WORKER_BYTES + len(block.bytes)
        self._all = [
            Isolated(cutter, seconds=self._seconds, memory_bytes=memory) for _ in range(count)
        ]
        self._started: set[int] = set()
        # The last one back goes out first: where two are enough, no third is started.
        self._free: queue.LifoQueue[Isolated[Task | None, Outcome]] = queue.LifoQueue()
        for worker in self._all:
            self._free.put(worker)
        self._closing = threading.Event()

    def interrupt(self) -> None:
        """End all tasks under way and take no more."""
        self._closing.set()
        for worker in self._all:
            worker.interrupt()

    def close(self) -> None:
        """End the processes, when no thread calls any more."""
        for worker in self._all:
            worker.close()

    def __call__(self, task: Task) -> Outcome:
        """Do a task, as soon as a worker is free.

        Raises: ClusterError if workers cannot be started; CancelledError after `interrupt`.
        """
        if not self._all:
            return self._cutter(task)
        worker, began = self._free.get(), time.perf_counter()
        try:
            if self._closing.is_set():
                raise CancelledError
            if id(worker) not in self._started:
                self._start(worker)
            began = time.perf_counter()
            return worker(task)
        except HungError:
            detail = f"the decoder gave no answer for {self._seconds:g} s"
            return self._failed(task, "hung", detail, began)
        except CrashedError as error:
            return self._failed(task, "crashed", f"the decoder died: {error}", began)
        finally:
            self._free.put(worker)

    def _start(self, worker: Isolated[Task | None, Outcome]) -> None:
        try:
            worker(None)
        except (HungError, CrashedError) as error:
            raise ClusterError(
                "Decode workers cannot be started",
                where="data.decode_workers",
                found=str(error),
                do="see what the worker wrote to standard error; a script that trains needs "
                '`if __name__ == "__main__":` around what it does',
            ) from error
        self._started.add(id(worker))

    def _failed(self, task: Task, reason: str, detail: str, began: float) -> Outcome:
        bad = BadSample(task.packed.index, task.packed.key, reason, detail)
        return Outcome(bad, time.perf_counter() - began)
