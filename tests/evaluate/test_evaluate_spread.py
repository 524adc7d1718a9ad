"""Intervals and seeds: what the bootstrap draws, and how runs are summed up."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from svfap_dist.config import TaskConfig
from svfap_dist.evaluate.results import Predictions, summarize
from svfap_dist.evaluate.spread import SeededResults, bootstrap, bootstrap_difference

TASK = TaskConfig(
    kind="classification", set="toy", label="class", names=("a", "b"), metrics=("war", "uar")
)
VALUES = TaskConfig(
    kind="regression", set="toy", label="values", names=("x",), metrics=("acc", "ccc")
)


def predictions(right: float, count: int = 200, first: int = 0) -> Predictions:
    """Samples in two classes, of which this share is classified correctly."""
    labels = np.arange(count) % 2
    wrong = np.random.default_rng(1).random(count) >= right
    keys = tuple(f"sample {first + n}" for n in range(count))
    return Predictions(keys, labels, np.eye(2, dtype=np.float32)[labels ^ wrong])


def test_the_interval_is_that_of_a_binomial_share() -> None:
    run = predictions(0.7)
    share = float(np.mean(run.predicted() == run.labels))
    low, high = bootstrap(TASK, [run])["war"]
    half = 1.96 * 100 * math.sqrt(share * (1 - share) / 200)
    assert low == pytest.approx(100 * share - half, abs=1.0)
    assert high == pytest.approx(100 * share + half, abs=1.0)
    assert bootstrap(TASK, [run]) == bootstrap(TASK, [run])


def test_runs_are_drawn_together_by_key() -> None:
    """Two runs that are wrong about different samples vary less than each does."""
    one = predictions(0.5)
    labels, keys = one.labels, one.keys
    other = Predictions(
        keys[::-1], labels[::-1], (1 - one.scores)[::-1]
    )  # right where one is wrong
    assert bootstrap(TASK, [one, other])["war"] == (50.0, 50.0)
    fewer = Predictions(keys[:100], labels[:100], one.scores[:100])
    assert bootstrap(TASK, [one, fewer]) == bootstrap(TASK, [fewer, fewer])


def test_a_difference_is_drawn_by_whole_groups() -> None:
    """Clips of one person are alike, so ten persons with twenty clips each say less than 200."""
    person = np.arange(200) // 20
    labels, keys = np.arange(200) % 2, tuple(map(str, range(200)))
    runs = [
        Predictions(keys, labels, np.eye(2, dtype=np.float32)[labels ^ (person < wrong)])
        for wrong in (4, 6)
    ]
    alone = bootstrap_difference(TASK, runs[:1], runs[1:], dict(zip(keys, keys, strict=True)))
    persons = dict(zip(keys, map(str, person.tolist()), strict=True))
    together = bootstrap_difference(TASK, runs[:1], runs[1:], persons)
    # Right for two persons more: each is drawn as often as a binomial of 10 with 0.2 says.
    assert together == pytest.approx((0.0, 50.0), abs=10.0)
    assert 10.0 < alone[0] < 20.0 < alone[1] < 30.0
    assert bootstrap_difference(TASK, runs[:1], runs[:1], persons) == (0.0, 0.0)
    assert bootstrap_difference(TASK, runs, runs[::-1], persons) == pytest.approx((0.0, 0.0))


def test_values_of_a_regression_have_intervals_and_undefined_ones_none() -> None:
    labels = np.linspace(0, 1, 50, dtype=np.float32)[:, None]
    keys = tuple(map(str, range(50)))
    found = bootstrap(VALUES, [Predictions(keys, labels, labels + np.float32(0.1))])
    assert found["acc"] == pytest.approx((0.9, 0.9), abs=1e-5)
    assert found["ccc"][0] < found["ccc"][1] < 1
    pcc = VALUES.model_copy(update={"metrics": ("pcc",)})
    constant = Predictions(keys, labels, np.zeros_like(labels))
    assert all(map(math.isnan, bootstrap(pcc, [constant])["pcc"]))


def test_seeds_are_summed_up_beside_the_published_figure() -> None:
    task = TASK.model_copy(update={"published": (80.0, 81.0), "published_source": "a paper"})
    found = SeededResults([summarize(task, {0: predictions(right)}) for right in (0.6, 0.8)])
    content = json.loads(found.to_json())
    war = content["metrics"]["war"]
    assert war["mean"] == pytest.approx(np.mean(war["per_seed"]))
    assert war["deviation"] == pytest.approx(np.std(war["per_seed"], ddof=1))
    assert war["interval"][0] < war["mean"] < war["interval"][1]
    assert war["published"] == 80.0
    assert len(content["per_seed"]) == 2
    lines = found.lines()
    assert lines[0] == "toy, class: 2 seeds, 200 test samples"
    assert [line.split("  ")[0].strip() for line in lines[2:]] == [
        *("seed 1", "seed 2", "mean over seeds", "deviation (n - 1)", "95 % interval", "published"),
    ]
