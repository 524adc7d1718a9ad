"""Decide which video goes into which shard, before any of them is read.

Videos are shuffled by a hash of seed and key and cut into groups, one per shard, by their number
and known sizes. So the content of a shard does not depend on making the shards before it: every
group can be made alone, anywhere, at any time, with the same result. An unusable video makes its
shard smaller and moves no other.

The list may have millions of rows: it is sorted in a temporary SQLite file, so that memory is
bounded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_sharding import temporary
from data_sharding.sources import SourceVideo
from svfap_dist.errors import ShardError

_OPTIONS_VERSION = 1  # increased if the same options came to mean other bytes
_HEADERS = 4 * 512  # bytes that a sample's tar headers, JSON and padding take, about
_TABLES = """
    create table videos (key text primary key, place blob, size int, digest text, video blob);
    create table kept (key text primary key, digest text) without rowid;
"""


@dataclasses.dataclass(frozen=True)
class Group:
    """The videos of one shard, in order, and the digest of what decides each one's bytes."""

    number: int
    videos: tuple[SourceVideo, ...]
    digests: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the videos, in order."""
        return tuple(video.key for video in self.videos)

    @property
    def name(self) -> str:
        """Name of the shard, without suffix."""
        return f"shard-{self.number:06d}"


class Plan:
    """The videos of a data set, on disk, and their groups.

    Args:
        seed: Seed of the order.
        max_samples: Videos of a group at most.
        max_bytes: Bytes of a group at most, with what a tar adds.
    """

    def __init__(self, seed: int, max_samples: int, max_bytes: int) -> None:
        self._seed, self._max_samples, self._max_bytes = seed, max_samples, max_bytes
        self._db = temporary.database(_TABLES)

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def read(self, videos: Iterable[SourceVideo]) -> int:
        """Add all videos of a source; return their number.

        Args:
            videos: Videos of the source.

        Raises:
            ShardError: Two have the same key.
        """
        insert = "insert into videos values (?,?,?,?,?)"
        latest: SourceVideo | None = None

        def rows() -> Iterator[tuple[str, bytes, int, str, bytes]]:
            nonlocal latest
            for latest in videos:
                yield self._row(latest)

        try:
            with temporary.as_storage_error():
                return self._db.executemany(insert, rows()).rowcount
        except sqlite3.IntegrityError as error:
            assert latest is not None
            fix = "report this as a bug: keys of a source must be unique"
            what, found = "Two videos of the source have the same key", f"key {latest.key}"
            raise ShardError(what, latest.where, found, fix) from error

    def _row(self, video: SourceVideo) -> tuple[str, bytes, int, str, bytes]:
        # A random place that depends on the seed and the key alone, not on the other videos.
        place = hashlib.sha256(f"{self._seed}/{video.key}".encode()).digest()
        about = json.dumps([video.key, video.suffix, video.stamp, video.labels], sort_keys=True)
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        return video.key, place, video.num_bytes, digest, pickle.dumps(video)

    def digest(self, options: Mapping[str, object]) -> str:
        """Return the digest of what decides the bytes of a data set.

        It covers the videos' names, sizes and labels, not the order in which the source lists them.

        Args:
            options: Options of the sharding.
        """
        rows = hashlib.sha256(options_digest(options).encode())
        for (digest,) in self._db.execute("select digest from videos order by key"):
            rows.update(digest.encode())
        return rows.hexdigest()[:16]

    def keep(self, keys: Sequence[str], digests: Sequence[str]) -> None:
        """Mark videos as being in the data set already: they go into no new group.

        Args:
            keys: Keys of the videos.
            digests: Digests of the videos, as in `Group`.
        """
        with temporary.as_storage_error():
            self._db.executemany(
                "insert or ignore into kept values (?,?)", zip(keys, digests, strict=True)
            )

    def forget(self) -> None:
        """Mark all videos as new."""
        self._db.execute("delete from kept")

    def changes(self) -> str:
        """Return how many kept videos the source no longer lists, or lists differently; or ""."""
        # The comparison is null for a video that vanished, true for one that changed.
        joined = "from kept left join videos using (key) where kept.digest is not videos.digest"
        found, changed, example = self._db.execute(
            f"select count(*), count(videos.key), min(key) {joined}"
        ).fetchone()
        if not found:
            return ""
        gone = f"{found - changed} of its videos are gone from the source"
        return f"{gone} and {changed} have changed, such as {example!r}"

    def group(self, number: int, keys: Iterable[str]) -> Group:
        """Return the group of these videos.

        Args:
            number: Number of the group.
            keys: Keys of videos of the source.
        """
        select = "select digest, video from videos where key = ?"
        return _group(number, [self._db.execute(select, [key]).fetchone() for key in keys])

    def new_groups(self, first_number: int) -> Iterator[Group]:
        """Yield the groups of the videos that are not kept.

        Args:
            first_number: Number of the first group.
        """
        rows: list[tuple[str, bytes]] = []
        number, num_bytes = first_number, 0
        with temporary.as_storage_error():
            for size, digest, video in self._db.execute(
                "select size, digest, video from videos "
                "where key not in (select key from kept) order by place, key"
            ):
                size_in_tar = _HEADERS + size
                full = len(rows) == self._max_samples or num_bytes + size_in_tar > self._max_bytes
                if rows and full:
                    yield _group(number, rows)
                    rows, number, num_bytes = [], number + 1, 0
                rows.append((digest, video))
                num_bytes += size_in_tar
        if rows:
            yield _group(number, rows)


def options_digest(options: Mapping[str, object]) -> str:
    """Return the digest of the options that decide the bytes of a data set.

    Args:
        options: Options of the sharding.
    """
    text = json.dumps([_OPTIONS_VERSION, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _group(number: int, rows: Sequence[tuple[str, bytes]]) -> Group:
    videos = tuple(pickle.loads(video) for _, video in rows)  # noqa: S301 - written by `_row`
    return Group(number, videos, tuple(digest for digest, _ in rows))
