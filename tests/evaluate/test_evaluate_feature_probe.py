"""Probes: which samples are tested by whom, and the scores of the classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from svfap_dist.config import ProbeConfig
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.evaluate import feature_probe
from svfap_dist.evaluate.feature_probe import FOLDS, ProbeSet, score
from svfap_dist.shards.format import Manifest

NO_SHARDS = Manifest("folder", "source", 0, 16, "none", ())


def select(labels: list[dict[str, Any]], **probe: Any) -> ProbeSet:
    config = ProbeConfig(url="labeled", **probe)
    return feature_probe.select(config, NO_SHARDS, labels)


def test_the_folds_of_the_set_are_used() -> None:
    found = select([{"class": n % 2, "fold": 1 + n // 4, "subject": str(n)} for n in range(12)])
    assert found.grouped_by == "fold"
    assert found.folds.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert found.targets.tolist() == [0, 1] * 6


@pytest.mark.parametrize(
    ("splits", "used", "tested"),
    [
        (["train", "train", "test", "test"], [0, 1, 2, 3], [2, 3]),
        (["val", "train", "val", "test", "train", "test"], [0, 1, 2, 4], [0, 2]),
    ],
)
def test_checkpoints_are_not_chosen_by_a_test_split_if_there_is_another(
    splits: list[str], used: list[int], tested: list[int]
) -> None:
    seen = {"train": 0, "val": 0, "test": 0}
    labels = []
    for split in splits:
        labels.append({"class": seen[split], "split": split})
        seen[split] += 1
    found = select(labels)
    assert found.indices.tolist() == used
    assert found.indices[found.folds > 0].tolist() == tested
    assert found.grouped_by == "split"


def test_without_folds_and_splits_no_subject_is_on_both_sides() -> None:
    labels = [{"class": n % 3, "subject": f"id{n // 6}"} for n in range(60)]
    found = select(labels)
    assert found.grouped_by == "subject"
    folds_of = {subject: set() for subject in range(10)}
    for n, fold in zip(found.indices.tolist(), found.folds.tolist(), strict=True):
        folds_of[n // 6].add(fold)
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert set(found.folds.tolist()) == set(range(1, FOLDS + 1))


def test_without_subjects_each_fold_has_every_class() -> None:
    found = select([{"class": min(n % 4, 2)} for n in range(40)])
    assert found.grouped_by == "sample"
    for fold in range(1, FOLDS + 1):
        assert set(found.targets[found.folds == fold].tolist()) == {0, 1, 2}


def test_the_limit_takes_equally_many_of_each_class_and_all_of_a_rare_one() -> None:
    labels = [{"class": "rare" if n % 10 == 9 else "often"} for n in range(100)]
    found = select(labels, max_clips=50)
    assert [int((found.targets == target).sum()) for target in (0, 1)] == [40, 10]
    assert found.indices.tolist() == sorted(found.indices.tolist())
    assert select(labels, max_clips=8).indices.tolist() == [0, 1, 2, 3, 9, 19, 29, 39]


def test_samples_without_the_label_are_left_out() -> None:
    labels: list[dict[str, Any]] = [{"classes": {"arousal": n % 2}} for n in range(10)]
    labels[3] = {"class": 1}
    assert 3 not in select(labels, label="classes.arousal").indices


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"class": 1}] * 4, "no classes to separate.*4 samples with class, in 1 classes"),
        ([{"values": {"valence": 0.5}}] * 4, "0 samples with class"),
        ([{"class": n % 2, "split": "train"} for n in range(4)], None),
        ([{"class": n, "subject": f"id{n}"} for n in range(2)], "fewer than two classes"),
    ],
)
def test_a_set_that_cannot_be_probed_is_told(labels: list[dict[str, Any]], message: str) -> None:
    if message is None:  # all of one split: as if there were none
        assert select(labels).grouped_by == "sample"
        return
    with pytest.raises(ShardError, match=message):
        select(labels)


def test_missing_scikit_learn_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_probe, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"scikit-learn.*pip install 'svfap-dist\[probe\]'"):
        feature_probe.open_probe_set(ProbeConfig(url="labeled"))


def test_scores_are_scikit_learns() -> None:
    chance = np.random.default_rng(0)
    targets = chance.integers(0, 3, 60)
    features = chance.normal(size=(60, 8)) * 10 + targets[:, None]
    folds = np.arange(60) % 4 + 1
    found = score(features, targets, folds, neighbors=3)
    for classifier, mine in (
        (KNeighborsClassifier(3), found.knn),
        (LogisticRegression(max_iter=1000), found.logistic),
    ):
        pipeline = make_pipeline(StandardScaler(), classifier)
        predicted = cross_val_predict(pipeline, features, targets, cv=PredefinedSplit(folds))
        assert mine == pytest.approx(balanced_accuracy_score(targets, predicted))


def test_only_tested_samples_count() -> None:
    targets = np.array([0, 1] * 10)
    features = np.where(targets, 1.0, -1.0)[:, None] * np.ones((1, 3))
    folds = np.array([0] * 10 + [1] * 10)
    features[:2] *= -1  # trained on, and wrong
    assert score(features, targets, folds, neighbors=5).knn == 1.0
