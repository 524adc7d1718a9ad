"""The order of events of a run, and when its host waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from svfap_dist.config import recipe
from svfap_dist.distributed import World
from svfap_dist.train import loop, signals
from svfap_dist.train.health import NOTHING, StepDecision

STEPS = 7


class FakeAttempt:
    """Records what the loop calls; all ranks vote to stop after a step, which is seen later."""

    total_steps, stop_after, leaving_at, is_skipping = STEPS, STEPS, 0, False
    validates = is_over = False

    def __init__(self, *_: Any) -> None:
        self.step, self.events = 0, []
        FakeAttempt.newest = self

    def batches(self, stack: contextlib.ExitStack) -> Iterator[int]:
        return iter(range(STEPS))

    def is_due(self, period: int) -> bool:
        return period > 0 and self.step % period == 0

    def take_step(self, batch: int, notice: object) -> bool:
        self.step += 1
        return True

    def decide(self, up_to_now: bool, before: StepDecision = NOTHING) -> StepDecision:
        self.events.append(f"{'wait for' if up_to_now else 'read before'} {self.step}")
        seen = self.step if up_to_now else self.step - 1
        saves = before.save or seen == self.leaving_at > 0
        return StepDecision(stop=before.stop or seen >= self.stop_after, save=saves)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.events.append(f"{name} {self.step}")


def events_of(monkeypatch: pytest.MonkeyPatch, stop_after: int, **arguments: Any) -> list[str]:
    monkeypatch.setattr(loop, "Attempt", FakeAttempt)
    monkeypatch.setattr(FakeAttempt, "stop_after", stop_after)
    device = contextlib.nullcontext(torch.device("cpu"))
    monkeypatch.setattr(loop, "process_group", lambda *_: device)
    options = ["train.log_every=4", "train.checkpoint_every=5", "train.eval_every=0"]
    loop.run(recipe.load("tiny_cpu", [*options, "data.url=/data", "run.url=/run"]), **arguments)
    return FakeAttempt.newest.events


def test_a_step_is_waited_for_only_where_something_depends_on_it(monkeypatch) -> None:
    read, wait = "read before", "wait for"
    assert events_of(monkeypatch, STEPS) == [
        *("evaluate 0", "probe 0"),
        *(f"{read} 1", f"{read} 2", f"{read} 3", f"{wait} 4", "log 4"),
        *(f"{wait} 5", f"{wait} 5", "save 5", f"{read} 6"),
        *(f"{wait} 7", f"{wait} 7", "log 7", "evaluate 7", "save 7", "finish 7"),
    ]


def test_a_stop_saves_a_step_whose_outcome_is_known(monkeypatch) -> None:
    *_, read, wait, log, evaluate, save, finish = events_of(monkeypatch, stop_after=1)
    assert (read, wait) == ("read before 2", "wait for 2")
    assert (log, evaluate, save, finish) == ("log 2", "evaluate 2", "save 2", "finish 2")


def test_a_node_that_will_leave_saves_once_and_the_run_continues(monkeypatch) -> None:
    monkeypatch.setattr(FakeAttempt, "leaving_at", 1)
    events = events_of(monkeypatch, STEPS)
    assert [event for event in events if event.startswith("save")] == ["save 2", "save 5", "save 7"]
    assert events.index("wait for 2") == events.index("save 2") - 1


def test_the_best_epoch_is_saved_and_the_run_may_end_early(monkeypatch) -> None:
    monkeypatch.setattr(FakeAttempt, "validates", property(lambda self: self.step in (3, 6)))
    monkeypatch.setattr(FakeAttempt, "is_over", property(lambda self: self.step == 6))
    monkeypatch.setattr(FakeAttempt, "validate", lambda self, _: self.step == 3, raising=False)
    events = events_of(monkeypatch, STEPS)
    assert [event for event in events if event.startswith("save")] == ["save 3", "save 5", "save 6"]
    assert {"wait for 3", "wait for 6"} <= set(events)
    assert events[-1] == "finish 6"


def test_only_rank_0_is_asked_for_nodes_that_leave(monkeypatch) -> None:
    """At each step, so hundreds of ranks would ask their launcher hundreds of times a second."""
    asked: list[str] = []
    steps = iter(range(STEPS))

    def take_step(self: FakeAttempt, batch: int, notice: signals.Notice) -> bool:
        self.step = next(steps) + 1
        self.events.append(f"news {notice.new_nodes_leaving()}")
        return True

    def leaving() -> set[str]:
        asked.append("node")
        return set(asked)

    monkeypatch.setattr(FakeAttempt, "take_step", take_step)
    for rank in (0, 1):
        place = World(rank, rank, 2, 2)
        monkeypatch.setattr(loop.distributed, "world_from_environment", lambda place=place: place)
        steps = iter(range(STEPS))
        events = events_of(monkeypatch, STEPS, nodes_leaving=leaving)
        news = [event for event in events if event.startswith("news")]
        assert news == [f"news {rank == 0 and step == 0}" for step in range(STEPS)]
    assert len(asked) == STEPS
