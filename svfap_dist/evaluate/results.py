"""Predictions of test samples, and the result of a task computed from them.

In: the scores of each test sample, by fold; `predictions.jsonl` keeps them, a row per sample with
its key, its label and its scores averaged over views, so that every figure can be computed again.
Out: a table to read, JSON to keep, and the confusion matrix: the scores per fold and over the
predictions of all folds pooled, their mean and deviation over folds, and the published figures.
The pooled figure is the one to compare: the total UAR of https://github.com/sunlicai/SVFAP for
DFEW, 63.89, is not the mean of the five folds given there, 63.83.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from svfap_dist import json_text, storage
from svfap_dist.config import TaskConfig
from svfap_dist.errors import CheckpointError, ConfigError, HealthError
from svfap_dist.evaluate.metrics import SCORE_FUNCTIONS
from svfap_dist.text_table import format_table

_EXAMPLES = 3
_INCHES_PER_CLASS = 0.75
_MARGIN_INCHES = 2.2  # names and titles
_DARK = 60.0  # percent above which a cell's text is white


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Labels and scores of the tested samples of one or more folds.

    Attributes:
        keys: of the samples.
        labels: class indices [N], or values [N, K].
        scores: of the classes [N, C], of which the highest is predicted, or values [N, K].

    Raises:
        CheckpointError: The lengths differ, or a sample occurs twice.
        HealthError: A score is not finite.
    """

    keys: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        if not self.keys or not len(self.keys) == len(self.labels) == len(self.scores):
            lengths = f"{len(self.keys)} keys, {len(self.labels)} labels, {len(self.scores)} scores"
            raise _unusable(lengths)
        twice = [key for key, times in collections.Counter(self.keys).items() if times > 1]
        if twice:
            raise _unusable(f"{len(twice)} samples twice, such as {', '.join(twice[:_EXAMPLES])}")
        infinite = ~np.isfinite(self.scores.reshape(len(self.keys), -1)).all(axis=1)
        if infinite.any():
            raise HealthError(
                "Scores are not finite",
                where=f"sample {self.keys[int(np.argmax(infinite))]}",
                found=f"{infinite.sum()} of {len(self.keys)} samples",
                do="train again with a lower optim.lr, or with train.dtype = float32",
            )

    @classmethod
    def concatenate(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the samples of all parts.

        Args:
            parts: without a sample in common.

        Raises:
            CheckpointError: Two parts have a sample in common.
        """
        keys = tuple(key for part in parts for key in part.keys)
        labels, scores = ([getattr(part, name) for part in parts] for name in ("labels", "scores"))
        return cls(keys, np.concatenate(labels), np.concatenate(scores))

    def predicted(self) -> np.ndarray:
        """Return the predicted class of each sample, [N]."""
        return self.scores.argmax(axis=1)

    def check_fits(self, task: TaskConfig, where: str) -> None:
        """Check shapes and classes against the task.

        Args:
            task: the recipe's [task].
            where: the fold, for messages.

        Raises:
            CheckpointError: They belong to another task.
        """
        shape, width = self.labels.shape, len(task.names)
        if self.scores.shape != (len(self.keys), width):
            raise _unusable(f"scores {list(self.scores.shape)} for {width} of task.names", where)
        if task.kind == "regression" and shape != self.scores.shape:
            raise _unusable(f"labels {list(shape)} for {width} of task.names", where)
        if task.kind == "classification":
            whole = len(shape) == 1 and np.issubdtype(self.labels.dtype, np.integer)
            if not whole or self.labels.min() < 0 or self.labels.max() >= width:
                raise _unusable(f"labels that are not classes 0 to {width - 1}", where)

    def write(self, url: str) -> None:
        """Write the rows as JSON lines.

        Args:
            url: of the file.
        """
        rows = zip(self.keys, self.labels.tolist(), self.scores, strict=True)
        lines = (
            # float32's shortest digits, which read back as the same number
            json.dumps({"key": key, "label": label, "scores": [float(str(s)) for s in scores]})
            for key, label, scores in rows
        )
        storage.write_bytes(url, "".join(f"{line}\n" for line in lines).encode())

    @classmethod
    def read(cls, url: str) -> Predictions:
        """Return what `write` wrote.

        Args:
            url: of the file.

        Raises:
            CheckpointError: It is missing or damaged.
            StorageError: The store fails.
        """
        try:
            rows = [json.loads(line) for line in storage.read_bytes(url).splitlines()]
            labels = np.array([row["label"] for row in rows])
            scores = np.array([row["scores"] for row in rows], np.float32)
            keys = tuple(row["key"] for row in rows)
        except storage.StorageMissingError as error:
            raise _unusable("no such file", url) from error
        except (ValueError, KeyError, TypeError) as error:
            raise _unusable(repr(error), url) from error
        if np.issubdtype(labels.dtype, np.floating):
            labels = labels.astype(np.float32)
        return cls(keys, labels, scores)


def _unusable(found: str, where: str = "") -> CheckpointError:
    do = "test this fold again with `svfap evaluate`"
    return CheckpointError("Invalid predictions", where or "predictions", found, do)


@dataclasses.dataclass(frozen=True)
class Score:
    """Scores of some samples, by name: in percent where papers print them so.

    Attributes:
        num_samples: how many there are.
        values: by score; for a regression, means over its dimensions.
        parts: by score and dimension of a regression.
    """

    num_samples: int
    values: dict[str, float]
    parts: dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Results:
    """The result of a task.

    Attributes:
        task: the recipe's [task].
        folds: scores by fold.
        pooled: scores over all folds together.
        confusion: pooled counts [C, C], rows true and columns predicted; None for a regression.
        predictions: of all folds together.
    """

    task: TaskConfig
    folds: dict[int, Score]
    pooled: Score
    confusion: np.ndarray | None
    predictions: Predictions

    @property
    def is_complete(self) -> bool:
        """Whether it covers all folds of the protocol."""
        return len(self.folds) == max(self.task.folds, 1)

    def mean(self, metric: str) -> float:
        """Return the mean of a score over the folds.

        Args:
            metric: name of the score.
        """
        return statistics.fmean(score.values[metric] for score in self.folds.values())

    def deviation(self, metric: str) -> float:
        """Return the sample standard deviation over the folds; NaN for fewer than two.

        Args:
            metric: name of the score.
        """
        values = [score.values[metric] for score in self.folds.values()]
        if len(values) < 2 or any(map(math.isnan, values)):
            return math.nan
        return statistics.stdev(values)

    def published(self, metric: str) -> float | None:
        """Return the published figure, if the recipe has one.

        Args:
            metric: name of the score.
        """
        return dict(zip(self.task.metrics, self.task.published, strict=False)).get(metric)

    def reproduced(self, metric: str) -> float | None:
        """Return what the authors published later for their released code, if the recipe has it.

        Args:
            metric: name of the score.
        """
        figures = self.task.reproduced if self.task.published else ()
        return dict(zip(self.task.metrics, figures, strict=False)).get(metric)

    def line(self) -> str:
        """Return the pooled scores in a line, e.g. "UAR 41.23 %, WAR 52.10 %"."""
        return ", ".join(
            f"{score.title} {shown(name, value)}{' %' if score.in_percent else ''}"
            for name, value in self.pooled.values.items()
            for score in [SCORE_FUNCTIONS[name]]
        )

    def lines(self) -> list[str]:
        """Return a table to print."""
        task, metrics = self.task, self.task.metrics
        rows = [["", "samples", *map(title_of, metrics)]]
        if task.folds:
            rows += [_row(f"fold {fold}", score, metrics) for fold, score in self.folds.items()]
        rows.append(_row("pooled" if task.folds else "test", self.pooled, metrics))
        for part in task.names if self.pooled.parts else ():
            cells = (shown(name, self.pooled.parts[name][part]) for name in metrics)
            rows.append([f"  {part}", "", *cells])
        if len(self.folds) > 1:
            rows.append(["mean over folds", "", *(shown(m, self.mean(m)) for m in metrics)])
            rows.append(["deviation (n - 1)", "", *(shown(m, self.deviation(m)) for m in metrics)])
        for name, figures in (("published", self.published), ("reproduced", self.reproduced)):
            if task.published and getattr(task, name):
                rows += self._beside(name, figures)
        lines = [
            f"{task.set}, {task.label}: {_protocol(task)}",
            *format_table(rows[1:], rows[0], range(1, len(rows[0]))),
        ]
        if task.published and task.published_source:
            lines.append(f"Published: {task.published_source}")
        if task.published and task.reproduced and task.reproduced_source:
            lines.append(f"Reproduced: {task.reproduced_source}")
        if not self.is_complete:
            there = f"{len(self.folds)} of {task.folds} folds"
            lines.append(f"Only {there}: not to be compared with figures over all of them.")
        return lines

    def to_json(self) -> str:
        """Return the content of results.json; undefined numbers are null."""
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
            "reproduced_source": task.reproduced_source,
        }
        if self.confusion is not None:
            recall = 100 * recalls(self.confusion)
            content["recall"] = dict(zip(task.names, recall.tolist(), strict=True))
            content["confusion"] = self.confusion.tolist()
        return json_text.dumps(content, indent=1) + "\n"

    def picture(self) -> bytes:
        """Return the confusion matrix of a classification as a PNG.

        Raises:
            ConfigError: The task is a regression.
        """
        if self.confusion is None:
            raise ConfigError(
                "No confusion matrix",
                where=f"set {self.task.set}",
                found="a regression",
                do="use it for a classification",
            )
        return draw_confusion(self.confusion, self.task.names, f"{self.task.set}: {self.line()}")

    def _of_metric(self, name: str) -> dict[str, Any]:
        pooled, published = self.pooled.values[name], self.published(name)
        return {
            "unit": "%" if SCORE_FUNCTIONS[name].in_percent else "",
            "pooled": pooled,
            "mean": self.mean(name),
            "deviation": self.deviation(name),
            "published": published,
            "difference": None if published is None else pooled - published,
            "reproduced": self.reproduced(name),
            "parts": self.pooled.parts.get(name, {}),
        }

    def _beside(self, name: str, figure: Callable[[str], float | None]) -> list[list[str]]:
        """Return rows with figures of others, and how far the pooled scores are from them."""
        pairs = [(metric, figure(metric)) for metric in self.task.metrics]
        beside = ["" if f is None else shown(m, f) for m, f in pairs]
        apart = [
            "" if f is None else shown(m, self.pooled.values[m] - f, sign="+") for m, f in pairs
        ]
        return [[name, "", *beside], ["difference", "", *apart]]


def summarize(task: TaskConfig, folds: Mapping[int, Predictions]) -> Results:
    """Return the result of a task.

    Args:
        task: the recipe's [task].
        folds: predictions by fold; {0: ...} for a fixed split.

    Raises:
        ConfigError: The task does not have these folds.
        CheckpointError: The predictions belong to another task.
    """
    _check(task, folds)
    ordered = dict(sorted(folds.items()))
    pooled = Predictions.concatenate(list(ordered.values()))
    return Results(
        task,
        {fold: _score(task, predictions) for fold, predictions in ordered.items()},
        _score(task, pooled),
        count_confusion(pooled.labels, pooled.predicted(), len(task.names))
        if task.kind == "classification"
        else None,
        pooled,
    )


def _score(task: TaskConfig, predictions: Predictions) -> Score:
    return Score(len(predictions.keys), *score_values(task, predictions.labels, predictions.scores))


def score_values(
    task: TaskConfig, labels: np.ndarray, scores: np.ndarray
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the task's scores of some samples, and of a regression also by dimension.

    Args:
        task: the recipe's [task].
        labels: as of `Predictions`.
        scores: as of `Predictions`.
    """
    values: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {}
    for name in task.metrics:
        metric = SCORE_FUNCTIONS[name]
        scale = 100.0 if metric.in_percent else 1.0
        if task.kind == "classification":
            values[name] = scale * metric.compute(labels, scores.argmax(axis=1))
            continue
        columns = zip(labels.T, scores.T, strict=True)
        each = [scale * metric.compute(true, said) for true, said in columns]
        parts[name] = dict(zip(task.names, each, strict=True))
        values[name] = statistics.fmean(each)
    return values, parts


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
        made = "" if task.folds_by == "labels" else f", made by {task.folds_by}"
        return f"{task.folds} folds{made}"
    return f"trained on {', '.join(task.train_splits)}, tested on {', '.join(task.test_splits)}"


def title_of(name: str) -> str:
    """Return a score's title in tables.

    Args:
        name: of the score.
    """
    metric = SCORE_FUNCTIONS[name]
    return f"{metric.title} %" if metric.in_percent else metric.title


def _row(name: str, score: Score, metrics: tuple[str, ...]) -> list[str]:
    return [name, str(score.num_samples), *(shown(m, score.values[m]) for m in metrics)]


def shown(metric: str, value: float, sign: str = "") -> str:
    """Return a value of a score as tables show it.

    Args:
        metric: name of the score.
        value: in percent where papers print it so.
        sign: "+": with its sign.
    """
    return f"{value:{sign}.2f}" if SCORE_FUNCTIONS[metric].in_percent else f"{value:{sign}.4f}"


def count_confusion(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the confusion matrix, int64 [C, C]: rows are true, columns predicted classes.

    Args:
        labels: true classes [N].
        predicted: classes [N].
        num_classes: C.
    """
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def recalls(matrix: np.ndarray) -> np.ndarray:
    """Return the recall of each class, [C]; NaN for a class without samples.

    Args:
        matrix: counts [C, C].
    """
    return np.diagonal(_row_shares(matrix))


def draw_confusion(matrix: np.ndarray, names: Sequence[str], title: str) -> bytes:
    """Return a picture of a confusion matrix, as the bytes of a PNG.

    Colors and large numbers are percent of a row, so that a rare class is as visible as a frequent
    one; small numbers are samples.

    Args:
        matrix: counts [C, C].
        names: of the classes.
        title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = _INCHES_PER_CLASS * len(names) + _MARGIN_INCHES
    figure = Figure(figsize=(side, side), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    percent = 100 * np.nan_to_num(_row_shares(matrix))
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(*matrix.shape):
        color = "white" if percent[row, column] > _DARK else "black"
        texts = (
            ("bottom", 11, f"{percent[row, column]:.1f}"),
            ("top", 8, f"{matrix[row, column]}"),
        )
        for side, size, text in texts:
            axes.text(column, row, text, ha="center", va=side, fontsize=size, color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    totals = matrix.sum(axis=1)
    axes.set_yticks(range(len(names)), [f"{n} ({k})" for n, k in zip(names, totals, strict=True)])
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True (samples)")
    axes.set_title(f"{title}\npercent of the row, and samples", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _row_shares(matrix: np.ndarray) -> np.ndarray:
    totals = matrix.sum(axis=1, keepdims=True)
    return np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)
