"""Any labeled set: a list of videos with a label or values each, and perhaps subjects and folds.

INPUT is the list, a text file whose first row names its columns. Fields are separated by commas,
semicolons or tabs, whichever the first row has. A path is relative to the list's folder, or to
another one, such as the output of `svfap faces`, whose crops are found by the names of their
videos. It may also be a folder of frames.

A list is written by hand or by a spreadsheet, so what is wrong is reported with its lines, before
any video is read: an invalid row rejects the list; rows without a label or a file are
left out and listed among the rejected videos.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from data_sharding.sources import Columns, Labels, SourceVideo
from data_sharding.sources.labeled import Place, find_clips
from data_sharding.sources.listing import Keys, check_folder, printable_key, video_file
from data_sharding.sources.user_list import (
    FileSizes,
    Problems,
    folder_of_list,
    name_lines,
    path_below,
    read_list,
)
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError, nearest
from svfap_dist.video.names import is_video

log = logging.getLogger(__name__)

SET = "csv"  # `task.set` of a recipe for such a set
DELIMITERS = (",", ";", "\t")
_LONGEST_FIELD = 1 << 16  # characters; a quote that is never closed swallows the rest of the list


class _Row(NamedTuple):
    """A row of the list, checked."""

    line: int  # of the file, from 1
    path: str  # below the folder of the videos
    labels: Labels | None  # None: the row has no label
    empty: str = ""  # the column whose field is empty, if there is no label


def samples(text: str, columns: Columns | None = None) -> Iterator[SourceVideo]:
    """See `Source.samples`; key: the path without its suffix.

    Args:
        text: Path or URL of the list.
        columns: Names of its columns, and the folder of the videos; None: the usual ones.

    Raises:
        ConfigError: There is no such list or folder, or the columns contradict each other.
        ShardError: The list cannot be read, or has invalid rows.
    """
    columns = columns or Columns()
    header, rows = _read_table(text, columns)
    used = _used_columns(text, header, columns)
    folder = columns.videos or folder_of_list(text)
    check_folder(folder)
    checked = _without_duplicates(text, _check_rows(text, folder, header, rows, used))
    return _as_samples(text, folder, checked)


def _read_table(where: str, columns: Columns) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and the other rows of a list, each with the number of its first line."""
    if not storage.is_remote(where) and os.path.isdir(storage.local_path(where)):
        fix = "give the list itself, such as labels.csv in this folder"
        raise ConfigError("INPUT is not a list", where, "a folder", fix)
    text = read_list(where)
    delimiter = _delimiter(text, columns.path)
    # Universal line ends, kept inside quotes; `strict` refuses quotes that do not match.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for row in reader:
            if any(field.strip() for field in row):
                if (longest := max(map(len, row))) > _LONGEST_FIELD:
                    raise csv.Error(f"a field of {longest} characters")
                rows.append((begin, [field.strip() for field in row]))
            begin = reader.line_num + 1
    except csv.Error as error:
        fix = 'close quotes at the end of their field, and write "" for one inside'
        where = f"{where}, line {begin}"
        raise ShardError("List cannot be read", where, str(error), fix) from error
    if len(rows) < 2:
        found = "a header and no rows" if rows else "an empty file"
        fix = f"give a header such as {columns.path},label and a row for each video"
        raise ShardError("List has no rows", where, found, fix)
    (_, header), *rest = rows
    return header, rest


