"""Features as Parquet: the same as those of an NPZ, resumable, and whole after any kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from clips import make_video
from made_networks import pretrained, recipe, save_run
from pyarrow import parquet
from typer.testing import CliRunner

import svfap_dist
from data_sharding import pipeline as sharding
from svfap_dist import storage
from svfap_dist.cli.app import app
from svfap_dist.errors import ConfigError, DecodeError, ShardError
from svfap_dist.inference import part_files
from svfap_dist.inference import parts as parts_module
from svfap_dist.inference.parts import plan_parts

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five videos of 20 frames, one of them with another width, and one that is none."""
    path = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(NAMES):
        make_video(path / f"{name}.mp4", 20, size=(80 if name == "a" else 64, 64), seed=number)
    (path / "junk.mp4").write_bytes(b"junk")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "pretrained", pretrained(), recipe())


@pytest.fixture
def two_files_per_part(monkeypatch):
    monkeypatch.setattr(parts_module, "FILES_PER_PART", 2)


def extract(run, *words) -> dict:
    done = CliRunner().invoke(app, ["extract", run, *words, "--format", "parquet", "--json"])
    if done.exception:
        raise done.exception
    return json.loads(done.stdout)


def rows_of(output) -> list[dict]:
    """The rows, read as any program reads a folder of Parquet files."""
    return parquet.read_table(output).to_pylist()


def test_rows_are_the_clips_of_the_videos(folder, run, tmp_path, two_files_per_part):
    said = extract(run, str(folder), "-o", str(tmp_path / "out"), "--threads=2")
    assert (said["parts"], said["videos"], said["clips"], said["dim"]) == (3, 5, 15, 32)
    assert said["rejected"] == [[str(folder / "junk.mp4"), said["rejected"][0][1]]]
    assert said["rejected"][0][1].startswith("unreadable: ")
    rows = rows_of(tmp_path / "out")
    assert [row["key"] for row in rows] == [str(folder / f"{n}.mp4") for n in NAMES for _ in "123"]
    assert [row["start"] for row in rows] == [0, 8, 13] * 5
    assert [row["start_seconds"] for row in rows[:3]] == [0.0, 8 / 25, 13 / 25]
    assert [row["end_seconds"] for row in rows[:3]] == [7 / 25, 15 / 25, 20 / 25]
    assert {row["clips"] for row in rows} == {1}
    assert {row["labels"] for row in rows} == {"{}"}
    network = svfap_dist.load(run)
    for number, name in enumerate(NAMES):
        found = np.array([row["features"] for row in rows[3 * number : 3 * number + 3]], np.float32)
        expected = svfap_dist.extract(network, folder / f"{name}.mp4")
        np.testing.assert_allclose(found, expected, atol=1e-5)
    files = sorted((tmp_path / "out").iterdir())
    assert [parquet.ParquetFile(file).num_row_groups for file in files] == [1, 1, 1]
    metadata = [parquet.read_schema(file).metadata[b"svfap.rejected"] for file in files]
    assert [len(json.loads(rejected)) for rejected in metadata] == [0, 0, 1]


def test_pooled_rows_are_means(folder, run, tmp_path):
    extract(run, str(folder / "a.mp4"), "-o", str(tmp_path / "out"), "--pooled")
    (row,) = rows_of(tmp_path / "out")
    assert (row["start_seconds"], row["end_seconds"], row["clips"]) == (0.0, 20 / 25, 3)
    clips = svfap_dist.extract(svfap_dist.load(run), folder / "a.mp4")
    np.testing.assert_allclose(row["features"], clips.mean(0), atol=1e-5)


