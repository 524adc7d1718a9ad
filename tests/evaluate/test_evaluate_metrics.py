"""The measures against scikit-learn's and scipy's."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from svfap_dist.evaluate.metrics import acc, ccc, pcc, uar, war, weighted_f1

PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)
NUMBERS = st.floats(-1e3, 1e3, width=32)
VALUES = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=40)


def columns(pairs, dtype) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype)
    return table[:, 0], table[:, 1]


@given(PAIRS)
def test_classification_measures_are_scikit_learns(pairs):
    labels, predicted = columns(pairs, np.int64)
    there = np.unique(labels)  # a class without samples has no recall
    recall = sklearn_metrics.recall_score(labels, predicted, labels=there, average="macro")
    assert uar(labels, predicted) == pytest.approx(recall, abs=1e-12)
    accuracy = sklearn_metrics.accuracy_score(labels, predicted)
    assert war(labels, predicted) == pytest.approx(accuracy, abs=1e-12)
    f1 = sklearn_metrics.f1_score(labels, predicted, average="weighted", zero_division=0)
    assert weighted_f1(labels, predicted) == pytest.approx(f1, abs=1e-12)


@given(st.integers(0, 2**31))
def test_regression_measures_are_scipys_and_scikit_learns(seed):
    rng = np.random.default_rng(seed)
    labels = rng.normal(rng.normal(), rng.uniform(0.1, 3), 50).astype(np.float32)
    scores = (rng.normal() * labels + rng.normal(size=50)).astype(np.float32)
    exact = labels.astype(np.float64), scores.astype(np.float64)
    correlation = stats.pearsonr(*exact).statistic
    assert pcc(labels, scores) == pytest.approx(correlation, abs=1e-12)
    error = sklearn_metrics.mean_absolute_error(*exact)
    assert acc(labels, scores) == pytest.approx(1 - error, abs=1e-12)
    spreads = exact[0].std(), exact[1].std()  # Lin's definition, by way of the correlation
    apart = (exact[0].mean() - exact[1].mean()) ** 2
    agreement = 2 * correlation * spreads[0] * spreads[1]
    agreement /= spreads[0] ** 2 + spreads[1] ** 2 + apart
    assert ccc(labels, scores) == pytest.approx(agreement, abs=1e-12)


@given(VALUES)
def test_ccc_is_its_definition_in_fractions(pairs):
    labels, scores = columns(pairs, np.float64)
    a, b = ([Fraction(float(value)) for value in values] for values in (labels, scores))
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    together = 2 * sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / n
    apart = sum((x - mean_a) ** 2 for x in a) / n + sum((y - mean_b) ** 2 for y in b) / n
    apart += (mean_a - mean_b) ** 2
    if apart > Fraction(1, 10**6):  # else rounding of the means decides
        assert ccc(labels, scores) == pytest.approx(float(together / apart), abs=1e-6)


def test_by_hand():
    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    assert uar(labels, predicted) == (3 / 4 + 1 / 2) / 2
    assert war(labels, predicted) == 4 / 6
    assert weighted_f1(labels, predicted) == pytest.approx((4 * 6 / 8 + 2 * 2 / 4) / 6)
    values = np.array([0.0, 1.0, 2.0], np.float32)
    assert ccc(values, values + 1) == pytest.approx((4 / 3) / (4 / 3 + 1))
    assert pcc(values, values + 1) == pytest.approx(1)
    assert acc(values, values + 1) == 0


def test_what_is_not_defined_is_nan():
    values, constant = np.array([0.1, 0.2, 0.4]), np.full(3, 0.1)
    assert math.isnan(pcc(values, constant))
    assert math.isnan(pcc(constant, values))
    assert ccc(values, constant) == 0
    assert math.isnan(ccc(constant, constant.copy()))
