"""When a run counts as stalled, and whom the error names."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from child_calls import behave
from train_ranks import recipe_tables

from svfap_dist.config import recipe
from svfap_dist.distributed import World, free_port
from svfap_dist.parallel import stacks
from svfap_dist.parallel.processes import ChildProcess, CrashedError
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.train import watchdog
from svfap_dist.train.engine import process_group
from svfap_dist.train.stalls import Beat, StallError, Verdict, explain, judge

STEP, SLOW = 10.0, 600.0  # limits in seconds


def beat(rank: int = 0, **changes: Any) -> Beat:
    usual = Beat(
        host=f"h{rank}",
        pid=100 + rank,
        number=5,
        step=37,
        activity="forward and backward",
        seconds=1.0,
        limit=STEP,
        collectives=20,
    )
    return dataclasses.replace(usual, **changes)


def verdict(*beats: Beat, silences: dict[int, float] | None = None) -> Verdict | None:
    quiet = dict.fromkeys(range(len(beats)), 0.0) | (silences or {})
    return judge(dict(enumerate(beats)), quiet, STEP)


@pytest.mark.parametrize("seconds", [0.0, STEP])
def test_a_run_within_its_limits_is_left_alone(seconds: float) -> None:
    late = beat(seconds=seconds)
    assert verdict(late, late, silences={0: seconds, 1: seconds}) is None
    assert verdict(late) is None


def test_a_rank_without_heartbeat_is_named_though_others_are_late_too() -> None:
    found = verdict(beat(seconds=12.0, collectives=21), beat(1), silences={1: 11.0})
    assert found == Verdict("silent", (1,), 11.0)


def test_a_rank_that_stops_in_a_long_activity_is_noticed_as_soon() -> None:
    saving = beat(activity="saving a checkpoint", limit=SLOW)
    assert verdict(saving, saving, silences={0: 11.0}) == Verdict("silent", (0,), 11.0)


def test_the_rank_with_fewer_collectives_is_behind() -> None:
    others = beat(seconds=11.0, collectives=21)
    waits = beat(2, activity="waiting for the batch", seconds=10.5)
    assert verdict(others, others, waits, others) == Verdict("behind", (2,), 11.0)


def test_a_rank_behind_that_has_missed_many_beats_is_silent() -> None:
    """The others may notice their wait for it before its silence is long enough."""
    others, stopped = beat(seconds=10.1, collectives=21), beat(1)
    assert verdict(others, stopped, silences={1: 9.8}) == Verdict("silent", (1,), 10.1)
    assert verdict(others, stopped, silences={1: 1.0}) == Verdict("behind", (1,), 10.1)


def test_all_ranks_in_the_same_collective_are_together() -> None:
    late = beat(seconds=11.0)
    assert verdict(late, late) == Verdict("together", (0, 1), 11.0)
    assert verdict(late) == Verdict("together", (0,), 11.0)


def test_ranks_may_wait_for_one_in_a_long_activity() -> None:
    saving = beat(activity="saving a checkpoint", seconds=200.0, limit=SLOW)
    waits = beat(1, seconds=200.0, collectives=21)
    assert verdict(saving, waits) is None
    assert verdict(dataclasses.replace(saving, seconds=601.0), waits) == Verdict(
        "behind", (0,), 601.0
    )


def test_a_rank_that_has_left_is_not_silent_but_behind() -> None:
    gone = beat(1, ended=True, collectives=19)
    assert verdict(beat(), gone, silences={1: 60.0}) is None
    assert verdict(beat(seconds=11.0), gone, silences={1: 60.0}) == Verdict("behind", (1,), 11.0)
    assert verdict(gone, gone, silences={0: 60.0, 1: 60.0}) is None


def test_the_error_names_rank_step_activity_and_place() -> None:
    beats = {0: beat(collectives=21), 1: beat(1, activity="waiting for the batch")}
    found = Verdict("behind", (1,), 12.3)
    places = {1: "data/loader.py:97 batches (other threads at storage/files.py:320 read_buffer)"}
    error = explain(found, beats, places, "", "s3://b/run/stalls/attempt-0002")
    assert error.where == "step 37, rank 1 (process 101 on h1)"
    for part in ("waiting for the batch of step 37", "storage/files.py:320", "20 coll", "to 21"):
        assert part in error.found
    assert "s3://b/run/stalls/attempt-0002" in error.do
    assert error.retryable
    assert pickle.loads(pickle.dumps(error)).found == error.found


@pytest.mark.parametrize(
    ("kind", "state", "text"),
    [
        ("silent", "its process is stopped by a signal", "its process is stopped by a signal"),
        ("silent", "", "cut off"),
        ("store", "", "store does not answer"),
    ],
)
def test_kinds_of_silence_are_told_apart(kind: Any, state: str, text: str) -> None:
    error = explain(Verdict(kind, (0,), 12.0), {0: beat(), 1: beat(1)}, {}, state, "stalls")
    assert text in error.found
    assert "rank 0 (process 100 on h0)" in error.where


def test_every_rank_is_named_where_none_is_behind() -> None:
    beats = {rank: beat(rank) for rank in range(12)}
    found = Verdict("together", tuple(range(12)), 12.0)
    error = explain(found, beats, {0: "train/update.py:122 update"}, "", "stalls")
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7, ..." in error.where
    assert "train/update.py:122 update" in error.found
    assert isinstance(error, StallError)


def test_beats_and_verdicts_survive_the_store() -> None:
    assert Beat.loads(beat(1, ended=True).dumps()) == beat(1, ended=True)
    found = Verdict("behind", (1, 3), 12.5)
    assert Verdict.loads(found.dumps()) == found


def test_a_decoder_that_hangs_below_a_feeder_is_named() -> None:
    """Where the training thread waits says nothing: the rank's error names its decode worker."""

    def feed() -> None:
        with pytest.raises(CrashedError):
            feeder("feed")

    with ChildProcess(behave, seconds=600, may_have_children=True) as feeder:
        thread = threading.Thread(target=feed)
        thread.start()
        children = ""
        while "in probe\n" not in children:  # it may not have begun yet
            children = stacks.stacks_of_children()
        place = watchdog._describe_place(stacks.own_stacks(), children, threading.get_ident())
        feeder.kill()
        thread.join()
    waits = {0: beat(collectives=21), 1: beat(1, activity="waiting for the batch")}
    error = explain(Verdict("behind", (1,), 12.0), waits, {1: place}, "", "stalls")
    assert "waiting for the batch of step 37, at parallel/stacks.py" in error.found
    assert "other threads at video/" in error.found


