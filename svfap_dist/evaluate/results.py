"""From what the network said of each test sample to the result of a data set.

In: the predictions of each fold. Out: a table to read and JSON to keep: the measures per fold, over
the predictions of all folds pooled, their mean and deviation over folds, and what was published.
The pooled figure is the one that is compared: the total UAR of https://github.com/sunlicai/SVFAP
for DFEW, 63.89, is not the mean of the five folds given there, 63.83.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from svfap_dist.config import TaskConfig
from svfap_dist.errors import ConfigError
from svfap_dist.evaluate import confusion
from svfap_dist.evaluate.metrics import SCORE_FUNCTIONS, ScoreFunction
from svfap_dist.evaluate.predictions import Predictions


@dataclasses.dataclass(frozen=True)
class Score:
    """Measures of some samples, by name: in per cent where papers print them so.

    values: a regression's are means over its dimensions; parts: those of each dimension.
    """

    num_samples: int
    values: dict[str, float]
    parts: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Results:
    """The result of a task; `confusion` (counts, pooled) is None for regressions."""

    task: TaskConfig
    folds: dict[int, Score]
    pooled: Score
    confusion: np.ndarray | None

    @property
    def is_complete(self) -> bool:
        """Whether all folds of the protocol are in it."""
        return len(self.folds) == max(self.task.folds, 1)

    def mean(self, metric: str) -> float:
        """Mean of a measure over the folds."""
        return statistics.fmean(score.values[metric] for score in self.folds.values())

    def deviation(self, metric: str) -> float:
        """Sample standard deviation of a measure over the folds; NaN for fewer than two."""
        values = [score.values[metric] for score in self.folds.values()]
        if len(values) < 2 or any(map(math.isnan, values)):
            return math.nan
        return statistics.stdev(values)

    def published(self, metric: str) -> float | None:
        """The published figure, if the recipe has one."""
        return dict(zip(self.task.metrics, self.task.published, strict=False)).get(metric)

    def line(self) -> str:
        """The pooled measures in a line, e.g. "UAR 41.23 %, WAR 52.10 %"."""
        return ", ".join(
            f"{score.title} {_shown(name, value)}{' %' if score.in_percent else ''}"
            for name, value in self.pooled.values.items()
            for score in [SCORE_FUNCTIONS[name]]
        )

    def lines(self) -> list[str]:
        """A table for people."""
        task, metrics = self.task, self.task.metrics
        rows = [["", "samples", *(_title(SCORE_FUNCTIONS[name]) for name in metrics)]]
        if task.folds:
            rows += [_row(f"fold {fold}", score, metrics) for fold, score in self.folds.items()]
        rows.append(_row("pooled" if task.folds else "test", self.pooled, metrics))
        for part in task.names if self.pooled.parts else ():
            shown = (_shown(name, self.pooled.parts[name][part]) for name in metrics)
            rows.append([f"  {part}", "", *shown])
        if len(self.folds) > 1:
            rows.append(["mean over folds", "", *(_shown(m, self.mean(m)) for m in metrics)])
            rows.append(["deviation (n - 1)", "", *(_shown(m, self.deviation(m)) for m in metrics)])
        if task.published:
            rows += self._beside_published()
        lines = [f"{task.set}, {task.label}: {_protocol(task)}", *_aligned(rows)]
        if task.published and task.published_source:
            lines.append(f"Published: {task.published_source}")
        if not self.is_complete:
            there = f"{len(self.folds)} of {task.folds} folds"
            lines.append(f"Only {there}: not to be compared with figures over all of them.")
        return lines

    def to_json(self) -> str:
        """The same, and more, for programs; what is undefined is null."""
        task = self.task
        content: dict[str, Any] = {
            "set": task.set,
            "label": task.label,
            "kind": task.kind,
            "names": list(task.names),
            "folds": task.folds,
            "is_complete": self.is_complete,
            "num_samples": self.pooled.num_samples,
            "metrics": {name: self._of_metric(name) for name in task.metrics},
            "per_fold": {str(fold): dataclasses.asdict(s) for fold, s in self.folds.items()},
            "published_source": task.published_source,
        }
        if self.confusion is not None:
            recalls = 100 * confusion.recalls(self.confusion)
            content["recall"] = dict(zip(task.names, recalls.tolist(), strict=True))
            content["confusion"] = self.confusion.tolist()
        return json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n"

    def picture(self) -> bytes:
        """The confusion matrix of a classification as a PNG.

        Raises: ConfigError for a regression, which has none.
        """
        if self.confusion is None:
            raise ConfigError(
                "No confusion matrix",
                where=f"set {self.task.set}",
                found="a regression",
                do="ask for it after a classification",
            )
        return confusion.draw(self.confusion, self.task.names, f"{self.task.set}: {self.line()}")

    def _of_metric(self, name: str) -> dict[str, Any]:
        pooled, published = self.pooled.values[name], self.published(name)
        return {
            "unit": "%" if SCORE_FUNCTIONS[name].in_percent else "",
            "pooled": pooled,
            "mean": self.mean(name),
            "deviation": self.deviation(name),
            "published": published,
            "difference": None if published is None else pooled - published,
            "parts": self.pooled.parts.get(name, {}),
        }

    def _beside_published(self) -> list[list[str]]:
        metrics, figures = self.task.metrics, [self.published(m) for m in self.task.metrics]
        pairs = list(zip(metrics, figures, strict=True))
        beside = ["" if f is None else _shown(m, f) for m, f in pairs]
        apart = [
            "" if f is None else _shown(m, self.pooled.values[m] - f, sign="+") for m, f in pairs
        ]
        return [["published", "", *beside], ["difference", "", *apart]]


def summarize(task: TaskConfig, folds: Mapping[int, Predictions]) -> Results:
    """The result of a task from the predictions of its folds; {0: ...} for a fixed split.

    Raises: ConfigError or CheckpointError if folds or predictions are not those of the task.
    """
    _check(task, folds)
    ordered = dict(sorted(folds.items()))
    pooled = Predictions.joined(list(ordered.values()))
    return Results(
        task,
        {fold: _score(task, predictions) for fold, predictions in ordered.items()},
        _score(task, pooled),
        confusion.count(pooled.labels, pooled.predicted(), len(task.names))
        if task.kind == "classification"
        else None,
    )


def _score(task: TaskConfig, predictions: Predictions) -> Score:
    values: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {}
    for name in task.metrics:
        metric = SCORE_FUNCTIONS[name]
        scale = 100.0 if metric.in_percent else 1.0
        if task.kind == "classification":
            values[name] = scale * metric.compute(predictions.labels, predictions.predicted())
            continue
        columns = zip(predictions.labels.T, predictions.scores.T, strict=True)
        each = [scale * metric.compute(true, said) for true, said in columns]
        parts[name] = dict(zip(task.names, each, strict=True))
        values[name] = statistics.fmean(each)
    return Score(len(predictions.keys), values, parts)


def _check(task: TaskConfig, folds: Mapping[int, Predictions]) -> None:
    possible = set(range(1, task.folds + 1)) if task.folds else {0}
    if not folds or not set(folds) <= possible:
        raise ConfigError(
            "Results cannot be summarized",
            where=f"set {task.set}",
            found=f"folds {sorted(folds)} where the task has {sorted(possible)}",
            do="give the predictions of the task's own folds",
        )
    for fold, predictions in folds.items():
        predictions.check_fits(task, f"fold {fold}" if task.folds else "test")


def _protocol(task: TaskConfig) -> str:
    if task.folds:
        return f"{task.folds} folds"
    return f"trained on {', '.join(task.train_splits)}, tested on {', '.join(task.test_splits)}"


def _title(metric: ScoreFunction) -> str:
    return f"{metric.title} %" if metric.in_percent else metric.title


def _row(name: str, score: Score, metrics: tuple[str, ...]) -> list[str]:
    return [name, str(score.num_samples), *(_shown(m, score.values[m]) for m in metrics)]


def _shown(metric: str, value: float, sign: str = "") -> str:
    return f"{value:{sign}.2f}" if SCORE_FUNCTIONS[metric].in_percent else f"{value:{sign}.4f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]).rstrip())
    return lines


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
