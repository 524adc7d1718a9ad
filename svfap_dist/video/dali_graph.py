"""DALI's own part of decoding with it: the graph, and a pipeline that runs it on a batch.

In: `Job`s, arrays as the graph takes them. Out: their clips, on the device. DALI takes all colours
for BT.601, so those of BT.709 are put right here.

`nvidia.dali` is imported here alone, and here only when it is used.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from svfap_dist.video.color import rgb_from_yuv
from svfap_dist.video.frames import Matrix

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that can be met, as far as its packets tell, as the graph takes it."""

    video: np.ndarray
    frames: np.ndarray
    size: np.ndarray
    flip: np.ndarray
    crops: list[np.ndarray]
    matrix: Matrix


class Pipeline:
    """A DALI pipeline; built when first needed, when one was lost, and for larger batches."""

    def __init__(self, device: str, threads: int) -> None:
        self._device, self._threads = device, threads
        self._built: Any = None
        self._room = self._num_crops = 0
        self._matrices: list[Matrix] = []  # of the batch under way

    def start(self, jobs: Sequence[Job]) -> None:
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
        from nvidia.dali import pipeline as dali

        pipeline = dali.Pipeline(
            batch_size=self._room,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if self._device == "cuda" else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            pipeline.set_outputs(*graph(self._device, self._num_crops))
        pipeline.build()
        return pipeline


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
