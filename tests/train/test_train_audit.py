"""The proof of exactly-once over runs written by hand: planted faults are found, kills are not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loaders import slots_of_epoch
from typer.testing import CliRunner

from svfap_dist import cli, storage
from svfap_dist.config import Config, recipe
from svfap_dist.data.sample_order import EpochOrder
from svfap_dist.errors import ConfigError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest, ShardEntry, ShardIndex
from svfap_dist.telemetry import journal
from svfap_dist.telemetry.journal import Journal, encode_lines
from svfap_dist.train.audit import Mismatch, audit

SIZES = (5, 9, 12)  # 26 samples, 8 of them in a step: three steps make an epoch
STEPS_PER_EPOCH, LANES, BATCH = 3, 4, 8


def a_data_set(url: str) -> Manifest:
    """Manifest and indexes; the videos are of no interest."""
    entries = []
    for number, size in enumerate(SIZES):
        keys = tuple(f"{number}/{row:02d}" for row in range(size))
        ones = (1,) * size
        index = shard_format.dump(ShardIndex(keys, ones, ones, ("d",) * size, ones))
        name = f"shard-{number:06d}.tar"
        entry = ShardEntry(name, size, 1, f"tar {number}", hashlib.sha256(index).hexdigest())
        storage.write_bytes(storage.join(url, entry.index_name), index)
        entries.append(entry)
    manifest = Manifest("folder", "source", 0, 61, "inputs", tuple(entries))
    storage.write_bytes(storage.join(url, "manifest.json"), shard_format.dump(manifest))
    return manifest


class Run:
    """A run whose attempts leave what real ones leave, by the loader's own order."""

    def __init__(self, root: str, ledger: bool = True, order_version: int = 2) -> None:
        self.url, self.data = f"{root}/run", f"{root}/shards"
        self.manifest = a_data_set(self.data)
        tables = {
            "run": {"url": self.url, "ledger": ledger, "seed": 7},
            "data": {
                "url": self.data,
                "num_lanes": LANES,
                "shuffle_block": 3,
                "order_version": order_version,
            },
            "train": {"global_batch_size": BATCH, "micro_batch_size": 1},
        }
        self.config: Config = recipe.from_tables(tables, where="test")

    def attempt(
        self,
        number: int,
        first: int,
        last: int,
        ranks: int,
        saved: tuple[int, ...] = (),
        skipped: tuple[int, ...] = (),
    ) -> None:
        """Record steps first + 1 to last on some ranks, with checkpoints after some steps, and some
        whose update was left out."""
        for rank in range(ranks):
            with Journal(self.config, rank, number, step=first) as journal:
                kind = "resume" if first else "start"
                fingerprint = self.manifest.fingerprint
                journal.write_event(
                    kind, attempt=number, step=first, manifest_fingerprint=fingerprint
                )
                for step in range(first + 1, last + 1):
                    journal.write_ledger(encode_lines(self.lines(step, rank, ranks)))
                for step in skipped:
                    journal.write_event("skip", step=step)
                for step in saved:
                    journal.write_event("checkpoint", step=step, seconds=1.0, bytes=1)

    def passes_over(self, *steps: int) -> None:
        with Journal(self.config, 0, 1, step=0) as journal:
            journal.write_event("rollback", passed_over=list(steps))

    def lines(self, step: int, rank: int, ranks: int) -> list[dict[str, Any]]:
        epoch, step_in_epoch = divmod(step - 1, STEPS_PER_EPOCH)
        order = EpochOrder(
            SIZES,
            seed=7,
            epoch=epoch,
            global_batch_size=BATCH,
            num_lanes=LANES,
            shuffle_block=3,
            version=self.config.data.order_version,
        )
        keys = [f"{shard}/{row:02d}" for shard, size in enumerate(SIZES) for row in range(size)]
        return [
            {
                "epoch": epoch,
                "step": step,
                "lane": slot.lane,
                "key": keys[slot.sample],
                "substituted": False,
            }
            for slot in slots_of_epoch(order, step_in_epoch, rank, ranks)
        ]

    def ledger(self, attempt: int, rank: int) -> Path:
        return Path(self.url, f"ledger/attempt-{attempt:04d}/rank-{rank:04d}.jsonl")


@pytest.fixture
def finished(tmp_path: Path) -> Run:
    """Seven steps on two ranks, all of them saved."""
    run = Run(str(tmp_path))
    run.attempt(1, first=0, last=7, ranks=2, saved=(4, 7))
    return run


