"""The shard format: what is written comes back, and what does not fit together is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from svfap_dist import storage
from svfap_dist.errors import ShardError, StorageError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import MANIFEST_NAME, Manifest, ShardEntry, ShardIndex
from svfap_dist.video.info import (
    PhaseFile,
    PhaseLayout,
    VideoInfo,
    dump_info,
    load_info,
    stored_position,
)

INDEX = ShardIndex(("a", "b"), (0, 1024), (1024, 2048), ("d0", "d1"), (70, 80))


@pytest.fixture
def data_set(tmp_path: Path) -> tuple[str, Manifest]:
    """Two shards whose tars are only long enough, with their indexes and manifest."""
    url = str(tmp_path)
    entries = []
    for number in range(2):
        index = dataclasses.replace(INDEX, keys=(f"a{number}", f"b{number}"))
        tar, raw = bytes([number]) * (1000 + number), shard_format.dump(index)
        name = f"shard-{number:06d}.tar"
        sha256, index_sha256 = (hashlib.sha256(data).hexdigest() for data in (tar, raw))
        entries.append(ShardEntry(name, 2, len(tar), sha256, index_sha256))
        storage.write_bytes(storage.join(url, name), tar)
        storage.write_bytes(storage.join(url, entries[-1].index_name), raw)
    manifest = Manifest("folder", "source", 0, 70, "inputs", tuple(entries))
    storage.write_bytes(storage.join(url, MANIFEST_NAME), shard_format.dump(manifest))
    return url, manifest


def test_what_is_dumped_is_loaded(data_set: tuple[str, Manifest]) -> None:
    url, manifest = data_set
    assert shard_format.load_manifest(url) == manifest
    index = shard_format.load_index(url, manifest.shards[1])
    assert index == dataclasses.replace(INDEX, keys=("a1", "b1"))
    assert hash(index)  # tuples throughout
    assert manifest.num_samples == 4
    assert manifest.shards[1].index_name == "shard-000001.index.json"
    shard_format.check_shards(url, manifest)


def test_the_fingerprint_is_of_what_decides_the_order(data_set: tuple[str, Manifest]) -> None:
    _, manifest = data_set
    first, second = manifest.shards
    same = dataclasses.replace(manifest, source="voxceleb2", inputs_digest="others")
    assert same.fingerprint == manifest.fingerprint
    for shards in (
        (second, first),
        (first,),
        (dataclasses.replace(first, num_samples=3), second),
        (dataclasses.replace(first, sha256="0"), second),
        (dataclasses.replace(first, name="other.tar"), second),
    ):
        assert dataclasses.replace(manifest, shards=shards).fingerprint != manifest.fingerprint


def test_no_manifest_means_incomplete(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"No manifest.*svfap shard"):
        shard_format.load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, r"altered or is of another version.*99"),
        ({"fingerprint": "0" * 16}, "altered"),
        ({"unknown": 1}, "Unreadable manifest"),
        ({"shards": [{}]}, "Unreadable manifest"),
        ({"shards": None}, "Unreadable manifest"),
    ],
)
def test_an_altered_manifest_is_refused(
    data_set: tuple[str, Manifest], change: dict[str, object], message: str
) -> None:
    url, _ = data_set
    path = storage.join(url, MANIFEST_NAME)
    storage.write_bytes(path, json.dumps(json.loads(storage.read_bytes(path)) | change).encode())
    with pytest.raises(ShardError, match=message):
        shard_format.load_manifest(url)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(data_set: tuple[str, Manifest], raw: bytes) -> None:
    url, _ = data_set
    storage.write_bytes(storage.join(url, MANIFEST_NAME), raw)
    with pytest.raises(ShardError, match="Unreadable manifest"):
        shard_format.load_manifest(url)


def test_an_index_of_another_making_is_refused(data_set: tuple[str, Manifest]) -> None:
    url, manifest = data_set
    first, second = manifest.shards
    swapped = dataclasses.replace(first, name=second.name)
    with pytest.raises(ShardError, match=r"does not fit.*shard-000001\.index\.json|another digest"):
        shard_format.load_index(url, swapped)
    storage.delete(storage.join(url, first.index_name))
    with pytest.raises(ShardError, match="Shard index is missing"):
        shard_format.load_index(url, first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"Shard is missing.*shard-000001\.tar"),
        (b"x" * 1000, r"cut short.*1000 bytes where the manifest says 1001"),
        (b"x" * 1002, "Shard grew"),
    ],
)
def test_shards_that_do_not_fit_the_manifest_are_told(
    data_set: tuple[str, Manifest], content: bytes | None, message: str
) -> None:
    url, manifest = data_set
    where = storage.join(url, "shard-000001.tar")
    storage.delete(where) if content is None else storage.write_bytes(where, content)
    with pytest.raises(ShardError, match=message):
        shard_format.check_shards(url, manifest)


def test_a_store_that_fails_is_not_a_missing_manifest(s3_environment: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(StorageError):
        shard_format.load_manifest(str(tmp_path))


def test_stored_positions_are_the_phases_end_to_end() -> None:
    for num_frames in range(1, 23):
        for phases in range(1, 6):
            stored = [f for phase in range(phases) for f in range(phase, num_frames, phases)]
            found = [stored_position(f, num_frames, phases) for f in range(num_frames)]
            assert [stored.index(f) for f in range(num_frames)] == found


def test_a_sample_s_json_comes_back_as_it_was() -> None:
    plain = VideoInfo(61, 25.0, 160, 160, "h264", labels={"identity": "id00001"})
    layout = PhaseLayout(
        4, 16, "AWQ=", (PhaseFile(48, (700, 31)),), "voxceleb2", 0, 32, 160, 160, 224, 224
    )
    for info in (plain, dataclasses.replace(plain, layout=layout)):
        raw = dump_info(info)
        assert load_info(raw) == info


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "members",
    [
        [("a.json", b"{}"), ("a.mp4", b"x" * 512)],
        [("folder/" * 20 + "a.json", b""), ("k" * 120 + ".mp4", b"x")],  # a prefix; a long name
        [("\xe9/\u4eba.json", b"{}"), ("a.mp4", b"")],
    ],
)
def test_members_are_those_that_tarfile_finds_and_a_cut_is_an_error(members) -> None:
    whole = tar_of(*members)
    assert list(shard_format.iter_members(whole)) == members
    last = whole.index(members[-1][1]) if members[-1][1] else 1024
    for cut in (0, 1, 511, 513, last + len(members[-1][1]) + 1):
        with pytest.raises(tarfile.ReadError):
            list(shard_format.iter_members(whole[:cut]))
