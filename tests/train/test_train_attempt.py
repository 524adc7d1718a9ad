"""What a driver reads of a run before its ranks start, and passes on."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from numbered_shards import video_of, write_data_set
from train_ranks import recipe_tables

from svfap_dist.config import recipe
from svfap_dist.errors import ConfigError
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