def test_a_run_of_before_there_were_order_versions_is_exact(tmp_path: Path) -> None:
    run = Run(str(tmp_path), order_version=1)
    run.attempt(1, first=0, last=7, ranks=2, saved=(7,))
    stored = tmp_path / "run/config.toml"
    stored.write_text(stored.read_text().replace("order_version = 1\n", ""))
    assert audit(run.url).is_exact
    stored.write_text(
        stored.read_text().replace("shuffle_block", "order_version = 2\nshuffle_block")
    )
    assert not audit(run.url).is_exact


def edited(file: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    edit(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_whole_run_is_exact(finished: Run) -> None:
    found = audit(finished.url)
    assert found.is_exact
    assert (found.steps, found.first_step, found.epochs, found.samples) == (7, 1, 3, 7 * BATCH)
    assert (found.redone, found.pending, found.torn, found.rows) == (0, 0, 0, ())
    assert "exactly once" in found.lines()[0]


def test_attempts_of_other_world_sizes_and_kills_are_exact(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.attempt(1, first=0, last=6, ranks=2, saved=(2, 4))  # killed after two unsaved steps
    run.attempt(2, first=4, last=5, ranks=4)  # killed before it saved
    run.attempt(3, first=4, last=9, ranks=1, saved=(8,))
    with run.ledger(1, 1).open("a") as file:
        file.write('{"epoch": 2, "st')  # torn by the kill
    found = audit(run.url)
    assert found.is_exact
    assert (found.attempts, found.steps, found.redone, found.pending) == (3, 8, 3, 1)
    assert found.torn == 1


def test_a_run_that_goes_on_from_anothers_checkpoint_is_exact(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.attempt(1, first=4, last=6, ranks=2, saved=(6,))
    found = audit(run.url)
    assert found.is_exact
    assert (found.first_step, found.steps) == (5, 2)


def test_a_lost_line_is_found(finished: Run) -> None:
    edited(finished.ledger(1, 1), lambda lines: lines.pop(9))
    lost = finished.lines(3, 1, 2)[1]
    found = audit(finished.url)
    assert (found.lost, found.duplicated, found.misplaced) == (1, 0, 0)
    assert found.rows == (Mismatch("lost", 3, 0, lost["lane"], lost["key"]),)


def test_a_torn_line_is_a_loss(finished: Run) -> None:
    file = finished.ledger(1, 0)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:5], lines[5][:20] + "\n", *lines[6:]]))
    found = audit(finished.url)
    assert (found.lost, found.duplicated, found.torn) == (1, 0, 1)
    assert found.rows[0].step == 2


