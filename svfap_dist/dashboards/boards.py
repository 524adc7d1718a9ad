"""Grafana boards as plain values: Training, Data path, Reliability and goodput.

In: the tables of metrics and alerts. Out: `Board`s, which `render` turns into Grafana's JSON. Each
board begins with numbers that answer its question at a glance, colored by the thresholds of the
alerts; the curves below explain them. Queries take names from the table of metrics, so a metric
that is renamed or removed cannot stay on a board. They return one series per run, or per run and
rank, whatever port a restart gave the rank; else a board would show ended ranks beside live ones.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from svfap_dist.dashboards import alerts
from svfap_dist.telemetry import goodput, metrics
from svfap_dist.telemetry.metrics import Metric

GPU_ONLY = "Only on GPUs."
Kind = Literal["lines", "stacked", "bars", "number"]
Limits = tuple[tuple[float | None, str], ...]  # (from this value on, color); None: from the bottom


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel of a board.

    unit: one of Grafana's. queries: (PromQL, legend). text: description. width: of 24 columns.
    limits: colors of a number, lines in a chart. zero, top: whether the axis begins at zero, and
    its end. colors: of series, by legend.
    """

    title: str
    kind: Kind
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str
    width: int = 12
    limits: Limits = ()
    zero: bool = True
    top: float | None = None
    decimals: int | None = None
    colors: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Board:
    """A dashboard and the name of its file."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def _high_is_bad(limit: float) -> Limits:
    """Return the colors of a number that alerts from `limit` on."""
    return ((None, "green"), (limit / 2, "yellow"), (limit, "red"))


def _of(metric: Metric, matchers: str = "") -> str:
    """Select a metric of the chosen runs."""
    return f'{metric.name}{{run=~"$run"{matchers}}}'


def _on_main(metric: Metric) -> str:
    """Query rank 0's value for the whole run; one series, whatever port a restart gave it."""
    matcher = ', rank="0"'
    return f"max by (run) ({_of(metric, matcher)})"


def _newest(metric: Metric, by: str) -> str:
    """Query a counter's rate or a gauge's value; one series across restarts."""
    return _rate(metric, by) if metric.is_counter else f"max by ({by}) ({_of(metric)})"


def _rate(metric: Metric, by: str) -> str:
    """Query a counter's increase per second, summed by labels."""
    return f"sum by ({by}) (rate({_of(metric)}[$__rate_interval]))"


def _share(part: Metric, whole: Metric, by: str) -> str:
    """Query a ratio of rates where `whole` is above zero: a chart with 0 / 0 = NaN stays empty."""
    return f"{_rate(part, by)} / ({_rate(whole, by)} > 0)"


def _recorded(recording: alerts.Recording) -> str:
    """Select a recorded query of the chosen runs."""
    return f'{recording.record}{{run=~"$run"}}'


def _number(title: str, unit: str, query: str, text: str, width: int = 4, **more) -> Panel:
    """Return a number for the top row of a board."""
    return Panel(title, "number", unit, ((query, "{{run}}"),), text, width, **more)


def _now(title: str, unit: str, metric: Metric, note: str = "", **more) -> Panel:
    """Return a number with the newest value of rank 0."""
    return _number(title, unit, _on_main(metric), f"{metric.help} {note}".strip(), **more)


def _main(title: str, unit: str, *curves: tuple[Metric, str], **more) -> Panel:
    """Return a chart of (metric, legend) curves of rank 0."""
    queries = ((_on_main(metric), f"{{{{run}}}} {legend}".strip()) for metric, legend in curves)
    return Panel(title, "lines", unit, tuple(queries), " ".join(m.help for m, _ in curves), **more)


def _each_rank(title: str, unit: str, metric: Metric, note: str = "", **more) -> Panel:
    """Return a chart with a curve for each rank: a counter's rate, or a gauge."""
    query = _newest(metric, "run, rank")
    text = f"{metric.help} {note}".strip()
    return Panel(title, "lines", unit, ((query, "{{run}} rank {{rank}}"),), text, **more)


def _by_label(title: str, unit: str, metric: Metric, label: str, **more) -> Panel:
    """Return a chart of a metric by one of its own labels."""
    query = _newest(metric, f"run, {label}")
    return Panel(title, "lines", unit, ((query, f"{{{{{label}}}}}"),), metric.help, **more)


