"""Losses that are not finite, spikes and errors planted in whole runs on two ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from numbered_shards import video_of, write_data_set
from train_ranks import recipe_tables, start

from svfap_dist.checkpoint import store
from svfap_dist.telemetry.goodput import Goodput
from svfap_dist.train.audit import audit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rollback")


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    url = str(folder / "shards")
    write_data_set(url, [14], [video_of(number) for number in range(14)], {})
    return url


@pytest.fixture(scope="module")
def planted(data: str, folder: Path) -> dict[str, list[Any]]:
    """Results of both ranks, by the name of the run."""

    def task(
        run: str, bad_steps: list[int], fault: str = "loss", stop_after: int = 0, **changes: Any
    ) -> tuple[str, dict[str, Any]]:
        health = {"health": changes.pop("health", {})}
        tables = recipe_tables(data, str(folder / run), optim={"lr": 0.01}, **changes)
        tables |= health
        options = {"bad_steps": bad_steps, "fault": fault, "stop_after": stop_after}
        return "train_planted", {"tables": tables, **options}

    stage_3: dict[str, Any] = {"train": {"zero_stage": 3, "micro_batch_size": 2}}
    spikes: dict[str, Any] = {"health": {"spike_zscore": 50.0, "spike_window": 8}}
    tasks = {
        "straight": task("straight", []),
        "once": task("once", [6]),
        "twice": task("twice", [8], fault="gradient"),
        "thrice": task("thrice", [6, 7, 8]),
        "always": task("always", list(range(6, 99)), train={"max_steps": 20}),
        "stopped": task("stopped", [6, 7, 8], stop_after=11),
        "resumed": task("stopped", []),
        "at the end": task("end", [10, 11, 12]),
        "warned": task("warned", [9], fault="spike", **spikes),
        "spiked": task(
            "spiked",
            [9],
            fault="spike",
            health={**spikes["health"], "spike_action": "roll back"},
        ),
        "stage 3": task("stage-3", [6, 7, 8], **stage_3),
    }
    results = start(2, list(tasks.values()), folder / "ranks", seconds=900)
    return dict(zip(tasks, results, strict=True))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["event"] == kind]


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in lines(run / "metrics.jsonl")}


def test_one_bad_loss_costs_one_update(planted: dict[str, list[Any]], folder: Path) -> None:
    run = folder / "once"
    assert {result["stop_reason"] for result in planted["once"]} == {"finished"}
    (skip,) = events(run, "skip")
    assert (skip["step"], skip["part"], skip["num_clips"]) == (6, "loss", 2)
    of_last_rank = [row["key"] for row in lines(run / "ledger/attempt-0001/rank-0001.jsonl")]
    assert set(skip["keys"]) == set(of_last_rank[10:12])  # two clips of a rank in each step
    assert not events(run, "rollback")
    found, straight = losses(run), losses(folder / "straight")
    assert [found[step] for step in range(1, 6)] == [straight[step] for step in range(1, 6)]
    assert sorted(found) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]
    assert all(math.isfinite(loss) for loss in found.values())
    assert found[8] != straight[8]
    audited = audit(str(run))
    assert audited.is_exact
    assert (audited.skipped, audited.passed_over) == (1, 0)


def test_a_checkpoint_waits_for_a_good_step(planted: dict[str, list[Any]], folder: Path) -> None:
    """The weights that it would hold may be what makes the losses bad."""
    (skip,) = events(folder / "twice", "skip")
    assert (skip["step"], skip["part"]) == (8, "gradient")
    assert len(skip["keys"]) == skip["num_clips"] == 4  # any rank's gradient may be to blame
    saved = [event["step"] for event in events(folder / "twice", "checkpoint")]
    assert saved == [4, 9, 12]


@pytest.mark.parametrize("name", ["thrice", "stage 3"])
def test_three_bad_losses_in_a_row_are_passed_over(
    name: str, planted: dict[str, list[Any]], folder: Path
) -> None:
    run = folder / name.replace(" ", "-")
    assert {result["stop_reason"] for result in planted[name]} == {"finished"}
    assert [skip["step"] for skip in events(run, "skip")] == [6, 7, 8]
    (rollback,) = events(run, "rollback")
    assert (rollback["from"], rollback["to"], rollback["passed_over"]) == (8, 4, [6, 7, 8])
    (resume,) = events(run, "resume")
    assert (resume["attempt"], resume["step"]) == (2, 4)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 9, 10, 11, 12]
    audited = audit(str(run))
    assert audited.is_exact
    assert (audited.steps, audited.passed_over, audited.skipped) == (12, 12, 0)
    assert audited.redone == 4
    assert Goodput(lines(run / "events.jsonl")).seconds()["redone"] > 0


def test_passing_over_is_the_same_as_leaving_out(
    planted: dict[str, list[Any]], folder: Path
) -> None:
    """Steps before the bad ones are repeated bit for bit; the weights change in none of the bad."""
    found, straight = losses(folder / "thrice"), losses(folder / "straight")
    assert [found[step] for step in range(1, 6)] == [straight[step] for step in range(1, 6)]


def test_losses_that_stay_bad_end_the_run_with_their_clips(
    planted: dict[str, list[Any]], folder: Path
) -> None:
    run = folder / "always"
    passed = [rollback["passed_over"] for rollback in events(run, "rollback")]
    assert passed == [[6, 7, 8], [9, 10, 11]]
    last = [skip for skip in events(run, "skip") if skip["step"] >= 12]
    assert [skip["step"] for skip in last] == [12, 13, 14]
    for result in planted["always"]:
        assert result["error"] == "NotFiniteError"
        assert "steps 12 to 14" in result["message"]
        assert all(key in result["message"] for skip in last for key in skip["keys"])
    assert store.committed_steps(str(run)) == [4, 8]  # of the second attempt, which passed over it
    (*_, stop) = events(run, "stop")
    assert stop["reason"] == "NotFiniteError"


def test_a_later_attempt_passes_over_the_same_steps(
    planted: dict[str, list[Any]], folder: Path
) -> None:
    run = folder / "stopped"
    assert planted["stopped"][0]["stop_reason"] != "finished"
    assert planted["resumed"][0]["stop_reason"] == "finished"
    assert losses(run) == losses(folder / "thrice")
    assert audit(str(run)).passed_over == 12


def test_the_last_step_may_be_passed_over(planted: dict[str, list[Any]], folder: Path) -> None:
    assert planted["at the end"][0]["step"] == 12
    assert sorted(losses(folder / "end")) == list(range(1, 10))
    assert audit(str(folder / "end")).passed_over == 12


def test_a_spike_is_an_event(planted: dict[str, list[Any]], folder: Path) -> None:
    (spike,) = events(folder / "warned", "spike")
    assert spike["step"] == 9
    assert spike["zscore"] > 50
    assert spike["loss"] > 10 * spike["median"]
    assert not events(folder / "warned", "rollback")
    assert 9 in losses(folder / "warned")


def test_a_spike_can_roll_back(planted: dict[str, list[Any]], folder: Path) -> None:
    assert {result["stop_reason"] for result in planted["spiked"]} == {"finished"}
    (rollback,) = events(folder / "spiked", "rollback")
    assert (rollback["to"], rollback["passed_over"]) == (8, [9])
    assert 9 not in losses(folder / "spiked")


def test_errors_that_no_restart_fixes(data: str, folder: Path) -> None:
    """Out of memory, at once; any error when it comes again at the same step."""

    def task(run: str, fault: str, bad_step: int = 6) -> tuple[str, dict[str, Any]]:
        tables = recipe_tables(data, str(folder / run))
        return "train_planted", {"tables": tables, "fault": fault, "bad_steps": [bad_step]}

    tasks = [
        task("memory", "memory"),
        task("error", "error"),
        task("error", "error", bad_step=7),
        task("error", "error"),
    ]
    memory, first, other, again = (of_ranks[0] for of_ranks in start(1, tasks, folder / "errors"))
    assert memory["error"] == "HealthError"
    assert "lower train.micro_batch_size" in memory["message"]
    assert (first["error"], other["error"]) == ("ValueError", "ValueError")
    assert again["error"] == "HealthError"
    assert "fails again at the same step" in again["message"]
    assert "ValueError: planted" in again["message"]
    assert [e["step"] for e in events(folder / "error", "stop")] == [5, 6, 5]


def test_an_error_of_another_rank_is_recognized_when_it_comes_again(
    data: str, folder: Path
) -> None:
    """Rank 0, which writes the events, knows only that a collective failed."""
    tables = recipe_tables(data, str(folder / "of-rank-1"))
    task = ("train_planted", {"tables": tables, "fault": "error", "bad_steps": [6]})
    # In processes of its own each: the end of one is what the other rank notices at once.
    ((_, first),) = start(2, [task], folder / "of-rank-1-first")
    ((_, again),) = start(2, [task], folder / "of-rank-1-again")
    assert first["error"] == "ValueError"
    assert again["error"] == "HealthError"
    assert "fails again at the same step" in again["message"]
    assert "ValueError: planted" in again["message"]
