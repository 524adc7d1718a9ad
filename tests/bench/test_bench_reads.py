"""`svfap bench reads`: what is requested, beside the first release."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.bench import reads
from svfap_dist.errors import ConfigError


@pytest.mark.parametrize("ranks", [8, 16])
def test_the_flagship_recipe_makes_few_large_requests_at_even_times(ranks):
    before, whole, parts = reads.run("svfap_base_voxceleb2", ranks=[ranks]).rows
    for row in (whole, parts):
        assert row.smallest_range >= 2 << 20
        assert row.busiest_tenth <= 0.2
    assert parts.ranges_per_block < 6
    assert parts.bytes_per_clip <= 0.4 * before.bytes_per_clip
    assert whole.bytes_per_clip <= 1.01 * 240_000
    if ranks == 16:
        assert before.busiest_tenth > 0.9
    else:  # single samples
        assert before.smallest_range < 240_000
        assert before.ranges_per_block == 512


def test_the_command_prints_a_row_per_rule() -> None:
    words = ["bench", "reads", "tiny_cpu", "--ranks", "2", "--sample-bytes", "40000", "--json"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["rows"]
    assert [row["rule"] for row in rows] == ["first release", "whole", "4 parts"]
    assert all(row["bytes_per_clip"] > 0 for row in rows)


def test_ranks_that_the_lanes_do_not_allow_are_refused():
    with pytest.raises(ConfigError, match=r"3 ranks for data\.num_lanes = 64"):
        reads.run("svfap_base_voxceleb2", ranks=[3])
