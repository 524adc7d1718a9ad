"""Of two processes on one run, the newer one has it."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest

from svfap_dist.checkpoint.saver import RunOwnership
from svfap_dist.distributed import World
from svfap_dist.errors import HealthError

ALONE = World(0, 0, 1, 1)


def test_the_newer_attempt_ends_the_older_one(tmp_path) -> None:
    older = RunOwnership(str(tmp_path), ALONE)
    older.check()
    newer = RunOwnership(str(tmp_path), ALONE)
    with pytest.raises(HealthError, match=r"taken over this run.*run\.url of its own"):
        older.check()
    newer.check()


def test_a_second_process_on_this_machine_is_warned(tmp_path, caplog) -> None:
    RunOwnership(str(tmp_path), ALONE)
    RunOwnership(str(tmp_path), ALONE)  # the next attempt of the same process
    other = subprocess.Popen(["sleep", "1000"])
    owner, here = tmp_path / "OWNER", f"pid {other.pid} on {socket.gethostname()}, 0a1b2c3d"
    try:
        owner.write_text(f"pid {other.pid} on another-host, 0a1b2c3d")
        RunOwnership(str(tmp_path), ALONE)
        assert caplog.messages == []
        owner.write_text(here)
        RunOwnership(str(tmp_path), ALONE)
        assert f"{other.pid} on this machine, seems to be alive" in caplog.text
        caplog.clear()
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # a zombie until `wait`
        owner.write_text(here)
        RunOwnership(str(tmp_path), ALONE)
    finally:
        other.kill()
        other.wait()
    owner.write_text(here)
    RunOwnership(str(tmp_path), ALONE)
    owner.write_bytes(b"\xff\xfe")
    RunOwnership(str(tmp_path), ALONE)
    assert caplog.messages == []


def test_a_run_folder_that_was_removed_has_no_owner(tmp_path) -> None:
    mine = RunOwnership(str(tmp_path / "run"), ALONE)
    (tmp_path / "run" / "OWNER").unlink()
    with pytest.raises(HealthError, match="owner none"):
        mine.check()
