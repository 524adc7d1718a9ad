"""A GPU's rank on the cores next to its GPU, by an NVML that is made up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svfap_dist.parallel.affinity import bind_to_gpu

CORES = sorted(os.sched_getaffinity(0))


class NVMLError(Exception):
    """Like NVML's, of no class that is known without its package."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What NVML answers: `near`, cores of each GPU by UUID; `error`, raised instead."""
    answers: dict[str, Any] = {"near": {}, "error": None}

    def affinity(handle: str, words: int) -> list[int]:
        if answers["error"]:
            raise answers["error"]
        mask = sum(1 << core for core in answers["near"][handle])
        return [mask >> 64 * word & (2**64 - 1) for word in range(words)]

    module = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetCpuAffinity=affinity,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = lambda device: SimpleNamespace(uuid=f"u{device}")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return answers


def in_a_thread(call: Callable[[], Any]) -> Any:
    """An affinity belongs to a thread: this one's stays as it is."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def bound(min_cores: int = 1) -> tuple[set[int], set[int]]:
    """Cores of the thread that bound itself to GPU 1, and of a process it started."""

    def call() -> tuple[set[int], set[int]]:
        found = bind_to_gpu(1, min_cores)
        assert os.sched_getaffinity(0) == found
        code = "import os; print(*os.sched_getaffinity(0))"
        child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        return found, {int(core) for core in child.stdout.split()}

    return in_a_thread(call)


@pytest.mark.skipif(len(CORES) < 2, reason="there is one core only")
def test_a_rank_and_what_it_starts_stay_near_the_gpu(nvml: dict[str, Any]) -> None:
    nvml["near"] = {"GPU-u0": CORES[1:], "GPU-u1": [CORES[0], 700]}
    assert bound() == ({CORES[0]}, {CORES[0]})


def test_too_few_near_cores_bind_nothing(nvml: dict[str, Any]) -> None:
    nvml["near"] = {"GPU-u1": CORES[:1]}
    assert bound(min_cores=2)[0] == set(CORES)
    nvml["near"] = {"GPU-u1": []}
    assert bound()[0] == set(CORES)


def test_without_an_answer_of_nvml_nothing_is_bound(
    nvml: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml["error"] = NVMLError("Not Supported")
    assert bound()[0] == set(CORES)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert bound()[0] == set(CORES)


def test_masks_of_more_than_64_cores(nvml: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [set(range(128))]
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: now[0])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: now.__setitem__(0, cores))
    nvml["near"] = {"GPU-u1": range(32, 96)}
    assert bind_to_gpu(1, 16) == now[0] == set(range(32, 96))


@pytest.mark.gpu
def test_a_real_gpu_has_cores_near_it() -> None:
    """All cores where NVML or its package does not answer; in any case some that may be used."""
    found = in_a_thread(lambda: bind_to_gpu(0, 1))
    assert found
    assert found <= set(CORES)
    assert os.sched_getaffinity(0) == set(CORES)  # this thread is not bound
