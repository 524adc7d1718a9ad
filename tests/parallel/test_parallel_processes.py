"""Work in a process of its own: a hang or death is an error, and the next call is served."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_calls import MapsOnArrival, behave

from svfap_dist.parallel.processes import ChildProcess, CrashedError, HungError, ProcessPool


def test_calls_share_one_process_and_errors_come_back() -> None:
    with ChildProcess(behave, seconds=30) as call:
        first = call("pid")
        assert first != os.getpid()
        with pytest.raises(ValueError, match="no such frame"):
            call("raise")
        assert call("pid") == first
        assert call("word") == "WORD"


def test_a_hang_and_a_crash_cost_one_call_each() -> None:
    with ChildProcess(behave, seconds=0.5) as call:
        first = call("pid")
        with pytest.raises(HungError):
            call("hang")
        second = call("pid")
        with pytest.raises(CrashedError, match="code 7"):
            call("crash")
        third = call("pid")
        assert len({first, second, third}) == 3
        assert not _lives(first)


def test_signals_that_stop_a_run_do_not_reach_children_of_a_pool() -> None:
    """A scheduler sends them to all processes of a job; the parent decides what ends."""
    with contextlib.closing(ProcessPool(behave, 1, seconds=30)) as pool:
        child = pool("pid")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(int(str(child)), number)
        assert pool("pid") == child


def test_memory_has_a_limit() -> None:
    with (
        ChildProcess(behave, seconds=30, memory_bytes=2 << 30) as call,
        pytest.raises(MemoryError),
    ):
        call("eat")


def test_what_the_imports_have_mapped_does_not_count() -> None:
    """A CUDA build of torch maps more than a small limit before the first call."""
    with ChildProcess(MapsOnArrival(4 << 30), seconds=30, memory_bytes=2 << 30) as call:
        assert call("x" * (64 << 20)) == "X" * (64 << 20)
        with pytest.raises(MemoryError):
            call("eat")


def test_children_of_a_pool_use_one_thread_and_may_be_nice(monkeypatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # of the user
    pool = ProcessPool(behave, 1, seconds=30, niceness=2)
    try:
        assert pool("threads") == ("1", "3")
        assert pool("niceness") == os.nice(0) + 2
    finally:
        pool.close()
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    with ChildProcess(behave, seconds=30) as call:  # one that has the machine to itself
        assert call("threads") == (None, "3")
        assert call("niceness") == os.nice(0)


def test_a_hung_child_ends_when_its_parent_was_killed() -> None:
    code = (
        "from child_calls import behave\n"
        "from svfap_dist.parallel.processes import ChildProcess\n"
        "if __name__ == '__main__':\n"
        "    call = ChildProcess(behave, seconds=600)\n"
        "    print(call('pid'), flush=True)\n"
        "    call('hang')\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 20
    while _lives(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
