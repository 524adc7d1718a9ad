"""Which videos the sources find, in which order and under which keys."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from clips import make_video

from data_sharding import sources
from data_sharding.pipeline import shard
from data_sharding.sources import folder, voxceleb2
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError, StorageError


def put(root: Path, *paths: str) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return str(root)


def test_folder_takes_every_video_below_it_in_order_of_path(tmp_path: Path) -> None:
    root = put(tmp_path, "b/x.MP4", "a.mkv", "c/d/e.webm", "z.avi", "notes.txt", "._a.mp4", "f.m4v")
    found = list(folder.samples(root))
    assert [video.key for video in found] == ["a", "b/x", "c/d/e", "f", "z"]
    assert [video.suffix for video in found] == ["mkv", "mp4", "webm", "m4v", "avi"]
    assert [video.read() for video in found][1] == b"b/x.MP4"
    assert [video.where for video in found] == [video.where for video in folder.samples(root)]
    assert {video.stamp for video in found[:2]} == {"5", "7"}


def test_samples_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    (video,) = folder.samples(put(tmp_path, "a.mp4"))
    assert pickle.loads(pickle.dumps(video)).read() == b"a.mp4"


def test_keys_fit_webdataset_and_stay_unique(tmp_path: Path) -> None:
    root = put(tmp_path, "v1.0/a.b.mp4", "v1.0/a_b.mov", "v1.0/a_b.mp4", "new\nline.mp4")
    keys = [video.key for video in folder.samples(root)]
    assert keys[:2] == ["new_line", "v1_0/a_b"]
    assert len(set(keys)) == 4
    assert all(key.startswith("v1_0/a_b") for key in keys[1:])
    assert not any("." in key for key in keys)


@pytest.mark.parametrize("prefix", ["", "dev/mp4/", "vox2/test/mp4/"])
def test_voxceleb2_labels_the_identity(tmp_path: Path, prefix: str) -> None:
    clips = [f"{prefix}id00012/a.B-c/00002.mp4", f"{prefix}id00012/a.B-c/00001.mp4"]
    others = [f"{prefix}id00012/a.B-c/extra.mp4", "meta.mp4", "vox2_meta.csv"]
    found = list(voxceleb2.samples(put(tmp_path, *clips, *others)))
    good = [video for video in found if not video.misfit]
    assert [v.key for v in good] == ["id00012/a_B-c/00001", "id00012/a_B-c/00002"]
    assert [v.labels for v in good] == [{"identity": "id00012"}] * 2
    assert sorted(os.path.basename(v.where) for v in found if v.misfit) == ["extra.mp4", "meta.mp4"]


def test_videos_outside_the_layout_are_listed_and_left_out(tmp_path: Path) -> None:
    root = put(tmp_path / "in", "id00012/a/00001.mp4", "id000012/a/00001.mp4")
    make_video(str(tmp_path / "in/id00012/a/00001.mp4"), 4)
    summary = shard("voxceleb2", root, str(tmp_path / "out"), min_frames=2, workers=0)
    assert (summary.num_samples, summary.rejected) == (1, {"misplaced": 1})


def test_another_layout_is_not_taken_for_voxceleb2(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"Not the layout.*such as id1/a\.mp4.*idNNNNN/<video>"):
        voxceleb2.samples(put(tmp_path, "id1/a.mp4"))


@pytest.mark.parametrize("source", [folder, voxceleb2])
def test_no_videos_is_an_error_that_says_what_is_there(tmp_path: Path, source) -> None:
    with pytest.raises(ShardError, match=r"No videos found.*Found: no files"):
        source.samples(str(tmp_path))
    with pytest.raises(ShardError, match=r"1 files, none of them a video"):
        source.samples(put(tmp_path, "a.txt"))
    with pytest.raises(ConfigError, match=r"No such folder.*Found: a file"):
        source.samples(str(tmp_path / "a.txt"))
    with pytest.raises(ConfigError, match=r"No such folder.*Found: nothing there"):
        source.samples(str(tmp_path / "none"))


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch) -> None:
    root = put(tmp_path, "a.mp4", "locked/b.mp4")
    scandir = os.scandir

    def guarded(path):  # root may read everything, so the operating system's answer is played
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", guarded)
    with pytest.raises(StorageError, match=r"access denied.*locked"):
        folder.samples(root)


def test_sources_read_from_s3(s3_bucket: str) -> None:
    storage.write_bytes(f"{s3_bucket}/in/id00001/v/00001.mp4", b"hello")
    (video,) = voxceleb2.samples(f"{s3_bucket}/in")
    assert (video.key, video.read()) == ("id00001/v/00001", b"hello")
    with pytest.raises(ShardError, match="No videos found"):
        folder.samples(f"{s3_bucket}/other")


def test_empty_folder_names_in_a_store_make_other_files(s3_bucket: str) -> None:
    for name in ("x", "/x", "a//y", "/z"):
        storage.write_bytes(f"{s3_bucket}/dd/{name}.mp4", name.encode())
    found = list(folder.samples(f"{s3_bucket}/dd"))
    assert [sample.read() for sample in found] == [b"/x", b"/z", b"a//y", b"x"]
    keys = [sample.key for sample in found]
    assert keys[:3] == ["x", "z", "a/y"]
    assert keys[3].startswith("x-")
    (below,) = (sample for sample in folder.samples(f"{s3_bucket}/dd//") if sample.key == "x")
    assert below.read() == b"/x"


TOY_SOURCE = '''
"""A source of one module and one row: every `.clip` file of a folder, numbered."""
import os
from functools import partial
from data_sharding.sources import SourceVideo
from svfap_dist import storage

def samples(folder):
    for number, name in enumerate(sorted(os.listdir(folder))):
        where = os.path.join(folder, name)
        yield SourceVideo(f"toy/{number}", partial(storage.read_bytes, where), {"n": number}, where)
'''


def test_a_source_is_a_module_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_source.py").write_text(TOY_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    row = sources.Source("toy", False, "*.clip", "numbered clips", module="toy_source")
    monkeypatch.setitem(sources.SOURCES, "toy", row)
    for number in range(3):
        make_video(tmp_path / "videos" / f"{number}.mp4", 61, seed=number)
    summary = shard("toy", str(tmp_path / "videos"), str(tmp_path / "out"), workers=0)
    assert summary.num_samples == 3
    with pytest.raises(ConfigError, match=r"Unknown source.*toys.*voxceleb2"):
        sources.find_source("toys")


def test_the_documentation_lists_every_source() -> None:
    text = (Path(__file__).parents[2] / "docs/datasets.md").read_text()
    table = text.partition("| source |")[2].partition("\n\n")[0]
    names = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(names) == sorted(sources.SOURCES)