_LAST_STEP = _number(
    "Since the last step",
    "s",
    f"time() - {_on_main(metrics.LAST_STEP_TIME)}",
    "Time since a logged step: near zero while a run progresses; SvfapNoStep fires at ten minutes.",
    limits=_high_is_bad(alerts.NO_STEP_SECONDS),
)
_WAITING = _number(
    "Waiting for data",
    "percentunit",
    _recorded(alerts.DATA_WAIT_SHARE),
    "Share of the steps' time over five minutes; SvfapDataBound fires at 10 %.",
    limits=_high_is_bad(alerts.DATA_BOUND),
)
_GOODPUT = _now(
    "Goodput",
    "percentunit",
    metrics.GOODPUT,
    "SvfapLowGoodput fires below 80 %.",
    limits=((None, "red"), (alerts.LOW_GOODPUT, "yellow"), (0.9, "green")),
)
_FIRING = 'ALERTS{alertstate="firing", alertname=~"Svfap.*", run=~"$run"}'
_ALARMS = _number(
    "Alerts firing",
    "none",
    f"count({_FIRING}) or vector(0)",
    "Number of alerts that fire; the board Reliability and goodput names them.",
    limits=((None, "green"), (1, "red")),
)


def _narrow(panel: Panel) -> Panel:
    return dataclasses.replace(panel, width=3)


def _phases() -> Panel:
    """Return the chart of a step's time by phase, waiting for data included."""
    steps = f"({_rate(metrics.STEP_SECONDS, 'run')} > 0)"
    phases = f"{_rate(metrics.PHASE_SECONDS, 'run, phase')} / on (run) group_left () {steps}"
    waiting = _share(metrics.DATA_WAIT_SECONDS, metrics.STEP_SECONDS, "run")
    text = f"{metrics.PHASE_SECONDS.help} As shares of the time of steps; the rest is other work."
    queries = ((phases, "{{phase}}"), (waiting, "waiting for data"))
    colors = (("waiting for data", "red"),)
    return Panel(
        "Where a step's time goes", "stacked", "percentunit", queries, text, top=1, colors=colors
    )


_TRAINING = (
    _narrow(_LAST_STEP),
    _narrow(_now("Step", "none", metrics.STEP)),
    _narrow(_now("Epoch", "none", metrics.EPOCH)),
    _narrow(_now("Clips per second", "none", metrics.CLIPS_PER_SECOND)),
    _narrow(_WAITING),
    _narrow(_GOODPUT),
    _narrow(_ALARMS),
    _narrow(_now("MFU", "percentunit", metrics.MFU, GPU_ONLY)),
    _main(
        "Loss",
        "none",
        (metrics.LOSS, "training"),
        (metrics.HELD_OUT_LOSS, "held out"),
        zero=False,
        width=8,
    ),
    _by_label(
        "Loss by source of a mixture", "none", metrics.SOURCE_LOSS, "source", zero=False, width=8
    ),
    _main("Gradient norm", "none", (metrics.GRAD_NORM, ""), width=8),
    _by_label(
        "Probes of the frozen features", "percentunit", metrics.PROBE_UAR, "classifier", width=8
    ),
    _main("Time of the last probe", "s", (metrics.PROBE_SECONDS, ""), width=8),
    _by_label("Validation of a fine-tuning", "none", metrics.VALIDATION_SCORE, "score", width=8),
    _each_rank("Clips per second by rank", "none", metrics.CLIPS),
    _phases(),
    _each_rank("Own time by rank", "percentunit", metrics.OWN_SECONDS, "As a share of the time."),
    _each_rank(
        "Cost of slow ranks",
        "percentunit",
        metrics.STRAGGLER_COST,
        "SvfapStraggler fires at 10 %.",
        limits=((None, "transparent"), (alerts.STRAGGLER, "red")),
    ),
    _main("Learning rate", "sci", (metrics.LEARNING_RATE, ""), decimals=2, width=8),
    _each_rank("Operations per second", "flops", metrics.FLOPS, width=8),
    _each_rank("Tokens per second", "short", metrics.TOKENS, width=8),
    _each_rank("GPU memory", "bytes", metrics.GPU_MEMORY, GPU_ONLY),
    _each_rank("GPU utilization", "percentunit", metrics.GPU_UTILIZATION, GPU_ONLY, top=1),
)

