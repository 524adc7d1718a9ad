"""Join the clips on disk with their labels: shared by the sources of labeled sets.

In: clips and `Labels`, both keyed by the sample's name in its set. Out: the clips with key and
labels. A clip without a label, or a label without a clip, is yielded as a misfit, so that it is
listed among the rejected videos. The folder is refused only if nothing fits.

A clip is a video file, or a folder of frames, which its `read` turns into a video (`frames`). A
tree of frames has millions of files; it is listed once, as a stream, and the names of a clip's
frames are kept as one string.
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
from typing import Literal

from data_sharding import temporary
from data_sharding.frames import ENCODER, FPS, FRAME_SUFFIXES, SUFFIX, natural_order, read_frames
from data_sharding.sources import SOURCES, Labels, SourceVideo
from data_sharding.sources.listing import (
    Found,
    Keys,
    Listing,
    as_videos,
    check_folder,
    list_videos,
    video_file,
)
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.text_file import SAVE_AS_UTF8, decode_text
from svfap_dist.video.names import is_video, suffix_of

_CHOSEN = "create table chosen (name text primary key, path blob, is_other int) without rowid"
_CHOOSE = """
    insert into chosen values (?,?,?) on conflict (name) do update
    set path = excluded.path, is_other = 0 where excluded.is_other < is_other
"""


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder below INPUT where a set keeps its clips, as video files or as folders of frames."""

    path: str
    kind: Literal["frames", "videos"]


def find_clips(folder: str, places: Sequence[Place]) -> dict[str, SourceVideo]:
    """Return the clips of the first place that has any, by path below it without suffix.

    They have no keys and labels yet: `join_labels` adds them.

    Args:
        folder: INPUT.
        places: Where to look, in this order.

    Raises:
        ConfigError: There is no such local folder.
    """
    check_folder(folder)
    for place in places:
        url = storage.join(folder, place.path)
        clips = _frame_folders(url) if place.kind == "frames" else _video_files(url)
        if clips:
            return clips
    return {}


def add_clip(clips: dict[str, SourceVideo], name: str, path: str, clip: SourceVideo) -> None:
    """Add a clip under its name, or under its path, which has no label, if the name is in use.

    Args:
        clips: Dictionary to add to.
        name: The sample's name in its set.
        path: Path below INPUT.
        clip: The clip.
    """
    clips[path if name in clips else name] = clip


def _video_files(url: str) -> dict[str, SourceVideo]:
    clips: dict[str, SourceVideo] = {}
    for path, size in sorted(storage.walk_files(url)):
        if is_video(path):
            add_clip(clips, os.path.splitext(path)[0], path, video_file(url, path, size))
    return clips


def _frame_folders(url: str) -> dict[str, SourceVideo]:
    frames = (
        (path.removesuffix(name := os.path.basename(path)), name, size)
        for path, size in storage.walk_files(url)
        if suffix_of(path) in FRAME_SUFFIXES and not os.path.basename(path).startswith(".")
    )
    # By folder, with its slash: in a store, `a//1.jpg` and `a/1.jpg` are in two folders.
    packed: dict[str, str] = {}  # "1.jpg:123/2.jpg:456": a tenth of the memory of tuples
    for place, files in itertools.groupby(frames, key=lambda file: file[0]):
        more = "/".join(f"{file}:{size}" for _, file, size in files)
        packed[place] = f"{packed[place]}/{more}" if place in packed else more
    clips: dict[str, SourceVideo] = {}
    for place in list(packed):
        clip = _frame_folder(storage.join(url, place), packed.pop(place))
        add_clip(clips, place.removesuffix("/"), place, clip)
    return clips


def _frame_folder(url: str, packed: str) -> SourceVideo:
    files = sorted(packed.split("/"), key=natural_order)
    stamp = hashlib.sha256(os.fsencode(repr((ENCODER, FPS, files)))).hexdigest()[:16]
    names, _, sizes = zip(*(file.rpartition(":") for file in files), strict=True)
    read = functools.partial(read_frames, url, "/".join(names))
    num_bytes = sum(map(int, sizes))
    return SourceVideo(
        "", read, {}, url.removesuffix("/"), SUFFIX, stamp=stamp, num_bytes=num_bytes
    )


def join_labels(
    source: str, folder: str, clips: Mapping[str, SourceVideo], labels: Mapping[str, Labels]
) -> Iterator[SourceVideo]:
    """Return samples, in order of name, for all clips on disk and all labels.

    Args:
        source: Name of the source.
        folder: INPUT.
        clips: Clips on disk, by the sample's name.
        labels: Labels, by the sample's name.

    Raises:
        ShardError: No clip on disk has a label.
    """
    if not clips.keys() & labels.keys():
        on_disk, listed = (
            f"{len(names)} {what}" + (f" such as {min(names)}" if names else "")
            for names, what in ((clips, "clips"), (labels, "labels"))
        )
        raise layout_error(source, folder, f"{on_disk} and {listed}, none for the other")
    return _joined(folder, clips, labels)


