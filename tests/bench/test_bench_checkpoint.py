from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.bench import checkpoint
from svfap_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("ranks", "device"),
    [
        pytest.param(2, "cpu", marks=pytest.mark.slow),
        pytest.param(1, "cuda", marks=pytest.mark.gpu),
    ],
)
def test_both_ways_are_timed_and_cleaned_up(tmp_path: Path, ranks: int, device: str) -> None:
    words = ["bench", "checkpoint", "--size", "nano", "--rounds", "1", "--json"]
    words += ["--ranks", str(ranks)]
    done = CliRunner().invoke(cli.app, [*words, "--url", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["device"] == device
    assert 0 < found["stall_seconds"] <= found["commit_seconds"]
    assert found["ratio"] == pytest.approx(found["plain_seconds"] / found["stall_seconds"])
    # Ours has the full weights besides, a third of what the optimizer's shards have.
    assert found["plain_bytes"] < found["bytes"] < 1.5 * found["plain_bytes"]
    assert found["load_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--size", "huge"], ["--dtype", "int8"]])
def test_unknown_options_are_refused(words: list[str]) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "checkpoint", *words])
    assert isinstance(done.exception, ConfigError)


def test_the_type_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def on_ranks(measure: functools.partial[object], ranks: int) -> None:
        asked.append(measure.args[0].train.dtype)
        raise ConfigError("No ranks are started")

    monkeypatch.setattr(checkpoint, "run_on_local_ranks", on_ranks)
    for words in ([], ["--dtype", "bfloat16"]):
        CliRunner().invoke(cli.app, ["bench", "checkpoint", "--size", "nano", *words])
    assert asked == ["float32", "bfloat16"]
