"""Divide the samples of a data set into folds that are alike, where the set has no folds.

In: the group of each sample (its subject, or itself) and its class. Out: the fold that tests it.
Groups stay whole. The largest come first, and each goes to the fold that has least of its classes
so far, so that folds have about the same number of samples of each class. The folds depend on the
groups and classes alone, not on a seed: all runs on a data set are compared on the same folds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def balanced_folds(groups: Sequence[str], classes: np.ndarray, num_folds: int) -> np.ndarray:
    """Return the fold of each sample, from 1, int64 [N].

    Args:
        groups: names of N samples' groups; at least as many different ones as folds.
        classes: indices [N].
        num_folds: at least 1.
    """
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((len(names), int(classes.max()) + 1))  # [G, C]
    np.add.at(counts, (group_of, classes), 1)
    # Of equal groups in an order that says nothing about them.
    digests = [hashlib.sha256(str(name).encode()).digest() for name in names]
    sizes = counts.sum(axis=1)
    order = sorted(range(len(names)), key=lambda group: (-sizes[group], digests[group]))
    weights = 1 / np.maximum(counts.sum(axis=0), 1) ** 2  # a rare class counts as much as another
    totals = np.zeros((num_folds, counts.shape[1]))
    fold_of = np.zeros(len(names), np.int64)
    for group in order:
        # By how much the sum of squares of the folds' shares of each class grows, up to a constant.
        costs = totals @ (weights * counts[group])
        fold = int(np.lexsort((totals.sum(axis=1), costs))[0])
        totals[fold] += counts[group]
        fold_of[group] = fold + 1
    return fold_of[group_of]
