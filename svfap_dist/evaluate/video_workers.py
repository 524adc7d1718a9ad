"""Probing videos and cutting clips out of them, here or in processes that can be killed.

In: the bytes of a video, and what is wanted of them. Out: clips, what a file of unknown content is,
or why the video cannot be used. Damaged videos can keep a decoder busy forever, crash it or fill
the memory. In a process with a deadline and a limit of memory they cost only themselves. Such a
process does without torch, so it starts in a second and is small. It keeps the large video that it
received last, so that the parts of a long one do not send it again and again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from svfap_dist.allocator import keep_freed_memory
from svfap_dist.errors import ClusterError, DecodeError
from svfap_dist.parallel.processes import CrashedError, HungError, ProcessPool, StartError
from svfap_dist.shards.format import BadSample, Sample
from svfap_dist.video import backends
from svfap_dist.video.frames import Frames, to_rgb
from svfap_dist.video.info import Crop, VideoInfo
from svfap_dist.video.probe import Limits, Rejected, probe

if TYPE_CHECKING:
    from svfap_dist.config import DataConfig

_WORKER_BYTES = 8 << 30  # address space of a process
_KEPT_BYTES = 1 << 20  # of a video; smaller ones are sent each time
_Result = TypeVar("_Result")


class Decoding(NamedTuple):
    """The resources for decoding: threads, and processes that they call (0: they decode)."""

    threads: int = 2
    workers: int = 0
    seconds: float = 30.0  # deadline of a part of a video, with workers; and more by its size:
    seconds_per_mib: float = 0.0
    backend: str = backends.DEFAULT  # that decodes on the host

    @classmethod
    def of(cls, data: DataConfig, backend: str) -> Decoding:
        """Return the resources that a recipe grants.

        Args:
            data: the [data] table.
            backend: decode.backend; the default where this one decodes on the device.
        """
        host = backends.host_backend(backend)
        return cls(data.decode_threads, data.decode_workers, data.decode_seconds, backend=host)

    @classmethod
    def of_files(cls, threads: int, isolated: bool) -> Decoding:
        """Return the resources for files that were never probed, with the deadline of `Limits`.

        Args:
            threads: that read and decode.
            isolated: whether they call processes.
        """
        limits = Limits()
        return cls(threads, threads * isolated, limits.seconds, limits.seconds_per_mib)


@dataclasses.dataclass(frozen=True)
class UnprobedVideo:
    """The bytes of a file of unknown content; a video of fewer frames is rejected."""

    key: str
    video: bytes
    min_frames: int = 1


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Clips to cut: numbers [windows, F] of source frames, times crops, resized to S x S."""

    info: VideoInfo
    numbers: np.ndarray
    crops: Sequence[Crop]
    size: int

    def of_video(self, video: bytes) -> np.ndarray:
        """Return uint8 clips [windows * crops, F, S, S, 3], decoded in this process.

        Args:
            video: its bytes.

        Raises:
            DecodeError: The video cannot be decoded.
        """
        return self.of_frames(self.decoding()(video, backends.DEFAULT))

    def decoding(self) -> DecodeTask:
        """Return the task of decoding the frames; windows overlap, so each one once."""
        return DecodeTask(self.info, np.unique(self.numbers).tolist())

    def of_frames(self, frames: Frames) -> np.ndarray:
        """Return the clips, cut from decoded frames.

        Args:
            frames: as `decoding` asks for.
        """
        _, places = np.unique(self.numbers, return_inverse=True)
        where = places.reshape(self.numbers.shape)
        crops = [to_rgb(frames, crop, self.size)[where] for crop in self.crops]
        return np.stack(crops, axis=1).reshape(-1, *crops[0].shape[1:])


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """Find out what a file is."""

    min_frames: int

    def __call__(self, video: bytes, backend: str) -> VideoInfo | Rejected:
        """Return what the file is, or why it cannot be used.

        Args:
            video: its bytes.
            backend: unused.
        """
        return probe(video, self.min_frames)


