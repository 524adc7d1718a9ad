"""The transfer table: scores by method, labels per class and seed, and what they say.

In: one score per cell, which is a method with some labels per class and a seed, pooled over the
folds of the protocol. Out: mean, deviation and standard error over seeds; the difference that
pre-training makes, paired by seed since both sides have drawn the same labels; and which difference
the table can tell from noise, stated before anything is trained and again from what was measured.

A difference counts as shown above two standard errors. With five seeds chance alone exceeds that
in about one of nine comparisons (Student's t with four degrees of freedom), so few seeds need more.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from svfap_dist import json_text
from svfap_dist.evaluate.metrics import SCORE_FUNCTIONS
from svfap_dist.evaluate.results import shown, title_of
from svfap_dist.text_table import format_table
from svfap_dist.train.signals import FINISHED

CRITERION = 2.0  # standard errors above which a difference counts as shown
_POWER_QUANTILE = 0.8416  # of the standard normal at 80 %
PAIRS = (("pretrained", "scratch"), ("vit-pretrained", "vit"))  # whose differences are shown


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of the table. labels: per class, 0 for all; seed: from 0, added to run.seed."""

    method: str
    labels: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its files."""
        return f"{self.method}-{labels_text(self.labels)}-seed{self.seed}"


def labels_text(labels: int) -> str:
    """Return labels per class as tables show them.

    Args:
        labels: per class; 0: all.
    """
    return str(labels) if labels else "all"


@dataclasses.dataclass(frozen=True)
class CellResult:
    """The result of a cell.

    Attributes:
        cell: which one.
        values: pooled score by metric, in percent where papers print it so.
        num_samples: tested ones.
        seconds: that it took.
    """

    cell: Cell
    values: dict[str, float]
    num_samples: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Interval:
    """Where 95 % of a method's differences are when the test samples are drawn again."""

    method: str
    labels: int
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Power:
    """Which difference between two methods the table can tell from noise, before it is run.

    Test samples are assumed right or wrong independently, with probability 1/2, which is the worst
    case, for either method. The standard error of a score s is then known from the numbers of test
    samples, that of a difference is sqrt(2) s, and a difference of 2 + 0.84 of these exceeds two
    standard errors in four of five repetitions.

    Attributes:
        num_samples: test samples of all folds.
        of_classes: of each class.
        seeds: number of seeds.
        one_seed: detectable difference of one seed, or of many that err on the same samples.
        all_seeds: of the mean over the seeds, if they err independently.
    """

    num_samples: int
    of_classes: tuple[int, ...]
    seeds: int
    one_seed: float
    all_seeds: float

    def lines(self, metric: str) -> list[str]:
        """Return the text for a terminal.

        Args:
            metric: name of the score.
        """
        all_seeds, one_seed = shown(metric, self.all_seeds), shown(metric, self.one_seed)
        return [
            f"Power: {self.num_samples} test samples of {len(self.of_classes)} classes, "
            f"{self.seeds} seeds. A difference of {all_seeds} points of "
            f"{SCORE_FUNCTIONS[metric].title} exceeds two standard errors in 4 of 5 repetitions if "
            f"each sample is right or wrong by itself (probability 1/2, the worst case) in each "
            f"seed; {one_seed} if all seeds err on the same samples."
        ]


def compute_power(metric: str, of_classes: Sequence[int], seeds: int) -> Power | None:
    """Return the power of a comparison by a metric; None where it does not follow from counts.

    Args:
        metric: name of the score; uar or war.
        of_classes: test samples of each class that occurs.
        seeds: number of seeds.
    """
    counts = np.array(of_classes, np.float64)
    if metric == "uar":
        error = 100 * math.sqrt(float(np.sum(0.25 / counts))) / len(counts)
    elif metric == "war":
        error = 100 * math.sqrt(0.25 / float(counts.sum()))
    else:
        return None
    one_seed = detectable(math.sqrt(2) * error)
    all_seeds = one_seed / math.sqrt(seeds)
    return Power(int(counts.sum()), tuple(of_classes), seeds, one_seed, all_seeds)


def detectable(standard_error: float) -> float:
    """Return the difference that exceeds two standard errors in four of five repetitions.

    Args:
        standard_error: of a difference.
    """
    return (CRITERION + _POWER_QUANTILE) * standard_error