def _delimiter(text: str, path_column: str) -> str:
    """Return what separates the header's fields: where it has a path column, else most fields."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    splits = {mark: next(csv.reader([first], delimiter=mark), []) for mark in DELIMITERS}
    wanted = path_column.casefold()
    return max(
        DELIMITERS,
        key=lambda mark: (
            wanted in [field.strip().casefold() for field in splits[mark]],
            len(splits[mark]),
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Used:
    """Positions of the columns in a row; None: the list has no such column."""

    path: int
    label: int | None
    values: Mapping[str, int]
    subject: int | None
    fold: int | None
    split: int | None


def _used_columns(where: str, header: Sequence[str], columns: Columns) -> _Used:
    """Return where the columns are, after checking that there are enough and not too many."""
    names = [name.casefold() for name in header]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        fix = "give each column a name of its own"
        raise ShardError("List has two columns of one name", f"{where}, header", twice[0], fix)
    usual = Columns()

    def position(name: str, option: str, needed: bool) -> int | None:
        if name.casefold() in names and name:
            return names.index(name.casefold())
        if not needed:
            return None
        fix = f"{nearest(name, header)} ({option} names the column)"
        found = f"no column {name!r} among {', '.join(header)}"
        raise ShardError("List lacks a column", f"{where}, header", found, fix)

    def optional(field: str) -> int | None:
        name = getattr(columns, field)
        chosen = name not in ("", getattr(usual, field))
        return position(name, f"--{field}-column", chosen)

    path = position(columns.path, "--path-column", True)
    assert path is not None
    values = {
        name: position(name, "--value-columns", True) or 0 for name in dict.fromkeys(columns.values)
    }
    label = None if values and columns.label == usual.label else optional("label")
    fold, split = optional("fold"), optional("split")
    if values and label is not None:
        found, fix = "--label-column and --value-columns", "give one of them"
        raise ConfigError("Both a label and values are given", where, found, fix)
    if not values and label is None:
        found = f"columns {', '.join(header)}"
        fix = "name the column of the class with --label-column, or those of numbers with "
        fix += "--value-columns A,B"
        raise ShardError("List has no labels", f"{where}, header", found, fix)
    if fold is not None and split is not None:
        found = f"{header[fold]} and {header[split]}"
        fix = 'turn one off: --fold-column "" or --split-column ""'
        raise ShardError("List has both folds and splits", f"{where}, header", found, fix)
    used = _Used(path, label, values, optional("subject"), fold, split)
    taken = {path, label, *values.values(), used.subject, fold, split}
    if unused := [name for place, name in enumerate(header) if place not in taken]:
        log.warning("Columns of %s that are not used: %s.", where, ", ".join(unused))
    return used


def _check_rows(
    where: str,
    folder: str,
    header: Sequence[str],
    rows: Sequence[tuple[int, list[str]]],
    used: _Used,
) -> list[_Row]:
    """Return the rows with their labels, or refuse the list for the first kind of mistake."""
    kind = functools.partial(Problems, where)
    width = kind(
        "Row has another number of fields than the header",
        f"give each row {len(header)} fields, and quote fields that have the separator in them",
    )
    no_path = kind("Row has no path", "give the path of its video, or remove the row")
    unsafe = kind(
        "Path leads out of the folder of the videos",
        f"give paths below {folder}, or another folder with --videos",
    )
    unprintable = kind("Path has a character that cannot be printed", "remove it from the path")
    number = kind(
        "Value is not a number",
        "write a finite number with a decimal point; leave the field empty to leave the row out",
    )
    no_subject = kind("Row has no subject", 'fill it in, or use --subject-column ""')
    bad_fold = kind("Fold is not a number from 1", "count the folds 1, 2, 3, ...")
    no_split = kind("Row has no split", "write train, val or test")
    checked: list[_Row] = []
    for line, fields in rows:
        if len(fields) != len(header):
            width.add(line, f"{len(fields)} fields, the header has {len(header)}")
            continue
        path = path_below(folder, fields[used.path])
        if not fields[used.path]:
            no_path.add(line, f"{header[used.path]} is empty")
        elif path is None:
            if fields[used.path].isprintable():
                unsafe.add(line, fields[used.path])
            else:
                unprintable.add(line, repr(fields[used.path]))
        subject = None if used.subject is None else fields[used.subject]
        split = None if used.split is None else fields[used.split]
        fold = None if used.fold is None else fields[used.fold]
        if subject == "":
            no_subject.add(line, "an empty field")
        if split == "":
            no_split.add(line, "an empty field")
        if fold is not None and not _is_fold(fold):
            bad_fold.add(line, f"{header[used.fold or 0]} = {fold or 'an empty field'}")
        texts = {name: fields[place] for name, place in used.values.items() if fields[place]}
        numbers = {name: _number(text) for name, text in texts.items()}
        values = {name: value for name, value in numbers.items() if value is not None}
        if strange := texts.keys() - values.keys():
            number.add(line, f"{min(strange)} = {texts[min(strange)]}")
        label = None if used.label is None else fields[used.label]
        names = [header[used.label]] if used.label is not None else list(used.values)
        empty = next((n for n in names if not (label if label is not None else n in values)), "")
        if path is None:
            continue
        labels = Labels(
            set=SET,
            subject=subject,
            class_name=label,
            values=values or None,
            fold=int(fold) if fold and _is_fold(fold) else None,
            split=split,
        )
        checked.append(_Row(line, path, None if empty else labels, empty))
    for problems in (width, no_path, unsafe, unprintable, number, no_subject, bad_fold, no_split):
        problems.refuse()
    return checked


def _is_fold(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _without_duplicates(where: str, rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows with each path once; refuse paths with two different labels."""
    first: dict[str, _Row] = {}
    same: list[int] = []
    fix = "keep one row for each video"
    conflicts = Problems(where, "A video has two labels", fix)
    for row in rows:
        known = first.setdefault(row.path, row)
        if known is not row and known.labels == row.labels:
            same.append(row.line)
        elif known is not row:
            conflicts.add(row.line, f"{row.path}, which line {known.line} labels differently")
    conflicts.refuse()
    if same:
        log.warning("Rows of %s that repeat another one count once: %s.", where, name_lines(same))
    return list(first.values())


