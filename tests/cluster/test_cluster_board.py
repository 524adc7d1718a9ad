"""Messages between driver and ranks, without Ray's actor."""

from __future__ import annotations

import types
from typing import Any

import pytest
import ray
import torch

from svfap_dist.cluster import board as boards
from svfap_dist.errors import ClusterError, HealthError
from svfap_dist.train.stalls import StallError


class LocalBoard:
    """The board without its actor: `remote` calls the method at once."""

    def __init__(self):
        self.board = boards.Board(context=None)

    def __getattr__(self, name):
        return types.SimpleNamespace(remote=getattr(self.board, name))


@pytest.fixture
def board(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda value: value)
    return LocalBoard()


def attempt(board: LocalBoard, *failures: tuple[int, Exception]) -> Any:
    """An attempt in which ranks fail; return what is fatal, if anything is."""
    board.board.begin()
    for step, error in failures:
        boards.report_failure(board, step, error)
    return board.board.get("fatal")


def test_the_same_failure_at_the_same_step_twice_is_fatal(board):
    """Every restart would resume from the same checkpoint and fail again, 100 times."""
    broken = RuntimeError("CUDA error: device-side assert triggered\nCompile with ...")
    assert attempt(board, (7, broken), (7, broken)) is None  # two ranks of one attempt
    assert attempt(board, (9, broken), (7, RuntimeError("CUDA error: unknown error"))) is None
    fatal = attempt(board, (7, broken))
    assert isinstance(fatal, HealthError)
    assert not fatal.retryable
    assert fatal.where == "step 8"
    assert "device-side assert" in fatal.found
    assert "micro_batch_size" in fatal.do


def test_a_stall_explains_its_own_attempt_only(board):
    """Else a run whose rank dies three attempts later would be said to have stalled."""
    stall = StallError("Training has stalled", "step 3, rank 1", "no heartbeat", "see the stacks")
    attempt(board, (3, stall))
    assert board.board.get("stall") is stall
    board.board.begin()
    assert board.board.get("stall") is None


def test_failures_of_peers_and_stores_may_come_again(board):
    """A rank whose peer has died fails in a collective; a store may be down for two attempts."""
    for error in (
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        ClusterError("Group initialization failed (rendezvous)"),
    ):
        assert attempt(board, (3, error)) is None
        assert attempt(board, (3, error)) is None


def test_a_resize_ends_one_attempt_and_a_stop_all_of_them(board):
    board.board.begin()
    assert board.board.stop_reason() == ""
    board.board.request_resize("nodes joined")
    assert board.board.stop_reason() == "nodes joined"
    board.board.begin()
    assert board.board.stop_reason() == ""
    board.board.put("stop_reason", "SIGTERM")
    board.board.request_resize("nodes joined")
    board.board.begin()
    assert board.board.stop_reason() == "SIGTERM"


def test_a_failure_is_timed_from_the_last_row_and_until_the_next(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(boards.time, "time", lambda: now[0])
    board = boards.Board(context=None)
    board.notice_failure()
    assert board.since_failure() == {}  # of an attempt without a row
    board.post({"step": 1})
    for now[0] in (103.0, 104.0):  # two ranks fail: the first one counts
        board.notice_failure()
    now[0] = 110.0
    assert board.since_failure() == {"noticed": 3.0, "group": 7.0}
    board.post({"step": 2})
    assert board.since_failure() == {}


def test_the_driver_reads_failures_but_not_resizes():
    board = boards.Board(context=None)
    assert "failures" not in board.read()[1]
    board.notice_failure("")
    board.notice_failure("1: it died")
    board.notice_failure("0: it died")
    assert board.read()[1]["failures"] == ["1: it died", "0: it died"]


def test_the_board_is_on_the_driver_s_node(monkeypatch):
    """On any other node it would end the run when that node is lost."""
    started: list[dict[str, Any]] = []

    def remote(**options: Any) -> Any:
        started.append(options)
        return lambda kind: types.SimpleNamespace(remote=kind)

    node = types.SimpleNamespace(get_node_id=lambda: "0" * 56)
    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: node)
    assert isinstance(boards.start_board(None), boards.Board)
    ((strategy, cpus),) = [(o["scheduling_strategy"], o["num_cpus"]) for o in started]
    assert (strategy.node_id, strategy.soft, cpus) == ("0" * 56, False, 0)
