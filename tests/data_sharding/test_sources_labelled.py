"""The nine labelled sets, each laid out small: labels, folds, strays, and other layouts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Self

import pytest
from layouts import LAYOUTS, TRAITS, picture, put, video, videos

from data_sharding import sources
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError


def misfits(name: str, root: Path) -> dict[str, str]:
    return {video.key: video.misfit for video in videos(name, root) if video.misfit}


BY_HAND: dict[str, dict[str, dict[str, Any]]] = {
    "dfew": {
        "00001": {"class": 0, "class_name": "happy", "fold": 1},
        "00004": {"class": 3, "class_name": "angry", "fold": 4},
        "00020": {"class": 5, "class_name": "disgust", "fold": 5},
    },
    "mafw": {
        "00001": {"class": 0, "class_name": "anger", "fold": 1},
        "00011": {"class": 10, "class_name": "disappointment", "fold": 1},
        "00015": {"class": 3, "class_name": "happiness", "fold": 5},
    },
    "ferv39k": {
        "Action/Angry/0001": {"class": 3, "class_name": "angry", "split": "train"},
        "Action/Happy/0002": {"class": 0, "class_name": "happy", "split": "test"},
        "Crime/Disgust/0003": {"class": 5, "class_name": "disgust", "split": "test"},
    },
    "cremad": {
        "1018_DFA_ANG_XX": {"class": 0, "class_name": "anger", "subject": "1018", "fold": 1},
        "1019_DFA_NEU_XX": {"class": 4, "class_name": "neutral", "subject": "1019", "fold": 2},
        "1001_IEO_SAD_HI": {"class": 5, "class_name": "sad", "subject": "1001", "fold": 1},
        "1091_DFA_ANG_XX": {"class": 0, "class_name": "anger", "subject": "1091", "fold": 5},
    },
    "ravdess": {
        "01-02-01-01-01-04": {"class": 1, "class_name": "calm", "subject": "04", "fold": 1},
        "01-08-01-01-01-05": {"class": 7, "class_name": "surprised", "subject": "05", "fold": 2},
        "01-05-01-01-01-24": {"class": 4, "class_name": "angry", "subject": "24", "fold": 6},
    },
    "enterface05": {
        "subject_1/anger/sentence_1/s1_an_1": {
            "class": 0, "class_name": "anger", "subject": "1", "fold": 1,
        },
        "subject_3/fear/sentence_1/s_3_fe_1": {
            "class": 2, "class_name": "fear", "subject": "3", "fold": 1,
        },
        "subject_10/surprise/sentence_1/s10_su_1": {
            "class": 5, "class_name": "surprise", "subject": "10", "fold": 1,
        },
        "subject_11/sadness/sentence_1/s11_sa_1": {
            "class": 4, "class_name": "sadness", "subject": "11", "fold": 2,
        },
        "subject_23/happiness/s23_ha_1": {
            "class": 3, "class_name": "happiness", "subject": "23", "fold": 3,
        },
        "subject_38/disgust/sentence_1/s38_di_1": {
            "class": 1, "class_name": "disgust", "subject": "38", "fold": 5,
        },
    },
    "werewolfxl": {
        "06_09_109": {
            "values": {"valence": 0.06, "arousal": 1.25, "dominance": -0.5},
            "subject": "06_09", "fold": 1,
        },
        "30_01_101": {
            "values": {"valence": 0.3, "arousal": 1.25, "dominance": -0.5},
            "subject": "30_01", "fold": 5,
        },
    },
    "avcaffe": {
        "aiim001/task_1/aiim001_task_1_clip_1": {
            "classes": {"arousal": 0, "valence": 4, "mental_demand": 0},
            "class_names": {"arousal": "Excited", "valence": "Unpleasant", "mental_demand": "low"},
            "subject": "aiim001", "split": "val",
        },
        "aiim005/task_2/aiim005_task_2_clip_2": {
            "classes": {"arousal": 3, "valence": 2, "mental_demand": 1},
            "class_names": {"arousal": "Dull", "valence": "Neutral", "mental_demand": "high"},
            "subject": "aiim005", "split": "train",
        },
    },
    "firstimpressions": {
        "a-b_001": {"values": {t: 0.1 * i for i, t in enumerate(TRAITS)}, "split": "train"},
        "e_003": {"values": {t: 0.1 * i for i, t in enumerate(TRAITS)}, "split": "val"},
        "f_004": {"values": {t: 0.1 * i for i, t in enumerate(TRAITS)}, "split": "test"},
    },
}  # fmt: skip
COUNTS: dict[str, dict[int | str, int]] = {  # samples of the small layouts by fold or split
    "dfew": {1: 4, 2: 4, 3: 4, 4: 4, 5: 4},
    "mafw": {1: 5, 2: 5, 3: 4, 4: 4, 5: 4},
    "ferv39k": {"train": 3, "test": 2},
    "cremad": {1: 37, 2: 36, 3: 36, 4: 36, 5: 38},
    "ravdess": dict.fromkeys(range(1, 7), 32),
    "enterface05": {1: 54, 2: 54, 3: 54, 4: 54, 5: 42},
    "werewolfxl": dict.fromkeys(range(1, 6), 12),
    "avcaffe": {"train": 12, "val": 8},
    "firstimpressions": {"train": 2, "val": 1, "test": 1},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_by_name(name: str, roots: dict[str, Path]) -> None:
    found = {video.key: video for video in videos(name, roots[name])}
    for key, labels in BY_HAND[name].items():
        assert found[key].labels == {"set": name} | labels
        assert json.loads(json.dumps(found[key].labels)) == found[key].labels
    assert not misfits(name, roots[name])


@pytest.mark.parametrize("name", LAYOUTS)
def test_folds_and_splits(name: str, roots: dict[str, Path]) -> None:
    rows = [video.labels for video in videos(name, roots[name])]
    assert Counter(row.get("fold", row.get("split")) for row in rows) == COUNTS[name]
    assert all(("fold" in row) != ("split" in row) for row in rows)
    parts_of: dict[str, set[Any]] = {}
    for row in rows:
        if "subject" in row:
            parts_of.setdefault(row["subject"], set()).add(row.get("fold", row.get("split")))
    assert all(len(parts) == 1 for parts in parts_of.values())


def test_subjects_per_fold(roots: dict[str, Path]) -> None:
    expected = {"cremad": [18, 18, 18, 18, 19], "ravdess": [4] * 6, "enterface05": [9, 9, 9, 9, 7]}
    for name, counts in expected.items():
        pairs = {(v.labels["subject"], v.labels["fold"]) for v in videos(name, roots[name])}
        found = Counter(fold for _, fold in pairs)
        assert [found[fold] for fold in sorted(found)] == counts


@pytest.mark.parametrize("name", LAYOUTS)
def test_order_and_stamps_do_not_depend_on_the_listing(
    name: str, roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [(v.key, v.stamp, v.labels) for v in videos(name, roots[name])]
    scandir = os.scandir

    class Backwards(list[os.DirEntry]):
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                super().__init__(sorted(entries, key=lambda entry: entry.name, reverse=True))

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.clear()

    monkeypatch.setattr("os.scandir", Backwards)
    assert [(v.key, v.stamp, v.labels) for v in videos(name, roots[name])] == before
    keys = [key for key, _, _ in before]
    assert len(set(keys)) == len(keys)
    assert all(stamp for _, stamp, _ in before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_media_can_be_read_by_other_processes(name: str, roots: dict[str, Path]) -> None:
    first = videos(name, roots[name])[0]
    copy = pickle.loads(pickle.dumps(first))
    assert copy.read() == first.read()
    at = Path(first.where)
    files = [at] if at.is_file() else list(at.iterdir())
    assert first.num_bytes == sum(file.stat().st_size for file in files)
    assert copy.suffix in ("mp4", "avi", "flv")


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_is_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path / "some/video.mp4", b"")
    with pytest.raises(ShardError, match=f"Not the layout of {name}.*docs/datasets.md"):
        videos(name, tmp_path)
    with pytest.raises(ConfigError, match="No such folder"):
        videos(name, tmp_path / "none")


# What each set may have too much of, and the word that says why it is left out.
STRAYS = {
    "avcaffe": ("videos/shorter_segments/aiim009/task_1/x.avi", "in none of the set's lists"),
    "cremad": ("VideoFlash/1076_MTI_NEU_XX.flv", "known to be broken"),
    "dfew": ("Clip/clip_224x224/00099/1.jpg", "in none of the set's lists"),
    "enterface05": ("subject 6/anger/sentence 1/s6_an_1.avi", "person 6 is in no fold"),
    "ferv39k": ("2_ClipsforFaceCrop/Action/Sad/0009/1.jpg", "in none of the set's lists"),
    "firstimpressions": ("train-1/training80_02/z.009.mp4", "in none of the set's lists"),
    "mafw": ("data/frames/00099/1.png", "in none of the set's lists"),
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
        ("firstimpressions", "test-1", "f_004"),
    ],
)
def test_what_is_labelled_but_not_there_is_listed(name: str, path: str, key: str, copy_of) -> None:
    root = copy_of(name)
    shutil.rmtree(root / path)
    assert misfits(name, root)[key] == "labelled, but not there"


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("cremad", "VideoMP4/1001_DFA_ANG_XX.mp4", "the same sample as VideoFlash/1001_DFA_ANG"),
        ("cremad", "VideoFlash/1092_DFA_ANG_XX.flv", "actor 1092 is in no fold"),
        ("cremad", "VideoFlash/1001_DFA_BAD_XX.flv", "not named VideoFlash/"),
        ("ravdess", "Actor_01/01-01-01-01-01-01-01.mp4", "the same sample as Actor_01/02-01-01"),
        ("ravdess", "Actor_25/02-01-01-01-01-01-25.mp4", "actor 25 is in no fold"),
        ("ravdess", "Actor_01/02-01-09-01-01-01-01.mp4", "not at Actor_NN/"),
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
    for clip in sources.load("folder").samples(str(roots[name])):
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
    assert first.labels == {"set": name} | BY_HAND[name]["00001"]
    assert {v.misfit for v in others} == {"labelled, but not there"}
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
