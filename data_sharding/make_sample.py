"""Turn a video of a source into a sample for a shard, or reject it: read, probe, transcode.

The work is done in child processes (`video_pool`), because a video may hang or crash its decoder; a
video that does is rejected like any other that is broken.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

from data_sharding.frames import BrokenFrameError
from data_sharding.images import BrokenImageError
from data_sharding.sources import SourceVideo
from data_sharding.transcode import TrainProfile, TranscodeError, split_phases, transcode
from data_sharding.video_pool import VideoPool
from svfap_dist.storage import StorageMissingError
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import MIN_FRAMES, Limits, Reason, Rejected, probe


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Which videos become samples, and how they are stored."""

    min_frames: int = MIN_FRAMES
    limits: Limits = dataclasses.field(default_factory=Limits)
    train: TrainProfile | None = None  # None: the profile `source`, bytes unchanged

    @property
    def num_parts(self) -> int:
        """Parts of a sample in a shard."""
        return self.train.num_parts if self.train else 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """A video that goes into a shard."""

    key: str
    suffix: str
    files: tuple[tuple[bytes, VideoInfo], ...]  # the video, or each of its phases
    num_read: int = 0  # bytes of the source's file

    @property
    def info(self) -> VideoInfo:
        """What the video is, as its first file has it."""
        return self.files[0][1]


def open_sample_pool(options: SampleOptions, processes: int = 1) -> VideoPool[Sample | Rejected]:
    """Return processes that turn videos into samples with `make_sample`.

    Args:
        options: Which videos, and how they are stored.
        processes: Number of processes.
    """
    work = functools.partial(make_sample, options)
    return VideoPool(work, options.limits, _reject, processes)


def _reject(video: SourceVideo, reason: Reason, found: str) -> Rejected:
    return Rejected(reason, found)


def make_sample(options: SampleOptions, video: SourceVideo) -> Sample | Rejected:
    """Read a video, probe it and, for the profile `train`, transcode it; it may hang or crash.

    Args:
        options: Which videos, and how they are stored.
        video: Video of the source.

    Raises:
        StorageError: the store fails in another way than by lacking the file.
    """
    limits = options.limits
    if video.misfit:
        return Rejected("misplaced", video.misfit)
    if video.num_bytes > limits.file_bytes:
        return Rejected("too_big", f"{video.num_bytes} bytes, more than {limits.file_bytes}")
    try:
        return _sample(options, video, video.read())
    except StorageMissingError as error:
        return Rejected("missing", str(error))
    except (BrokenFrameError, BrokenImageError, TranscodeError) as error:
        found = ": ".join(filter(None, (error.where, error.found)))
        return Rejected(cast(Reason, error.reason), found)
    except MemoryError as error:
        found = f"more than {limits.memory_bytes} bytes {error}".rstrip()
        return Rejected("out_of_memory", found)


def _sample(options: SampleOptions, video: SourceVideo, data: bytes) -> Sample | Rejected:
    info = probe(data, options.min_frames, options.limits)
    if isinstance(info, Rejected):
        return info
    info = dataclasses.replace(info, labels=video.labels)
    if options.train is None:
        return Sample(video.key, video.suffix, ((data, info),), len(data))
    stored = transcode(data, info, options.train)
    files = split_phases(*stored) if options.num_parts > 1 else [stored]
    return Sample(video.key, "mp4", tuple(files), len(data))
