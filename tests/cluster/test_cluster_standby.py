"""Ray worker processes that have made a rank's imports before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from svfap_dist.cluster import standby

_ACTORS = Path(__file__).with_name("standby_actors.py")


@pytest.mark.slow
def test_next_actor_takes_the_standby_process():
    command = [sys.executable, str(_ACTORS)]
    # Its exit code is Ray's: the driver has once aborted while it disconnected.
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.stdout, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["idle"] == [1, 1, 0]  # the second actor took it, and no other was started
    assert len({0, *seen["pids"]}) == 3


def test_hook_of_the_job_is_kept(monkeypatch):
    monkeypatch.setenv("__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR", "package.set_up")
    assert standby.environment(use_gpu=False) == {}


def test_imports_are_counted_from_the_failure_on(monkeypatch):
    monkeypatch.setattr(standby, "_imports", [(100.0, 104.0)])
    assert [standby.import_seconds(since) for since in (90.0, 103.0, 110.0)] == [4.0, 1.0, 0.0]
