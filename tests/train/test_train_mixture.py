"""Runs of a mixture: the audit of hand-written ones, and a real one that is killed and resumed."""

from __future__ import annotations

import collections
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clips import make_video
from PIL import Image
from test_train_audit import a_data_set
from train_ranks import recipe_tables, start, start_failing

from data_sharding import pipeline as sharding
from svfap_dist.checkpoint import store
from svfap_dist.config import recipe
from svfap_dist.data.run_order import RunOrder
from svfap_dist.errors import ConfigError
from svfap_dist.shards.mixture import load_training_manifest
from svfap_dist.telemetry.journal import Journal, encode_lines
from svfap_dist.train.audit import audit

LANES, BATCH = 4, 8
NAMES, WEIGHTS = ("first", "second", "third"), (3, 1, 2)


class Run:
    """A run of three data sets with the same keys, by the loader's own order."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, str(folder / "run")
        for name in NAMES:
            a_data_set(str(folder / name))
        sources = [
            {"url": str(folder / name), "weight": weight}
            for name, weight in zip(NAMES, WEIGHTS, strict=True)
        ]
        tables = {
            "run": {"url": self.url, "ledger": True, "seed": 7},
            "data": {"sources": sources, "num_lanes": LANES, "shuffle_block": 3},
            "train": {"global_batch_size": BATCH, "micro_batch_size": 1},
        }
        self.config = recipe.from_tables(tables, where="test")
        self.manifest = load_training_manifest(self.config, "")
        self.order = RunOrder(self.config, self.manifest)

    def attempt(self, number: int, first: int, last: int, ranks: int, saved: int = 0) -> None:
        """Record steps first + 1 to last on some ranks, with a checkpoint after one of them."""
        for rank in range(ranks):
            with Journal(self.config, rank, number, step=first) as journal:
                fields = {"step": first, "manifest_fingerprint": self.manifest.fingerprint}
                journal.write_event("resume" if first else "start", attempt=number, **fields)
                for step in range(first + 1, last + 1):
                    journal.write_ledger(encode_lines(self.lines(step, rank, ranks)))
                if saved:
                    journal.write_event("checkpoint", step=saved, seconds=1.0, bytes=1)

    def lines(self, step: int, rank: int, ranks: int) -> list[dict[str, Any]]:
        keys = [
            f"{shard}/{row:02d}" for shard, size in enumerate((5, 9, 12)) for row in range(size)
        ]
        return [
            {
                "epoch": slot.epoch,
                "step": step,
                "lane": slot.lane,
                "key": keys[slot.sample - 26 * slot.source],
                "substituted": False,
                "source": slot.source,
            }
            for slot in self.order.slots(step - 1, rank, ranks)
        ]

    def edit(self, edit: Callable[[list[dict[str, Any]]], object]) -> None:
        """Edit the ledger of rank 0 in the first attempt."""
        file = Path(self.url, "ledger/attempt-0001/rank-0000.jsonl")
        lines = [json.loads(text) for text in file.read_text().splitlines()]
        edit(lines)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.attempt(1, first=0, last=24, ranks=2, saved=24)
    return run


def test_a_mixture_is_exact_over_kills_and_other_numbers_of_ranks(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.attempt(1, first=0, last=9, ranks=2, saved=7)  # killed after two unsaved steps
    run.attempt(2, first=7, last=20, ranks=4, saved=18)
    run.attempt(3, first=18, last=30, ranks=1, saved=30)
    found = audit(run.url)
    assert found.is_exact
    assert (found.steps, found.samples, found.redone) == (30, 240, 4)
    assert found.epochs == 4  # of 78 samples in all, so 9 steps
    assert found.of_sources == {"first": 120, "second": 40, "third": 80}
    assert "first 120 (50.00 %), second 40 (16.67 %), third 80 (33.33 %)" in found.lines()[3]


def test_a_lost_line_is_found_and_its_source_is_named(finished: Run) -> None:
    lost = finished.lines(3, 0, 2)[2]
    finished.edit(lambda lines: lines.remove(lost))
    found = audit(finished.url)
    assert (found.lost, found.duplicated) == (1, 0)
    assert found.rows[0].source == lost["source"]
    assert f"{lost['key']} of {NAMES[lost['source']]}" in found.lines()[-1]


def test_a_sample_of_the_same_key_in_another_source_is_another_sample(finished: Run) -> None:
    finished.edit(lambda lines: lines[5].update(source=(lines[5]["source"] + 1) % 3))
    found = audit(finished.url)
    assert (found.lost, found.duplicated) == (1, 1)


def test_shards_that_were_moved_are_given_one_by_one(finished: Run) -> None:
    moved = []
    for name in NAMES:
        (finished.folder / name).rename(finished.folder / f"moved-{name}")
        moved.append(str(finished.folder / f"moved-{name}"))
    assert audit(finished.url, ",".join(moved)).is_exact
    with pytest.raises(ConfigError, match="1 URLs for 3 sources"):
        audit(finished.url, moved[0])


def test_an_update_has_the_losses_of_each_source(tmp_path: Path) -> None:
    """Of the clips of two ranks in two micro batches each; all else is that of one data set."""
    mixed = {"sources": [{"url": "a"}, {"url": "b"}, {"url": "c"}]}
    tasks = [
        ("losses_by_source", {"tables": recipe_tables("", "unused", data=data), "sources": sources})
        for data, sources in ((mixed, [0, 2, 2, 0]), ({}, []))
    ]
    (found, others), (plain, _) = start(2, tasks, tmp_path)
    clips = found.pop("clips")
    (first, num_first), none, (last, num_last) = found.pop("by_source")
    assert (num_first, num_last) == (2, 2)
    assert none == [0, 0]
    assert first == pytest.approx(clips[0] + clips[3], rel=1e-5)
    assert last == pytest.approx(clips[1] + clips[2], rel=1e-5)
    assert others["by_source"] == [[first, num_first], none, [last, num_last]]
    assert plain.pop("by_source") == []
    assert plain.pop("clips") == clips
    assert found == plain, "loss and norm to the last bit, and what else is summed"


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_killed_run_of_three_sources_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Videos, other videos and images; two ranks, of which the last is killed, then one."""
    sources = []
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        folder = tmp_path / f"{name}-in"
        kind = "images" if name == "third" else "folder"
        folder.mkdir()
        for number in range(10):
            if kind == "images":
                Image.new("RGB", (40, 40), (25 * number, 100, 200)).save(folder / f"{number}.png")
            else:
                make_video(folder / f"clip{number:02d}.mp4", 12, seed=number)
        url = str(tmp_path / name)
        least = 1 if kind == "images" else 8
        sharding.shard(kind, str(folder), url, min_frames=least, max_samples_per_shard=5, workers=0)
        sources.append({"url": url, "weight": weight})
    run = str(tmp_path / "run")
    tables = recipe_tables("", run, data={"sources": sources}, train={"max_steps": 24})
    task = ("train", {"tables": tables, "die_after": 10})
    codes = start_failing(2, task, tmp_path / "killed", seconds=450)
    assert codes[-1] == -signal.SIGKILL
    assert store.latest_committed(run) == 8
    ((result,),) = start(1, [("train", {"tables": tables})], tmp_path / "resumed", seconds=450)
    assert (result["step"], result["stop_reason"]) == (24, "finished")
    found = audit(run)
    assert (found.lost, found.duplicated, found.misplaced) == (0, 0, 0)
    assert (found.samples, found.attempts) == (96, 2)
    assert found.of_sources == {"first": 48, "second": 16, "third": 32}
    used = collections.Counter(
        (line["source"], line["epoch"], line["key"])
        for file in Path(run, "ledger/attempt-0002").glob("*.jsonl")
        for line in map(json.loads, file.read_text().splitlines())
    )
    assert set(used.values()) == {1}
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    for row in rows:  # a line for each step
        clips, losses = row["source_clips"], row["source_loss"]
        assert list(clips) == list(NAMES)
        assert sum(clips.values()) == 4
        total = sum(clips[name] * loss for name, loss in losses.items())
        assert total / 4 == pytest.approx(row["loss"], rel=1e-5)
    events = [json.loads(line) for line in Path(run, "events.jsonl").read_text().splitlines()]
    begun = [event["sources"] for event in events if "sources" in event]
    assert begun == [dict.fromkeys(NAMES, 10)] * 2
