"""One video of a source -> a sample for a shard, or why there is none: read, probed, transcoded.

It is done in a process that a video may hang or crash (`video_pool`); a video that does is left out
like any other that is broken.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

from data_sharding.sources import SourceVideo
from data_sharding.transcode import TrainProfile, TranscodeError, transcode
from data_sharding.video_pool import VideoPool
from svfap_dist.storage import StorageMissingError
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import MIN_FRAMES, Limits, Reason, Rejected, probe


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


def examiners(making: Making, processes: int = 1) -> VideoPool[Sample | Rejected]:
    """Processes that turn videos into samples, or say why not.

    Their `map` raises StorageError if the store fails, other than by not having a file.
    """
    return VideoPool(functools.partial(examine, making), making.limits, _give_up, processes)


def _give_up(video: SourceVideo, reason: Reason, found: str) -> Rejected:
    return Rejected(reason, found)


def examine(making: Making, video: SourceVideo) -> Sample | Rejected:
    """Read a video, probe it and, for the profile `train`, transcode it; may hang or crash.

    Raises: StorageError if the store fails, other than by not having the file.
    """
    limits = making.limits
    if video.misfit:
        return Rejected("misplaced", video.misfit)
    if video.num_bytes > limits.file_bytes:
        return Rejected("too_big", f"{video.num_bytes} bytes, more than {limits.file_bytes}")
    try:
        return _sample(making, video, video.read())
    except StorageMissingError as error:
        return Rejected("missing", str(error))
    except TranscodeError as error:
        return Rejected(cast(Reason, error.reason), error.found)
    except MemoryError as error:
        found = f"more than {limits.memory_bytes} bytes {error}".rstrip()
        return Rejected("out_of_memory", found)


def _sample(making: Making, video: SourceVideo, data: bytes) -> Sample | Rejected:
    info = probe(data, making.min_frames, making.limits)
    if isinstance(info, Rejected):
        return info
    info = dataclasses.replace(info, labels=video.labels)
    if making.train is None:
        return Sample(video.key, video.suffix, data, info, len(data))
    stored, info = transcode(data, info, making.train)
    return Sample(video.key, "mp4", stored, info, len(data))
