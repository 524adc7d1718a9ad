"""A batch of clips, and the ring of buffers, threads and worker processes that fills batches ahead.

In: the recipe and the number of clips of a batch. Out: memory that workers write frames to and the
rank reads tensors from, and a thread pool for the loader's tasks. A buffer is free again when the
batch after its own is requested, so the ring bounds the memory of everything that is prefetched.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from svfap_dist.config import Config, DataConfig
from svfap_dist.data.clips import (
    ClipRequest,
    ClipWorker,
    DecodeJob,
    DecodeResult,
    Shapes,
    SharedArrays,
)
from svfap_dist.data.device_worker import DeviceClipWorker
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.processes import CrashedError, HungError, ProcessPool, StartError
from svfap_dist.shards.format import BadSample
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video.backends import capabilities
from svfap_dist.video.frames import YuvClips

_MAX_SLOTS_PER_TASK = 16
_MIN_PREFETCH, _MAX_PREFETCH = 2, 16  # batches; more than a few gain nothing
_WORKER_BYTES = 8 << 30  # address space of a worker process, beside the shared memory


@dataclasses.dataclass(frozen=True)
class ClipBatch:
    """A rank's clips of one step, in slot order.

    A slot has one clip, or data.repeated_sampling consecutive clips of one sample: B clips in all.
    Lists have an entry per slot.
    """

    frames: torch.Tensor | YuvClips  # uint8 [B, F, H, W, 3], or planes; see `frames_on`
    visible: torch.Tensor  # int64 [B, V], tokens that the encoder sees
    masked: torch.Tensor  # int64 [B, M], tokens that the decoder predicts
    keys: list[str]  # of the samples that the order chose
    samples: list[int]  # their global indices
    lanes: list[int]
    positions: list[int]  # in the lane
    substituted: list[bool]  # the frames are those of a neighbor, because the sample is bad
    bad: list[BadSample]
    fetch_seconds: float  # summed over the clips, as spent by threads
    decode_seconds: float  # summed over the clips, as spent by threads or workers
    bytes_fetched: int = 0  # from the store, since the batch before
    batches_ready: int = 0  # prefetched when this one was requested, itself included
    # Targets of the clips shown, substituted or not: classes int64 [B], or values float32 [B, K].
    targets: torch.Tensor | None = None

    def frames_on(self, device: torch.device, part: slice) -> torch.Tensor:
        """Return frames of some clips on a device: uint8 RGB [B, F, H, W, 3].

        Args:
            device: Where to copy them, asynchronously.
            part: Which of the clips.
        """
        frames = self.frames[part]
        if isinstance(frames, torch.Tensor):
            return frames.to(device, non_blocking=True)
        return frames.to_rgb(device)


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """Outcome of reading a sample and cutting clips from it; bad data is a value."""

    index: int
    key: str
    bad: BadSample | None  # None: the clips are in their rows
    fetch_seconds: float
    decode_seconds: float = 0.0


class DecodePool:
    """`data.decode_workers` killable processes that do jobs; any number of threads may call it.

    A video that hangs or crashes its decoder costs one sample, and the next job a new process.
    Without workers, the calling thread does the job with the same code, so the bits are the same.

    Args:
        worker: Does jobs.
        data: Number of processes, deadline of a job.
        shared_bytes: Size of the shared memory, which counts as address space of each worker.
    """

    def __init__(self, worker: ClipWorker, data: DataConfig, shared_bytes: int) -> None:
        self._worker, self._seconds = worker, data.decode_seconds
        self._pool: ProcessPool[Sequence[DecodeJob], list[DecodeResult]] | None = None
        if data.decode_workers:
            self._pool = ProcessPool(
                worker,
                data.decode_workers,
                seconds=data.decode_seconds,
                memory_bytes=_WORKER_BYTES + shared_bytes,
            )

    def interrupt(self) -> None:
        """Kill the processes: jobs under way, and later ones, raise CancelledError."""
        if self._pool:
            self._pool.kill()

    def close(self) -> None:
        """End the processes, when no thread calls the pool any more."""
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


def array_shapes(
    data: DataConfig, length: int, clips: int, planes: tuple[int, int] | None = None
) -> Shapes:
    """Return the arrays for the frames of batches: `rgb`, or those of `YuvClips`.

    Args:
        data: Size of clips.
        length: Number of batches.
        clips: Clips per batch.
        planes: Largest height and width of planes; None: RGB.
    """
    batch = (length, clips)
    if planes is None:
        return {"rgb": ("uint8", (*batch, data.num_frames, data.frame_size, data.frame_size, 3))}
    height, width = planes
    half = (*batch, data.num_frames, (height + 1) // 2, (width + 1) // 2)
    return {
        "y": ("uint8", (*batch, data.num_frames, height, width)),
        "u": ("uint8", half),
        "v": ("uint8", half),
        "crops": ("int64", (*batch, 4)),
        "kinds": ("int64", batch),
    }


def ring_length(data: DataConfig, clips: int, planes: tuple[int, int] | None = None) -> int:
    """Return the number of batches that `data.prefetch_bytes` allows, plus the one in use.

    Args:
        data: Size of clips, prefetch limit.
        clips: Clips per batch.
        planes: Largest height and width of planes; None: RGB.
    """
    ((_, one), *_) = array_shapes(data, 1, clips, planes).values()
    batch_bytes = math.prod(one) if planes is None else math.prod(one) * 3 // 2
    return 1 + min(max(data.prefetch_bytes // batch_bytes, _MIN_PREFETCH), _MAX_PREFETCH)


class BatchRing:
    """Buffers for batches, in shared memory or on the device, and what fills them.

    A context manager, which ends the threads and workers.

    Args:
        config: Recipe.
        clips: Clips per batch.
        planes: Largest height and width of planes, where workers do not convert colors; None: RGB.
    """

    def __init__(self, config: Config, clips: int, planes: tuple[int, int] | None = None) -> None:
        data, backend = config.data, config.decode.backend
        self._size, self._is_pinned = data.frame_size, config.cluster.use_gpu
        self.length = ring_length(data, clips, planes)
        threads, slots = data.decode_threads, clips // data.repeated_sampling
        shapes = array_shapes(data, self.length, clips, planes)
        self._shared: SharedArrays | None = None
        self.slots_per_task = 1
        if capabilities(backend).batched:
            device = "cuda" if config.cluster.use_gpu else "cpu"
            rgb = torch.empty(shapes["rgb"][1], dtype=torch.uint8, device=device)
            self._tensors = {"rgb": rgb}
            self._workers = DeviceClipWorker(config, rgb)
            # Few threads wait with many samples each: one batch is fetched as another is decoded.
            self.slots_per_task = min(slots, -(-2 * slots // threads))
        else:
            self._shared = SharedArrays(shapes)
            self._tensors = {name: torch.from_numpy(a) for name, a in self._shared.arrays.items()}
            augmentation = config.augment if config.task else None
            worker = ClipWorker(data, backend, self._shared, augmentation)
            self._workers = DecodePool(worker, data, self._shared.num_bytes)
            if data.decode_workers:  # each is woken for a few slots, but gets its share of a batch
                share = slots // (2 * data.decode_workers)
                self.slots_per_task = max(1, min(_MAX_SLOTS_PER_TASK, share))
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="clips")

    def frames(self, batch: int) -> torch.Tensor | YuvClips:
        """Return the frames of a batch.

        Args:
            batch: Index of its buffer.
        """
        if "rgb" in self._tensors:
            return self._tensors["rgb"][batch]
        return YuvClips(**{k: t[batch] for k, t in self._tensors.items()}, size=self._size)

    def read(
        self, reader: SampleReader, wanted: Sequence[tuple[int, ClipRequest]]
    ) -> list[SampleResult]:
        """Fetch samples and have their clips written to the buffers.

        Args:
            reader: Of the data set.
            wanted: Global index of each sample, and its clips.

        Raises:
            ShardError, StorageError: A shard cannot be read.
            ClusterError: Workers cannot be started.
        """
        results: list[SampleResult] = []
        jobs: list[DecodeJob] = []
        for index, request in wanted:
            began = time.perf_counter()
            packed = reader.fetch(index)
            bad = packed if isinstance(packed, BadSample) else None
            results.append(SampleResult(index, packed.key, bad, time.perf_counter() - began))
            if not isinstance(packed, BadSample):
                jobs.append(DecodeJob(packed, request))
        decoded = iter(self._workers(jobs) if jobs else [])
        for number, fetched in enumerate(results):
            if fetched.bad is None:
                done = next(decoded)
                results[number] = dataclasses.replace(
                    fetched, bad=done.bad, decode_seconds=done.seconds
                )
        return results

    def __enter__(self) -> BatchRing:
        shared = self._shared
        if self._is_pinned and shared:  # copies to the GPU then overlap with computation
            torch.cuda.check_error(_cuda().cudaHostRegister(shared.address, shared.num_bytes, 0))
        return self

    def __exit__(self, *_: object) -> None:
        """End threads and processes, however the block is left."""
        self._workers.interrupt()
        self.threads.shutdown(wait=True, cancel_futures=True)
        self._workers.close()
        if self._shared is None:
            return
        self._shared.close()
        if self._is_pinned:
            torch.cuda.check_error(_cuda().cudaHostUnregister(self._shared.address))


def _cuda() -> Any:
    return torch.cuda.cudart()
