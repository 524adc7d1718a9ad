"""One video's step: its crops and its record in the folder of crops, unless they are there already.

The record, `KEY.boxes.json`, says what was asked (input, options), and for each frame of each track
the face's box, the square cut out, and the detector's score where it saw the face; or, for a video
without crops, why. It is written last: it vouches for the crops, and is believed only while they
are there and the same is asked; one without crops, only within the same limits.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any

from data_sharding.faces import detect
from data_sharding.faces.video import Cropped, FaceOptions, LeftOut, crop_faces
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.storage import StorageMissingError
from svfap_dist.video.probe import Limits, Reason

_VERSION = 2  # raised when the same options come to give other crops


@dataclasses.dataclass(frozen=True)
class Row:
    """What lists and the summary need of a record.

    crops: for `faces.jsonl`, but for key and where.
    looks, detections: frames looked at within the tracks, and of these, with a face.
    reason: "" if there are crops.
    """

    key: str
    where: str
    crops: list[dict[str, Any]]
    looks: int
    detections: int
    reason: str
    detail: str
    already_done: bool


def url_of(output_url: str, key: str) -> str:
    """Where the record of a video is."""
    return storage.join(output_url, f"{key}.boxes.json")


def do(output_url: str, options: FaceOptions, limits: Limits, video: SourceVideo) -> Row:
    """Crop one video and write its record, unless that is done; may hang or crash.

    Raises: ConfigError from the detector; StorageError.
    """
    asked = _asked(options, video)
    record = _read(url_of(output_url, video.key))
    crops = [storage.join(output_url, track["video"]) for track in record.get("tracks", [])]
    within = dataclasses.asdict(limits)
    same = asked.items() <= record.items() and record.get("limits", within) == within
    if same and all(map(storage.exists, crops)):
        return _row(video, record, already_done=True)
    _take_away(output_url, video.key, len(crops))
    try:
        result = crop_faces(video.read(), _detector(options.detector), options, limits)
    except StorageMissingError as error:  # perhaps there again next time: leaves no record
        missing = {"tracks": [], "left_out": {"reason": "missing", "detail": str(error)}}
        return _row(video, missing, already_done=False)
    except MemoryError as error:
        result = LeftOut("out_of_memory", f"more than {limits.memory_bytes} bytes {error}".rstrip())
    if isinstance(result, LeftOut):
        return _left_out(output_url, asked, limits, video, result)
    found = _found(video.key, result)
    for track, cut in zip(found["tracks"], result.tracks, strict=True):
        storage.write_bytes(storage.join(output_url, track["video"]), cut.mp4)
    return _written(output_url, video, asked | found)


def give_up(
    output_url: str,
    options: FaceOptions,
    limits: Limits,
    video: SourceVideo,
    reason: Reason,
    found: str,
) -> Row:
    """Write the record of a video that hung or crashed the process that was to crop it."""
    _take_away(output_url, video.key, 0)
    asked = _asked(options, video)
    return _left_out(output_url, asked, limits, video, LeftOut(reason, found))


def _asked(options: FaceOptions, video: SourceVideo) -> dict[str, Any]:
    return {"version": _VERSION, "stamp": video.stamp, "options": dataclasses.asdict(options)}


def _left_out(
    output_url: str, asked: dict[str, Any], limits: Limits, video: SourceVideo, why: LeftOut
) -> Row:
    within = dataclasses.asdict(limits)
    record = {"left_out": dataclasses.asdict(why), "limits": within, "tracks": []}
    return _written(output_url, video, asked | record)


def _written(output_url: str, video: SourceVideo, record: dict[str, Any]) -> Row:
    record |= {
        "key": video.key,
        "where": video.where,
        "detector": record["options"]["detector"],
    }
    storage.write_bytes(url_of(output_url, video.key), json.dumps(record).encode())
    return _row(video, record, already_done=False)


_detector = functools.lru_cache(maxsize=1)(detect.load)  # one per process


def _read(url: str) -> dict[str, Any]:
    """The record of a video, or an empty one if there is none that can be read."""
    if not storage.exists(url):
        return {}
    try:
        record = json.loads(storage.read_bytes(url))
    except ValueError:
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("tracks"), list) else {}


def _take_away(output_url: str, key: str, recorded: int) -> None:
    """Delete the record first, then the crops: those recorded and those of an interrupted run."""
    storage.delete(url_of(output_url, key))
    crops: list[str] = []
    for number in itertools.count(1):
        crops.append(storage.join(output_url, _crop_name(key, number)))
        if number > recorded and not storage.exists(crops[-1]):
            break
    for crop in reversed(crops):  # so that none is left behind a gap if this is interrupted
        storage.delete(crop)


def _crop_name(key: str, number: int) -> str:
    # A dot cannot be part of a key, so this is no other video's crop.
    return f"{key}.mp4" if number == 1 else f"{key}.{number}.mp4"


def _found(key: str, cropped: Cropped) -> dict[str, Any]:
    """The part of a record that says what was found, pixels to two decimals."""
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
    info = cropped.info
    return {
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "num_frames": info.num_frames,
        "detected_every": cropped.every,
        "cuts": cropped.cuts,
        "tracks": tracks,
    }


def _row(video: SourceVideo, record: dict[str, Any], already_done: bool) -> Row:
    every = record.get("detected_every", 1)
    crops, looks, detections = [], 0, 0
    for track in record["tracks"]:
        first, length = track["first_frame"], len(track["boxes"])
        detections += sum(track["detected"])
        looks += sum(frame % every == 0 for frame in range(first, first + length))
        crop = {"video": track["video"], "first_frame": first, "num_frames": length}
        crops.append(crop | {"fps": record["fps"]})
    left_out = record.get("left_out", {"reason": "", "detail": ""})
    return Row(
        video.key, video.where, crops, looks, detections, **left_out, already_done=already_done
    )
