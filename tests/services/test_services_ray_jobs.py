"""`svfap launch ray` on a real cluster of two hosts that requires a token."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched_runs import SMALL, STEPS, events, order, steps_done, svfap
from ray_hosts import RayHosts
from waiting import until

from svfap_dist.checkpoint import store
from svfap_dist.errors import ClusterError

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


class Followed:
    """`svfap launch ray ... --follow` in a process of its own, its output read as it comes."""

    def __init__(self, hosts: RayHosts, *arguments: str) -> None:
        command = [sys.executable, "-m", "svfap_dist", "launch", "ray", "tiny_cpu", *arguments]
        command += ["--address", hosts.address, "--ship-code", "--follow"]
        self._process = subprocess.Popen(
            command,
            env=os.environ | hosts.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip())

    @property
    def job(self) -> str:
        until(lambda: self._named() or self._process.poll() is not None, "a job", 120)
        assert self._named(), self.output
        return self._named()[0]

    def _named(self) -> list[str]:
        return [line for line in self.lines if line.startswith("ray:")]

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def exit_code(self) -> int:
        return self._process.wait(timeout=240)


@pytest.fixture
def launched(ray_hosts: RayHosts, shards: str) -> Iterator[Callable[..., Followed]]:
    """Starts a job on both hosts, given its run and overrides."""
    jobs: list[Followed] = []

    def launch(run: Path, *overrides: str) -> Followed:
        places = [f"data.url={shards}", f"run.url={run}", "cluster.num_workers=2"]
        jobs.append(Followed(ray_hosts, *places, *SMALL, *overrides))
        return jobs[-1]

    yield launch
    for job in jobs:
        job.end()


def until_at_work(followed: Followed, run: Path) -> None:
    until(lambda: steps_done(run) >= 5 or followed.has_ended(), "first steps", 200)
    assert not followed.has_ended(), followed.output


def test_stop_with_a_checkpoint_and_resubmit(ray_hosts, launched, undisturbed, tmp_path):
    run = tmp_path / "run"
    first = launched(run)
    until_at_work(first, run)
    (start,) = events(run, "start")
    assert {rank["host"] for rank in start["ranks"]} == set(ray_hosts.hosts)
    door = ["--address", ray_hosts.address]
    stopped = svfap("launch", "stop", first.job, *door, **ray_hosts.environment)
    assert "STOPPED" in stopped.stdout, stopped.stderr
    assert first.exit_code() == 143  # 128 + SIGTERM
    assert "A checkpoint is saved" in first.output
    saved = events(run, "stop")[0]
    assert saved["reason"] == "SIGTERM"
    assert 5 <= saved["step"] < STEPS
    assert store.committed_steps(str(run)) == [saved["step"]]

    status = svfap("launch", "status", first.job, *door, **ray_hosts.environment)
    assert status.stdout == stopped.stdout

    second = launched(run)
    assert second.exit_code() == 0, second.output
    assert second.job != first.job
    assert f"finished at step {STEPS} of {STEPS}" in second.output
    (resumed,) = events(run, "resume")
    assert resumed["step"] == saved["step"]
    used = order(run)
    assert {a for a, step, *_ in used if step <= saved["step"]} == {1}
    assert {a for a, step, *_ in used if step > saved["step"]} == {2}
    assert [row[1:] for row in used] == [row[1:] for row in order(undisturbed)]


def test_a_wrong_token_is_told(ray_hosts, shards, tmp_path):
    places = [f"data.url={shards}", f"run.url={tmp_path / 'run'}", "--address", ray_hosts.address]
    wrong = ray_hosts.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    done = svfap("launch", "ray", "tiny_cpu", *places, **wrong)
    assert done.returncode == ClusterError.exit_code
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_host_that_will_be_taken_away_costs_a_checkpoint_only(ray_hosts, launched, tmp_path):
    """Comes last: the second host takes no more work afterwards."""
    run = tmp_path / "run"
    followed = launched(run, "train.max_steps=100000")
    until_at_work(followed, run)
    ray_hosts.take_away("svfap-h2", seconds=600)
    until(lambda: events(run, "checkpoint"), "a checkpoint before the host goes", 120)
    (saved,) = events(run, "checkpoint")
    until(lambda: steps_done(run) > saved["step"] + 5, "further steps")
    door = ["--address", ray_hosts.address]
    svfap("launch", "stop", followed.job, *door, **ray_hosts.environment)
    assert followed.exit_code() == 143
    assert len(events(run, "checkpoint")) == 2
