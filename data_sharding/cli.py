"""The steps of this room in their order: what `svfap shard` and `svfap shards` call.

source -> list of videos -> shuffled once -> read and probed -> packed -> rejected.jsonl -> manifest

Whatever stops it half-way leaves no manifest, and the same command then starts anew. Which sample
lies in which shard depends on the videos and options alone, never on the number of workers.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator

from data_sharding import manifest as manifests
from data_sharding import sources
from data_sharding.fan_out import Probed, probe_all
from data_sharding.pack import Sample, pack
from data_sharding.probe import MIN_FRAMES, Rejected
from data_sharding.progress import Progress, silent
from data_sharding.show import Statistics, show
from data_sharding.sources import SourceVideo
from data_sharding.verify import Verified, verify
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shard_format import REJECTED_NAME, Manifest

__all__ = ["ShardSummary", "Statistics", "Verified", "shard", "show", "verify"]

PROFILES = ("source",)
MAX_SHARD_BYTES = 512 * 2**20  # one shard has to fit on local disk, and a rank reads parts of it


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What a sharding did, or found done."""

    url: str
    num_samples: int
    num_shards: int
    num_bytes: int
    seconds: float  # of video
    rejected: dict[str, int]  # videos left out, by reason
    already_complete: bool
    fingerprint: str

    def lines(self) -> list[str]:
        """For people."""
        state = "already complete, nothing to do" if self.already_complete else "complete"
        counts = f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes} bytes"
        lines = [f"{self.url}: {state}", f"{counts}, {self.seconds / 3600:.3f} hours of video"]
        if self.rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items())
            where = storage.join(self.url, REJECTED_NAME)
            lines.append(f"{sum(self.rejected.values())} videos left out: {reasons} (see {where})")
        return lines


@dataclasses.dataclass
class _Tally:
    """What went by while samples streamed from the probe into the shards."""

    rejected: list[Probed] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    shortest: int = 0

    def by_reason(self) -> dict[str, int]:
        reasons = [p.result.reason for p in self.rejected if isinstance(p.result, Rejected)]
        return dict(collections.Counter(reasons).most_common())


def shard(  # noqa: PLR0913 - each is an option of the command line
    source: str,
    text: str,
    output_url: str,
    *,
    profile: str = "source",
    shuffle_seed: int = 0,
    min_frames: int = MIN_FRAMES,
    max_samples_per_shard: int = 1000,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ShardSummary:
    """Make shards under `output_url` from the videos that `text` names to a source.

    Args:
        source: name of a layout, one of `sources.SOURCES`; text: its INPUT, mostly a folder or URL.
        min_frames: shorter videos are left out.
        workers: processes that read and probe; None: by the number of CPUs and videos.
        overwrite: replace a data set of other inputs or options. (To make the same one again,
            delete its manifest.)

    Raises: ConfigError, ShardError (no usable video), StorageError.
    """
    numbers = {
        "shuffle_seed": shuffle_seed,
        "min_frames": min_frames,
        "max_samples_per_shard": max_samples_per_shard,
        "max_shard_bytes": max_shard_bytes,
    }
    _check_options(profile, workers, numbers)
    videos = list(sources.load(source).samples(text))
    digest = manifests.inputs_digest(videos, {"source": source, "profile": profile, **numbers})
    try:
        done = manifests.finished(output_url, digest)
    except ConfigError:
        if not overwrite:
            raise
        done = None
    if done:
        return _found_done(output_url, done)
    manifests.begin(output_url)

    tally = _Tally()
    order = _shuffled(videos, shuffle_seed)
    num_workers = _num_workers(workers, len(videos))
    with contextlib.closing(probe_all(order, min_frames, num_workers)) as probed:
        samples = _good_ones(probed, tally, progress, len(videos))
        entries = pack(
            samples, output_url, max_samples=max_samples_per_shard, max_bytes=max_shard_bytes
        )
    manifests.write_rejected(output_url, tally.rejected)
    if not entries:
        raise _nothing_usable(text, output_url, tally)
    made = Manifest(source, profile, shuffle_seed, tally.shortest, digest, tuple(entries))
    manifests.complete(output_url, made)
    return _summary(output_url, made, tally.seconds, tally.by_reason(), already_complete=False)


def _check_options(profile: str, workers: int | None, numbers: dict[str, int]) -> None:
    if profile not in PROFILES:
        raise ConfigError(
            "Unknown profile", found=profile, do=f"use one of: {', '.join(sorted(PROFILES))}"
        )
    for name, value in numbers.items():
        if value < (0 if name == "shuffle_seed" else 1):
            raise ConfigError("Option out of range", found=f"{name}={value}", do="make it positive")
    if workers is not None and workers < 0:
        raise ConfigError(
            "Option out of range", found=f"workers={workers}", do="use 0 or 1 for no processes"
        )


def _num_workers(workers: int | None, num_videos: int) -> int:
    if workers is not None:
        return workers
    # A process takes some tenths of a second to start: not for a handful of videos.
    return min(len(os.sched_getaffinity(0)), num_videos // 8)


def _shuffled(videos: list[SourceVideo], seed: int) -> list[SourceVideo]:
    """A random order that depends on the seed and each video's key, not on the other videos."""
    return sorted(videos, key=lambda v: hashlib.sha256(f"{seed}/{v.key}".encode()).digest())


def _good_ones(
    probed: Iterator[Probed], tally: _Tally, progress: Progress, total: int
) -> Iterator[Sample]:
    for done, item in enumerate(probed, start=1):
        progress(done, total, len(tally.rejected) + isinstance(item.result, Rejected))
        if isinstance(item.result, Rejected):
            tally.rejected.append(item)
            continue
        info = dataclasses.replace(item.result, labels=item.video.labels)
        tally.seconds += info.num_frames / info.fps
        tally.shortest = min(tally.shortest or info.num_frames, info.num_frames)
        yield Sample(item.video.key, item.video.suffix, item.data, info)


def _found_done(url: str, manifest: Manifest) -> ShardSummary:
    rejected = manifests.count_rejected(url)
    return _summary(url, manifest, show(url).seconds, rejected, already_complete=True)


def _summary(
    url: str, manifest: Manifest, seconds: float, rejected: dict[str, int], already_complete: bool
) -> ShardSummary:
    return ShardSummary(
        url=url,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        num_bytes=sum(entry.num_bytes for entry in manifest.shards),
        seconds=seconds,
        rejected=rejected,
        already_complete=already_complete,
        fingerprint=manifest.fingerprint,
    )


def _nothing_usable(text: str, url: str, tally: _Tally) -> ShardError:
    reasons = ", ".join(f"{reason} {count}" for reason, count in tally.by_reason().items())
    advice = f"see {storage.join(url, REJECTED_NAME)}"
    if tally.by_reason().get("too_short"):
        advice += ", or lower --min-frames"
    return ShardError("No usable video", where=text, found=reasons, do=advice)