def test_a_shard_is_a_part_and_a_list_names_files(folder, run, tmp_path):
    shards = str(tmp_path / "shards")
    sharding.shard("folder", str(folder), shards, min_frames=7, workers=1, max_samples_per_shard=2)
    (tmp_path / "list.txt").write_text(f"# two\n{folder / 'a.mp4'}\n\nb.mp4\n")
    shutil.copy(folder / "b.mp4", tmp_path / "b.mp4")
    parts = plan_parts([str(tmp_path / "list.txt"), shards])
    assert [part.num_videos for part in parts] == [2, 2, 1, 2]
    assert parts[-1].files == (str(folder / "a.mp4"), str(tmp_path / "b.mp4"))
    extract(run, shards, str(tmp_path / "list.txt"), "-o", str(tmp_path / "out"))
    rows = rows_of(tmp_path / "out")
    keys = [str(folder / "a.mp4"), str(tmp_path / "b.mp4")]
    assert sorted({row["key"] for row in rows}) == sorted([*NAMES, *keys])
    by_key = {row["key"]: row["features"] for row in rows if row["start"] == 8}
    np.testing.assert_allclose(by_key["a"], by_key[keys[0]], atol=1e-5)
    with pytest.raises(ConfigError, match="given twice"):
        plan_parts([keys[0], str(tmp_path / "list.txt")])
    with pytest.raises(ConfigError, match="given twice"):
        plan_parts([shards, shards])
    options = {"min_frames": 7, "workers": 1, "overwrite": True}
    sharding.shard("folder", str(folder), shards, max_samples_per_shard=3, **options)
    parts_module._reader.cache_clear()
    with pytest.raises(ShardError, match="have changed"):
        parts[0].sources()


# Kills itself as the N-th file is about to appear: its temporary file is there, the file is not.
_KILLED = """
import os, signal, sys
from svfap_dist.cli import main
from svfap_dist.inference import parts
replace, left = os.replace, [int(sys.argv.pop(1))]
def replace_or_die(source, target):
    left[0] -= target.endswith(".parquet")
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = replace_or_die
parts.FILES_PER_PART = 2
main()
"""


def test_killed_and_resumed_gives_the_undisturbed_rows(folder, run, tmp_path, two_files_per_part):
    words = ["extract", run, str(folder), "--format", "parquet", "--threads=1", "-o"]
    command = [sys.executable, "-c", _KILLED, "2", *words, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert len([name for name in names if name.endswith(".parquet")]) == 1
    assert [name for name in names if name.endswith(".tmp")]
    said = extract(run, str(folder), "--threads=1", "-o", str(tmp_path / "out"))
    assert (said["parts"], said["parts_done_before"]) == (3, 1)
    assert (said["videos"], said["clips"]) == (5, 15)
    assert (said["new_videos"], said["new_clips"]) == (3, 9)
    extract(run, str(folder), "--threads=1", "-o", str(tmp_path / "undisturbed"))
    found, expected = (
        sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir())
        for name in ("out", "undisturbed")
    )
    assert found == expected
    again = extract(run, str(folder), "--threads=1", "-o", str(tmp_path / "out"))
    assert (again["parts_done_before"], again["new_videos"], again["clips_per_second"]) == (3, 0, 0)
    assert (again["videos"], again["clips"], again["rejected"]) == (5, 15, said["rejected"])
    assert said["rejected"][0][0] == str(folder / "junk.mp4")


def test_it_is_written_to_a_bucket(folder, run, tmp_path, s3_bucket):
    output = storage.join(s3_bucket, "features")
    extract(run, str(folder / "a.mp4"), str(folder / "b.mp4"), "-o", output)
    (name,) = storage.list_files(output)
    storage.download_file(storage.join(output, name), str(tmp_path / "part.parquet"))
    assert len(rows_of(tmp_path / "part.parquet")) == 6
    assert extract(run, *(str(folder / f"{n}.mp4") for n in "ab"), "-o", output)["new_videos"] == 0


def test_rows_name_their_set_and_files_their_network(folder, run, tmp_path):
    """Two sets of shards may have the same keys."""
    sets = [str(tmp_path / name) for name in ("one", "two")]
    for number, url in enumerate(sets):
        made = tmp_path / f"videos-{number}"
        make_video(made / "same.mp4", 20, size=(64, 64), seed=number)
        sharding.shard("folder", str(made), url, min_frames=7, workers=1)
    output = tmp_path / "out"
    extract(run, *sets, str(folder / "a.mp4"), "-o", str(output), "--step=5", "--pooled")
    found = [(row["source"], row["key"]) for row in rows_of(output)]
    assert found == [(sets[0], "same"), (sets[1], "same"), ("", str(folder / "a.mp4"))]
    for file in output.iterdir():
        metadata = parquet.read_schema(file).metadata
        options = json.loads(metadata[b"svfap.options"])
        assert options == {"step": 5, "pooled": True, "batch_size": 8}
        about = json.loads(metadata[b"svfap.network"])
        expected = svfap_dist.load(run).info
        assert about["provenance"]["step"] == expected.provenance["step"]
        assert about["preprocessing"]["sampling_rate"] == expected.sampling_rate
        assert "licence" in about
        assert run.encode() not in metadata[b"svfap.network"]


