"""Evaluation protocol: which samples a fold trains on and which it tests, chosen by their labels.

In: the recipe's [task] table, and the labels of all samples of a data set in the order of its
shards. Out: the samples of both sides, with their targets. No data set is special here: a protocol
needs columns that the sharding wrote (`data_sharding.sources.Labels`) and the table that names
them.

A mistake here shows only as too good a result, so everything that can be checked is checked: that
the shards are of the recipe's set, every sample has its columns, every class has the name that the
recipe gives it, both sides have samples, and no subject is on both.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from svfap_dist.config import Config, TaskConfig
from svfap_dist.data.selection import Selection, find_label, labels_of
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.evaluate.folds import balanced_folds
from svfap_dist.rng import Stream
from svfap_dist.shards.format import Manifest

Labels = Mapping[str, Any]  # of one sample, by column
_EXAMPLES = 3


class Positions(NamedTuple):
    """The two sides of a fold: positions of samples, ascending, int64."""

    train: np.ndarray
    test: np.ndarray


class TaskSplit(NamedTuple):
    """The two sides of a fold, samples and their targets, and what is held out of `train`."""

    train: Selection
    test: Selection
    validation: Selection | None = None  # for finetune.validation


def require_task(config: Config) -> TaskConfig:
    """Return the recipe's task.

    Args:
        config: the recipe.

    Raises:
        ConfigError: It has none.
    """
    if config.task is None:
        raise ConfigError(
            "Missing [task] table",
            where="[task]",
            found="a recipe of pre-training",
            do="use `svfap pretrain`, or one of the finetune_... recipes",
        )
    return config.task


def folds_of(task: TaskConfig) -> tuple[int, ...]:
    """Return the numbers of the folds to run, in order; (0,) where the split is fixed.

    Args:
        task: the recipe's [task].
    """
    if not task.folds:
        return (0,)
    return (task.fold,) if task.fold else tuple(range(1, task.folds + 1))


def split_samples(config: Config, manifest: Manifest, fold: int) -> TaskSplit:
    """Return both sides of a fold, with targets, of the data set at data.url.

    Args:
        config: the recipe; it has a [task].
        manifest: of the data set.
        fold: one of `folds_of(task)`.

    Raises:
        ConfigError: The table contradicts itself.
        ShardError: The labels do not fit the table.
        StorageError: The store fails.
    """
    task, labels = require_task(config), labels_of(config.data.url, manifest)

    def selection(positions: np.ndarray) -> Selection:
        return Selection(positions, targets(task, [labels[position] for position in positions]))

    train, test = select(task, labels, fold, config.run.seed)
    share, validation = config.finetune.validation, None
    if share:
        held_out = hold_out(task, labels, train, share, config.run.seed)
        train, validation = np.setdiff1d(train, held_out), selection(held_out)
    return TaskSplit(selection(train), selection(test), validation)


def hold_out(
    task: TaskConfig, labels: Sequence[Labels], train: np.ndarray, share: float, seed: int = 0
) -> np.ndarray:
    """Return the training samples to validate with: about a share of each class, whole subjects.

    Subjects stay whole if all samples have one; samples of extra sets are never held out.

    Args:
        task: the recipe's [task].
        labels: of each sample of the data set.
        train: positions of the training samples, ascending.
        share: of them to hold out, above 0, at most 0.5.
        seed: other seeds hold out others.

    Raises:
        ShardError: There are too few subjects, or samples.
    """
    own = [n for n in train.tolist() if labels[n].get("set") not in task.extra_sets]
    rows, what = [labels[n] for n in own], "subjects"
    groups = [row.get("subject") for row in rows]
    if any(group is None for group in groups):
        groups, what = own, "samples"
    if (there := len(set(groups))) < 2:
        advice = f"leave out finetune.validation, or add more {what}"
        raise _misfit("Nothing to hold out for validation", task, f"{there} {what}", advice)
    parts = min(round(1 / share), there)
    classes = np.zeros(len(rows), np.int64)
    if task.kind == "classification":
        classes = targets(task, rows)
    part_of = balanced_folds([str(group) for group in groups], classes, parts)
    return np.array(own, np.int64)[part_of == 1 + seed % parts]


def select(task: TaskConfig, labels: Sequence[Labels], fold: int, seed: int = 0) -> Positions:
    """Return the samples that a fold trains on and tests.

    Args:
        task: the recipe's [task].
        labels: of each sample of the data set.
        fold: one of `folds_of(task)`.
        seed: of the choice among training samples where the task takes few per class.

    Raises:
        ConfigError: The table contradicts itself.
        ShardError: The labels do not fit the table.
    """
    if task.extra_sets:
        own, extra = _separate_extra(task, labels)
        only = task.model_copy(update={"extra_sets": ()})
        positions = select(only, [labels[position] for position in own], fold, seed)
        train = np.sort(np.concatenate([own[positions.train], extra]))
        return Positions(train, own[positions.test])
    _check_set(task, labels)
    train, test = _by_fold(task, labels, fold) if task.folds else _by_split(task, labels)
    for side, chosen in (("train on", train), ("test", test)):
        if not chosen.any():
            raise _misfit(f"Nothing to {side}", task, _describe(task, labels))
    if task.subject_independent:
        _check_subjects(task, labels, train, test)
    _check_targets(task, labels, train | test)
    positions = np.flatnonzero(train)
    if task.labels_per_class:
        positions = _few(task, labels, positions, Stream(seed, "few labels", fold))
    return Positions(positions, np.flatnonzero(test))


def targets(task: TaskConfig, labels: Sequence[Labels]) -> np.ndarray:
    """Return the target of each sample: class indices [N] int64, or values [N, K] float32.

    Args:
        task: the recipe's [task].
        labels: of each sample.

    Raises:
        ShardError: The labels of a sample are not as the task says; names the first one.
    """
    if task.kind == "classification":
        return np.array([_class_of(task, row, n) for n, row in enumerate(labels)], np.int64)
    rows = [_values_of(task, row, n) for n, row in enumerate(labels)]
    return np.array(rows, np.float32).reshape(len(rows), len(task.names))


def _separate_extra(task: TaskConfig, labels: Sequence[Labels]) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the task's own samples, and of those that only add to training."""
    is_extra = np.array([row.get("set") in task.extra_sets for row in labels], bool)
    extra = np.flatnonzero(is_extra)
    if missing := sorted(set(task.extra_sets) - {labels[n]["set"] for n in extra.tolist()}):
        found = f"no sample of {', '.join(missing)} among {len(labels)}"
        do = "add its shards to [[data.sources]], or take it out of task.extra_sets"
        raise _misfit("Extra set is missing", task, found, do)
    if task.kind == "classification":
        found_names = (_class_name(task, labels[n]) or "no class" for n in extra.tolist())
        if others := collections.Counter(name for name in found_names if name not in task.names):
            counts = ", ".join(f"{count} of {name}" for name, count in sorted(others.items()))
            found = f"{counts}; the task has {', '.join(task.names)}"
            do = "shard the extra set without them, or rename its classes"
            raise _misfit("Extra samples have other classes than the task", task, found, do)
    else:
        targets(task, [labels[n] for n in extra.tolist()])
    return np.flatnonzero(~is_extra), extra


