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
a process can end a decoder that hangs: `device_cutter` ends the run then, and says which samples it
was at.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.video.dali_graph import Job, Pipeline
from svfap_dist.video.frames import RgbFrames
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.pyav import LEAVE_OUT
from svfap_dist.video.region import Crop
from svfap_dist.video.timeline import locate

if TYPE_CHECKING:
    import torch

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
    crops: Sequence[Crop]
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
    """Decodes on one device: a `Decoder` for one video, `decode_batch` for many.

    Callers of several threads are served one after the other.

    Args:
        device: "cuda": the current device of torch; "cpu".
        pipelines: DALI pipelines that share a batch.
        threads: CPU threads of each; on a GPU, each of them keeps a decoding unit busy.

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
        self._pipelines = [Pipeline(device, threads) for _ in range(pipelines)]
        self._lock = threading.Lock()

    def __call__(self, video: bytes, info: VideoInfo, numbers: Sequence[int]) -> RgbFrames:
        """Whole frames of one video, brought to the host.

        Raises: DecodeError, or its kinds.
        """
        request = VideoRequest(video, info, numbers, [Crop(0, 0, info.height, info.width)])
        job = _job(request, (info.height, info.width))
        with self._lock:
            (found,) = _one_by_one(self._pipelines[0], [job])
        if isinstance(found, DecodeError):
            raise found
        return RgbFrames(found[0].cpu().numpy())

    def decode_batch(self, requests: Sequence[VideoRequest], size: int) -> DecodedBatch:
        """Clips of many videos, each of equally many frames and crops, resized to size x size.

        A video that cannot be decoded is told in the result and costs only its own clips.
        """
        import torch

        found: dict[int, list[torch.Tensor] | DecodeError] = {}
        jobs: dict[int, Job] = {}
        for row, request in enumerate(requests):
            try:
                jobs[row] = _job(request, (size, size))
            except DecodeError as error:
                found[row] = error
        with self._lock:
            found |= dict(zip(jobs, self._run(list(jobs.values())), strict=True))
        shape = (len(requests[0].numbers), size, size, 3)
        black = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        clips, bad = [], {}
        for row, request in enumerate(requests):
            result = found[row]
            if isinstance(result, DecodeError):
                bad[row], result = result, [black] * len(request.crops)
            clips += result
        return DecodedBatch(torch.stack(clips), bad)

    def _run(self, jobs: list[Job]) -> list[list[torch.Tensor] | DecodeError]:
        """Shares the jobs among the pipelines, all of which work at the same time."""
        count = len(self._pipelines)
        results: list[list[torch.Tensor] | DecodeError] = [[]] * len(jobs)
        for first, pipeline in enumerate(self._pipelines):
            if share := jobs[first::count]:
                pipeline.start(share)
        for first, pipeline in enumerate(self._pipelines):
            if share := jobs[first::count]:
                try:
                    results[first::count] = pipeline.finish()
                except RuntimeError:  # one of them is bad, which has ended the pipeline
                    results[first::count] = _one_by_one(pipeline, share)
        return results


def _job(request: VideoRequest, size: tuple[int, int]) -> Job:
    wanted = locate(request.video, request.info, request.numbers)
    return Job(
        video=np.frombuffer(request.video, np.uint8),
        frames=np.array(wanted.positions, np.int32),
        size=np.array(size, np.float32),
        flip=np.array(request.flip, np.int32),
        crops=[np.array(dataclasses.astuple(crop), np.int32) for crop in request.crops],
        matrix=wanted.matrix,
    )


def _one_by_one(pipeline: Pipeline, jobs: Sequence[Job]) -> list[list[torch.Tensor] | DecodeError]:
    results: list[list[torch.Tensor] | DecodeError] = []
    for job in jobs:
        try:
            pipeline.start([job])
            results += pipeline.finish()
        except RuntimeError as error:
            found = " ".join(str(error).split())[-300:]
            results.append(DecodeError("DALI cannot decode the video", found=found, do=LEAVE_OUT))
    return results
