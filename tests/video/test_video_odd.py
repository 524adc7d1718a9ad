"""Odd but whole videos: turned, mirrored, cut between key frames, in ticks that are not frames."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from clips import make_video, read_frame_number
from odd_videos import remuxed, with_matrix
from PIL import ExifTags, Image

from data_sharding import pipeline as sharding
from data_sharding.faces.crop import Cropped, FaceOptions, crop_faces
from data_sharding.faces.detect import load_detector
from data_sharding.frames import mux_jpegs
from data_sharding.transcode import TrainProfile, transcode
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.video.backends import BACKENDS
from svfap_dist.video.dali import DaliDecoder
from svfap_dist.video.frames import VideoRequest, YuvFrames, to_rgb, whole_frames
from svfap_dist.video.info import Crop, VideoInfo, dump_info, load_info
from svfap_dist.video.probe import Rejected, probe
from svfap_dist.video.pyav import decode
from svfap_dist.video.upright import read_upright_frames

CASES = Path(__file__).parent / "cases"
B_FRAMES = {"preset": "fast", "bf": "2"}
OPEN_GOP = {**B_FRAMES, "x264-params": "open-gop=1"}
QUARTERS = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # where x goes
MATRICES = [(*x, *y) for x in QUARTERS for y in QUARTERS if x[0] * y[0] + x[1] * y[1] == 0]
needs_dali = pytest.mark.skipif(not BACKENDS["dali"].is_installed, reason="DALI is not installed")


def probed(data: bytes) -> VideoInfo:
    info = probe(data, 1)
    assert isinstance(info, VideoInfo), info
    assert load_info(dump_info(info)) == info
    return info


def painted(data: bytes, info: VideoInfo, numbers: range) -> list[int]:
    return list(map(read_frame_number, whole_frames(decode(data, info, numbers))))


def shown(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Pixels [F, H, W, ...] by the definition of a display matrix, point by point."""
    a, b, c, d = matrix
    y, x = np.mgrid[: pixels.shape[1], : pixels.shape[2]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    out = np.zeros((len(pixels), to_y.max() + 1, to_x.max() + 1, *pixels.shape[3:]), pixels.dtype)
    out[:, to_y, to_x] = pixels
    return out


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv420p"), ("libx264", "yuv444p")])
def test_frames_are_turned_and_mirrored_as_the_matrix_says(matrix, codec, pix_fmt) -> None:
    assert len(MATRICES) == 8
    stored = make_video(None, 5, codec=codec, pix_fmt=pix_fmt)
    data = with_matrix(stored, *matrix)
    plain, info = probed(stored), probed(data)
    expected = decode(stored, plain, [3, 1])
    found = decode(data, info, [3, 1])
    if isinstance(expected, YuvFrames):
        assert isinstance(found, YuvFrames)
        for plane in ("y", "u", "v"):
            turned = shown(getattr(expected, plane), matrix)
            np.testing.assert_array_equal(getattr(found, plane), turned)
        assert found.colors == expected.colors
    else:
        np.testing.assert_array_equal(whole_frames(found), shown(whole_frames(expected), matrix))
    pictures = shown(whole_frames(decode(stored, plain, range(5))), matrix)
    assert (info.height, info.width) == pictures.shape[1:3]

    upright = np.stack([frame.rgb() for frame in read_upright_frames(data)])
    assert np.abs(upright.astype(int) - pictures).mean() < 2

    video, layout = transcode(data, info, TrainProfile("full", crf=10))
    stored_for_training = whole_frames(decode(video, layout, range(5)))
    assert np.abs(stored_for_training.astype(int) - pictures).mean() < 4
    assert layout.is_plain


@pytest.mark.parametrize(("orientation", "sides"), [(1, (64, 48)), (3, (64, 48)), (6, (48, 64))])
def test_pictures_of_motion_jpeg_are_turned_as_exif_says(orientation, sides) -> None:
    stored = make_video(None, 3, codec="mjpeg")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    jpegs = []
    for number in range(3):
        file = io.BytesIO()
        pixels = whole_frames(decode(stored, probed(stored), [number]))[0]
        Image.fromarray(pixels).save(file, "JPEG", exif=exif)
        jpegs.append(file.getvalue())
    data = mux_jpegs(jpegs, (64, 48), 25)
    info = probed(data)
    assert (info.width, info.height) == sides
    matrix = {1: (1, 0, 0, 1), 3: (-1, 0, 0, -1), 6: (0, 1, -1, 0)}[orientation]
    expected = shown(whole_frames(decode(stored, probed(stored), range(3))), matrix)
    assert np.abs(whole_frames(decode(data, info, range(3))).astype(int) - expected).mean() < 4


def test_shards_of_before_are_read_as_before() -> None:
    stored = make_video(None, 5)
    data = with_matrix(stored, 0, 1, -1, 0)
    old = load_info(dump_info(probed(stored)))  # it had no orientation
    np.testing.assert_array_equal(
        whole_frames(decode(data, old, range(5))), whole_frames(decode(stored, old, range(5)))
    )
    assert b"orientation" not in dump_info(old)
    assert b"seekable" not in dump_info(old)


def test_an_orientation_that_does_not_exist_is_refused() -> None:
    info = probed(make_video(None, 5))
    with pytest.raises(ValueError, match="orientation 9"):
        load_info(dump_info(dataclasses.replace(info, orientation=9)))


@needs_dali
@pytest.mark.parametrize("flip", [False, True])
def test_dali_gives_turned_videos_as_the_cpu_does(flip: bool) -> None:
    stored = make_video(None, 5, codec="mjpeg")
    turned = with_matrix(stored, 0, 1, -1, 0)
    decoder = DaliDecoder("cpu")
    crop = Crop(2, 4, 32, 40)
    requests = [VideoRequest(data, probed(data), [1, 3], [crop], flip) for data in (stored, turned)]
    batch = decoder.decode_batch(requests, 24)
    assert not batch.bad
    for clip, request in zip(batch.clips.numpy(), requests, strict=True):
        expected = to_rgb(decode(request.video, request.info, [1, 3]), crop, 24)
        expected = expected[:, :, ::-1] if flip else expected
        assert np.abs(clip.astype(int) - expected).mean() < 3
    np.testing.assert_array_equal(
        decoder(turned, requests[1].info, [2]).pixels,
        whole_frames(decode(turned, requests[1].info, [2])),
    )


@pytest.mark.parametrize("profile", ["source", "train"])
def test_a_face_from_a_phone_goes_into_shards_upright(profile: str, tmp_path: Path) -> None:
    train = TrainProfile("full") if profile == "train" else None
    sharding.shard(
        "folder", str(CASES), str(tmp_path), profile=profile, train=train, min_frames=16, workers=0
    )
    reader = SampleReader(str(tmp_path), shard_format.load_manifest(str(tmp_path)))
    samples = [sample for sample in map(reader.read, range(3)) if isinstance(sample, Sample)]
    found = {
        sample.key: whole_frames(decode(sample.video, sample.info, [0, 30, 71])).astype(int)
        for sample in samples
    }
    assert sorted(found) == ["mirror", "phone90", "plain"]
    for name in ("mirror", "phone90"):
        assert np.abs(found[name] - found["plain"]).mean() < 3


def test_a_face_of_a_front_camera_is_found() -> None:
    crops = {}
    for name in ("mirror", "phone90", "plain"):
        data = (CASES / f"{name}.mp4").read_bytes()
        found = crop_faces(data, load_detector("haar"), FaceOptions(size=64))
        assert isinstance(found, Cropped)
        crops[name] = whole_frames(decode(found.tracks[0].mp4, probed(found.tracks[0].mp4), [5]))
    for name in ("mirror", "phone90"):
        assert np.abs(crops[name].astype(int) - crops["plain"]).mean() < 8


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("mp4", "libx264", B_FRAMES),
        ("mp4", "libx264", OPEN_GOP),
        ("mp4", "mpeg4", {"bf": "2"}),
        ("mp4", "libvpx-vp9", {}),
        ("mkv", "libx264", B_FRAMES),
        ("mkv", "mpeg2video", {"bf": "2"}),
        ("flv", "libx264", B_FRAMES),
        ("avi", "mpeg4", {"bf": "2"}),
        ("ts", "libx264", B_FRAMES),
        ("ts", "mpeg2video", {"bf": "2"}),
    ],
)
@pytest.mark.parametrize("skip", [5, 12, 13])
def test_a_stream_that_was_cut_between_key_frames(container, codec, options, skip) -> None:
    whole = make_video(None, 40, codec=codec, container="mkv", encoder_options=options)
    data = remuxed(whole, container, skip=skip)
    info = probed(data)
    # With open groups and key frame 12, frames 10 and 11 follow it and cannot be decoded.
    first = 40 - info.num_frames
    assert first in ((12,) if skip == 5 else (12, 24) if skip == 12 else (24,))
    assert (info.fps, info.constant_frame_rate) == (25, True)
    for start in range(0, info.num_frames - 3, 5):
        window = range(start, start + 3)
        assert painted(data, info, window) == [first + number for number in window]
    last = range(info.num_frames - 1, info.num_frames)
    assert painted(data, info, last) == [39]
    video, layout = transcode(data, info, TrainProfile("full"))
    assert painted(video, layout, range(layout.num_frames)) == list(range(first, 40))


