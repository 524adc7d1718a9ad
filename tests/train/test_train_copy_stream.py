"""Copies beside computation: which stream does what, and when a batch's memory is free again."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from svfap_dist.data.batch import ClipBatch, RingPlace
from svfap_dist.train.copy_stream import CopyStream


@dataclasses.dataclass
class FakeStream:
    name: str
    log: list[str]

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    def __init__(self, log: list[str], current: list[FakeStream]) -> None:
        self._log, self._current = log, current

    def record(self) -> None:
        self._log.append(f"event on {self._current[-1].name}")


class FakeTensor:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def record_stream(self, stream: FakeStream) -> None:
        self._log.append(f"kept for {stream.name}")


def batch_of(clips: int, place: RingPlace | None = None) -> ClipBatch:
    frames, none = torch.zeros(clips, 1, dtype=torch.uint8), torch.zeros(clips, 0)
    return ClipBatch(frames, none, none, [], [], 0.0, 0.0, place=place)


def test_inputs_are_made_beside_the_step_and_the_batch_is_released_behind_its_copies(monkeypatch):
    log: list[str] = []
    current = [FakeStream("main", log)]

    @contextlib.contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copies", log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    place = RingPlace(FakeEvent(log, current))  # type: ignore[arg-type]
    place.use()
    copies, batch = CopyStream(torch.device("cuda")), batch_of(4, place)
    for part in (slice(0, 2), slice(2, 4)):

        def make() -> tuple:
            log.append(f"made on {current[-1].name}")
            return FakeTensor(log), FakeTensor(log)

        copies.inputs(batch, part, make)
        log.append("step")
    batch.release()  # as the loader does: the event stays where it was recorded
    made, used = ["made on copies"], ["main waits for copies", *["kept for main"] * 2, "step"]
    assert log == [*made, *used, *made, "event on copies", *used]


def test_on_a_cpu_inputs_are_made_at_once():
    batch = batch_of(2)
    tensors = CopyStream(torch.device("cpu")).inputs(batch, slice(None), lambda: (batch.frames,))
    assert tensors[0] is batch.frames


@pytest.mark.gpu
def test_a_gpu_computes_with_the_clips_of_its_step_while_the_next_are_copied():
    """A batch's memory is overwritten once its place is free, which is before its step is done."""
    device = torch.device("cuda")
    copies, place = CopyStream(device), RingPlace(torch.cuda.Event())
    frames = torch.zeros(4, 1 << 20, dtype=torch.uint8).pin_memory()
    none, sums = torch.zeros(4, 0), []
    for step in range(20):
        place.wait()
        frames.fill_(step)
        batch = ClipBatch(frames, none, none, [], [], 0.0, 0.0, place=place)
        place.use()
        (here,) = copies.inputs(batch, slice(None), lambda: (frames.to(device, non_blocking=True),))
        torch.cuda._sleep(10_000_000)  # cycles: the step is still computed as the next is copied
        sums.append(here.sum(dtype=torch.int64))
    assert [int(total) for total in sums] == [step * frames.numel() for step in range(20)]
