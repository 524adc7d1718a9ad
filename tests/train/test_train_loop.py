"""The order of events of a run, and when its host waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from svfap_dist.config import recipe
from svfap_dist.train import loop
from svfap_dist.train.health import NOTHING, StepDecision

STEPS = 7


class FakeAttempt:
    """Records what the loop calls; all ranks vote to stop after a step, which is seen later."""

    total_steps, stop_after = STEPS, STEPS

    def __init__(self, *_: Any) -> None:
        self.step, self.events = 0, []
        FakeAttempt.newest = self

    def batches(self, stack: contextlib.ExitStack) -> Iterator[int]:
        return iter(range(STEPS))

    def is_due(self, period: int) -> bool:
        return period > 0 and self.step % period == 0

    def take_step(self, batch: int, notice: object) -> None:
        self.step += 1

    def decide(self, up_to_now: bool, before: StepDecision = NOTHING) -> StepDecision:
        self.events.append(f"{'wait for' if up_to_now else 'read before'} {self.step}")
        seen = self.step if up_to_now else self.step - 1
        return StepDecision(stop=before.stop or seen >= self.stop_after)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self.events.append(f"{name} {self.step}")


def events_of(monkeypatch: pytest.MonkeyPatch, stop_after: int) -> list[str]:
    monkeypatch.setattr(loop, "Attempt", FakeAttempt)
    monkeypatch.setattr(FakeAttempt, "stop_after", stop_after)
    device = contextlib.nullcontext(torch.device("cpu"))
    monkeypatch.setattr(loop, "process_group", lambda *_: device)
    options = ["train.log_every=4", "train.checkpoint_every=5", "train.eval_every=0"]
    loop.run(recipe.load("tiny_cpu", [*options, "data.url=/data", "run.url=/run"]))
    return FakeAttempt.newest.events


def test_a_step_is_waited_for_only_where_something_depends_on_it(monkeypatch) -> None:
    read, wait = "read before", "wait for"
    assert events_of(monkeypatch, STEPS) == [
        "evaluate 0",
        *(f"{read} 1", f"{read} 2", f"{read} 3", f"{wait} 4", "log 4"),
        *(f"{wait} 5", f"{wait} 5", "save 5", f"{read} 6"),
        *(f"{wait} 7", f"{wait} 7", "log 7", "evaluate 7", "save 7", "finish 7"),
    ]


def test_a_stop_saves_a_step_whose_outcome_is_known(monkeypatch) -> None:
    *_, read, wait, log, evaluate, save, finish = events_of(monkeypatch, stop_after=1)
    assert (read, wait) == ("read before 2", "wait for 2")
    assert (log, evaluate, save, finish) == ("log 2", "evaluate 2", "save 2", "finish 2")