@dataclasses.dataclass(frozen=True)
class Row:
    """Scores of a method with some labels per class, over seeds; NaN where seeds are too few."""

    method: str
    labels: int
    seeds: int
    mean: float
    deviation: float
    standard_error: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """What pre-training adds, over the seeds of which both sides are there.

    Attributes:
        method: the pre-trained one.
        baseline: the one from scratch.
        labels: per class; 0: all.
        seeds: compared ones.
        mean: of the differences by seed.
        standard_error: of that mean; NaN for fewer than two seeds.
        is_shown: whether the mean differs from 0 by more than two standard errors.
        detectable: the difference that this standard error would show in 4 of 5 repetitions.
    """

    method: str
    baseline: str
    labels: int
    seeds: int
    mean: float
    standard_error: float
    is_shown: bool
    detectable: float


@dataclasses.dataclass(frozen=True)
class TransferTable:
    """The whole table, or as much of it as is there.

    Attributes:
        set: name of the labeled set.
        label: column that is learned.
        metric: the recipe's first, which is compared.
        methods: in the order of the rows.
        labels: numbers of labels per class, in order.
        seeds: number of seeds.
        results: of the finished cells.
        power: known before; None for metrics other than UAR and WAR.
        stop_reason: "finished", or why the rest is missing.
        command: that makes the table.
        failed: cells whose training failed, and why.
        intervals: of the differences, once all cells are there.
    """

    set: str
    label: str
    metric: str
    methods: tuple[str, ...]
    labels: tuple[int, ...]
    seeds: int
    results: tuple[CellResult, ...]
    power: Power | None
    stop_reason: str
    command: str = ""
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    intervals: tuple[Interval, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every cell has a result."""
        return len(self.results) == len(self.cells())

    def cells(self) -> list[Cell]:
        """Return all cells, in the order in which they are computed."""
        return [
            Cell(method, labels, seed)
            for seed in range(self.seeds)
            for labels in self.labels
            for method in self.methods
        ]

    def cells_of_part(self, number: int, parts: int) -> list[Cell]:
        """Return the cells of one part; every part has about the same number of each method.

        Args:
            number: of the part, from 1.
            parts: how many there are.
        """
        cells, counts = [], dict.fromkeys(self.methods, 0)
        for cell in self.cells():
            turn = counts[cell.method] + self.methods.index(cell.method)
            counts[cell.method] += 1
            if turn % parts == number - 1:
                cells.append(cell)
        return cells

    def rows(self) -> list[Row]:
        """Return a row per method and labels of which there is a result."""
        found = []
        for labels in self.labels:
            for method in self.methods:
                if values := list(self._by_seed(method, labels).values()):
                    mean, deviation, error = _spread(values)
                    found.append(Row(method, labels, len(values), mean, deviation, error))
        return found

    def differences(self) -> list[Difference]:
        """Return what pre-training adds, by labels per class."""
        found = []
        for method, baseline in PAIRS:
            for labels in self.labels:
                better, worse = self._by_seed(method, labels), self._by_seed(baseline, labels)
                if both := sorted(better.keys() & worse.keys()):
                    mean, _, error = _spread([better[seed] - worse[seed] for seed in both])
                    is_shown = abs(mean) > CRITERION * error  # False for NaN
                    numbers = len(both), mean, error, is_shown, detectable(error)
                    found.append(Difference(method, baseline, labels, *numbers))
        return found

    def _by_seed(self, method: str, labels: int) -> dict[int, float]:
        """Return the scores of a method, by seed."""
        return {
            result.cell.seed: result.values[self.metric]
            for result in self.results
            if (result.cell.method, result.cell.labels) == (method, labels)
        }

    def cell_lines(self, result: CellResult | None) -> list[str]:
        """Return what to print after a cell, or before the first one.

        Args:
            result: of the cell that is done; None: before the first one.
        """
        done, total = len(self.results), len(self.cells())
        if result is None:
            begun = [f"{done} of {total} cells are there already."] if done else []
            return [*self._power_lines(), *begun]
        cell, seconds = result.cell, f"{result.seconds:.0f} s"
        which = f"{cell.method}, {labels_text(cell.labels)} labels per class, seed {cell.seed}"
        values = list(self._by_seed(cell.method, cell.labels).values())
        score = f"{title_of(self.metric)} {shown(self.metric, result.values[self.metric])}"
        mean = f", mean of {len(values)} seeds {shown(self.metric, statistics.fmean(values))}"
        return [f"[{done}/{total}] {which}: {score}{mean if len(values) > 1 else ''} ({seconds})"]

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        metric = self.metric
        rows = [
            [
                labels_text(row.labels),
                row.method,
                str(row.seeds),
                *(_number(metric, x) for x in (row.mean, row.deviation, row.standard_error)),
            ]
            for row in self.rows()
        ]
        head = ["labels per class", "method", "seeds", title_of(metric), "deviation"]
        head.append("standard error")
        lines = [f"{self.set}, {self.label}: {self._progress()}", *self._power_lines()]
        lines += ["", *format_table(rows, head, (0, 2, 3, 4, 5))] if rows else []
        pairs = [
            [
                labels_text(pair.labels),
                f"{pair.method} - {pair.baseline}",
                str(pair.seeds),
                _number(metric, pair.mean, "+"),
                _number(metric, pair.standard_error),
                "yes" if pair.is_shown else "no",
                _number(metric, pair.detectable),
                self._interval_text(pair),
            ]
            for pair in self.differences()
        ]
        head = ["labels per class", "difference", "seeds", title_of(metric), "standard error"]
        head += ["above two errors", "detectable", "95 % interval"]
        lines += ["", *format_table(pairs, head, (0, 2, 3, 4, 6))] if pairs else []
        lines += [f"Failed: {name}: {why}" for name, why in self.failed.items()]
        if self.stop_reason != FINISHED:
            lines.append(f"Stopped ({self.stop_reason}): run the same command again to resume.")
        return lines

    def to_markdown(self) -> str:
        """Return the content of transfer.md: methods by labels, mean ± deviation over seeds."""
        found = {(row.method, row.labels): row for row in self.rows()}
        pairs = {(pair.method, pair.labels): pair for pair in self.differences()}
        lines = [
            f"{title_of(self.metric)} of {self.set}, {self.label}: mean ± deviation over seeds; "
            f"{self._progress()}.",
            "",
            f"| labels per class | {' | '.join(map(labels_text, self.labels))} |",
            f"|---|{'--:|' * len(self.labels)}",
        ]
        for method in self.methods:
            cells = [self._mean_text(found.get((method, labels))) for labels in self.labels]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        for method, baseline in PAIRS:
            if any(name == method for name, _ in pairs):
                cells = [self._pair_text(pairs.get((method, labels))) for labels in self.labels]
                lines.append(f"| {method} - {baseline} | {' | '.join(cells)} |")
            if any(interval.method == method for interval in self.intervals):
                of_labels = [pairs.get((method, labels)) for labels in self.labels]
                cells = [self._interval_text(pair) if pair else "" for pair in of_labels]
                lines.append(f"| its 95 % interval | {' | '.join(cells)} |")
        lines += [
            "",
            "Differences: mean ± standard error over seeds, paired; bold above two of them. "
            "Interval: the test samples drawn again, by whole subjects where the set names them.",
            *self._power_lines(),
            *(f"Failed: {name}: {why}" for name, why in self.failed.items()),
            *(["", "```", self.command, "```"] if self.command else []),
        ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return the content of transfer.json; undefined numbers are null."""
        content = dataclasses.asdict(self) | {
            "rows": [dataclasses.asdict(row) for row in self.rows()],
            "differences": [dataclasses.asdict(pair) for pair in self.differences()],
        }
        return json_text.dumps(content, indent=1) + "\n"

    def _power_lines(self) -> list[str]:
        return self.power.lines(self.metric) if self.power else []

    def _progress(self) -> str:
        there = f"{len(self.results)} of {len(self.cells())} cells"
        done = "complete" if self.is_complete else there
        samples = {result.num_samples for result in self.results}
        tested = f", {max(samples)} test samples" if samples else ""
        return f"{self.seeds} seeds{tested}, {done}"

    def _mean_text(self, row: Row | None) -> str:
        if row is None:
            return ""
        mean = shown(self.metric, row.mean)
        return (
            mean if math.isnan(row.deviation) else f"{mean} ± {shown(self.metric, row.deviation)}"
        )

    def _interval_text(self, pair: Difference) -> str:
        for interval in self.intervals:
            if (interval.method, interval.labels) == (pair.method, pair.labels):
                ends = (shown(self.metric, end, "+") for end in (interval.low, interval.high))
                return " to ".join(ends)
        return ""

    def _pair_text(self, pair: Difference | None) -> str:
        if pair is None:
            return ""
        text = shown(self.metric, pair.mean, sign="+")
        if not math.isnan(pair.standard_error):
            text += f" ± {shown(self.metric, pair.standard_error)}"
        return f"**{text}**" if pair.is_shown else text


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, sample deviation and standard error of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2 or any(map(math.isnan, values)):
        return mean, math.nan, math.nan
    deviation = statistics.stdev(values)
    return mean, deviation, deviation / math.sqrt(len(values))


def _number(metric: str, value: float, sign: str = "") -> str:
    return "" if math.isnan(value) else shown(metric, value, sign)
