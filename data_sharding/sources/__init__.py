"""Where videos come from: one small module per layout of a data set.

Each module of the table has `samples(text) -> Iterator[SourceVideo]`, where `text` is the INPUT of
the command line: a folder or prefix of files, or, for `synthetic`, what to render. It yields the
videos in an order that is the same on every call. Videos are named here and read later, by
whichever process probes them, so a `SourceVideo` carries a picklable `read` and no bytes.

Modules are imported when they are asked for: a new layout is one file and one row. What the sets
for fine-tuning say about a video has one form, `Labels`; docs/datasets.md lists them.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

from svfap_dist.errors import ConfigError

SOURCES = {
    "avcaffe": "data_sharding.sources.avcaffe",
    "cremad": "data_sharding.sources.cremad",
    "dfew": "data_sharding.sources.dfew",
    "enterface05": "data_sharding.sources.enterface05",
    "ferv39k": "data_sharding.sources.ferv39k",
    "firstimpressions": "data_sharding.sources.firstimpressions",
    "folder": "data_sharding.sources.folder",
    "mafw": "data_sharding.sources.mafw",
    "ravdess": "data_sharding.sources.ravdess",
    "synthetic": "data_sharding.sources.synthetic",
    "voxceleb2": "data_sharding.sources.voxceleb2",
    "werewolfxl": "data_sharding.sources.werewolfxl",
}


@dataclasses.dataclass(frozen=True, slots=True)
class SourceVideo:
    """One video of a source, not yet read.

    key: unique name in the data set, without dots (webdataset splits a member's name at the first).
    read: gives the file's bytes; picklable, so that a worker process can call it.
    labels: what the source knows (identity, expression, fold, ...), JSON values.
    where: path or URL for messages.
    suffix: the container's suffix, one of `VIDEO_SUFFIXES`.
    stamp: changes when the content changes, as far as that is cheap to know: a file's size in
    bytes, a rendered clip's parameters.
    num_bytes: size of the file, 0 if it is not known.
    misfit: why the source cannot place this file in its layout; it is then listed and left out.
    """

    key: str
    read: Callable[[], bytes]
    labels: dict[str, Any]
    where: str
    suffix: str = "mp4"
    stamp: str = ""
    misfit: str = ""
    num_bytes: int = 0


class Source(Protocol):
    """What a module of the table offers."""

    def samples(self, text: str, /) -> Iterator[SourceVideo]: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a labelled set says about one sample; `as_dict` is a `SourceVideo`'s `labels`.

    A protocol is a filter on these columns: fold k of a k-fold protocol tests the samples with
    `fold == k` and trains on all others; a fixed protocol goes by `split`.

    set: the source's name. subject: the person, where the set names one.
    class_index, class_name: the expression, counted from 0; under the keys `class`, `class_name`.
    classes, class_names: the same per dimension, for sets of several classifications.
    values: per dimension or trait, for sets of regressions.
    fold: number, from 1, of the only fold in which the sample is tested. split: train, val, test.
    """

    set: str
    subject: str | None = None
    class_index: int | None = None
    class_name: str | None = None
    classes: dict[str, int] | None = None
    class_names: dict[str, str] | None = None
    values: dict[str, float] | None = None
    fold: int | None = None
    split: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The columns that this sample has, by name; JSON values."""
        columns = {
            "class" if k == "class_index" else k: v for k, v in dataclasses.asdict(self).items()
        }
        return {name: value for name, value in columns.items() if value is not None}


def load(name: str) -> Source:
    """The source module called `name`.

    Raises: ConfigError if there is none, naming those there are.
    """
    if name not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        raise ConfigError("Unknown source", found=name, do=f"use one of: {known}")
    return cast(Source, importlib.import_module(SOURCES[name]))
