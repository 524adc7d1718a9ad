"""What a driver reads of a run before its ranks start, and passes on."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from numbered_shards import video_of, write_data_set
from train_ranks import recipe_tables

from svfap_dist.config import recipe
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError, HealthError
from svfap_dist.train import attempt, loop


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
    monkeypatch.setattr(attempt, "open_data", pytest.fail)
    (tmp_path / "run/ledger/attempt-0004").mkdir(parents=True)
    (tmp_path / "run/ledger/attempt-0004/rank-0000.jsonl").touch()
    again = loop.preflight(config, context)
    assert again.manifest is context.manifest
    assert again.attempt == 5  # read again


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