def test_a_mistyped_input_leaves_nothing_behind(folder, run, tmp_path):
    output = str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"Video not found.*typo\.mp4"):
        extract(run, str(folder / "typo.mp4"), "-o", output)
    assert not (tmp_path / "out").exists()
    for _ in range(2):  # the second time there is a part without a video
        with pytest.raises(DecodeError, match=r"junk\.mp4. Found: unreadable"):
            extract(run, str(folder / "junk.mp4"), "-o", output)
    assert extract(run, str(folder / "a.mp4"), "-o", output)["videos"] == 1
    assert {row["key"] for row in rows_of(output)} == {str(folder / "a.mp4")}
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_videos_that_appear_or_get_complete_are_done(folder, run, tmp_path, two_files_per_part):
    videos, output = tmp_path / "videos", str(tmp_path / "out")
    videos.mkdir()
    shutil.copy(folder / "a.mp4", videos)
    half = (folder / "c.mp4").read_bytes()[:-1000]
    (videos / "c.mp4").write_bytes(half)
    names = "".join(f"videos/{name}.mp4\n" for name in "abcd")
    (tmp_path / "list.txt").write_text(names)
    command = [run, str(tmp_path / "list.txt"), "-o", output]
    left_out = [str(videos / f"{name}.mp4") for name in "bcd"]
    said = extract(*command)
    assert [key for key, _ in said["rejected"]] == left_out
    assert said["videos"] == 1
    assert extract(*command)["parts_done_before"] == 2
    for name in "bc":
        shutil.copy(folder / f"{name}.mp4", videos)
    said = extract(*command)
    assert [key for key, _ in said["rejected"]] == left_out[2:]
    assert (said["parts_done_before"], said["videos"], said["new_videos"]) == (0, 3, 3)
    assert len({row["key"] for row in rows_of(output)}) == 3
    assert extract(*command)["parts_done_before"] == 2
    said = extract(*command, "--retry-rejected")
    assert (said["parts_done_before"], said["videos"], said["new_videos"]) == (1, 3, 1)
    make_video(videos / "a.mp4", 25, size=(64, 64), seed=9)
    with pytest.raises(ConfigError, match=r"has changed.*a\.mp4. Found: \d+ bytes, \d+ before"):
        extract(*command)


def test_a_file_of_something_else_with_the_name_of_a_part_is_an_error(folder, run, tmp_path):
    command = [run, str(folder / "a.mp4"), "-o", str(tmp_path / "out")]
    extract(*command)
    (file,) = (tmp_path / "out").iterdir()
    for content in (b"", b"x", file.read_bytes()[:-9] + bytes(9)):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="Not a file of this extraction"):
            extract(*command)


def test_a_long_footer_is_read_whole(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(part_files, "_TAIL_BYTES", 8)
    command = [run, str(folder / "a.mp4"), "-o", str(tmp_path / "out")]
    extract(*command)
    assert (extract(*command)["videos"], extract(*command)["clips"]) == (1, 3)


def test_mistakes_are_errors(folder, run, tmp_path):
    output, video = str(tmp_path / "out"), str(folder / "a.mp4")
    extract(run, video, "-o", output)
    for other in ([str(folder / "b.mp4")], [video, "--step", "3"], [video, "--pooled"]):
        with pytest.raises(ConfigError, match="something else"):
            extract(run, *other, "-o", output)
    with pytest.raises(DecodeError, match="unreadable"):
        extract(run, str(folder / "junk.mp4"), "-o", str(tmp_path / "none"))
    for words, found in (
        (["--pooled"], "--pooled"),
        (["--retry-rejected"], "--retry-rejected"),
        (["--ray", "local", "--format", "npz"], "--ray"),
        (["--format", "csv"], "csv"),
    ):
        with pytest.raises(ConfigError, match=found):
            raise CliRunner().invoke(app, ["extract", run, video, "-o", "x", *words]).exception
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="Empty list"):
        extract(run, str(tmp_path / "list.txt"), "-o", output)
