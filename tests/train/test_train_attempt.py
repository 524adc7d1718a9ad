"""What a driver reads of a run before its ranks start, and passes on."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numbered_shards import video_of, write_data_set
from train_ranks import recipe_tables

from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import recipe
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError, HealthError
from svfap_dist.shards import format as shard_format
from svfap_dist.train import attempt, loop
from svfap_dist.train.context import load_run_context


def test_a_context_is_picklable_and_its_manifest_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data_set(str(tmp_path / "shards"), [4], [video_of(i) for i in range(4)], {})
    tables = recipe_tables(str(tmp_path / "shards"), str(tmp_path / "run"))
    config = recipe.from_tables(tables, where="test")
    context = loop.preflight(config)
    assert (context.step, context.attempt, context.split) == (0, 1, None)
    copied = pickle.loads(pickle.dumps(context))
    assert copied.manifest.fingerprint == context.manifest.fingerprint
    monkeypatch.setattr("svfap_dist.train.context.open_data", pytest.fail)
    (tmp_path / "run/ledger/attempt-0004").mkdir(parents=True)
    (tmp_path / "run/ledger/attempt-0004/rank-0000.jsonl").touch()
    again = loop.preflight(config, context)
    assert again.manifest is context.manifest
    assert again.attempt == 5  # read again


def test_an_attempt_trusts_what_the_last_one_has_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data and validation clips are listed by the first attempt, and again once they change."""
    listed: list[str] = []
    monkeypatch.setattr(shard_format, "check_shards", lambda url, manifest: listed.append(url))
    urls = [str(tmp_path / name) for name in ("shards", "held-out")]
    sets = [
        write_data_set(url, [size], [video_of(i) for i in range(size)], {})
        for url, size in zip(urls, (4, 2), strict=True)
    ]
    run = tmp_path / "run"
    tables = recipe_tables(urls[0], str(run), data={"eval_url": urls[1]})
    config = recipe.from_tables(tables, where="test")
    context = load_run_context(config)
    assert listed == urls
    assert context.eval_manifest == sets[1].manifest

    def begin(number: int, manifest: str, held_out: str) -> None:
        event = {"event": "start", "attempt": number, "manifest_fingerprint": manifest}
        with open(run / "events.jsonl", "a") as file:
            file.write(json.dumps(event | {"eval_fingerprint": held_out}) + "\n")

    run.mkdir()
    mine, held_out = (data_set.manifest.fingerprint for data_set in sets)
    listed.clear()
    begin(1, mine, held_out)
    assert load_run_context(config).attempt == 2
    assert listed == []
    begin(2, "other data", held_out)  # only the last attempt counts
    load_run_context(config)
    assert listed == urls[:1]


def test_a_checkpoint_vouches_for_the_data_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "shards")
    data_set = write_data_set(url, [4], [video_of(i) for i in range(4)], {})
    config = recipe.from_tables(recipe_tables(url, str(tmp_path / "run")), where="test")
    saved = TrainState.of_run(config, 8, 1, data_set.manifest.fingerprint, 2)
    monkeypatch.setattr(store, "latest_committed", lambda run_url: 8)
    monkeypatch.setattr(store, "read_state", lambda run_url, step: saved)
    monkeypatch.setattr(shard_format, "check_shards", pytest.fail)
    assert load_run_context(config).step == 8


def test_a_run_without_urls_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Missing required setting: data\.url"):
        loop.preflight(recipe.load("tiny_cpu"))


def test_running_out_of_memory_is_an_error_with_advice_that_no_restart_fixes() -> None:
    recorded: list[tuple[int, str, str]] = []
    failures: list[tuple[int, Exception]] = []
    ours = object.__new__(attempt.Attempt)
    ours.step, ours._config, ours._world = 7, recipe.load("tiny_cpu"), World(3, 0, 4, 1)
    ours._recorder = SimpleNamespace(record_stop=lambda *row: recorded.append(row))  # type: ignore[assignment]
    ours._on_failure = lambda step, error: failures.append((step, error))
    found = r"rank 3, step 8.*Tried to allocate"
    with pytest.raises(HealthError, match=found) as caught, ours._errors_recorded():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nSee ...")
    assert not caught.value.retryable
    assert "lower train.micro_batch_size" in caught.value.do
    assert [row[:2] for row in recorded] == [(7, "HealthError")]
    assert failures == [(7, caught.value)]
