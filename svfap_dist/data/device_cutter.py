"""Clips decoded on the device, many samples at a time: `workers` for batched backends.

In: the same tasks that decode workers do, from as many threads. Out: uint8 frames, written straight
into batches that lie on the device; only compressed bytes have gone there. Threads hand their task
in and wait; one thread of its own takes what has come together while the last lot was being
decoded. How tasks fall together changes no bit of a clip.

Nothing in a process can end a decoder that hangs. The thread is left alone then, and the tasks that
wait for it fail with an error that names the samples, which ends the run.

All that touches the batches is queued on the device's default stream, as the training step is, so a
batch is not overwritten before the step that uses it is done with it.
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

import torch

from svfap_dist.config import Config
from svfap_dist.data.clips import plan_fixed, plan_random
from svfap_dist.data.decoding import batch_decoder_of
from svfap_dist.data.workers import Cut, Outcome, Task, undecodable
from svfap_dist.errors import DecodeError, HealthError
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import BadSample, Sample, unpack
from svfap_dist.video.backends import DEFAULT
from svfap_dist.video.frames import VideoRequest

_LOT_SECONDS = 4.0  # longest for what is decoded at a time, in data.decode_seconds


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """done: None, or why there are no clips."""

    key: str  # of the sample
    request: VideoRequest
    clips: torch.Tensor  # where they go: [crops, F, S, S, 3]
    done: Future[DecodeError | None]


class DeviceCutter:
    """Does tasks on the device; any number of threads may call it.

    Args:
        frames: where clips go: uint8 [batches, B, F, S, S, 3] on the device.
    """

    def __init__(self, config: Config, frames: torch.Tensor) -> None:
        self._config, self._decoder = config, batch_decoder_of(config)
        self._frames, self._most = frames, frames.shape[1]  # clips decoded at a time
        self._handed_in: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._lock, self._is_closing = threading.Lock(), False
        self._seconds = _LOT_SECONDS * config.data.decode_seconds
        self._under_way: list[_Wanted] = []  # another list for each lot
        self._is_hung = False
        self._thread = threading.Thread(target=self._serve, name="batched-decode", daemon=True)
        self._thread.start()

    def interrupt(self) -> None:
        """Take no more tasks; those that wait are cancelled."""
        with self._lock:
            self._is_closing = True
            self._handed_in.put(None)

    def close(self) -> None:
        """End the thread, after `interrupt`; one that hangs ends with the process."""
        if not self._is_hung:
            self._thread.join()

    def __call__(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Do tasks, one by one but together with those of other threads.

        Raises: CancelledError after `interrupt`; HealthError if the decoder hangs; RuntimeError if
        the device fails.
        """
        return [self._done(task) for task in tasks]

    def _done(self, task: Task) -> Outcome:
        began = time.perf_counter()
        sample = unpack(task.packed)
        bad = sample if isinstance(sample, BadSample) else self._cut(task.cut, sample)
        return Outcome(bad, time.perf_counter() - began)

    def _cut(self, cut: Cut, sample: Sample) -> BadSample | None:
        try:
            if cut.window is None:
                numbers, crops = plan_fixed(sample.info, self._config)
            else:
                streams = [Stream(*key) for key in cut.crops]
                numbers, crops = plan_random(
                    sample.info, self._config, Stream(*cut.window), streams
                )
        except DecodeError as error:
            return undecodable(sample, error)
        request = VideoRequest(sample.video, sample.info, numbers, crops)
        place = self._frames[cut.batch, cut.row : cut.row + len(crops)]
        wanted = _Wanted(sample.key, request, place, Future())
        with self._lock:
            if self._is_closing:
                raise CancelledError
            self._handed_in.put(wanted)
        error = self._awaited(wanted)
        return undecodable(sample, error) if error else None

    def _awaited(self, wanted: _Wanted) -> DecodeError | None:
        """What became of a task, which may have to wait for others before it."""
        while True:
            lot = self._under_way
            try:
                return wanted.done.result(timeout=self._seconds)
            except FutureTimeoutError as error:
                if self._under_way is not lot or wanted.done.done():
                    continue  # it goes on
                self._is_hung = True
                raise self._hung(lot) from error

    def _hung(self, lot: Sequence[_Wanted]) -> HealthError:
        return HealthError(
            "Decoder does not respond",
            where=f"decode.backend = {self._config.decode.backend}",
            found=f"nothing for {self._seconds:g} s, decoding {', '.join(w.key for w in lot)}",
            do=f"continue with decode.backend={DEFAULT} and data.decode_workers >= 1, where a "
            "hanging video costs only itself; or raise data.decode_seconds",
        )

    def _serve(self) -> None:
        device = self._frames.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            while True:
                together = self._next()
                if None in together or self._is_closing:
                    for wanted in filter(None, together):
                        wanted.done.set_exception(CancelledError())
                    if None in together:
                        return
                    continue
                self._decode([wanted for wanted in together if wanted])

    def _next(self) -> list[_Wanted | None]:
        """What has been handed in: at least one, at most what makes a batch."""
        together = [self._handed_in.get()]
        clips = self._config.data.repeated_sampling
        while together[-1] is not None and (len(together) + 1) * clips <= self._most:
            try:
                together.append(self._handed_in.get_nowait())
            except queue.Empty:
                break
        return together

    def _decode(self, together: list[_Wanted]) -> None:
        self._under_way = together
        try:
            size = self._config.data.frame_size
            batch = self._decoder.decode_batch([wanted.request for wanted in together], size)
            clips = iter(batch.clips)
            for wanted in together:
                for place in wanted.clips:
                    place.copy_(next(clips))
        except Exception as error:  # it is raised again in the threads that wait
            for wanted in together:
                wanted.done.set_exception(error)
            return
        for number, wanted in enumerate(together):
            wanted.done.set_result(batch.bad.get(number))
