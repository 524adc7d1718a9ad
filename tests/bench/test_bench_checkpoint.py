from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.errors import ConfigError


@pytest.mark.slow
def test_both_ways_are_timed_and_cleaned_up(tmp_path: Path) -> None:
    words = ["bench", "checkpoint", "--size", "nano", "--rounds", "1", "--json"]
    done = CliRunner().invoke(cli.app, [*words, "--url", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert 0 < found["stall_seconds"] <= found["commit_seconds"]
    assert found["ratio"] == pytest.approx(found["plain_seconds"] / found["stall_seconds"])
    # Ours has the full weights besides, a third of what the optimizer's shards have.
    assert found["plain_bytes"] < found["bytes"] < 1.5 * found["plain_bytes"]
    assert found["load_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_size_is_refused() -> None:
    done = CliRunner().invoke(cli.app, ["bench", "checkpoint", "--size", "huge"])
    assert isinstance(done.exception, ConfigError)