def _as_samples(where: str, folder: str, rows: Sequence[_Row]) -> Iterator[SourceVideo]:
    find = _Files(folder).find
    videos = {row.path: find(row.path) for row in rows}
    if all(video is None for video in videos.values()):
        found = f"none of {len(rows)} files, such as {storage.join(folder, rows[0].path)}"
        fix = "check the paths, or give the folder they are relative to with --videos"
        raise ShardError("No listed video exists", where, found, fix)
    _refuse_shared_files(where, rows, videos)
    if all(row.labels is None for row in rows):
        found = f"no {rows[0].empty} in any of {len(rows)} rows"
        raise ShardError("List has no labels", where, found, "fill in that column")
    _warn_of_left_out(where, rows, videos)
    return _labeled(folder, rows, videos)


def _refuse_shared_files(
    where: str, rows: Sequence[_Row], videos: Mapping[str, SourceVideo | None]
) -> None:
    """Refuse a list in which one crop is found for two videos, such as x.avi and x.mp4."""
    first: dict[str, _Row] = {}
    fix = "rename one of the videos, and run `svfap faces` again"
    shared = Problems(where, "Two rows have the same file", fix)
    for row in rows:
        video = videos[row.path]
        if video is not None and (known := first.setdefault(video.where, row)) is not row:
            shared.add(row.line, f"{video.where} for {row.path} and for line {known.line}")
    shared.refuse()


def _labeled(
    folder: str, rows: Sequence[_Row], videos: Mapping[str, SourceVideo | None]
) -> Iterator[SourceVideo]:
    keys = Keys()
    for row in sorted(rows, key=lambda row: row.path):
        key = keys.assign(os.path.splitext(row.path)[0], row.path)
        video = videos[row.path]
        if video is None:
            reason = "no such file" if is_video(row.path) else "no video, by its suffix, or frames"
            yield video_file(folder, row.path, 0, key, misfit=f"line {row.line}: {reason}")
        elif row.labels is None:
            yield dataclasses.replace(video, key=key, misfit=f"line {row.line}: no {row.empty}")
        else:
            yield dataclasses.replace(video, key=key, labels=row.labels.as_dict())


def _warn_of_left_out(
    where: str, rows: Sequence[_Row], videos: Mapping[str, SourceVideo | None]
) -> None:
    for what, lines in (
        ("Rows of %s without a label are left out: %s.", [r.line for r in rows if not r.labels]),
        (
            "Files of %s that are not there, or are no videos, are left out: %s.",
            [r.line for r in rows if not videos[r.path]],
        ),
    ):
        if lines:
            log.warning(what, where, name_lines(lines))


class _Files:
    """Finds the video, or folder of frames, that a path of the list names.

    Args:
        folder: Folder or prefix of the videos.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._sizes = FileSizes(folder)

    def find(self, path: str) -> SourceVideo | None:
        """Return the video, without key and labels; None if there is none.

        Args:
            path: Path below the folder.
        """
        if is_video(path):
            crop = f"{printable_key(os.path.splitext(path)[0])}.mp4"  # of `svfap faces`
            for name in (path, crop):
                if (size := self._sizes.find(name)) is not None:
                    return video_file(self._folder, name, size)
            return None
        return find_clips(self._folder, [Place(path, "frames")]).get("")
