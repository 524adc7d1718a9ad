"""Which fold or split a sample belongs to, and whether a set's own lists agree with each other.

Official lists name, for each fold, the samples to train on and to test on. What the shards carry is
shorter: the one fold in which a sample is tested. The two say the same exactly when every sample is
tested once and trained on in all other folds, with the same label; anything else is refused here,
because it would silently change the protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from svfap_dist.errors import ShardError

Rows = Sequence[tuple[str, str]]  # a list of a set: names of samples and their labels
_EXAMPLES = 3


def official(where: str, lists: Mapping[int, Mapping[str, Rows]]) -> Iterator[tuple[str, str, int]]:
    """(name, label, fold in which it is tested) of every sample of official folds, by name.

    Args:
        where: for messages, the folder of the lists.
        lists: rows of `train` and `test` for each fold.

    Raises: ShardError, with examples, if the lists contradict each other.
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


def fixed(where: str, lists: Mapping[str, Rows]) -> Iterator[tuple[str, str, str]]:
    """(name, label, split) of every sample of a fixed protocol, by name; `lists`: rows by split.

    Raises: ShardError, with examples, if a sample is in two splits.
    """
    labels = _agreed_labels(where, list(lists.values()))
    split_of: dict[str, str] = {}
    for split, rows in lists.items():
        names = {name for name, _ in rows}
        _refuse(where, f"samples in {split} and in another split", names & split_of.keys())
        split_of.update(dict.fromkeys(names, split))
    return ((name, labels[name], split_of[name]) for name in sorted(labels))


def block_of(position: int, sizes: Sequence[int]) -> int | None:
    """Number, from 1, of the block that holds `position` (from 0) when blocks of `sizes` follow
    each other; None if it lies outside of all."""
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
        examples = ", ".join(sorted(names)[:_EXAMPLES])
        raise ShardError(
            "Lists of the data set contradict each other",
            where=where,
            found=f"{len(names)} {what}, such as {examples}",
            do="get the lists from the data set's authors again",
        )
