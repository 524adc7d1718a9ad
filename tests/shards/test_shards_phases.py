"""Shards with a section per phase: a window reads its part of a sample only, bit for bit."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

import av
import numpy as np
import pytest
from clips import make_video, read_frame_number

from data_sharding import pipeline
from data_sharding.transcode import TrainProfile
from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import BadSample, PackedSample, Sample, ShardIndex, unpack
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video.frames import YuvFrames
from svfap_dist.video.pyav import decode

LENGTHS = (70, 61, 90, 3)  # frames
LAYOUTS = ("samples", "phases")


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same videos in both layouts."""
    root = tmp_path_factory.mktemp("phases")
    for number, length in enumerate(LENGTHS):
        make_video(root / f"in/{number}.mp4", length, size=(64, 64), seed=number)
    made = {layout: str(root / layout) for layout in LAYOUTS}
    for layout in LAYOUTS:
        pipeline.shard(
            "folder",
            str(root / "in"),
            made[layout],
            profile="train",
            train=TrainProfile("full", layout=layout),
            min_frames=1,
            workers=0,
        )
    return made


def reader_of(url: str, **options: int) -> SampleReader:
    return SampleReader(url, shard_format.load_manifest(url), **options)


def index_of(url: str) -> ShardIndex:
    (entry,) = shard_format.load_manifest(url).shards
    return shard_format.load_index(url, entry)


def frames_of(reader: SampleReader, index: int, numbers: range) -> YuvFrames:
    packed = reader.fetch(index, numbers)
    assert isinstance(packed, PackedSample)
    sample = unpack(packed)
    assert isinstance(sample, Sample)
    frames = decode(sample.video, sample.info, numbers)
    assert isinstance(frames, YuvFrames)
    return frames


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
def test_frames_are_bit_for_bit_those_of_samples_in_one_place(urls, stride: int):
    readers = [reader_of(urls[layout]) for layout in LAYOUTS]
    for index, length in enumerate(index_of(urls["phases"]).num_frames):
        for start in range(0, min(length, 9), 2):
            numbers = range(start, length, stride)[:16]
            old, new = (frames_of(reader, index, numbers) for reader in readers)
            assert old.colors == new.colors
            sample = readers[1].read(index)
            assert isinstance(sample, Sample)
            assert sample.info.num_frames == length
            for plane in ("y", "u", "v"):
                assert np.array_equal(getattr(old, plane), getattr(new, plane))
            assert [read_frame_number(y[:, :, None]) for y in new.y] == list(numbers)


def test_any_reader_of_tars_sees_a_short_video_per_phase(urls):
    from webdataset.compat import WebDataset

    index = index_of(urls["phases"])
    lengths = dict(zip(index.keys, index.num_frames, strict=True))
    found = {}
    for sample in WebDataset(
        [os.path.join(urls["phases"], "shard-000000.tar")], shardshuffle=False
    ):
        with av.open(io.BytesIO(sample["mp4"])) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == 25 / 4 or stream.frames == 1
            shown = [frame.to_ndarray(format="gray") for frame in container.decode(stream)]
        found[sample["__key__"]] = [read_frame_number(y[:, :, None]) for y in shown]
    assert found == {
        f"{key}+{phase}": list(range(phase, length, 4))
        for key, length in lengths.items()
        for phase in range(min(length, 4))
    }


def test_a_window_of_the_stride_reads_its_part_only(urls, monkeypatch):
    asked = []
    read = storage.read_buffer
    monkeypatch.setattr(
        storage, "read_buffer", lambda *range_: asked.append(range_[1:]) or read(*range_)
    )
    index = index_of(urls["phases"])
    for phase in range(4):
        reader_of(urls["phases"], range_bytes=1).fetch(0, range(phase, phase + 61, 4))
    assert [(start, stop - start) for start, stop in asked] == index.ranges(0)
    asked.clear()
    reader = reader_of(urls["phases"])
    for row, length in enumerate(LENGTHS[:3]):
        reader.fetch(row, range(2, length, 4))
    assert len(asked) == 1, "parts of one phase are neighbors"


