"""What the Grafana boards show: Training, Data path, Reliability and goodput, as tables of panels.

Each board begins with numbers that answer its question at a glance, coloured by the thresholds of
the alerts; curves that tell why come below. Queries name metrics through `names`, so that a metric
which is renamed or dropped cannot stay behind on a board. Panels that only GPUs feed say so in
their text.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from svfap_dist.metrics import alerts, goodput, names
from svfap_dist.metrics.names import Metric

GPU_ONLY = "Only on GPUs."
Kind = Literal["lines", "stacked", "bars", "number"]
Limits = tuple[tuple[float | None, str], ...]  # (from this value on, colour); None: from the bottom


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel: queries are (PromQL, legend); the unit is one of Grafana's; width is of 24.

    limits colour a number and are lines in a chart. zero, top: whether the axis
    begins at zero, and its end. colours: of series,
    by legend.
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
    colours: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Board:
    """A dashboard and the name of its file."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def _high_is_bad(limit: float) -> Limits:
    return ((None, "green"), (limit / 2, "yellow"), (limit, "red"))


def _of(metric: Metric, matchers: str = "") -> str:
    return f'{metric.name}{{run=~"$run"{matchers}}}'


def _on_main(metric: Metric) -> str:
    """What rank 0 tells for the whole run; one series, on whatever port a restart put it."""
    matcher = ', rank="0"'
    return f"max by (run) ({_of(metric, matcher)})"


def _newest(metric: Metric, by: str) -> str:
    """A counter's rate or a gauge's value; one series, whatever restarts there were."""
    return _rate(metric, by) if metric.kind == "counter" else f"max by ({by}) ({_of(metric)})"


def _rate(metric: Metric, by: str) -> str:
    return f"sum by ({by}) (rate({_of(metric)}[$__rate_interval]))"


def _share(part: Metric, whole: Metric, by: str) -> str:
    """Of what is above zero: 0 / 0 would be NaN, and a chart with a NaN in it stays empty."""
    return f"{_rate(part, by)} / ({_rate(whole, by)} > 0)"


def _recorded(recording: alerts.Recording) -> str:
    return f'{recording.record}{{run=~"$run"}}'


def _number(title: str, unit: str, query: str, text: str, width: int = 4, **more) -> Panel:
    return Panel(title, "number", unit, ((query, "{{run}}"),), text, width, **more)


def _now(title: str, unit: str, metric: Metric, note: str = "", **more) -> Panel:
    return _number(title, unit, _on_main(metric), f"{metric.help} {note}".strip(), **more)


def _main(title: str, unit: str, *metrics: tuple[Metric, str], **more) -> Panel:
    queries = ((_on_main(metric), f"{{{{run}}}} {legend}".strip()) for metric, legend in metrics)
    return Panel(title, "lines", unit, tuple(queries), " ".join(m.help for m, _ in metrics), **more)


def _each_rank(title: str, unit: str, metric: Metric, note: str = "", **more) -> Panel:
    query = _newest(metric, "run, rank")
    text = f"{metric.help} {note}".strip()
    return Panel(title, "lines", unit, ((query, "{{run}} rank {{rank}}"),), text, **more)


_LAST_STEP = _number(
    "Since the last step",
    "s",
    f"time() - {_on_main(names.LAST_STEP_TIME)}",
    "Since a step was logged: near zero while the run goes on; SvfapNoStep fires at ten minutes.",
    limits=_high_is_bad(alerts.STANDSTILL_SECONDS),
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
    names.GOODPUT,
    "SvfapLowGoodput fires below 80 %.",
    limits=((None, "red"), (alerts.LOW_GOODPUT, "yellow"), (0.9, "green")),
)
_FIRING = 'ALERTS{alertstate="firing", alertname=~"Svfap.*", run=~"$run"}'
_ALARMS = _number(
    "Alerts firing",
    "none",
    f"count({_FIRING}) or vector(0)",
    "How many alerts fire; the board Reliability and goodput names them.",
    limits=((None, "green"), (1, "red")),
)


def _narrow(panel: Panel) -> Panel:
    return dataclasses.replace(panel, width=3)


def _phases() -> Panel:
    """Where a step's time goes, waiting for data included."""
    steps = f"({_rate(names.STEP_SECONDS, 'run')} > 0)"
    phases = f"{_rate(names.PHASE_SECONDS, 'run, phase')} / on (run) group_left () {steps}"
    waiting = _share(names.DATA_WAIT_SECONDS, names.STEP_SECONDS, "run")
    text = f"{names.PHASE_SECONDS.help} As shares of the steps' time; the rest is neither."
    queries = ((phases, "{{phase}}"), (waiting, "waiting for data"))
    colours = (("waiting for data", "red"),)
    return Panel(
        "Where a step's time goes", "stacked", "percentunit", queries, text, top=1, colours=colours
    )


