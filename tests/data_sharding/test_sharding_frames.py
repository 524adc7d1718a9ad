"""Folders of pictures become videos: which frames, in which order, and at what loss."""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from clips import read_frame_number
from layouts import dfew, picture, put, put_frames
from PIL import ExifTags, Image

from data_sharding import pipeline
from data_sharding.frames import BrokenFrameError, encode_frames, natural_order, read_frames
from data_sharding.make_sample import SampleOptions, make_sample
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.shards import format as shard_format
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import Rejected, probe

PROGRESSIVE = {"kind": "JPEG", "progressive": True}


def packets_of(data: bytes) -> list[bytes]:
    with av.open(io.BytesIO(data)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def pictures_of(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def described(data: bytes) -> VideoInfo:
    info = probe(data, min_frames=1)
    assert isinstance(info, VideoInfo)
    return info


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"quality": 95}])
@pytest.mark.parametrize("count", [1, 3])
def test_jpegs_are_kept_byte_for_byte(count: int, options: dict) -> None:
    frames = [picture(n, size=(48, 33), **options) for n in range(count)]
    data = encode_frames(frames)
    assert packets_of(data) == frames
    assert described(data) == VideoInfo(count, 25, 48, 33, "mjpeg", True, {})
    assert data == encode_frames(frames)


def test_grey_jpegs_are_kept() -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(5))).convert("L").save(file, "JPEG")
    data = encode_frames([file.getvalue()] * 2)
    assert packets_of(data) == [file.getvalue()] * 2
    assert [read_frame_number(image) for image in pictures_of(data)] == [5, 5]


@pytest.mark.parametrize(
    "frames",
    [
        [picture(n, kind="PNG") for n in range(20)],
        [picture(n, **PROGRESSIVE) for n in range(20)],
        [picture(n, subsampling=n % 2 * 2) for n in range(20)],
        [picture(n, size=(32, 32) if n % 3 else (40, 40)) for n in range(20)],
        [picture(n, size=(33, 47), kind="PNG") for n in range(20)],
    ],
    ids=["png", "progressive", "samplings", "sizes", "odd"],
)
def test_other_pictures_are_encoded(frames: list[bytes]) -> None:
    data = encode_frames(frames)
    with Image.open(io.BytesIO(frames[0])) as first:
        width, height = (side - side % 2 for side in first.size)
    assert described(data) == VideoInfo(20, 25, width, height, "h264", True, {})
    assert [read_frame_number(image) for image in pictures_of(data)] == list(range(20))
    assert data == encode_frames(frames)


def test_encoding_loses_little() -> None:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 64)[None, :, None] * np.ones((48, 1, 3))
    noise = rng.normal(0, 6, (8, 48, 64, 1))  # grey, for 4:2:0 keeps only half of the colours
    images = [np.clip(ramp + 10 * n + noise[n], 0, 255) for n in range(8)]
    images = [image.astype(np.uint8) for image in images]
    files = []
    for image in images:
        files.append(io.BytesIO())
        Image.fromarray(image).save(files[-1], "PNG")
    found = pictures_of(encode_frames([file.getvalue() for file in files]))
    error = np.mean((np.stack(found).astype(float) - np.stack(images)) ** 2)
    assert 10 * np.log10(255**2 / error) > 42


@pytest.mark.parametrize(
    "frames",
    [
        [picture(0), b"no picture"],
        [picture(0), b""],
        [picture(0), picture(1)[:-20]],
        [picture(0, kind="PNG"), picture(1, kind="PNG")[:-200]],
        [picture(0), b"GIF89a" + picture(1)],
    ],
)
def test_a_broken_frame_makes_the_clip_unreadable(frames: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(BrokenFrameError, match=r"Unreadable frame\. Where: frame 1") as caught:
        encode_frames(frames)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.index, str(copy)) == (1, str(caught.value))
    for number, frame in enumerate(frames):
        put(tmp_path / f"{number}.jpg", frame)
    read = functools.partial(read_frames, str(tmp_path), "0.jpg/1.jpg")
    result = make_sample(SampleOptions(min_frames=1), SourceVideo("a", read, {}, str(tmp_path)))
    assert isinstance(result, Rejected)
    assert result.reason == "unreadable"
    assert result.detail.startswith("frame 1: ")


