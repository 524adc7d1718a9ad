"""Damage that verifying finds, and the statistics of a data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from clips import make_video

from data_sharding import cli, show
from svfap_dist import shard_format
from svfap_dist.errors import ShardError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for i in range(4):
        make_video(root / f"in/{i}.mp4", 61 + i, size=(32, 32), seed=i)
    make_video(root / "in/4.webm", 90, size=(48, 32), codec="libvpx-vp9", container="webm", fps=30)
    cli.shard("folder", str(root / "in"), str(root / "out"), max_samples_per_shard=2, workers=0)
    return root / "out"


@pytest.fixture
def shards(original: Path, tmp_path: Path) -> Path:
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_whole_data_set_is_verified(shards: Path) -> None:
    seen = []
    verified = cli.verify(str(shards), progress=lambda *state: seen.append(state))
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
        cli.verify(str(shards))
    shard_format.check_shards(str(shards), shard_format.load_manifest(str(shards)))


def test_a_cut_shard_is_found_by_both_checks(shards: Path) -> None:
    path = shards / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-20000])
    with pytest.raises(ShardError, match=r"shard-000000\.tar: .*other content"):
        cli.verify(str(shards))
    with pytest.raises(ShardError, match="cut short"):
        shard_format.check_shards(str(shards), shard_format.load_manifest(str(shards)))
    with pytest.raises(ShardError, match="cut short"):
        cli.show(str(shards))


def test_all_damage_is_told_at_once(shards: Path) -> None:
    (shards / "shard-000000.tar").unlink()
    (shards / "shard-000001.index.json").write_text("{}")
    (shards / "shard-000002.index.json").unlink()
    with pytest.raises(ShardError, match=r"3 of 3 shards are damaged") as caught:
        cli.verify(str(shards))
    assert "shard-000000.tar: missing" in caught.value.found
    assert "shard-000001.tar: Shard index does not fit" in caught.value.found
    assert "shard-000002.tar: Shard index is missing" in caught.value.found


def test_the_end_of_a_tar_counts_too(shards: Path) -> None:
    """Damage after the last sample, which only the digest of the whole can tell."""
    path = shards / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    data[-1] = 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"1 of 3 .*other content"):
        cli.verify(str(shards))


@pytest.mark.parametrize("look_at", [1, 2, 256])
def test_statistics_count_exactly_what_the_indexes_know(
    shards: Path, monkeypatch: pytest.MonkeyPatch, look_at: int
) -> None:
    monkeypatch.setattr(show, "_LOOK_AT", look_at)
    found = cli.show(str(shards))
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


def test_long_labels_do_not_hide_the_json(tmp_path: Path, monkeypatch) -> None:
    make_video(tmp_path / "in/a.mp4", 61)
    cli.shard("folder", str(tmp_path / "in"), str(tmp_path / "out"))
    monkeypatch.setattr(show, "_PEEK_BYTES", 700)  # ends inside the JSON's block
    assert cli.show(str(tmp_path / "out")).resolutions == {"64x48": 1}
