"""Decoding on the device with NVIDIA DALI: a whole batch of clips at a time.

In: compressed videos, frame numbers, crops. Out: uint8 RGB clips of the model's size on the GPU,
where its decoding units (NVDEC) decode them and DALI crops and resizes them; only compressed bytes
are copied to the device. The graph is the same on CPU and GPU, so that it can be tested without a
GPU. Several pipelines share a batch, since one leaves decoding units idle.

DALI's failure modes decide how it is called. One bad video ends a pipeline and with it the whole
batch, so each is read through first (`pyav.locate_frames`), and where a pipeline still fails,
it is rebuilt and its videos are retried one by one: a bad one costs one sample. DALI identifies
frames by counting, and pads with black; the positions and the end also come from `locate_frames`.
It assumes BT.601, so the colors of BT.709 are corrected here. On a GPU, it keeps open decoders by
their displayed size but looks them up by the coded one, so only videos whose sides are multiples of
16 find one; each clip of another size opens its own. Nothing in a process can end a decoder that
hangs: the loader ends the run then.

DALI shows frames as they are stored, from the first packet on. A video that must be rotated, or
begins with frames that cannot be decoded, is therefore decoded on the CPU (`pyav`). On a GPU so is
one whose edit list leaves frames out, since only DALI's CPU decoder honors it. What DALI fails on
is tried on the CPU as well: on a GPU DALI 2.4 ends with "invalid argument" on some H.264 videos of
keyframes only.

`nvidia.dali` is imported only here, and only when it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from svfap_dist.errors import DecodeError
from svfap_dist.video.backends import nvdec_decodes
from svfap_dist.video.frames import (
    Colors,
    DecodedBatch,
    Matrix,
    RgbFrames,
    VideoRequest,
    rgb_from_yuv,
    to_rgb,
    whole_frames,
)
from svfap_dist.video.info import LEAVE_OUT, Crop, VideoInfo
from svfap_dist.video.pyav import decode, locate_frames

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import torch

    _Clips = list[torch.Tensor] | DecodeError  # those of each crop, [F, H, W, 3]


class DaliDecoder:
    """A `BatchDecoder` for one device; calls from several threads are serialized.

    Args:
        device: "cuda": torch's current device; "cpu".
        pipelines: DALI pipelines that share a batch.
        threads: CPU threads of each; on a GPU, each keeps a decoding unit busy.
    """

    def __init__(self, device: str, *, pipelines: int = 1, threads: int = 1) -> None:
        self._device, self._gpu = device, None
        if device == "cuda":
            import torch

            self._gpu = torch.cuda.get_device_capability()
        self._pipelines = [_Pipeline(device, threads) for _ in range(pipelines)]
        self._lock = threading.Lock()
        self._failed: set[int] = set()  # hashes of videos that only the CPU decodes

    def reserve(self, videos: int) -> None:
        """See `BatchDecoder.reserve`."""
        for pipeline in self._pipelines:
            pipeline.room = max(pipeline.room, -(-videos // len(self._pipelines)))

    def __call__(self, video: bytes, info: VideoInfo, numbers: Sequence[int]) -> RgbFrames:
        """See `Decoder.__call__`; the frames are copied to the host."""
        request = VideoRequest(video, info, numbers, [Crop(0, 0, info.height, info.width)])
        failure: DecodeError | None = None
        if jobs := self._make_jobs(request, (info.height, info.width)):
            with self._lock:
                found = _join_jobs(jobs, _one_by_one(self._pipelines[0], jobs))
            if not isinstance(found, DecodeError):
                return RgbFrames(found[0].cpu().numpy())
            failure = found
        frames = RgbFrames(whole_frames(decode(video, info, numbers)))
        if failure is not None:
            self._leave_to_cpu(video, failure)
        return frames

    def decode_batch(self, requests: Sequence[VideoRequest], size: int) -> DecodedBatch:
        """See `BatchDecoder.decode_batch`."""
        import torch

        found: dict[int, _Clips] = {}
        jobs: dict[int, list[_Job]] = {}
        for row, request in enumerate(requests):
            try:
                jobs[row] = self._make_jobs(request, (size, size))
            except DecodeError as error:
                found[row] = error
        with self._lock:
            results = iter(self._run([job for of_row in jobs.values() for job in of_row]))
        for row, of_row in jobs.items():
            of_dali = None
            if of_row:
                of_dali = _join_jobs(of_row, list(itertools.islice(results, len(of_row))))
                if not isinstance(of_dali, DecodeError):
                    found[row] = of_dali
                    continue
            found[row] = self._decode_on_host(requests[row], size)
            if of_dali is not None and not isinstance(found[row], DecodeError):
                self._leave_to_cpu(requests[row].video, of_dali)
        shape = (len(requests[0].numbers), size, size, 3)
        black = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        clips, bad = [], {}
        for row, request in enumerate(requests):
            result = found[row]
            if isinstance(result, DecodeError):
                bad[row], result = result, [black] * len(request.crops)
            clips += result
        return DecodedBatch(torch.stack(clips), bad)

    def _decode_on_host(self, request: VideoRequest, size: int) -> _Clips:
        """Return the clips of a request that DALI would get wrong or fails on."""
        import torch

        try:
            frames = decode(request.video, request.info, request.numbers)
        except DecodeError as error:
            return error
        clips = (torch.from_numpy(to_rgb(frames, crop, size)) for crop in request.crops)
        return [
            (clip.flip(2) if request.flip else clip).to(self._device)  # [F, H, W, 3]
            for clip in clips
        ]

    def _leave_to_cpu(self, video: bytes, failure: DecodeError) -> None:
        """Decode a video on the CPU from now on: each failure costs a pipeline and seconds."""
        if not self._failed:
            log.warning(
                "DALI failed on a video that the CPU can decode. Such videos are decoded on the "
                "CPU from now on, one by one; if there are many, decode.backend=pyav is faster. "
                "DALI: %s",
                failure.found,
            )
        self._failed.add(hash(video))

    def _make_jobs(self, request: VideoRequest, size: tuple[int, int]) -> list[_Job]:
        """Return the jobs of a request; none if DALI would get its frames wrong."""
        if not request.info.is_plain or (self._failed and hash(request.video) in self._failed):
            return []
        shared = {"size": np.array(size, np.float32), "flip": np.array(request.flip, np.int32)}
        for number, crop in enumerate(request.crops):
            shared[f"crop{number}"] = np.array(dataclasses.astuple(crop), np.int32)
        codec, jobs = request.info.codec, []
        for located in locate_frames(request.video, request.info, request.numbers):
            if self._gpu and located.hides_packets:
                return []
            if self._gpu and not nvdec_decodes(codec, located.pixel_format, self._gpu):
                found = f"{codec} of {located.pixel_format}, "
                found += f"and compute capability {self._gpu[0]}.{self._gpu[1]}"
                do = "set decode.backend=pyav"
                raise DecodeError(
                    "The GPU's decoding units cannot decode the video", found=found, do=do
                )
            video = np.frombuffer(located.file, np.uint8)
            frames = np.array(located.positions, np.int32)
            inputs = {"video": video, "frames": frames, **shared}
            jobs.append(_Job(inputs, len(request.crops), located.slots, located.matrix))
        return jobs

    def _run(self, jobs: list[_Job]) -> list[_Clips]:
        """Share the jobs among the pipelines, which work concurrently."""
        count = len(self._pipelines)
        results: list[_Clips] = [[]] * len(jobs)
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


class _Job(NamedTuple):
    """The frames of a request that are in one file, as far as its packets show."""

    inputs: dict[str, np.ndarray]  # of the graph, by name
    num_crops: int
    slots: list[int]  # which of the request's frames these are
    matrix: Matrix


def _join_jobs(jobs: Sequence[_Job], results: Sequence[_Clips]) -> _Clips:
    """Return the clips of a request, their frames in its order."""
    import torch

    parts: list[list[torch.Tensor]] = []
    for result in results:
        if isinstance(result, DecodeError):
            return result
        parts.append(result)
    if len(jobs) == 1:
        return parts[0]
    order = np.argsort([slot for job in jobs for slot in job.slots])
    return [torch.cat(clips)[order] for clips in zip(*parts, strict=True)]


class _Pipeline:
    """A DALI pipeline; built when first needed, after a failure, and for more jobs than `room`.

    Building takes seconds on a GPU, so there should be room for all jobs from the start.
    """

    def __init__(self, device: str, threads: int) -> None:
        self._device, self._threads = device, threads
        self._built: Any = None
        self.room = 1  # jobs at a time
        self._built_room = self._num_crops = 0
        self._matrices: list[Matrix] = []  # of the batch in progress

    def start(self, jobs: Sequence[_Job]) -> None:
        """Start decoding."""
        self.room, num_crops = max(len(jobs), self.room), jobs[0].num_crops
        if self._built is None or (self.room, num_crops) != (self._built_room, self._num_crops):
            self._built_room, self._num_crops = self.room, num_crops
            self._built = self._build()
        self._matrices = [job.matrix for job in jobs]
        for name in jobs[0].inputs:
            self._built.feed_input(name, [job.inputs[name] for job in jobs])
        self._built.schedule_run()

    def finish(self) -> list[list[torch.Tensor]]:
        """Return the clips of each job; on RuntimeError the pipeline has to be rebuilt."""
        import torch

        # On torch's stream, DALI reuses memory only after torch's reads that are queued there.
        stream = torch.cuda.current_stream() if self._device == "cuda" else None
        try:
            outputs = self._built.share_outputs(cuda_stream=stream)
            clips = [
                [_correct_matrix(torch.from_dlpack(output[row]), matrix) for output in outputs]
                for row, matrix in enumerate(self._matrices)
            ]
            self._built.release_outputs()
        except RuntimeError:
            self._built = None
            raise
        return clips

    def _build(self) -> Any:
        import torch
        from nvidia.dali import pipeline as dali

        pipeline = dali.Pipeline(
            batch_size=self.room,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if self._device == "cuda" else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            pipeline.set_outputs(*_graph(self._device, self._num_crops))
        pipeline.build()
        return pipeline


def _one_by_one(pipeline: _Pipeline, jobs: Sequence[_Job]) -> list[_Clips]:
    results: list[_Clips] = []
    for job in jobs:
        try:
            pipeline.start([job])
            results += pipeline.finish()
        except RuntimeError as error:
            found = " ".join(str(error).split())[-300:]
            results.append(DecodeError("DALI cannot decode the video", found=found, do=LEAVE_OUT))
    return results


def _graph(device: str, num_crops: int) -> list[Any]:
    """Build DALI's graph from compressed bytes to clips, the same on "cuda" and "cpu".

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
        # A triangle filter as wide as the reduction, like torch's on the CPU.
        clip = fn.resize(
            clip, size=size, interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True
        )
        clips.append(fn.flip(clip, horizontal=flip))
    return clips


def _correct_matrix(clip: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Return a clip [F, H, W, 3] as if DALI had used the right matrix; clipped values stay lost."""
    if matrix == "bt601":
        return clip
    return (clip.float() @ _from_bt601(str(clip.device))).round_().clamp_(0, 255).byte()


@functools.cache
def _from_bt601(device: str) -> torch.Tensor:
    """Return [3, 3] by which rows of RGB made with BT.601's weights become those of BT.709."""
    import torch

    bt601, bt709 = (rgb_from_yuv(Colors(name, True))[:, :3] for name in ("bt601", "bt709"))
    matrix = bt709 @ np.linalg.inv(bt601)
    return torch.tensor(matrix.T, dtype=torch.float32, device=device)
