"""Run all steps of a sharding: what `svfap shard` and `svfap shards` call.

source -> list of videos -> shuffled and cut into groups -> each group read, probed, transcoded,
packed and marked as finished, anywhere and in any order -> rejected.jsonl -> manifest

An interrupted sharding is resumed by the same command: groups marked as finished are not made
again. Which sample is in which shard, and every byte of it, depends on the videos and options
alone, never on the number of workers or of interruptions. Videos that are new since a data set was
completed go into shards of their own, after the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping

from data_sharding import make_shards, markers, sources, temporary
from data_sharding import manifest as manifests
from data_sharding.contact_sheet import draw_contact_sheet
from data_sharding.make_sample import SampleOptions
from data_sharding.make_shards import ShardJobSpec
from data_sharding.manifest import ExistingOutput
from data_sharding.markers import ProgressCallback, Tally, silent
from data_sharding.plan import Plan, options_digest
from data_sharding.show import Statistics, show
from data_sharding.sources import Columns, Source
from data_sharding.transcode import TrainProfile
from data_sharding.verify import Verified, verify
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shards.format import REJECTED_NAME, Manifest
from svfap_dist.video.info import region_name
from svfap_dist.video.probe import MIN_FRAMES, Limits

log = logging.getLogger(__name__)

__all__ = [
    "Columns",
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

_PROFILES = ("source", "train")
# Parameters of `shard`, and their options on the command line.
_OPTIONS = {
    "shuffle_seed": "--shuffle-seed",
    "min_frames": "--min-frames",
    "max_samples_per_shard": "--samples-per-shard",
}
_LAYOUTS = ("phases", "samples")  # of new data sets, and of those of shard format 1
_FORMER_REGION = "voxceleb2"  # the former default of most sources
_MAX_SHARD_BYTES = 512 << 20  # a shard has to fit on local disk, and a rank reads parts of it


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What a sharding did, or found done."""

    url: str
    num_samples: int
    num_shards: int
    num_bytes: int
    seconds: float  # of video
    rejected: dict[str, int]  # videos by reason
    already_complete: bool
    fingerprint: str
    bytes_read: int = 0  # of the source's files that are in shards
    wall_seconds: float = 0.0  # of this call
    clips_per_second: float = 0.0  # new samples in that time
    new_samples: int = 0
    fingerprint_before: str = ""  # of the data set that was there
    region: str = ""  # stored part of the frames, of profile train; "": whole frames

    def lines(self) -> list[str]:
        """Return the lines that the command prints."""
        state = "already complete, nothing to do" if self.already_complete else "complete"
        counts = f"{self.num_samples} samples in {self.num_shards} shards, {self.num_bytes} bytes"
        counts += f" from {self.bytes_read}, {self.seconds / 3600:.3f} hours of video"
        lines = [f"{self.url}: {state}", counts]
        if not self.already_complete:
            speed = f"{self.clips_per_second:.2f} clips/s"
            lines.append(f"{self.new_samples} samples new, {self.wall_seconds:.1f} s, {speed}")
        if self.region:
            lines.append(f"stored region: {self.region} (train with data.region={self.region})")
        if self.rejected:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejected.items())
            where = storage.join(self.url, REJECTED_NAME)
            lines.append(f"{sum(self.rejected.values())} videos left out: {reasons} (see {where})")
        if self.fingerprint_before not in ("", self.fingerprint):
            lines.append(
                f"The fingerprint was {self.fingerprint_before} and is {self.fingerprint}: a run "
                "that was started before uses the former, so start a new one for the new samples"
            )
        return lines


