"""Steps of `profile.steps` that an attempt never takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svfap_dist.config import Config, recipe
from svfap_dist.distributed import World
from svfap_dist.profiling.trace import StepTracer
from svfap_dist.train.tracing import StepTracing


def _config(folder: Path, *steps: int) -> Config:
    return recipe.load("tiny_cpu", [f"run.url={folder}", f"profile.steps={list(steps)}"])


def _open_tracing(config: Config, attempt: range, rank: int = 0) -> None:
    engine: Any = SimpleNamespace(device=torch.device("cpu"), phases=None)
    recorder: Any = None
    StepTracing(config, World(rank, rank, 2, 2), engine, recorder, attempt).close()


@pytest.mark.parametrize(
    ("steps", "done", "warns"),
    [
        ((8, 10), 0, False),
        ((20, 25), 0, False),
        ((21, 25), 0, True),
        ((8, 10), 9, False),
        ((8, 10), 10, True),
        ((8, 10), 20, False),  # the run is over
        ((), 5, False),
    ],
)
def test_steps_that_never_come_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: Any, done: int, warns: bool
) -> None:
    for rank in (0, 1):  # rank 1 leaves it to rank 0
        _open_tracing(_config(tmp_path, *steps), range(done, 20), rank)
    expected = f"No step is traced: profile.steps = {list(steps)}, but this attempt takes the steps"
    assert caplog.messages == (
        [f"{expected} {done + 1} to 20. Choose some of those."] if warns else []
    )


def test_steps_that_an_earlier_attempt_traced_are_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(tmp_path, 2, 4)
    tracer = StepTracer(torch.device("cpu"))
    tracer.begin_step(3)
    trace = tracer.stop()
    assert trace is not None
    assert trace.write(str(tmp_path), rank=0).files
    _open_tracing(config, range(10, 20))
    assert not caplog.messages
    _open_tracing(_config(tmp_path, 5, 6), range(10, 20))
    assert len(caplog.messages) == 1
