"""Check from a run's files that each sample was used exactly once: plan against ledger.

In: events.jsonl (the step each attempt continued from), ledger/ (what every rank of every attempt
used), config.toml and the manifest. Out: an `Audit`, which counts the differences between the
ledger and the order of samples. `data.sample_order` computes the plan again, for one rank that owns
all lanes, so the number of ranks, and its changes, make no difference.

The steps that count are those that the weights include: up to the newest checkpoint, and of steps
that were repeated after a crash only the last time (`journal` says which lines that voids). Steps
of a killed attempt beyond its last checkpoint are not lost, since they will be repeated. Plan and
ledgers are read side by side, a step at a time, so memory does not grow with the run.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np

from svfap_dist import storage
from svfap_dist.checkpoint import store
from svfap_dist.config import Config
from svfap_dist.data.sample_order import EpochOrder
from svfap_dist.errors import ConfigError
from svfap_dist.evaluate import protocol
from svfap_dist.progress import Progress
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest
from svfap_dist.telemetry.journal import Line, PastAttempt, read_attempts, read_ledgers, read_recipe

_ROWS_KEPT = 20


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A planned use without a line ("lost"), or a line without a planned use."""

    kind: str  # lost, duplicated or misplaced
    step: int
    epoch: int
    lane: int
    key: str


@dataclasses.dataclass(frozen=True)
class Audit:
    """Result of an audit.

    steps: those that count, from first_step on. samples: planned for them. lost: planned, but in no
    line. duplicated: lines beyond the plan. misplaced: lines of a sample planned for the same step,
    but another lane or epoch. substituted: lines whose clips come from a neighbor, because the
    sample was bad. passed_over: planned for steps that were passed over after a rollback, not used.
    skipped: steps whose update was left out, since a loss or gradient was not finite. redone:
    repeated steps, whose earlier lines do not count. pending: steps after the newest checkpoint,
    not checked. torn: unreadable lines.
    """

    run_url: str
    attempts: int
    first_step: int
    steps: int
    epochs: int
    samples: int
    lost: int
    duplicated: int
    misplaced: int
    substituted: int
    passed_over: int
    skipped: int
    redone: int
    pending: int
    torn: int
    rows: tuple[Mismatch, ...]  # the first of the mismatches

    @property
    def is_exact(self) -> bool:
        """Return whether every planned sample was used exactly once."""
        return not (self.lost or self.duplicated or self.misplaced)

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        verdict = (
            "every planned sample was used exactly once"
            + (", but for those passed over" if self.passed_over else "")
            if self.is_exact
            else f"{self.lost} lost, {self.duplicated} duplicated, {self.misplaced} misplaced"
        )
        text = [
            f"Run {self.run_url}: {verdict}.",
            f"{self.steps} steps from {self.first_step} on, in {self.epochs} epochs and "
            f"{self.attempts} attempts: {self.samples} samples, {self.substituted} substituted, "
            f"{self.passed_over} passed over.",
            f"{self.redone} steps were done again, {self.skipped} had no update, {self.pending} "
            f"wait for a checkpoint, {self.torn} unreadable lines.",
        ]
        text += [
            f"  {row.kind}: step {row.step}, epoch {row.epoch}, lane {row.lane}, {row.key}"
            for row in self.rows
        ]
        return text


def audit(run_url: str, data_url: str = "") -> Audit:
    """Compare the ledgers of a run with the order of samples.

    Args:
        run_url: URL of the run.
        data_url: URL of its shards; empty: data.url of the run's recipe.

    Raises:
        ConfigError: If there is no run or ledger, the shards are not the run's, or no step counts
            yet.
        ShardError: If the shards cannot be read.
    """
    config = read_recipe(run_url)
    attempts = read_attempts(run_url)
    if data_url:
        data = config.data.model_copy(update={"url": data_url})
        config = config.model_copy(update={"data": data})
    data_url = config.data.url
    manifest = shard_format.load_manifest(data_url)
    for attempt in attempts:
        if attempt.manifest_fingerprint != manifest.fingerprint:
            trained = attempt.manifest_fingerprint
            found = f"manifest {manifest.fingerprint}, but attempt {attempt.number} had {trained}"
            advice = "give the shards of the run with --data"
            raise ConfigError("The run was trained on other data", data_url, found, advice)
    sizes = storage.list_files(storage.join(run_url, "ledger"))
    if not sizes:
        advice = "set run.ledger=true for runs that are to be audited"
        raise ConfigError("Run has no ledger", storage.join(run_url, "ledger"), "no files", advice)
    return _compare(run_url, attempts, sizes, _Plan(config, manifest))