_TRAINING = (
    _narrow(_LAST_STEP),
    _narrow(_now("Step", "none", names.STEP)),
    _narrow(_now("Epoch", "none", names.EPOCH)),
    _narrow(_now("Clips per second", "none", names.CLIPS_PER_SECOND)),
    _narrow(_WAITING),
    _narrow(_GOODPUT),
    _narrow(_ALARMS),
    _narrow(_now("MFU", "percentunit", names.MFU, GPU_ONLY)),
    _main("Loss", "none", (names.LOSS, "training"), (names.HELD_OUT_LOSS, "held out"), zero=False),
    _main("Gradient norm", "none", (names.GRAD_NORM, "")),
    _each_rank("Clips per second by rank", "none", names.CLIPS),
    _phases(),
    _main("Learning rate", "sci", (names.LEARNING_RATE, ""), decimals=2, width=8),
    _each_rank("Operations per second", "flops", names.FLOPS, width=8),
    _each_rank("Tokens per second", "short", names.TOKENS, width=8),
    _each_rank("GPU memory", "bytes", names.GPU_MEMORY, GPU_ONLY),
    _each_rank("GPU utilization", "percentunit", names.GPU_UTILIZATION, GPU_ONLY, top=1),
)

_WAIT = _share(names.DATA_WAIT_SECONDS, names.STEP_SECONDS, "run, rank")
_DECODING = _share(names.DECODE_SECONDS, names.CLIPS, "run, rank")
_BAD_NOW = f"60 * {_rate(names.BAD_SAMPLES, 'run, reason')}"
_DATA = (
    _WAITING,
    _number(
        "Batches ready, poorest rank",
        "none",
        f"min by (run) ({_of(names.BATCHES_READY)})",
        names.BATCHES_READY.help,
        limits=((None, "red"), (0.5, "yellow"), (1, "green")),
    ),
    _number(
        "Clips per second",
        "none",
        _recorded(alerts.CLIPS_RATE),
        "Of all ranks, over five minutes.",
    ),
    _number(
        "Read from the store",
        "Bps",
        _rate(names.FETCHED_BYTES, "run"),
        "Bytes of shards per second, of all ranks.",
    ),
    _number(
        "Decoding a clip",
        "s",
        _share(names.DECODE_SECONDS, names.CLIPS, "run"),
        "Time of one thread or worker.",
    ),
    _number(
        "Bad samples",
        "percentunit",
        f"sum by (run) ({_recorded(alerts.BAD_SHARE)}) or 0 * sum by (run) ({_of(names.STEP)})",
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
    _each_rank("Batches ready", "none", names.BATCHES_READY),
    _each_rank("Threads that fetch", "none", names.FETCH_SECONDS, "Per second: how many at once."),
    _each_rank(
        "Threads that decode", "none", names.DECODE_SECONDS, "Per second: how many at once."
    ),
    _each_rank("Read from the store by rank", "Bps", names.FETCHED_BYTES),
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
        f"{names.BAD_SAMPLES.help} Empty while there are none; quarantine.jsonl has their keys.",
        width=24,
    ),
)


def _in_five_minutes(metric: Metric) -> str:
    return f"sum(increase({_of(metric)}[5m]))"


def _spent_on(name: str) -> str:
    matcher = f', class="{name}"'
    return f"max by (run) ({_of(names.RUN_SECONDS, matcher)})"


_ATTEMPTS = _of(names.RESTARTS)
_RESTARTED = (
    f"sum(max by (run) (max_over_time({_ATTEMPTS}[5m])) "
    f"- min by (run) (min_over_time({_ATTEMPTS}[5m])))"
)
_ALERTS_BY_NAME = (
    f'sum by (alertname) ({_FIRING}) or label_replace(vector(0), "alertname", "none", "", "")'
)
_RELIABILITY = (
    _GOODPUT,
    _ALARMS,
    _now("Restarts", "none", names.RESTARTS),
    _number(
        "Age of newest checkpoint",
        "s",
        f"time() - {_on_main(names.CHECKPOINT_TIME)}",
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
            (_in_five_minutes(names.CHECKPOINT_FAILURES), "checkpoints not stored"),
            (_in_five_minutes(names.NON_FINITE), "non-finite steps"),
            (_in_five_minutes(names.BAD_SAMPLES), "bad samples"),
        ),
        "Restarts, checkpoints that were not stored, losses or gradients that were not finite, and "
        "bad samples; events.jsonl has the details.",
        colours=(
            ("restarts", "red"),
            ("checkpoints not stored", "purple"),
            ("non-finite steps", "blue"),
            ("bad samples", "orange"),
        ),
    ),
    Panel(
        "Alerts",
        "stacked",
        "none",
        ((_ALERTS_BY_NAME, "{{alertname}}"),),
        "Alerts that fire, by name; cause and remedy stand in the alert.",
    ),
    Panel(
        "Where the time of the run went",
        "stacked",
        "s",
        tuple((_spent_on(name), name) for name in goodput.CLASSES),
        names.RUN_SECONDS.help,
        colours=(
            ("productive", "green"),
            ("data_wait", "red"),
            ("checkpoint", "blue"),
            ("restart", "orange"),
            ("redone", "purple"),
            ("idle", "#808080"),
        ),
    ),
    _main(
        "Goodput over time",
        "percentunit",
        (names.GOODPUT, ""),
        limits=((None, "red"), (alerts.LOW_GOODPUT, "transparent")),
        top=1,
    ),
    _main(
        "Step, and step of the newest checkpoint",
        "none",
        (names.STEP, "step"),
        (names.CHECKPOINT_STEP, "newest checkpoint"),
    ),
    _each_rank("Standing still for checkpoints", "percentunit", names.CHECKPOINT_SECONDS),
)

BOARDS = (
    Board("training", "Training", _TRAINING),
    Board("data-path", "Data path", _DATA),
    Board("reliability", "Reliability and goodput", _RELIABILITY),
)
