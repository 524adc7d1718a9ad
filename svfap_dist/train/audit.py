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
from typing import Any

import numpy as np

from svfap_dist import storage
from svfap_dist.checkpoint import store
from svfap_dist.config import Config
from svfap_dist.data.run_order import RunOrder
from svfap_dist.data.sample_order import Slot
from svfap_dist.data.selection import Selection
from svfap_dist.errors import ConfigError
from svfap_dist.evaluate import protocol
from svfap_dist.progress import Progress
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.mixture import load_training_manifest
from svfap_dist.telemetry.journal import Line, PastAttempt, read_attempts, read_ledgers, read_recipe

_ROWS_KEPT = 20
_EPOCHS_KEPT = 3  # of a source
Use = tuple[int, int, int, str, int]  # step, epoch of its group, lane, key, number of the source


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A planned use without a line ("lost"), or a line without a planned use."""

    kind: str  # lost, duplicated or misplaced
    step: int
    epoch: int
    lane: int
    key: str
    source: int = 0  # number of its data set in a mixture


@dataclasses.dataclass(frozen=True)
class Audit:
    """Result of an audit.

    steps: those that count, from first_step on. samples: planned for them. lost: planned, but in no
    line. duplicated: lines beyond the plan. misplaced: lines of a sample planned for the same step,
    but another lane or epoch. substituted: lines whose clips come from a neighbor, because the
    sample was bad. passed_over: planned for steps that were passed over after a rollback, not used.
    skipped: steps whose update was left out, since a loss or gradient was not finite. redone:
    repeated steps, whose earlier lines do not count. pending: steps after the newest checkpoint,
    not checked. torn: unreadable lines. of_sources: samples planned of each source of a mixture, by
    name.
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
    of_sources: dict[str, int] = dataclasses.field(default_factory=dict)

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
            f"{self.redone} steps were repeated, {self.skipped} had a skipped update, "
            f"{self.pending} are not yet covered by a checkpoint; "
            f"{self.torn} lines are unreadable.",
        ]
        shares = (
            f"{name} {count} ({100 * count / self.samples:.2f} %)"
            for name, count in self.of_sources.items()
        )
        text += [f"Samples by source: {', '.join(shares)}."] if self.of_sources else []
        names = list(self.of_sources)
        text += [
            f"  {row.kind}: step {row.step}, epoch {row.epoch}, lane {row.lane}, {row.key}"
            + (f" of {names[row.source]}" if row.source < len(names) else "")
            for row in self.rows
        ]
        return text


def audit(run_url: str, data_url: str = "") -> Audit:
    """Compare the ledgers of a run with the order of samples.

    Args:
        run_url: URL of the run.
        data_url: URL of its shards; empty: those of the run's recipe. For a mixture, that of each
            source, in the recipe's order, separated by commas.

    Raises:
        ConfigError: If there is no run or ledger, the shards are not the run's, or no step counts
            yet.
        ShardError: If the shards cannot be read.
    """
    config = read_recipe(run_url)
    attempts = read_attempts(run_url)
    if data_url:
        config = _with_urls(config, data_url)
    data_url = ", ".join(config.data.urls)
    manifest = load_training_manifest(config, config.data.url)
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


def _with_urls(config: Config, text: str) -> Config:
    """Return a run's recipe with other URLs of its shards."""
    data, urls = config.data, text.split(",")
    change: dict[str, Any] = {"url": text}
    if data.sources:
        if len(urls) != len(data.sources):
            found = f"{len(urls)} URLs for {len(data.sources)} sources"
            advice = "give the URL of each source of the recipe, in its order, separated by commas"
            raise ConfigError("The run was trained on a mixture", "--data", found, advice)
        pairs = zip(data.sources, urls, strict=True)
        change = {"sources": tuple(source.model_copy(update={"url": url}) for source, url in pairs)}
    return config.model_copy(update={"data": data.model_copy(update=change)})


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
                tally.compare(step, places, found)
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
        of_sources={name: tally.of_sources[n] for n, name in enumerate(plan.source_names)},
        **{name: tally.counts[name] for name in _Tally.NAMES},
    )


