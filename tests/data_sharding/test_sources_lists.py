"""Lists of the labeled sets: contradictions, other forms, and pickles that must not run."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from layouts import FIRST_IMPRESSIONS, TRAITS, put, videos

from svfap_dist.errors import ShardError

TEST_1 = "EmoLabel_DataSplit/test(single-labeled)/set_1.csv"
TRAIN_1 = "EmoLabel_DataSplit/train(single-labeled)/set_1.csv"
MAFW_1 = "Train & Test Set/single/no_caption/set_1/"
FERV = "4_setups/All_scenes/"
DAISEE = "Labels/TestLabels.csv"
CELEBV = "celebvhq_info.json"
AFEW = "01/002/002.json"


@pytest.mark.parametrize(
    ("name", "path", "change", "message"),
    [
        ("dfew", TRAIN_1, ("2,2", "1,1\r\n2,2"), "1 samples in both train and test.* 1.*00001"),
        ("dfew", TEST_1, ("1,1", "1,1\r\n2,2"), "1 samples in both train and test of fold 1"),
        ("dfew", TEST_1, ("1,1\r\n", ""), "1 samples absent from fold 1, such as 00001"),
        ("dfew", TEST_1, ("1,1", "1,3"), "1 samples with two labels, such as 00001"),
        ("mafw", MAFW_1 + "train.txt", ("00002.mp4 disgust\n", ""), "absent from fold 1.*00002"),
        ("ferv39k", FERV + "test_All.csv", ("Action/Happy/0002", "Action/Happy/0001"),
         "1 samples in test and in another split, such as Action/Happy/0001"),
        ("daisee", DAISEE, ("5000441002", "1100011002"),
         "1 samples with two labels, such as 1100011002"),
        ("daisee", DAISEE, ("5000441002.avi,3,2,1,0", "1100011002.avi,0,2,0,1"),
         "1 samples in test and in another split, such as 1100011002"),
    ],
)  # fmt: skip
def test_lists_that_contradict_each_other(
    name: str, path: str, change: tuple[str, str], message: str, copy_of
) -> None:
    root = copy_of(name)
    old = (root / path).read_bytes().decode()
    assert change[0] in old
    put(root / path, old.replace(*change, 1))
    with pytest.raises(ShardError, match=f"contradict each other.*{message}"):
        videos(name, root)


def test_a_sample_tested_twice_or_never(copy_of) -> None:
    root = copy_of("dfew")
    texts = {}
    for part in ("test", "train"):
        path = root / f"EmoLabel_DataSplit/{part}(single-labeled)/set_1.csv"
        texts[part] = (path, path.read_bytes().decode())
    path, text = texts["test"]
    put(path, text + "2,2\r\n")
    put(texts["train"][0], texts["train"][1].replace("2,2\r\n", "", 1))
    with pytest.raises(ShardError, match=r"1 samples tested in fold 2 and in another.*00002"):
        videos("dfew", root)
    put(path, text.replace("1,1\r\n", "", 1))
    put(texts["train"][0], texts["train"][1] + "1,1\r\n")
    with pytest.raises(ShardError, match="1 samples tested in no fold, such as 00001"):
        videos("dfew", root)


@pytest.mark.parametrize(
    ("name", "path", "change", "message"),
    [
        ("dfew", TEST_1, ("video_name,label", "name,label"), "the row .'name', 'label'"),
        ("dfew", TEST_1, ("1,1", "1,8"), "the row .'1', '8'"),
        ("dfew", TEST_1, ("1,1", "1,1,1"), "3 columns in the row '1,1,1'"),
        ("mafw", MAFW_1 + "test.txt", ("anger", "joy"), "the row .'00001.mp4', 'joy'"),
        ("ferv39k", FERV + "train_All.csv", ("0001 Angry", "0001 4"), "the row .*'4'"),
        ("werewolfxl", "labels.csv", ("Arousal_average", "A"), "no column Arousal_average among"),
        ("werewolfxl", "labels.csv", (",1.25,", ",,"), "the row 01_01_101"),
        ("werewolfxl", "labels.csv", (",1.25,", ",nan,"), "the row 01_01_101"),
        ("avcaffe", "ground_truths/mental_demand.txt", ("10", "inf"), "inf is no number"),
        ("dfew", TEST_1, ("1,1", "1," + "1" * 200_000), "field larger than"),
        ("werewolfxl", "labels.csv", ("01_01_101", "31_01_101"), "the row 31_01_101"),
        ("avcaffe", "ground_truths/arousal.txt", ("Excited", "Thrilled"), "Thrilled|not in tuple"),
        ("avcaffe", "info/val.txt", ("aiim001", "person 1"), "the row person 1"),
        ("avcaffe", "info/val.txt", ("aiim001", "aiim003"), "1 samples in val and in another"),
        ("daisee", DAISEE, ("Engagement,", "Attention,"), "no column Engagement among ClipID"),
        ("daisee", DAISEE, ("002.avi,3,2,1,0", "002.avi,4,2,1,0"), "the row .*,4,2,1,0"),
        ("daisee", DAISEE, ("002.avi,3,2,1,0", "002.avi,3"), "the row 5000441002.avi,3"),
        ("daisee", DAISEE, ("5000441002.avi", "clip.avi"), "the row clip.avi,3,2,1,0"),
        ("celebvhq", CELEBV, ('"action": [0, 0, 1]', '"action": [0, 0]'), "shorter than"),
        ("celebvhq", CELEBV, ('"action": [0, 0, 1]', '"action": [0, 0, 2]'), "action has 2"),
        ("celebvhq", CELEBV, ('"ytb_id": "id-0"', '"ytb_id": 0'), "ytb_id is 0"),
        ("celebvhq", CELEBV, ('"clips"', '"clip"'), "Not the layout of celebvhq.*KeyError"),
        ("afewva", AFEW, ('"valence": -3', '"valence": -33'), "a mean rating of -18"),
        (
            "afewva",
            AFEW,
            ('"valence": -3', '"valence": "low"'),
            "Not the layout of afewva.*TypeErr",
        ),
        ("afewva", AFEW, ('"actor": "Actor 2"', '"actor": ""'), "actor is ''"),
        ("afewva", AFEW, ('"frames"', '"frame"'), "Not the layout of afewva.*002.json.*KeyError"),
        ("celebvhq", CELEBV, ("{", "["), "Not the layout of celebvhq.*JSONDecodeError"),
    ],
)
def test_lists_of_another_form(
    name: str, path: str, change: tuple[str, str], message: str, copy_of
) -> None:
    root = copy_of(name)
    old = (root / path).read_bytes().decode()
    assert change[0] in old
    put(root / path, old.replace(*change, 1))
    with pytest.raises(ShardError, match=message):
        videos(name, root)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("dfew", TEST_1),
        ("avcaffe", "info/val.txt"),
        ("werewolfxl", "labels.csv"),
        ("celebvhq", CELEBV),
    ],
)
def test_a_missing_list_is_named(name: str, path: str, copy_of) -> None:
    root = copy_of(name)
    (root / path).unlink()
    with pytest.raises(ShardError, match=f"Not the layout.*{re.escape(path)}.*no such file"):
        videos(name, root)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("utf-16", "it is UTF-16"), ("latin-1", r"line 1 has the byte 0xe9.*'é' in Latin-1")],
)
def test_a_list_of_another_encoding_is_named(encoding: str, message: str, copy_of) -> None:
    root = copy_of("werewolfxl")
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").write_bytes(text.replace("Session", "Séance").encode(encoding))
    with pytest.raises(ShardError, match=rf"not UTF-8.*{message}.*save the file as UTF-8"):
        videos("werewolfxl", root)
    (root / "labels.csv").write_bytes(text.encode("utf-8-sig"))
    assert len(videos("werewolfxl", root)) == 60


class Opens:
    """A pickle of this opens a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_cannot_run_code(copy_of, tmp_path: Path) -> None:
    root, path = copy_of("firstimpressions"), "annotations/annotation_training.pkl"
    put(root / path, pickle.dumps({"openness": Opens(tmp_path / "opened")}))
    with pytest.raises(ShardError, match=r"cannot be trusted.*training\.pkl.*loads .*open"):
        videos("firstimpressions", root)
    assert not (tmp_path / "opened").exists()
    put(root / path, b"\x80\x02}q")
    with pytest.raises(ShardError, match="cannot be trusted or read"):
        videos("firstimpressions", root)