def _by_fold(task: TaskConfig, labels: Sequence[Labels], fold: int) -> tuple[np.ndarray, ...]:
    if not 1 <= fold <= task.folds:
        raise ConfigError(
            "Unknown fold", where="task.fold", found=str(fold), do=f"use 1 to {task.folds}"
        )
    if task.folds_by != "labels":
        numbers = _made_folds(task, labels)
        return numbers != fold, numbers == fold
    numbers = np.array([_column(task, "fold", row, n) for n, row in enumerate(labels)])
    there, wanted = set(numbers.tolist()), set(range(1, task.folds + 1))
    if there != wanted:
        raise _misfit(
            "Folds of the samples differ from the recipe's",
            task,
            f"task.folds = {task.folds}, but {_describe(task, labels)}",
        )
    return numbers != fold, numbers == fold


def _made_folds(task: TaskConfig, labels: Sequence[Labels]) -> np.ndarray:
    """Return the fold of each sample, for folds that are made here."""
    groups = [str(n) for n in range(len(labels))]
    if task.folds_by == "subject":
        groups = [str(_column(task, "subject", row, n)) for n, row in enumerate(labels)]
    if (found := len(set(groups))) < task.folds:
        what = "Too few subjects" if task.folds_by == "subject" else "Too few samples"
        advice = f"use task.folds={found}, or fewer" if found > 1 else "add more"
        raise _misfit(f"{what} for the folds", task, f"{found} for {task.folds} folds", advice)
    classes = np.zeros(len(labels), np.int64)
    if task.kind == "classification":
        classes = targets(task, labels)
    return balanced_folds(groups, classes, task.folds)


def _by_split(task: TaskConfig, labels: Sequence[Labels]) -> tuple[np.ndarray, ...]:
    if both := set(task.train_splits) & set(task.test_splits):
        raise ConfigError(
            "A split is on both sides",
            where="task.train_splits and task.test_splits",
            found=", ".join(sorted(both)),
            do="name each split on one side only",
        )
    splits = np.array([_column(task, "split", row, n) for n, row in enumerate(labels)])
    return np.isin(splits, task.train_splits), np.isin(splits, task.test_splits)


