"""Which samples a fold trains on and tests, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svfap_dist.config import TaskConfig
from svfap_dist.errors import SvfapError
from svfap_dist.evaluate.protocol import folds_of, hold_out, select, targets

NAMES = ("sad", "happy", "calm")


def task(**fields: Any) -> TaskConfig:
    given = {"kind": "classification", "set": "toy", "label": "class", "names": NAMES, "folds": 3}
    return TaskConfig(**given | {"metrics": ("uar",)} | fields)


def row(index: int, fold: int, subject: str | None = None) -> dict[str, Any]:
    columns = {"set": "toy", "class": index, "class_name": NAMES[index], "fold": fold}
    return columns | ({"subject": subject} if subject else {})


def regression(**fields: Any) -> TaskConfig:
    given = {"kind": "regression", "label": "values", "names": ("b", "a"), "folds": 2}
    return task(**given | {"metrics": ("ccc",)} | fields)


ROWS = [row(n % 3, n % 4 % 3 + 1, f"p{n % 4}") for n in range(24)]


@given(st.lists(st.integers(1, 3), min_size=3, max_size=40).filter(lambda f: set(f) == {1, 2, 3}))
def test_folds_part_the_samples(folds):
    rows = [row(0, fold) for fold in folds]
    tested = []
    for fold in folds_of(task()):
        train, test = select(task(), rows, fold)
        assert sorted([*train, *test]) == list(range(len(rows)))
        assert all(rows[n]["fold"] == fold for n in test)
        tested += test.tolist()
    assert sorted(tested) == list(range(len(rows)))


def test_which_folds_are_run():
    assert folds_of(task()) == (1, 2, 3)
    assert folds_of(task(fold=2)) == (2,)
    assert folds_of(task(folds=0)) == (0,)


def test_splits_may_leave_samples_out():
    parts = ["train", "val", "test", "train", "extra"]
    rows = [{**row(0, 1), "split": part} for part in parts]
    fixed = task(folds=0, train_splits=("train", "extra"))
    train, test = select(fixed, rows, 0)
    assert (train.tolist(), test.tolist()) == ([0, 3, 4], [2])


STILLS = [{"set": "images", "class_name": NAMES[n % 3]} for n in range(5)]


@given(st.permutations(ROWS + STILLS))
def test_samples_of_extra_sets_train_in_every_fold_and_are_never_tested(rows):
    mixed = task(extra_sets=("images",), subject_independent=False)
    places = {n for n, each in enumerate(rows) if each["set"] == "images"}
    own = [each for each in rows if each["set"] == "toy"]
    for fold in folds_of(mixed):
        train, test = select(mixed, rows, fold)
        alone = select(task(), own, fold)
        assert train.tolist() == sorted(train)
        assert places <= set(train)
        assert not places & set(test)
        assert [rows[n] for n in test] == [own[n] for n in alone.test]
        assert [rows[n] for n in train if n not in places] == [own[n] for n in alone.train]
        found = targets(mixed, [rows[n] for n in train])
        assert [NAMES[index] for index in found] == [rows[n]["class_name"] for n in train]


def test_extra_sets_keep_few_labels_few_and_may_have_values():
    few = task(labels_per_class=2, extra_sets=("images",))
    train, _ = select(few, ROWS + STILLS, 1)
    assert len(train) == 3 * 2 + len(STILLS)
    values = [{"set": "toy", "values": {"a": n, "b": 0}, "fold": n % 2 + 1} for n in range(4)]
    more = [{"set": "images", "values": {"a": 9, "b": 1}}]
    train, _ = select(regression(extra_sets=("images",)), values + more, 1)
    assert train.tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("fields", "rows", "words"),
    [
        ({}, STILLS, "task.set = toy, samples of images"),
        ({"extra_sets": ("images", "dfew")}, STILLS, "no sample of dfew among 29"),
        (
            {"extra_sets": ("images",)},
            [*STILLS, {"set": "images", "class_name": "contempt"}, {"set": "images"}],
            "1 of contempt, 1 of no class; the task has sad, happy, calm",
        ),
    ],
)
def test_extra_sets_that_do_not_fit_are_refused(fields, rows, words):
    with pytest.raises(SvfapError, match=re.escape(words)):
        select(task(**fields), ROWS + rows, 1)


def test_the_own_set_is_no_extra_set():
    with pytest.raises(ValueError, match="remove toy from extra_sets"):
        task(extra_sets=("toy",))


def test_targets_of_classes_dimensions_and_values():
    assert targets(task(), ROWS[:4]).tolist() == [0, 1, 2, 0]
    rows = [{"set": "toy", "classes": {"calm": 1}, "class_names": {"calm": "happy"}}]
    assert targets(task(label="classes.calm"), rows).tolist() == [1]
    values = targets(regression(), [{"values": {"a": 0.5, "b": 2}}, {"values": {"b": -1, "a": 0}}])
    assert values.dtype == np.float32
    assert values.tolist() == [[2, 0.5], [-1, 0]]


def test_few_labels_are_per_class_nested_and_decided_by_the_seed():
    few, more = task(labels_per_class=2), task(labels_per_class=4)
    train, test = select(few, ROWS, 2, seed=7)
    assert np.bincount(targets(few, [ROWS[n] for n in train])).tolist() == [2, 2, 2]
    assert train.tolist() == select(few, ROWS, 2, seed=7).train.tolist() == sorted(train.tolist())
    assert test.tolist() == select(task(), ROWS, 2).test.tolist()
    assert set(train) < set(select(more, ROWS, 2, seed=7).train)
    others = {tuple(select(few, ROWS, 2, seed=seed).train.tolist()) for seed in range(8)}
    assert len(others) > 1


def test_subject_independence_is_only_demanded_where_the_task_says_so():
    rows = [row(0, 1, "p1"), row(1, 2, "p1"), row(1, 3, "p2")]
    assert select(task(), rows, 1).train.tolist() == [1, 2]
    with pytest.raises(SvfapError, match=r"Subjects are on both sides.*1 of the subjects.*p1"):
        select(task(subject_independent=True), rows, 1)
    select(task(subject_independent=True), rows, 3)
    with pytest.raises(SvfapError, match=r"no subject; sample 1 has"):
        select(task(subject_independent=True), [rows[0], row(1, 2), rows[2]], 1)


def without(column: str) -> list[dict[str, Any]]:
    return [*ROWS, {name: value for name, value in ROWS[0].items() if name != column}]


@pytest.mark.parametrize(
    ("fields", "rows", "fold", "message"),
    [
        ({}, [], 1, "Shards have no labels"),
        ({"set": "dfew"}, ROWS, 1, r"another data set.*task.set = dfew, samples of toy"),
        ({}, without("set"), 1, "without a set"),
        ({}, without("fold"), 1, "no fold; sample 24 has"),
        ({}, without("class"), 1, "no class; sample 24 has"),
        ({"folds": 4}, ROWS, 1, r"task.folds = 4, but 24 samples, 12 of fold 1"),
        ({"folds": 2}, ROWS, 1, r"6 of fold 3"),
        ({}, ROWS, 0, r"Unknown fold.*use 1 to 3"),
        ({"names": ("sad", "happy")}, ROWS, 1, r"class = 2 of 2 names"),
        ({"names": ("happy", "sad", "calm")}, ROWS, 1, r"class 0 is sad, not happy"),
        ({}, [*ROWS, {**ROWS[0], "class": "sad"}], 1, r"class = 'sad'"),
        ({}, [*ROWS, {**ROWS[0], "class": True}], 1, r"class = True"),
        ({"folds": 0}, ROWS, 0, r"no split; sample 0 has"),
        ({"folds": 0}, [{**r, "split": "test"} for r in ROWS], 0, r"Nothing to train on.*24 of"),
        ({"folds": 0}, [{**r, "split": "train"} for r in ROWS], 0, "Nothing to test"),
        ({"folds": 0, "test_splits": ("train",)}, ROWS, 0, "A split is on both sides"),
        ({"labels_per_class": 9}, ROWS, 1, r"Too few labeled.*4 to train on of sad, not 9"),
    ],
)  # fmt: skip
def test_misfits_are_refused_with_what_was_found(fields, rows, fold, message):
    with pytest.raises(SvfapError) as caught:
        select(task(**fields), rows, fold)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert caught.value.do


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), True])
def test_values_are_finite_numbers(value):
    rows = [{"set": "toy", "fold": n, "values": {"a": 0.1, "b": 0.2}} for n in (1, 2)]
    assert select(regression(), rows, 1).test.tolist() == [0]
    rows.append({"set": "toy", "fold": 1, "values": {"a": value, "b": 0.2}})
    with pytest.raises(SvfapError, match=r"a = |no values\.a"):
        select(regression(), rows, 2)
    with pytest.raises(SvfapError, match="no classes"):
        select(regression(labels_per_class=1), rows[:2], 1)


def test_samples_of_no_side_need_no_target():
    rows = [{**row(n, 1), "split": part} for n, part in enumerate(["train", "test", "extra"])]
    del rows[2]["class"]
    assert select(task(folds=0), rows, 0).test.tolist() == [1]


@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_validation_samples_are_whole_subjects_of_the_training_side(fold, seed):
    rows = [row(n % 3, n // 30 % 3 + 1, f"p{n // 3}") for n in range(90)]
    train, test = select(task(), rows, fold)
    held_out = hold_out(task(), rows, train, 0.2, seed)
    assert np.array_equal(held_out, hold_out(task(), rows, train, 0.2, seed))
    assert set(held_out.tolist()) < set(train.tolist())
    assert not set(held_out.tolist()) & set(test.tolist())
    assert len(held_out) == 12  # of 60
    assert np.bincount([rows[n]["class"] for n in held_out]).tolist() == [4, 4, 4]
    inside = {rows[n]["subject"] for n in held_out}
    assert inside.isdisjoint(rows[n]["subject"] for n in set(train.tolist()) - set(held_out))
    assert set(held_out.tolist()) != set(hold_out(task(), rows, train, 0.2, seed + 1).tolist())


def test_validation_samples_are_of_all_classes_where_subjects_are_not_known():
    rows = [row(min(n % 10, 2), 1 + n % 3) for n in range(90)]  # the last class has most
    rows[0]["subject"] = "the only one known"
    train, _ = select(task(), rows, 1)
    held_out = hold_out(task(), rows, train, 0.5)
    assert np.bincount([rows[n]["class"] for n in held_out]).tolist() == [3, 3, 24]
    values = [{"set": "toy", "values": {"a": 0.1, "b": 1}, "fold": 1 + n % 2} for n in range(40)]
    assert len(hold_out(regression(), values, np.arange(0, 40, 2), 0.1)) == 2


def test_samples_of_extra_sets_are_not_held_out():
    rows = [row(n % 3, 1 + n % 3) for n in range(30)]
    rows += [{"set": "more", "class": 0, "class_name": NAMES[0]} for _ in range(30)]
    mixed = task(extra_sets=("more",))
    train, _ = select(mixed, rows, 1)
    assert len(train) == 50
    assert max(hold_out(mixed, rows, train, 0.5)) < 30


def test_one_subject_cannot_be_held_out():
    rows = [row(n % 3, 1 + n % 3, "p1") for n in range(9)]
    train, _ = select(task(), rows, 1)
    with pytest.raises(SvfapError, match=r"(?s)hold out for validation.*1 subjects.*leave out"):
        hold_out(task(), rows, train, 0.1)
