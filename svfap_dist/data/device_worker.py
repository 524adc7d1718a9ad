"""Clips decoded on the device, many samples at a time: `DecodePool` for batched backends.

In: the jobs that worker processes would do, from any number of threads. Out: uint8 frames, written
straight into batches on the device; only compressed bytes are copied there. Threads submit all jobs
of a call and wait, so a few threads keep the device busy; one thread decodes together all jobs that
arrived while it decoded the previous group. How jobs are grouped does not change a bit of a clip.

Nothing within a process can stop a decoder that hangs. Its thread is abandoned then, and the
waiting jobs fail with an error that names their samples, which ends the run.

Writes to the batches are queued on the device's default stream, as the training step is, so a batch
is not overwritten before the step that uses it has finished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import cast

import torch

from svfap_dist.config import Config
from svfap_dist.data.clips import DecodeJob, DecodeResult, plan_clips
from svfap_dist.data.decoding import decoder_of
from svfap_dist.errors import DecodeError, HealthError
from svfap_dist.shards.format import BadSample, unpack
from svfap_dist.video.backends import DEFAULT
from svfap_dist.video.frames import BatchDecoder, VideoRequest

_GROUP_SECONDS = 4.0  # deadline of a group, in units of data.decode_seconds


@dataclasses.dataclass(frozen=True)
class _Pending:
    index: int  # of the sample
    key: str
    request: VideoRequest
    clips: torch.Tensor  # rows to write to: [crops, F, S, S, 3]
    done: Future[DecodeError | None]  # None: the clips are written


class DeviceClipWorker:
    """Does jobs on the device; any number of threads may call it.

    Args:
        config: Recipe, whose backend is batched.
        frames: Where clips go: uint8 [batches, B, F, S, S, 3] on the device.
    """

    def __init__(self, config: Config, frames: torch.Tensor) -> None:
        self._config, self._decoder = config, cast(BatchDecoder, decoder_of(config))
        # Videos decoded at a time: those of a batch.
        self._frames, self._max_group = frames, frames.shape[1] // config.data.repeated_sampling
        self._decoder.reserve(self._max_group)
        self._submitted: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._lock, self._is_closing = threading.Lock(), False
        self._seconds = _GROUP_SECONDS * config.data.decode_seconds
        self._group: list[_Pending] = []  # being decoded; a new list for each group
        self._is_hung = False
        self._thread = threading.Thread(target=self._serve, name="batched-decode", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """Accept no more jobs; those that wait raise CancelledError."""
        with self._lock:
            self._is_closing = True
            self._submitted.put(None)

    def close(self) -> None:
        """Join the thread, after `interrupt`; one that hangs ends with the process."""
        if not self._is_hung:
            self._thread.join()

    def __call__(self, jobs: Sequence[DecodeJob]) -> list[DecodeResult]:
        """Do jobs together, grouped with those of other threads.

        Args:
            jobs: Of one call: all are submitted before the first is waited for.

        Raises:
            HealthError: The decoder hangs.
        """
        results, began = [], time.perf_counter()
        for submitted in [self._submit(job) for job in jobs]:
            bad = self._bad_sample(submitted) if isinstance(submitted, _Pending) else submitted
            results.append(DecodeResult(bad, time.perf_counter() - began))
            began = time.perf_counter()
        return results

    def _submit(self, job: DecodeJob) -> _Pending | BadSample:
        """Give a job to the thread that decodes, unless its sample is bad."""
        sample, request = unpack(job.packed), job.request
        if isinstance(sample, BadSample):
            return sample
        try:
            numbers, crops = plan_clips(
                sample.info,
                self._config.data,
                request.window,
                request.crops,
                phase=request.phase,
                allow_short=self._config.task is not None,
                region=request.region,
            )
        except DecodeError as error:
            return BadSample(sample.index, sample.key, error.reason, str(error))
        rows = self._frames[request.batch, request.row : request.row + len(crops)]
        video = VideoRequest(sample.video, sample.info, numbers, crops)
        pending = _Pending(sample.index, sample.key, video, rows, Future())
        with self._lock:
            if self._is_closing:
                raise CancelledError
            self._submitted.put(pending)
        return pending

    def _bad_sample(self, pending: _Pending) -> BadSample | None:
        error = self._wait(pending)
        return error and BadSample(pending.index, pending.key, error.reason, str(error))

    def _wait(self, pending: _Pending) -> DecodeError | None:
        """Return the result of a job, which may have to wait for groups before its own."""
        while True:
            group = self._group
            try:
                return pending.done.result(timeout=self._seconds)
            except FutureTimeoutError as error:
                if self._group is not group or pending.done.done():
                    continue  # another group has finished meanwhile
                self._is_hung = True
                where = f"decode.backend = {self._config.decode.backend}"
                keys = ", ".join(each.key for each in group)
                do = f"continue with decode.backend={DEFAULT} and data.decode_workers >= 1, where "
                do += "a video that hangs costs only itself; or raise data.decode_seconds"
                found = f"nothing for {self._seconds:g} s, decoding {keys}"
                raise HealthError("Decoder does not respond", where, found, do) from error

    def _serve(self) -> None:
        device = self._frames.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            while True:
                group = self._next_group()
                if None in group or self._is_closing:
                    for pending in filter(None, group):
                        pending.done.set_exception(CancelledError())
                    if None in group:
                        return
                    continue
                self._decode([pending for pending in group if pending])

    def _next_group(self) -> list[_Pending | None]:
        """Return the submitted jobs: at least one, at most those of a batch."""
        group = [self._submitted.get()]
        while group[-1] is not None and len(group) < self._max_group:
            try:
                group.append(self._submitted.get_nowait())
            except queue.Empty:
                break
        return group

    def _decode(self, group: list[_Pending]) -> None:
        self._group = group
        try:
            size = self._config.data.frame_size
            batch = self._decoder.decode_batch([pending.request for pending in group], size)
            clips = iter(batch.clips)
            for pending in group:
                for row in pending.clips:
                    row.copy_(next(clips))
        except Exception as error:  # raised again in the threads that wait
            for pending in group:
                pending.done.set_exception(error)
            return
        for number, pending in enumerate(group):
            pending.done.set_result(batch.bad.get(number))
