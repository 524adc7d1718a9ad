"""A folder of videos to a folder of crops: what is written, what is not done twice, kills."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from face_videos import backdrop, decoded, encode, straight_way, with_faces
from PIL import Image

from data_sharding import pipeline as sharding
from data_sharding.faces.crop import FaceOptions
from data_sharding.faces.folder import FacesSummary, make_crops
from data_sharding.faces.record import FaceCropper
from data_sharding.sources import SourceVideo
from data_sharding.video_pool import VideoPool
from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.video.probe import Limits

SMALL = FaceOptions(size=64)
LENGTH = 12  # frames of a video: three looks of the detector


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos with a face, one without, one that is junk."""
    folder = tmp_path_factory.mktemp("videos")
    way = straight_way(60)[:LENGTH]
    moving = encode(map(with_faces, way))
    files = {
        "a.mp4": moving,
        "deep/b.c.mp4": encode(map(with_faces, way[::-1])),
        "junk.mp4": b"this is no video" * 100,
        "nobody.mp4": encode([backdrop(2)] * LENGTH),
        "z.mp4": encode([with_faces((10, 20), (180, 90))] * LENGTH),
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed")
    make(videos, output)
    return files_of(output)


def make(videos: Path, output: Path, options: FaceOptions = SMALL, workers: int = 0):
    return make_crops(str(videos), str(output), options, workers=workers)


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rows(text: bytes) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_video_gets_its_crop_or_its_reason(undisturbed: dict[str, bytes]) -> None:
    crops = {"a.mp4", "deep/b_c.mp4", "z.mp4"}
    records = {"a", "deep/b_c", "junk", "nobody", "z"}
    lists = {"faces.jsonl", "no_face.jsonl", "faces.png"}
    assert set(undisturbed) == crops | {f"{key}.boxes.json" for key in records} | lists
    assert {row["video"] for row in rows(undisturbed["faces.jsonl"])} == crops
    left_out = {row["key"]: row["reason"] for row in rows(undisturbed["no_face.jsonl"])}
    assert left_out == {"junk": "unreadable", "nobody": "no_face"}


def test_the_record_says_what_was_found_and_cut(undisturbed: dict[str, bytes]) -> None:
    record = json.loads(undisturbed["a.boxes.json"])
    assert (record["width"], record["height"], record["fps"]) == (320, 240, 25.0)
    assert (record["num_frames"], record["detector"]) == (LENGTH, "haar")
    assert record["options"] == {"size": 64, "margin": 0.33, "detector": "haar", "tracks": "best"}
    (track,) = record["tracks"]
    assert (track["video"], track["first_frame"]) == ("a.mp4", 0)
    lengths = [len(track[name]) for name in ("boxes", "squares", "scores", "detected")]
    assert lengths == [LENGTH] * 4
    every = record["detected_every"]
    assert track["detected"] == [frame % every == 0 for frame in range(LENGTH)]
    assert [score is not None for score in track["scores"]] == track["detected"]
    boxes, squares = np.array(track["boxes"]), np.array(track["squares"])
    assert (squares[:, :2] <= boxes[:, :2]).all()
    assert (squares[:, 2:] >= boxes[:, 2:]).all()


def test_the_sheet_shows_the_crops(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "sheet.png").write_bytes(undisturbed["faces.png"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(float)
    crop = Image.fromarray(decoded(undisturbed["a.mp4"])[0]).resize((144, 144))
    # The first video's second row begins with its first crop.
    height = sheet.shape[0] // 3
    left = sheet.shape[1] - 6 * 146  # width of the labels
    shown = sheet[height - 146 : height - 2, left : left + 144]
    assert np.abs(shown - np.asarray(crop)).mean() < 12
    assert np.abs(shown[::-1] - np.asarray(crop)).mean() > 20


def test_workers_give_the_same_files(
    videos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    summary = make(videos, tmp_path, workers=2)
    assert files_of(tmp_path) == undisturbed
    assert (summary.num_videos, summary.num_crops, summary.already_done) == (5, 3, 0)
    assert summary.left_out == {"unreadable": 1, "no_face": 1}
    assert summary.detected_share == 1.0


def test_what_is_done_is_not_done_again(videos: Path, tmp_path: Path) -> None:
    first = make(videos, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    again = make(videos, tmp_path)
    assert (first.already_done, again.already_done) == (0, 5)
    assert as_if_new(again) == as_if_new(first)
    assert {path: path.stat().st_mtime_ns for path in times} == times

    (tmp_path / "z.mp4").unlink()  # a crop is lost, a record is torn
    (tmp_path / "nobody.boxes.json").write_text('{"version": 1, "tra')
    assert make(videos, tmp_path).already_done == 3
    assert (tmp_path / "z.mp4").exists()


def as_if_new(summary: FacesSummary) -> dict:
    return {k: v for k, v in vars(summary).items() if k != "already_done"}


def hang(seconds: float) -> bytes:
    time.sleep(seconds)
    return b""


def test_a_video_that_hangs_or_crashes_is_listed_and_the_rest_goes_on(
    videos: Path, tmp_path: Path
) -> None:
    def video(key: str, read: Callable[[], bytes], num_bytes: int = 0) -> SourceVideo:
        return SourceVideo(key, read, {}, key, stamp=key, num_bytes=num_bytes)

    large = 1 << 20  # bytes, for which there is time
    good = video("good", (videos / "a.mp4").read_bytes, large)
    stuck = video("stuck", functools.partial(hang, 60))
    deadly = video("deadly", functools.partial(os._exit, 9), large)

    def do(seconds: int, *some: SourceVideo) -> list[tuple[str, str, bool]]:
        limits = Limits(seconds=seconds, seconds_per_mib=100)
        cropper = FaceCropper(str(tmp_path), SMALL, limits)
        pool = VideoPool(cropper, limits, cropper.reject)
        with contextlib.closing(pool):
            return [(row.key, row.reason, row.already_done) for _, row in pool.map(some)]

    found = [("stuck", "hung", False), ("deadly", "crashed", False), ("good", "", False)]
    assert do(1, stuck, deadly, good) == found
    assert json.loads((tmp_path / "stuck.boxes.json").read_bytes())["left_out"]["reason"] == "hung"
    again = 1, good, stuck, deadly  # no call waits for them again
    assert all(already_done for _, _, already_done in do(*again))
    assert do(2, stuck) == found[:1]  # unless they are given more time


def test_other_options_do_all_anew_and_leave_nothing_old(
    videos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    make(videos, tmp_path, FaceOptions(size=64, tracks="all"))
    assert (tmp_path / "z.2.mp4").exists()
    assert make(videos, tmp_path).already_done == 0
    assert files_of(tmp_path) == undisturbed


def test_a_changed_and_a_new_video_are_done(videos: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "z.mp4").write_bytes((videos / "z.mp4").read_bytes())
    make(folder, output)
    (folder / "new.mp4").write_bytes((videos / "a.mp4").read_bytes())
    assert make(folder, output).already_done == 1
    (folder / "new.mp4").write_bytes((videos / "nobody.mp4").read_bytes())
    summary = make(folder, output)
    assert (summary.already_done, summary.left_out) == (1, {"no_face": 1})
    assert not (output / "new.mp4").exists()


KILLED = """
import os, signal, sys
from data_sharding.faces import detect, folder
from data_sharding.faces.crop import FaceOptions
from data_sharding.video_pool import VideoPool
from svfap_dist.video.probe import Limits
from data_sharding.sources import SourceVideo
from data_sharding.video_pool import VideoPool
from svfap_dist import storage

videos, output, what, how_often = sys.argv[1:]
left = int(how_often)

def counted(function):
    def call(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call

if what == "look":
    detect.Haar.detect = counted(detect.Haar.detect)
else:
    storage.write_bytes = counted(storage.write_bytes)
folder.make_crops(videos, output, FaceOptions(size=64), workers=0)
"""


@pytest.mark.parametrize(
    ("what", "how_often", "done"),
    [("look", 8, 3), ("write", 1, 0), ("write", 3, 1)],
)
def test_a_killed_run_goes_on_and_ends_as_if_undisturbed(
    videos: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    what: str,
    how_often: int,
    done: int,
) -> None:
    command = [sys.executable, "-c", KILLED, str(videos), str(tmp_path), what, str(how_often)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.boxes.json")}
    assert make(videos, tmp_path).already_done == len(kept) == done
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert files_of(tmp_path) == undisturbed


def test_crops_of_a_run_killed_before_its_record_do_not_stay(
    videos: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for name in ("nobody.mp4", "z.mp4", "z.2.mp4", "z.3.mp4"):
        (tmp_path / name).write_bytes(b"crops without a record")
    make(videos, tmp_path)
    assert files_of(tmp_path) == undisturbed


def test_the_output_must_not_lie_among_the_videos(videos: Path) -> None:
    for output in (videos, videos / "crops"):
        with pytest.raises(ConfigError, match="Output is inside"):
            make(videos, output)


@pytest.mark.parametrize(
    "options",
    [
        FaceOptions(size=63),
        FaceOptions(size=0),
        FaceOptions(margin=-0.1),
        FaceOptions(tracks="some"),
        FaceOptions(detector="eyes"),
    ],
)
def test_options_that_cannot_be_obeyed_are_refused(
    videos: Path, tmp_path: Path, options: FaceOptions
) -> None:
    with pytest.raises(ConfigError):
        make(videos, tmp_path / "out", options)
    assert not os.path.exists(tmp_path / "out")


def test_crops_go_into_shards(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in undisturbed.items():
        (tmp_path / "crops" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "crops" / name).write_bytes(data)
    shards = str(tmp_path / "shards")
    summary = sharding.shard(
        "folder", str(tmp_path / "crops"), shards, min_frames=LENGTH, workers=0
    )
    assert (summary.num_samples, summary.rejected) == (3, {})
    assert sharding.show(shards).resolutions == {"64x64": 3}


def test_a_bucket_takes_the_crops(
    videos: Path, undisturbed: dict[str, bytes], s3_bucket: str
) -> None:
    from svfap_dist import storage

    summary = make_crops(str(videos), f"{s3_bucket}/crops", SMALL, workers=0)
    assert summary.num_crops == 3
    assert storage.read_bytes(f"{s3_bucket}/crops/deep/b_c.mp4") == undisturbed["deep/b_c.mp4"]
    assert make_crops(str(videos), f"{s3_bucket}/crops", SMALL, workers=0).already_done == 5


def test_crops_of_other_videos_are_not_taken_for_a_name_with_brackets(s3_bucket: str) -> None:
    others = {f"{s3_bucket}/{name}" for name in ("a1.boxes.json", "a1.mp4", "a2.mp4", "a2.2.mp4")}
    for url in [*others, f"{s3_bucket}/a[12].mp4"]:
        storage.write_bytes(url, b"x")
    video = SourceVideo("a[12]", read=bytes, labels={}, where="a[12].mp4")
    FaceCropper(s3_bucket, SMALL, Limits()).reject(video, "unreadable", "")
    left = {f"{s3_bucket}/{name}" for name in storage.list_files(s3_bucket)}
    assert left == others | {f"{s3_bucket}/a[12].boxes.json"}
