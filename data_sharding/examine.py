"""One video of a source -> a sample for a shard, or why there is none: read, probed, transcoded.

Whatever a video does to the code that looks at it, it does to a process of its own: `Examiner` calls
`examine` there, with a time limit and a memory limit. A video that hangs or crashes it gets a
second chance, for a machine that was short of memory or time says nothing about a video; after that
it is left out like any other that is broken. The process lives on from video to video.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
from types import TracebackType

from data_sharding.probe import MIN_FRAMES, Limits, Rejected, probe
from data_sharding.sources import SourceVideo
from data_sharding.transcode import TrainProfile, TranscodeError, transcode
from svfap_dist.isolated import CrashedError, HungError, Isolated
from svfap_dist.shard_format import VideoInfo
from svfap_dist.storage import StorageMissing

_ATTEMPTS = 2


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


class Examiner:
    """Turns videos into samples, one by one, in a process of its own."""

    def __init__(self, making: Making) -> None:
        self._limits = making.limits
        self._call = Isolated(
            functools.partial(examine, making),
            seconds=making.limits.seconds,
            memory_bytes=making.limits.memory_bytes,
        )

    def __enter__(self) -> Examiner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._call.close()

    def __call__(self, video: SourceVideo) -> Sample | Rejected:
        """The sample that a video makes, or why it makes none.

        Raises: StorageError if the store fails, other than by not having the file.
        """
        if video.misfit:
            return Rejected("misplaced", video.misfit)
        if video.num_bytes > self._limits.file_bytes:
            found = f"{video.num_bytes} bytes, more than {self._limits.file_bytes}"
            return Rejected("too_big", found)
        more_seconds = self._limits.seconds_per_mib * video.num_bytes / 2**20
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._call(video, more_seconds=more_seconds)
            except HungError as error:
                rejected = Rejected("hung", str(error))
            except CrashedError as error:
                rejected = Rejected("crashed", str(error))
            if attempt == _ATTEMPTS:
                return rejected
        raise AssertionError("unreachable")


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
        return Rejected(error.reason, error.detail)
    except MemoryError as error:
        limit = making.limits.memory_bytes
        return Rejected("out_of_memory", f"more than {limit} bytes {error}".rstrip())
