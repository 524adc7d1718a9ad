"""Probes of frozen features: how well simple classifiers read the labels of a data set from them.

In: the labels of a labeled data set, then a feature vector per sample. Out: a `ProbeSet`, the
samples to use and the fold in which each is tested; then the unweighted average recall (UAR) of two
classifiers on standardized features: the nearest neighbors, which learn nothing, and logistic
regression, a linear probe.

A sample is never tested by a classifier that has seen it, nor another of its subject where the set
names subjects: the set's own folds or splits are used where it has them, and else folds made here.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from svfap_dist.config import ProbeConfig
from svfap_dist.data.selection import find_label, labels_of
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.evaluate import metrics
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest

FOLDS = 5  # where a set has neither folds nor splits
CLASSIFIERS = ("knn", "logistic")
_ITERATIONS = 1000  # of logistic regression, at most


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeSet:
    """The samples of a probe; picklable.

    Attributes:
        manifest: of the data set.
        indices: of the samples, ascending, int64 [N].
        targets: class indices, int64 [N].
        folds: number of the fold in which a sample is tested, from 1, where all others are trained
            on; 0: never tested. int64 [N].
        grouped_by: column that makes the folds: fold, split, subject or sample.
    """

    manifest: Manifest
    indices: np.ndarray
    targets: np.ndarray
    folds: np.ndarray
    grouped_by: str

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(np.unique(self.targets))


@dataclasses.dataclass(frozen=True)
class ProbeScores:
    """UAR of each classifier, from 0 to 1, over the tested samples of all folds."""

    knn: float
    logistic: float


def open_probe_set(probe: ProbeConfig) -> ProbeSet:
    """Read the labels of a probe's data set and choose its samples, before training.

    Args:
        probe: the recipe's section; it has a url.

    Raises:
        ConfigError: scikit-learn is not installed.
        ShardError: The data set cannot be used, or has no classes.
        StorageError: The store fails.
    """
    if find_spec("sklearn") is None:
        advice = "pip install 'svfap-dist[probe]', or set probe.url=''"
        raise ConfigError("Probes need scikit-learn", "probe.url", "it is not installed", advice)
    manifest = shard_format.load_manifest(probe.url)
    shard_format.check_shards(probe.url, manifest)
    return select(probe, manifest, labels_of(probe.url, manifest))


def select(probe: ProbeConfig, manifest: Manifest, labels: Sequence[dict[str, Any]]) -> ProbeSet:
    """Choose the samples of a probe and the fold in which each is tested.

    Samples without the label are left out, and so is the test split where there is another one to
    test: checkpoints are chosen by probes. Of each class the first samples are taken.

    Args:
        probe: the recipe's section.
        manifest: of the data set.
        labels: of each of its samples.

    Raises:
        ShardError: There are fewer than two classes, or no fold can be tested.
    """
    values = [find_label(row, probe.label) for row in labels]
    known = [n for n, value in enumerate(values) if type(value) in (int, str)]
    splits = {labels[n].get("split") for n in known}
    if len(splits - {"train"}) > 1 and "fold" not in (labels[known[0]] if known else {}):
        known = [n for n in known if labels[n].get("split") != "test"]
    names, targets = np.unique([str(values[n]) for n in known], return_inverse=True)
    if len(names) < 2:
        found = f"{len(known)} samples with {probe.label}, in {len(names)} classes"
        do = "shard a labeled set, or name the column of the classes with probe.label: class_name "
        do += "for lists of your own and images, classes.arousal for sets with several"
        raise ShardError("Probe has no classes to separate", probe.url, found, do)
    chosen = np.sort(np.argsort(_occurrences(targets), kind="stable")[: probe.max_clips])
    indices, targets = np.array(known, np.int64)[chosen], targets[chosen].astype(np.int64)
    folds, grouped_by = _folds([labels[n] for n in indices.tolist()], targets)
    for fold in _tested(folds):
        if len(np.unique(targets[folds != fold])) < 2:
            found = f"fold {fold} by {grouped_by} leaves fewer than two classes to train on"
            do = "use a set with more subjects or samples, or raise probe.max_clips"
            raise ShardError("Probe cannot be split", probe.url, found, do)
    if not _tested(folds):
        found = f"{len(indices)} samples, all of split train"
        do = "add a validation or test split to the shards"
        raise ShardError("Probe has nothing to test", probe.url, found, do)
    return ProbeSet(manifest, indices, targets, folds, grouped_by)


def _occurrences(groups: np.ndarray) -> np.ndarray:
    """Return how often the group of each element has occurred before it."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    counts = np.empty(len(groups), np.int64)
    counts[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return counts


def _folds(labels: Sequence[dict[str, Any]], targets: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the fold in which each sample is tested, and the column that makes the folds."""
    columns = {name: [row.get(name) for row in labels] for name in ("fold", "split", "subject")}
    present = {name: column for name, column in columns.items() if None not in column}
    for name in ("fold", "split"):
        if len(set(present.get(name, ()))) > 1:
            if name == "split":
                return np.array([split != "train" for split in present[name]], np.int64), name
            return _numbers(present[name]) + 1, name
    if len(set(present.get("subject", ()))) > 1:
        return _numbers(present["subject"]) % FOLDS + 1, "subject"
    return _occurrences(targets) % FOLDS + 1, "sample"


def _numbers(values: Sequence[Any]) -> np.ndarray:
    """Return the number of each value among the distinct ones, from 0."""
    return np.unique([str(value) for value in values], return_inverse=True)[1]


def _tested(folds: np.ndarray) -> list[int]:
    return np.unique(folds[folds > 0]).tolist()


def score(
    features: np.ndarray, targets: np.ndarray, folds: np.ndarray, neighbors: int
) -> ProbeScores:
    """Train and test the classifiers on each fold.

    Args:
        features: of N samples, [N, D].
        targets: class indices [N].
        folds: see `ProbeSet`, [N].
        neighbors: of the kNN classifier.

    Raises:
        ValueError: A feature is not finite, or a fold has one class only.
    """
    predicted = {name: np.full(len(targets), -1) for name in CLASSIFIERS}
    for fold in _tested(folds):
        test = folds == fold
        found = predict(features[~test], targets[~test], features[test], neighbors)
        for name, classes in found.items():
            predicted[name][test] = classes
    tested = folds > 0
    return ProbeScores(
        **{name: metrics.uar(targets[tested], of[tested]) for name, of in predicted.items()}
    )


def predict(
    trained_on: np.ndarray,
    targets: np.ndarray,
    tested_on: np.ndarray,
    neighbors: int,
    names: Sequence[str] = CLASSIFIERS,
) -> dict[str, np.ndarray]:
    """Train classifiers on standardized features; return the classes that each predicts, [M].

    Args:
        trained_on: features of N samples, [N, D].
        targets: their class indices [N].
        tested_on: features of M samples, [M, D].
        neighbors: of the kNN classifier.
        names: of the classifiers, among CLASSIFIERS.

    Raises:
        ValueError: A feature is not finite, or there is one class only.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(trained_on)
    train, test = scaler.transform(trained_on), scaler.transform(tested_on)
    classifiers = {
        "knn": KNeighborsClassifier(min(neighbors, len(trained_on))),
        "logistic": LogisticRegression(max_iter=_ITERATIONS),
    }
    predicted = {}
    for name in names:
        with warnings.catch_warnings():  # nearly converged is good enough
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifiers[name].fit(train, targets)
        predicted[name] = classifiers[name].predict(test)
    return predicted
