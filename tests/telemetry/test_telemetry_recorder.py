"""What ranks record together: combined metrics, and the bad samples of all of them."""

from __future__ import annotations

import functools
import json
import math
import re
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svfap_dist import distributed
from svfap_dist.checkpoint.best import BestCheckpoint, write_best
from svfap_dist.config import recipe
from svfap_dist.distributed import World
from svfap_dist.profiling.ranks import run_on_local_ranks
from svfap_dist.report import page
from svfap_dist.shards.format import BadSample
from svfap_dist.telemetry import metrics
from svfap_dist.telemetry.meter import Meter
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.train.engine import process_group

NUMBERS = {"total_steps": 3, "epoch": 0, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0}


def _batch(rank: int, bad: list[BadSample]) -> Any:
    """What the recorder reads of a batch of 4 clips."""
    return SimpleNamespace(
        frames=[None] * 4,
        fetch_seconds=0.5 + rank,
        decode_seconds=0.25,
        bytes_fetched=100 + rank,
        batches_ready=3 - rank,
        bad=bad,
        sources=None,
        ledger=b"",
    )


def _record(url: str, world: World) -> tuple[list[dict[str, Any]], list[int]]:
    """Record three log steps, the second with a bad sample on rank 1; count pickled objects."""
    config = recipe.load("tiny_cpu", [f"run.url={url}"])
    rows: list[dict[str, Any]] = []
    counts, pickled = [], [0]
    gather = distributed.all_gather_object

    def counted(value: Any) -> list[Any]:
        pickled[0] += 1
        return gather(value)

    with (
        process_group(config, world),
        Recorder(config, world, 1, 0, rows.append, lambda found: None, (1, 1), None) as recorder,
    ):
        distributed.all_gather_object = counted
        for step in (1, 2, 3):
            bad = [BadSample(7, "clip-7", "undecodable", "torn")] * (step == 2) * world.rank
            recorder.count_step(step, _batch(world.rank, bad))
            phases = {"forward": 1.0 + world.rank, "backward": 2.0, "exchange": 1.0 - world.rank}
            recorder.log_step({"step": step, **NUMBERS}, phases)
            counts.append(pickled[0])
    return rows, counts


def test_log_steps_combine_all_ranks_without_pickling(tmp_path: Path) -> None:
    """Objects are gathered at the one step that has bad samples."""
    (rows, counts), (_, others) = run_on_local_ranks(
        functools.partial(_record, str(tmp_path / "run")), 2, seconds=120
    )
    assert counts == others == [0, 1, 1]
    assert [row["bad_samples"] for row in rows] == [0, 1, 0]
    for row in rows:
        assert row["fetch_seconds"] == 0.5 + 1.5
        assert row["batches_ready"] == 2.0  # of the rank that waits
        assert row["own_seconds"] == 4.0  # of the slowest rank; not the exchange
        assert [rank for rank, _ in row["slowest_ranks"]] == [1]
        assert (row["bytes_fetched"], type(row["bytes_fetched"])) == (201, int)
    lines = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["clip-7"]


