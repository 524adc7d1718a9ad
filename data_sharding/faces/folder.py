"""Crop the faces of a folder of videos into a folder that `svfap shard folder` takes.

In: a folder of videos. Out: crops with their records (`record`), `faces.jsonl` with the crops,
`no_face.jsonl` with the rejected videos and their reasons, `faces.png` with some of them. A video
that has a record is not done again, so the same command resumes an interrupted job and adds new
videos. A video that hangs or crashes its process is rejected like any broken one, and is tried
again when the limits have changed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Generator, Iterator
from typing import IO, Any

from data_sharding import temporary
from data_sharding.faces import detect, sheet
from data_sharding.faces.crop import TRACKS, FaceOptions
from data_sharding.faces.record import FaceCropper, Row, record_url
from data_sharding.markers import ProgressCallback, silent
from data_sharding.sources import SourceVideo
from data_sharding.sources.folder import named_by_path
from data_sharding.sources.listing import list_videos
from data_sharding.video_pool import VideoPool
from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.video import image_grid
from svfap_dist.video.probe import Limits

FACES_NAME, NO_FACE_NAME, SHEET_NAME = "faces.jsonl", "no_face.jsonl", "faces.png"
# The detector takes most of the time, and its time depends on a video's length, not its bytes.
LIMITS = Limits(seconds=120, seconds_per_mib=20)


@dataclasses.dataclass
class FacesSummary:
    """What `svfap faces` did, and found done."""

    url: str
    num_videos: int = 0
    num_crops: int = 0
    num_frames: int = 0  # of the crops
    seconds: float = 0.0  # of the crops
    detected_share: float = 0.0  # frames with a detection, of those looked at within tracks
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)  # videos, by reason
    already_done: int = 0  # videos
    sheet: str = ""  # picture of some crops, if there are any

    def lines(self) -> list[str]:
        """Return the lines that the command prints."""
        lines = [
            f"{self.url}: {self.num_crops} crops, {self.num_frames} frames, "
            f"{self.seconds / 3600:.3f} hours, from {self.num_videos} videos"
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
    limits: Limits = LIMITS,
    workers: int | None = None,
    progress: ProgressCallback = silent,
) -> FacesSummary:
    """Crop the faces of all videos below a folder.

    Args:
        folder: Folder or prefix of the videos.
        output_url: Folder or prefix of the crops.
        options: What decides the crops.
        limits: Limits of what a video may cost.
        workers: Processes; 0: this one, without limits; None: by the number of CPUs and videos.
        progress: Called as videos get done.

    Raises:
        ConfigError: An option is invalid, or the output is in use or among the inputs.
        ShardError: There are no videos.
    """
    _check(options, workers)
    _refuse_output_among_inputs(folder, output_url)
    detect.load_detector(options.detector)  # a wrong name fails here, once
    videos = list_videos(folder)
    if workers is None:
        workers = min(usable_cpus(), len(videos))
    cropper = FaceCropper(output_url, options, limits)
    with (
        temporary.output_lock(output_url),
        temporary.file() as faces,
        temporary.file() as no_face,
        contextlib.closing(_crop_all(named_by_path(folder, videos), cropper, workers)) as done,
    ):
        lists = _Lists(output_url, faces, no_face)
        for row in done:
            lists.add(row)
            progress(lists.summary.num_videos, len(videos), lists.left_out.total())
        return lists.finish()


def _check(options: FaceOptions, workers: int | None) -> None:
    size, margin, tracks = options.size, options.margin, options.tracks
    for is_valid, option, value, fix in (
        (size >= 16 and size % 2 == 0, "--size", size, "use an even size, 16 or more"),
        (0 <= margin <= 4, "--margin", margin, "use 0 to 4"),
        (tracks in TRACKS, "--tracks", tracks, "use best or all"),
        (workers is None or workers >= 0, "--workers", workers, "use 0 or 1 for no processes"),
    ):
        if not is_valid:
            raise ConfigError("Option out of range", option, str(value), fix)


def _refuse_output_among_inputs(folder: str, output_url: str) -> None:
    """Raise if the output is an input, since the next run would crop the crops again."""
    paths = [
        url.rstrip("/") if storage.is_remote(url) else os.path.realpath(storage.local_path(url))
        for url in (folder, output_url)
    ]
    if (paths[1] + "/").startswith(paths[0] + "/"):
        what, do = "Output is inside the folder of the videos", "write the crops beside it"
        raise ConfigError(what, output_url, f"videos in {folder}", do)


def _crop_all(videos: Iterator[SourceVideo], cropper: FaceCropper, workers: int) -> Generator[Row]:
    """Crop the videos, a few at a time, and yield their rows in order."""
    if workers == 0:
        yield from map(cropper, videos)
        return
    pool = VideoPool(cropper, cropper.limits, cropper.reject, workers)
    with contextlib.closing(pool), contextlib.closing(pool.map(videos)) as done:
        for _, row in done:
            yield row


class _Lists:
    """The lists of a job, on the temporary disk, and the counts of its summary."""

    def __init__(
        self, url: str, faces: tuple[IO[bytes], str], no_face: tuple[IO[bytes], str]
    ) -> None:
        self._url, self._faces, self._no_face = url, faces, no_face
        self.summary = FacesSummary(url)
        self._num_cropped = self._looks = self._detections = 0
        self.left_out = collections.Counter[str]()

    def add(self, row: Row) -> None:
        """Add a video."""
        about, summary = {"key": row.key, "where": row.where}, self.summary
        summary.num_videos += 1
        summary.already_done += row.already_done
        self._num_cropped += bool(row.crops)
        self._looks += row.looks
        self._detections += row.detections
        for crop in row.crops:
            summary.num_crops += 1
            summary.num_frames += crop["num_frames"]
            summary.seconds += crop["num_frames"] / crop["fps"]
            _add_line(self._faces, about | crop)
        if row.reason:
            self.left_out[row.reason] += 1
            _add_line(self._no_face, about | {"reason": row.reason, "detail": row.detail})

    def finish(self) -> FacesSummary:
        """Store the lists and the picture; return the summary."""
        for (lines, path), name in ((self._faces, FACES_NAME), (self._no_face, NO_FACE_NAME)):
            with temporary.as_storage_error():
                lines.flush()
            storage.upload_file(path, storage.join(self._url, name))
        if self._num_cropped:
            self.summary.sheet = storage.join(self._url, SHEET_NAME)
            sheet.draw(self._some_records(), self._url, self.summary.sheet)
        self.summary.detected_share = self._detections / max(1, self._looks)
        self.summary.left_out = dict(self.left_out.most_common())
        return self.summary

    def _some_records(self) -> list[str]:
        """Return the records of some videos with crops, evenly spaced."""
        wanted = image_grid.evenly_spaced(self._num_cropped, sheet.NUM_VIDEOS)
        with open(self._faces[1]) as lines:
            keys = (json.loads(line)["key"] for line in lines)
            each = enumerate(key for key, _ in itertools.groupby(keys))
            return [record_url(self._url, key) for number, key in each if number in wanted]


def _add_line(file: tuple[IO[bytes], str], fields: dict[str, Any]) -> None:
    with temporary.as_storage_error():
        file[0].write(json.dumps(fields).encode() + b"\n")
