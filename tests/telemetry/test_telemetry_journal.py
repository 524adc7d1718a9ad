from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from svfap_dist import storage
from svfap_dist.config import Config, recipe
from svfap_dist.telemetry import journal
from svfap_dist.telemetry.journal import (
    EVENTS_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    Journal,
    read_history,
    read_ledgers,
)


def a_config(url: str | Path) -> Config:
    return recipe.from_tables({"run": {"url": str(url), "ledger": True}}, where="test")


def lines(url: str | Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in storage.read_bytes(f"{url}/{name}").splitlines()]


def write_attempt(config: Config, attempt: int, first: int, last: int, rank: int = 0) -> None:
    with Journal(config, rank, attempt, step=first, clock=lambda: 5.0) as opened:
        opened.write_event("resume" if first else "start", attempt=attempt, step=first)
        for step in range(first + 1, last + 1):
            opened.write_ledger(journal.encode_lines([{"step": step, "key": f"k{step}"}]))
            opened.write_line(METRICS_FILE, {"step": step, "loss": 1 / step})
            opened.write_line(QUARANTINE_FILE, {"step": step, "key": "bad"})


def test_lines_and_recipe_of_a_run(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    write_attempt(config, attempt=1, first=0, last=3)
    assert [row["step"] for row in lines(tmp_path, METRICS_FILE)] == [1, 2, 3]
    assert lines(tmp_path, EVENTS_FILE) == [
        {"event": "start", "time": 5.0, "attempt": 1, "step": 0}
    ]
    assert recipe.load(str(tmp_path / "config.toml")) == config


def test_ranks_other_than_0_write_only_their_ledger(tmp_path: Path) -> None:
    write_attempt(a_config(tmp_path), attempt=1, first=0, last=1, rank=3)
    assert list(storage.list_files(str(tmp_path))) == ["ledger/attempt-0001/rank-0003.jsonl"]


def test_a_resume_drops_what_the_killed_attempt_did_after_the_checkpoint(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    write_attempt(config, attempt=1, first=0, last=5)
    with open(tmp_path / METRICS_FILE, "ab") as file:
        file.write(b'{"step": 6, "lo')  # the kill came in the middle of a line
    assert read_history(str(tmp_path)).attempts == 1
    write_attempt(config, attempt=2, first=3, last=4)
    for name in (METRICS_FILE, QUARANTINE_FILE):
        assert [row["step"] for row in lines(tmp_path, name)] == [1, 2, 3, 4]
    assert [event["event"] for event in lines(tmp_path, EVENTS_FILE)] == ["start", "resume"]


def test_ledgers_count_each_step_once_whatever_was_killed(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    for attempt, first, last in ((1, 0, 5), (2, 3, 4), (3, 3, 7)):
        assert read_history(str(tmp_path)).attempts == attempt - 1
        write_attempt(config, attempt, first, last)
    starts = {event["attempt"]: event["step"] for event in lines(tmp_path, EVENTS_FILE)}
    counted = [
        line["step"]
        for attempt in starts
        for line in lines(tmp_path, f"ledger/attempt-{attempt:04d}/rank-0000.jsonl")
        if all(line["step"] <= starts[later] for later in starts if later > attempt)
    ]
    assert counted == [1, 2, 3, 4, 5, 6, 7]


def test_an_attempt_whose_events_were_lost_still_has_its_number(tmp_path: Path) -> None:
    write_attempt(a_config(tmp_path), attempt=1, first=0, last=1)
    (tmp_path / EVENTS_FILE).unlink()
    assert read_history(str(tmp_path)).attempts == 1
    assert read_history(str(tmp_path / "nothing")).attempts == 0


def write_events(folder: Path, *events: dict[str, Any]) -> None:
    (folder / EVENTS_FILE).write_bytes(journal.encode_lines(events))


def rollback_to(step: int, *passed_over: int) -> dict[str, Any]:
    return {"event": "rollback", "from": 9, "to": step, "passed_over": list(passed_over)}


def saved(step: int) -> dict[str, Any]:
    return {"event": "checkpoint", "step": step}


def stopped(step: int, reason: str, message: str = "") -> dict[str, Any]:
    return {"event": "stop", "step": step, "reason": reason, "message": message}


def test_later_attempts_know_what_was_passed_over(tmp_path: Path) -> None:
    write_events(tmp_path, rollback_to(4, 6, 7), saved(8), rollback_to(8, 10))
    assert read_history(str(tmp_path)).passed_over == {6, 7, 10}
    assert read_history(str(tmp_path / "nothing")).passed_over == frozenset()


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([rollback_to(4, 6), rollback_to(4, 7)], 2),
        ([rollback_to(4, 6), saved(5), rollback_to(5, 7)], 2),  # step 6 is still ahead
        ([rollback_to(4, 6), saved(8)], 0),
        ([rollback_to(4, 6), saved(8), rollback_to(8, 9)], 1),
        ([rollback_to(4, 6), stopped(6, "SIGTERM"), stopped(6, "ValueError", "x")], 1),
        ([rollback_to(4, 6), stopped(6, "NotFiniteError", "Loss is not finite")], 0),
    ],
)
def test_rollbacks_count_until_there_is_progress(
    events: list[dict[str, Any]], expected: int, tmp_path: Path
) -> None:
    write_events(tmp_path, *events)
    assert read_history(str(tmp_path)).rollbacks == expected


def test_failures_are_known_by_their_step_and_first_line(tmp_path: Path) -> None:
    write_events(tmp_path, stopped(3, "ValueError", "bad\nmore"), stopped(5, "finished"))
    assert read_history(str(tmp_path)).failures == {(3, "ValueError: bad")}


def test_a_stall_hides_no_fingerprint_of_the_attempt_before(tmp_path: Path) -> None:
    """Its event has the attempt's number, too; without fingerprints all shards are listed again."""
    begun = {"event": "start", "attempt": 1, "manifest_fingerprint": "a", "eval_fingerprint": "b"}
    write_events(tmp_path, begun, {"event": "stall", "attempt": 1})
    assert read_history(str(tmp_path)).fingerprints == {"a", "b"}


def test_the_number_of_an_attempt_takes_two_requests_however_many_ledgers_there_are(
    s3_bucket: str,
) -> None:
    """Hundreds of ranks leave hundreds of files in each attempt, a thousand to a page."""
    for attempt, rank in ((1, 0), (1, 1), (3, 0)):
        storage.write_bytes(f"{s3_bucket}/run/ledger/attempt-{attempt:04d}/rank-{rank:04d}", b"")
    storage.write_bytes(f"{s3_bucket}/run/{EVENTS_FILE}", b"")
    pages: list[str] = []
    fs, _ = storage.filesystem(s3_bucket)
    event, remember = "before-send.s3.ListObjectsV2", lambda request, **_: pages.append(request.url)
    fs.s3.meta.events.register(event, remember)
    before = storage.request_counts()
    assert read_history(f"{s3_bucket}/run").attempts == 3
    fs.s3.meta.events.unregister(event, remember)
    added = storage.request_counts().since(before)
    assert added is not None
    assert added.requests == {("read", "ok"): 1, ("list", "ok"): 1}
    assert len(pages) == 1
    assert "delimiter=%2F" in pages[0]


def test_an_object_store_gets_whole_files_at_each_sync(s3_bucket: str) -> None:
    url = f"{s3_bucket}/run"
    config = a_config(url)
    with Journal(config, rank=0, attempt=1, step=0) as opened:
        opened.write_line(METRICS_FILE, {"step": 1})
        opened.sync()
        assert lines(url, METRICS_FILE) == [{"step": 1}]
        opened.write_line(METRICS_FILE, {"step": 2})
        assert lines(url, METRICS_FILE) == [{"step": 1}]
    assert lines(url, METRICS_FILE) == [{"step": 1}, {"step": 2}]
    write_attempt(config, attempt=2, first=1, last=3)
    assert [row["step"] for row in lines(url, METRICS_FILE)] == [1, 2, 3]


def test_a_ledger_is_uploaded_in_parts_not_again_and_again(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sync uploads at most one unfinished part: bytes grow with the run, not its square."""
    monkeypatch.setattr(journal, "_PART_BYTES", 1000)
    uploaded: dict[str, int] = {}
    write_bytes = storage.write_bytes

    def counted(url: str, data: bytes) -> None:
        if "ledger/" in url:
            uploaded[url] = uploaded.get(url, 0) + len(data)
        write_bytes(url, data)

    monkeypatch.setattr(storage, "write_bytes", counted)
    url, steps = f"{s3_bucket}/run", 200
    with Journal(a_config(url), rank=0, attempt=1, step=0) as opened:
        for step in range(1, steps + 1):
            line = {"step": step, "epoch": 0, "lane": 0, "key": f"k{step}"}
            opened.write_ledger(journal.encode_lines([line]))
            opened.sync()
            sizes = storage.list_files(f"{url}/ledger")
            assert len(opened._ledger._parts) == 1  # type: ignore[union-attr]
    assert len(sizes) > 5
    assert min(sorted(sizes.values())[1:]) >= 1000  # all but the last part are full
    # A part of n lines is uploaded n times at most, here after every line.
    assert max(uploaded.values()) < 1100 * 1100 / 50
    (ledger,) = read_ledgers(url, 1, sizes)
    assert [line["step"] for line in ledger.take(steps)] == list(range(1, steps + 1))
    assert ledger.torn == 0


def test_a_part_whose_upload_failed_is_uploaded_later(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_PART_BYTES", 100)
    write_bytes, fails = storage.write_bytes, [True]

    def failing(url: str, data: bytes) -> None:
        if "ledger/" in url and fails[0]:
            raise storage.StorageError("Store is down")
        write_bytes(url, data)

    monkeypatch.setattr(storage, "write_bytes", failing)
    url = f"{s3_bucket}/run"
    with Journal(a_config(url), rank=2, attempt=1, step=0) as opened:
        for step in range(1, 21):
            line = {"step": step, "epoch": 0, "lane": 0, "key": "k"}
            opened.write_ledger(journal.encode_lines([line]))
            with pytest.raises(storage.StorageError):
                opened.sync()
        fails[0] = False
    (ledger,) = read_ledgers(url, 1, storage.list_files(f"{url}/ledger"))
    assert len(ledger.take(20)) == 20


def test_a_folder_that_cannot_be_written_is_an_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(storage.StorageError):
        Journal(a_config(tmp_path / "run"), rank=0, attempt=1, step=0)
