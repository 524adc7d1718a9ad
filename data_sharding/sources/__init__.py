"""Sources of videos: one module per layout of a data set, one row of `SOURCES` for each.

In: the INPUT of the command line: a folder or prefix of files, or, for `synthetic`, what to render.
Out: `SourceVideo`s, in an order that is the same on every call. Videos are named here and read
later, by whichever process probes them, so a `SourceVideo` carries a picklable `read` and no bytes.

To add a source, write a module with `samples(input) -> Iterator[SourceVideo]` and add its row; the
command line's help, the errors and docs/datasets.md follow the table. Start with `folder`, then
`labeled`, which the labeled sets share. What those say about a video has one form, `Labels`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from svfap_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class SourceVideo:
    """One video of a source, not yet read."""

    key: str  # unique name in the data set, without dots (webdataset splits names at the first)
    read: Callable[[], bytes]  # returns the file's bytes; picklable, for worker processes
    labels: dict[str, Any]  # what the source knows (identity, expression, fold, ...), JSON values
    where: str  # path or URL for messages
    suffix: str = "mp4"  # the container's suffix, one of `VIDEO_SUFFIXES`
    stamp: str = ""  # cheap fingerprint of the content: a file's size, a rendered clip's parameters
    misfit: str = ""  # why the source cannot place this file in its layout; it is then rejected
    num_bytes: int = 0  # size of the file, 0 if it is not known


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a labeled set says about one sample; `as_dict` is a `SourceVideo`'s `labels`.

    A protocol is a filter on these columns: fold k of a k-fold protocol tests the samples with
    `fold == k` and trains on all others; a fixed protocol goes by `split`.
    """

    set: str  # the source's name
    subject: str | None = None  # the person, where the set names one
    class_index: int | None = None  # number of the expression, from 0; under the key `class`
    class_name: str | None = None  # the expression
    classes: dict[str, int] | None = None  # class numbers by dimension, for several classifications
    class_names: dict[str, str] | None = None  # class names by dimension
    values: dict[str, float] | None = None  # numbers by dimension or trait, for sets of regressions
    fold: int | None = None  # number, from 1, of the only fold in which the sample is tested
    split: str | None = None  # train, val or test

    def as_dict(self) -> dict[str, Any]:
        """Return the columns that this sample has, by name; JSON values."""
        columns = {
            "class" if k == "class_index" else k: v for k, v in dataclasses.asdict(self).items()
        }
        return {name: value for name, value in columns.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of the columns of a list of videos (source `csv`); "" for one that is not to be used.

    Capitals do not count. Other names than these must be in the list; these may be missing.
    """

    path: str = "path"
    label: str = "label"  # the class
    values: tuple[str, ...] = ()  # numbers, in place of a class
    subject: str = "subject"
    fold: str = "fold"
    split: str = "split"
    videos: str = ""  # folder or prefix that paths are relative to; "": the list's folder


@dataclasses.dataclass(frozen=True)
class Source:
    """One row of `SOURCES`."""

    name: str  # what the command line calls it
    is_labeled: bool  # whether its videos have `Labels`, to fine-tune on
    input: str  # what INPUT holds or says; errors repeat it
    help: str  # what the set is, in one line
    module: str = ""  # defines `samples`; "": the module of that name in this room
    has_columns: bool = False  # whether `samples` takes `Columns`
    min_frames: int | None = None  # default of --min-frames; None: `video.probe.MIN_FRAMES`
    region: str = "center"  # default of --region, as in the recipes for labeled sets
    kind: str = "videos"  # a key of `shards.format.KINDS`

    def samples(self, text: str, columns: Columns | None = None) -> Iterator[SourceVideo]:
        """Return the videos, in an order that is the same on every call.

        Args:
            text: The INPUT of the command line.
            columns: Columns of a list; None: the usual ones.

        Raises:
            ConfigError: INPUT is no folder, or cannot be understood, or is no list with columns.
            ShardError: INPUT is not in the source's layout.
            StorageError: INPUT cannot be read.
        """
        module = importlib.import_module(self.module or f"{__name__}.{self.name}")
        if columns is None:
            return module.samples(text)
        if not self.has_columns:
            lists = ", ".join(row.name for row in SOURCES.values() if row.has_columns)
            fix = f"use --videos and --..-column(s) with {lists} only"
            raise ConfigError("Source has no columns", "SOURCE", self.name, fix)
        return module.samples(text, columns)


_ROWS = (
    Source(
        "folder",
        False,
        "any videos",
        "every video file below a folder, without labels",
        region="full",  # a face may be anywhere
    ),
    Source(
        "images",
        False,
        "a folder of images, labeled ones in a folder per class, or a list of their paths",
        "still images: clips of one frame, for pre-training or as more labeled data",
        min_frames=1,
        kind="images",
    ),
    Source(
        "voxceleb2",
        False,
        "idNNNNN/<video>/NNNNN.mp4, at any depth",
        "VoxCeleb2: interviews of celebrities, for pre-training",
        region="voxceleb2",
    ),
    Source(
        "synthetic",
        True,
        "what to render, such as clips=210,identities=30",
        "rendered talking faces in 7 expressions, to try everything without data",
        region="voxceleb2",  # framed like VoxCeleb2
    ),
    Source(
        "csv",
        True,
        "a table with a header: path, label or values, perhaps subject, fold, split",
        "your own labeled videos, listed in a text file",
        module="data_sharding.sources.csv_list",
        has_columns=True,
        min_frames=1,
        region="full",
    ),
    Source(
        "afewva",
        True,
        "NNN/*.png and NNN/NNN.json, at any depth",
        "AFEW-VA: film clips, rated for valence and arousal",
    ),
    Source(
        "avcaffe",
        True,
        "videos/shorter_segments/aiimNNN/task_N/*.avi, ground_truths and info",
        "AVCAffe: affect and cognitive load in remote work",
    ),
    Source(
        "celebvhq",
        True,
        "<clip>.mp4 in any folders, and celebvhq_info.json",
        "CelebV-HQ: faces from YouTube, labeled for attributes of appearance and action",
    ),
    Source(
        "cremad",
        True,
        "VideoFlash/<actor>_<sentence>_<emotion>_<level>.flv",
        "CREMA-D: 91 actors speak sentences in 6 emotions",
    ),
    Source(
        "daisee",
        True,
        "DataSet/{Train,Validation,Test}/<person>/<clip>/*.avi and Labels/*Labels.csv",
        "DAiSEE: students at online courses, rated for 4 affective states",
    ),
    Source(
        "dfew",
        True,
        "Clip/clip_224x224/NNNNN/*.jpg and EmoLabel_DataSplit",
        "DFEW: film clips of 7 expressions",
    ),
    Source(
        "enterface05",
        True,
        "subject N/<emotion>/sentence M/*.avi",
        "eNTERFACE05: 44 people speak sentences in 6 emotions",
    ),
    Source(
        "ferv39k",
        True,
        "2_ClipsforFaceCrop/<Scene>/<Emotion>/NNNN/*.jpg and 4_setups/All_scenes",
        "FERV39k: clips of 7 expressions in 22 scenes",
    ),
    Source(
        "firstimpressions",
        True,
        "the videos, annotation_training.pkl, annotation_validation.pkl, annotation_test.pkl",
        "ChaLearn First Impressions V2: vlogs rated for 5 personality traits",
    ),
    Source(
        "mafw",
        True,
        "data/frames/NNNNN or data/clips/NNNNN.mp4, and Train & Test Set",
        "MAFW: clips of 11 expressions",
    ),
    Source(
        "mead",
        True,
        "<person>/video/front/<emotion>/level_N/NNN.mp4",
        "MEAD: actors speak sentences in 8 emotions at 3 levels",
    ),
    Source(
        "ravdess",
        True,
        "Actor_NN/MM-VC-EE-II-SS-RR-AA.mp4",
        "RAVDESS: 24 actors speak sentences in 8 emotions",
    ),
    Source(
        "werewolfxl",
        True,
        "SS_PP_N.mp4 and labels.csv with columns VideoName, Pleasure_average, Arousal_average, "
        "Dominance_average",
        "Werewolf-XL: players rated for valence, arousal and dominance",
    ),
)
SOURCES = {row.name: row for row in _ROWS}


def find_source(name: str) -> Source:
    """Return the source of that name.

    Args:
        name: A key of `SOURCES`.

    Raises:
        ConfigError: There is none; the error lists those there are.
    """
    if name not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise ConfigError("Unknown source", "SOURCE", name, f"use one of: {known}")
    return SOURCES[name]