def _compare(
    run_url: str, attempts: list[PastAttempt], sizes: dict[str, int], plan: _Plan
) -> Audit:
    newest = max(attempts[-1].saved, store.latest_committed(run_url) or 0)
    first = min(attempt.step for attempt in attempts)
    if newest <= first:
        title = "No step of the run counts yet"
        advice = "wait for its first checkpoint"
        raise ConfigError(title, run_url, f"no checkpoint after step {first}", advice)
    tally = _Tally()
    redone = pending = 0
    with Progress("Auditing steps", newest - first) as progress:
        for number, attempt in enumerate(attempts):
            ledgers = read_ledgers(run_url, attempt.number, sizes)
            limit = min([newest, *(later.step for later in attempts[number + 1 :])])
            for step in range(attempt.step + 1, limit + 1):
                found = [line for rank in ledgers for line in rank.take(step)]
                places = plan.places(step)
                if step in attempt.passed_over:
                    tally.pass_over(places)
                    places = []
                tally.compare(step, plan.epoch_of(step), places, found)
                tally.counts["skipped"] += step in attempt.skipped
                progress.update(step - first, note=f"lost {tally.counts['lost']}")
            beyond = max([rank.last_step() for rank in ledgers], default=0)
            beyond = max(0, beyond - max(limit, attempt.step))
            if attempt is attempts[-1]:
                pending = beyond
            else:
                redone += beyond
            tally.counts["torn"] += sum(rank.torn for rank in ledgers)
    return Audit(
        run_url=run_url,
        attempts=len(attempts),
        first_step=first + 1,
        steps=newest - first,
        epochs=plan.epoch_of(newest) - plan.epoch_of(first + 1) + 1,
        redone=redone,
        pending=pending,
        rows=tuple(tally.rows),
        **{name: tally.counts[name] for name in _Tally.NAMES},
    )


class _Plan:
    """Which samples each step uses, computed from the recipe and the manifest."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self._config, self._manifest = config, manifest
        self._selected = None
        if config.task:
            split = protocol.split_samples(config, manifest, config.task.fold)
            self._selected = split.train.indices
        self._sizes = [shard.num_samples for shard in manifest.shards]
        self._ends = np.cumsum(self._sizes)
        self._steps_per_epoch = self._order(0).steps
        # A block may span two shards.
        self._keys = functools.lru_cache(2 * config.data.num_lanes + 2)(self._load_keys)
        self._order_of = functools.lru_cache(2)(self._order)
        self._epoch, self._used = -1, bytearray(manifest.num_samples)

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder.of_run(self._config, self._sizes, epoch, self._selected)

    def _load_keys(self, shard: int) -> tuple[str, ...]:
        return shard_format.load_index(self._config.data.url, self._manifest.shards[shard]).keys

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step; steps count from 1, over all epochs."""
        return (step - 1) // self._steps_per_epoch

    def places(self, step: int) -> list[tuple[int, str]]:
        """Return lane and key of each sample of a step."""
        epoch, step_in_epoch = divmod(step - 1, self._steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._used = epoch, bytearray(len(self._used))
        places = []
        for slot in self._order_of(epoch).slots(step_in_epoch, rank=0, world_size=1):
            assert not self._used[slot.sample], "the order uses no sample twice in an epoch"
            self._used[slot.sample] = 1
            shard = int(np.searchsorted(self._ends, slot.sample, side="right"))
            row = slot.sample - (int(self._ends[shard]) - self._sizes[shard])
            places.append((slot.lane, self._keys(shard)[row]))
        return places


class _Tally:
    """Counts of matching and mismatching lines."""

    NAMES = (
        *("samples", "lost", "duplicated", "misplaced", "substituted", "passed_over", "skipped"),
        "torn",
    )

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(self.NAMES, 0)
        self.rows: list[Mismatch] = []

    def pass_over(self, places: list[tuple[int, str]]) -> None:
        """Count planned uses of a step that was passed over."""
        self.counts["samples"] += len(places)
        self.counts["passed_over"] += len(places)

    def compare(
        self, step: int, epoch: int, places: list[tuple[int, str]], lines: list[Line]
    ) -> None:
        """Count a step's planned uses and the lines found for it."""
        planned = collections.Counter((step, epoch, lane, key) for lane, key in places)
        found = collections.Counter(
            (line["step"], line["epoch"], line["lane"], line["key"]) for line in lines
        )
        self.counts["samples"] += len(places)
        self.counts["substituted"] += sum(bool(line.get("substituted")) for line in lines)
        if found == planned:
            return
        for place in sorted((planned - found).elements()):
            self._count_mismatch("lost", place)
        missing = collections.Counter(key for *_, key in (planned - found).elements())
        for place in sorted((found - planned).elements()):
            moved = place[0] == step and missing[place[3]] > 0
            missing[place[3]] -= moved
            self._count_mismatch("misplaced" if moved else "duplicated", place)

    def _count_mismatch(self, kind: str, place: tuple[int, int, int, str]) -> None:
        self.counts[kind] += 1
        if len(self.rows) < _ROWS_KEPT:
            self.rows.append(Mismatch(kind, *place))
