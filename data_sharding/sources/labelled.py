"""What is on disk meets what the labels say: shared by the sources of labelled sets.

Both sides are keyed by the sample's name in its set. A sample needs both: what has no label, or a
label and no video, is yielded as a misfit, so that it is listed among the videos left out. Only
where nothing at all fits is the folder refused.

A medium is a video file, or a folder of frames, which its `read` turns into a video (`frames`). A
tree of frames has millions of files; it is listed once, as a stream, and of each clip the names of
its frames are kept as one string.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import itertools
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from data_sharding import temporary
from data_sharding.frames import ENCODER, FPS, FRAME_SUFFIXES, SUFFIX, natural_order, read_frames
from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.listing import (
    Found,
    Keys,
    Listing,
    as_samples,
    check_folder,
    is_video,
    list_videos,
    suffix_of,
)
from svfap_dist import storage
from svfap_dist.errors import ShardError


@dataclasses.dataclass(frozen=True, slots=True)
class Medium:
    """A video file or a folder of frames; fields as of `SourceVideo`."""

    where: str
    read: Callable[[], bytes]
    suffix: str
    stamp: str
    num_bytes: int

    def sample(self, key: str, labels: Labels | None, misfit: str = "") -> SourceVideo:
        """This medium as a sample."""
        columns = labels.as_dict() if labels else {}
        return SourceVideo(
            key, self.read, columns, self.where, self.suffix, self.stamp, misfit, self.num_bytes
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder below INPUT where a set keeps its clips."""

    path: str
    kind: Literal["frames", "videos"]


def media_of(folder: str, places: Sequence[Place]) -> dict[str, Medium]:
    """Clips of the first of `places` that holds any, by path below it, a video's without suffix.

    Raises: ConfigError if there is no such local folder; StorageError from the store.
    """
    check_folder(folder)
    for place in places:
        url = storage.join(folder, place.path)
        media = _frame_folders(url) if place.kind == "frames" else _video_files(url)
        if media:
            return media
    return {}


def add(media: dict[str, Medium], name: str, path: str, medium: Medium) -> None:
    """Put a medium under its sample's name; another of that name keeps its path, which has no
    label, so that it is listed as a stray."""
    media[path if name in media else name] = medium


def _video_files(url: str) -> dict[str, Medium]:
    media: dict[str, Medium] = {}
    for path, size in sorted(storage.walk_files(url)):
        if is_video(path):
            add(media, os.path.splitext(path)[0], path, video_file(url, path, size))
    return media


def video_file(folder: str, path: str, size: int) -> Medium:
    """The medium of a video file below `folder`."""
    url = storage.join(folder, path)
    return Medium(url, functools.partial(storage.read_bytes, url), suffix_of(path), str(size), size)


def _frame_folders(url: str) -> dict[str, Medium]:
    frames = (
        (path.removesuffix(name := os.path.basename(path)), name, size)
        for path, size in storage.walk_files(url)
        if suffix_of(path) in FRAME_SUFFIXES and not os.path.basename(path).startswith(".")
    )
    # By folder, with its slash: to a store, `a//1.jpg` and `a/1.jpg` are in two folders.
    packed: dict[str, str] = {}  # "1.jpg:123/2.jpg:456": a tenth of what tuples would take
    for place, files in itertools.groupby(frames, key=lambda file: file[0]):
        more = "/".join(f"{file}:{size}" for _, file, size in files)
        packed[place] = f"{packed[place]}/{more}" if place in packed else more
    media: dict[str, Medium] = {}
    for place in list(packed):
        medium = _frames(storage.join(url, place), packed.pop(place))
        add(media, place.removesuffix("/"), place, medium)
    return media


def _frames(url: str, packed: str) -> Medium:
    files = sorted(packed.split("/"), key=natural_order)
    content = hashlib.sha256(os.fsencode(repr((ENCODER, FPS, files))))
    names, _, sizes = zip(*(file.rpartition(":") for file in files), strict=True)
    read = functools.partial(read_frames, url, "/".join(names))
    return Medium(
        url.removesuffix("/"), read, SUFFIX, content.hexdigest()[:16], sum(map(int, sizes))
    )


