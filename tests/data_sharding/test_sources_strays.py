"""What labeled sets have too much of or too little, and the forms in which their clips come."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from layouts import COUNTS, LAYOUTS, misfits, picture, put, video, videos

from data_sharding import sources
from svfap_dist import storage

# What each set may have too much of, and the word that says why it is left out.
STRAYS = {
    "afewva": ("03/011/00000.png", "in none of the set's lists"),
    "avcaffe": ("videos/shorter_segments/aiim009/task_1/x.avi", "in none of the set's lists"),
    "celebvhq": ("more/id-9_0.mp4", "in none of the set's lists"),
    "cremad": ("VideoFlash/1076_MTI_NEU_XX.flv", "known to be broken"),
    "daisee": ("DataSet/Test/110001/1100019/1100019.avi", "in none of the set's lists"),
    "dfew": ("Clip/clip_224x224/00099/1.jpg", "in none of the set's lists"),
    "enterface05": ("subject 6/anger/sentence 1/s6_an_1.avi", "person 6 is in no fold"),
    "ferv39k": ("2_ClipsforFaceCrop/Action/Sad/0009/1.jpg", "in none of the set's lists"),
    "firstimpressions": ("train-1/training80_02/z.009.mp4", "in none of the set's lists"),
    "mafw": ("data/frames/00099/1.png", "in none of the set's lists"),
    "mead": ("M003/video/left_30/angry/level_1/001.mp4", "view left_30, not front"),
    "ravdess": ("Actor_01/02-02-01-01-01-01-01.mp4", "song, not speech"),
    "werewolfxl": ("clips/31/31_01_101.mp4", "in none of the set's lists"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_has_no_label_is_listed(name: str, copy_of) -> None:
    root = copy_of(name)
    path, reason = STRAYS[name]
    put(root / path, video())
    (found,) = (video for video in videos(name, root) if video.misfit)
    assert found.misfit == reason
    assert found.labels == {}
    assert path.startswith(str(Path(found.where).relative_to(root)))


@pytest.mark.parametrize(
    ("name", "path", "key"),
    [
        ("dfew", "Clip/clip_224x224/00007", "00007"),
        ("mafw", "data/frames/00022", "00022"),
        ("ferv39k", "2_ClipsforFaceCrop/Crime/Disgust/0003", "Crime/Disgust/0003"),
        ("werewolfxl", "clips/2", "02_01_101"),
        ("daisee", "DataSet/Train/110001/1100011003", "1100011003"),
        ("celebvhq", "35666/id-3_1.mp4", "id-3_1"),
        ("firstimpressions", "test-1", "f_004"),
    ],
)
def test_what_is_labeled_but_not_there_is_listed(name: str, path: str, key: str, copy_of) -> None:
    root = copy_of(name)
    (shutil.rmtree if (root / path).is_dir() else os.unlink)(root / path)
    assert misfits(name, root)[key] == "labeled, but not there"


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("cremad", "VideoMP4/1001_DFA_ANG_XX.mp4", "the same sample as VideoFlash/1001_DFA_ANG"),
        ("cremad", "VideoFlash/1092_DFA_ANG_XX.flv", "actor 1092 is in no fold"),
        ("cremad", "VideoFlash/1001_DFA_BAD_XX.flv", "not at VideoFlash/"),
        ("ravdess", "Actor_01/01-01-01-01-01-01-01.mp4", "the same sample as Actor_01/02-01-01"),
        ("ravdess", "Actor_25/02-01-01-01-01-01-25.mp4", "actor 25 is in no fold"),
        ("ravdess", "Actor_01/02-01-09-01-01-01-01.mp4", "not at Actor_NN/"),
        ("mead", "part/M003/video/front/angry/level_1/001.mp4", "the same sample as M003/video/"),
        ("mead", "M003/video/front/joy/level_1/001.mp4", "not at <person>/video/front/"),
        ("enterface05", "subject 1/joy/sentence 1/s1_jo_1.avi", "not at subject N/"),
        ("werewolfxl", "again/01_01_101.mp4", "in none of the set's lists"),
        ("firstimpressions", "again/e.003.mp4", "in none of the set's lists"),
    ],
)
def test_strays_of_other_kinds(name: str, path: str, reason: str, copy_of) -> None:
    root = copy_of(name)
    put(root / path, video())
    found = videos(name, root)
    assert [v.misfit.startswith(reason) for v in found if v.misfit] == [True]
    assert Counter(
        v.labels.get("fold", v.labels.get("split")) for v in found if not v.misfit
    ) == COUNTS[name]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["avcaffe", "cremad", "enterface05", "firstimpressions", "ravdess", "werewolfxl"]
)
def test_face_crops_have_the_labels_of_their_videos(
    name: str, roots: dict[str, Path], tmp_path: Path
) -> None:
    for clip in sources.find_source("folder").samples(str(roots[name])):
        put(tmp_path / f"{clip.key}.mp4", video())  # where `svfap faces` writes its crop
    for lists in ("info", "ground_truths", "annotations", "labels.csv"):
        if (roots[name] / lists).exists():
            (tmp_path / lists).symlink_to(roots[name] / lists)
    expected = {clip.key: clip.labels for clip in videos(name, roots[name])}
    crops = videos(name, tmp_path)
    assert not [clip.misfit for clip in crops if clip.misfit]
    assert {clip.key: clip.labels for clip in crops} == expected


def test_ravdess_with_sound_only_is_taken(copy_of) -> None:
    root = copy_of("ravdess")
    for path in root.glob("Actor_*/02-*"):
        path.rename(path.with_name("01" + path.name[2:]))
    assert len(videos("ravdess", root)) == 24 * 8
    assert not misfits("ravdess", root)


@pytest.mark.parametrize(
    ("name", "frames", "clip"),
    [
        ("dfew", "Clip/clip_224x224", "Clip/original/1.mp4"),
        ("dfew", "Clip/clip_224x224", "Clip/clip_224x224_avi/00001.avi"),
        ("mafw", "data/frames", "data/clips/00001.mp4"),
    ],
)
def test_clips_are_taken_where_there_are_no_frames(
    name: str, frames: str, clip: str, copy_of
) -> None:
    root = copy_of(name)
    put(root / clip, video(clip[-3:]))
    assert videos(name, root)[0].where == str(root / frames / "00001")
    shutil.rmtree(root / frames)
    first, *others = videos(name, root)
    assert (first.key, first.suffix, first.where) == ("00001", clip[-3:], str(root / clip))
    assert (first.labels["set"], first.labels["class"], first.labels["fold"]) == (name, 0, 1)
    assert {v.misfit for v in others} == {"labeled, but not there"}
    put((root / clip).with_suffix(".webm"), video())  # the same clip again
    strays = [v for v in videos(name, root) if v.misfit == "in none of the set's lists"]
    assert [(v.suffix, v.labels) for v in strays] == [("webm", {})]


def test_stamps_of_frames_change_with_the_frames(copy_of) -> None:
    root = copy_of("dfew")
    folder = root / "Clip/clip_224x224/00002"
    stamps = [videos("dfew", root)[1].stamp]
    put(folder / "3.jpg", picture(3))
    stamps.append(videos("dfew", root)[1].stamp)
    put(folder / "3.jpg", picture(3) + b" ")
    stamps.append(videos("dfew", root)[1].stamp)
    (folder / "3.jpg").rename(folder / "4.jpg")
    stamps.append(videos("dfew", root)[1].stamp)
    assert len(set(stamps)) == 4
    put(folder / "._4.jpg", b"")
    put(folder / "notes.txt", b"")
    assert videos("dfew", root)[1].stamp == stamps[-1]


@pytest.mark.parametrize("name", ["dfew", "mafw", "firstimpressions"])
def test_a_bucket_is_as_good_as_a_folder(
    name: str, copy_of, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of(name)
    if name == "dfew":  # a store lists the folder within between the frames of the clip
        put(root / "Clip/clip_224x224/00002/more/1.jpg", picture(1))
        put(root / "Clip/clip_224x224/00002/z.jpg", picture(2))
    files = list(storage.list_files(str(root)))
    for path in files:
        storage.upload_file(str(root / path), f"{s3_bucket}/sets/{name}/{path}")
    fs, _ = storage.filesystem(s3_bucket)
    listings = []
    call = type(fs).call_s3

    def in_small_pages(self, method, **request):
        listings.append(request)
        return call(self, method, MaxKeys=7, **request)

    monkeypatch.setattr(type(fs), "call_s3", in_small_pages)
    found, local = videos(name, f"{s3_bucket}/sets/{name}"), videos(name, root)
    rows = [(v.key, v.labels, v.stamp, v.suffix, v.misfit) for v in local]
    assert [(v.key, v.labels, v.stamp, v.suffix, v.misfit) for v in found] == rows
    assert [v.read() for v in found[:2]] == [v.read() for v in local[:2]]
    # Once over the prefix, in pages of seven, and not once per clip.
    assert 1 <= len(listings) <= len([path for path in files if "Split" not in path]) // 7 + 1


def test_frames_below_an_empty_folder_name_are_no_others(copy_of, s3_bucket: str) -> None:
    root = copy_of("dfew")
    for path in storage.list_files(str(root)):
        storage.upload_file(str(root / path), f"{s3_bucket}/{path}")
    folder = f"{s3_bucket}/Clip/clip_224x224/"
    for number in range(1, 12):
        data = picture(number)
        storage.write_bytes(f"{folder}00002//{number}.jpg", data)
    found = {sample.where: sample for sample in videos("dfew", s3_bucket)}
    usual = {sample.key: sample for sample in videos("dfew", root)}
    assert found[f"{folder}00002"].read() == usual["00002"].read()
    stray = found[f"{folder}00002/"]
    assert stray.misfit == "in none of the set's lists"
    assert stray.read() != usual["00002"].read()