def test_a_damaged_part_spoils_windows_of_its_phase_only(urls, tmp_path: Path):
    for name in os.listdir(urls["phases"]):
        (tmp_path / name).write_bytes(Path(urls["phases"], name).read_bytes())
    index = index_of(str(tmp_path))
    (_, (offset, size), *_) = index.ranges(1)
    content = bytearray((tmp_path / "shard-000000.tar").read_bytes())
    content[offset + size // 2] ^= 255
    (tmp_path / "shard-000000.tar").write_bytes(content)
    reader = reader_of(str(tmp_path))
    for numbers, is_bad in ((range(0, 57, 4), False), (range(1, 57, 4), True), (None, True)):
        found = reader.fetch(1, numbers)
        assert isinstance(found, BadSample) == is_bad
    assert isinstance(found, BadSample)
    assert (found.key, found.reason) == (index.keys[1], "damaged")
    assert "row 1, part 1" in found.detail
    assert isinstance(reader.read(0), Sample)


def test_parts_of_two_videos_are_no_sample(urls):
    reader = reader_of(urls["phases"])
    first, second = (reader.fetch(row, [row]) for row in range(2))
    assert isinstance(first, PackedSample)
    assert isinstance(second, PackedSample)
    mixed = unpack(dataclasses.replace(first, data=first.data + second.data))
    assert isinstance(mixed, BadSample)
    assert mixed.reason == "malformed"


def test_old_readers_can_read_what_has_no_sections(urls):
    """The version says what a reader must know, not which program wrote the shards."""
    versions = {}
    for layout in LAYOUTS:
        raw = Path(urls[layout], shard_format.MANIFEST_NAME).read_text()
        versions[layout] = ('"format_version": 1' in raw, "num_parts" in raw, "layout" in raw)
        assert pipeline.verify(urls[layout]).num_samples == 4
        assert pipeline.show(urls[layout]).num_frames == sum(LENGTHS)
    assert versions == {"samples": (True, False, False), "phases": (False, True, True)}


def test_a_data_set_keeps_its_region(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Of a folder the whole frame is stored, unless its data set was begun with another region."""
    videos = tmp_path / "in"
    make_video(videos / "a.mp4", 9, size=(64, 64))
    options = {"profile": "train", "min_frames": 1, "workers": 0}
    new = pipeline.shard("folder", str(videos), str(tmp_path / "new"), **options)
    assert new.region == pipeline.show(new.url).region == "full"
    assert "stored region: full (train with data.region=full)" in new.lines()
    begun = pipeline.TrainProfile(region="voxceleb2")
    old = pipeline.shard("folder", str(videos), str(tmp_path / "old"), train=begun, **options)
    make_video(videos / "b.mp4", 9, size=(64, 64))
    assert not caplog.records
    grown = pipeline.shard("folder", str(videos), str(tmp_path / "old"), **options)
    assert (grown.new_samples, grown.fingerprint_before) == (1, old.fingerprint)
    assert grown.region == "voxceleb2"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    other = pipeline.train_profile(region="full", size=None, crf=None)
    with pytest.raises(ConfigError, match=r"'region': 'voxceleb2'.*'region': 'full'"):
        pipeline.shard("folder", str(videos), str(tmp_path / "old"), train=other, **options)


def test_an_interrupted_sharding_keeps_its_region(tmp_path: Path):
    """Its shards, of the default region of an earlier release, are not made again."""
    videos = tmp_path / "in"
    for name in ("a", "b"):
        make_video(videos / f"{name}.mp4", 9, size=(64, 64))
    options = {"profile": "train", "min_frames": 1, "workers": 0, "max_samples_per_shard": 1}
    begun, out = pipeline.TrainProfile(region="voxceleb2"), tmp_path / "out"

    def interrupt(done: int, total: int | None, rejected: int) -> None:
        if (out / "shard-000000.done.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.shard("folder", str(videos), str(out), train=begun, progress=interrupt, **options)
    (made,) = out.glob("*.tar")
    inode = made.stat().st_ino
    resumed = pipeline.shard("folder", str(videos), str(out), **options)
    assert (resumed.region, resumed.num_samples) == ("voxceleb2", 2)
    assert made.stat().st_ino == inode


def test_a_data_set_keeps_its_layout(tmp_path: Path):
    """One that was made before there were sections is complete, and grows as it was begun."""
    videos, out = tmp_path / "in", str(tmp_path / "out")
    profile = {"profile": "train", "min_frames": 1, "workers": 0}
    make_video(videos / "a.mp4", 9, size=(64, 64))
    old = pipeline.shard(
        "folder", str(videos), out, train=TrainProfile(layout="samples"), **profile
    )
    assert pipeline.shard("folder", str(videos), out, **profile).already_complete
    make_video(videos / "b.mp4", 9, size=(64, 64))
    grown = pipeline.shard("folder", str(videos), out, **profile)
    assert (grown.new_samples, grown.fingerprint_before) == (1, old.fingerprint)
    assert shard_format.load_manifest(out).num_parts == 1
    with pytest.raises(ConfigError, match=r"other inputs or options.*'layout': 'phases'"):
        pipeline.shard("folder", str(videos), out, train=TrainProfile(layout="phases"), **profile)
    pipeline.shard(
        "folder", str(videos), out, train=TrainProfile(layout="phases"), overwrite=True, **profile
    )
    assert shard_format.load_manifest(out).num_parts == 4
    assert pipeline.shard("folder", str(videos), out, **profile).already_complete
    assert pipeline.verify(out).num_samples == 2
