"""Reading samples: the right bytes, few requests, and damage reported by its kind."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from labeled import CLASSES

from svfap_dist import storage
from svfap_dist.config import Config, DataConfig, ModelConfig
from svfap_dist.errors import ConfigError, ShardError, StorageError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards import reader as reader_module
from svfap_dist.shards.format import ShardIndex
from svfap_dist.shards.reader import BadSample, Sample, SampleReader, open_data
from svfap_dist.video.info import VideoInfo, dump_info

ONE_BY_ONE = {"range_bytes": 1, "cache_bytes": 1}


def reader_of(data_set, **options) -> SampleReader:
    return SampleReader(data_set.url, data_set.manifest, **options)


def tar_of(data_set, number=0) -> str:
    return os.path.join(data_set.url, data_set.manifest.shards[number].name)


@pytest.fixture
def ranges(monkeypatch) -> list[tuple[str, int, int]]:
    """All ranged reads that reach the store."""
    asked: list[tuple[str, int, int]] = []
    read_buffer, lock = storage.read_buffer, threading.Lock()

    def recorded(url, start, stop):
        with lock:
            asked.append((os.path.basename(url), start, stop))
        return read_buffer(url, start, stop)

    monkeypatch.setattr(storage, "read_buffer", recorded)
    return asked


@pytest.mark.parametrize(
    "options", [{}, ONE_BY_ONE, {"range_bytes": 20_000, "cache_bytes": 30_000}]
)
def test_every_sample_comes_back_as_it_was_packed(make_data_set, options):
    data_set = make_data_set([5, 1, 4])
    reader = reader_of(data_set, **options)
    for i in [9, 0, 5, 6, 4, 3, 0, 8, 7, 2, 1]:
        info = VideoInfo(30, 25.0, 48, 48, "h264")
        assert reader.read(i) == Sample(i, f"clip-{i:03d}", data_set.videos[i], info)


def test_locate_counts_over_the_shards_in_manifest_order(make_data_set):
    data_set = make_data_set([3, 1, 2])
    reader = reader_of(data_set)
    found = [reader.locate(i) for i in range(6)]
    assert [(entry.name, row) for entry, row in found] == [
        ("shard-000000.tar", 0),
        ("shard-000000.tar", 1),
        ("shard-000000.tar", 2),
        ("shard-000001.tar", 0),
        ("shard-000002.tar", 0),
        ("shard-000002.tar", 1),
    ]


def test_neighbors_come_with_one_request(make_data_set, ranges):
    reader = reader_of(make_data_set([20, 20]))
    for i in range(40):
        reader.read(i)
    assert [name for name, _, _ in ranges] == ["shard-000000.tar", "shard-000001.tar"]


def test_threads_share_a_request(make_data_set, ranges):
    reader = reader_of(make_data_set([40]))
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(reader.read, range(40)))
    assert [sample.index for sample in samples] == list(range(40))
    assert len(ranges) == 1


def test_ranges_cover_each_byte_once_and_keep_to_their_size(make_data_set, ranges):
    data_set = make_data_set([20])
    limit = 20_000
    reader = reader_of(data_set, range_bytes=limit, cache_bytes=1 << 20)
    for i in range(20):
        reader.read(i)
    largest = max(len(video) for video in data_set.videos) + 3 * 512 + 1024
    assert len(ranges) > 2
    assert ranges[0][1] == 0
    for (_, start, stop), following in zip(ranges, [*ranges[1:], None], strict=True):
        assert stop - start <= limit + largest
        assert following is None or following[1] == stop


def test_the_least_used_range_goes_when_the_room_is_used_up(make_data_set, ranges):
    data_set = make_data_set([3])
    reader = reader_of(data_set, **ONE_BY_ONE)
    for i in [0, 0, 0, 1, 0]:
        reader.read(i)
    assert len(ranges) == 3  # 0 once, 1, and 0 again, which had to make room
    ranges.clear()
    roomy = reader_of(data_set, range_bytes=1, cache_bytes=1 << 20)
    for i in [0, 1, 2, 0, 1, 2]:
        roomy.read(i)
    assert len(ranges) == 3


@pytest.mark.parametrize(("sizes", "loads"), [([1] * 20, 20), ([10, 10], 4)])
def test_indexes_are_kept_up_to_a_number_of_samples(make_data_set, monkeypatch, sizes, loads):
    """The blocks in use have few samples for their many lanes, but may have many small shards."""
    data_set, loaded = make_data_set(sizes), []
    load = shard_format.load_index
    monkeypatch.setattr(reader_module, "_INDEXED_SAMPLES_KEPT", 20 if len(sizes) > 2 else 19)
    monkeypatch.setattr(shard_format, "load_index", lambda *a: loaded.append(a) or load(*a))
    reader = reader_of(data_set)
    for _ in range(2):
        for index in range(20):
            reader.num_frames(index)
    assert len(loaded) == loads


@pytest.mark.parametrize("options", [{}, ONE_BY_ONE])
def test_a_changed_byte_is_found_and_spoils_one_sample_only(make_data_set, options):
    data_set = make_data_set([3, 3])
    data_set.damage(4)
    reader = reader_of(data_set, **options)
    bad = reader.read(4)
    assert isinstance(bad, BadSample)
    assert (bad.index, bad.key, bad.reason) == (4, "clip-004", "damaged")
    assert "shard-000001.tar row 1" in bad.detail
    assert all(isinstance(reader.read(i), Sample) for i in (0, 1, 2, 3, 5))


def member_of(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf() + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize("suffixes", [("json", "txt"), ("mp4",), ("json", "mp4", "webm")])
def test_a_sample_without_just_one_video_is_malformed(make_data_set, suffixes):
    """A tar of other making: its digests are right, but it does not hold one video and .json."""
    data_set = make_data_set([1])
    contents = {"json": dump_info(VideoInfo(30, 25.0, 48, 48, "h264"))}
    member = b"".join(
        member_of(f"clip-000.{suffix}", contents.get(suffix, b"a video")) for suffix in suffixes
    )
    index = ShardIndex(("clip-000",), (0,), (len(member),), (shard_format.digest(member),), (30,))
    raw = shard_format.dump(index)
    entry = dataclasses.replace(
        data_set.manifest.shards[0], index_sha256=hashlib.sha256(raw).hexdigest()
    )
    for name, content in ((entry.name, member), (entry.index_name, raw)):
        with open(os.path.join(data_set.url, name), "wb") as file:
            file.write(content)
    manifest = dataclasses.replace(data_set.manifest, shards=(entry,))
    bad = SampleReader(data_set.url, manifest).read(0)
    assert isinstance(bad, BadSample)
    assert (bad.key, bad.reason) == ("clip-000", "malformed")


@pytest.mark.parametrize("options", [{}, ONE_BY_ONE])
def test_a_shard_cut_short_is_an_error(make_data_set, options):
    data_set = make_data_set([4])
    os.truncate(tar_of(data_set), 3000)
    with pytest.raises(ShardError, match="cut short") as caught:
        reader_of(data_set, **options).read(3)
    assert caught.value.where.endswith("shard-000000.tar")


def test_a_missing_shard_is_an_error(make_data_set):
    data_set = make_data_set([2, 2])
    os.unlink(tar_of(data_set, 1))
    reader = reader_of(data_set)
    assert isinstance(reader.read(1), Sample)
    with pytest.raises(ShardError, match="missing"):
        reader.read(2)


def test_a_missing_index_is_an_error(make_data_set):
    data_set = make_data_set([2])
    os.unlink(os.path.join(data_set.url, "shard-000000.index.json"))
    with pytest.raises(ShardError, match="index is missing"):
        reader_of(data_set).read(0)


def test_an_error_goes_to_every_waiting_thread_and_is_not_kept(make_data_set):
    data_set = make_data_set([8])
    path = tar_of(data_set)
    os.rename(path, path + ".away")
    reader = reader_of(data_set)
    with ThreadPoolExecutor(4) as pool:
        errors = [pool.submit(reader.read, i).exception() for i in range(8)]
    assert all(isinstance(error, ShardError) for error in errors)
    os.rename(path + ".away", path)
    assert isinstance(reader.read(0), Sample)


def test_a_refusal_of_the_store_stays_a_storage_error(make_data_set, monkeypatch):
    data_set = make_data_set([2])

    def refused(url, start, stop):
        raise StorageError("Cannot read", where=url, found="access denied")

    monkeypatch.setattr(storage, "read_buffer", refused)
    with pytest.raises(StorageError, match="access denied"):
        reader_of(data_set).read(0)


def uploaded(data_set, bucket: str) -> str:
    url = storage.join(bucket, "shards")
    for name in os.listdir(data_set.url):
        storage.upload_file(os.path.join(data_set.url, name), storage.join(url, name))
    return url


def test_samples_come_from_s3_too(make_data_set, s3_bucket):
    data_set = make_data_set([3, 2])
    reader = SampleReader(uploaded(data_set, s3_bucket), data_set.manifest)
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(reader.read, range(5)))
    assert [sample.video for sample in samples] == data_set.videos


@pytest.mark.parametrize("left", [0, 3000])  # nothing of the sample, or a part of it
def test_a_shard_cut_short_on_s3_is_an_error(make_data_set, s3_bucket, left):
    data_set = make_data_set([3])
    index = shard_format.load_index(data_set.url, data_set.manifest.shards[0])
    os.truncate(tar_of(data_set), index.offsets[2] + left)
    reader = SampleReader(uploaded(data_set, s3_bucket), data_set.manifest, **ONE_BY_ONE)
    assert isinstance(reader.read(1), Sample)
    with pytest.raises(ShardError, match="cut short"):
        reader.read(2)


def config_with_window(frames: int) -> Config:
    data = DataConfig(num_frames=2, sampling_rate=frames - 1)
    return Config(data=data, model=ModelConfig(size="nano"))


def test_open_data_gives_the_manifest(make_data_set):
    data_set = make_data_set([3])
    assert open_data(config_with_window(30), data_set.url) == data_set.manifest


def test_open_data_refuses_a_window_that_some_video_cannot_hold(make_data_set):
    data_set = make_data_set([3])
    with pytest.raises(ConfigError, match="31 frames, the shortest video has 30"):
        open_data(config_with_window(31), data_set.url)


def test_open_data_of_a_task_takes_short_videos(make_data_set):
    data_set = make_data_set([3])
    config = config_with_window(31).model_copy(update={"task": CLASSES})
    assert open_data(config, data_set.url) == data_set.manifest


def test_open_data_finds_a_shard_cut_short(make_data_set):
    data_set = make_data_set([3])
    os.truncate(tar_of(data_set), 3000)
    with pytest.raises(ShardError, match="cut short"):
        open_data(config_with_window(2), data_set.url)


def test_a_trusted_manifest_is_not_compared_with_a_listing(make_data_set):
    """Which takes 300 requests, one after the other, for 100,000 shards."""
    data_set = make_data_set([3, 2])
    os.truncate(tar_of(data_set, 1), 3000)
    before = storage.request_counts()
    trusted = {"another", data_set.manifest.fingerprint}
    manifest = open_data(config_with_window(2), data_set.url, trusted)
    found = storage.request_counts().since(before)
    assert found is not None
    assert found.requests == {("read", "ok"): 1}  # the manifest
    reader = SampleReader(data_set.url, manifest)
    assert isinstance(reader.read(2), Sample)
    with pytest.raises(ShardError, match=r"cut short.*000001\.tar.*3000 bytes"):
        reader.read(4)
    with pytest.raises(ShardError, match="cut short"):
        open_data(config_with_window(2), data_set.url, {"another"})


def test_an_error_of_a_read_looks_up_one_shard_only(make_data_set):
    data_set = make_data_set([3, 2])
    reader = reader_of(data_set)
    reader.num_frames(4)  # reads the index
    os.unlink(tar_of(data_set, 1))
    before = storage.request_counts()
    with pytest.raises(ShardError, match="missing"):
        reader.read(4)
    found = storage.request_counts().since(before)
    assert found is not None
    assert found.requests == {("read", "missing"): 1, ("look up", "ok"): 1}


def test_open_data_without_manifest(tmp_path):
    with pytest.raises(ShardError, match="No manifest"):
        open_data(config_with_window(2), str(tmp_path))
