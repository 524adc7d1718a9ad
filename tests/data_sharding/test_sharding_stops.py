"""A sharding that stops before any of its operations on the output is continued, byte for byte."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import make_video

from data_sharding import make_shards, pipeline
from data_sharding.make_sample import Sample, SampleOptions, make_sample
from data_sharding.sources import SourceVideo
from svfap_dist import storage
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import MANIFEST_NAME
from svfap_dist.storage import files
from svfap_dist.video.probe import Rejected

OPERATIONS = ("write_bytes", "upload_file", "delete")
OLD, ALL = 3, 5


class Killed(BaseException):
    """What no code under test handles."""


class OwnProcess:
    """Makes samples as a `VideoPool` does, without its processes."""

    def __init__(self, options: SampleOptions, processes: int) -> None:
        self._options = options

    def map(self, videos: Iterable[SourceVideo]) -> Iterator[tuple[SourceVideo, Sample | Rejected]]:
        for video in videos:
            yield video, make_sample(self._options, video)

    def close(self) -> None:
        pass


class Stopper:
    """Raises `Killed` before the operation that `left` counts down to: a file half-written too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.stopped = 0, set[str]()
        for name in OPERATIONS:
            monkeypatch.setattr(
                storage, name, functools.partial(self._call, getattr(storage, name))
            )
        monkeypatch.setattr(files.os, "replace", functools.partial(self._call, files.os.replace))

    def _call(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            target = [each for each in arguments if isinstance(each, str)][-1]
            self.stopped.add(Path(target).name)
            raise Killed
        return operation(*arguments)


def contents(url: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in url.iterdir()}


def shard(videos: Path, url: Path) -> None:
    options: dict[str, Any] = {"min_frames": 4, "max_samples_per_shard": 2, "workers": 0}
    pipeline.shard("folder", str(videos), str(url), **options)


def test_a_stop_before_any_operation_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while a data set is made nor while videos are added to one, which stays whole."""
    monkeypatch.setattr(make_shards, "open_sample_pool", OwnProcess)
    for count, name in ((OLD, "old"), (ALL, "all")):
        for number in range(count):
            make_video(tmp_path / name / f"{number}.mp4", 6, seed=number)
    shard(tmp_path / "old", tmp_path / "old-shards")
    old = contents(tmp_path / "old-shards")
    stopper = Stopper(monkeypatch)
    for begun in (False, True):
        undisturbed = tmp_path / f"undisturbed-{begun}"
        number = 0
        while not (number and stopper.left > 0):
            out = tmp_path / f"out-{begun}-{number}"
            if begun:
                out.mkdir()
                for file, content in old.items():
                    (out / file).write_bytes(content)
            stopper.left = number
            try:
                shard(tmp_path / "all", out)
            except Killed:
                has_manifest = (out / MANIFEST_NAME).exists()
                assert has_manifest == begun
                if begun:  # as before: a run may be training on it
                    assert shard_format.load_manifest(str(out)).num_samples == OLD
                    found = contents(out)
                    assert all(found[name] == old[name] for name in old if "-0000" in name)
                shard(tmp_path / "all", out)
            if not number:
                out.rename(undisturbed)
            else:
                assert contents(out) == contents(undisturbed), number
            number += 1
    suffixes = {name.partition(".")[2] for name in stopper.stopped}
    assert suffixes == {"tar", "index.json", "done.json", "json", "jsonl"}