def test_of_an_old_shard_what_cannot_be_sought_is_decoded_from_its_start() -> None:
    data = remuxed(make_video(None, 40, encoder_options=B_FRAMES), "mp4", skip=5)
    old = dataclasses.replace(probed(data), seekable=True)
    assert painted(data, old, range(3)) == [12, 13, 14]


@pytest.mark.parametrize("tick", [None, 50, 100])
def test_an_avi_whose_tick_is_no_frame(tick: int | None) -> None:
    data = remuxed(make_video(None, 80, encoder_options=B_FRAMES), "avi", tick=tick)
    info = probed(data)
    assert (info.num_frames, info.fps, info.constant_frame_rate) == (80, 25, True)
    assert painted(data, info, range(80)) == list(range(80))
    assert painted(data, info, range(78, 80)) == [78, 79]
    video, layout = transcode(data, info, TrainProfile("full"))
    assert painted(video, layout, range(80)) == list(range(80))


FORMATS = [
    ("mpg", "mpeg", "mpeg1video", {"bf": "2"}),
    ("vob", "vob", "mpeg2video", {"bf": "2"}),
    ("ts", "mpegts", "libx264", B_FRAMES),
    ("mts", "mpegts", "libx264", OPEN_GOP),
    ("m2ts", "mpegts", "mpeg2video", {"bf": "2"}),
    ("wmv", "asf", "wmv2", {}),
    ("asf", "asf", "libx264", B_FRAMES),
    ("ogv", "ogg", "libvpx", {}),
    ("3gp", "3gp", "libx264", B_FRAMES),
]