def test_a_picture_of_too_many_pixels_is_refused_unopened(tmp_path: Path) -> None:
    png, jpeg = bytearray(picture(1, kind="PNG")), bytearray(picture(1))
    for side in (20_000, 60_000):
        png[16:24] = struct.pack(">II", side, side)
        png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
        at = jpeg.index(b"\xff\xc0") + 5
        jpeg[at : at + 4] = struct.pack(">HH", side, side)
        for bomb in (png, jpeg):
            with pytest.raises(BrokenFrameError, match=r"frame 1\. Found: .*pixels") as caught:
                encode_frames([picture(0), bytes(bomb)])
            assert caught.value.reason == "too_large"


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey_levels() -> np.ndarray:
    return (np.arange(48)[:, None] * 4 + np.arange(64)[None]).astype(np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(grey_levels().astype(np.uint16) * 257),
        Image.fromarray(grey_levels()),
        Image.fromarray(grey_levels()).convert("RGB").quantize(256),
        Image.merge("LA", [Image.fromarray(grey_levels()), Image.new("L", (64, 48), 3)]),
        Image.fromarray(grey_levels()).convert("RGBA"),
    ],
    ids=["16 bits", "grey", "palette", "grey and alpha", "alpha"],
)
def test_pngs_of_every_mode_keep_their_levels(image: Image.Image) -> None:
    found = pictures_of(encode_frames([saved(image, "PNG")] * 2))
    assert np.abs(found[0].astype(int) - grey_levels()[..., None]).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    shown = Image.open(io.BytesIO(picture(5, size=(64, 48))))
    back = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],  # shown after a quarter turn clockwise
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = shown
    for method in back.get(orientation, []):
        stored = stored.transpose(method)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode_frames([saved(stored, kind, exif=exif)] * 3)
    info = described(data)
    assert (info.width, info.height, info.orientation) == (64, 48, 1)
    assert [read_frame_number(image) for image in pictures_of(data)] == [5, 5, 5]


def test_natural_order() -> None:
    names = ["10.jpg", "9.jpg", "a2b10.jpg", "a2b9.jpg", "00001_00002.jpg", "b.jpg"]
    expected = ["00001_00002.jpg", "9.jpg", "10.jpg", "a2b9.jpg", "a2b10.jpg", "b.jpg"]
    assert sorted(names, key=natural_order) == expected


def test_shards_of_a_set_of_frames(tmp_path: Path) -> None:
    root, out = tmp_path / "dfew", str(tmp_path / "out")
    dfew(root)
    put_frames(root / "Clip/clip_224x224/00099", 1)  # in no list
    put(root / "Clip/clip_224x224/00003/2.jpg", b"broken")
    (root / "Clip/clip_224x224/00004/2.jpg").unlink()  # one frame is left
    for n in (1, 2):
        (root / f"Clip/clip_224x224/00005/{n}.jpg").unlink()
    summary = pipeline.shard("dfew", str(root), out, min_frames=1, workers=0)
    assert (summary.num_samples, summary.rejected) == (18, {"misplaced": 2, "unreadable": 1})
    lines = storage.read_bytes(storage.join(out, "rejected.jsonl")).splitlines()
    rows = {row["key"]: row for row in map(json.loads, lines)}
    assert rows["00099"]["detail"] == "in none of the set's lists"
    assert rows["00005"]["detail"] == "labeled, but not there"
    assert rows["00003"]["where"] == str(root / "Clip/clip_224x224/00003")

    manifest = shard_format.load_manifest(out)
    index = shard_format.load_index(out, manifest.shards[0])
    lengths = dict(zip(index.keys, index.num_frames, strict=True))
    assert (lengths["00001"], lengths["00002"], lengths["00004"]) == (12, 2, 1)
    assert manifest.min_frames == 1
    numbers, info = first_sample(tmp_path, "00001")
    assert numbers == list(range(1, 13))
    assert info["labels"] == {
        "set": "dfew", "class": 0, "class_name": "happy", "fold": 1,
    }  # fmt: skip
    assert pipeline.verify(out).num_samples == 18
    assert pipeline.shard("dfew", str(root), out, min_frames=1, workers=0).already_complete


def first_sample(tmp_path: Path, key: str) -> tuple[list[int], dict]:
    """Numbers painted into the frames of a sample of the first shard, and its JSON."""
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        video, info = members[f"{key}.mp4"], members[f"{key}.json"]
        assert video is not None
        assert info is not None
        images = pictures_of(video.read())
        return [read_frame_number(image) for image in images], json.loads(info.read())
