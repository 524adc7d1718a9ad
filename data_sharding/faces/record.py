"""Crop the faces of one video into a folder, and record it, unless that is done already.

In: a video of a source. Out: `KEY.mp4` with its face (for `--tracks all` also `KEY.2.mp4`, ...),
its record `KEY.boxes.json`, and a `Row` for the lists of the folder.

The record has the options and, for each frame of each track, the face's box, the square that was
cut out, and the detector's score where it saw the face; or, for a video without crops, why. It is
written last: it commits the crops, and is valid only while they exist and the options are the same;
one without crops, only within the same limits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any

from data_sharding.faces import detect
from data_sharding.faces.crop import Cropped, FaceOptions, crop_faces
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.storage import StorageMissingError
from svfap_dist.video.probe import Limits, Reason, Rejected

_VERSION = 2  # incremented when the same options give other crops


@dataclasses.dataclass(frozen=True)
class Row:
    """What lists and the summary need of a record."""

    key: str
    where: str
    crops: list[dict[str, Any]]  # for `faces.jsonl`, without key and where
    looks: int  # frames looked at within the tracks
    detections: int  # of these, with a face
    reason: str  # "" if there are crops
    detail: str
    already_done: bool


def record_url(output_url: str, key: str) -> str:
    """Return where the record of a video is.

    Args:
        output_url: Folder of the crops.
        key: Key of the video.
    """
    return storage.join(output_url, f"{key}.boxes.json")


@dataclasses.dataclass(frozen=True)
class FaceCropper:
    """Crops one video after the other into a folder; picklable."""

    output_url: str  # folder or prefix of the crops
    options: FaceOptions  # what decides them
    limits: Limits  # limits of what a video may cost

    def __call__(self, video: SourceVideo) -> Row:
        """Crop one video and write its record, unless that is done; may hang or crash.

        Args:
            video: The video.

        Raises:
            ConfigError: The detector cannot be loaded.
        """
        inputs, within = self._inputs(video), dataclasses.asdict(self.limits)
        record = _read(record_url(self.output_url, video.key))
        crops = [self._url(track["video"]) for track in record.get("tracks", [])]
        is_same = inputs.items() <= record.items() and record.get("limits", within) == within
        if is_same and all(map(storage.exists, crops)):
            return _row(video, record, already_done=True)
        self._delete(video.key, len(crops))
        try:
            detector = _detector(self.options.detector)
            result = crop_faces(video.read(), detector, self.options, self.limits)
        except StorageMissingError as error:  # it may come back: leaves no record
            missing = {"tracks": [], "left_out": {"reason": "missing", "detail": str(error)}}
            return _row(video, missing, already_done=False)
        except MemoryError as error:
            found = f"more than {self.limits.memory_bytes} bytes {error}".rstrip()
            result = Rejected("out_of_memory", found)
        if isinstance(result, Rejected):
            return self._write(video, self._without_crops(result))
        found = _describe(video.key, result)
        for track, cut in zip(found["tracks"], result.tracks, strict=True):
            storage.write_bytes(self._url(track["video"]), cut.mp4)
        return self._write(video, found)

    def reject(self, video: SourceVideo, reason: Reason, found: str) -> Row:
        """Write the record of a video that hung or crashed the process that cropped it.

        Args:
            video: The video.
            reason: "hung" or "crashed".
            found: What was seen.
        """
        self._delete(video.key, 0)
        return self._write(video, self._without_crops(Rejected(reason, found)))

    def _url(self, name: str) -> str:
        return storage.join(self.output_url, name)

    def _inputs(self, video: SourceVideo) -> dict[str, Any]:
        options = dataclasses.asdict(self.options)
        return {"version": _VERSION, "stamp": video.stamp, "options": options}

    def _without_crops(self, why: Rejected) -> dict[str, Any]:
        limits = dataclasses.asdict(self.limits)
        return {"left_out": dataclasses.asdict(why), "limits": limits, "tracks": []}

    def _write(self, video: SourceVideo, found: dict[str, Any]) -> Row:
        about = {"key": video.key, "where": video.where, "detector": self.options.detector}
        record = self._inputs(video) | found | about
        storage.write_bytes(record_url(self.output_url, video.key), json.dumps(record).encode())
        return _row(video, record, already_done=False)

    def _delete(self, key: str, num_recorded: int) -> None:
        """Delete the record first, then the crops: also those of an interrupted run."""
        storage.delete(record_url(self.output_url, key))
        crops: list[str] = []
        for number in itertools.count(1):
            crops.append(self._url(_crop_name(key, number)))
            if number > num_recorded and not storage.exists(crops[-1]):
                break
        for crop in reversed(crops):  # an interruption leaves none behind a gap
            storage.delete(crop)


_detector = functools.lru_cache(maxsize=1)(detect.load_detector)  # one per process


def _read(url: str) -> dict[str, Any]:
    """Return the record of a video, or an empty one if none can be read."""
    if not storage.exists(url):
        return {}
    try:
        record = json.loads(storage.read_bytes(url))
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("tracks"), list) else {}


def _crop_name(key: str, number: int) -> str:
    # A key has no dots, so this is no other video's crop.
    return f"{key}.mp4" if number == 1 else f"{key}.{number}.mp4"


def _describe(key: str, cropped: Cropped) -> dict[str, Any]:
    """Return the part of a record about what was found, pixels to two decimals."""
    tracks = [
        {
            "video": _crop_name(key, number),
            "first_frame": cut.track.first,
            "boxes": cut.track.boxes.round(2).tolist(),
            "squares": cut.squares.round(2).tolist(),
            "scores": [
                round(float(score), 4) if seen else None
                for score, seen in zip(cut.track.scores, cut.track.detected, strict=True)
            ],
            "detected": cut.track.detected.tolist(),
        }
        for number, cut in enumerate(cropped.tracks, start=1)
    ]
    names = ("width", "height", "fps", "num_frames")
    info = {name: getattr(cropped.info, name) for name in names}
    return info | {"detected_every": cropped.every, "cuts": cropped.cuts, "tracks": tracks}


def _row(video: SourceVideo, record: dict[str, Any], already_done: bool) -> Row:
    every = record.get("detected_every", 1)
    crops, looks, detections = [], 0, 0
    for track in record["tracks"]:
        first, length = track["first_frame"], len(track["boxes"])
        detections += sum(track["detected"])
        looks += sum(frame % every == 0 for frame in range(first, first + length))
        crop = {"video": track["video"], "first_frame": first, "num_frames": length}
        crops.append(crop | {"fps": record["fps"]})
    why = record.get("left_out", {"reason": "", "detail": ""})
    return Row(video.key, video.where, crops, looks, detections, **why, already_done=already_done)
