"""What the engine sets up on a rank: device, threads, DeepSpeed, and the optimizer's counters."""

from __future__ import annotations

import enum
import io
import logging
import os
import socket
import subprocess
import sys
import tempfile
import types
from typing import Any

import pytest
import torch

from svfap_dist.checkpoint.parameter_states import ParameterState
from svfap_dist.config import recipe
from svfap_dist.distributed import World
from svfap_dist.errors import ClusterError
from svfap_dist.parallel import cpus
from svfap_dist.telemetry.meter import Phases
from svfap_dist.train import engine, partitions


def recipe_on_gpu() -> Any:
    return recipe.from_tables({"cluster": {"use_gpu": True}}, where="test")


@pytest.mark.parametrize(("gpus", "local_ranks"), [(4, 8), (2, 3)])
def test_ranks_that_would_share_a_gpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, local_ranks: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    world = World(rank=1, local_rank=1, world_size=local_ranks, local_world_size=local_ranks)
    with pytest.raises(ClusterError, match=f"{local_ranks} ranks .* {gpus} CUDA devices"):
        engine._device(recipe_on_gpu(), world)


@pytest.mark.parametrize(("gpus", "index"), [(1, 0), (8, 5), (16, 5)])
def test_a_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int, index: int) -> None:
    """With one visible device it is the rank's own: Ray hides those of other ranks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    world = World(rank=5, local_rank=5, world_size=8, local_world_size=8)
    assert engine._device(recipe_on_gpu(), world) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("others", "quota", "threads"),
    [
        ([], None, 4),
        ([{0, 1, 2, 3}], None, 2),  # torchrun: the same cores
        ([{4, 5, 6, 7}, {8, 9}], None, 4),  # srun: cores of their own
        ([{2, 3, 4, 5}], None, 2),
        ([], 2.5, 2),  # a container's limit
        ([{0, 1, 2, 3}], 3.0, 1),
        ([], 0.5, 1),
    ],
)
def test_threads_are_divided_only_among_ranks_on_the_same_cores(
    monkeypatch: pytest.MonkeyPatch, others: list[set[int]], quota: float | None, threads: int
) -> None:
    here, mine = socket.gethostname(), {0, 1, 2, 3}
    placed = [(here, mine), *((here, cores) for cores in others), ("elsewhere", mine)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mine)
    monkeypatch.setattr(engine, "all_gather_object", lambda value: placed)
    monkeypatch.setattr(engine, "cpu_quota", lambda: quota)
    assert engine._fair_threads() == threads


@pytest.mark.parametrize(("threads", "busy", "warns"), [(2, 1.9, 1), (2, 0.9, 0), (1, 1.9, 0)])
def test_threads_on_a_busy_machine_are_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    threads: int,
    busy: float,
    warns: int,
) -> None:
    """Of others' work, not of this process's own, such as the fold before."""
    monkeypatch.setattr(cpus, "machine_cpus", lambda: 2)
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 2)
    engine._warn_if_busy.cache_clear()  # a run of another test
    for busy_later in (busy, 2.0):  # the load of the first run
        monkeypatch.setattr(cpus, "load_average", lambda value=busy_later: value)
        engine._warn_if_busy(threads)
    engine._warn_if_busy.cache_clear()
    assert caplog.text.count("set train.threads_per_rank=1") == warns


class _OtherHandler(logging.StreamHandler):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_kernel_of_deepspeed_is_probed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    """Reading the table of kernels prints what does not compile, between lines of results."""

    def probe(name: str) -> dict[str, bool]:
        print(f"[WARNING] {name}: compatibility check failed")
        return {"deepspeed_shm_comm": True}

    package, ops = types.ModuleType("deepspeed"), types.ModuleType("deepspeed.ops")
    package.ops = ops  # type: ignore[attr-defined]
    ops.__getattr__ = probe  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", ops)
    config = types.ModuleType("deepspeed.runtime.zero.config")
    config.ZeroStageEnum = enum.Enum("ZeroStageEnum", ["optimizer_states"])  # type: ignore[attr-defined]
    for name in ("deepspeed.runtime", "deepspeed.runtime.zero", config.__name__):
        monkeypatch.setitem(sys.modules, name, config)
    monkeypatch.setenv("DS_ACCELERATOR", device)
    own, other = logging.StreamHandler(sys.stdout), _OtherHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "handlers", [own, other])
    assert engine._deepspeed(torch.device(device)) is package
    assert capsys.readouterr().out == ""
    assert own.stream is sys.stderr
    assert isinstance(other.stream, io.StringIO)  # of the program that embeds training
    assert vars(ops).get("__compatible_ops__") == (
        {"deepspeed_shm_comm": False} if device == "cpu" else None
    )


def test_counters_of_the_optimizer_are_on_the_device_after_a_load() -> None:
    """Fused AdamW of a GPU refuses a step counter on the CPU."""
    states = {name: {"step": torch.tensor(7, dtype=torch.int64)} for name in ("a", "b")}
    fake = types.SimpleNamespace(
        basic_optimizer=types.SimpleNamespace(state=states),
        load_checkpoint=lambda folder, tag: (folder, {}),
    )
    loaded = engine.Engine.__new__(engine.Engine)
    loaded.device, loaded._engine = torch.device("meta"), fake
    loaded.load("folder", "tag")
    counters = [state["step"] for state in states.values()]
    assert {(c.device.type, c.dtype) for c in counters} == {("meta", torch.float32)}


def test_states_of_parameters_are_loaded_onto_the_device() -> None:
    """Use the device `meta` as a GPU: tensors that are not moved to it stay on the CPU."""
    names = ("weight", "bias")
    weights = [torch.nn.Parameter(torch.ones(2, 3, device="meta")) for _ in names]
    network = torch.nn.Module()
    for name, weight in zip(names, weights, strict=True):
        network.register_parameter(name, weight)
    optimizer = torch.optim.AdamW(weights)
    fake = types.SimpleNamespace(module=network, optimizer=optimizer, basic_optimizer=optimizer)
    pieces = {key: [torch.ones(6)] for key in ("fp32", "exp_avg", "exp_avg_sq")}
    partitions.load_states(fake, 0, {name: ParameterState(pieces, step=7.0) for name in names})
    for weight in weights:
        found = {
            key: (value.device.type, value.dtype) for key, value in optimizer.state[weight].items()
        }
        assert found == dict.fromkeys(("exp_avg", "exp_avg_sq", "step"), ("meta", torch.float32))
    # A counter that two parameters share would count each step twice.
    first, second = (optimizer.state[weight]["step"] for weight in weights)
    assert first is not second


@pytest.mark.parametrize("is_compiled", [False, True])
def test_only_compiled_steps_load_the_compiler(
    monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    """torch imports its compiler to mark a step: 2 seconds and 200 MiB of each rank."""
    marks: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    opened: Any = engine.Engine.__new__(engine.Engine)
    opened._config = recipe.from_tables({"train": {"compile": is_compiled}}, where="test")
    opened.device, opened._rank = torch.device("cpu"), 0
    opened.phases = Phases(opened.device)
    opened._copies = types.SimpleNamespace(inputs=lambda batch, part, make: ())
    opened._backend = types.SimpleNamespace(network=None)
    opened._num_sources = 0
    opened._loss = lambda: torch.zeros(())
    opened.forward(None, slice(None))
    assert len(marks) == is_compiled


def test_building_an_engine_does_not_import_the_compiler() -> None:
    """DeepSpeed tries for an optimizer that compiles its kernels when it is imported."""
    script = """
import sys
import torch
from svfap_dist.train import engine
engine._deepspeed(torch.device("cpu"))
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
import deepspeed
torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="{url}")
deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
assert is_zero_supported_optimizer(optimizer)
assert "torch._inductor.compile_fx" not in sys.modules
"""
    with tempfile.TemporaryDirectory() as folder:
        script = script.replace("{url}", f"file://{folder}/rendezvous")
        subprocess.run([sys.executable, "-c", script], check=True)
