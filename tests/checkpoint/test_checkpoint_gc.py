"""`svfap checkpoint gc`: deletes what is not needed, keeps the rest, refuses a live run."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svfap_dist import cli, storage
from svfap_dist.checkpoint import gc, store
from svfap_dist.checkpoint.best import BestCheckpoint, read_best, resolve_best, write_best
from svfap_dist.checkpoint.store import COMMIT, checkpoint_url
from svfap_dist.config import recipe
from svfap_dist.errors import CheckpointError
from svfap_dist.telemetry.journal import Journal


def a_run(url: str, committed: tuple[int, ...], leftovers: tuple[int, ...] = ()) -> str:
    """Checkpoints of one small file; the run has stopped in good order."""
    tables = {"run": {"url": url}, "train": {"keep_last": 2}}
    with Journal(recipe.from_tables(tables, where="test"), 0, 1, step=0) as journal:
        journal.write_event("start", step=0)
        journal.write_event("stop", step=99, reason="finished")
    for step in (*committed, *leftovers):
        folder = checkpoint_url(url, step)
        data = b"shard of %d" % step
        storage.write_bytes(storage.join(folder, "shard.pt"), data)
        if step in committed:
            digest = hashlib.sha256(data).hexdigest()
            store.commit(folder, [{"name": "shard.pt", "size": len(data), "sha256": digest}])
    return url


def events(url: str, *lines: dict) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    storage.write_bytes(storage.join(url, "events.jsonl"), text.encode())


def owned_by(url: str, mark: str) -> None:
    storage.write_bytes(storage.join(url, "OWNER"), mark.encode())


def test_leftovers_and_what_retention_lets_go_are_deleted(tmp_path: Path) -> None:
    url = a_run(str(tmp_path), (10, 20, 30, 40), leftovers=(15, 50))
    found = gc.plan_gc(url, keep_every=10_000)
    assert (found.leftovers, found.outdated, found.kept) == ((15, 50), (10, 20), (30, 40))
    assert len(store.list_checkpoints(url)) == 6  # a plan deletes nothing
    before = sum(sum(files.values()) for files in store.list_checkpoints(url).values())
    gc.run_gc(found)
    assert sorted(store.list_checkpoints(url)) == [30, 40]
    left = sum(sum(files.values()) for files in store.list_checkpoints(url).values())
    assert before - left == found.bytes
    assert gc.plan_gc(url).steps == ()


def test_the_best_checkpoint_by_probes_stays(tmp_path: Path) -> None:
    url = a_run(str(tmp_path), (10, 20, 30, 40))
    write_best(url, BestCheckpoint(20, 0.5, "probe"))
    assert gc.plan_gc(url).kept == (20, 30, 40)
    assert resolve_best(f"{url}/checkpoints/best") == checkpoint_url(url, 20)
    assert resolve_best(url) == url
    store.delete(checkpoint_url(url, 20))
    assert read_best(url) is None
    assert gc.plan_gc(url).kept == (30, 40)


def test_an_object_store(s3_bucket: str) -> None:
    url = a_run(f"{s3_bucket}/run", (10, 20, 30), leftovers=(15,))
    gc.run_gc(gc.plan_gc(url, keep_last=1, keep_every=20))
    assert sorted(store.list_checkpoints(url)) == [20, 30]


def test_the_newest_whole_checkpoint_stays_even_if_a_damaged_one_is_newer(tmp_path: Path) -> None:
    url = a_run(str(tmp_path), (10, 20, 30))
    (tmp_path / "checkpoints/step-000000030/shard.pt").write_bytes(b"short")
    found = gc.plan_gc(url, keep_last=1)
    assert (found.outdated, found.kept) == ((10,), (20, 30))


def test_commit_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = a_run(str(tmp_path), (10, 20, 30))
    found = gc.plan_gc(url, keep_last=1)

    def killed_after_the_first(where: str) -> None:
        Path(where).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "delete", killed_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        gc.run_gc(found)
    monkeypatch.undo()
    assert COMMIT not in store.list_checkpoints(url)[10]
    assert gc.plan_gc(url, keep_last=1).leftovers == (10,)  # the next time it goes


def test_a_run_that_may_be_alive_is_refused(tmp_path: Path) -> None:
    url = a_run(str(tmp_path), (10, 20, 30))
    owned_by(url, "pid 1 on another-host, 0123abcd")
    events(url, {"event": "window", "time": time.time() - 60})
    with pytest.raises(CheckpointError, match=r"may be alive.*60 s old.*another-host.*launch stop"):
        gc.plan_gc(url)
    owned_by(url, f"pid {os.getpid()} on {socket.gethostname()}, 0123abcd")
    with pytest.raises(CheckpointError, match="may be alive"):
        gc.plan_gc(url)
    assert len(store.list_checkpoints(url)) == 3


def test_a_run_that_was_killed_is_not_alive(tmp_path: Path) -> None:
    url = a_run(str(tmp_path), (10, 20, 30))
    events(url, {"event": "window", "time": time.time()})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owned_by(url, f"pid {gone.pid} on {socket.gethostname()}, 0123abcd")
    assert gc.plan_gc(url).outdated == (10,)
    owned_by(url, "pid 1 on another-host, 0123abcd")
    events(url, {"event": "window", "time": time.time() - 3700})
    assert gc.plan_gc(url).outdated == (10,)


def test_a_run_that_starts_meanwhile_ends_it(tmp_path: Path) -> None:
    url = a_run(str(tmp_path), (10, 20, 30, 40))
    found = gc.plan_gc(url, keep_last=1)

    def somebody_starts(step: int) -> None:
        owned_by(url, "pid 1 on another-host, 0123abcd")

    with pytest.raises(CheckpointError, match="new attempt has started"):
        gc.run_gc(found, somebody_starts)
    assert sorted(store.list_checkpoints(url)) == [20, 30, 40]


def test_the_verb_asks_or_wants_to_be_told(tmp_path: Path) -> None:
    url = a_run(str(tmp_path), (10, 20, 30), leftovers=(40,))
    words = ["checkpoint", "gc", url, "--json"]
    dry = CliRunner().invoke(cli.app, [*words, "--dry-run"])
    assert json.loads(dry.stdout)["leftovers"] == [40]
    assert CliRunner().invoke(cli.app, words).exit_code != 0  # no terminal to confirm on
    assert len(store.list_checkpoints(url)) == 4
    done = CliRunner().invoke(cli.app, [*words, "--yes"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["outdated"] == [10]
    assert sorted(store.list_checkpoints(url)) == [20, 30]
