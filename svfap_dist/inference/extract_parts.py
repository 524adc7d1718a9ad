"""Extract features of many videos to Parquet, in parts that are never computed twice.

In: a network and parts of videos. Out: below the output one file per part, with one row group and a
row per clip (or per video, pooled):

    source         string             URL of the set of shards; empty for a file
    key            string             the video's path, URL or key in its shard
    start, clips   int32              first frame of the clip; clips that were averaged
    start_seconds, end_seconds        time of the clip in the video, float64
    labels         string             JSON of what its shard says
    features       fixed_size_list<float32>[D]

The file's metadata lists the videos that could not be used (svfap.rejected, JSON pairs of key and
reason), and has the network's description (svfap.network), the options (svfap.options) and a
summary of the part with the sizes of its files (svfap.part), all JSON. A file appears as a whole.
Its name ends with a digest of the network, the options and the names of the part's videos, so the
same command, run again, does the missing parts only. No batch of the network spans two parts: a
part's rows do not depend on where an earlier attempt ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from svfap_dist import storage
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.evaluate.runner import ViewedVideo
from svfap_dist.evaluate.video_workers import Decoding, VideoWorkers
from svfap_dist.inference.extract import BATCH_SIZE, features_of, rejections
from svfap_dist.inference.load import Network, load, move
from svfap_dist.inference.part_files import PartSummary, read_summary, to_parquet
from svfap_dist.inference.parts import Part
from svfap_dist.inference.videos import unusable, view_each
from svfap_dist.parallel.processes import ordered_map
from svfap_dist.shards.reader import BadSample
from svfap_dist.video.info import covering_views

_DIGEST_DIGITS = 16
_PART_NAME = re.compile(r"part-\d{6,}-[0-9a-f]{16}\.parquet")  # of `ExtractJob.file_of`
_FOOTERS = 16  # read at a time
_SHOWN = 10  # rejected videos that the summary names


@dataclasses.dataclass(frozen=True)
class ExtractJob:
    """What all parts have in common; it is sent to workers.

    Attributes:
        checkpoint: as `load.load`.
        output: folder or prefix.
        overrides: as `load.load`.
        step: frames from one clip to the next; 0: end to end.
        pooled: whether a video's clips are averaged.
        batch_size: most clips of a forward pass.
        threads: threads that read and decode, and the processes in which they decode.
        device: of the network; empty: cuda if available.
        network_digest: of the weights, which workers load again.
    """

    checkpoint: str
    output: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: int = 0
    pooled: bool = False
    batch_size: int = BATCH_SIZE
    threads: int = 2
    device: str = ""
    network_digest: str = ""

    def file_of(self, part: Part) -> str:
        """Return the name of a part's file.

        Args:
            part: the part.
        """
        options = (self.network_digest, self.step, self.pooled, self.batch_size, part.digest)
        digest = hashlib.sha256(repr(options).encode()).hexdigest()[:_DIGEST_DIGITS]
        return f"part-{part.number:06d}-{digest}.parquet"


@dataclasses.dataclass(frozen=True)
class PartResult:
    """How many videos and clips of a part were used, and the videos that could not be."""

    videos: int = 0
    clips: int = 0
    bad: tuple[BadSample, ...] = ()


def digest_network(network: Network) -> str:
    """Return what identifies the features that a network computes.

    Args:
        network: any network that `load` returns.
    """
    digest = hashlib.sha256(network.info.to_json(""))
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class PartExtractor:
    """Extracts one part after the other.

    Args:
        job: what all parts have in common.
        network: from `load`, where it is needed; None: loaded for the first part.
    """

    def __init__(self, job: ExtractJob, network: Network | None = None) -> None:
        self._job, self._given = job, network
        self._workers: VideoWorkers | None = None  # kept from part to part

    def close(self) -> None:
        """End the processes that decode; a later part starts others."""
        if workers := self._workers:
            self._workers = None
            workers.kill()  # calls under way, if a part was interrupted
            workers.close()

    @functools.cached_property
    def _network(self) -> Network:
        """Return the network; refuse another one than the job's."""
        if self._given is not None:
            return self._given
        network = move(load(self._job.checkpoint, **self._job.overrides), self._job.device)
        if digest_network(network) != self._job.network_digest:
            raise CheckpointError(
                "Network has changed during the extraction",
                where=self._job.checkpoint,
                found="other weights than at the beginning",
                do="give one checkpoint, checkpoints/step-..., rather than a run in training",
            )
        return network

    def extract(
        self, part: Part, on_video: Callable[[int], None] = lambda done: None
    ) -> PartResult:
        """Extract the features of a part and write its file.

        Args:
            part: the videos.
            on_video: called with the number of the part's videos that are done.

        Raises:
            CheckpointError: The network is not the job's.
            ConfigError: The device is not available.
            HealthError: A feature is not finite.
            ShardError: Shards cannot be read.
            StorageError: The store fails.
        """
        try:
            viewed, bad = self._view(part, on_video)
        except BaseException:  # among them a stop by the user
            self.close()
            raise
        job, network = self._job, self._network
        clips = sum(len(video.outputs) for video in viewed)
        summary = PartSummary(len(viewed), clips, tuple(rejections(bad)), part.sizes)
        options = {"step": job.step, "pooled": job.pooled, "batch_size": job.batch_size}
        data = to_parquet(summary, viewed, part.shards, network.info, network.num_features, options)
        storage.write_bytes(storage.join(job.output, job.file_of(part)), data)
        return PartResult(len(viewed), clips, tuple(bad))

    def _view(
        self, part: Part, on_video: Callable[[int], None]
    ) -> tuple[list[ViewedVideo], list[BadSample]]:
        job, info = self._job, self._network.info
        decoding = Decoding.of_files(job.threads, isolated=True)
        self._workers = self._workers or VideoWorkers(decoding)
        results = view_each(
            part.sources(),
            info,
            covering_views(info, info.region, job.step),
            features_of(self._network),
            batch_size=job.batch_size,
            decoding=decoding,
            workers=self._workers,
        )
        viewed: list[ViewedVideo] = []
        bad: list[BadSample] = []
        for done, video in enumerate(results, start=1):
            if isinstance(video, ViewedVideo):
                viewed.append(video)
            else:
                bad.append(video)
            on_video(done)
        return viewed, bad


