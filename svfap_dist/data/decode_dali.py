"""Video bytes to clips on the device, with NVIDIA DALI: a whole batch at a time.

In: compressed videos, the numbers of the wanted frames, and a crop. Out: uint8 RGB clips of the
model's size, on the GPU, where its decoding units (NVDEC) have decoded them and DALI has cut and
resized them; nothing but compressed bytes goes there, and nothing comes back. The graph is one for
GPU and CPU, so that it can be tested without a GPU, though on a CPU DALI knows only VP8, VP9 and
MJPEG. Several pipelines work on shares of a batch at once, since one leaves decoding units idle.

What DALI makes of trouble decides how it is called. One bad video ends a pipeline and with it the
whole batch, so each is read through beforehand (`positions`), and where a pipeline still fails, it
is built anew and its videos are tried one by one: a bad one costs one sample. DALI names frames by
counting, and fills up with black where there are none: `positions` says which there are. DALI takes
all colours for BT.601, so those of BT.709 are put right afterwards. Nothing in a process can end a
decoder that hangs: `device_cutter` ends the run then, and says which samples it was at.

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

from svfap_dist.data.convert import rgb_from_yuv
from svfap_dist.data.decode_cpu import LEAVE_OUT
from svfap_dist.data.frames import Matrix, RgbFrames
from svfap_dist.data.positions import locate
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.region import Crop
from svfap_dist.shard_format import VideoInfo

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
        self._pipelines = [_Pipeline(device, threads) for _ in range(pipelines)]
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
        jobs: dict[int, _Job] = {}
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

    def _run(self, jobs: list[_Job]) -> list[list[torch.Tensor] | DecodeError]:
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


def graph(device: str, num_crops: int) -> list[Any]:
    """DALI's graph: compressed bytes to clips, the same on "cuda" and "cpu".

    Inputs, per sample: video [bytes], frames [F], size [2] (height, width), flip [], and for each
    crop crop0, crop1, ... [4] (top, left, height, width). Outputs: for each, uint8 [F, *size, 3].
    """
    from nvidia.dali import fn, types

    def given(name: str, ndim: int, dtype: Any = types.DALIDataType.INT32) -> Any:
        return fn.external_source(name=name, ndim=ndim, dtype=dtype)

    decoded = fn.decoders.video(
        given("video", 1, types.DALIDataType.UINT8),
        device="mixed" if device == "cuda" else "cpu",
        frames=given("frames", 1),
    )
    size, flip, clips = given("size", 1, types.DALIDataType.FLOAT), given("flip", 0), []
    for number in range(num_crops):
        crop = given(f"crop{number}", 1)
        clip: Any = fn.slice(decoded, crop[:2], crop[2:], axis_names="HW")
        # A triangle filter as wide as the reduction: what the CPU's path has.
        clip = fn.resize(
            clip, size=size, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True
        )
        clips.append(fn.flip(clip, horizontal=flip))
    return clips


@dataclasses.dataclass(frozen=True)
class _Job:
    """A request that can be met, as far as its packets tell, as the graph takes it."""

    video: np.ndarray
    frames: np.ndarray
    size: np.ndarray
    flip: np.ndarray
    crops: list[np.ndarray]
    matrix: Matrix


def _job(request: VideoRequest, size: tuple[int, int]) -> _Job:
    wanted = locate(request.video, request.info, request.numbers)
    return _Job(
        video=np.frombuffer(request.video, np.uint8),
        frames=np.array(wanted.positions, np.int32),
        size=np.array(size, np.float32),
        flip=np.array(request.flip, np.int32),
        crops=[np.array(dataclasses.astuple(crop), np.int32) for crop in request.crops],
        matrix=wanted.matrix,
    )


class _Pipeline:
    """A DALI pipeline; built when first needed, when one was lost, and for larger batches."""

    def __init__(self, device: str, threads: int) -> None:
        self._device, self._threads = device, threads
        self._built: Any = None
        self._room = self._num_crops = 0
        self._matrices: list[Matrix] = []  # of the batch under way

    def start(self, jobs: Sequence[_Job]) -> None:
        """Begin to decode."""
        num_crops = len(jobs[0].crops)
        if self._built is None or len(jobs) > self._room or num_crops != self._num_crops:
            self._room, self._num_crops = max(len(jobs), self._room), num_crops
            self._built = self._build()
        self._matrices = [job.matrix for job in jobs]
        inputs = {
            "video": [job.video for job in jobs],
            "frames": [job.frames for job in jobs],
            "size": [job.size for job in jobs],
            "flip": [job.flip for job in jobs],
        }
        for number in range(num_crops):
            inputs[f"crop{number}"] = [job.crops[number] for job in jobs]
        for name, values in inputs.items():
            self._built.feed_input(name, values)
        self._built.schedule_run()

    def finish(self) -> list[list[torch.Tensor]]:
        """Clips of each job, on the device.

        Raises: RuntimeError if DALI failed; the pipeline is lost, and is built again when needed.
        """
        import torch

        # Bound to torch's stream, DALI takes memory back only after what torch does with it there.
        stream = torch.cuda.current_stream() if self._device == "cuda" else None
        try:
            outputs = self._built.share_outputs(cuda_stream=stream)
            clips = [
                [_put_right(torch.from_dlpack(output[row]), matrix) for output in outputs]
                for row, matrix in enumerate(self._matrices)
            ]
            self._built.release_outputs()
        except RuntimeError:
            self._built = None
            raise
        return clips

    def _build(self) -> Any:
        import torch
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(
            batch_size=self._room,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if self._device == "cuda" else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            pipeline.set_outputs(*graph(self._device, self._num_crops))
        pipeline.build()
        return pipeline


def _one_by_one(
    pipeline: _Pipeline, jobs: Sequence[_Job]
) -> list[list[torch.Tensor] | DecodeError]:
    results: list[list[torch.Tensor] | DecodeError] = []
    for job in jobs:
        try:
            pipeline.start([job])
            results += pipeline.finish()
        except RuntimeError as error:
            found = " ".join(str(error).split())[-300:]
            results.append(DecodeError("DALI cannot decode the video", found=found, do=LEAVE_OUT))
    return results


def _put_right(clip: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """A clip [F, H, W, 3] as it would be had DALI used the right matrix; where it has cut off
    colours that were too bright or too dark, that is lost."""
    if matrix == "bt601":
        return clip
    return (clip.float() @ _from_bt601(str(clip.device))).round_().clamp_(0, 255).byte()


@functools.cache
def _from_bt601(device: str) -> torch.Tensor:
    """[3, 3]: rows of RGB that were made with BT.601's weights, times this, are BT.709's."""
    import torch

    bt601, bt709 = (rgb_from_yuv(name, full_range=True)[:, :3] for name in ("bt601", "bt709"))
    matrix = bt709 @ np.linalg.inv(bt601)
    return torch.tensor(matrix.T, dtype=torch.float32, device=device)
