"""Small copies of the labeled sets, laid out as their publications and split files describe.

Each function fills a folder with the parts of a set that its source looks at: tiny pictures or
videos, all alike where their content does not matter, and lists. What a clip is follows from its
number by rules simple enough to be checked by hand.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from clips import make_video, paint_frame
from PIL import Image

from data_sharding import sources
from data_sharding.sources import SourceVideo

DFEW_NUMBERS = range(1, 21)  # clip n: label (n - 1) % 7 + 1, tested in fold (n - 1) % 5 + 1
MAFW_NUMBERS = range(1, 23)  # clip n: emotion n of 11, tested in fold (n - 1) % 5 + 1
MAFW_EMOTIONS = ["anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise"]
MAFW_EMOTIONS += ["contempt", "anxiety", "helplessness", "disappointment"]
FERV39K = {  # clip: split
    "Action/Angry/0001": "train",
    "Action/Happy/0001": "train",
    "Scene22/Fear/0007": "train",
    "Action/Happy/0002": "test",
    "Crime/Disgust/0003": "test",
}
ENTERFACE_EMOTIONS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")
AVCAFFE_VAL = ("aiim001", "aiim002")
AVCAFFE_TRAIN = ("aiim003", "aiim004", "aiim005")
TRAITS = ("extraversion", "neuroticism", "agreeableness", "conscientiousness", "openness")
DAISEE = {  # clip: split as its list is named, levels
    "1100011002": ("Train", "0201"),
    "1100011003": ("Train", "1300"),
    "2000101001": ("Train", "0000"),
    "4000221001": ("Validation", "0310"),
    "5000441001": ("Test", "0102"),
    "5000441002": ("Test", "3210"),
}
MEAD_EMOTIONS = ("angry", "contempt", "disgusted", "fear", "happy", "neutral", "sad", "surprised")
MEAD_PERSONS = [*(f"M{n:03d}" for n in range(3, 8)), *(f"W{n:03d}" for n in range(9, 14))]
FIRST_IMPRESSIONS = {  # files of each annotation list
    "training": ("train-1/training80_01/a-b.001.mp4", "train-2/training80_40/c_d.002.mp4"),
    "validation": ("valid-1/validation80_01/e.003.mp4",),
    "test": ("test-1/test80_01/f.004.mp4",),
}


@functools.cache
def picture(number: int, size: tuple[int, int] = (32, 32), kind: str = "JPEG", **options) -> bytes:
    """A picture file with `number` painted in."""
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 16, (size[1], size[0], 3))
    Image.fromarray(paint_frame(number, size, noise)).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def video(container: str = "mp4") -> bytes:
    codec = "mjpeg" if container == "avi" else "libx264"
    return make_video(None, 3, size=(32, 32), container=container, codec=codec)


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def put_frames(folder: Path, count: int, kind: str = "JPEG", first: int = 1) -> None:
    """`count` pictures, unpadded numbers as names, so that sorting by letters would be wrong."""
    for number in range(first, first + count):
        suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
        put(folder / f"{number}.{suffix}", picture(number, kind=kind))


def dfew(root: Path) -> None:
    for n in DFEW_NUMBERS:
        put_frames(root / f"Clip/clip_224x224/{n:05d}", 12 if n == 1 else 2)
    for fold in range(1, 6):
        for part, tested in (("test", True), ("train", False)):
            rows = [n for n in DFEW_NUMBERS if ((n - 1) % 5 + 1 == fold) == tested]
            lines = ["video_name,label", *(f"{n},{(n - 1) % 7 + 1}" for n in rows)]
            path = f"EmoLabel_DataSplit/{part}(single-labeled)/set_{fold}.csv"
            put(root / path, "\r\n".join(lines) + "\r\n")


def mafw(root: Path) -> None:
    for n in MAFW_NUMBERS:
        put_frames(root / f"data/frames/{n:05d}", 2, "PNG")
    for fold in range(1, 6):
        for part, tested in (("test", True), ("train", False)):
            rows = [n for n in MAFW_NUMBERS if ((n - 1) % 5 + 1 == fold) == tested]
            lines = [f"{n:05d}.mp4 {MAFW_EMOTIONS[(n - 1) % 11]}\n" for n in rows]
            path = f"Train & Test Set/single/no_caption/set_{fold}/{part}.txt"
            put(root / path, "".join(lines))


def ferv39k(root: Path) -> None:
    for clip in FERV39K:
        put_frames(root / "2_ClipsforFaceCrop" / clip, 2)
    for split in ("train", "test"):
        lines = [f"{c} {c.split('/')[1]}\n" for c, where in FERV39K.items() if where == split]
        put(root / f"4_setups/All_scenes/{split}_All.csv", "".join(lines))


def cremad(root: Path) -> None:
    for actor in range(1001, 1092):
        for emotion in ("ANG", "NEU"):
            put(root / f"VideoFlash/{actor}_DFA_{emotion}_XX.flv", video("flv"))
    put(root / "VideoFlash/1001_IEO_SAD_HI.flv", video("flv"))


def ravdess(root: Path) -> None:
    for actor in range(1, 25):
        for emotion in range(1, 9):
            name = f"02-01-{emotion:02d}-01-01-01-{actor:02d}.mp4"
            put(root / f"Actor_{actor:02d}/{name}", video())


def enterface05(root: Path) -> None:
    for subject in range(1, 45):
        if subject == 6:
            continue
        for emotion in ENTERFACE_EMOTIONS:
            folder = root / f"subject {subject}/{emotion}"
            if subject != 23:
                folder /= "sentence 1"
            # Person 3 has other names, as in the original.
            code = emotion[:2]
            name = f"s_3_{code}_1.avi" if subject == 3 else f"s{subject}_{code}_1.avi"
            put(folder / name, video("avi"))


def werewolfxl(root: Path) -> None:
    lines = ["VideoName,Dominance_average,Pleasure_average,Arousal_average,Session"]
    for session in range(1, 31):
        for player in (1, 9):
            name = f"{session:02d}_{player:02d}_{100 + player}"
            put(root / f"clips/{session}/{name}.mp4", video())
            lines.append(f"{name},-0.5,{session / 100},1.25,{session}")
    put(root / "labels.csv", "\n".join(lines) + "\n")


def avcaffe(root: Path) -> None:
    people = AVCAFFE_VAL + AVCAFFE_TRAIN
    for person in people:
        for task in (1, 2):
            for clip in (1, 2):
                name = f"{person}_task_{task}_clip_{clip}.avi"
                put(root / f"videos/shorter_segments/{person}/task_{task}/{name}", video("avi"))
    put(root / "info/train.txt", "\n".join(AVCAFFE_TRAIN))
    put(root / "info/val.txt", "\n".join(AVCAFFE_VAL))
    tasks = [f"{person}_task_{task}" for person in people for task in (1, 2)]
    truths = {"arousal": ("Excited", "Dull"), "valence": ("Unpleasant", "Neutral")}
    truths["mental_demand"] = ("10", "11")
    for dimension, (first, second) in truths.items():
        lines = [f"{t}, {first if t.endswith('1') else second}\n" for t in tasks]
        put(root / f"ground_truths/{dimension}.txt", f"{dimension}\n" + "".join(lines))


def daisee(root: Path) -> None:
    lines = {
        split: ["ClipID,Boredom,Engagement,Confusion,Frustration "] for split, _ in DAISEE.values()
    }
    for clip, (split, levels) in DAISEE.items():
        suffix = "mp4" if clip == "5000441001" else "avi"
        put(root / f"DataSet/{split}/{clip[:6]}/{clip}/{clip}.{suffix}", video(suffix))
        lines[split].append(",".join([f"{clip}.{suffix}", *levels]))
    for split, rows in lines.items():
        put(root / f"Labels/{split}Labels.csv", "\r\n".join(rows) + "\r\n")


def mead(root: Path) -> None:
    for person in MEAD_PERSONS:
        for emotion in MEAD_EMOTIONS:
            put(root / f"{person}/video/front/{emotion}/level_1/001.mp4", video())


def celebvhq(root: Path) -> None:
    clips = {}
    for n in range(10):
        clip = f"id-{n // 2}_{n % 2}"
        put(root / f"35666/{clip}.mp4", video())
        emotion = {"sep_flag": False, "labels": "neutral"}
        attributes = {"appearance": [0, 1], "action": [n % 2, 0, 1], "emotion": emotion}
        clips[clip] = {"ytb_id": f"id-{n // 2}", "attributes": attributes, "version": "v0.1"}
    names = {"appearance_mapping": ["blurry", "male"], "action_mapping": ["smile", "nod", "talk"]}
    put(root / "celebvhq_info.json", json.dumps({"meta_info": names, "clips": clips}))


def afewva(root: Path) -> None:
    for n in range(1, 11):
        clip = root / f"{(n + 4) // 5:02d}/{n:03d}"
        put_frames(clip, 2, "PNG", first=0)
        frames = {f"{k:05d}": {"landmarks": [], "valence": n - 5, "arousal": k} for k in range(2)}
        content = {"video_id": f"{n:03d}", "actor": f"Actor {n % 5}", "frames": frames}
        put(clip / f"{n:03d}.json", json.dumps(content))


def firstimpressions(root: Path) -> None:
    for part, paths in FIRST_IMPRESSIONS.items():
        for path in paths:
            put(root / path, video())
        names = [path.rsplit("/")[-1] for path in paths]
        content = {t: dict.fromkeys(names, 0.1 * i) for i, t in enumerate(TRAITS)}
        content["interview"] = dict.fromkeys(names, 0.9)
        put(root / f"annotations/annotation_{part}.pkl", pickle.dumps(content, protocol=2))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "afewva": afewva,
    "avcaffe": avcaffe,
    "celebvhq": celebvhq,
    "cremad": cremad,
    "daisee": daisee,
    "dfew": dfew,
    "enterface05": enterface05,
    "ferv39k": ferv39k,
    "firstimpressions": firstimpressions,
    "mafw": mafw,
    "mead": mead,
    "ravdess": ravdess,
    "werewolfxl": werewolfxl,
}


def videos(name: str, root: Path | str) -> list[SourceVideo]:
    """What the source `name` finds below `root`."""
    return list(sources.find_source(name).samples(str(root)))


def misfits(name: str, root: Path) -> dict[str, str]:
    return {video.key: video.misfit for video in videos(name, root) if video.misfit}


# Samples of the small layouts by fold or split; None: the set has neither.
COUNTS: dict[str, dict[int | str | None, int]] = {
    "dfew": {1: 4, 2: 4, 3: 4, 4: 4, 5: 4},
    "mafw": {1: 5, 2: 5, 3: 4, 4: 4, 5: 4},
    "ferv39k": {"train": 3, "test": 2},
    "cremad": {1: 37, 2: 36, 3: 36, 4: 36, 5: 38},
    "ravdess": dict.fromkeys(range(1, 7), 32),
    "enterface05": {1: 54, 2: 54, 3: 54, 4: 54, 5: 42},
    "werewolfxl": dict.fromkeys(range(1, 6), 12),
    "avcaffe": {"train": 12, "val": 8},
    "daisee": {"train": 3, "val": 1, "test": 2},
    "afewva": {None: 10},
    "mead": {None: 80},
    "celebvhq": {None: 10},
    "firstimpressions": {"train": 2, "val": 1, "test": 1},
}