def _few(
    task: TaskConfig, labels: Sequence[Labels], positions: np.ndarray, stream: Stream
) -> np.ndarray:
    """Return `labels_per_class` positions of each class; a smaller choice is part of a larger."""
    if task.kind != "classification":
        raise ConfigError(
            "Few labels per class, but the task has no classes",
            where="task.labels_per_class",
            found=f"task.kind = {task.kind}",
            do="set task.labels_per_class=0, for all labels",
        )
    classes = targets(task, [labels[position] for position in positions])
    chosen = []
    for number, name in enumerate(task.names):
        of_class = positions[classes == number]
        if len(of_class) < task.labels_per_class:
            raise _misfit(
                "Too few labeled samples of a class",
                task,
                f"{len(of_class)} to train on of {name}, not {task.labels_per_class}",
                "lower task.labels_per_class",
            )
        chosen.append(of_class[stream.permutation(len(of_class))[: task.labels_per_class]])
    return np.sort(np.concatenate(chosen))


def _check_set(task: TaskConfig, labels: Sequence[Labels]) -> None:
    if not labels:
        advice = "shard a labeled set, with a version of svfap that writes labels into the indexes"
        raise _misfit("Shards have no labels", task, "no labels in the indexes", advice)
    others = sorted({str(row.get("set", "without a set")) for row in labels} - {task.set})
    if others:
        found = f"task.set = {task.set}, samples of {', '.join(others[:_EXAMPLES])}"
        do = "use the recipe and shards of one set, or name the others in task.extra_sets"
        raise _misfit("Shards belong to another data set", task, found, do)


def _check_subjects(
    task: TaskConfig, labels: Sequence[Labels], train: np.ndarray, test: np.ndarray
) -> None:
    sides = [
        {str(_column(task, "subject", labels[n], n)) for n in np.flatnonzero(side).tolist()}
        for side in (train, test)
    ]
    if both := sorted(sides[0] & sides[1]):
        found = f"{len(both)} of the subjects, such as {', '.join(both[:_EXAMPLES])}"
        raise _misfit("Subjects are on both sides", task, found)


def _check_targets(task: TaskConfig, labels: Sequence[Labels], used: np.ndarray) -> None:
    for n in np.flatnonzero(used).tolist():
        (_class_of if task.kind == "classification" else _values_of)(task, labels[n], n)


def _class_name(task: TaskConfig, row: Labels) -> Any:
    """Return the name of a sample's class, or None."""
    # class -> class_name, classes.arousal -> class_names.arousal
    column, dot, dimension = task.label.partition(".")
    column = {"class": "class_name", "classes": "class_names"}.get(column, column)
    return find_label(row, f"{column}{dot}{dimension}")


def _class_of(task: TaskConfig, row: Labels, number: int) -> int:
    name = _class_name(task, row)
    if row.get("set") in task.extra_sets:  # whose names were checked when they were selected
        return task.names.index(name)
    index = _column(task, task.label, row, number)
    if isinstance(index, str) and task.label.partition(".")[0] not in ("class", "classes"):
        if index not in task.names:
            found = f"{task.label} = {index}, none of {', '.join(task.names)}"
            raise _bad_sample(task, row, number, found)
        return task.names.index(index)
    if type(index) is not int or not 0 <= index < len(task.names):
        raise _bad_sample(task, row, number, f"{task.label} = {index!r} of {len(task.names)} names")
    if isinstance(name, str) and name != task.names[index]:
        found = f"class {index} is {name}, not {task.names[index]} as in task.names"
        raise _bad_sample(task, row, number, found)
    return index


def _values_of(task: TaskConfig, row: Labels, number: int) -> list[float]:
    values = [_column(task, f"{task.label}.{name}", row, number) for name in task.names]
    for name, value in zip(task.names, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise _bad_sample(task, row, number, f"{name} = {value!r}, no finite number")
    return values


def _column(task: TaskConfig, path: str, row: Labels, number: int) -> Any:
    value = find_label(row, path)
    if value is None:
        raise _bad_sample(task, row, number, f"no {path}")
    return value


def _describe(task: TaskConfig, labels: Sequence[Labels]) -> str:
    column = "fold" if task.folds else "split"
    names, counts = np.unique([str(row.get(column)) for row in labels], return_counts=True)
    there = (f"{count} of {column} {name}" for name, count in zip(names, counts, strict=True))
    return f"{len(labels)} samples, {', '.join(there)}"


def _bad_sample(task: TaskConfig, row: Labels, number: int, found: str) -> ShardError:
    shown = json.dumps(dict(row))
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    found = f"{found}; sample {number} has {shown}"
    return _misfit("Labels of a sample do not fit the task", task, found)


def _misfit(what: str, task: TaskConfig, found: str, do: str = "") -> ShardError:
    advice = do or "use the recipe and shards of one set, or correct the [task] table"
    return ShardError(what, where=f"set {task.set}", found=found, do=advice)
