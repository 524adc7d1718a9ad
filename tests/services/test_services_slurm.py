"""Both sbatch files on a real Slurm: two nodes, notice, checkpoint, requeue, resume."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launched_runs import SMALL, STEPS, events, order, steps_done, svfap
from slurm import Slurm
from waiting import until

from svfap_dist.checkpoint import store

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]


def launched(slurm: Slurm, shards: str, run: Path, on: str, monkeypatch) -> str:
    """Number of a job on two nodes that does its first steps."""
    monkeypatch.chdir(run.parent)  # where the job's output goes
    size = ["--nodes", "2", "--gpus-per-node", "1", "--time", "30", "--on", on]
    places = [f"data.url={shards}", f"run.url={run}"]
    done = svfap("launch", "slurm", "tiny_cpu", *size, *places, *SMALL, **slurm.environment)
    assert done.returncode == 0, done.stderr
    door, _, number = done.stdout.strip().partition(":")
    assert door == "slurm"
    until(lambda: steps_done(run) >= 5 or slurm.state(number) == "FAILED", "first steps", 150)
    assert slurm.state(number) == "RUNNING", output(run)
    assert len(events(run, "start")[0]["ranks"]) == 2
    return number


def output(run: Path) -> str:
    """What the jobs said."""
    return "\n".join(path.read_text() for path in sorted(run.parent.glob("*.log")))


@pytest.mark.parametrize("on", ["srun", "ray"])
def test_notice_saves_requeues_and_resumes(slurm, shards, undisturbed, on, tmp_path, monkeypatch):
    run = tmp_path / "run"
    number = launched(slurm, shards, run, on, monkeypatch)
    assert slurm.job(number)["NumNodes"] == "2"

    slurm.run("scancel", "--signal=USR1", "--batch", number)
    until(lambda: slurm.state(number) == "PENDING", f"job {number} in the queue again")
    requeued = time.time()
    slurm.start_requeued(number)
    until(lambda: slurm.state(number) in ("COMPLETED", "FAILED"), "the end of the job", 200)

    assert slurm.state(number) == "COMPLETED", output(run)
    assert slurm.job(number)["Restarts"] == "1"
    saved = events(run, "stop")[0]
    assert saved["reason"] == "SIGUSR1"
    assert 5 <= saved["step"] < STEPS
    # On a busy machine Ray may give up a node and restart the group of the requeued job. The ranks
    # of the first job were not restarted after they had saved.
    resumed = events(run, "resume")
    assert resumed
    assert {(event["attempt"] >= 2, event["step"]) for event in resumed} == {(True, saved["step"])}
    assert all(event["time"] > requeued for event in resumed)
    assert store.committed_steps(str(run)) == [saved["step"], STEPS]

    used = [row for row in order(run) if row[0] in (1, resumed[-1]["attempt"])]
    assert {a for a, step, *_ in used if step <= saved["step"]} == {1}
    assert {a for a, step, *_ in used if step > saved["step"]} == {resumed[-1]["attempt"]}
    assert [row[1:] for row in used] == [row[1:] for row in order(undisturbed)]


def test_stopping_saves_and_does_not_requeue(slurm, shards, tmp_path, monkeypatch):
    run = tmp_path / "run"
    number = launched(slurm, shards, run, "srun", monkeypatch)
    state = svfap("launch", "status", f"slurm:{number}", **slurm.environment)
    assert "RUNNING" in state.stdout
    stopped = svfap("launch", "stop", f"slurm:{number}", **slurm.environment)
    assert stopped.returncode == 0, stopped.stderr
    assert "exit code 138" in stopped.stdout  # 128 + SIGUSR1
    assert slurm.job(number)["Restarts"] == "0"
    assert store.committed_steps(str(run)) == [steps_done(run)]