@dataclasses.dataclass(frozen=True)
class DecodeTask:
    """Decode frames of a video."""

    info: VideoInfo
    numbers: Sequence[int]

    def __call__(self, video: bytes, backend: str) -> Frames:
        """Return the frames.

        Args:
            video: its bytes.
            backend: that decodes.

        Raises:
            DecodeError: The video cannot be decoded.
        """
        return backends.open_decoder(backend)(video, self.info, self.numbers)


class _Request(NamedTuple):
    """A task; without a video, of the one with this hash that the process may have kept."""

    task: Callable[[bytes, str], Any]
    hash: int
    video: bytes | None


class _Worker:
    """Does tasks in a child process; returns None if it lacks the video."""

    def __init__(self, backend: str) -> None:
        self._backend, self._hash, self._kept = backend, 0, b""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        keep_freed_memory()  # clip after clip allocates the same large arrays

    def __call__(self, request: _Request) -> Any:
        """Return the result of a task; None: send the video along."""
        video = request.video
        if video is None and request.hash == self._hash:
            video = self._kept
        if video is None:
            return None
        is_kept = len(video) > _KEPT_BYTES
        self._hash, self._kept = (request.hash, video) if is_kept else (0, b"")
        return request.task(video, self._backend)


class VideoWorkers:
    """Probes and cuts for any number of threads, in processes or in the thread that calls.

    Args:
        decoding: the number of processes, their deadline, and the backend.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._pool: ProcessPool[_Request, Any] | None = None
        if decoding.workers:
            self._pool = ProcessPool(
                _Worker(decoding.backend),
                decoding.workers,
                seconds=decoding.seconds,
                memory_bytes=_WORKER_BYTES,
            )

    def probe(self, video: UnprobedVideo) -> Sample | BadSample:
        """Return a video with what it is, or why it cannot be used.

        Args:
            video: of unknown content.

        Raises:
            ClusterError: Processes cannot be started.
            CancelledError: After `kill`.
        """
        key, data = video.key, video.video
        info = self._try(0, key, lambda: self._do(data, ProbeTask(video.min_frames)))
        if isinstance(info, BadSample):
            return info
        if isinstance(info, Rejected):
            return BadSample(0, key, info.reason, info.detail)
        return Sample(0, key, data, info)

    def cut(self, sample: Sample, cuts: Cuts) -> np.ndarray | BadSample:
        """Return clips of a video, or why there are none; processes decode, this one resizes.

        Args:
            sample: the video.
            cuts: which clips.

        Raises:
            ClusterError: Processes cannot be started.
            CancelledError: After `kill`.
        """

        def cut() -> np.ndarray:
            return cuts.of_frames(self._do(sample.video, cuts.decoding()))

        return self._try(sample.index, sample.key, cut)

    def kill(self) -> None:
        """Kill the processes for good: calls under way, and later ones, raise CancelledError."""
        if self._pool:
            self._pool.kill()

    def close(self) -> None:
        """End the processes, when no thread calls them any more."""
        if self._pool:
            self._pool.close()

    def _try(self, index: int, key: str, work: Callable[[], _Result]) -> _Result | BadSample:
        try:
            return work()
        except DecodeError as error:
            return BadSample(index, key, error.reason, str(error))
        except MemoryError:
            return BadSample(index, key, "too_large", "not enough memory to decode it")
        except HungError as error:
            return BadSample(index, key, "hung", f"the decoder gave {error}")
        except StartError as error:
            raise ClusterError(
                "Decode workers cannot be started",
                where=f"{self._decoding.workers} decode workers",
                found=str(error),
                do="see the worker's standard error; a script needs "
                '`if __name__ == "__main__":` around its main part',
            ) from error
        except CrashedError as error:
            return BadSample(index, key, "crashed", f"the decoder died: {error}")

    def _do(self, video: bytes, task: Callable[[bytes, str], _Result]) -> _Result:
        if self._pool is None:
            return task(video, self._decoding.backend)
        more_seconds = self._decoding.seconds_per_mib * len(video) / 2**20
        if len(video) > _KEPT_BYTES:
            found = self._pool(_Request(task, hash(video), None), more_seconds=more_seconds)
            if found is not None:
                return found
        return self._pool(_Request(task, hash(video), video), more_seconds=more_seconds)
