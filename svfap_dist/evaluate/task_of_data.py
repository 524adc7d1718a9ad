"""Complete the task of a recipe with `task.kind = "auto"` from the labels of its data set.

In: the [task] table and the labels of all samples. Out: a complete table, which is what the run
stores. What the recipe gives stays; the rest follows from the data:

- kind: a regression where samples have `values`, a classification where they have `class_name`.
- names: those that occur, in alphabetical or numerical order.
- test samples: the folds of the labels, or their split; else folds are made, by subject where the
  samples have one, otherwise by sample, with a warning: clips of one person may then be on both
  sides.
- metrics: UAR and WAR, or CCC and PCC.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from svfap_dist.config import Config, TaskConfig, recipe, require_urls
from svfap_dist.data.selection import find_label, labels_of
from svfap_dist.errors import ShardError
from svfap_dist.shards.mixture import open_training_data

log = logging.getLogger(__name__)

Labels = Mapping[str, Any]  # of one sample, by column

FOLDS = 5  # that are made, at most
METRICS = {"classification": ("uar", "war"), "regression": ("ccc", "pcc")}
_CLASS, _VALUES = "class_name", "values"


def complete_config(config: Config) -> Config:
    """Return the recipe with a complete task.

    Args:
        config: the recipe; without a task of kind auto, it is returned as it is.

    Raises:
        ConfigError: The recipe's values do not fit the data, or data.url is missing.
        ShardError: The data set is missing, or its labels are not of one kind.
        StorageError: The store fails.
    """
    if config.task is None or config.task.kind != "auto":
        return config
    if not config.data.sources:
        require_urls(config, "data.url")
    url = config.data.url or "data.sources"
    labels = labels_of(config.data.url, open_training_data(config))
    own = [row for row in labels if row.get("set") not in config.task.extra_sets]
    task = complete_task(config.task, own, url)
    shown = f"{task.folds} folds by {task.folds_by}" if task.folds else "a fixed split"
    log.info("Task of %s: %s of %s, %s.", url, task.kind, ", ".join(task.names), shown)
    completed = config.model_copy(update={"task": task}).model_dump(mode="json")
    return recipe.from_tables(completed, where=url)  # checks what depends on the kind


def complete_task(task: TaskConfig, labels: Sequence[Labels], where: str) -> TaskConfig:
    """Return a complete task: what is left open follows from the labels.

    Args:
        task: of kind auto.
        labels: of all samples.
        where: the data set, for errors.

    Raises:
        ConfigError: The task's values do not fit the labels.
        ShardError: The labels are not of one kind, or too few to learn from.
    """
    label = task.label if task.label and labels else _label(labels, where)
    kind = "regression" if label.partition(".")[0] == _VALUES else "classification"
    names = task.names or _names(label, labels, where)
    found = {"kind": kind, "label": label, "names": names}
    found |= {"metrics": task.metrics or METRICS[kind]}
    fields = TaskConfig.model_fields
    given = {
        name: value
        for name, value in task
        if name in task.model_fields_set
        and (value != fields[name].default or name == "subject_independent")
    }
    try:
        return TaskConfig(**(_protocol(task, labels, where) | given | found))
    except ValidationError as error:
        raise recipe.explain(error, where, TaskConfig, "task.") from error


def _label(labels: Sequence[Labels], where: str) -> str:
    there = {name: sum(name in row for row in labels) for name in (_CLASS, _VALUES)}
    complete = [name for name, count in there.items() if count == len(labels) > 0]
    if len(complete) != 1:
        found = f"{len(labels)} samples, {there[_CLASS]} with a class, {there[_VALUES]} with values"
        advice = "give task.label, or shard a list with a label or values for each video"
        raise ShardError("Task does not follow from the labels", where, found, advice)
    return complete[0]


def _names(label: str, labels: Sequence[Labels], where: str) -> tuple[str, ...]:
    if label == _VALUES:
        columns = {tuple(row.get(_VALUES, {})) for row in labels}
        if len({frozenset(names) for names in columns}) != 1:
            found = " and ".join(sorted(", ".join(names) for names in columns)[:2])
            advice = "give task.names, dimensions that all samples have"
            raise ShardError("Samples have values of different names", where, found, advice)
        return min(columns)
    counts = Counter(find_label(row, label) for row in labels)
    if not all(isinstance(name, str) for name in counts):
        found = f"{label} = {next(n for n in counts if not isinstance(n, str))!r}"
        advice = "give task.kind and task.names, which a column of numbers needs"
        raise ShardError("Classes have no names", where, found, advice)
    if len(counts) < 2:
        found, advice = f"only {', '.join(map(str, counts))}", "add videos of another class"
        raise ShardError("Data set has fewer than two classes", where, found, advice)
    if rare := [str(name) for name, count in counts.items() if count < FOLDS]:
        log.warning("Classes of %s with fewer than %d samples: %s.", where, FOLDS, ", ".join(rare))
    return tuple(sorted(map(str, counts), key=_in_order))


def _in_order(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _protocol(task: TaskConfig, labels: Sequence[Labels], where: str) -> dict[str, Any]:
    """Return which samples are tested: as the labels say, or in folds that are made."""
    has = {name: all(name in row for row in labels) for name in ("fold", "split", "subject")}
    found: dict[str, Any] = {"subject_independent": has["subject"]}
    if task.folds_by == "labels" and has["fold"]:
        return found | {"folds": max(int(row["fold"]) for row in labels)}
    if task.folds_by == "labels" and has["split"] and not task.folds:
        tested = "test" if any(row["split"] == "test" for row in labels) else "val"
        return found | {"test_splits": (tested,)}
    by = task.folds_by
    if by == "labels":
        by = "subject" if has["subject"] else "sample"
    groups = len({str(row["subject"]) for row in labels}) if has["subject"] else len(labels)
    if by == "sample":
        groups = len(labels)
        log.warning(
            "%s has no column of subjects, so folds are made by sample. A person in several "
            "videos can be in both the training and the test set, which inflates the scores.",
            where,
        )
    if groups < 2:
        advice = f"add more {by}s, or give the list a column of folds or splits"
        raise ShardError(f"Folds need at least two {by}s", where, f"{groups} {by}", advice)
    is_independent = has["subject"] and by == "subject"
    made = {"folds": min(FOLDS, groups), "folds_by": by, "subject_independent": is_independent}
    return found | made