def _joined(
    folder: str, clips: Mapping[str, SourceVideo], labels: Mapping[str, Labels]
) -> Iterator[SourceVideo]:
    keys = Keys()
    for name in sorted(clips.keys() | labels.keys()):
        key, clip, found = keys.assign(name, name), clips.get(name), labels.get(name)
        if clip is None:
            url = storage.join(folder, name)
            missing = functools.partial(storage.read_bytes, url)
            yield SourceVideo(key, missing, {}, url, misfit="labeled, but not there")
        elif found is None:
            yield dataclasses.replace(clip, key=key, misfit="in none of the set's lists")
        else:
            yield dataclasses.replace(clip, key=key, labels=found.as_dict())


def labeled_by_path(
    source: str,
    folder: str,
    parse: Callable[[str], tuple[str, Labels] | str],
    preferred: Callable[[str], bool] = lambda _: True,
) -> Iterator[SourceVideo]:
    """Return the samples of a set whose labels are in its paths, in order of path.

    Args:
        source: Name of the source.
        folder: INPUT.
        parse: Path -> name of the sample and its labels, or why it is rejected; "": the path is not
            in the layout.
        preferred: Which file to read where several are the same sample; default: the first.

    Raises:
        ShardError: No video is in the layout, or there is none.
        ConfigError: There is no such folder.
    """
    videos = list_videos(folder)
    chosen = temporary.database(_CHOSEN)
    with temporary.as_storage_error():
        for path, _ in videos:  # in order of path: of equals the first stays
            if not isinstance(found := parse(path), str):
                chosen.execute(_CHOOSE, [found[0], os.fsencode(path), not preferred(path)])
    if not chosen.execute("select exists (select * from chosen)").fetchone()[0]:
        found = f"{len(videos)} videos, such as {videos.first()}"
        raise layout_error(source, folder, found)
    return as_videos(folder, _by_path(source, videos, parse, chosen))


def _by_path(
    source: str,
    videos: Listing,
    parse: Callable[[str], tuple[str, Labels] | str],
    chosen: sqlite3.Connection,
) -> Iterator[Found]:
    for path, size in videos:
        name, found = os.path.splitext(path)[0], parse(path)
        if isinstance(found, str):
            yield Found(path, size, name, {}, found or f"not at {SOURCES[source].input}")
            continue
        ((taken,),) = chosen.execute("select path from chosen where name = ?", [found[0]])
        if taken != os.fsencode(path):
            misfit = f"the same sample as {os.fsdecode(taken)}"
            yield Found(path, size, name, {}, misfit)
        else:
            yield Found(path, size, found[0], found[1].as_dict())


def layout_error(source: str, where: str, found: str, expected: str = "") -> ShardError:
    """Return the error for an INPUT that is not in the layout of its source.

    Args:
        source: Name of the source.
        where: Folder or list.
        found: What is there.
        expected: What should be there; "": the layout in `SOURCES`.
    """
    expected = expected or SOURCES[source].input
    advice = f"check that it is the right folder; expected: {expected} (see docs/datasets.md)"
    return ShardError(f"Not the layout of {source}", where=where, found=found, do=advice)


def read_rows(
    source: str, folder: str, path: str, delimiter: str, num_columns: int | None = None
) -> list[list[str]]:
    """Return the rows of a list, without empty ones; fields are stripped.

    Args:
        source: Name of the source, for the error.
        folder: INPUT.
        path: Path of the list below it.
        delimiter: Between fields.
        num_columns: Columns that every row must have; None: any number.

    Raises:
        ShardError: There is no such list, or it is not of this form.
    """
    where = storage.join(folder, path)
    try:
        text = decode_text(storage.read_bytes(where))
    except storage.StorageMissingError as error:
        raise layout_error(source, where, "no such file", path) from error
    except ValueError as error:
        raise ShardError("List is not UTF-8 text", where, str(error), SAVE_AS_UTF8) from error
    lines = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    try:
        rows = [[field.strip() for field in line] for line in lines if any(map(str.strip, line))]
    except csv.Error as error:
        raise layout_error(source, where, str(error), path) from error
    for row in rows:
        if num_columns is not None and len(row) != num_columns:
            found = f"{len(row)} columns in the row {delimiter.join(row)!r}, not {num_columns}"
            raise layout_error(source, where, found, path)
    return rows
