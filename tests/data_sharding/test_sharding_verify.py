"""Damage that verifying finds, and the statistics of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from clips import make_video, read_frame_number
from hostile import HOSTILE_TARS
from PIL import Image

from data_sharding import pipeline, show, temporary, verify
from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import ShardEntry, ShardIndex
from svfap_dist.video.info import load_info


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for i in range(4):
        make_video(root / f"in/{i}.mp4", 61 + i, size=(32, 32), seed=i)
    make_video(root / "in/4.webm", 90, size=(48, 32), codec="libvpx-vp9", container="webm", fps=30)
    pipeline.shard(
        "folder", str(root / "in"), str(root / "out"), max_samples_per_shard=2, workers=0
    )
    return root / "out"


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_whole_data_set_is_verified(shards: Path, workers: int) -> None:
    seen = []
    verified = pipeline.verify(str(shards), lambda *state: seen.append(state), workers=workers)
    assert (verified.num_shards, verified.num_samples) == (3, 5)
    assert seen[0] == (0, 3, 0)
    assert seen[-1] == (3, 3, 0)
    assert "every byte" in verified.lines()[0]


def test_one_altered_byte_is_found_and_its_sample_named(shards: Path) -> None:
    entry = shard_format.load_manifest(str(shards)).shards[1]
    index = shard_format.load_index(str(shards), entry)
    data = bytearray((shards / entry.name).read_bytes())
    data[index.offsets[1] + index.sizes[1] // 2] ^= 1
    (shards / entry.name).write_bytes(data)
    with pytest.raises(ShardError, match=rf"1 of 3 .*shard-000001.*first '{index.keys[1]}'"):
        pipeline.verify(str(shards), workers=1)
    shard_format.check_shards(str(shards), shard_format.load_manifest(str(shards)))


def test_a_cut_shard_is_found_by_both_checks(shards: Path) -> None:
    path = shards / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(ShardError, match=r"shard-000000\.tar: .*other content"):
        pipeline.verify(str(shards), workers=1)
    with pytest.raises(ShardError, match="cut short"):
        shard_format.check_shards(str(shards), shard_format.load_manifest(str(shards)))
    with pytest.raises(ShardError, match="cut short"):
        pipeline.show(str(shards))


def test_a_stale_manifest_is_found(shards: Path, original: Path) -> None:
    old = (shards / "manifest.json").read_bytes()
    pipeline.shard(
        "folder",
        str(original.parent / "in"),
        str(shards),
        shuffle_seed=1,
        overwrite=True,
        workers=0,
    )
    (shards / "manifest.json").write_bytes(old)
    with pytest.raises(ShardError, match="stale manifest: the shard was made again since"):
        pipeline.verify(str(shards), workers=1)


def test_a_manifest_of_before_shards_were_added_is_found(tmp_path: Path) -> None:
    options = {"max_samples_per_shard": 1, "workers": 0}
    make_video(tmp_path / "in/a.mp4", 61)
    pipeline.shard("folder", str(tmp_path / "in"), str(tmp_path / "out"), **options)
    old = (tmp_path / "out/manifest.json").read_bytes()
    make_video(tmp_path / "in/b.mp4", 61)
    pipeline.shard("folder", str(tmp_path / "in"), str(tmp_path / "out"), **options)
    assert pipeline.verify(str(tmp_path / "out")).num_samples == 2
    (tmp_path / "out/manifest.json").write_bytes(old)
    with pytest.raises(ShardError, match=r"not that of the shards.*000001\.done\.json: not in"):
        pipeline.verify(str(tmp_path / "out"))


def test_swapped_indexes_are_found(shards: Path) -> None:
    first, second = (shards / f"shard-00000{number}.index.json" for number in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ShardError, match=r"2 of 3 .*Shard index does not match"):
        pipeline.verify(str(shards), workers=1)


def test_a_key_in_two_shards_is_found() -> None:
    keys = temporary.database(verify._KEYS)
    assert verify._add_keys(keys, ["a", "b"]) == []
    assert verify._add_keys(keys, ["c", "b"]) == ["key 'b' is in another shard too"]


def test_packets_that_lie_elsewhere_than_the_json_says_are_found(tmp_path: Path) -> None:
    make_video(tmp_path / "in/a.mp4", 61, size=(224, 224))
    out = str(tmp_path / "out")
    pipeline.shard("folder", str(tmp_path / "in"), out, profile="train", workers=0)
    assert pipeline.verify(out).num_samples == 1
    (entry,) = shard_format.load_manifest(out).shards
    content = (tmp_path / "out" / entry.name).read_bytes()
    members = dict(shard_format.iter_members(content))
    video = members["a+2.mp4"]
    info = load_info(members["a+2.json"], video)
    assert info.layout is not None
    assert verify._packets_fit(video, info)
    (file,) = info.layout.files
    for wrong in ({"first_byte": file.first_byte + 1}, {"packet_sizes": file.packet_sizes[:-1]}):
        order = dataclasses.replace(info.layout, files=(file._replace(**wrong),))
        assert not verify._packets_fit(video, dataclasses.replace(info, layout=order))


@pytest.fixture
def single(tmp_path: Path) -> tuple[str, ShardEntry, ShardIndex]:
    """Shards of one video of 61 frames, and the row and the index of their only shard."""
    make_video(tmp_path / "in/a.mp4", 61)
    out = str(tmp_path / "out")
    pipeline.shard("folder", str(tmp_path / "in"), out, workers=0)
    (entry,) = shard_format.load_manifest(out).shards
    return out, entry, shard_format.load_index(out, entry)


@pytest.mark.parametrize(
    ("said", "ok"),
    [
        ({"labels": ({},)}, True),
        ({"labels": ({"class": 1},)}, False),
        ({"num_frames": (60,)}, False),
    ],
)
def test_what_the_index_says_and_a_sample_does_not_is_found(single, said, ok: bool) -> None:
    out, entry, index = single
    tar = os.path.join(out, entry.name)
    found = verify._read_by_webdataset(tar, dataclasses.replace(index, **said))
    assert found == (True, [] if ok else ["a"])


def test_samples_that_the_index_does_not_name_are_found(single) -> None:
    out, entry, index = single
    assert list(verify._damages(out, entry, index)) == []
    nothing = {field.name: () for field in dataclasses.fields(index)}
    found = list(verify._damages(out, entry, ShardIndex(**nothing)))
    assert found == [
        "0 samples in the index, 1 in the manifest",
        "webdataset finds other samples than the index names",
    ]


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_a_hostile_member_is_damage_and_is_not_read(single, name: str) -> None:
    out, entry, index = single
    tar = Path(out, entry.name)
    end = index.offsets[-1] + index.sizes[-1]
    tar.write_bytes(tar.read_bytes()[:end] + HOSTILE_TARS[name] + bytes(1024))
    sha256 = hashlib.sha256(tar.read_bytes()).hexdigest()
    (found,) = verify._damages(out, dataclasses.replace(entry, sha256=sha256), index)
    assert found.startswith("webdataset cannot read it")


def test_a_lost_marker_is_found(single) -> None:
    out, _, _ = single
    os.unlink(os.path.join(out, "shard-000000.done.json"))
    with pytest.raises(ShardError, match="1 shards have no marker"):
        pipeline.verify(out)


def test_a_contact_sheet_shows_first_and_middle_frames(tmp_path: Path) -> None:
    for number, length in enumerate((64, 61, 80)):
        make_video(tmp_path / f"in/{number}.mp4", length, size=(160, 160), seed=number)
    for profile, profile_options in (("source", None), ("train", pipeline.TrainProfile("full"))):
        out, png = str(tmp_path / profile), tmp_path / f"{profile}.png"
        pipeline.shard(
            "folder", str(tmp_path / "in"), out, profile=profile, train=profile_options, workers=0
        )
        pipeline.draw_contact_sheet(out, str(png), num_samples=8)
        sheet = np.asarray(Image.open(png))
        assert sheet.shape[1] == 3 * 322
        entry = shard_format.load_manifest(out).shards[0]
        keys = shard_format.load_index(out, entry).keys
        lefts = [sample + frame for sample in range(0, 966, 322) for frame in (0, 160)]
        pictures = [sheet[-162:-2, left : left + 160] for left in lefts]
        middles = {"0": 32, "1": 30, "2": 40}
        want = [number for key in keys for number in (0, middles[key])]
        assert [read_frame_number(picture) for picture in pictures] == want


def test_all_damage_is_told_at_once(shards: Path) -> None:
    (shards / "shard-000000.tar").unlink()
    (shards / "shard-000001.index.json").write_text("{}")
    (shards / "shard-000002.index.json").unlink()
    with pytest.raises(ShardError, match=r"3 of 3 shards are damaged") as caught:
        pipeline.verify(str(shards), workers=1)
    assert "shard-000000.tar: missing" in caught.value.found
    assert "shard-000001.tar: Shard index does not match" in caught.value.found
    assert "shard-000002.tar: Shard index is missing" in caught.value.found


def test_the_end_of_a_tar_counts_too(shards: Path) -> None:
    """Damage after the last sample, which only the digest of the whole file reveals."""
    path = shards / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[-1] = 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"1 of 3 .*other content"):
        pipeline.verify(str(shards), workers=1)


@pytest.mark.parametrize("look_at", [1, 2, 256])
def test_statistics_count_exactly_what_the_indexes_know(
    shards: Path, monkeypatch: pytest.MonkeyPatch, look_at: int
) -> None:
    monkeypatch.setattr(show, "_LOOK_AT", look_at)
    found = pipeline.show(str(shards))
    assert (found.num_samples, found.num_shards) == (5, 3)
    assert found.num_frames == 61 + 62 + 63 + 64 + 90
    assert (found.shortest_frames, found.longest_frames) == (61, 90)
    assert found.num_looked_at == min(5, look_at) or (look_at, found.num_looked_at) == (2, 2)
    assert found.num_bytes == sum(path.stat().st_size for path in shards.glob("*.tar"))
    if look_at == 256:
        assert found.seconds == pytest.approx(250 / 25 + 90 / 30)
        assert found.resolutions == {"32x32": 4, "48x32": 1}
        assert found.codecs == {"h264": 4, "vp9": 1}
        assert found.frame_rates == {"25": 4, "30": 1}
        assert found.num_variable_rate == 0
        assert any("32x32 (4), 48x32 (1)" in line for line in found.lines())


def test_statistics_read_the_first_kilobytes_of_a_sample_only(tmp_path: Path, monkeypatch) -> None:
    make_video(tmp_path / "in/a.mp4", 61, size=(160, 160))
    pipeline.shard("folder", str(tmp_path / "in"), str(tmp_path / "out"))
    read = storage.read_range
    sizes: list[int] = []

    def read_range(url: str, start: int, stop: int) -> bytes:
        sizes.append(stop - start)
        return read(url, start, stop)

    monkeypatch.setattr(storage, "read_range", read_range)
    assert pipeline.show(str(tmp_path / "out")).num_bytes > 2 * show._PEEK_BYTES
    assert sizes == [show._PEEK_BYTES]


def test_long_labels_do_not_hide_the_json(tmp_path: Path, monkeypatch) -> None:
    make_video(tmp_path / "in/a.mp4", 61)
    pipeline.shard("folder", str(tmp_path / "in"), str(tmp_path / "out"))
    monkeypatch.setattr(show, "_PEEK_BYTES", 700)  # ends inside the JSON's block
    assert pipeline.show(str(tmp_path / "out")).resolutions == {"64x48": 1}


def test_labels_folds_and_people_are_counted() -> None:
    rows = [
        {"class_name": "happy", "fold": 2, "subject": "b"},
        {"class_name": "angry", "fold": 1, "subject": "a"},
        {"class_name": "happy", "fold": 1, "subject": "a"},
    ]
    assert show._label_counts(rows) == {
        "class": {"angry": 1, "happy": 2},
        "fold": {"1": 2, "2": 1},
    }
    assert show._label_counts([{"class_names": {"arousal": "dull"}, "split": "val"}]) == {
        "arousal": {"dull": 1},
        "split": {"val": 1},
    }
    assert show._label_counts([]) == {}