def shard(  # noqa: PLR0913 - each is an option of the command line
    source: str,
    text: str,
    output_url: str,
    *,
    profile: str = "source",
    train: TrainProfile | None = None,
    columns: Columns | None = None,
    shuffle_seed: int = 0,
    min_frames: int | None = None,
    max_samples_per_shard: int = 1000,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    limits: Limits | None = None,
    workers: int | None = None,
    ray: str | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = silent,
) -> ShardSummary:
    """Make shards of a source's videos.

    Args:
        source: A key of `sources.SOURCES`.
        text: Its INPUT, mostly a folder or URL.
        output_url: Folder or prefix to write to.
        profile: "source": video bytes unchanged; "train": transcoded as `train` says.
        train: Options of the profile train; None: the defaults.
        columns: Columns of a list, for a source that has some; None: the usual ones.
        shuffle_seed: Seed of the order of samples.
        min_frames: Shorter videos are rejected; None: the source's default.
        max_samples_per_shard: Videos of a group at most.
        max_shard_bytes: Bytes of the source's files of a group at most.
        limits: Limits of what a video may cost.
        workers: Processes that make samples; None: by the number of CPUs and videos.
        ray: Address of a Ray cluster that makes the shards, or `local` to start one here;
            `workers` is then how many shards it makes at a time.
        overwrite: Replace a data set of other inputs or options.
        progress: Called as videos get done.

    Raises:
        ConfigError: An option is invalid, or something else is at the output.
        ShardError: The input is not in the source's layout, or no video is usable.
        ClusterError: Worker processes or tasks died again and again, or there is no cluster.
    """
    started = time.monotonic()
    row = sources.find_source(source)
    least = row.min_frames or MIN_FRAMES if min_frames is None else min_frames
    numbers = {
        "shuffle_seed": shuffle_seed,
        "min_frames": least,
        "max_samples_per_shard": max_samples_per_shard,
        "max_shard_bytes": max_shard_bytes,
    }
    _check_options(profile, train, workers, numbers)
    limits = limits or Limits()
    train = (train or TrainProfile(region=None)) if profile == "train" else None
    if train:  # 22 and 22.0 are one quality, but two texts
        train = dataclasses.replace(train, crf=float(train.crf))

    def options_of(train: TrainProfile | None) -> dict[str, object]:
        stored = train and train.stored()
        return manifests.options_as_json(
            source=source, profile=profile, **numbers, limits=limits, train=stored
        )

    with Plan(shuffle_seed, max_samples_per_shard, max_shard_bytes) as plan:
        total = plan.read(row.samples(text, columns))
        if train:
            train = _with_defaults(train, row, output_url, plan, options_of)
        options = options_of(train)
        digest = plan.digest(options)
        with temporary.output_lock(output_url):
            existing = _inspect_output(output_url, options, digest, plan, overwrite)
            before = existing.manifest
            if before and before.inputs_digest == digest and existing.is_intact():
                tally = Tally()
                for number in range(before.num_groups):
                    tally.add(markers.load_marker(output_url, number).tally)
                return _summarize(output_url, before, tally, 0.0, before)
            if before is None:
                manifests.invalidate_manifest(output_url)
            sample_options = SampleOptions(least, limits, train)
            job = ShardJobSpec(output_url, sample_options, options_digest(options))
            num_groups = _make_missing(plan, existing, job, total, workers, ray, progress)
            entries, tally = manifests.gather_markers(output_url, existing.groups(plan), options)
            if not entries:
                found = ", ".join(f"{reason} {count}" for reason, count in tally.reasons.items())
                do = f"see the reason of each in {storage.join(output_url, REJECTED_NAME)}"
                do += ", or lower --min-frames" if tally.reasons.get("too_short") else ""
                raise ShardError("No usable video", text, found, do)
            made = Manifest(
                source,
                profile,
                shuffle_seed,
                tally.shortest,
                digest,
                tuple(entries),
                num_groups,
                options,
                sample_options.num_parts,
                row.kind,
            )
            manifests.commit_manifest(output_url, made)
    return _summarize(output_url, made, tally, time.monotonic() - started, before)


def _with_defaults(
    train: TrainProfile,
    source: Source,
    output_url: str,
    plan: Plan,
    options_of: Callable[[TrainProfile], dict[str, object]],
) -> TrainProfile:
    """Return the profile with defaults for region and layout.

    Former defaults are used if they give the options of the data set at `output_url`, complete or
    interrupted, so that it can be extended or completed by the command that made it.
    """
    regions = [train.region] if train.region else [region_name(source.region), _FORMER_REGION]
    layouts = [train.layout] if train.layout else [*_LAYOUTS]
    choices = [
        dataclasses.replace(train, region=region, layout=layout)
        for region in dict.fromkeys(regions)
        for layout in layouts
    ]
    default = choices[0]
    candidates = [options_of(each) for each in choices]
    existing = manifests.begun_with(output_url, plan, candidates) if len(choices) > 1 else None
    if existing is not None:
        train = next((each for each in choices if options_of(each) == existing), default)
        if train.region != default.region:
            log.warning(
                "%s was made with --region %s, the former default, and keeps it. The default of "
                "source %s is now --region %s.",
                *(output_url, train.region, source.name, default.region),
            )
        return train
    return default