def join(
    source: str, folder: str, media: Mapping[str, Medium], labels: Mapping[str, Labels], layout: str
) -> Iterator[SourceVideo]:
    """Samples, in order of name, for what is on disk and what is labelled.

    Args:
        source: name of the source; layout: what `folder` should hold, for the error.

    Raises: ShardError if no clip on disk has a label.
    """
    if not media.keys() & labels.keys():
        on_disk, listed = _in_words(media, "clips"), _in_words(labels, "labels")
        raise not_the_layout(source, folder, f"{on_disk} and {listed}, none for the other", layout)
    return _joined(folder, media, labels)


def _in_words(names: Mapping[str, Any], what: str) -> str:
    return f"{len(names)} {what}" + (f" such as {min(names)}" if names else "")


def _joined(
    folder: str, media: Mapping[str, Medium], labels: Mapping[str, Labels]
) -> Iterator[SourceVideo]:
    keys = Keys()
    for name in sorted(media.keys() | labels.keys()):
        key, medium, said = keys.give(name, name), media.get(name), labels.get(name)
        if medium is None:
            url = storage.join(folder, name)
            missing = functools.partial(storage.read_bytes, url)
            yield SourceVideo(key, missing, {}, url, misfit="labelled, but not there")
            continue
        yield medium.sample(key, said, "" if said else "in none of the set's lists")


def labelled_by_path(
    source: str,
    folder: str,
    parse: Callable[[str], tuple[str, Labels] | str],
    layout: str,
    preferred: Callable[[str], bool] = lambda _: True,
) -> Iterator[SourceVideo]:
    """Samples of a set whose labels are in the paths of its videos, in order of path.

    Args:
        parse: path -> name of the sample and labels, or why it is left out.
        layout: what `folder` should hold, for the error.
        preferred: which file to take where several give the same sample; else the first.

    Raises: ShardError if no video is in the layout; ConfigError, StorageError as `list_videos`.
    """
    videos = list_videos(folder)
    chosen = temporary.database(_CHOSEN)
    with temporary.explained():
        for path, _ in videos:  # in order of path: of equals the first stays
            if not isinstance(found := parse(path), str):
                chosen.execute(_CHOOSE, [found[0], os.fsencode(path), not preferred(path)])
    if not chosen.execute("select exists (select * from chosen)").fetchone()[0]:
        found = f"{len(videos)} videos, such as {videos.first()}"
        raise not_the_layout(source, folder, found, layout)
    return as_samples(folder, _by_path(videos, parse, chosen))


_CHOSEN = "create table chosen (name text primary key, path blob, is_other int) without rowid"
_CHOOSE = """
    insert into chosen values (?,?,?) on conflict (name) do update
    set path = excluded.path, is_other = 0 where excluded.is_other < is_other
"""


def _by_path(
    videos: Listing, parse: Callable[[str], tuple[str, Labels] | str], chosen: sqlite3.Connection
) -> Iterator[Found]:
    for path, size in videos:
        name, found = os.path.splitext(path)[0], parse(path)
        if isinstance(found, str):
            yield Found(path, size, name, {}, found)
            continue
        ((taken,),) = chosen.execute("select path from chosen where name = ?", [found[0]])
        if taken != os.fsencode(path):
            misfit = f"the same sample as {os.fsdecode(taken)}"
            yield Found(path, size, name, {}, misfit)
        else:
            yield Found(path, size, found[0], found[1].as_dict())


def not_the_layout(source: str, where: str, found: str, layout: str) -> ShardError:
    """The error for an INPUT that is not as `source` knows its set."""
    advice = f"check that it is the right folder; expected: {layout} (see docs/datasets.md)"
    return ShardError(f"Not the layout of {source}", where=where, found=found, do=advice)


def read_rows(
    source: str, folder: str, path: str, delimiter: str, num_columns: int | None = None
) -> list[list[str]]:
    """Rows of a list below `folder`, without empty ones; fields without blanks around them.

    Args:
        num_columns: how many a row must have; None: as many as it likes.

    Raises: ShardError if there is no such list or it is not of this form; StorageError.
    """
    where = storage.join(folder, path)
    try:
        text = storage.read_bytes(where).decode("utf-8-sig")
    except storage.StorageMissingError as error:
        raise not_the_layout(source, where, "no such file", path) from error
    except UnicodeDecodeError as error:
        raise not_the_layout(source, where, f"no text ({error})", path) from error
    lines = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    rows = [[field.strip() for field in line] for line in lines if any(map(str.strip, line))]
    for row in rows:
        if num_columns is not None and len(row) != num_columns:
            found = f"{len(row)} columns in the row {delimiter.join(row)!r}, not {num_columns}"
            raise not_the_layout(source, where, found, path)
    return rows
