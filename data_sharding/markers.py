"""Commit markers: `shard-NNNNNN.done.json`, written after its shard, says that it is finished.

A marker lists the videos of its shard, each with the digest of what decided its bytes, the tally of
usable and rejected ones, and the shard's row of the manifest. A resumed sharding skips groups whose
marker matches; the manifest and the list of rejected videos are made from markers alone; and when
videos are added, markers say which ones are old. Nothing in a marker depends on when, where or in
how many attempts the shard was made.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from typing import Any, Protocol

from data_sharding.make_sample import Sample
from data_sharding.plan import Group
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.shards.format import ShardEntry, digest
from svfap_dist.video.probe import Rejected

_NAME = re.compile(r"shard-(\d{6,})\.done\.json")


class ProgressCallback(Protocol):
    """Called as work gets done: units (videos or shards) done, units in all, bad ones."""

    def __call__(self, done: int, total: int | None, rejected: int, /) -> None:
        """See `ProgressCallback`."""
        ...


silent: ProgressCallback = lambda done, total, rejected, /: None  # noqa: E731 - reports nothing


@dataclasses.dataclass
class Tally:
    """How many videos became samples, and how many were rejected."""

    num_samples: int = 0
    seconds: float = 0.0  # of the samples
    shortest: int = 0  # frames of the shortest sample
    num_read: int = 0  # bytes of the samples' files at the source
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)  # rejected videos by reason

    @property
    def num_rejected(self) -> int:
        """Number of rejected videos."""
        return sum(self.reasons.values())

    @property
    def num_videos(self) -> int:
        """Number of all videos."""
        return self.num_samples + self.num_rejected

    def count(self, result: Sample | Rejected) -> None:
        """Add one more video.

        Args:
            result: Outcome of the video.
        """
        if isinstance(result, Rejected):
            self.add(Tally(reasons={result.reason: 1}))
        else:
            frames = result.info.num_frames
            self.add(Tally(1, frames / result.info.fps, frames, result.num_read))

    def add(self, other: Tally) -> None:
        """Add the videos of another tally.

        Args:
            other: Tally to add; unchanged.
        """
        self.num_samples += other.num_samples
        self.seconds += other.seconds
        self.shortest = min(filter(None, (self.shortest, other.shortest)), default=0)
        self.num_read += other.num_read
        counts = collections.Counter(self.reasons) + collections.Counter(other.reasons)
        self.reasons = dict(counts.most_common())


@dataclasses.dataclass(frozen=True)
class Marker:
    """A finished shard."""

    group_digest: str
    entry: ShardEntry | None  # None: no video was usable, so there is no shard
    tally: Tally
    rejected: tuple[dict[str, str], ...]  # rows of the list of rejected videos
    keys: tuple[str, ...]
    digests: tuple[str, ...]


def group_digest(group: Group, options_digest: str) -> str:
    """Return the digest of all that decides a shard's bytes.

    Args:
        group: Its videos, in order.
        options_digest: Digest of the options.
    """
    rows = [options_digest, group.number, group.keys, group.digests]
    return digest(json.dumps(rows).encode())


def marker_name(number: int) -> str:
    """Return the name of a marker.

    Args:
        number: Number of its shard.
    """
    return f"shard-{number:06d}.done.json"


def shard_number(file: str) -> int | None:
    """Return the number of the shard that a file marks, or None if it is not a marker.

    Args:
        file: Its name.
    """
    found = _NAME.fullmatch(file)
    return int(found[1]) if found else None


def store_marker(url: str, number: int, marker: Marker) -> None:
    """Write the marker of a shard whose files are all in place.

    Args:
        url: URL of the data set.
        number: Number of the shard.
        marker: What to write.
    """
    raw = (json.dumps(dataclasses.asdict(marker)) + "\n").encode()
    storage.write_bytes(storage.join(url, marker_name(number)), raw)


def load_marker(url: str, number: int) -> Marker:
    """Read the marker of a shard.

    Args:
        url: URL of the data set.
        number: Number of the shard.

    Raises:
        ShardError: It is malformed.
        StorageMissingError: There is none.
    """
    where = storage.join(url, marker_name(number))
    try:
        fields: dict[str, Any] = json.loads(storage.read_bytes(where))
        entry = fields["entry"] and ShardEntry(**fields["entry"])
        lists = {key: tuple(fields[key]) for key in ("rejected", "keys", "digests")}
        return Marker(**{**fields, **lists, "entry": entry, "tally": Tally(**fields["tally"])})
    except (ValueError, KeyError, TypeError) as error:
        do = "delete that file: its shard is then made again"
        raise ShardError("Unreadable marker of a shard", where, repr(error), do) from error
