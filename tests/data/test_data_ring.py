"""Buffers of the ring: filled again only when the copies of their batch are done."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from loaders import SIZES, children_of, config_of, loader_of
from planted_worker import QuickWorker

from svfap_dist.data.batch import RingPlace


class FakeEvent:
    """Copies that are under way until a caller waits for them."""

    waits = 0

    def __init__(self) -> None:
        self.done = True

    def record(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        FakeEvent.waits += not self.done
        self.done = True


@pytest.fixture
def events(monkeypatch) -> list[FakeEvent]:
    """The events of the places of the next ring."""
    made: list[FakeEvent] = []

    def place(event: object) -> RingPlace:
        made.append(FakeEvent())
        return RingPlace(made[-1])  # type: ignore[arg-type]

    monkeypatch.setattr("svfap_dist.data.batch.RingPlace", place)
    monkeypatch.setattr(FakeEvent, "waits", 0)
    return made


@pytest.mark.parametrize("feeders", [0, 1])
def test_a_batch_is_not_overwritten_before_its_copies_are_done(
    make_data_set, events, monkeypatch, feeders
):
    """Nor by a feeder that begins in the place of a dead one."""
    monkeypatch.setattr("svfap_dist.data.loader.ClipWorker", QuickWorker)
    config = config_of(prefetch_bytes=1, feeders=feeders)
    batches = loader_of(make_data_set(SIZES), config).batches(0, 8)
    copying: list[tuple[FakeEvent, torch.Tensor, torch.Tensor]] = []
    for number, batch in enumerate(batches):
        copying.append((events[number % 3], batch.frames, batch.frames.clone()))
        time.sleep(0.05)  # time to fill what may be filled
        for event, frames, before in copying[-2:]:
            assert not event.done or event is copying[-1][0]
            assert torch.equal(frames, before)
        if feeders and number == 3:
            for pid in children_of(os.getpid()):
                if os.getpgid(pid) == pid:
                    os.kill(pid, signal.SIGKILL)
    assert FakeEvent.waits == 8  # the last ones as the ring is closed


def test_copies_that_are_done_are_not_waited_for(make_data_set, events):
    batches = loader_of(make_data_set(SIZES), config_of(prefetch_bytes=1)).batches(0, 8)
    for number, batch in enumerate(batches):
        batch.release()
        events[number % 3].done = True
    assert FakeEvent.waits == 0


def test_a_released_batch_keeps_its_event(make_data_set, events):
    """Released behind its copies, it is not released again behind the step that uses them."""
    batches = loader_of(make_data_set(SIZES), config_of(prefetch_bytes=1)).batches(0, 2)
    batch = next(batches)
    batch.release()
    events[0].done = True
    next(batches)
    assert events[0].done
    batches.close()


@pytest.mark.gpu
@pytest.mark.parametrize("feeders", [0, 1])
def test_pinned_batches_reach_a_gpu_unchanged(make_data_set, feeders):
    data_set, device = make_data_set(SIZES), torch.device("cuda")
    expected = [batch.frames.clone() for batch in loader_of(data_set).batches(0, 12)]
    config = config_of(prefetch_bytes=1, feeders=feeders, decode_workers=1)
    cluster = config.cluster.model_copy(update={"use_gpu": True})
    copies = []
    for batch in loader_of(data_set, config.model_copy(update={"cluster": cluster})).batches(0, 12):
        assert batch.frames.is_pinned()
        torch.cuda._sleep(50_000_000)  # cycles: the copy is not even begun as the next is requested
        copies.append(batch.frames.to(device, non_blocking=True))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, copies, strict=True))
