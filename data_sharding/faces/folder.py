"""A folder of videos -> a folder of face crops that `svfap shard folder` takes.

For each video OUTPUT gets `KEY.mp4`, the crop (with `--tracks all` also `KEY.2.mp4`, ... for the
lighter tracks), and `KEY.boxes.json`, the record of what was found, written last. A video whose
record is there, of the same input and options and with its crops, is not done again; so whatever
stops the work, the same command goes on with it, and adds the videos that are new. Videos without
crops have a record too. At the end `faces.jsonl` lists the crops, `no_face.jsonl` the videos left
out with their reasons, and `faces.png` shows some of them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_sharding.faces import detect, sheet
from data_sharding.faces.video import TRACKS, Cropped, FaceOptions, LeftOut, crop_faces
from data_sharding.progress import Progress, silent
from data_sharding.sources import SourceVideo
from data_sharding.sources import folder as folder_source
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.storage import StorageMissing

FACES_NAME, NO_FACE_NAME, SHEET_NAME = "faces.jsonl", "no_face.jsonl", "faces.png"
RECORD_SUFFIX = ".boxes.json"
_VERSION = 1  # raised when the same options come to give other crops
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
    rows: list[_Row] = []
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


@dataclasses.dataclass(frozen=True)
class _Row:
    """What the lists and the summary need of a video's record."""

    key: str
    where: str
    crops: list[dict[str, Any]]  # rows for `faces.jsonl`, but for key and where
    looks: int
    detections: int
    reason: str
    detail: str
    already_done: bool


def _do_all(
    videos: Iterable[SourceVideo], output_url: str, options: FaceOptions, workers: int
) -> Generator[_Row]:
    """Do the videos, a few at a time, and give their rows in the videos' order."""
    if workers <= 1:
        for video in videos:
            yield _do(video, output_url, options)
        return
    waiting: collections.deque[tuple[str, Future[_Row]]] = collections.deque()
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
                waiting.append((video.where, pool.submit(_do, video, output_url, options)))
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


_detector = functools.lru_cache(maxsize=1)(detect.load)  # one per process


def _do(video: SourceVideo, output_url: str, options: FaceOptions) -> _Row:
    asked = {"version": _VERSION, "stamp": video.stamp, "options": dataclasses.asdict(options)}
    record_url = storage.join(output_url, video.key + RECORD_SUFFIX)
    found = _read_record(record_url)
    if all(found.get(name) == value for name, value in asked.items()) and all(
        storage.exists(storage.join(output_url, track["video"])) for track in found["tracks"]
    ):
        return _row(video, found, already_done=True)
    # Crops first, the record after them: without a record, none of a video's crops counts.
    for track in found.get("tracks", []):
        storage.delete(storage.join(output_url, track["video"]))
    storage.delete(record_url)
    try:
        data = video.read()
    except StorageMissing as error:  # perhaps there again next time: leaves no record
        missing = {"tracks": [], "left_out": {"reason": "missing", "detail": str(error)}}
        return _row(video, missing, already_done=False)
    result = crop_faces(data, _detector(options.detector), options)
    record: dict[str, Any] = asked | {
        "key": video.key,
        "where": video.where,
        "detector": options.detector,
    }
    if isinstance(result, LeftOut):
        record |= {"left_out": dataclasses.asdict(result), "tracks": []}
    else:
        record |= _found(video.key, result)
        for track, cut in zip(record["tracks"], result.tracks, strict=True):
            storage.write_bytes(storage.join(output_url, track["video"]), cut.mp4)
    storage.write_bytes(record_url, json.dumps(record).encode())
    return _row(video, record, already_done=False)


def _read_record(url: str) -> dict[str, Any]:
    """The record of a video, or an empty one if there is none that can be read."""
    if not storage.exists(url):
        return {}
    try:
        record = json.loads(storage.read_bytes(url))
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("tracks"), list) else {}


def _found(key: str, cropped: Cropped) -> dict[str, Any]:
    """The part of a record that says what was found, pixels to two decimals."""
    info = cropped.info
    tracks = [
        {
            # A dot cannot be part of a key, so this is no other video's crop.
            "video": f"{key}.mp4" if number == 1 else f"{key}.{number}.mp4",
            "first_frame": cut.track.first,
            "boxes": cut.track.boxes.round(2).tolist(),
            "squares": cut.squares.round(2).tolist(),
            "scores": [
                round(float(score), 4) if found else None
                for score, found in zip(cut.track.scores, cut.track.detected, strict=True)
            ],
            "detected": cut.track.detected.tolist(),
        }
        for number, cut in enumerate(cropped.tracks, start=1)
    ]
    return {
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "num_frames": info.num_frames,
        "detected_every": cropped.every,
        "tracks": tracks,
    }


def _row(video: SourceVideo, record: dict[str, Any], already_done: bool) -> _Row:
    every = record.get("detected_every", 1)
    crops, looks, detections = [], 0, 0
    for track in record["tracks"]:
        first, length = track["first_frame"], len(track["boxes"])
        detections += sum(track["detected"])
        looks += sum(frame % every == 0 for frame in range(first, first + length))
        crops.append(
            {
                "video": track["video"],
                "first_frame": first,
                "num_frames": length,
                "fps": record["fps"],
            }
        )
    left_out = record.get("left_out", {"reason": "", "detail": ""})
    return _Row(
        video.key, video.where, crops, looks, detections, **left_out, already_done=already_done
    )


def _finish(output_url: str, rows: list[_Row]) -> FacesSummary:
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
        records = [storage.join(output_url, row.key + RECORD_SUFFIX) for row in rows if row.crops]
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
