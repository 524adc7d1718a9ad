"""Folders of images become shards: odd images are read or listed, and nothing is stored twice."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ExifTags, Image

from data_sharding import pipeline
from data_sharding.images import encode_image
from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Sample
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video.backends import decode
from svfap_dist.video.frames import whole_frames
from svfap_dist.video.probe import probe

LEFT, RIGHT = (200, 40, 40), (30, 60, 180)  # halves of the picture


def halves(size: tuple[int, int] = (64, 48)) -> Image.Image:
    image = Image.new("RGB", size, RIGHT)
    image.paste(LEFT, (0, 0, size[0] // 2, size[1]))
    return image


def file_of(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    """Stored on its side; Exif says how to show it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned a quarter clockwise
    return file_of(halves().transpose(Image.Transpose.ROTATE_90), exif=exif)


def cut_out() -> bytes:
    """The right half is transparent, its hidden color green."""
    image = halves().convert("RGBA")
    image.paste((0, 255, 0, 0), (32, 0, 64, 48))
    return file_of(image, "PNG")


def gray_16() -> bytes:
    values = np.full((48, 64), 0x2010, np.uint16)
    values[:, :32] = 0xC0F0
    return file_of(Image.fromarray(values), "PNG")


def animation() -> bytes:
    return file_of(halves(), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))])


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60,000 x 60,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


GRAY_LEFT, GRAY_RIGHT = (88,) * 3, (65,) * 3  # ITU-R 601 luma of the halves
GOOD: dict[str, tuple[Callable[[], bytes], tuple, tuple]] = {
    "baseline": (lambda: file_of(halves()), LEFT, RIGHT),
    "progressive": (lambda: file_of(halves(), progressive=True), LEFT, RIGHT),
    "odd_sides": (lambda: file_of(halves((63, 47))), LEFT, RIGHT),
    "odd_png": (lambda: file_of(halves((63, 47)), "PNG"), LEFT, RIGHT),
    "exif": (turned, LEFT, RIGHT),
    "gray": (lambda: file_of(halves().convert("L")), GRAY_LEFT, GRAY_RIGHT),
    "gray_alpha": (lambda: file_of(halves().convert("LA"), "PNG"), GRAY_LEFT, GRAY_RIGHT),
    "palette": (lambda: file_of(halves().quantize(4), "PNG"), LEFT, RIGHT),
    "bits": (lambda: file_of(halves().convert("L").point([255 * (v > 80) for v in range(256)], "1"),
                             "PNG"), (255,) * 3, (0,) * 3),
    "alpha": (cut_out, LEFT, (255, 255, 255)),
    "cmyk": (lambda: file_of(halves().convert("CMYK")), LEFT, RIGHT),
    "sixteen_bits": (gray_16, (0xC0,) * 3, (0x20,) * 3),
    "webp": (lambda: file_of(halves(), "WEBP", lossless=True), LEFT, RIGHT),
    "animation": (animation, LEFT, RIGHT),
    "bmp": (lambda: file_of(halves(), "BMP"), LEFT, RIGHT),
    "broken_exif": (lambda: file_of(halves(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), LEFT, RIGHT),
}  # fmt: skip
BAD: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "empty", "0 bytes"),
    "text": (lambda: b"no image", "unreadable", "no BMP, JPEG, PNG, WEBP image"),
    "gif": (lambda: file_of(halves(), "GIF"), "unreadable", "no BMP, JPEG, PNG, WEBP image"),
    "cut_jpeg": (lambda: file_of(noise())[:-400], "truncated", "truncated"),
    "cut_png": (lambda: file_of(noise(), "PNG")[:-400], "truncated", "truncated"),
    "bomb": (bomb, "too_large", "pixels"),
    "one_pixel": (lambda: file_of(Image.new("RGB", (1, 1))), "too_small", "1x1 pixels"),
}


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8))


def write(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder)


def shown(sample: object) -> np.ndarray:
    assert isinstance(sample, Sample), sample
    return whole_frames(decode(sample.video, sample.info, [0]))


