"""Describe a data set: exact counts and sizes, and statistics of some of its videos.

The manifest and the indexes have counts, sizes and labels. Resolution, codec and frame rate are in
each sample's JSON, which is read for evenly spaced samples: all of a small set, some hundreds of a
large one, one short ranged read each.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import tarfile
from collections.abc import Iterable
from typing import Any

from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.video.info import VideoInfo, load_info

_LOOK_AT = 256  # samples
_PEEK_BYTES = 8192  # the JSON is the first member of a sample


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A data set in numbers."""

    url: str
    source: str
    profile: str
    fingerprint: str
    num_shards: int
    num_samples: int
    num_bytes: int
    num_frames: int
    shortest_frames: int
    longest_frames: int
    seconds: float  # exact if all videos have the frame rates of those looked at
    num_looked_at: int
    resolutions: dict[str, int]
    frame_rates: dict[str, int]
    codecs: dict[str, int]
    num_variable_rate: int
    labels: dict[str, dict[str, int]]  # samples by class, fold, split, ..., of labeled sets
    num_subjects: int  # 0 if unknown
    region: str  # stored part of the frames, of profile train; "": whole frames

    def lines(self) -> list[str]:
        """Return the lines that the command prints."""

        def table(counts: dict[str, int]) -> str:
            return ", ".join(f"{name} ({count})" for name, count in counts.items())

        look = "all" if self.num_looked_at == self.num_samples else f"{self.num_looked_at} samples"
        mean = self.num_frames / self.num_samples
        stored = f", region {self.region}" if self.region else ""
        return [
            f"{self.url}: source {self.source}, profile {self.profile}{stored}, {self.fingerprint}",
            f"samples      {self.num_samples} in {self.num_shards} shards",
            f"bytes        {self.num_bytes} ({self.num_bytes / self.num_samples:.0f} a sample)",
            f"video        {self.seconds / 3600:.3f} hours, {self.num_frames} frames",
            f"length       {self.shortest_frames} to {self.longest_frames} frames, mean {mean:.1f}",
            f"resolution   {table(self.resolutions)}",
            f"frame rate   {table(self.frame_rates)}, {self.num_variable_rate} variable",
            f"codec        {table(self.codecs)}",
            f"(the last three lines: {look})",
            *(f"{column:12} {table(counts)}" for column, counts in self.labels.items()),
            *([f"subjects     {self.num_subjects}"] if self.num_subjects else []),
        ]


def show(url: str) -> Statistics:
    """Return statistics of a data set.

    Args:
        url: URL of the data set.

    Raises:
        ShardError: It is incomplete or damaged.
    """
    manifest = shard_format.load_manifest(url)
    shard_format.check_shards(url, manifest)
    lengths: list[int] = []
    infos: list[VideoInfo] = []
    labels: list[dict[str, Any]] = []
    # Every n-th sample, counted through all shards.
    every = -(-manifest.num_samples // _LOOK_AT)
    wanted = itertools.count(0, every)
    following = next(wanted)
    for entry in manifest.shards:
        index = shard_format.load_index(url, entry)
        while following < len(lengths) + len(index.keys):
            row = following - len(lengths)
            where = storage.join(url, entry.name)
            infos.append(_peek(where, index.offsets[row], index.sizes[row]))
            following = next(wanted)
        lengths += index.num_frames
        labels += index.labels
    frames_looked_at = sum(info.num_frames for info in infos)
    seconds_looked_at = sum(info.num_frames / info.fps for info in infos)
    return Statistics(
        url=url,
        source=manifest.source,
        profile=manifest.profile,
        fingerprint=manifest.fingerprint,
        num_shards=len(manifest.shards),
        num_samples=manifest.num_samples,
        num_bytes=sum(entry.num_bytes for entry in manifest.shards),
        num_frames=sum(lengths),
        shortest_frames=min(lengths),
        longest_frames=max(lengths),
        seconds=seconds_looked_at * sum(lengths) / frames_looked_at,
        num_looked_at=len(infos),
        resolutions=_counts(f"{info.width}x{info.height}" for info in infos),
        frame_rates=_counts(f"{info.fps:.3f}".rstrip("0").rstrip(".") for info in infos),
        codecs=_counts(info.codec for info in infos),
        num_variable_rate=sum(not info.constant_frame_rate for info in infos),
        labels=_label_counts(labels),
        num_subjects=len({row["subject"] for row in labels if "subject" in row}),
        region=manifest.region,
    )


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(collections.Counter(values).most_common())


def _peek(tar_url: str, offset: int, size: int) -> VideoInfo:
    """Return the JSON of a sample, from its first kilobytes if they contain it, else from all."""
    for stop in (min(size, _PEEK_BYTES), size):
        content = storage.read_range(tar_url, offset, offset + stop)
        with contextlib.suppress(tarfile.ReadError):  # cut behind its first kilobytes
            for name, data in shard_format.iter_members(content):
                if name.endswith(".json"):
                    return load_info(data)
    found, fix = f"no sample at byte {offset}", "run `svfap shards verify`"
    raise ShardError("Shard is damaged", tar_url, found, fix)


def _label_counts(labels: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Return the number of samples by column and label, sorted by label."""
    counted: dict[str, collections.Counter[str]] = {}
    for row in labels:
        columns = {"class": row.get("class_name"), **row.get("class_names", {})}
        columns |= {"fold": row.get("fold"), "split": row.get("split")}
        for column, value in columns.items():
            if value is not None:
                counted.setdefault(column, collections.Counter())[str(value)] += 1
    return {column: dict(sorted(counts.items())) for column, counts in counted.items()}
