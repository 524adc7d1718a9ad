"""A folder of videos -> a folder of face crops that `svfap shard folder` takes.

For each video OUTPUT gets `KEY.mp4`, the crop (with `--tracks all` also `KEY.2.mp4`, ... for the
lighter tracks), and `KEY.boxes.json`, the `record` of what was found. A video that has one is not
done again; so whatever stops the work, the same command goes on with it, and adds the videos that
are new. At the end `faces.jsonl` lists the crops, `no_face.jsonl` the videos left
out with their reasons, and `faces.png` shows some of them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from data_sharding.faces import detect, record, sheet
from data_sharding.faces.record import Row
from data_sharding.faces.video import TRACKS, FaceOptions
from data_sharding.progress import Progress, silent
from data_sharding.sources import SourceVideo
from data_sharding.sources import folder as folder_source
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError

FACES_NAME, NO_FACE_NAME, SHEET_NAME = "faces.jsonl", "no_face.jsonl", "faces.png"
_IN_FLIGHT_PER_WORKER = 2


@dataclasses.dataclass(frozen=True)
class FacesSummary:
    """What a run of `svfap faces` did, and found done."""

    url: str
    num_videos: int
    num_crops: int
    num_frames: int  # of the crops
    seconds: float  # of the crops
    detected_share: float  # of the frames looked at within the tracks
    left_out: dict[str, int]  # videos, by reason
    already_done: int  # videos
    sheet: str  # "" if there is nothing to show

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.url}: {self.num_crops} crops, {self.num_frames} frames, "
            f"{self.seconds / 3600:.3f} hours, from {self.num_videos} videos",
        ]
        if self.num_crops:
            share = f"{self.detected_share:.0%} of the frames looked at"
            lines.append(f"face detected in {share}, elsewhere interpolated")
        if self.already_done:
            lines.append(f"{self.already_done} videos were done already")
        if self.left_out:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.left_out.items())
            where = storage.join(self.url, NO_FACE_NAME)
            lines.append(f"{sum(self.left_out.values())} left out: {reasons} (see {where})")
        if self.sheet:
            lines.append(f"Picture: {self.sheet}")
        return lines


def make_crops(
    folder: str,
    output_url: str,
    options: FaceOptions,
    *,
    workers: int | None = None,
    progress: Progress = silent,
) -> FacesSummary:
    """Crop the faces of all videos below `folder` into `output_url`.

    Args:
        workers: processes; up to 1: none besides this one; None: by the CPUs and videos.

    Raises: ConfigError, ShardError (no videos; a worker died), StorageError.
    """
    _check(options, workers)
    _refuse_output_among_inputs(folder, output_url)
    detect.load(options.detector)  # a wrong name shall be told now, and once
    videos = list(folder_source.samples(folder))
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(videos))
    rows: list[Row] = []
    left_out = 0
    with contextlib.closing(_do_all(videos, output_url, options, workers)) as done:
        for row in done:
            rows.append(row)
            left_out += bool(row.reason)
            progress(len(rows), len(videos), left_out)
    return _finish(output_url, rows)


def _check(options: FaceOptions, workers: int | None) -> None:
    wrong = "Option out of range"
    if options.size < 16 or options.size % 2:
        raise ConfigError(wrong, found=f"size={options.size}", do="use an even size, 16 or more")
    if not 0 <= options.margin <= 4:
        raise ConfigError(wrong, found=f"margin={options.margin}", do="use 0 to 4")
    if options.tracks not in TRACKS:
        raise ConfigError(wrong, found=f"tracks={options.tracks}", do="use best or all")
    if workers is not None and workers < 0:
        raise ConfigError(wrong, found=f"workers={workers}", do="use 0 or 1 for no processes")


def _refuse_output_among_inputs(folder: str, output_url: str) -> None:
    """Crops among the inputs would be cropped again by the next run."""
    paths = [
        url.rstrip("/") if storage.is_remote(url) else os.path.realpath(storage.local_path(url))
        for url in (folder, output_url)
    ]
    if (paths[1] + "/").startswith(paths[0] + "/"):
        raise ConfigError(
            "Output lies in the folder of the videos",
            where=output_url,
            found=f"videos in {folder}",
            do="write the crops to a folder beside it",
        )


def _do_all(
    videos: Iterable[SourceVideo], output_url: str, options: FaceOptions, workers: int
) -> Generator[Row]:
    """Do the videos, a few at a time, and give their rows in the videos' order."""
    if workers <= 1:
        for video in videos:
            yield record.do(video, output_url, options)
        return
    waiting: collections.deque[tuple[str, Future[Row]]] = collections.deque()
    rest = iter(videos)
    # Spawned, not forked: a forked copy of an S3 client hangs.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's business
    )
    try:
        while True:
            room = workers * _IN_FLIGHT_PER_WORKER - len(waiting)
            for video in itertools.islice(rest, room):
                waiting.append((video.where, pool.submit(record.do, video, output_url, options)))
            if not waiting:
                return
            row = waiting[0][1].result()
            waiting.popleft()
            yield row
    except BrokenProcessPool as error:
        raise ShardError(
            "A worker process died while cropping faces",
            where=f"one of {', '.join(where for where, _ in waiting)}",
            found="killed from outside, out of memory, or crashed by a video",
            do="run again with --workers 1 to see which; what is done is not done again",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finish(output_url: str, rows: list[Row]) -> FacesSummary:
    """The lists, the picture, the summary."""
    faces = [{"key": r.key, "where": r.where, **crop} for r in rows for crop in r.crops]
    left_out = [
        {"key": r.key, "where": r.where, "reason": r.reason, "detail": r.detail}
        for r in rows
        if r.reason
    ]
    for name, lines in ((FACES_NAME, faces), (NO_FACE_NAME, left_out)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        storage.write_bytes(storage.join(output_url, name), text.encode())
    picture = ""
    if faces:
        picture = storage.join(output_url, SHEET_NAME)
        records = [record.url_of(output_url, row.key) for row in rows if row.crops]
        sheet.make(records, output_url, picture)
    return FacesSummary(
        url=output_url,
        num_videos=len(rows),
        num_crops=len(faces),
        num_frames=sum(face["num_frames"] for face in faces),
        seconds=sum(face["num_frames"] / face["fps"] for face in faces),
        detected_share=sum(r.detections for r in rows) / max(1, sum(r.looks for r in rows)),
        left_out=dict(collections.Counter(r.reason for r in rows if r.reason).most_common()),
        already_done=sum(r.already_done for r in rows),
        sheet=picture,
    )
