"""Summaries of a series of values over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence


def mean_of_tenth(values: Sequence[float], last: bool) -> float:
    """Return the mean of the first or last tenth of a series, at least one value.

    Args:
        values: the series.
        last: whether the last tenth is meant.
    """
    count = max(1, len(values) // 10)
    chosen = values[-count:] if last else values[:count]
    return sum(chosen) / count
