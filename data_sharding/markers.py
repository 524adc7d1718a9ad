"""`shard-NNNNNN.done.json`: the word that a shard is finished, written after it.

A marker names the videos its shard was made of, each with the digest of what decided its bytes,
what became of them, and the shard's row of the manifest. A restarted sharding passes over groups
whose marker fits; the manifest and the list of rejected videos are put together from markers alone;
and when new videos come, markers say which ones are old. Nothing in a marker depends on when, where
or in how many attempts the shard was made.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from typing import Any

from data_sharding.examine import Sample
from data_sharding.plan import Group
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.shards.format import ShardEntry, digest
from svfap_dist.video.probe import Rejected

_NAME = re.compile(r"shard-(\d{6,})\.done\.json")


@dataclasses.dataclass
class Tally:
    """What became of videos. seconds: of video in shards; shortest: frames of the shortest there;
    num_read: bytes of the source's files that went into shards."""

    num_samples: int = 0
    seconds: float = 0.0
    shortest: int = 0
    num_read: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_rejected(self) -> int:
        return sum(self.reasons.values())

    @property
    def num_videos(self) -> int:
        return self.num_samples + self.num_rejected

    def count(self, result: Sample | Rejected) -> None:
        """Take one more video in."""
        if isinstance(result, Rejected):
            self.add(Tally(reasons={result.reason: 1}))
        else:
            info = result.info
            seconds = info.num_frames / info.fps
            self.add(Tally(1, seconds, info.num_frames, result.num_read))

    def add(self, other: Tally) -> None:
        """Take another's videos in."""
        self.num_samples += other.num_samples
        self.seconds += other.seconds
        self.shortest = min(filter(None, (self.shortest, other.shortest)), default=0)
        self.num_read += other.num_read
        counts = collections.Counter(self.reasons) + collections.Counter(other.reasons)
        self.reasons = dict(counts.most_common())


@dataclasses.dataclass(frozen=True)
class Marker:
    """A finished shard. entry: None if none of its videos could be used, and there is no shard.
    rejected: rows of the list of rejected videos."""

    group_digest: str
    entry: ShardEntry | None
    tally: Tally
    rejected: tuple[dict[str, str], ...]
    keys: tuple[str, ...]
    digests: tuple[str, ...]


def group_digest(group: Group, options_digest: str) -> str:
    """Digest of all that decides a shard's bytes: its videos, their order, and the options."""
    rows = [options_digest, group.number, group.keys, group.digests]
    return digest(json.dumps(rows).encode())


def name(number: int) -> str:
    """Name of the marker of the shard with this number."""
    return f"shard-{number:06d}.done.json"


def number(file: str) -> int | None:
    """The number of the shard that a file of this name marks; None if it is no marker."""
    found = _NAME.fullmatch(file)
    return int(found[1]) if found else None


def store(url: str, number: int, marker: Marker) -> None:
    """Say that a shard is finished; everything of it must be in place."""
    raw = (json.dumps(dataclasses.asdict(marker)) + "\n").encode()
    storage.write_bytes(storage.join(url, name(number)), raw)


def load(url: str, number: int) -> Marker:
    """The marker of a shard.

    Raises: ShardError if it cannot be understood; StorageError from the store.
    """
    where = storage.join(url, name(number))
    try:
        fields: dict[str, Any] = json.loads(storage.read_bytes(where))
        entry = fields["entry"] and ShardEntry(**fields["entry"])
        lists = {key: tuple(fields[key]) for key in ("rejected", "keys", "digests")}
        return Marker(**{**fields, **lists, "entry": entry, "tally": Tally(**fields["tally"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            "Unreadable marker of a shard", where=where, found=repr(error), do="delete the file"
        ) from error
