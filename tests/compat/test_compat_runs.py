"""Runs and checkpoints of f84d50d can be verified, audited, resumed and evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from alike import differences

RESUMED = {  # run: the command that resumed it; torchrun resumed two-ranks-on-two
    "pretrain": "pretrain",
    "two-ranks-on-two": "",
    "two-ranks-on-one": "pretrain on one",
    "reshaped": "pretrain reshaped",
    "finetune-stopped/fold-1": "finetune stopped",
    "finetune-stopped/fold-2": "finetune stopped",
}


def _all_as_before(names: list[str], now: dict[str, Any], then: dict[str, Any]) -> None:
    for name in names:
        assert now["commands"][name]["code"] == 0, now["stderr"][name]
        assert differences(now["commands"][name], then["commands"][name]) == [], name


def test_checkpoints_are_found_and_whole(now: dict[str, Any], then: dict[str, Any]) -> None:
    names = ["checkpoints", "checkpoint", "checkpoint of two ranks", "checkpoint reshaped"]
    _all_as_before([*names, "collected"], now, then)
    assert now["commands"]["checkpoints"]["printed"]["steps"] == [4, 5]


def test_ledgers_prove_that_each_sample_was_used_once(
    now: dict[str, Any], then: dict[str, Any]
) -> None:
    _all_as_before(["audit", "audit of two ranks", "audit of a fold", "audit after"], now, then)
    after = now["commands"]["audit after"]["printed"]
    assert (after["attempts"], after["steps"], after["lost"], after["duplicated"]) == (2, 8, 0, 0)


def test_reports_and_pictures_are_drawn(now: dict[str, Any], then: dict[str, Any]) -> None:
    _all_as_before(["report", "report of a fold", "reconstruct"], now, then)
    out = now["folder"] / "out"
    assert b"<html" in (out / "report.html").read_bytes()
    assert b"<html" in (out / "fold.html").read_bytes()
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("run", RESUMED)
def test_a_resumed_run_uses_the_same_samples_and_computes_the_same_losses(
    run: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    command = RESUMED[run]
    if command:
        _all_as_before([command], now, then)
    resumed, as_before = now["runs"][run], then["runs"][run]
    assert resumed["samples"] == as_before["samples"]
    assert resumed["checkpoints"] == as_before["checkpoints"]
    assert differences(resumed["metrics"], as_before["metrics"]) == []


def test_expected_values_are_of_a_resumed_run(then: dict[str, Any], old_files: Path) -> None:
    """Without steps after the old checkpoint, the comparison above would prove nothing."""
    steps = [row["step"] for row in then["runs"]["pretrain"]["metrics"]]
    assert steps == list(range(1, 9))
    lines = (old_files / "runs/pretrain/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5
    attempts = {row[0] for row in then["runs"]["pretrain"]["samples"]}
    assert attempts == {"attempt-0001", "attempt-0002"}


def test_a_fine_tuning_is_summarized_and_evaluated_again(
    now: dict[str, Any], then: dict[str, Any]
) -> None:
    _all_as_before(["evaluate", "evaluate fold", "finetune", "finetune stopped"], now, then)
    assert now["commands"]["evaluate"]["printed"]["is_complete"]


def test_an_export_is_what_a_fine_tuning_begins_from(
    now: dict[str, Any], then: dict[str, Any]
) -> None:
    _all_as_before(["finetune from export"], now, then)
    metrics = now["runs"]["from-export/fold-1"]["metrics"]
    assert differences(metrics, then["runs"]["from-export/fold-1"]["metrics"]) == []