def test_a_stopped_child_process_is_named() -> None:
    with ChildProcess(behave, seconds=600) as feeder:
        pid = feeder("pid")
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGSTOP)
        children = stacks.stacks_of_children()
    place = watchdog._describe_place(stacks.own_stacks(), children, threading.get_ident())
    assert f"(child processes that do not run: {pid})" in place


def test_a_stall_before_an_attempt_begins_replaces_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> None:
        raise RuntimeError(f"exit with {code}")  # which ends only the watchdog's thread

    train = {"stall_seconds": 1, "collective_timeout_seconds": 1}
    tables = recipe_tables("unused", str(tmp_path / "run"), train=train)
    config, world = recipe.from_tables(tables, where="test"), World(0, 0, 1, 1)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(os, "_exit", fail)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for _ in range(2):
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        with process_group(config, world), watchdog.Watchdog(config, world) as watching:
            watching._thread.join()
    folders = sorted((tmp_path / "run/stalls").iterdir())
    assert len(folders) == 2
    assert all((folder / "rank-0000.txt").exists() for folder in folders)

    for _ in range(2):  # the second time, nothing is new
        with Recorder(
            config, world, 1, 0, lambda row: None, lambda found: None, (1, 1), None
        ) as recorder:
            recorder.record_start(0, 12, "m", {})
    lines = (tmp_path / "run/events.jsonl").read_text().splitlines()
    stalls = [event for event in map(json.loads, lines) if event["event"] == "stall"]
    assert sorted(event["stacks"] for event in stalls) == [str(folder) for folder in folders]