_WAIT = _share(metrics.DATA_WAIT_SECONDS, metrics.STEP_SECONDS, "run, rank")
_DECODING = _share(metrics.DECODE_SECONDS, metrics.CLIPS, "run, rank")
_BAD_NOW = f"60 * {_rate(metrics.BAD_SAMPLES, 'run, reason')}"
_FAILED_REQUESTS = _of(metrics.STORAGE_REQUESTS, ', outcome=~"unreachable|refused"')
_DATA = (
    _WAITING,
    _number(
        "Batches ready, worst rank",
        "none",
        f"min by (run) ({_of(metrics.BATCHES_READY)})",
        metrics.BATCHES_READY.help,
        limits=((None, "red"), (0.5, "yellow"), (1, "green")),
    ),
    _number(
        "Clips per second", "none", _recorded(alerts.CLIPS_RATE), "Of all ranks, over five minutes."
    ),
    _number(
        "Read from the store",
        "Bps",
        _rate(metrics.FETCHED_BYTES, "run"),
        "Bytes of shards per second, of all ranks.",
    ),
    _number(
        "Decoding a clip",
        "s",
        _share(metrics.DECODE_SECONDS, metrics.CLIPS, "run"),
        "Time of one thread or worker.",
    ),
    _number(
        "Bad samples",
        "percentunit",
        f"sum by (run) ({_recorded(alerts.BAD_SHARE)}) or 0 * {_on_main(metrics.STEP)}",
        "Share of the samples of the last hour that could not be used; SvfapQuarantineGrowing "
        "fires at 0.2 %.",
        limits=_high_is_bad(alerts.MANY_BAD),
    ),
    Panel(
        "Waiting for data by rank",
        "lines",
        "percentunit",
        ((_WAIT, "{{run}} rank {{rank}}"),),
        "Share of the steps' time. One rank alone: its node; all of them: the store, or too few "
        "decode workers.",
        limits=((None, "transparent"), (alerts.DATA_BOUND, "red")),
    ),
    _each_rank("Batches ready", "none", metrics.BATCHES_READY),
    _each_rank("Threads that fetch", "none", metrics.FETCH_SECONDS, "Per second: number at once."),
    _each_rank(
        "Threads that decode", "none", metrics.DECODE_SECONDS, "Per second: number at once."
    ),
    _each_rank("Read from the store by rank", "Bps", metrics.FETCHED_BYTES),
    Panel(
        "Decoding a clip, by rank",
        "lines",
        "s",
        ((_DECODING, "{{run}} rank {{rank}}"),),
        "Time of one thread or worker; it grows when cores are short.",
    ),
    Panel(
        "Bad samples per minute by reason",
        "bars",
        "none",
        ((_BAD_NOW, "{{reason}}"),),
        f"{metrics.BAD_SAMPLES.help} Empty while there are none; quarantine.jsonl has their keys.",
    ),
    _by_label("Clips per second by source", "none", metrics.SOURCE_CLIPS, "source"),
    _by_label("Bad samples per second by source", "none", metrics.SOURCE_BAD_SAMPLES, "source"),
    _by_label("Storage bytes per second", "Bps", metrics.STORAGE_BYTES, "operation"),
    _by_label(
        "Storage requests per second", "none", metrics.STORAGE_REQUESTS, "operation", width=8
    ),
    Panel(
        "Storage requests that failed, per second",
        "lines",
        "none",
        ((f"sum by (outcome) (rate({_FAILED_REQUESTS}[$__rate_interval]))", "{{outcome}}"),),
        "SvfapStorageFailing fires at 5 % of all requests.",
        width=8,
    ),
    _by_label("Storage retries per second", "none", metrics.STORAGE_RETRIES, "operation", width=8),
)


def _in_five_minutes(metric: Metric) -> str:
    return f"sum(increase({_of(metric)}[5m]))"


def _spent_on(name: str) -> str:
    matcher = f', class="{name}"'
    return f"max by (run) ({_of(metrics.RUN_SECONDS, matcher)})"