@pytest.mark.parametrize("profile", ["source", "train"])
def test_each_odd_image_is_read_as_it_looks_or_told(tmp_path: Path, profile: str) -> None:
    files = {f"{name}.png": make() for name, (make, *_) in (GOOD | BAD).items()}
    folder, url = write(tmp_path / "in", files), str(tmp_path / "out")
    train = pipeline.train_profile(region="full", size=None, crf=10) if profile == "train" else None
    summary = pipeline.shard("images", folder, url, profile=profile, train=train, workers=0)
    assert summary.num_samples == len(GOOD)
    pipeline.verify(url, workers=0)
    manifest = shard_format.load_manifest(url)
    assert (manifest.kind, manifest.min_frames) == ("images", 1)
    reader = SampleReader(url, manifest)
    found = {sample.key: sample for sample in map(reader.read, range(manifest.num_samples))}
    for name, (_, left, right) in GOOD.items():
        frames = shown(found[name])
        _, height, width, _ = frames.shape
        assert len(frames) == 1, name
        assert 46 <= height <= 48, name
        assert 62 <= width <= 64, name
        for column, color in ((width // 4, left), (3 * width // 4, right)):
            assert np.abs(frames[0, height // 2, column].astype(int) - color).max() <= 6, name
    rows = map(json.loads, Path(url, "rejected.jsonl").read_text().splitlines())
    rejected = {row["key"]: (row["reason"], row["detail"]) for row in rows}
    assert rejected.keys() == BAD.keys()
    for name, (_, reason, words) in BAD.items():
        assert rejected[name][0] == reason, rejected[name]
        assert words in rejected[name][1], rejected[name]
        assert " at 0x" not in rejected[name][1], "an address would differ from run to run"


def test_a_baseline_jpeg_is_kept_byte_for_byte_and_equal_images_give_equal_bytes() -> None:
    jpeg = file_of(halves())
    with av.open(io.BytesIO(encode_image(jpeg)), "r") as container:
        assert [bytes(packet) for packet in container.demux(video=0) if packet.size] == [jpeg]
    for make, *_ in GOOD.values():
        assert encode_image(make()) == encode_image(make())


def test_classes_are_the_top_folders(tmp_path: Path) -> None:
    jpeg = file_of(halves())
    names = ["happy/a.jpg", "happy/more/b.JPEG", "sad/a.webp", "loose.bmp", "sad/._a.jpg", "x.txt"]
    folder = write(tmp_path / "in", dict.fromkeys(names, jpeg))
    summary = pipeline.shard("images", folder, str(tmp_path / "out"), workers=0)
    assert summary.num_samples == 4
    manifest = shard_format.load_manifest(str(tmp_path / "out"))
    index = shard_format.load_index(str(tmp_path / "out"), manifest.shards[0])
    labels = dict(zip(index.keys, index.labels, strict=True))
    assert labels == {
        "happy/a": {"set": "images", "class_name": "happy"},
        "happy/more/b": {"set": "images", "class_name": "happy"},
        "sad/a": {"set": "images", "class_name": "sad"},
        "loose": {},
    }
    assert pipeline.show(str(tmp_path / "out")).labels == {"class": {"happy": 2, "sad": 1}}


def test_a_list_chooses_images_and_what_is_wrong_in_it_is_told_by_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["happy/a.jpg", "happy/b.jpg", "sad/a.jpg", "loose.jpg", "sad/b.jpg"]
    folder = write(tmp_path / "in", dict.fromkeys(names, file_of(halves())))
    text = "\ufeffsad\\a.jpg\r\n\r\nhappy/a.jpg\r\n./loose.jpg\r\nsad/gone.jpg\r\nsad/a.jpg\r\n"
    text += f"{folder}/happy/b.jpg\r\nlist.txt"
    (tmp_path / "in/list.txt").write_text(text, newline="")
    url = str(tmp_path / "out")
    pipeline.shard("images", f"{folder}/list.txt", url, workers=0)
    manifest = shard_format.load_manifest(url)
    index = shard_format.load_index(url, manifest.shards[0])
    labels = dict(zip(index.keys, index.labels, strict=True))
    assert {key: label.get("class_name") for key, label in labels.items()} == {
        "happy/a": "happy",
        "happy/b": "happy",
        "sad/a": "sad",
        "loose": None,
    }
    rows = map(json.loads, Path(url, "rejected.jsonl").read_text().splitlines())
    assert {row["key"]: row["detail"] for row in rows} == {
        "sad/gone": "line 5: no such file",
        "list": "line 8: no image, by its suffix",
    }
    assert "that are not there: line 5." in caplog.text
    assert "repeat another one count once: line 6." in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a.jpg\n../b.jpg\n/etc/c.jpg\n", r"leads out .*lines 2, 3.*Found: ../b.jpg.*paths below"),
        (b"gone.jpg\n", r"No listed image exists.*none of 1 files.*gone.jpg"),
        (b"\n \n", r"List has no paths"),
        (b"\xff\xd8\xff\xe0", r"not UTF-8 text.*line 1.*0xff"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    folder = write(tmp_path / "in", {"list.txt": text})
    with pytest.raises(ShardError, match=message):
        pipeline.shard("images", f"{folder}/list.txt", str(tmp_path / "out"), workers=0)


def test_the_same_command_adds_new_images_and_any_workers_give_the_same_bytes(
    tmp_path: Path,
) -> None:
    jpegs = {f"{n}.jpg": file_of(halves((32 + 2 * n, 32))) for n in range(6)}
    folder, url = write(tmp_path / "in", jpegs), str(tmp_path / "out")
    first = pipeline.shard("images", folder, url, workers=2, max_samples_per_shard=4)
    again = pipeline.shard(
        "images", folder, str(tmp_path / "b"), workers=0, max_samples_per_shard=4
    )
    assert first.fingerprint == again.fingerprint
    write(tmp_path / "in", {"new.png": file_of(halves(), "PNG")})
    more = pipeline.shard("images", folder, url, workers=0, max_samples_per_shard=4)
    assert (more.num_samples, more.new_samples) == (7, 1)


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="1 files, none of them an image"):
        pipeline.shard("images", write(tmp_path / "in", {"a.mp4": b"x"}), str(tmp_path / "out"))


def test_an_older_manifest_has_videos_and_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.jpg": file_of(halves())})
    pipeline.shard("images", folder, str(tmp_path / "out"), workers=0)
    path = tmp_path / "out/manifest.json"
    fields = json.loads(path.read_text())
    assert fields.pop("kind") == "images"
    path.write_text(json.dumps(fields))
    assert shard_format.load_manifest(str(tmp_path / "out")).kind == "videos"
    path.write_text(json.dumps({**fields, "kind": "sounds"}))
    with pytest.raises(ShardError, match="kind 'sounds'"):
        shard_format.load_manifest(str(tmp_path / "out"))


def test_a_one_frame_video_passes_the_probe() -> None:
    info = probe(encode_image(file_of(halves())), min_frames=1)
    assert (info.num_frames, info.fps, info.codec) == (1, 25.0, "mjpeg")  # type: ignore[union-attr]
