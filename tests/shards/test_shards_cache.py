"""Copies of shards: read instead of the store, bounded, shared, repaired, never required."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from loaders import SIZES, bits, config_of, loader_of

from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shards import cache
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.blocks import Block, RangePool
from svfap_dist.shards.cache import ShardCache
from svfap_dist.shards.format import ShardEntry
from svfap_dist.shards.reader import BadSample, Sample, SampleReader

ROOM = 1 << 30


@pytest.fixture
def folder(tmp_path) -> str:
    return str(tmp_path / "cache")


def reader_of(data_set, folder: str, limit: int = ROOM) -> SampleReader:
    shards = ShardCache(folder, limit)
    return SampleReader(data_set.url, data_set.manifest, cache_bytes=1, shards=shards)


def copies(folder: str) -> set[str]:
    return {name.removesuffix(".tar") for name in os.listdir(folder) if name.endswith(".tar")}


def digests(data_set) -> list[str]:
    return [entry.sha256 for entry in data_set.manifest.shards]


def whole(data_set, entry: ShardEntry) -> bytes:
    return storage.read_bytes(storage.join(data_set.url, entry.name))


def test_each_shard_is_downloaded_once_and_then_read_from_the_copy(make_data_set, folder):
    data_set = make_data_set([6, 4])
    plain = SampleReader(data_set.url, data_set.manifest)
    expected = [plain.read(i) for i in range(10)]
    total = sum(entry.num_bytes for entry in data_set.manifest.shards)
    first = reader_of(data_set, folder)
    assert [first.read(i) for i in range(10)] == expected
    assert first.take_bytes_fetched() == total
    for entry in data_set.manifest.shards:
        os.unlink(os.path.join(data_set.url, entry.name))  # only the copies are left
    second = reader_of(data_set, folder)
    assert [second.read(i) for i in range(10)] == expected
    assert second.take_bytes_fetched() == 0
    assert copies(folder) == set(digests(data_set))


def test_a_copy_is_filled_by_pieces_and_goes_on_after_a_restart(make_data_set, folder, monkeypatch):
    monkeypatch.setattr(cache, "_PIECE_BYTES", 4096)
    data_set = make_data_set([8])
    (entry,) = data_set.manifest.shards
    index = shard_format.load_index(data_set.url, entry)
    plain = SampleReader(data_set.url, data_set.manifest)
    one = SampleReader(
        data_set.url, data_set.manifest, range_bytes=1, shards=ShardCache(folder, ROOM)
    )
    assert one.read(3) == plain.read(3)
    assert index.sizes[3] <= one.take_bytes_fetched() < index.sizes[3] + 2 * 4096
    assert copies(folder) == set()
    other = SampleReader(
        data_set.url, data_set.manifest, range_bytes=1, shards=ShardCache(folder, ROOM)
    )
    assert other.read(3) == plain.read(3)
    assert other.take_bytes_fetched() == 0
    assert [other.read(i) for i in range(8)] == [plain.read(i) for i in range(8)]
    end = index.offsets[7] + index.sizes[7]
    assert other.take_bytes_fetched() + index.sizes[3] <= -(-end // 4096) * 4096
    shards = ShardCache(folder, ROOM)
    assert shards.read(data_set.url, entry, 0, entry.num_bytes) == whole(data_set, entry)
    assert copies(folder) == {entry.sha256}  # and the map of its pieces is gone
    assert sorted(os.listdir(folder)) == sorted([f"{entry.sha256}.tar", "folder.lock"])


def test_a_piece_under_way_is_waited_for_and_holds_up_no_other(make_data_set, folder, monkeypatch):
    monkeypatch.setattr(cache, "_PIECE_BYTES", 4096)
    data_set = make_data_set([8])
    (entry,) = data_set.manifest.shards
    content, shards = whole(data_set, entry), ShardCache(folder, ROOM)
    read, started, go, asked = storage.read_buffer, threading.Event(), threading.Event(), []

    def slow(url: str, start: int, stop: int):
        asked.append((start, stop))
        if start == 0:
            started.set()
            assert go.wait(10)
        return read(url, start, stop)

    monkeypatch.setattr(storage, "read_buffer", slow)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(shards.read, data_set.url, entry, 0, 5000)
        assert started.wait(10)
        waiting = pool.submit(shards.read, data_set.url, entry, 3000, 9000)
        behind = pool.submit(shards.read, data_set.url, entry, 12_288, 20_000)
        assert behind.result(10) == content[12_288:20_000]
        assert not waiting.done()
        go.set()
        assert first.result(10) == content[:5000]
        assert waiting.result(10) == content[3000:9000]
    assert sorted(asked) == [(0, 8192), (8192, 12_288), (12_288, 20_480)]


def test_batches_are_the_same_with_copies(make_data_set, folder):
    data_set = make_data_set(SIZES)
    data_set.damage(17)
    expected = [bits(batch) for batch in loader_of(data_set).batches(0, 7)]
    cached = loader_of(data_set, config_of(cache_dir=folder))
    assert [bits(batch) for batch in cached.batches(0, 7)] == expected
    assert len(copies(folder)) == 4


def test_the_copy_that_was_not_read_for_longest_goes_first(make_data_set, folder):
    data_set = make_data_set([4, 4, 4, 4])
    entries, names = data_set.manifest.shards, digests(data_set)
    room = sum(entry.num_bytes for entry in entries) - 1  # for three, not for four
    reader = reader_of(data_set, folder, room)
    for sample in (0, 4, 8):
        reader.read(sample)
    for age, name in enumerate((names[1], names[2], names[0])):  # read in this order
        os.utime(os.path.join(folder, f"{name}.tar"), (age, age))
    reader.read(5)  # another process's reader would have done as well
    reader.read(12)
    assert copies(folder) == {names[0], names[1], names[3]}
    assert isinstance(reader.read(8), Sample)
    assert copies(folder) == {names[1], names[3], names[2]}


def test_a_shard_that_has_no_room_is_read_from_the_store(make_data_set, folder):
    data_set = make_data_set([4, 40])
    small, large = data_set.manifest.shards
    reader = reader_of(data_set, folder, small.num_bytes)
    assert all(isinstance(reader.read(i), Sample) for i in range(44))
    assert copies(folder) == {small.sha256}
    assert large.num_bytes > small.num_bytes


@pytest.mark.parametrize("offset", [0, 5000])
def test_a_copy_with_a_changed_byte_is_fetched_again(make_data_set, folder, offset):
    data_set = make_data_set([4])
    reader_of(data_set, folder).read(0)
    path = Path(folder, f"{digests(data_set)[0]}.tar")
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 255
    path.write_bytes(raw)
    reader = reader_of(data_set, folder)
    assert all(isinstance(reader.read(i), Sample) for i in range(4))
    assert path.read_bytes() == whole(data_set, data_set.manifest.shards[0])


def test_samples_read_ahead_from_a_damaged_copy_are_fetched_again(make_data_set, folder):
    data_set = make_data_set([4])
    reader_of(data_set, folder).read(0)
    path = Path(folder, f"{digests(data_set)[0]}.tar")
    path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
    reader = reader_of(data_set, folder)
    pool = RangePool(reader.read_range, ROOM, num_threads=0)
    block = Block(pool, reader.locate_all, np.arange(4), [0], (0, 0), fill=False)
    found = [reader.fetch(i, block=block) for i in range(4)]
    assert not any(isinstance(sample, BadSample) for sample in found)


def test_a_shard_that_is_damaged_in_the_store_is_not_fetched_for_ever(make_data_set, folder):
    data_set = make_data_set([4])
    data_set.damage(1)
    reader = reader_of(data_set, folder)
    for _ in range(5):
        assert isinstance(reader.read(1), BadSample)
        assert isinstance(reader.read(2), Sample)
    assert reader.take_bytes_fetched() <= 2 * data_set.manifest.shards[0].num_bytes


@pytest.mark.parametrize("name", ["tar", "tar.part"])
def test_a_copy_cut_short_is_fetched_again(make_data_set, folder, name):
    data_set = make_data_set([4])
    (entry,) = data_set.manifest.shards
    os.makedirs(folder)
    Path(folder, f"{entry.sha256}.{name}").write_bytes(whole(data_set, entry)[:3000])
    reader = reader_of(data_set, folder)
    assert all(isinstance(reader.read(i), Sample) for i in range(4))
    assert Path(folder, f"{entry.sha256}.tar").read_bytes() == whole(data_set, entry)
    assert not list(Path(folder).glob("*.part"))


def test_what_a_killed_rank_left_makes_room(make_data_set, folder):
    data_set = make_data_set([4, 4])
    first, second = data_set.manifest.shards
    os.makedirs(folder)
    Path(folder, f"{first.sha256}.tar.part").write_bytes(bytes(first.num_bytes))
    reader_of(data_set, folder, second.num_bytes).read(4)
    assert copies(folder) == {second.sha256}


def test_a_full_disk_is_warned_of_once(make_data_set, folder, caplog):
    data_set = make_data_set([4, 4])
    reader = reader_of(data_set, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        samples = [reader.read(i) for i in range(8)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all(isinstance(sample, Sample) for sample in samples)
    assert caplog.text.count("no space left") == 1
    assert copies(folder) == set()


def test_a_folder_that_cannot_be_made_is_warned_of_once(make_data_set, tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    reader = reader_of(make_data_set([4]), str(tmp_path / "file" / "cache"))
    assert all(isinstance(reader.read(i), Sample) for i in range(4))
    assert caplog.text.count("WARNING") == 1


def test_a_shard_cut_short_in_the_store_is_an_error(make_data_set, folder):
    data_set = make_data_set([4])
    os.truncate(os.path.join(data_set.url, "shard-000000.tar"), 3000)
    with pytest.raises(ShardError, match="cut short"):
        reader_of(data_set, folder).read(3)
    assert copies(folder) == set()


_RANK = """
import sys
from svfap_dist.shards.cache import ShardCache
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.shards.format import load_manifest
url, folder, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
reader = SampleReader(url, load_manifest(url), cache_bytes=1, shards=ShardCache(folder, limit))
assert all(isinstance(reader.read(i % 48), Sample) for i in range(96))
print(reader.take_bytes_fetched())
"""


@pytest.mark.parametrize("shards_kept", [6, 2])
def test_ranks_of_a_node_share_the_copies(make_data_set, folder, shards_kept):
    """Two processes at once: each shard comes once, and the limit holds for both together."""
    data_set = make_data_set([8] * 6)
    sizes = [entry.num_bytes for entry in data_set.manifest.shards]
    limit = sum(sorted(sizes)[-shards_kept:])
    command = [sys.executable, "-c", _RANK, data_set.url, folder, str(limit)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for rank in ranks:
        assert rank.stdout
        assert rank.stdout.readline() == "ready\n"
    answers = [rank.communicate("go\n")[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert sum(Path(folder, f"{name}.tar").stat().st_size for name in copies(folder)) <= limit
    if shards_kept == 6:
        assert sum(int(answer) for answer in answers) == sum(sizes)


def test_without_file_locks_there_is_no_cache(make_data_set, folder, monkeypatch):
    """As on Windows, which has no fcntl."""
    monkeypatch.setattr("svfap_dist.shards.cache.fcntl", None)
    data_set = make_data_set(SIZES)
    with pytest.raises(ConfigError, match=r"No file locks.*leave out data\.cache_dir"):
        loader_of(data_set, config_of(cache_dir=folder))
    loader_of(data_set)


def test_a_cache_too_small_for_the_lanes_is_refused(make_data_set, folder):
    with pytest.raises(ConfigError, match=r"Shard cache is too small.*4 lanes"):
        loader_of(make_data_set(SIZES), config_of(cache_dir=folder, cache_bytes=1000))