class _Plan:
    """Which samples each step uses, computed from the recipe and the manifest."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        self._config, self._manifest = config, manifest
        selection: Selection | None = None
        if config.task:
            split = protocol.split_samples(config, manifest, config.task.fold)
            selection = split.train
        self._sizes = [shard.num_samples for shard in manifest.shards]
        self._ends = np.cumsum(self._sizes)
        self._order = RunOrder(config, manifest, selection)
        # A block may span two shards.
        blocks = (2 * config.data.num_lanes + 2) * self._order.num_groups
        self._keys = functools.lru_cache(blocks)(self._load_keys)
        # Samples used, by group and epoch of it. Lanes end their epochs at about the same time.
        self._used: dict[tuple[int, int], bytearray] = {}

    def _load_keys(self, shard: int) -> tuple[str, ...]:
        return shard_format.load_index(self._config.data.url, self._manifest.shards[shard]).keys

    @property
    def source_names(self) -> list[str]:
        """Return the names of the sources of a mixture."""
        return [source.label for source in self._config.data.sources]

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step; steps count from 1, over all epochs."""
        return (step - 1) // self._order.steps_per_epoch

    def places(self, step: int) -> list[Use]:
        """Return each sample of a step, as its line has it."""
        places = []
        for slot in self._order.slots(step - 1, rank=0, world_size=1):
            self._use(slot)
            shard = int(np.searchsorted(self._ends, slot.sample, side="right"))
            row = slot.sample - (int(self._ends[shard]) - self._sizes[shard])
            places.append((step, slot.epoch, slot.lane, self._keys(shard)[row], slot.source))
        return places

    def _use(self, slot: Slot) -> None:
        """Mark a sample as used in an epoch of its group."""
        first = self._order.first_sample(slot.group)
        used = self._used.get((slot.group, slot.epoch))
        if used is None:
            used = bytearray(self._manifest.samples_of_sources[slot.source])
            self._used[slot.group, slot.epoch] = used
            # A lane that is behind may still be in the epoch before.
            self._used.pop((slot.group, slot.epoch - _EPOCHS_KEPT), None)
        assert not used[slot.sample - first], "the order uses no sample twice in an epoch"
        used[slot.sample - first] = 1


class _Tally:
    """Counts of matching and mismatching lines."""

    NAMES = (
        *("samples", "lost", "duplicated", "misplaced", "substituted", "passed_over", "skipped"),
        "torn",
    )

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(self.NAMES, 0)
        self.of_sources: collections.Counter[int] = collections.Counter()  # samples planned
        self.rows: list[Mismatch] = []

    def pass_over(self, places: list[Use]) -> None:
        """Count planned uses of a step that was passed over."""
        self._count(places)
        self.counts["passed_over"] += len(places)

    def compare(self, step: int, places: list[Use], lines: list[Line]) -> None:
        """Count a step's planned uses and the lines found for it."""
        planned = collections.Counter(places)
        found = collections.Counter(
            (line["step"], line["epoch"], line["lane"], line["key"], line.get("source", 0))
            for line in lines
        )
        self._count(places)
        self.counts["substituted"] += sum(bool(line.get("substituted")) for line in lines)
        if found == planned:
            return
        for place in sorted((planned - found).elements()):
            self._count_mismatch("lost", place)
        missing = collections.Counter(use[3:] for use in (planned - found).elements())
        for place in sorted((found - planned).elements()):
            moved = place[0] == step and missing[place[3:]] > 0
            missing[place[3:]] -= moved
            self._count_mismatch("misplaced" if moved else "duplicated", place)

    def _count(self, places: list[Use]) -> None:
        self.counts["samples"] += len(places)
        self.of_sources.update(place[-1] for place in places)

    def _count_mismatch(self, kind: str, place: Use) -> None:
        self.counts[kind] += 1
        if len(self.rows) < _ROWS_KEPT:
            self.rows.append(Mismatch(kind, *place))
