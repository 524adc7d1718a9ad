"""Video bytes to clips on the device, with NVIDIA DALI: a whole batch at a time.

In: compressed videos, the numbers of the wanted frames, and a crop. Out: uint8 RGB clips of the
model's size, on the GPU, where its decoding units (NVDEC) have decoded them and DALI has cut and
resized them; nothing but compressed bytes goes there, and nothing comes back. The graph is one for
GPU and CPU, so that it can be tested without a GPU, though on a CPU DALI knows only VP8, VP9 and
MJPEG. Several pipelines work on shares of a batch at once, since one leaves decoding units idle.

What DALI makes of trouble decides how it is called. One bad video ends a pipeline and with it the
whole batch, so each is read through beforehand (`positions`), and where a pipeline still fails, it
is built anew and its videos are tried one by one: a bad one costs one sample. DALI names frames by
counting, and fills up with black where there are none: `positions` says which there are. Nothing in
a process can end a decoder that hangs; the run's collective timeout does.

`nvidia.dali` is imported here alone, and here only when it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from svfap_dist.data.frames import RgbFrames
from svfap_dist.data.positions import positions
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.shard_format import VideoInfo

if TYPE_CHECKING:
    import torch

Rectangle = tuple[int, int, int, int]  # top, left, height, width in pixels

# What DALI 2.4 decodes (docs of fn.decoders.video), by FFmpeg's names, which the shards have.
_CODECS = {
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
    "cuda": frozenset({"vp8", "vp9", "mjpeg", "av1", "mpeg4", "h264", "hevc"}),
}


@dataclasses.dataclass(frozen=True)
class VideoRequest:
    """What is wanted of one video: frames by their numbers, cut by each of the crops, all of them
    flipped left to right or not."""

    video: bytes
    info: VideoInfo
    numbers: Sequence[int]
    crops: Sequence[Rectangle]
    flip: bool = False


@dataclasses.dataclass(frozen=True)
class DecodedBatch:
    """clips: uint8 [B * crops, F, size, size, 3] on the device, the crops of a video in a row;
    black where `bad` has an entry for the video's number in the batch."""

    clips: torch.Tensor
    bad: dict[int, DecodeError]


def is_installed() -> bool:
    """Whether DALI can be imported; it is not."""
    return bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))


def decodes(codec: str, device: str) -> bool:
    """Whether DALI decodes this codec on `device` ("cpu" or "cuda")."""
    return codec in _CODECS[device]


class DaliDecoder:
    """Decodes on one device; a `Decoder` for one video, `decode_batch` for many.

    One thread at a time is served.

    Args:
        device: "cuda": the current device of torch; "cpu".
        pipelines: DALI pipelines that share a batch.
        threads: CPU threads of each; on a GPU, each drives a decoding session.

    Raises: ConfigError if DALI is not installed.
    """

    def __init__(self, device: str, *, pipelines: int = 1, threads: int = 1) -> None:
        if not is_installed():
            raise ConfigError(
                "DALI is not installed",
                where="decode.backend = dali",
                found="no module nvidia.dali",
                do="install it with `pip install svfap-dist[gpu]`, or set decode.backend=pyav",
            )
        self._device = device
        self._lanes = [_Lane(device, threads) for _ in range(pipelines)]
        self._lock = threading.Lock()

    def __call__(self, video: bytes, info: VideoInfo, numbers: Sequence[int]) -> RgbFrames:
        """Whole frames of one video, brought to the host.

        Raises: DecodeError, or its kinds.
        """
        whole = (0, 0, info.height, info.width)
        job = _job(VideoRequest(video, info, numbers, [whole]), self._device, whole[2:])
        with self._lock:
            clips = _one_by_one(self._lanes[0], [job])[0]
        if isinstance(clips, DecodeError):
            raise clips
        return RgbFrames(clips[0].cpu().numpy())

    def decode_batch(self, requests: Sequence[VideoRequest], size: int) -> DecodedBatch:
        """Clips of many videos, each of equally many frames and crops, resized to size x size.

        Raises: RuntimeError if all videos fail in DALI: then it is not they that are bad.
        """
        import torch

        results: dict[int, _Clips | DecodeError] = {}
        jobs: dict[int, _Job] = {}
        for row, request in enumerate(requests):
            try:
                jobs[row] = _job(request, self._device, (size, size))
            except DecodeError as error:
                results[row] = error
        with self._lock:
            results |= dict(zip(jobs, self._decode(list(jobs.values())), strict=True))
        first = requests[0]
        black = torch.zeros(
            (len(first.numbers), size, size, 3), dtype=torch.uint8, device=self._device
        )
        clips = [
            clip
            for _, found in sorted(results.items())
            for clip in ([black] * len(first.crops) if isinstance(found, DecodeError) else found)
        ]
        bad = {row: found for row, found in results.items() if isinstance(found, DecodeError)}
        return DecodedBatch(torch.stack(clips), bad)
