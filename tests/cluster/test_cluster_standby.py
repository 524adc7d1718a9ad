"""Ray worker processes that have made a rank's imports before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from svfap_dist.cluster import standby
from svfap_dist.cluster.board import Board

_ACTORS = Path(__file__).with_name("standby_actors.py")


@pytest.mark.slow
def test_next_actor_takes_its_node_s_standby_process():
    command = [sys.executable, str(_ACTORS)]
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: sockets' paths are limited
        loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's name for it
        environment = {**os.environ, **loopback, "RAY_TMPDIR": folder}
        # Its exit code is Ray's: the driver has once aborted while it disconnected.
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=250, check=False
        )
    assert done.stdout, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    # The next actor of each node took its standby process, and no other was started.
    assert seen["idle"] == [1, 1, 0, 0]
    assert len({0, *seen["pids"]}) == 4
    assert seen["spare"] == [seen["node"]]


def test_a_node_is_claimed_once():
    board = Board(None)
    assert board.claim_nodes(["a", "b"]) == ["a", "b"]
    assert board.claim_nodes(["b", "c"]) == ["c"]
    assert board.claim_nodes(["a", "b", "c"]) == []


def test_hook_of_the_job_is_kept(monkeypatch):
    monkeypatch.setenv("__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR", "package.set_up")
    assert standby.environment(use_gpu=False) == {}


def test_imports_are_counted_from_the_failure_on(monkeypatch):
    monkeypatch.setattr(standby, "_imports", [(100.0, 104.0)])
    assert [standby.import_seconds(since) for since in (90.0, 103.0, 110.0)] == [4.0, 1.0, 0.0]
