"""The labeled sets, each laid out small: labels, folds, order, and other layouts."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any, Self

import pytest
from layouts import COUNTS, LAYOUTS, TRAITS, misfits, put, videos

from svfap_dist.errors import ConfigError, ShardError

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
    "daisee": {
        "1100011002": {
            "classes": {"boredom": 0, "engagement": 2, "confusion": 0, "frustration": 1},
            "class_names": {
                "boredom": "very low", "engagement": "high",
                "confusion": "very low", "frustration": "low",
            },
            "subject": "110001", "split": "train",
        },
        "4000221001": {
            "classes": {"boredom": 0, "engagement": 3, "confusion": 1, "frustration": 0},
            "class_names": {
                "boredom": "very low", "engagement": "very high",
                "confusion": "low", "frustration": "very low",
            },
            "subject": "400022", "split": "val",
        },
    },
    "celebvhq": {
        "id-0_1": {
            "classes": {"blurry": 0, "male": 1, "smile": 1, "nod": 0, "talk": 1},
            "subject": "id-0",
        },
    },
    "afewva": {
        "001": {"values": {"valence": -0.4, "arousal": 0.05}, "subject": "Actor 1"},
        "010": {"values": {"valence": 0.5, "arousal": 0.05}, "subject": "Actor 0"},
    },
    "mead": {
        "M003/angry/level_1/001": {"class": 0, "class_name": "angry", "subject": "M003"},
        "W013/surprised/level_1/001": {"class": 7, "class_name": "surprised", "subject": "W013"},
    },
    "firstimpressions": {
        "a-b_001": {"values": {t: 0.1 * i for i, t in enumerate(TRAITS)}, "split": "train"},
        "e_003": {"values": {t: 0.1 * i for i, t in enumerate(TRAITS)}, "split": "val"},
        "f_004": {"values": {t: 0.1 * i for i, t in enumerate(TRAITS)}, "split": "test"},
    },
}  # fmt: skip


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
    assert {("fold" in row) + ("split" in row) for row in rows} == {None not in COUNTS[name]}
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
    files = [at] if at.is_file() else [each for each in at.iterdir() if each.suffix != ".json"]
    assert first.num_bytes == sum(file.stat().st_size for file in files)
    assert copy.suffix in ("mp4", "avi", "flv")


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_is_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path / "some/video.mp4", b"")
    with pytest.raises(ShardError, match=f"Not the layout of {name}.*docs/datasets.md"):
        videos(name, tmp_path)
    with pytest.raises(ConfigError, match="No such folder"):
        videos(name, tmp_path / "none")
