"""How far a result can be trusted: bootstrap intervals, and runs repeated with other seeds.

In: predictions of the same test samples by one run or several. Out: for each score an interval that
holds 95 % of its values when the test samples are drawn again with replacement, the mean over runs
in each draw; and the mean and deviation of the runs' own scores. The draws come from a fixed seed,
so the same predictions give the same interval.

The interval is about the choice of test samples, the deviation about the seeds of training. Clips
of one person resemble each other: where a person has many of them, the interval is too narrow.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from svfap_dist import json_text
from svfap_dist.config import TaskConfig
from svfap_dist.evaluate.results import Predictions, Results, score_values, shown, title_of
from svfap_dist.text_table import format_table

DRAWS = 1000
_TAIL = 2.5  # percent left out on each side
Interval = tuple[float, float]


def bootstrap(
    task: TaskConfig, runs: Sequence[Predictions], draws: int = DRAWS
) -> dict[str, Interval]:
    """Return the 95 % interval of each score; NaN where a draw leaves a score undefined.

    Args:
        task: the recipe's [task].
        runs: predictions of each run; samples that one of them lacks do not count.
        draws: how often the test samples are drawn.
    """
    common, rows = _common(runs)
    random, values = np.random.default_rng(0), {name: [] for name in task.metrics}
    for _ in range(draws if common else 0):
        drawn = random.integers(len(common), size=len(common))
        of_runs = [
            score_values(task, run.labels[places[drawn]], run.scores[places[drawn]])[0]
            for run, places in zip(runs, rows, strict=True)
        ]
        for name, found in values.items():
            found.append(statistics.fmean(of_run[name] for of_run in of_runs))
    return {name: _interval(found) for name, found in values.items()}


def bootstrap_difference(
    task: TaskConfig,
    better: Sequence[Predictions],
    worse: Sequence[Predictions],
    groups: Mapping[str, str],
    draws: int = DRAWS,
) -> Interval:
    """Return the 95 % interval of the difference between the scores of two ways of training.

    Args:
        task: the recipe's [task]; its first metric counts.
        better: predictions of each run of one way.
        worse: those of the other way; samples that a run lacks do not count.
        groups: of each sample, by key: whole groups are drawn, such as those of one subject.
        draws: how often.
    """
    metric, random, runs = task.metrics[0], np.random.default_rng(0), [*better, *worse]
    common, rows = _common(runs)
    numbers = np.unique([groups[key] for key in common], return_inverse=True)[1]
    members = [np.flatnonzero(numbers == number) for number in range(numbers.max(initial=-1) + 1)]
    only = task.model_copy(update={"metrics": (metric,)})
    found = []
    for _ in range(draws if members else 0):
        drawn = random.integers(len(members), size=len(members))
        places = np.concatenate([members[number] for number in drawn])
        values = [
            score_values(only, run.labels[own[places]], run.scores[own[places]])[0][metric]
            for run, own in zip(runs, rows, strict=True)
        ]
        means = statistics.fmean(values[: len(better)]), statistics.fmean(values[len(better) :])
        found.append(means[0] - means[1])
    return _interval(found)


def _common(runs: Sequence[Predictions]) -> tuple[list[str], list[np.ndarray]]:
    """Return the samples that all runs have, and where each run has them."""
    common = sorted(set.intersection(*(set(run.keys) for run in runs)))
    rows = []
    for run in runs:
        row_of = {key: row for row, key in enumerate(run.keys)}
        rows.append(np.array([row_of[key] for key in common], np.int64))
    return common, rows


def _interval(values: Sequence[float]) -> Interval:
    if not values or any(map(math.isnan, values)):
        return math.nan, math.nan
    low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class SeededResults:
    """Results of the same task with other seeds.

    Attributes:
        runs: the result of each seed, in order.
    """

    runs: Sequence[Results]

    @property
    def task(self) -> TaskConfig:
        """The recipe's [task]."""
        return self.runs[0].task

    def values(self, metric: str) -> list[float]:
        """Return the pooled score of each run.

        Args:
            metric: name of the score.
        """
        return [run.pooled.values[metric] for run in self.runs]

    def mean(self, metric: str) -> float:
        """Return the mean over runs.

        Args:
            metric: name of the score.
        """
        return statistics.fmean(self.values(metric))

    def deviation(self, metric: str) -> float:
        """Return the sample standard deviation over runs; NaN if one is undefined.

        Args:
            metric: name of the score.
        """
        values = self.values(metric)
        return math.nan if any(map(math.isnan, values)) else statistics.stdev(values)

    def intervals(self) -> dict[str, Interval]:
        """Return the bootstrap interval of the mean over runs, by score."""
        return bootstrap(self.task, [run.predictions for run in self.runs])

    def lines(self) -> list[str]:
        """Return a table to print."""
        metrics, intervals = self.task.metrics, self.intervals()
        rows = [
            [f"seed {number}", *(shown(m, run.pooled.values[m]) for m in metrics)]
            for number, run in enumerate(self.runs, start=1)
        ]
        rows.append(["mean over seeds", *(shown(m, self.mean(m)) for m in metrics)])
        rows.append(["deviation (n - 1)", *(shown(m, self.deviation(m)) for m in metrics)])
        rows.append(["95 % interval", *(interval_text(m, intervals[m]) for m in metrics)])
        if self.task.published:
            published = (self.runs[0].published(m) for m in metrics)
            pairs = zip(metrics, published, strict=True)
            rows.append(["published", *("" if f is None else shown(m, f) for m, f in pairs)])
        head = ["", *map(title_of, metrics)]
        title = f"{self.task.set}, {self.task.label}: {len(self.runs)} seeds, "
        title += f"{self.runs[0].pooled.num_samples} test samples"
        return [title, *format_table(rows, head, range(1, len(head)))]

    def to_json(self) -> str:
        """Return the content of results.json; undefined numbers are null."""
        intervals = self.intervals()
        content = {
            "set": self.task.set,
            "label": self.task.label,
            "seeds": len(self.runs),
            "metrics": {
                name: {
                    "mean": self.mean(name),
                    "deviation": self.deviation(name),
                    "interval": list(intervals[name]),
                    "per_seed": self.values(name),
                    "published": self.runs[0].published(name),
                }
                for name in self.task.metrics
            },
            "per_seed": [json.loads(run.to_json()) for run in self.runs],
        }
        return json_text.dumps(content, indent=1) + "\n"


def interval_text(metric: str, interval: Interval) -> str:
    """Return an interval as tables show it.

    Args:
        metric: name of the score.
        interval: its ends.
    """
    return " to ".join(shown(metric, end) for end in interval)
