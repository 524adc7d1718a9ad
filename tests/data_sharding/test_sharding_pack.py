"""Shards as bytes: their layout, that it is reproducible, and the limits of a shard."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from data_sharding.make_sample import Sample
from data_sharding.pack import pack
from svfap_dist.errors import StorageError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import ShardEntry, ShardIndex
from svfap_dist.video.info import VIDEO_SUFFIXES, VideoInfo, dump_info, load_info

INFO = VideoInfo(70, 25.0, 64, 48, "h264", labels={"identity": "id00001"})


def sample(number: int, size: int, key: str = "", suffix: str = "mp4") -> Sample:
    file = bytes([number % 256]) * size, INFO
    return Sample(key or f"id/{number:05d}", suffix, (file,))


def pack_all(samples: list[Sample], url: str, num_parts: int = 1) -> tuple[ShardEntry, ShardIndex]:
    entry = pack(samples, url, "shard-000000", num_parts)
    assert entry is not None
    return entry, shard_format.load_index(url, entry)


def test_samples_follow_each_other_in_order_without_a_gap(tmp_path: Path) -> None:
    samples = [sample(i, size) for i, size in enumerate((0, 1, 511, 512, 513, 5000))]
    entry, index = pack_all(samples, str(tmp_path))
    assert index.keys == tuple(s.key for s in samples)
    assert entry.num_samples == len(samples)
    assert list(index.offsets) == [sum(index.sizes[:i]) for i in range(len(samples))]


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_the_slice_of_a_sample_read_alone_is_the_sample(tmp_path: Path, suffix: str) -> None:
    long_key = "a-rather-long-folder-name/" * 5 + "k" * 120  # too long for a plain tar header
    samples = [sample(i, 1000 * i, suffix=suffix) for i in range(4)]
    samples.append(sample(4, 777, key=long_key, suffix=suffix))
    entry, index = pack_all(samples, str(tmp_path))
    tar = (tmp_path / entry.name).read_bytes()
    for row, want in enumerate(samples):
        content = tar[index.offsets[row] : index.offsets[row] + index.sizes[row]]
        assert shard_format.digest(content) == index.digests[row]
        assert index.num_frames[row] == INFO.num_frames
        members = dict(shard_format.iter_members(content))
        assert list(members) == [f"{want.key}.json", f"{want.key}.{suffix}"]  # JSON comes first
        assert members[f"{want.key}.{suffix}"] == want.files[0][0]
        assert load_info(members[f"{want.key}.json"]) == INFO
    assert (len(tar), hashlib.sha256(tar).hexdigest()) == (entry.num_bytes, entry.sha256)


def test_the_index_has_the_labels_of_sets_for_fine_tuning(tmp_path: Path) -> None:
    labels = [{"set": "dfew", "class": number, "fold": 1} for number in range(3)]
    infos = [dataclasses.replace(INFO, labels=each) for each in labels]
    samples = [Sample(f"id/{i}", "mp4", ((b"video", info),)) for i, info in enumerate(infos)]
    _, index = pack_all(samples, str(tmp_path))
    assert list(index.labels) == labels
    assert pack_all([sample(1, 10)], str(tmp_path))[1].labels == ()  # only an identity


def test_headers_say_nothing_of_when_where_and_by_whom(tmp_path: Path) -> None:
    entry, _ = pack_all([sample(1, 10)], str(tmp_path))
    with tarfile.open(tmp_path / entry.name) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
            assert (member.uname, member.gname, member.mode) == ("", "", 0o444)
            assert member.pax_headers == {}


def test_webdataset_opens_the_shards(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    samples = [sample(i, 1000 + i) for i in range(7)]
    entry, _ = pack_all(samples, str(tmp_path))
    urls = [str(tmp_path / entry.name)]
    found = [(s["__key__"], s["mp4"], s["json"]) for s in WebDataset(urls, shardshuffle=False)]
    assert [row[:2] for row in found] == [(s.key, s.files[0][0]) for s in samples]
    assert {load_info(row[2]).width for row in found} == {64}


def test_the_bytes_are_those_of_webdatasets_own_writer(tmp_path: Path) -> None:
    from webdataset import TarWriter

    samples = [sample(i, 1000 + i) for i in range(7)] + [sample(8, 10, suffix="avi")]
    entry, _ = pack_all(samples, str(tmp_path))
    with TarWriter(str(tmp_path / "b.tar"), user="", group="", mtime=0, encoder=False) as writer:
        for each in samples:  # JSON first: otherwise it writes members in order of suffix
            writer.write({"__key__": each.key, "json": dump_info(each.info)})
            writer.write({"__key__": each.key, each.suffix: each.files[0][0]})
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / entry.name).read_bytes()


def test_parts_are_in_sections_of_the_tar(tmp_path: Path) -> None:
    """Part 0 of all samples, part 1, ...: ranges of neighbors; a short sample has fewer parts."""
    videos = [[b"a0", b"a1" * 600, b"a2"], [b"b0"], [b"c0", b"c1", b""]]
    samples = [
        Sample(key, "mp4", tuple((video, INFO) for video in parts))
        for key, parts in zip("abc", videos, strict=True)
    ]
    entry, index = pack_all(samples, str(tmp_path), num_parts=3)
    assert (entry.num_samples, index.keys, index.num_parts) == (3, ("a", "b", "c"), 3)
    assert index.num_frames == (INFO.num_frames,) * 3
    tar = (tmp_path / entry.name).read_bytes()
    found = [
        [name for name, _ in shard_format.iter_members(tar[offset : offset + size])] if size else []
        for offset, size in zip(index.offsets, index.sizes, strict=True)
    ]
    named = [f"{key}+{part}" for part in range(3) for key in "abc"]
    assert found == [
        [] if key in ("b+1", "b+2") else [f"{key}.json", f"{key}.mp4"] for key in named
    ]
    assert list(index.offsets) == [sum(index.sizes[:i]) for i in range(9)]
    for row, parts in enumerate(videos):
        contents = b"".join(tar[offset : offset + size] for offset, size in index.ranges(row))
        members = [members for _, members in shard_format.iter_samples(contents)]
        assert [each["mp4"] for each in members] == parts
    assert len(tar) % tarfile.RECORDSIZE == 0
    with tarfile.open(tmp_path / entry.name) as whole:
        assert len(whole.getnames()) == 14


def test_no_samples_make_no_shards(tmp_path: Path) -> None:
    assert pack([], str(tmp_path), "shard-000000") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_full_temporary_folder_is_told(tmp_path: Path, monkeypatch, num_parts: int) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "r+b"))
    for size in (10, 100_000):  # raised when it is closed, and when it is written
        with pytest.raises(StorageError, match=r"TMPDIR.*no space left"):
            pack([sample(1, size)], str(tmp_path / "out"), "shard-000000", num_parts)
    assert not (tmp_path / "out").exists()


def test_a_killed_job_leaves_nothing_on_the_temporary_disk(tmp_path: Path) -> None:
    program = """if True:
        import os, signal
        from data_sharding.make_sample import Sample
        from data_sharding.pack import pack
        from svfap_dist.video.info import VideoInfo

        def samples():
            for number in range(9):
                if number == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                file = bytes(100_000), VideoInfo(1, 1, 1, 1, "h264")
                yield Sample(str(number), "mp4", (file, file))

        pack(samples(), "out", "shard-000000", num_parts=2)
    """
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("*")) == [tmp_path / "tmp"]
