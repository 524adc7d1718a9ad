"""A sweep: its axes, its table, and two trials on a real Ray cluster, one of which fails."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_sharding.pipeline import shard
from svfap_dist import cli
from svfap_dist.cluster import sweep
from svfap_dist.config import recipe
from svfap_dist.errors import ConfigError

SMALL = [
    "model.size=nano",
    "data.num_frames=4",
    "data.sampling_rate=2",
    "data.frame_size=32",
    "model.stage_depths=[1,1]",
    "mask.ratio=0.5",
    "train.max_steps=2",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data") / "shards")
    shard("synthetic", "clips=16,frames=16,size=64", folder, min_frames=7, workers=0)
    return folder


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Configurations that would be trained; nothing is."""
    seen: list[Any] = []
    monkeypatch.setattr(
        sweep, "_run_all", lambda configs, trials, on_trial: seen.extend(configs.values())
    )
    return seen


def test_every_combination_is_a_run_of_its_own(no_ray: list[Any]) -> None:
    axes = ["mask.ratio=0.75,0.9", "model.stage_depths=[12,6,3],[4]"]
    result = sweep.run("tiny_cpu", axes, ["run.url=s3://bucket/sweep", "data.url=shards"])
    expected = list(itertools.product((0.75, 0.9), ((12, 6, 3), (4,))))
    assert [(c.mask.ratio, c.model.stage_depths) for c in no_ray] == expected
    assert [c.run.url for c in no_ray] == [trial.run_url for trial in result.trials]
    assert no_ray[0].run.url == "s3://bucket/sweep/mask.ratio=0.75,model.stage_depths=12-6-3"
    assert {c.cluster.num_workers for c in no_ray} == {1}
    assert {c.train.threads_per_rank for c in no_ray} == {1}


def test_an_impossible_combination_is_an_error_in_its_row(no_ray: list[Any]) -> None:
    result = sweep.run("tiny_cpu", ["mask.ratio=0.9,1.5"], ["run.url=runs"])
    assert [bool(trial.error) for trial in result.trials] == [False, True]
    assert "mask.ratio" in result.trials[1].error
    assert [c.mask.ratio for c in no_ray] == [0.9]
    assert result.failed == 1


@pytest.mark.parametrize(
    ("axes", "overrides", "words"),
    [
        ([], ["run.url=runs"], "Duplicate sweep key or value"),
        (["mask.ratio=0.9,0.8,0.9"], ["run.url=runs"], "Duplicate sweep key or value"),
        (["mask.ratio=0.9,0.90"], ["run.url=runs"], r"ratio=0\.9 and .*ratio=0\.90 are the same"),
        (["mask.ratio=0.9", "mask.ratio=0.8"], ["run.url=runs"], "Duplicate sweep key or value"),
        (["mask.ratio"], ["run.url=runs"], "Unreadable axis"),
        (["mask.ratio=0.9,"], ["run.url=runs"], "Unreadable axis"),
        (["run.url=a,b"], ["run.url=runs"], "Key cannot be swept"),
        (["mask.ratio=0.9,0.8"], [], "run.url"),
        (["mask.ration=0.9,0.8"], ["run.url=runs"], "did you mean ratio"),
    ],
)
def test_axes_that_make_no_sense_are_refused(
    axes: list[str], overrides: list[str], words: str, no_ray: list[Any]
) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep.run("tiny_cpu", axes, overrides)
    assert no_ray == []


@pytest.mark.slow
def test_two_trials_for_real(shards: str, tmp_path: Path) -> None:
    """One ends well, one fails in its process; the row says so, and the exit code."""
    missing = str(tmp_path / "no-shards")
    places = [f"run.url={tmp_path}/sweep", *SMALL]
    done = CliRunner().invoke(
        cli.app, ["sweep", "tiny_cpu", "--axis", f"data.url={shards},{missing}", "--json", *places]
    )
    assert done.exit_code == 1, done.output
    good, bad = json.loads(done.stdout)["trials"]
    assert bad["error"]
    assert missing in bad["error"]
    assert bad["loss"] is None
    assert good["error"] == ""
    assert good["combination"] == {"data.url": shards}
    assert good["clips_per_second"] > 0
    assert 0 < good["loss"] < 2
    assert good["parameters"] == bad["parameters"] > 1000
    assert good["gflops"] > 0
    run = Path(good["run_url"])
    assert run.parent == tmp_path / "sweep"
    assert recipe.load(str(run / "config.toml")).train.max_steps == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_table_has_a_row_for_each_trial() -> None:
    good = sweep.Trial({"mask.ratio": "0.9"}, "a", 12345, 7.5, 3.25, 1.0, 0.5, 0.625)
    bad = sweep.Trial({"mask.ratio": "0.8"}, "b", error="No shards.")
    header, first, second, reason = sweep.SweepResult([good, bad]).lines()
    assert header.split() == ["combination", "parameters", *header.split()[2:]]
    assert first.split() == [
        *("mask.ratio=0.9", "12,345", "7.50", "3.25", "1.0000", "to", "0.5000", "0.6250")
    ]
    assert second.split() == ["mask.ratio=0.8", "-", "-", "-", "failed", "-"]
    assert reason == "mask.ratio=0.8 failed: No shards."
