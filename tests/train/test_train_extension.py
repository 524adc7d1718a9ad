"""Finished runs on two ranks that continue with other values of some keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from numbered_shards import video_of, write_data_set
from train_ranks import recipe_tables, start

from svfap_dist.checkpoint import store
from svfap_dist.report import page
from svfap_dist.train.audit import audit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_finished_run_continues_with_what_it_is_allowed_to_change(tmp_path: Path) -> None:
    data, run, other = str(tmp_path / "shards"), tmp_path / "run", tmp_path / "other"
    write_data_set(data, [14], [video_of(number) for number in range(14)], {})

    def task(url: Path, steps: int, *allowed: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        changes["train"] = {"max_steps": steps, **changes.get("train", {})}
        changes["optim"] = {"lr": 0.01, **changes.get("optim", {})}
        tables = recipe_tables(data, str(url), **changes)
        tables["run"]["allow_change"] = list(allowed)
        return "train", {"tables": tables}

    decay = {"weight_decay": 20.0}
    results = start(
        2,
        [
            task(run, 6),
            task(run, 9),
            task(run, 9, "optim.lr"),
            task(run, 5, "train.max_steps"),
            task(run, 9, "train.max_steps", train={"global_batch_size": 8}),
            task(run, 9, "train.max_steps"),
            task(run, 9),
            task(run, 9, optim=decay),
            task(other, 6),
            task(other, 9, "train.max_steps", "optim.weight_decay", optim=decay),
        ],
        tmp_path / "ranks",
        seconds=900,
    )
    first, unnamed, misnamed, shorter, batch, longer, again, after, *_ = (r[0] for r in results)
    assert (first["step"], first["stop_reason"]) == (6, "finished")
    for refused in (unnamed, misnamed):
        assert refused["error"] == "ConfigError"
        assert "train.max_steps is 9, was 6" in refused["message"]
        assert "run.allow_change=train.max_steps" in refused["message"]
    assert "Run is longer than its recipe" in shorter["message"]
    assert "train.global_batch_size is 8, was 4" in batch["message"]
    assert "allow_change" not in batch["message"]
    assert (longer["step"], longer["total_steps"], longer["stop_reason"]) == (9, 9, "finished")
    assert (again["step"], again["stop_reason"]) == (9, "finished")  # named no more
    assert "optim.weight_decay is 20.0" in after["message"]

    events = lines(run / "events.jsonl")
    assert [event["step"] for event in events if event["event"] in ("start", "resume")] == [0, 6, 9]
    (change,) = (event for event in events if event["event"] == "change")
    found = [change[name] for name in ("key", "from", "to", "step")]
    assert found == ["train.max_steps", 6, 9, 6]
    assert store.read_state(str(run), 9).config["train"]["max_steps"] == 9
    audited = audit(str(run))
    assert audited.is_exact
    assert (audited.steps, audited.redone, audited.passed_over) == (9, 0, 0)
    page.make(str(run), str(tmp_path / "report.html"))
    html = (tmp_path / "report.html").read_text()
    assert "key train.max_steps, from 6, to 9" in html

    both = [[row["loss"] for row in lines(url / "metrics.jsonl")] for url in (run, other)]
    assert both[0][:7] == both[1][:7]  # the seventh is of weights before any decay
    assert both[0][7:] != both[1][7:]  # the checkpoint's own weight decay does not come back