@dataclasses.dataclass(frozen=True)
class ExtractPartsResult:
    """What the output has, and what of it is new: this command's. rejected: key and reason."""

    output: str
    parts: int
    parts_done_before: int
    videos: int
    clips: int
    new_videos: int
    new_clips: int
    dim: int
    rejected: list[tuple[str, str]]
    seconds: float
    clips_per_second: float

    def lines(self) -> list[str]:
        """Return a summary to print."""
        lines = [f"left out {key}: {reason}" for key, reason in self.rejected[:_SHOWN]]
        if len(self.rejected) > _SHOWN:
            lines.append(f"left out {len(self.rejected) - _SHOWN} more: see the files' metadata")
        parts = f"{self.output}: {self.parts} parts"
        if self.parts_done_before:
            parts += f", {self.parts_done_before} of them done before"
        lines += [parts, f"{self.clips} clips of {self.videos} videos, {self.dim} features each"]
        new = f"{self.new_clips} clips of {self.new_videos} videos"
        return [*lines, f"this time: {new}, {self.clips_per_second:.1f} clips/s"]


def inspect_output(
    job: ExtractJob, parts: Sequence[Part], retry_rejected: bool = False
) -> tuple[list[Part], list[PartSummary]]:
    """Return the parts to do, and what those have that are done.

    A part is done again if it rejected a video and a file of it has another size now: it was
    missing, or not complete. Removes what killed writers left in a local folder, and parts of other
    inputs without any usable video, as a mistyped command leaves them.

    Args:
        job: what all parts have in common.
        parts: all of them.
        retry_rejected: whether all parts that rejected a video are done again.

    Raises:
        ConfigError: The output has features of other videos, another network or other options.
        StorageError: The store fails.
    """
    if not storage.is_remote(job.output):
        storage.delete_unfinished(job.output)
    there = {
        name: size
        for name, size in storage.list_files(job.output).items()
        if name.endswith(".parquet")
    }
    _remove_useless(
        job.output, {name: there[name] for name in there.keys() - {*map(job.file_of, parts)}}
    )
    to_do, done = [part for part in parts if job.file_of(part) not in there], list[PartSummary]()

    def read(part: Part) -> PartSummary:
        name = job.file_of(part)
        return read_summary(storage.join(job.output, name), there[name])

    present = [part for part in parts if job.file_of(part) in there]
    summaries = ordered_map(read, present, threads=_FOOTERS, limit=2 * _FOOTERS)
    with contextlib.closing(summaries):
        for part, summary in summaries:
            has_changed = summary.sizes != part.sizes
            if summary.rejected and (retry_rejected or has_changed):
                to_do.append(part)
            elif has_changed:
                raise _changed(job, part, summary)
            else:
                done.append(summary)
    return sorted(to_do, key=lambda part: part.number), done


