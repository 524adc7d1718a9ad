"""The scores of downstream tasks, each a few lines of numpy.

In: labels and predictions of N samples. Out: one number, computed in float64. They equal those of
scikit-learn and scipy, which only the tests need. An undefined score, such as the correlation with
a constant, is NaN, and so is everything computed from it. To add a score, write a function and add
its row to `SCORE_FUNCTIONS`, which lists those that a recipe may name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np


def uar(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the unweighted average recall: the mean recall of the classes that occur.

    Args:
        labels: true class indices [N].
        predicted: class indices [N].
    """
    return float(np.mean([np.mean(predicted[labels == c] == c) for c in np.unique(labels)]))


def war(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the weighted average recall, which is the accuracy.

    Args:
        labels: true class indices [N].
        predicted: class indices [N].
    """
    return float(np.mean(labels == predicted))


def weighted_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean F1 score of the classes, weighted by their numbers of samples.

    Args:
        labels: true class indices [N].
        predicted: class indices [N].
    """
    classes, counts = np.unique(labels, return_counts=True)
    hits = np.array([np.sum((labels == c) & (predicted == c)) for c in classes])
    chosen = np.array([np.sum(predicted == c) for c in classes])
    return float(np.average(2 * hits / (counts + chosen), weights=counts))


def pcc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return Pearson's correlation coefficient; NaN if one side is constant.

    Args:
        labels: true values [N].
        scores: predicted values [N].
    """
    if not (np.ptp(labels) and np.ptp(scores)):
        return float("nan")
    a, b = _centered(labels), _centered(scores)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return float(np.clip(np.dot(a, b), -1.0, 1.0))


def ccc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the concordance correlation coefficient, with variances over N (Lin 1989).

    Args:
        labels: true values [N].
        scores: predicted values [N].

    Returns:
        NaN if both sides are the same constant.
    """
    if not (np.ptp(labels) and np.ptp(scores)):  # exact, where rounded means would hide it
        return float("nan") if np.array_equal(labels, scores) else 0.0
    a, b = _centered(labels), _centered(scores)
    apart = float(np.mean(labels, dtype=np.float64) - np.mean(scores, dtype=np.float64)) ** 2
    return 2 * float(np.mean(a * b)) / (float(np.mean(a * a) + np.mean(b * b)) + apart)


def acc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the accuracy of the First Impressions challenge: 1 - mean absolute error.

    Args:
        labels: true values [N].
        scores: predicted values [N].
    """
    return 1.0 - float(np.mean(np.abs(labels.astype(np.float64) - scores.astype(np.float64))))


def _centered(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values - values.mean()


@dataclasses.dataclass(frozen=True)
class ScoreFunction:
    """A score as recipes and tables name it: a row of `SCORE_FUNCTIONS`.

    Attributes:
        title: its name in tables.
        kind: of the tasks it is for, "classification" or "regression".
        compute: (labels [N], predicted classes [N]) -> number for a classification, (values [N],
            scores [N]) -> number for one dimension of a regression. Higher is better.
        in_percent: whether papers print it as a percentage.
    """

    title: str
    kind: str
    compute: Callable[[np.ndarray, np.ndarray], float]
    in_percent: bool = False


SCORE_FUNCTIONS = {
    "uar": ScoreFunction("UAR", "classification", uar, in_percent=True),
    "war": ScoreFunction("WAR", "classification", war, in_percent=True),
    "weighted_f1": ScoreFunction("weighted F1", "classification", weighted_f1, in_percent=True),
    "pcc": ScoreFunction("PCC", "regression", pcc),
    "ccc": ScoreFunction("CCC", "regression", ccc),
    "acc": ScoreFunction("ACC", "regression", acc),
}
