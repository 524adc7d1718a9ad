"""Assign samples to folds or splits, and check that a set's own lists agree with each other.

Official lists name, for each fold, the samples to train on and to test on. A shard stores less: the
one fold in which a sample is tested. Both mean the same only if every sample is tested once and
trained on in all other folds, with the same label; anything else is refused here, because it would
silently change the protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from svfap_dist.errors import ShardError

Rows = Sequence[tuple[str, str]]  # a list of a set: names of samples and their labels
_EXAMPLES = 3


def official_folds(
    where: str, lists: Mapping[int, Mapping[str, Rows]]
) -> Iterator[tuple[str, str, int]]:
    """Return (name, label, fold that tests it) of every sample of official folds, by name.

    Args:
        where: Folder of the lists, for the error.
        lists: Rows of `train` and `test` for each fold.

    Raises:
        ShardError: The lists contradict each other; the error has examples.
    """
    labels = _agreed_labels(where, [rows for parts in lists.values() for rows in parts.values()])
    fold_of: dict[str, int] = {}
    for fold, parts in lists.items():
        train, test = ({name for name, _ in parts[part]} for part in ("train", "test"))
        _refuse(where, f"samples in both train and test of fold {fold}", train & test)
        _refuse(where, f"samples tested in fold {fold} and in another", test & fold_of.keys())
        _refuse(where, f"samples absent from fold {fold}", labels.keys() - train - test)
        fold_of.update(dict.fromkeys(test, fold))
    _refuse(where, "samples tested in no fold", labels.keys() - fold_of.keys())
    return ((name, labels[name], fold_of[name]) for name in sorted(labels))


def fixed_splits(where: str, lists: Mapping[str, Rows]) -> Iterator[tuple[str, str, str]]:
    """Return (name, label, split) of every sample of a fixed protocol, by name.

    Args:
        where: Folder of the lists, for the error.
        lists: Rows by split.

    Raises:
        ShardError: A sample is in two splits; the error has examples.
    """
    labels = _agreed_labels(where, list(lists.values()))
    split_of: dict[str, str] = {}
    for split, rows in lists.items():
        names = {name for name, _ in rows}
        _refuse(where, f"samples in {split} and in another split", names & split_of.keys())
        split_of.update(dict.fromkeys(names, split))
    return ((name, labels[name], split_of[name]) for name in sorted(labels))


def block_of(position: int, sizes: Sequence[int]) -> int | None:
    """Return the number, from 1, of the block that contains a position; None if none does.

    Args:
        position: From 0.
        sizes: Sizes of the consecutive blocks.
    """
    if position < 0:
        return None
    for number, size in enumerate(sizes, start=1):
        if position < size:
            return number
        position -= size
    return None


def _agreed_labels(where: str, lists: Sequence[Rows]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for rows in lists:
        two = {name for name, label in rows if labels.setdefault(name, label) != label}
        _refuse(where, "samples with two labels", two)
    return labels


def _refuse(where: str, what: str, names: Collection[str]) -> None:
    if names:
        found = f"{len(names)} {what}, such as {', '.join(sorted(names)[:_EXAMPLES])}"
        fix = "get the lists from the data set's authors again"
        raise ShardError("Lists of the data set contradict each other", where, found, fix)