def test_a_ledger_that_is_gone_is_a_loss_of_all_its_lines(finished: Run) -> None:
    finished.ledger(1, 1).unlink()
    found = audit(finished.url)
    assert (found.lost, found.duplicated) == (7 * BATCH // 2, 0)
    assert len(found.rows) == 20


def test_a_line_written_twice_is_found(finished: Run) -> None:
    edited(finished.ledger(1, 0), lambda lines: lines.insert(5, lines[5]))
    found = audit(finished.url)
    assert (found.lost, found.duplicated) == (0, 1)


def test_a_sample_used_again_in_a_later_step_is_found(finished: Run) -> None:
    def use_again(lines: list[dict[str, Any]]) -> None:
        lines[20]["key"] = lines[0]["key"]

    edited(finished.ledger(1, 0), use_again)
    found = audit(finished.url)
    assert (found.lost, found.duplicated) == (1, 1)


def test_a_sample_of_another_lane_is_found(finished: Run) -> None:
    def move(lines: list[dict[str, Any]]) -> None:
        lines[0]["lane"] = 3

    edited(finished.ledger(1, 0), move)
    found = audit(finished.url)
    assert (found.lost, found.duplicated, found.misplaced) == (1, 0, 1)
    assert [row.kind for row in found.rows] == ["lost", "misplaced"]
    assert not found.is_exact


def test_a_kill_hides_no_loss_of_the_steps_before_it(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.attempt(1, first=0, last=5, ranks=2, saved=(4,))
    run.attempt(2, first=4, last=6, ranks=2, saved=(6,))
    edited(run.ledger(1, 0), lambda lines: lines.pop(15))  # of step 4, which counts
    edited(run.ledger(1, 1), lambda lines: lines.pop(17))  # of step 5, which was done again
    found = audit(run.url)
    assert (found.lost, found.duplicated, found.redone) == (1, 0, 1)


def test_substitutes_are_counted_and_no_offence(finished: Run) -> None:
    edited(finished.ledger(1, 0), lambda lines: lines[3].update(substituted=True))
    found = audit(finished.url)
    assert found.is_exact
    assert found.substituted == 1


def test_steps_that_were_passed_over_are_not_lost(tmp_path: Path) -> None:
    """Nor used: lines of such a step in an attempt after the rollback are duplicates."""
    run = Run(str(tmp_path))
    run.attempt(1, first=0, last=6, ranks=2, saved=(3,))
    run.passes_over(5, 6)
    run.attempt(2, first=3, last=8, ranks=2, saved=(8,))
    for rank in range(2):
        edited(run.ledger(2, rank), lambda lines: lines.__delitem__(slice(4, 12)))
    found = audit(run.url)
    assert found.is_exact
    assert (found.steps, found.samples) == (8, 8 * BATCH)
    assert (found.passed_over, found.redone, found.skipped) == (2 * BATCH, 3, 0)
    assert (
        "every planned sample was used exactly once, but for those passed over"
        in (found.lines()[0])
    )
    run.attempt(2, first=3, last=8, ranks=2, saved=(8,))
    assert audit(run.url).duplicated >= 2 * BATCH


def test_steps_without_an_update_are_counted_where_they_count(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.attempt(1, first=0, last=6, ranks=2, saved=(3,), skipped=(2, 5))
    run.attempt(2, first=3, last=7, ranks=2, saved=(7,), skipped=(4,))
    assert audit(run.url).skipped == 2  # 5 was repeated


def test_small_pieces_give_the_same(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = audit(finished.url)
    monkeypatch.setattr(journal, "_PIECE_BYTES", 7)
    assert audit(finished.url) == whole


def test_a_ledger_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as it takes, read in their order; one that is missing is a loss of its lines."""
    monkeypatch.setattr(journal, "_PART_BYTES", 500)
    run = Run(str(tmp_path))
    run.attempt(1, first=0, last=12, ranks=2, saved=(12,))
    parts = sorted(run.ledger(1, 0).parent.glob("rank-0001*"))
    assert len(parts) > 3
    found = audit(run.url)
    assert found.is_exact
    assert (found.steps, found.torn) == (12, 0)
    lost = len(parts[1].read_text().splitlines())
    parts[1].unlink()
    assert audit(run.url).lost == lost


def test_a_run_in_an_object_store(s3_bucket: str) -> None:
    run = Run(s3_bucket)
    run.attempt(1, first=0, last=3, ranks=2, saved=(3,))
    assert audit(run.url).is_exact


def test_what_cannot_be_audited_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No run"):
        audit(str(tmp_path / "nothing"))
    silent = Run(str(tmp_path / "silent"), ledger=False)
    silent.attempt(1, first=0, last=3, ranks=1, saved=(3,))
    with pytest.raises(ConfigError, match=r"no ledger.*run\.ledger=true"):
        audit(silent.url)
    early = Run(str(tmp_path / "early"))
    early.attempt(1, first=0, last=3, ranks=1)
    with pytest.raises(ConfigError, match="No step of the run counts"):
        audit(early.url)


def test_shards_of_another_making_are_refused(finished: Run, tmp_path: Path) -> None:
    other = shard_format.load_manifest(finished.data)
    rows = (*other.shards[:2], ShardEntry("shard-000002.tar", 12, 1, "other", "index"))
    changed = Manifest("folder", "source", 0, 61, "inputs", rows)
    storage.write_bytes(str(tmp_path / "other/manifest.json"), shard_format.dump(changed))
    with pytest.raises(ConfigError, match=r"other data.*--data"):
        audit(finished.url, str(tmp_path / "other"))


def test_the_verb_prints_one_object_and_ends_with_1_for_a_loss(finished: Run) -> None:
    words = ["audit", finished.url, "--json"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["lost"] == 0
    edited(finished.ledger(1, 1), lambda lines: lines.pop())
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["lost"], found["duplicated"], found["substituted"], found["steps"]) == (
        1,
        0,
        0,
        7,
    )
    assert found["rows"][0]["kind"] == "lost"
