"""The steps of this room in their order: what `svfap shard` and `svfap shards` call.

source -> list of videos -> shuffled and cut into groups -> each group read, probed, transcoded,
packed and marked as finished, anywhere and in any order -> rejected.jsonl -> manifest

Whatever stops it half-way, the same command goes on: groups marked as finished are not made again.
Which sample lies in which shard, and every byte of it, depends on the videos and options alone,
never on the number of workers, nor on how often it was interrupted. Videos that came since a data
set was completed go into shards of their own, after the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator

from data_sharding import claim, fan_out, fan_out_ray, markers, sources
from data_sharding import manifest as manifests
from data_sharding.contact_sheet import draw_contact_sheet
from data_sharding.examine import Making
from data_sharding.make_shard import ShardJobSpec, ShardMaker
from data_sharding.manifest import Stock
from data_sharding.markers import Tally
from data_sharding.plan import Group, Plan, options_digest
from data_sharding.progress import Progress, silent
from data_sharding.show import Statistics, show
from data_sharding.summary import ShardSummary
from data_sharding.transcode import TrainProfile
from data_sharding.verify import Verified, verify
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shards.format import REJECTED_NAME, Manifest
from svfap_dist.video.probe import MIN_FRAMES, Limits
from svfap_dist.video.views import REGIONS, region_name

log = logging.getLogger(__name__)

__all__ = [
    "Limits",
    "ShardSummary",
    "Statistics",
    "TrainProfile",
    "Verified",
    "draw_contact_sheet",
    "shard",
    "show",
    "train_profile",
    "verify",
]

PROFILES = ("source", "train")
MAX_SHARD_BYTES = 512 * 2**20  # one shard has to fit on local disk, and a rank reads parts of it
_VIDEOS_PER_PROCESS = 8  # a process takes some tenths of a second to start


def shard(  # noqa: PLR0913 - each is an option of the command line
    source: str,
    text: str,
    output_url: str,
    *,
    profile: str = "source",
    train: TrainProfile | None = None,
    shuffle_seed: int = 0,
    min_frames: int = MIN_FRAMES,
    max_samples_per_shard: int = 1000,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    limits: Limits | None = None,
    workers: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ShardSummary:
    """Make shards under `output_url` from the videos that `text` names to a source.

    Args:
        source: name of a layout, one of `sources.SOURCES`; text: its INPUT, mostly a folder or URL.
        profile: source: video bytes as they are; train: as `train` says.
        min_frames: shorter videos are left out.
        max_samples_per_shard, max_shard_bytes: a group of videos ends before it would have more,
            counting bytes as the source has them.
        limits: what a video may cost.
        workers: processes that examine videos; None: by the number of CPUs and videos.
        ray: address of a Ray cluster that makes the shards, or `local` to start one here;
            `workers` is then how many it makes at a time.
        overwrite: replace a data set of other inputs or options.

    Raises: ConfigError, ShardError (no usable video), StorageError, ClusterError.
    """
    started = time.monotonic()
    numbers = {
        "shuffle_seed": shuffle_seed,
        "min_frames": min_frames,
        "max_samples_per_shard": max_samples_per_shard,
        "max_shard_bytes": max_shard_bytes,
    }
    _check_options(profile, train, workers, numbers)
    limits = limits or Limits()
    train = (train or TrainProfile()) if profile == "train" else None
    if train:  # 22 and 22.0 are one quality, but two texts
        train = dataclasses.replace(train, crf=float(train.crf))
    options = manifests.options_of(
        source=source, profile=profile, **numbers, limits=limits, train=train and train.stored()
    )
    with Plan(shuffle_seed, max_samples_per_shard, max_shard_bytes) as plan:
        total = plan.read(sources.load(source).samples(text))
        digest = plan.digest(options)
        with claim.hold(output_url):
            stock = _take_stock(output_url, options, digest, plan, overwrite)
            before = stock.manifest
            if before and before.inputs_digest == digest and stock.is_whole():
                return _found_done(output_url, before)
            if before is None:
                manifests.begin(output_url)
            job = ShardJobSpec(
                output_url, Making(min_frames, limits, train), options_digest(options)
            )
            num_groups = _make_missing(plan, stock, job, total, workers, ray, progress)
            entries, tally = manifests.gather(output_url, stock.groups(plan), options)
            if not entries:
                raise _nothing_usable(text, output_url, tally)
            least, rows = tally.shortest, tuple(entries)
            made = Manifest(source, profile, shuffle_seed, least, digest, rows, num_groups, options)
            manifests.complete(output_url, made)
    took = time.monotonic() - started
    return ShardSummary.of(output_url, made, tally, took=took, before=before)


def train_profile(*, region: str | None, size: int | None, crf: float | None) -> TrainProfile:
    """The profile of these options, of which None is the default.

    Raises: ConfigError if they cannot be obeyed.
    """
    if region == "centre":
        log.warning("--region centre is now called center; the old name still works.")
    region = region_name(region or TrainProfile().region)
    if region not in REGIONS:
        advice = f"use one of: {', '.join(REGIONS)}"
        raise ConfigError("Unknown region", found=region, do=advice)
    if size is not None and (size < 16 or size % 2):
        raise ConfigError(
            "Option out of range", found=f"size={size}", do="use an even size from 16"
        )
    crf = TrainProfile().crf if crf is None else crf
    if not 0 <= crf <= 51:
        raise ConfigError("Option out of range", found=f"crf={crf}", do="use 0 to 51")
    return TrainProfile(region=region, size=size, crf=crf)


def _take_stock(
    url: str, options: dict[str, object], digest: str, plan: Plan, overwrite: bool
) -> Stock:
    """What is there already, its videos kept in the plan; nothing if it is to be replaced."""
    try:
        stock = manifests.take_stock(url, options)
        if stock.manifest and not (stock.manifest.inputs_digest == digest and stock.is_whole()):
            stock.keep_old(plan)
        return stock
    except ConfigError:
        if not overwrite:
            raise
        plan.forget()
        return Stock(url, options, None)


def _make_missing(
    plan: Plan,
    stock: Stock,
    job: ShardJobSpec,
    total: int,
    workers: int | None,
    ray: str | None,
    progress: Progress,
) -> int:
    """Make the shards of all groups that are not finished; how many groups there are."""
    so_far, finished, num_groups = Tally(), set[int](), 0
    for group in stock.groups(plan):
        num_groups += 1
        if marker := stock.marker(group):
            finished.add(group.number)
            so_far.add(marker.tally)
    progress(so_far.num_videos, total, so_far.num_rejected)

    def report(more: Tally) -> None:
        now = Tally()
        now.add(so_far)
        now.add(more)
        progress(now.num_videos, total, now.num_rejected)

    missing = (group for group in stock.groups(plan) if group.number not in finished)
    todo = num_groups - len(finished), total - so_far.num_videos
    if ray is not None:
        making = fan_out_ray.make_all(job, missing, ray, workers)
    else:
        making = _make_here(job, missing, *todo, workers, report)
    with contextlib.closing(making) as tallies:
        for tally in tallies:
            so_far.add(tally)
            report(Tally())
    return num_groups


def _make_here(
    job: ShardJobSpec,
    groups: Iterator[Group],
    num_groups: int,
    num_videos: int,
    workers: int | None,
    report: Callable[[Tally], None],
) -> Generator[Tally]:
    """Make shards on this machine: several at a time, or one by one with all processes at it."""
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), num_videos // _VIDEOS_PER_PROCESS)
    at_a_time = max(min(workers, num_groups), 1)
    processes = max(workers // at_a_time, 1)
    if at_a_time == 1:
        # In this process, which can then tell of each video.
        with ShardMaker(job, processes) as maker:
            for group in groups:
                yield fan_out.with_retries(functools.partial(maker, on_video=report), group)
    else:
        yield from fan_out.make_all(job, groups, at_a_time, processes)


def _check_options(
    profile: str, train: TrainProfile | None, workers: int | None, numbers: dict[str, int]
) -> None:
    if profile not in PROFILES:
        raise ConfigError(
            "Unknown profile", found=profile, do=f"use one of: {', '.join(sorted(PROFILES))}"
        )
    if train and profile != "train":
        raise ConfigError(
            "Options of the profile train", found=f"profile {profile}", do="use --profile train"
        )
    for name, value in numbers.items():
        if value < (0 if name == "shuffle_seed" else 1):
            raise ConfigError("Option out of range", found=f"{name}={value}", do="make it positive")
    if workers is not None and workers < 0:
        raise ConfigError(
            "Option out of range", found=f"workers={workers}", do="use 0 or 1 for no processes"
        )


def _found_done(url: str, manifest: Manifest) -> ShardSummary:
    tally = Tally()
    for number in range(manifest.num_groups):
        tally.add(markers.load(url, number).tally)
    return ShardSummary.of(url, manifest, tally, took=0.0, before=manifest)


def _nothing_usable(text: str, url: str, tally: Tally) -> ShardError:
    reasons = ", ".join(f"{reason} {count}" for reason, count in tally.reasons.items())
    advice = f"see {storage.join(url, REJECTED_NAME)}"
    if tally.reasons.get("too_short"):
        advice += ", or lower --min-frames"
    return ShardError("No usable video", where=text, found=reasons, do=advice)
