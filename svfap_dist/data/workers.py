"""From a packed sample to clips in a batch's memory: done by processes beside the rank.

In: a `Task`, a sample's bytes and the names of the random streams that cut it. Out: uint8 frames
(RGB, or planes that the device converts), written straight into memory that the rank shares, and
how that went. A video that hangs its decoder or brings it down costs one sample: the worker is
killed, the next task starts another. Without workers the rank's own threads do the same work by the
same code, so the bits are the same.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.config import Config
from svfap_dist.data.augment import augment
from svfap_dist.data.clips import fixed_cut, multi_clip_cut, random_cut
from svfap_dist.data.shared_arrays import SharedArrays
from svfap_dist.errors import ClusterError, DecodeError
from svfap_dist.parallel.child import ChildProcess, CrashedError, HungError
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import BadSample, PackedSample, Sample, unpack
from svfap_dist.video.color import kind_of, to_rgb
from svfap_dist.video.frames import Frames, WrongSizeError, YuvFrames
from svfap_dist.video.views import Crop

Key = tuple[int | str, ...]  # of a random stream
_WORKER_BYTES = 8 << 30  # address space of a worker beside the shared memory


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which clips to cut out of a sample, and where to put them.

    window: key of the stream that chooses the random window; None: the fixed clips of evaluation,
    one in pre-training, those of multi-clip testing for a task. crops: keys of the streams of each
    clip's crop. batch, row: where the first clip goes in the shared arrays; the others follow it.
    augments: keys of the streams of each clip's augmentation; none: clips are left as they are.
    """

    window: Key | None
    crops: tuple[Key, ...]
    batch: int
    row: int
    augments: tuple[Key, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Clips to be cut out of a packed sample."""

    packed: PackedSample
    cut: Cut


@dataclasses.dataclass(frozen=True)
class Outcome:
    """bad: why there are no clips; None: they are in the shared arrays. shares: what each clip
    counts in the scores of its sample, for as many as were made; they add up to 1."""

    bad: BadSample | None
    seconds: float  # of opening, decoding and cutting
    shares: tuple[float, ...] = ()


class Cutter:
    """Does tasks in whichever process it is called; may be sent to one that is being started."""

    def __init__(self, config: Config, shared: SharedArrays) -> None:
        self._config, self._shared = config, shared

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A worker starts. What loads slowly is loaded now, not in the time of its first task."""
        self.__dict__.update(state)
        keep_freed_memory()  # clip after clip asks for the same large arrays
        if "rgb" in self._shared.arrays:
            import torch  # resizes; planes need none

            torch.set_num_threads(1)

    def __call__(self, task: Task) -> Outcome:
        """Do a task."""
        began = time.perf_counter()
        done = self._cut(task)
        bad, shares = (done, ()) if isinstance(done, BadSample) else (None, done)
        return Outcome(bad, time.perf_counter() - began, shares)

    def _cut(self, task: Task) -> BadSample | tuple[float, ...]:
        """Write the clips of a task to their places; the share of each."""
        sample = unpack(task.packed)
        if isinstance(sample, BadSample):
            return sample
        shares: list[float] = []
        try:
            for frames, crop, share in self._clips(task.cut, sample):
                self._put(frames, crop, task.cut, len(shares))
                shares.append(share)
        except DecodeError as error:
            return undecodable(sample, error)
        except MemoryError:
            return BadSample(sample.index, sample.key, "too_large", "memory of the worker is full")
        return tuple(shares)

    def _clips(self, cut: Cut, sample: Sample) -> Iterator[tuple[Frames, Crop, float]]:
        video, info, config = sample.video, sample.info, self._config
        if cut.window is None and config.task is not None:
            yield from multi_clip_cut(video, info, config)
            return
        if cut.window is None:
            frames, crops = fixed_cut(video, info, config)
        else:
            streams = [Stream(*key) for key in cut.crops]
            frames, crops = random_cut(video, info, config, Stream(*cut.window), streams)
        for crop in crops:
            yield frames, crop, 1 / len(crops)

    def _put(self, frames: Frames, crop: Crop, cut: Cut, number: int) -> None:
        """Write the clip `number` of a sample to its place."""
        arrays, batch, row = self._shared.arrays, cut.batch, cut.row + number
        if "rgb" in arrays:
            clip = to_rgb(frames, crop, self._config.data.frame_size)
            if cut.augments:
                clip = augment(clip, Stream(*cut.augments[number]), self._config.augment)
            arrays["rgb"][batch, row] = clip
            return
        assert isinstance(frames, YuvFrames), "only planes are handed over as planes"
        for name in ("y", "u", "v"):
            plane, place = getattr(frames, name), arrays[name][batch, row]
            height, width = plane.shape[1:]
            if height > place.shape[1] or width > place.shape[2]:
                raise WrongSizeError(
                    "Frames are larger than those of other samples",
                    found=f"{frames.y.shape[1:]}",
                    do="shard with one --size for all videos, or set data.colors=workers",
                )
            place[:, :height, :width] = plane
        arrays["crops"][batch, row] = dataclasses.astuple(crop)
        arrays["kinds"][batch, row] = kind_of(frames)


def undecodable(sample: Sample, error: DecodeError) -> BadSample:
    """What an error in decoding makes of a sample."""
    return BadSample(sample.index, sample.key, error.reason, str(error))


class _Several:
    """Does tasks one after the other: what a worker is sent at a time."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter

    def __call__(self, tasks: Sequence[Task]) -> list[Outcome]:
        return [self._cutter(task) for task in tasks]


_Worker = ChildProcess[Sequence[Task], list[Outcome]]


class Workers:
    """`data.decode_workers` processes that do tasks; any number of threads may call it.

    With none, the calling thread does the task itself. A worker is sent several tasks at a time:
    a clip takes about a millisecond, and to wake a process for it nearly as long again.
    """

    def __init__(self, config: Config, shared: SharedArrays) -> None:
        cutter, count = Cutter(config, shared), config.data.decode_workers
        self._cutter, self._seconds = cutter, config.data.decode_seconds
        memory = _WORKER_BYTES + shared.num_bytes
        self._all = [
            ChildProcess(_Several(cutter), seconds=self._seconds, memory_bytes=memory)
            for _ in range(count)
        ]
        self._started: set[int] = set()
        # The last one back goes out first: where two are enough, no third is started.
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._all:
            self._free.put(worker)
        self._closing = threading.Event()

    def interrupt(self) -> None:
        """End all tasks under way and take no more."""
        self._closing.set()
        for worker in self._all:
            worker.kill()

    def close(self) -> None:
        """End the processes, when no thread calls any more."""
        for worker in self._all:
            worker.close()

    def __call__(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Do tasks, as soon as a worker is free.

        Raises: ClusterError if workers cannot be started; CancelledError after `interrupt`.
        """
        if not self._all:
            return [self._cutter(task) for task in tasks]
        began = time.perf_counter()
        try:
            return self._sent(tasks)
        except HungError:
            reason, detail = "hung", f"the decoder gave no answer for {self._seconds:g} s"
        except CrashedError as error:
            reason, detail = "crashed", f"the decoder died: {error}"
        if len(tasks) > 1:  # one of them is to blame
            return [outcome for task in tasks for outcome in self([task])]
        return [self._failed(tasks[0], reason, detail, began)]

    def _sent(self, tasks: Sequence[Task]) -> list[Outcome]:
        worker = self._free.get()
        try:
            if self._closing.is_set():
                raise CancelledError
            if id(worker) not in self._started:
                self._start(worker)
            return worker(tasks)
        finally:
            self._free.put(worker)

    def _start(self, worker: _Worker) -> None:
        try:
            worker(())
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
