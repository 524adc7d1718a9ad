"""Traces of steps: what is stored of a GPU's memory, which steps are traced, ranges for nsys."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.cuda import _memory_viz

from svfap_dist.config import Config, recipe
from svfap_dist.distributed import World
from svfap_dist.profiling.trace import StepTracer
from svfap_dist.telemetry.meter import Phases
from svfap_dist.train.tracing import StepTracing

# As torch's allocator describes 512 bytes that are allocated; a frame is one of Python's.
FRAME = {"filename": "network.py", "line": 7, "name": "forward"}
EVENT = {"action": "alloc", "addr": 4096, "size": 512, "stream": 0, "frames": [FRAME]}
SNAPSHOT = {"segments": [], "device_traces": [[EVENT]], "allocator_settings": {}}


def _store_trace(tracer: StepTracer, device: str, folder: Path) -> tuple[str, ...]:
    tracer.begin_step(3)
    weights = torch.ones(1 << 20, device=device)
    assert float(weights.sum()) == 1 << 20
    trace = tracer.stop()
    assert trace is not None
    return trace.write(str(folder), rank=0).files


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_memory_of_a_gpu_is_stored_as_torch_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's functions are private: their names and parameters are those of this torch."""
    record = mock.create_autospec(torch.cuda.memory._record_memory_history_impl)
    snapshot = mock.create_autospec(torch.cuda.memory._snapshot, return_value=SNAPSHOT)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    files = _store_trace(StepTracer(torch.device("cuda")), "cpu", tmp_path)
    assert [name.rpartition("rank-0000.")[2] for name in files] == [
        "memory.pickle",
        "operations.txt",
        "trace.json.gz",
    ]
    began, ended = record.call_args_list
    assert began.kwargs["stacks"] == "python"
    assert ended == mock.call(enabled=None)
    stored = pickle.loads((tmp_path / files[0]).read_bytes())
    assert stored == SNAPSHOT
    assert "snapshot.pickle" in _memory_viz.trace_plot(stored)


@pytest.mark.gpu
def test_the_memory_of_a_gpu_has_the_stacks_of_its_allocations(tmp_path: Path) -> None:
    files = _store_trace(StepTracer(torch.device("cuda")), "cuda", tmp_path)
    (name,) = (name for name in files if name.endswith(".memory.pickle"))
    stored = pickle.loads((tmp_path / name).read_bytes())
    events = [event for events in stored["device_traces"] for event in events]
    (ours,) = (each for each in events if each["action"] == "alloc" and each["size"] == 4 << 20)
    assert "_store_trace" in {frame["name"] for frame in ours["frames"]}
    assert "snapshot.pickle" in _memory_viz.trace_plot(stored)


@pytest.mark.parametrize("by_nsys", [False, True])
def test_parts_of_a_step_are_nvtx_ranges_under_nsys(
    monkeypatch: pytest.MonkeyPatch, by_nsys: bool
) -> None:
    named: list[str] = []

    @contextlib.contextmanager
    def nvtx_range(name: str) -> Iterator[None]:
        named.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx_range)
    monkeypatch.delenv("NSYS_PROFILING_SESSION_ID", raising=False)
    if by_nsys:
        monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    phases = Phases(torch.device("cpu"))
    with phases.range("load"), phases.measured("forward"):
        pass
    assert named == (["load", "forward"] if by_nsys else [])


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
    files = _store_trace(StepTracer(torch.device("cpu")), "cpu", tmp_path)
    assert files
    _open_tracing(config, range(10, 20))
    assert not caplog.messages
    _open_tracing(_config(tmp_path, 5, 6), range(10, 20))
    assert len(caplog.messages) == 1
