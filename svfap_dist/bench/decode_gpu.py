"""`svfap bench decode --device cuda`: clips per second out of the GPU's decoding units.

Windows at random places of the given videos are decoded, cut and resized on the device, a batch at
a time, by more and more DALI pipelines; each profile (shards as they came, shards made for
training) has its own rows. The CPU seconds that a clip costs stand beside the rate, for the cores
are what the GPU's units are to spare, and so does the rate at which the model takes clips: decoding
faster than that gains nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from svfap_dist.config import DataConfig
from svfap_dist.errors import ConfigError
from svfap_dist.progress import Progress
from svfap_dist.rng import Stream
from svfap_dist.video.dali import DaliDecoder
from svfap_dist.video.frames import VideoRequest
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.views import region_crop

PIPELINES = (1, 2, 4, 8)
_SECONDS = 3.0  # that each row is measured, at least


@dataclasses.dataclass(frozen=True)
class Row:
    """cpu_seconds_per_clip: of this process, over all its threads."""

    profile: str
    pipelines: int
    clips_per_second: float
    cpu_seconds_per_clip: float


@dataclasses.dataclass(frozen=True)
class GpuDecodeBench:
    """What came out. model_clips_per_second: of a training step; None where it was not measured."""

    device: str
    batch_size: int
    threads: int  # of each pipeline
    rows: tuple[Row, ...]
    model_clips_per_second: float | None = None

    def lines(self) -> list[str]:
        """For people."""
        text = [
            f"DALI on {self.device}, batches of {self.batch_size}, {self.threads} threads each."
        ]
        text += [
            f"{row.profile:8}  {row.pipelines:2} pipelines  {row.clips_per_second:8.0f} clips/s"
            f"  {1000 * row.cpu_seconds_per_clip:6.2f} ms of CPU per clip"
            for row in self.rows
        ]
        if self.model_clips_per_second is not None:
            text.append(f"The model takes   {self.model_clips_per_second:8.0f} clips/s")
        return text


def run(
    profiles: Mapping[str, Sequence[tuple[bytes, VideoInfo]]],
    *,
    device: str = "cuda",
    pipelines: Sequence[int] = PIPELINES,
    batch_size: int = 64,
    threads: int = 4,
    data: DataConfig | None = None,
    model_clips_per_second: float | None = None,
) -> GpuDecodeBench:
    """Measure every profile with every number of pipelines.

    Args:
        profiles: videos by name of profile, each at least a window long.
        device: "cuda"; "cpu" for the codecs that DALI has there.
        threads: CPU threads of each pipeline; on a GPU, each keeps a decoding unit busy.
        data: what clips are like; left out: the paper's.

    Raises: ConfigError if DALI or the device is not there; DecodeError if a video is bad.
    """
    name, data = _device_name(device), data or DataConfig()
    rows = []
    with Progress("Decoding", total=len(profiles) * len(pipelines)) as progress:
        for profile, videos in profiles.items():
            batches = [_requests(videos, batch_size, data, turn) for turn in range(4)]
            for count in pipelines:
                decoder = DaliDecoder(device, pipelines=count, threads=threads)
                rate, cpu = _measure(decoder, batches, data.frame_size)
                rows.append(Row(profile, count, rate, cpu))
                progress.update(len(rows), note=f"{profile}, {count} pipelines: {rate:.0f} clips/s")
    return GpuDecodeBench(name, batch_size, threads, tuple(rows), model_clips_per_second)


def _device_name(device: str) -> str:
    import torch

    if device != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(
            "There is no GPU to measure",
            where="--device cuda",
            found=f"torch {torch.__version__} sees none",
            do="run it on a machine with one, or use --device cpu",
        )
    return torch.cuda.get_device_name()


def _requests(
    videos: Sequence[tuple[bytes, VideoInfo]], batch_size: int, data: DataConfig, turn: int
) -> list[VideoRequest]:
    """A batch of windows at random places, whole regions of the frames."""
    window = (data.num_frames - 1) * data.sampling_rate + 1
    requests = []
    for row in range(batch_size):
        video, info = videos[(turn * batch_size + row) % len(videos)]
        start = Stream("bench decode", turn, row).integer(info.num_frames - window + 1)
        numbers = range(start, start + window, data.sampling_rate)
        # Shards made for training have had the region cut out already.
        name = data.region if info.layout is None else "full"
        crop = region_crop(name, info.height, info.width)
        requests.append(VideoRequest(video, info, numbers, [crop]))
    return requests


def _measure(
    decoder: DaliDecoder, batches: Sequence[Sequence[VideoRequest]], size: int
) -> tuple[float, float]:
    """Clips per second, and CPU seconds per clip."""

    def decode(requests: Sequence[VideoRequest]) -> int:
        batch = decoder.decode_batch(requests, size)
        for error in batch.bad.values():
            raise error
        int(batch.clips[-1, -1, -1, -1, -1])  # waits for the device
        return len(requests)

    decode(batches[0])  # builds the pipelines
    clips, began, cpu_began = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < _SECONDS:
        clips += sum(decode(requests) for requests in batches)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return clips / seconds, cpu_seconds / clips
