"""`svfap bench decode --device cuda`: clips per second out of a GPU's decoding units.

Batched backends decode, crop and resize batches of windows with more and more pipelines. The CPU
time of a clip counts, too, because the decoding units exist to save cores; and decoding faster than
the model takes clips gains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import torch

from svfap_dist.bench.decode import Video
from svfap_dist.config import DataConfig
from svfap_dist.errors import ConfigError
from svfap_dist.profiling.decoder import time_batch_decoder
from svfap_dist.progress import Progress
from svfap_dist.rng import Stream
from svfap_dist.text_table import format_table
from svfap_dist.video.backends import BACKENDS, open_decoder
from svfap_dist.video.frames import BatchDecoder, VideoRequest
from svfap_dist.video.info import region_crop

PIPELINES = (1, 2, 4, 8)
_SECONDS = 3.0  # of each row


@dataclasses.dataclass(frozen=True)
class DeviceRow:
    """Rate of one backend, profile and number of pipelines; CPU time over all threads."""

    profile: str
    pipelines: int
    clips_per_second: float
    cpu_seconds_per_clip: float
    backend: str


@dataclasses.dataclass(frozen=True)
class DeviceDecodeBench:
    """Figures of decoding on a device."""

    device: str
    batch_size: int
    threads: int  # of each pipeline
    rows: tuple[DeviceRow, ...]
    model_clips_per_second: float | None = None  # of a training step, if measured

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        rows = [
            (
                *(row.backend, row.profile, f"{row.pipelines} pipelines"),
                f"{row.clips_per_second:.0f} clips/s",
                f"{1000 * row.cpu_seconds_per_clip:.2f} ms of CPU per clip",
            )
            for row in self.rows
        ]
        head = f"{self.device}, batches of {self.batch_size}, {self.threads} threads each."
        text = [head, *(format_table(rows, right=(2, 3, 4)) if rows else [])]
        if self.model_clips_per_second is not None:
            text.append(f"The model takes {self.model_clips_per_second:.0f} clips/s")
        return text


def run(
    videos: Mapping[str, Sequence[Video]],
    *,
    device: str = "cuda",
    pipelines: Sequence[int] = PIPELINES,
    batch_size: int = 64,
    threads: int = 4,
    data: DataConfig | None = None,
    model_clips_per_second: float | None = None,
) -> DeviceDecodeBench:
    """Measure every installed batched backend with every profile and number of pipelines.

    Args:
        videos: by profile, each at least a window long.
        device: "cuda"; "cpu" for the codecs that a backend has there.
        pipelines: numbers of pipelines.
        batch_size: windows of a batch.
        threads: CPU threads of each pipeline; on a GPU, each keeps a decoding unit busy.
        data: shape of the clips; default: the paper's.
        model_clips_per_second: for comparison.

    Raises:
        ConfigError: if no backend is installed or the device is missing.
        DecodeError: a video is bad.
    """
    if device == "cuda" and not torch.cuda.is_available():
        found = f"torch {torch.__version__} sees none"
        advice = "run it on a machine with one, or use --device cpu"
        raise ConfigError("No GPU to measure", "--device cuda", found, advice)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    backends = {key: row for key, row in BACKENDS.items() if row.batched}
    installed = [key for key, row in backends.items() if row.is_installed]
    if not installed:
        advice = " or ".join(f"`{row.install}`" for row in backends.values())
        raise ConfigError("No batched decode backend", f"--device {device}", "none", advice)
    data, rows = data or DataConfig(), []
    with Progress("Decoding", len(installed) * len(videos) * len(pipelines)) as progress:
        for backend in installed:
            for profile, found in videos.items():
                batches = [_random_windows(found, batch_size, data, turn) for turn in range(4)]
                for count in pipelines:
                    decoder = cast(BatchDecoder, open_decoder(backend, device, threads, count))
                    rate = time_batch_decoder(decoder, batches, data.frame_size, _SECONDS)
                    cpu = rate.cpu_seconds / rate.clips
                    rows.append(DeviceRow(profile, count, rate.per_second, cpu, backend))
                    note = f"{profile}, {count} pipelines: {rate.per_second:.0f} clips/s"
                    progress.update(len(rows), note=note)
    return DeviceDecodeBench(name, batch_size, threads, tuple(rows), model_clips_per_second)


def _random_windows(
    videos: Sequence[Video], batch_size: int, data: DataConfig, turn: int
) -> list[VideoRequest]:
    """Return a batch of windows at random places, with whole regions of the frames."""
    window = (data.num_frames - 1) * data.sampling_rate + 1
    requests = []
    for row in range(batch_size):
        video, info = videos[(turn * batch_size + row) % len(videos)]
        start = Stream("bench decode", turn, row).integer(info.num_frames - window + 1)
        numbers = range(start, start + window, data.sampling_rate)
        # Shards made for training are already cropped to the region.
        name = data.region if info.layout is None else "full"
        crop = region_crop(name, info.height, info.width)
        requests.append(VideoRequest(video, info, numbers, [crop]))
    return requests