def _remove_useless(output: str, others: Mapping[str, int]) -> None:
    """Delete files of other inputs, options or weights if no video is in them; else refuse."""
    for name in sorted(others):
        url = storage.join(output, name)
        if not _PART_NAME.fullmatch(name) or read_summary(url, others[name]).videos:
            raise ConfigError(
                "Output has features of something else",
                where=output,
                found=f"{len(others)} files of other videos, options or weights, such as {name}",
                do="give another -o, or delete them",
            )
    for name in others:
        storage.delete(storage.join(output, name))


def _changed(job: ExtractJob, part: Part, summary: PartSummary) -> ConfigError:
    sizes = zip(part.files, part.sizes, summary.sizes, strict=True)
    name, now, before = next(each for each in sizes if each[1] != each[2])
    return ConfigError(
        "Video has changed since its features were extracted",
        where=name,
        found="missing" if now is None else f"{now} bytes, {before} before",
        do=f"give another -o, or delete {storage.join(job.output, job.file_of(part))}",
    )


def extract_parts(
    job: ExtractJob,
    parts: Sequence[Part],
    dim: int,
    run: Callable[[Sequence[Part], Callable[[int], None]], Iterable[PartResult]],
    progress: Callable[[int, str], None] = lambda done, note: None,
    retry_rejected: bool = False,
) -> ExtractPartsResult:
    """Extract the parts that have no file yet.

    Args:
        job: what all parts have in common.
        parts: all of them.
        dim: features of a clip.
        run: extracts parts, in any order; its second argument is called with the videos done of a
            part that is not finished.
        progress: called with the number of videos done, earlier ones included, and the speed.
        retry_rejected: as `inspect_output`.

    Raises:
        ConfigError: The output has something else.
        DecodeError: No video can be used.
        StorageError: The output cannot be written.
        SvfapError: What `run` raises.
    """
    missing, before = inspect_output(job, parts, retry_rejected)
    if missing:
        storage.check_writable(storage.join(job.output, job.file_of(missing[0])))
    began, total = time.monotonic(), sum(part.num_videos for part in parts)
    done = total - sum(part.num_videos for part in missing)
    videos, clips, bad = 0, 0, list[BadSample]()
    progress(done, "")

    def show(done: int) -> None:
        rate = clips / max(time.monotonic() - began, 1e-9)  # of finished parts
        progress(done, f"{rate:.1f} clips/s" if clips else "")

    def show_video(of_part: int) -> None:
        show(done + of_part)

    for result in run(missing, show_video):
        videos, clips = videos + result.videos, clips + result.clips
        bad += result.bad
        done += result.videos + len(result.bad)
        show(done)
    rejected = [pair for part in before for pair in part.rejected] + rejections(bad)
    all_videos = sum(part.videos for part in before) + videos
    if not all_videos:
        split = [(key, *reason.partition(": ")[::2]) for key, reason in rejected]
        raise unusable([BadSample(0, *each) for each in split])
    seconds = time.monotonic() - began
    return ExtractPartsResult(
        job.output,
        len(parts),
        len(before),
        all_videos,
        sum(part.clips for part in before) + clips,
        videos,
        clips,
        dim,
        rejected,
        seconds,
        clips / seconds if clips else 0.0,
    )


def run_locally(
    extractor: PartExtractor, parts: Sequence[Part], on_video: Callable[[int], None]
) -> Iterator[PartResult]:
    """Yield the results of parts that this process extracts.

    Args:
        extractor: with the network.
        parts: to extract.
        on_video: called with the videos done of the current part.
    """
    with contextlib.closing(extractor):
        for part in parts:
            yield extractor.extract(part, on_video)