_ATTEMPTS = _of(metrics.RESTARTS)
_RESTARTED = (
    f"sum(max by (run) (max_over_time({_ATTEMPTS}[5m])) "
    f"- min by (run) (min_over_time({_ATTEMPTS}[5m])))"
)
_RETURNS = _of(metrics.ROLLBACKS)
_ROLLED_BACK = (
    f"sum(max by (run) (max_over_time({_RETURNS}[5m])) "
    f"- min by (run) (min_over_time({_RETURNS}[5m])))"
)
_ALERTS_BY_NAME = (
    f'sum by (alertname) ({_FIRING}) or label_replace(vector(0), "alertname", "none", "", "")'
)
_RELIABILITY = (
    _GOODPUT,
    _ALARMS,
    _narrow(_now("Restarts", "none", metrics.RESTARTS)),
    _narrow(_now("Stalls", "none", metrics.STALLS)),
    _number(
        "Age of newest checkpoint",
        "s",
        f"time() - {_on_main(metrics.CHECKPOINT_TIME)}",
        "SvfapCheckpointTooOld fires at two hours.",
        limits=_high_is_bad(alerts.OLD_CHECKPOINT_SECONDS),
    ),
    _LAST_STEP,
    _number(
        "Ranks that answer",
        "none",
        'sum by (run) (up{job="svfap_ranks", run=~"$run"})',
        "Ranks that Prometheus could scrape; SvfapRankGone fires when one no longer answers.",
    ),
    Panel(
        "What failed, in five minutes",
        "bars",
        "none",
        (
            (_RESTARTED, "restarts"),
            (_in_five_minutes(metrics.CHECKPOINT_FAILURES), "checkpoints not stored"),
            (_in_five_minutes(metrics.NON_FINITE), "skipped updates"),
            (_in_five_minutes(metrics.PROBE_FAILURES), "probes"),
            (_ROLLED_BACK, "rollbacks"),
            (_in_five_minutes(metrics.LOSS_SPIKES), "spikes of the loss"),
            (_in_five_minutes(metrics.BAD_SAMPLES), "bad samples"),
        ),
        "Restarts, checkpoints that were not stored, updates left out because a loss or gradient "
        "was not finite, probes, returns to a checkpoint, spikes of the loss, and bad samples; "
        "events.jsonl has the details.",
        colors=(
            ("restarts", "red"),
            ("checkpoints not stored", "purple"),
            ("skipped updates", "blue"),
            ("probes", "#e377c2"),
            ("rollbacks", "yellow"),
            ("spikes of the loss", "#808080"),
            ("bad samples", "orange"),
        ),
    ),
    Panel(
        "Alerts",
        "stacked",
        "none",
        ((_ALERTS_BY_NAME, "{{alertname}}"),),
        "Alerts that fire, by name; each alert has its cause and remedy.",
    ),
    Panel(
        "Where the time of the run went",
        "stacked",
        "s",
        tuple((_spent_on(name), name) for name in goodput.CLASSES),
        metrics.RUN_SECONDS.help,
        colors=(
            ("productive", "green"),
            ("data_wait", "red"),
            ("checkpoint", "blue"),
            ("probe", "yellow"),
            ("restart", "orange"),
            ("redone", "purple"),
            ("idle", "#808080"),
        ),
    ),
    _main(
        "Goodput over time",
        "percentunit",
        (metrics.GOODPUT, ""),
        limits=((None, "red"), (alerts.LOW_GOODPUT, "transparent")),
        top=1,
    ),
    _main(
        "Step, and step of the newest checkpoint",
        "none",
        (metrics.STEP, "step"),
        (metrics.CHECKPOINT_STEP, "newest checkpoint"),
    ),
    _main(
        "Ranks, and how often their number has changed",
        "none",
        (metrics.WORLD_SIZE, "ranks"),
        (metrics.RESIZES, "changes"),
    ),
    _each_rank("Blocked by checkpoints", "percentunit", metrics.CHECKPOINT_SECONDS),
    _main("Time to commit a checkpoint", "s", (metrics.CHECKPOINT_COMMIT_SECONDS, "")),
    _by_label("Time of the last start, by phase", "s", metrics.START_SECONDS, "phase"),
    _main("Size of a checkpoint", "bytes", (metrics.CHECKPOINT_BYTES, "")),
)

BOARDS = (
    Board("training", "Training", _TRAINING),
    Board("data-path", "Data path", _DATA),
    Board("reliability", "Reliability and goodput", _RELIABILITY),
)
