"""The history of a GPU's memory in a trace, which torch keeps and draws by private functions."""

from __future__ import annotations

import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.cuda import _memory_viz

from svfap_dist.profiling.trace import StepTracer

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