def test_the_cost_of_a_slow_rank_is_the_share_of_time_that_the_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks of which one needs 3.0 s of each step for itself, the others 1.0 s."""
    config = recipe.load("tiny_cpu", [f"run.url={tmp_path}", "metrics.enabled=false"])
    rows: list[dict[str, Any]] = []
    world, parts = World(0, 0, 4, 4), (1, 0, rows.append, lambda found: None, (1, 1), None)
    now = [0.0]
    ratios = [1.0, 1.0, 3.0, 1.0]

    def gather(own: list[float]) -> list[list[float]]:
        at = [metric.name for metric in metrics.windowed_metrics()].index(metrics.OWN_SECONDS.name)
        others = [float(value) for value in own]
        return [[*others[:at], others[at] * ratio, *others[at + 1 :]] for ratio in ratios]

    with Recorder(config, world, *parts) as recorder:
        monkeypatch.setattr(distributed, "all_gather_numbers", gather)
        recorder.meter = Meter(lambda: now[0])
        for step in (1, 2):
            now[0] += 4.0
            recorder.count_step(step, _batch(0, []))
            phases = {"forward": 0.25, "backward": 0.75, "exchange": 2.0}
            recorder.log_step({"step": step, **NUMBERS}, phases)
    assert [row["slowest_ranks"] for row in rows] == [[(2, 0.5)], [(2, 0.5)]]
    page.make(str(tmp_path), str(tmp_path / "report.html"))
    assert "2: 50.0 %" in (tmp_path / "report.html").read_text()


def test_the_report_draws_the_validations_of_a_fine_tuning(tmp_path: Path) -> None:
    config = recipe.load("tiny_cpu", [f"run.url={tmp_path}", "metrics.port=0"])
    parts = (1, 0, lambda row: None, lambda found: None, (1, 1), None)
    best = BestCheckpoint(2, 0.5, "validation 0.1 of a manifest")
    with Recorder(config, World(0, 0, 1, 1), *parts) as recorder:
        recorder.record_start(0, 2, "manifest", {})
        for step, score in ((1, math.nan), (2, 0.5), (3, 0.25)):
            recorder.count_step(step, _batch(0, []))
            recorder.log_step({"step": step, **NUMBERS}, {})
            recorder.record_validation(step, "uar", score, 10, 0, is_best=step == 2)
    folder = tmp_path / "checkpoints/step-000000002"
    folder.mkdir(parents=True)
    (folder / "COMMIT").write_text("{}")
    write_best(str(tmp_path), best)
    page.make(str(tmp_path), str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    assert text.count("validation: UAR") == 1  # its title
    assert "best checkpoint by validation" in text
    assert "step 2, UAR 50.0 %" in text


def test_a_process_alone_gathers_its_own_numbers() -> None:
    assert distributed.all_gather_numbers([1, 2.5]) == [[1.0, 2.5]]


def test_another_number_of_ranks_is_an_event_with_its_reason(tmp_path: Path) -> None:
    """By the events of the run alone, so also for launchers that start a run again by hand."""
    config = recipe.load("tiny_cpu", [f"run.url={tmp_path}", "metrics.port=0"])
    ends = [("RuntimeError", "reset by peer"), ("nodes joined", ""), ("SIGTERM", ""), None, None]
    sizes = [3, 2, 4, 4, 1]
    served = []
    for attempt, (size, end) in enumerate(zip(sizes, ends, strict=True), start=1):
        world = World(0, 0, size, size)
        parts = (attempt, attempt, lambda row: None, lambda found: None, (1, 1), None)
        with Recorder(config, world, *parts) as recorder:
            recorder.record_start(attempt, 10, "manifest", {})
            (start,) = [e for e in _events(tmp_path) if e.get("attempt") == attempt]
            served.append(_scraped(start["ranks"][0]["metrics"]))
            if end is not None:
                recorder.record_stop(attempt, *end)
    found = [e for e in _events(tmp_path) if e["event"] == "resize"]
    assert [(e["from"], e["to"], e["reason"]) for e in found] == [
        (3, 2, "failure"),
        (2, 4, "nodes joined"),
        (4, 1, "failure"),  # killed: there is no stop
    ]
    assert served == [(3, 0), (2, 1), (4, 2), (4, 2), (1, 3)]


def _events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def _scraped(address: str) -> tuple[float, ...]:
    """Ranks and resizes at a metrics address."""
    text = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    names = ("svfap_world_size", "svfap_resizes")
    return tuple(float(values[next(k for k in values if k.startswith(n))]) for n in names)


def test_the_loss_of_each_source_is_a_metric_and_the_report_has_a_row_for_it(
    tmp_path: Path,
) -> None:
    sources = 'data.sources=[{url="x/one"}, {url="x/two", name="other"}]'
    overrides = [f"run.url={tmp_path}", sources, "data.repeated_sampling=2"]
    config = recipe.load("tiny_cpu", [*overrides, "train.global_batch_size=16"])
    parts = (1, 0, lambda row: None, lambda found: None, (1, 1), None)
    with Recorder(config, World(0, 0, 1, 1), *parts) as recorder:
        recorder.samples_of_sources = (6, 4)
        recorder.record_start(0, 2, "manifest", {}, samples=(6, 3))
        for step, losses in ((1, {"one": 4.0}), (2, {"one": 2.0, "other": 1.0})):
            batch = _batch(0, [BadSample(7, "clip-7", "damaged", "")])
            batch.sources = torch.tensor([0, 0, 0, step - 1])
            recorder.count_step(step, batch)
            clips = {"one": 16 if step == 1 else 8, "other": 8 * (step - 1)}
            numbers = {**NUMBERS, "step": step, "source_loss": losses, "source_clips": clips}
            recorder.log_step(numbers, {})
        series = recorder._exporter._series[metrics.SOURCE_LOSS.name].collect()
        found = {s.labels["source"]: s.value for family in series for s in family.samples}
    assert found == {"one": 2.0, "other": 1.0}
    assert _events(tmp_path)[0]["sources"] == {"one": 6, "other": 3}
    page.make(str(tmp_path), str(tmp_path / "report.html"))
    text = (tmp_path / "report.html").read_text()
    rows = [re.findall(r"<t[dh]>([^<\n]*)", line) for line in text.split("\n") if "<td>o" in line]
    # Of 2 steps of 8 samples, 3/4 are of the first source.
    assert [(row[0], row[1], *row[3:]) for row in rows] == [
        ("one", "4.000 → 2.000", "75.0 %", "2.00", "0"),
        ("other", "1.000 → 1.000", "25.0 %", "1.33", "2"),
    ]


def test_clips_and_bad_samples_are_counted_by_source(tmp_path: Path) -> None:
    """A sample is of the source whose indices it is among."""
    sources = 'data.sources=[{url="x/one"}, {url="x/two", name="other"}]'
    config = recipe.load("tiny_cpu", [f"run.url={tmp_path}/run", sources])
    world = World(0, 0, 1, 1)
    parts = (1, 0, lambda row: None, lambda found: None, (1, 1), None)
    with Recorder(config, world, *parts) as recorder:
        recorder.samples_of_sources = (5, 4)
        bad = [BadSample(index, f"clip-{index}", "damaged", "") for index in (4, 5, 8)]
        batch = _batch(0, bad)
        batch.sources = torch.tensor([0, 1, 0, 0])
        recorder.count_step(1, batch)
        found = {
            (metric.name, sample.labels["source"]): sample.value
            for metric in (metrics.SOURCE_CLIPS, metrics.SOURCE_BAD_SAMPLES)
            for family in recorder._exporter._series[metric.name].collect()
            for sample in family.samples
        }
        recorder.write_quarantine()
    assert found == {
        ("svfap_source_clips_total", "one"): 3,
        ("svfap_source_clips_total", "other"): 1,
        ("svfap_source_bad_samples_total", "one"): 1,
        ("svfap_source_bad_samples_total", "other"): 2,
    }
    lines = (tmp_path / "run/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["one", "other", "other"]
