"""Tasks that follow from the labels of a data set."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svfap_dist.config import TaskConfig, recipe
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.evaluate import protocol, task_of_data
from svfap_dist.evaluate.folds import balanced_folds
from svfap_dist.evaluate.task_of_data import complete_config, complete_task

Rows = list[dict[str, Any]]


def rows(count: int = 40, persons: int = 8, **more: Any) -> Rows:
    """Labels of samples of four classes; each person has all of them."""
    names = ("sad", "happy", "10", "9")
    return [
        {
            "set": "csv",
            "class_name": names[n // persons % 4],
            "subject": f"p{n % persons}",
            **{name: value(n) for name, value in more.items()},
        }
        for n in range(count)
    ]


def without(labels: Rows, *columns: str) -> Rows:
    return [{k: v for k, v in row.items() if k not in columns} for row in labels]


def complete(labels: Rows, *overrides: str) -> TaskConfig:
    task = recipe.load("finetune_custom", overrides).task
    assert task is not None
    return complete_task(task, labels, "shards")


def test_classes_folds_by_subject_and_metrics() -> None:
    labels = rows()
    task = complete(labels)
    assert (task.kind, task.label, task.names) == (
        "classification",
        "class_name",
        ("9", "10", "happy", "sad"),
    )
    assert (task.folds, task.folds_by, task.subject_independent) == (5, "subject", True)
    assert task.metrics == ("uar", "war")
    tested = []
    for fold in protocol.folds_of(task):
        train, test = protocol.select(task, labels, fold)
        assert sorted([*train, *test]) == list(range(len(labels)))
        tested += test.tolist()
    assert sorted(tested) == list(range(len(labels)))
    chosen = protocol.targets(task, labels)
    assert [task.names[index] for index in chosen] == [row["class_name"] for row in labels]


@pytest.mark.parametrize(("persons", "folds"), [(2, 2), (4, 4), (8, 5)])
def test_no_more_folds_than_subjects(persons: int, folds: int) -> None:
    assert complete(rows(persons=persons)).folds == folds


def test_folds_by_sample_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    labels = without(rows(160), "subject")
    with caplog.at_level(logging.WARNING):
        task = complete(labels)
    assert (task.folds, task.folds_by, task.subject_independent) == (5, "sample", False)
    assert "no column of subjects" in caplog.text
    assert "inflates the scores" in caplog.text
    for fold in range(1, 6):
        test = protocol.select(task, labels, fold).test
        counts = Counter(labels[index]["class_name"] for index in test)
        assert sorted(counts.values()) == [8, 8, 8, 8]


def test_own_folds_and_splits() -> None:
    task = complete(rows(fold=lambda n: n % 8 % 3 + 1))
    assert (task.folds, task.folds_by, task.subject_independent) == (3, "labels", True)
    task = complete(rows(split=lambda n: ("train", "val")[n % 2]))
    assert (task.folds, task.test_splits) == (0, ("val",))
    task = complete(rows(split=lambda n: ("train", "val", "test")[n % 3]))
    assert (task.train_splits, task.test_splits) == (("train",), ("test",))


def test_what_the_recipe_gives_stays() -> None:
    labels = rows(split=lambda n: ("train", "dev")[n % 2])
    given = ("task.test_splits=['dev']", "task.metrics=['war']", "task.subject_independent=false")
    task = complete(labels, *given)
    assert (task.test_splits, task.metrics, task.subject_independent) == (("dev",), ("war",), False)
    task = complete(rows(), "task.folds=3", "task.names=['sad','happy','9','10']", "task.fold=2")
    assert (task.folds, task.folds_by, task.fold) == (3, "subject", 2)
    assert task.names == ("sad", "happy", "9", "10")
    assert complete(labels, "task.folds=2").folds_by == "subject"
    assert complete(rows(), "task.folds_by=sample").folds_by == "sample"


def test_a_job_gets_no_more_than_the_recipe_gives(tmp_path: Path) -> None:
    """Jobs get a stored recipe, in which defaults must not count as given."""
    config, labels = recipe.load("finetune_custom"), rows(fold=lambda n: n % 8 % 3 + 1)
    (tmp_path / "stored.toml").write_text(recipe.dumps(config))
    stored = recipe.load(str(tmp_path / "stored.toml"))
    assert config.task is not None
    assert stored.task is not None
    assert complete_task(stored.task, labels, "shards").subject_independent
    assert complete_task(stored.task, labels, "") == complete_task(config.task, labels, "")


def test_names_of_one_dimension_of_several() -> None:
    labels = rows(class_names=lambda n: {"arousal": ("low", "high")[n % 2]})
    assert complete(labels, "task.label=class_names.arousal").names == ("high", "low")


def test_values_are_a_regression() -> None:
    labels = without(rows(values=lambda n: {"v": n / 10, "a": 0.0}), "class_name")
    task = complete(labels)
    assert (task.kind, task.label, task.names) == ("regression", "values", ("v", "a"))
    assert task.metrics == ("ccc", "pcc")
    assert protocol.targets(task, labels).shape == (40, 2)
    assert len(protocol.select(task, labels, 1).test) == 10


def test_a_completed_task_is_checked_with_the_rest_of_the_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = without(rows(values=lambda n: {"v": n / 10}), "class_name")
    monkeypatch.setattr(task_of_data, "open_training_data", lambda config: None)
    monkeypatch.setattr(task_of_data, "labels_of", lambda url, manifest: labels)
    overrides = ["data.url=shards", "finetune.class_weights=balanced"]
    with pytest.raises(ConfigError, match="a regression has no classes"):
        complete_config(recipe.load("finetune_custom", overrides))
    assert complete_config(recipe.load("finetune_custom", overrides[:1])).task == complete(labels)


@pytest.mark.parametrize(
    ("labels", "overrides", "words"),
    [
        ([], (), ["does not follow", "0 samples"]),
        ([], ("task.label=class_name",), ["does not follow", "0 samples"]),
        (rows()[:3] + without(rows(), "class_name"), (), ["does not follow", "3 with a class"]),
        (rows(values=lambda n: {"v": 1.0}), (), ["does not follow", "40 with values"]),
        (rows(persons=40), (), ["fewer than two classes", "only sad"]),
        (rows(persons=1), (), ["at least two subjects", "1 subject"]),
        (rows(count=5, persons=2), ("task.folds=3",), ["Too few subjects", "2 for 3 folds"]),
        (rows(), ("task.metrics=['pcc']",), ["pcc is not a metric of a classification"]),
        (rows(), ("task.names=['sad','happy']",), ["class_name = 10", "none of sad, happy"]),
        (
            without(rows(values=lambda n: {"va"[n % 2]: 1.0}), "class_name"),
            (),
            ["values of different names", "a and v"],
        ),
    ],
)
def test_data_that_give_no_task(labels: Rows, overrides: tuple[str, ...], words: list[str]) -> None:
    with pytest.raises((ShardError, ConfigError)) as error:
        protocol.select(complete(labels, *overrides), labels, 1)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.do


def test_balanced_folds_keep_groups_whole_and_spread_rare_classes() -> None:
    random = np.random.default_rng(0)
    groups = [f"p{n}" for n in random.integers(0, 40, 1000)]
    classes = random.choice(4, size=1000, p=[0.7, 0.2, 0.07, 0.03])
    folds = balanced_folds(groups, classes, 5)
    assert {len(set(folds[np.array(groups) == name])) for name in set(groups)} == {1}
    for number in range(4):
        counts = np.bincount(folds[classes == number], minlength=6)[1:]
        assert counts.min() > 0.6 * counts.mean(), (number, counts)
    order = random.permutation(1000)  # neither the order of samples nor a seed matters
    again = balanced_folds([groups[i] for i in order], classes[order], 5)
    assert (again == folds[order]).all()
    assert set(balanced_folds(["a", "b", "c"], np.array([0, 1, 2]), 3)) == {1, 2, 3}