@pytest.mark.parametrize(("container", "codec", "options"), [row[1:] for row in FORMATS])
def test_containers_without_an_index_give_every_window(container, codec, options) -> None:
    data = make_video(None, 30, codec=codec, container=container, encoder_options=options)
    info = probed(data)
    assert (info.num_frames, info.fps, info.constant_frame_rate) == (30, 25, True)
    for start in range(0, 28, 3):
        assert painted(data, info, range(start, start + 3)) == [start, start + 1, start + 2]


def test_a_folder_of_all_formats_is_sharded_and_others_are_named(tmp_path: Path, caplog) -> None:
    for suffix, container, codec, options in FORMATS:
        path = tmp_path / f"videos/{suffix}.{suffix}"
        make_video(path, 20, codec=codec, container=container, encoder_options=options)
    make_video(tmp_path / "videos/stream.mp4", 20, container="mpegts")  # known by its content
    for name in ("a.rm", "b.RM", "c.dv", "notes.txt"):
        (tmp_path / "videos" / name).write_bytes(b"?")
    url = str(tmp_path / "out")
    summary = sharding.shard("folder", str(tmp_path / "videos"), url, min_frames=16, workers=0)
    assert (summary.num_samples, summary.rejected) == (len(FORMATS) + 1, {})
    assert "left out: 2 .rm, 1 .dv. Read: mp4," in caplog.text
    assert sharding.verify(url).num_samples == len(FORMATS) + 1


TAILS = {
    "text": b"uploaded by somebody, 1 MiB of this\n" * 9,
    "id3v1": b"TAG" + b"title".ljust(125, b"\0"),
    "zeros": bytes(1000),
    "few": b"\0\0\0",
    "free to the end": b"\0\0\0\0free" + b"x" * 99,
    "free of 64 bits": b"\0\0\0\1free" + (16 + 99).to_bytes(8, "big") + b"x" * 99,
    "free beyond the end": b"\0\1\0\0free" + b"x" * 99,
    "free beyond all": b"\0\0\0\1free" + (1 << 63).to_bytes(8, "big") + b"x" * 99,
    "uuid": (8 + 16 + 9).to_bytes(4, "big") + b"uuid" + b"x" * 25,
    "size 2": b"\0\0\0\2free",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe", ""])
def test_what_follows_the_last_box_is_ignored(tail: bytes, flags: str) -> None:
    options = {"movflags": flags} if flags else None
    whole = make_video(None, 30, container_options=options)
    info = probed(whole + tail)
    assert info == probed(whole)
    assert painted(whole + tail, info, range(27, 30)) == [27, 28, 29]


@pytest.mark.parametrize("tail", [b"\0\1\0\0moof", b"\0\1\0\0mdat", b"\0\1\0\0sidx"])
def test_a_box_of_video_that_is_cut_is_still_truncated(tail: bytes) -> None:
    found = probe(make_video(None, 30) + tail + b"x" * 99, 1)
    assert isinstance(found, Rejected)
    assert found.reason == "truncated"
