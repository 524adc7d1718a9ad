"""Who a process takes itself for, by its environment, and what it does for all ranks."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from svfap_dist import distributed
from svfap_dist.errors import ClusterError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*NAMES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_alone_is_a_world_of_one(environment):
    assert distributed.world_from_environment() == distributed.World(0, 0, 1, 1)
    assert distributed.world_from_environment() == distributed.World(0, 0, 1, 1)  # and stays one


def test_a_rank_is_what_its_launcher_says(environment):
    values = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in values.items():
        environment.setenv(name, value)
    assert distributed.world_from_environment() == distributed.World(5, 1, 8, 4)


@pytest.mark.parametrize(
    ("devices", "variables", "expected"),
    [
        (2, {"LOCAL_WORLD_SIZE": "2"}, True),
        (1, {"LOCAL_WORLD_SIZE": "2"}, False),
        (1, {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}, True),  # the rank's own
        (
            1,
            {"LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3", "TORCHELASTIC_RUN_ID": "a"},
            False,
        ),
        (0, {}, False),
    ],
)
def test_each_rank_has_a_gpu(environment, devices: int, variables: dict[str, str], expected: bool):
    for name in ("CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID"):
        environment.delenv(name, raising=False)
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setattr(torch.cuda, "is_available", lambda: devices > 0)
    environment.setattr(torch.cuda, "device_count", lambda: devices)
    assert distributed.has_gpu_per_rank() == expected


def test_tasks_that_nobody_numbered_do_not_all_become_rank_0(environment):
    environment.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ClusterError, match="torchrun"):
        distributed.world_from_environment()


def test_half_a_numbering_is_refused(environment):
    environment.setenv("RANK", "1")
    with pytest.raises(ClusterError, match="WORLD_SIZE and LOCAL_RANK not"):
        distributed.world_from_environment()


@pytest.mark.parametrize(
    ("master", "ranks", "interface"),
    [
        ("127.0.0.1", {"WORLD_SIZE": "2"}, "lo"),
        ("node-1", {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "lo"),  # torchrun
        ("node-1", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None),
        ("node-1", {"WORLD_SIZE": "2"}, None),  # they may be anywhere
    ],
)
def test_gloo_listens_on_loopback_where_all_ranks_are_on_this_machine(
    environment: pytest.MonkeyPatch, master: str, ranks: dict[str, str], interface: str | None
) -> None:
    for name, value in {"MASTER_ADDR": master, **ranks}.items():
        environment.setenv(name, value)
    environment.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with distributed.gloo_on_loopback():
        assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    environment.setenv("GLOO_SOCKET_IFNAME", "eth1")
    with distributed.gloo_on_loopback():
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"


def test_free_ports_are_none_of_those_of_outgoing_connections() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as limits:
        first, _ = map(int, limits.read().split())
    assert all(distributed.free_port() < first for _ in range(20))


def test_no_rank_waits_in_a_collective_while_another_works_long(monkeypatch) -> None:
    """Else the collective's timeout would end a run whose rank 0 is still listing its shards."""
    rounds: list[object] = []
    third = threading.Event()

    def all_gather(value: object) -> list[object]:
        rounds.append(value)
        if len(rounds) == 3:
            third.set()
        return [value]

    def work() -> str:
        assert threading.current_thread() is not threading.main_thread()
        assert third.wait(60)
        return "done"

    monkeypatch.setattr(distributed, "_ROUND_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "all_gather_object", all_gather)
    assert distributed.run_long_on_all_ranks(work) == "done"
    assert rounds[:3] == [False] * 3
    assert rounds[-2:] == [True, None]  # finished; without an error


def test_errors_of_long_work_are_raised_as_they_are(monkeypatch) -> None:
    for error in (ClusterError("a", "b", "c", "d"), KeyError("a mistake")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            distributed.run_long_on_all_ranks(fail)
        assert caught.value is error


def test_long_work_that_hangs_is_an_error_that_names_the_rank(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "_ROUND_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "_MAX_ROUNDS", 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [True, value])
    never = threading.Event()
    with pytest.raises(ClusterError, match="rank 1"):
        distributed.run_long_on_all_ranks(lambda: never.wait(60))
    never.set()
