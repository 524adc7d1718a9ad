"""A group over three hosts of a real Ray cluster: one loses its power, and comes back.

Prints how long the run paused each time (`pytest -s`).
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from launched_runs import SMALL, events, lines, order, svfap
from ray_hosts import RayHosts
from waiting import until

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]

# Of docs/operations.md, for hosts that vanish without a word.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
# Steps long enough that a few minutes have not too many; three ranks can share six lanes.
ELASTIC = (
    *SMALL,
    *("data.num_lanes=6", "train.global_batch_size=12", "train.micro_batch_size=2"),
    *("train.epochs=1000000", "train.max_steps=1000000", "train.checkpoint_every=10"),
    *("cluster.num_workers=3", "cluster.min_workers=1", "cluster.max_failures=0"),
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[RayHosts]:
    cluster = RayHosts(3, name="svfap-e", subnet="10.80.0")
    cluster.environment.update(HEALTH_CHECKS)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Run:
    """A run whose driver is on the first host."""

    def __init__(self, hosts: RayHosts, run: Path, *overrides: str) -> None:
        self.path, self._output = run, run.with_suffix(".log")
        with self._output.open("w") as output:
            self._nsenter = hosts.launch(
                hosts.head,
                *(sys.executable, "-m", "svfap_dist", "pretrain", "tiny_cpu", f"run.url={run}"),
                *(*ELASTIC, *overrides, "--on", "ray"),
                output=output,
                RAY_ADDRESS=f"{hosts.hosts[hosts.head]}:6379",
            )

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait while the driver is alive."""
        until(lambda: condition() or self._nsenter.poll() is not None, what, 300)
        assert self._nsenter.poll() is None, self._output.read_text()[-3000:]

    def sizes(self) -> list[int]:
        return [event["world_size"] for event in events(self.path, "start", "resume")]

    def has_stepped(self) -> bool:
        """Whether the newest attempt has completed a step."""
        began = events(self.path, "start", "resume")[-1]
        rows = lines(self.path / "metrics.jsonl")
        return bool(rows) and rows[-1]["time"] > began["time"] and rows[-1]["step"] > began["step"]

    def seconds_until(self, size: int) -> float:
        """Wait for a step of a group of this size that follows; return the time it took."""
        began, before = time.monotonic(), len(self.sizes())
        self.wait(lambda: len(self.sizes()) > before, f"another attempt than {before}")
        self.wait(lambda: self.sizes()[-1] == size and self.has_stepped(), f"{size} ranks")
        return time.monotonic() - began

    def steps(self) -> int:
        return max(row["step"] for row in lines(self.path / "metrics.jsonl"))

    def stop(self) -> None:
        """Stop as Slurm would, with a checkpoint."""
        nsenter = self._nsenter.pid
        (driver,) = Path(f"/proc/{nsenter}/task/{nsenter}/children").read_text().split()
        subprocess.run(["kill", f"-{signal.SIGTERM.value}", driver], check=True)
        assert self._nsenter.wait(timeout=200) == 143, self._output.read_text()[-3000:]

    def end(self) -> None:
        if self._nsenter.poll() is None:
            nsenter = self._nsenter.pid
            children = Path(f"/proc/{nsenter}/task/{nsenter}/children").read_text().split()
            subprocess.run(["kill", "-9", *children], check=False)
            self._nsenter.wait()


@pytest.fixture
def start(hosts: RayHosts, shards: str, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run, given overrides."""
    runs: list[Run] = []

    def begin(*overrides: str) -> Run:
        runs.append(Run(hosts, tmp_path / "run", f"data.url={shards}", *overrides))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def used(run: Path) -> list[tuple[Any, ...]]:
    """(step, lane, key) of what the weights have seen: of each step, its last attempt."""
    last: dict[int, int] = {}
    rows = order(run)
    for attempt, step, *_ in rows:
        last[step] = max(attempt, last.get(step, 0))
    return [row[1:] for row in rows if row[0] == last[row[1]]]


def test_three_hosts_two_hosts_three_hosts(hosts, start, shards, tmp_path):
    run = start()
    third = list(hosts.hosts)[-1]
    run.wait(lambda: run.sizes() == [3] and run.has_stepped() and run.steps() >= 15, "3 ranks")

    hosts.power_cut(third)
    shrunk = run.seconds_until(2)
    run.wait(lambda: run.steps() > events(run.path, "resume")[-1]["step"] + 3, "steps of 2 ranks")

    hosts.boot(third)
    hosts.join(third)
    grown = run.seconds_until(3)
    run.wait(lambda: run.steps() > events(run.path, "resume")[-1]["step"] + 3, "steps of 3 ranks")
    run.stop()
    print(f"\nelastic 3-2-3: {shrunk:.1f} s after the cut, {grown:.1f} s after the host had joined")

    assert max(shrunk, grown) < 90  # 24 and 18 s were measured on an idle machine
    assert run.sizes() == [3, 2, 3]
    changes = [(e["from"], e["to"], e["reason"]) for e in events(run.path, "resize")]
    assert changes == [(3, 2, "failure"), (2, 3, "nodes joined")]
    stops = [(e["reason"], e["step"]) for e in events(run.path, "stop")]
    joined = next(step for reason, step in stops if reason == "nodes joined")
    assert events(run.path, "resume")[-1]["step"] == joined  # growing repeats no step

    audit = svfap("audit", str(run.path))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    same = [o for o in ELASTIC if not o.startswith(("cluster.", "train.max_steps"))]
    steps = events(run.path, "stop")[-1]["step"]
    one_rank = tmp_path / "undisturbed"
    places = [f"data.url={shards}", f"run.url={one_rank}", f"train.max_steps={steps}"]
    done = svfap("pretrain", "tiny_cpu", *places, *same, "--on", "local")
    assert done.returncode == 0, done.stderr
    assert used(run.path) == used(one_rank)


def test_a_host_that_will_be_taken_away_is_left_at_once(hosts, start):
    """Comes last: the third host takes no more work afterwards."""
    run = start()
    run.wait(lambda: run.sizes() == [3] and run.has_stepped(), "3 ranks")
    hosts.take_away(list(hosts.hosts)[-1], seconds=600)
    run.seconds_until(2)
    (left,) = [e for e in events(run.path, "stop") if e["reason"] == "nodes leaving"]
    (resumed,) = events(run.path, "resume")
    assert resumed["step"] == left["step"]  # no step is repeated
    (change,) = events(run.path, "resize")
    assert (change["from"], change["to"], change["reason"]) == (3, 2, "nodes leaving")
    run.stop()
