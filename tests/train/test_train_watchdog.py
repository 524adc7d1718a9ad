"""The watchdog on real ranks: what hangs is named, stacks are written, all ranks end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clips import make_video
from train_ranks import recipe_tables, start, start_failing

from data_sharding import pipeline as sharding
from svfap_dist.train.audit import audit
from svfap_dist.train.stalls import StallError

STALL_SECONDS = 8
NOTICE_SECONDS = 15  # after which it must have been noticed, also on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.sequential]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watchdog")
    for number in range(14):
        make_video(folder / f"videos/clip{number:02d}.mp4", 12, seed=number)
    url = folder / "shards"
    sharding.shard(
        "folder", str(folder / "videos"), str(url), min_frames=8, max_samples_per_shard=5, workers=0
    )
    return url


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def stalled(data: Path, folder: Path, fault: str, rank: int, **sections: Any) -> dict[str, Any]:
    """The report of a run of two ranks in which one hangs, with the log of rank 0."""
    run = folder / "run"
    train = {"stall_seconds": STALL_SECONDS, "max_steps": 60, "checkpoint_every": 4}
    tables = recipe_tables(str(data), str(run), train=train, **sections)
    arguments = {"tables": tables, "fault": fault, "rank": rank, "step": 9}
    codes = start_failing(2, ("stall", arguments), folder / "ranks")
    log = (folder / "ranks/rank-0.log").read_text() + (folder / "ranks/rank-1.log").read_text()
    assert StallError.exit_code in codes, log
    report = json.loads((run / "stalls/attempt-0001/stall.json").read_text())
    noticed = report["time"] - float((run / "fault.time").read_text())
    print(f"{fault} on rank {rank}: noticed after {noticed:.1f} s; {report['error']}")
    assert noticed < STALL_SECONDS + NOTICE_SECONDS
    return {**report, "noticed": noticed, "codes": codes, "run": run, "tables": tables, "log": log}


def assert_is_silent(found: dict[str, Any], state: str) -> None:
    """Check that rank 1 is named, by its silence unless its last heartbeat was read late."""
    assert found["ranks"] == [1]
    assert found["kind"] in ("silent", "behind")
    assert found["kind"] == "behind" or state in found["error"][2]


def stacks(found: dict[str, Any], rank: int) -> str:
    return (found["run"] / f"stalls/attempt-0001/rank-{rank:04d}.txt").read_text()


def test_a_stopped_rank_is_named_and_the_run_resumes(data: Path, tmp_path: Path) -> None:
    found = stalled(data, tmp_path, "signal", rank=1)
    assert_is_silent(found, "stopped by a signal")
    assert "rank 1" in found["error"][1]
    assert "Thread" in stacks(found, 0)
    events = lines(found["run"] / "events.jsonl")
    assert events[-1]["event"] == "stall"
    assert events[-1]["attempt"] == 1
    assert 0 <= events[-1]["step"] <= 9  # of its last heartbeat
    assert "stop" not in [event["event"] for event in events]

    again = start(2, [("train", {"tables": found["tables"]})], tmp_path / "again")
    assert [result["step"] for result in again[0]] == [60, 60]
    assert audit(str(found["run"])).is_exact
    events = lines(found["run"] / "events.jsonl")
    assert [event["event"] for event in events].count("stall") == 1


def test_rank_0_stopped_is_named_by_the_others_and_recorded_by_the_next_attempt(
    data: Path, tmp_path: Path
) -> None:
    found = stalled(data, tmp_path, "signal", rank=0)
    assert (found["kind"], found["ranks"]) == ("store", [0])
    assert "stopped by a signal" in found["error"][2]
    assert "Thread" in stacks(found, 1)
    start(2, [("train", {"tables": found["tables"], "stop_after": 1})], tmp_path / "again")
    events = lines(found["run"] / "events.jsonl")
    assert [event["ranks"] for event in events if event["event"] == "stall"] == [[0]]


def test_a_hung_read_is_named(data: Path, tmp_path: Path) -> None:
    found = stalled(data, tmp_path, "storage", rank=1)
    assert (found["kind"], found["ranks"]) == ("behind", [1])
    assert found["activity"] == "waiting for the batch"
    assert "storage/files.py" in found["place"]
    assert "read_buffer" in stacks(found, 1)
    assert found["codes"] == [StallError.exit_code] * 2


def test_a_collective_that_a_rank_does_not_reach_is_named(data: Path, tmp_path: Path) -> None:
    found = stalled(data, tmp_path, "collective", rank=1)
    assert (found["kind"], found["ranks"]) == ("behind", [1])
    assert "train/update.py" in found["place"]
    assert "collectives" in found["error"][2]
    assert found["codes"] == [StallError.exit_code] * 2


def test_a_stuck_interpreter_is_named_and_leaves_its_stacks_in_its_log(
    data: Path, tmp_path: Path
) -> None:
    found = stalled(data, tmp_path, "interpreter", rank=1)
    assert_is_silent(found, "its interpreter does not run")
    assert "hang_in_interpreter" in (tmp_path / "ranks/rank-1.log").read_text()


def test_a_decode_worker_that_hangs_costs_one_sample(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"feeders": 1, "decode_workers": 2, "decode_seconds": 3.0}
    tables = recipe_tables(str(data), str(run), data=changes)
    task = ("train_with_hanging_child", {"tables": tables, "worker": "HangingWorker"})
    ((result,),) = start(1, [task], tmp_path / "ranks")
    assert (result["step"], result["stop_reason"]) == (12, "finished")
    assert (run / "fault.time").exists()
    (lost,) = lines(run / "quarantine.jsonl")
    assert (lost["reason"], lost["step"]) == ("hung", 1)
    assert "no answer for 3 s" in lost["detail"]
    audited = audit(str(run))
    assert audited.is_exact
    assert audited.substituted == 1
    assert not (run / "stalls").exists()


def test_a_feeder_that_hangs_is_named(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = {"stall_seconds": STALL_SECONDS, "max_steps": 60}
    tables = recipe_tables(str(data), str(run), train=train, data={"feeders": 1})
    task = ("train_with_hanging_child", {"tables": tables, "worker": "HangingFeeder"})
    codes = start_failing(1, task, tmp_path / "ranks")
    log = (tmp_path / "ranks/rank-0.log").read_text()
    assert codes == [StallError.exit_code], log
    report = json.loads((run / "stalls/attempt-0001/stall.json").read_text())
    print(f"noticed after {report['time'] - float((run / 'fault.time').read_text()):.1f} s")
    assert report["activity"] == "waiting for the batch"
    assert "data/filler.py" in report["place"]
    assert "hanging_children.py" in (run / "stalls/attempt-0001/rank-0000.txt").read_text()