def train_profile(*, region: str | None, size: int | None, crf: float | None) -> TrainProfile:
    """Return the train profile of these options; None means the default.

    Args:
        region: Part of the frame that is kept; None: the source's default.
        size: Pixels of a side, even; None: as it is cut.
        crf: x264's quality, 0 to 51, lower is better.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    if region == "centre":
        log.warning("--region centre is now called center; the old name still works.")
    profile = TrainProfile(region=region_name(region) if region else None, size=size)
    return profile if crf is None else dataclasses.replace(profile, crf=crf)


def _inspect_output(
    url: str, options: dict[str, object], digest: str, plan: Plan, overwrite: bool
) -> ExistingOutput:
    """Return the existing output, its videos marked in the plan; an empty one if it is replaced."""
    try:
        existing = manifests.inspect_output(url, options)
        manifest = existing.manifest
        if manifest and not (manifest.inputs_digest == digest and existing.is_intact()):
            existing.mark_existing(plan)
        return existing
    except ConfigError:
        if not overwrite:
            raise
        plan.forget()
        return ExistingOutput(url, options, None)


def _make_missing(
    plan: Plan,
    existing: ExistingOutput,
    job: ShardJobSpec,
    total: int,
    workers: int | None,
    ray: str | None,
    progress: ProgressCallback,
) -> int:
    """Make the shards of all groups that are not finished; return the number of groups."""
    so_far, finished, num_groups = Tally(), set[int](), 0
    for group in existing.groups(plan):
        num_groups += 1
        if marker := existing.marker(group):
            finished.add(group.number)
            so_far.add(marker.tally)

    shown = 0

    def report(under_way: Tally) -> None:
        # Never count down: when a shard ends, the counts of the others may be a second old.
        nonlocal shown
        shown = max(shown, so_far.num_videos + under_way.num_videos)
        progress(shown, total, so_far.num_rejected + under_way.num_rejected)

    report(Tally())
    missing = (group for group in existing.groups(plan) if group.number not in finished)
    if ray is not None:
        making = make_shards.make_by_ray(job, missing, ray, workers, report)
    else:
        todo = num_groups - len(finished), total - so_far.num_videos
        making = make_shards.make_here(job, missing, *todo, workers, report)
    with contextlib.closing(making) as tallies:
        for tally in tallies:
            so_far.add(tally)
            report(Tally())
    return num_groups


def _check_options(
    profile: str, train: TrainProfile | None, workers: int | None, numbers: Mapping[str, int]
) -> None:
    if profile not in _PROFILES:
        fix = f"use one of: {', '.join(_PROFILES)}"
        raise ConfigError("Unknown profile", "--profile", profile, fix)
    if train and profile != "train":
        what, fix = "Options require another profile", "use --profile train"
        found = "--region, --size or --crf, which are for profile train only"
        raise ConfigError(what, f"--profile {profile}", found, fix)
    for name, value in numbers.items():
        if value < (0 if name == "shuffle_seed" else 1):
            fix = "use 0 or more" if name == "shuffle_seed" else "use 1 or more"
            raise ConfigError("Option out of range", _OPTIONS.get(name, name), str(value), fix)
    if workers is not None and workers < 0:
        fix = "use 0 or 1 for no processes"
        raise ConfigError("Option out of range", "--workers", str(workers), fix)


def _summarize(
    url: str, manifest: Manifest, tally: Tally, wall_seconds: float, before: Manifest | None
) -> ShardSummary:
    """Return the summary of a complete data set; wall_seconds: 0 if it was complete before."""
    new = manifest.num_samples - (before.num_samples if before else 0)
    return ShardSummary(
        url=url,
        num_samples=manifest.num_samples,
        num_shards=len(manifest.shards),
        num_bytes=sum(entry.num_bytes for entry in manifest.shards),
        seconds=tally.seconds,
        rejected=tally.reasons,
        already_complete=not wall_seconds,
        fingerprint=manifest.fingerprint,
        bytes_read=tally.num_read,
        wall_seconds=wall_seconds,
        clips_per_second=new / wall_seconds if wall_seconds else 0.0,
        new_samples=new,
        fingerprint_before=before.fingerprint if before else "",
        region=manifest.region,
    )
