"""The whole way from a folder to a data set: counts, repetition, interruption, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from clips import make_video

from data_sharding import pipeline
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError, StorageError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import MANIFEST_NAME, REJECTED_NAME

NUM_GOOD = 10
BROKEN = {
    "b/empty.mp4": "empty",
    "b/text.mp4": "unreadable",
    "b/cut.mp4": "truncated",
    "b/short.mp4": "too_short",
    "b/gone.mp4": "missing",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten good videos in VoxCeleb2's layout, of different lengths."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(NUM_GOOD):
        make_video(root / f"id{i % 3:05d}/v{i}/00001.mp4", 61 + i, size=(32, 32), seed=i)
    return str(root)


@pytest.fixture
def with_broken(videos: str, tmp_path: Path) -> str:
    """The ten, and one broken video of each kind that a folder can hold."""
    root = tmp_path / "with-broken"
    root.mkdir()
    (root / "good").symlink_to(videos)
    short, good = make_video(root / "b/short.mp4", 60), make_video(None, 61)
    assert short
    (root / "b/empty.mp4").write_bytes(b"")
    (root / "b/text.mp4").write_bytes(b"no video" * 100)
    (root / "b/cut.mp4").write_bytes(good[: len(good) // 2])
    (root / "b/gone.mp4").symlink_to(root / "nowhere.mp4")
    return str(root)


def contents(url: str | Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(storage.read_bytes(storage.join(str(url), name))).hexdigest()
        for name in storage.list_files(str(url))
    }


def shard(videos: str, url: str | Path, **options) -> pipeline.ShardSummary:
    defaults: dict[str, Any] = {"max_samples_per_shard": 4, "workers": 0}
    return pipeline.shard("voxceleb2", videos, str(url), **(defaults | options))


def test_two_shardings_are_equal_byte_for_byte(videos: str, tmp_path: Path) -> None:
    shard(videos, tmp_path / "a", workers=0)
    shard(videos, tmp_path / "b", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 3 * 3 + 2
    shard(videos, tmp_path / "c", shuffle_seed=1)
    assert (
        contents(tmp_path / "a")["shard-000000.tar"] != contents(tmp_path / "c")["shard-000000.tar"]
    )


def test_every_video_is_there_once_shuffled_with_its_labels(videos: str, tmp_path: Path) -> None:
    summary = shard(videos, tmp_path / "out")
    manifest = shard_format.load_manifest(str(tmp_path / "out"))
    indexes = [shard_format.load_index(str(tmp_path / "out"), e) for e in manifest.shards]
    keys = [key for index in indexes for key in index.keys]
    assert sorted(keys) == sorted(f"id{i % 3:05d}/v{i}/00001" for i in range(NUM_GOOD))
    assert keys != sorted(keys)
    lengths = {key: n for index in indexes for key, n in zip(index.keys, index.num_frames)}  # noqa: B905
    assert lengths == {f"id{i % 3:05d}/v{i}/00001": 61 + i for i in range(NUM_GOOD)}
    assert [entry.num_samples for entry in manifest.shards] == [4, 4, 2]
    assert (manifest.source, manifest.profile, manifest.min_frames) == ("voxceleb2", "source", 61)
    assert summary.num_samples == NUM_GOOD
    assert summary.seconds == pytest.approx(sum(61 + i for i in range(NUM_GOOD)) / 25)
    assert summary.fingerprint == manifest.fingerprint


def test_broken_videos_are_listed_and_left_out(with_broken: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None, int]] = []
    out = str(tmp_path / "out")
    summary = pipeline.shard(
        "folder", with_broken, out, workers=2, progress=lambda *state: seen.append(state)
    )
    assert (summary.num_samples, summary.rejected) == (NUM_GOOD, dict.fromkeys(BROKEN.values(), 1))
    lines = storage.read_bytes(storage.join(out, REJECTED_NAME)).splitlines()
    rows = {row["key"] + ".mp4": row for row in map(json.loads, lines)}
    assert {key: row["reason"] for key, row in rows.items()} == BROKEN
    assert {row["where"] for row in rows.values()} == {f"{with_broken}/{path}" for path in BROKEN}
    assert all(row["detail"] for row in rows.values())
    total = NUM_GOOD + len(BROKEN)
    assert seen[-1] == (total, total, len(BROKEN))
    text = "\n".join(summary.lines())
    assert "5 videos left out" in text
    assert "truncated 1" in text
    assert pipeline.verify(out).num_samples == NUM_GOOD


def test_a_second_run_finds_the_work_done(with_broken: str, tmp_path: Path) -> None:
    first = pipeline.shard("folder", with_broken, str(tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = pipeline.shard("folder", with_broken, str(tmp_path / "out"), workers=2, overwrite=True)
    assert again.already_complete
    assert "nothing to do" in again.lines()[0]
    assert again.rejected == first.rejected
    assert (again.num_samples, again.seconds) == (first.num_samples, pytest.approx(first.seconds))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "change", [{"shuffle_seed": 1}, {"min_frames": 62}, {"max_samples_per_shard": 5}]
)
def test_another_data_set_is_not_overwritten_unasked(
    videos: str, tmp_path: Path, change: dict[str, int]
) -> None:
    shard(videos, tmp_path / "out", max_samples_per_shard=2)
    before = contents(tmp_path / "out")
    options = {"max_samples_per_shard": 2} | change
    with pytest.raises(ConfigError, match=r"other inputs or options.*--overwrite"):
        shard(videos, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before
    shard(videos, tmp_path / "out", overwrite=True, **options)
    shard(videos, tmp_path / "new", **options)
    # Nothing of the old set stays, not even where it had more shards.
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.fixture
def growing(videos: str, tmp_path: Path) -> Path:
    """A folder with the ten videos, to which others can be added."""
    root = tmp_path / "growing"
    shutil.copytree(videos, root)
    return root


def test_new_videos_get_shards_of_their_own(growing: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = shard(str(growing), out)
    before = contents(out)
    for number in range(5):
        make_video(growing / f"id00009/v/0000{number}.mp4", 70, size=(32, 32), seed=number)
    (growing / "id00009/v/00009.mp4").write_bytes(b"")
    second = shard(str(growing), out)
    after = contents(out)
    kept = [name for name in before if name.startswith("shard-")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    manifest = shard_format.load_manifest(str(out))
    assert [entry.num_samples for entry in manifest.shards] == [4, 4, 2, 4, 1] or [
        entry.num_samples for entry in manifest.shards
    ] == [4, 4, 2, 3, 2]  # the empty file is in either of the two new groups
    assert (second.num_samples, second.new_samples) == (NUM_GOOD + 5, 5)
    assert second.rejected == {"empty": 1}
    assert second.fingerprint_before == first.fingerprint != second.fingerprint
    assert any(f"was {first.fingerprint} and is" in line for line in second.lines())
    assert pipeline.verify(str(out)).num_samples == NUM_GOOD + 5
    assert shard(str(growing), out).already_complete


def test_an_interrupted_addition_leaves_the_old_set_whole_and_goes_on(
    growing: Path, tmp_path: Path
) -> None:
    shard(str(growing), tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "undisturbed")
    for number in range(9):
        make_video(growing / f"id00009/v/0000{number}.mp4", 70, size=(32, 32), seed=number)

    def interrupt(done: int, total: int | None, rejected: int) -> None:
        if done == NUM_GOOD + 5:  # the first new shard is finished
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard(str(growing), tmp_path / "out", progress=interrupt)
    manifest = shard_format.load_manifest(str(tmp_path / "out"))
    assert manifest.num_samples == NUM_GOOD
    shard_format.check_shards(str(tmp_path / "out"), manifest)
    finished = (tmp_path / "out/shard-000003.done.json").stat().st_mtime_ns
    shard(str(growing), tmp_path / "out")
    assert (tmp_path / "out/shard-000003.done.json").stat().st_mtime_ns == finished
    shard(str(growing), tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["vanished", "changed"])
def test_vanished_and_changed_videos_are_another_input(
    growing: Path, tmp_path: Path, change: str
) -> None:
    shard(str(growing), tmp_path / "out")
    video = growing / "id00000/v3/00001.mp4"
    if change == "vanished":
        video.unlink()
    else:
        make_video(video, 90)
    before = contents(tmp_path / "out")
    numbers = r"1 of .* and 0 have" if change == "vanished" else r"0 of .* and 1 have"
    with pytest.raises(ConfigError, match=rf"other inputs.*{numbers}.*id00000/v3.*--overwrite"):
        shard(str(growing), tmp_path / "out")
    assert contents(tmp_path / "out") == before
    shard(str(growing), tmp_path / "out", overwrite=True)
    shard(str(growing), tmp_path / "new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_run_leaves_no_manifest_and_can_be_repeated(
    videos: str, tmp_path: Path, workers: int
) -> None:
    def interrupt(done: int, total: int | None, rejected: int) -> None:
        if done >= 7 and (tmp_path / "out/shard-000000.done.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard(videos, tmp_path / "out", workers=workers, progress=interrupt)
    assert "shard-000000.tar" in contents(tmp_path / "out")
    assert MANIFEST_NAME not in contents(tmp_path / "out")
    with pytest.raises(ShardError, match="No manifest"):
        pipeline.show(str(tmp_path / "out"))
    finished = list((tmp_path / "out").glob("*.done.json"))
    before = {path: path.stat().st_mtime_ns for path in finished}
    assert before
    assert not shard(videos, tmp_path / "out").already_complete
    assert {path: path.stat().st_mtime_ns for path in finished} == before  # not made again
    shard(videos, tmp_path / "undisturbed")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_an_interrupted_replacement_leaves_no_manifest_of_the_old(
    videos: str, tmp_path: Path
) -> None:
    shard(videos, tmp_path / "out")

    def interrupt(done: int, total: int | None, rejected: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard(videos, tmp_path / "out", shuffle_seed=1, overwrite=True, progress=interrupt)
    assert MANIFEST_NAME not in contents(tmp_path / "out")


def test_lost_and_cut_shards_are_made_again(videos: str, tmp_path: Path) -> None:
    shard(videos, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out/shard-000001.tar").unlink()
    assert not shard(videos, tmp_path / "out").already_complete
    assert contents(tmp_path / "out") == before


def test_an_altered_manifest_is_not_taken_for_ours(videos: str, tmp_path: Path) -> None:
    shard(videos, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST_NAME
    path.write_text(path.read_text().replace('"num_samples": 2', '"num_samples": 3'))
    with pytest.raises(ConfigError, match=r"cannot be read.*altered.*--overwrite"):
        shard(videos, tmp_path / "out")
    shard(videos, tmp_path / "out", overwrite=True)
    pipeline.verify(str(tmp_path / "out"))


def test_shards_of_another_tool_are_not_overwritten_unasked(videos: str, tmp_path: Path) -> None:
    for number in range(2):
        storage.write_bytes(str(tmp_path / f"out/shard-{number:06d}.tar"), b"precious")
    with pytest.raises(ConfigError, match=r"2 tars, such as shard-000000.*another URL"):
        shard(videos, tmp_path / "out")
    assert (tmp_path / "out/shard-000000.tar").read_bytes() == b"precious"


def test_nothing_usable_is_an_error_and_looks_like_nothing_complete(tmp_path: Path) -> None:
    make_video(tmp_path / "in/a.mp4", 10)
    (tmp_path / "in/b.mp4").write_bytes(b"")
    with pytest.raises(ShardError, match=r"too_short 1.*lower --min-frames") as caught:
        pipeline.shard("folder", str(tmp_path / "in"), str(tmp_path / "out"))
    assert caught.value.exit_code == 3
    assert list(contents(tmp_path / "out")) == [REJECTED_NAME, "shard-000000.done.json"]
    assert pipeline.shard("folder", str(tmp_path / "in"), str(tmp_path / "out"), min_frames=9)


def test_the_way_over_s3_is_the_same(videos: str, s3_bucket: str, tmp_path: Path) -> None:
    for name in storage.list_files(videos):
        storage.upload_file(str(Path(videos) / name), f"{s3_bucket}/in/{name}")
    shard(videos, tmp_path / "local")
    shard(f"{s3_bucket}/in", f"{s3_bucket}/out", workers=2)
    assert contents(f"{s3_bucket}/out") == contents(tmp_path / "local")
    assert pipeline.verify(f"{s3_bucket}/out").num_samples == NUM_GOOD
    assert shard(f"{s3_bucket}/in", f"{s3_bucket}/out").already_complete


def test_an_output_that_cannot_be_written_is_told_before_any_work(
    videos: str, s3_environment: str, tmp_path: Path
) -> None:
    worked: list[int] = []
    with pytest.raises(StorageError, match=r"no such bucket.*check the bucket") as caught:
        shard(videos, "s3://nobody-made-this/out", progress=lambda done, *_: worked.append(done))
    assert caught.value.exit_code == 8
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot write"):
        shard(videos, tmp_path / "file", progress=lambda done, *_: worked.append(done))
    assert worked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "both"}, r"Unknown profile.*source, train"),
        ({"train": pipeline.TrainProfile()}, r"profile source.*--profile train"),
        ({"min_frames": 0}, "--min-frames. Found: 0"),
        ({"max_samples_per_shard": 0}, "--samples-per-shard. Found: 0"),
        ({"workers": -1}, "--workers. Found: -1"),
    ],
)
def test_impossible_options_are_refused(videos: str, tmp_path: Path, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        shard(videos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