def test_pickles_of_numpy_numbers_and_of_python_2(copy_of) -> None:
    root, path = copy_of("firstimpressions"), "annotations/annotation_training.pkl"
    names = [file.rsplit("/")[-1] for file in FIRST_IMPRESSIONS["training"]]
    rated = {trait: {name: np.float64(0.25) for name in names} for trait in TRAITS}
    put(root / path, pickle.dumps(rated, protocol=2))
    assert videos("firstimpressions", root)[0].labels["values"]["openness"] == 0.25
    # Python 2 wrote strings as bytes: opcode U, with a length of one byte.
    text = "(dp0\n" + "".join(
        f"S'{trait}'\n(d" + "".join(f"S'{name}'\nF0.5\ns" for name in names) + "s"
        for trait in TRAITS
    )
    put(root / path, text + ".")
    assert videos("firstimpressions", root)[0].labels["values"]["openness"] == 0.5


@pytest.mark.parametrize(
    "change", [lambda r: r.pop("openness"), lambda r: r["openness"].popitem(),
               lambda r: r["openness"].update({"a-b.001.mp4": 1.5}), lambda r: r.update(openness=1)]
)  # fmt: skip
def test_pickles_of_another_form(change, copy_of) -> None:
    root, path = copy_of("firstimpressions"), "annotations/annotation_training.pkl"
    rated = pickle.loads((root / path).read_bytes())
    change(rated)
    put(root / path, pickle.dumps(rated))
    with pytest.raises(ShardError, match=r"Not the layout of firstimpressions.*(openness|keys)"):
        videos("firstimpressions", root)
