"""What the Grafana boards show: Training, Data path, Reliability and goodput, as tables of panels.

Queries name metrics through `names`, so that a metric which is renamed or dropped cannot stay
behind on a board. Panels that only GPUs feed say so in their text.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from svfap_dist.metrics import alerts, names
from svfap_dist.metrics.names import Metric

GPU_ONLY = "Only on GPUs."
Kind = Literal["lines", "stacked", "number"]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A panel: queries are (PromQL, legend); the unit is one of Grafana's; width is of 24."""

    title: str
    kind: Kind
    unit: str
    queries: tuple[tuple[str, str], ...]
    text: str
    width: int = 12


@dataclasses.dataclass(frozen=True)
class Board:
    """A dashboard and the name of its file."""

    name: str
    title: str
    panels: tuple[Panel, ...]


def _of(metric: Metric, matchers: str = "") -> str:
    return f'{metric.name}{{run=~"$run"{matchers}}}'


def _on_main(metric: Metric) -> str:
    """What rank 0 tells for the whole run."""
    return _of(metric, ', rank="0"')


def _rate(metric: Metric, by: str) -> str:
    return f"sum by ({by}) (rate({_of(metric)}[$__rate_interval]))"


def _number(title: str, unit: str, query: str, text: str) -> Panel:
    return Panel(title, "number", unit, ((query, "{{run}}"),), text, 6)


def _main(title: str, unit: str, *metrics: Metric) -> Panel:
    queries = ((_on_main(metric), f"{metric.name} {{{{run}}}}") for metric in metrics)
    return Panel(title, "lines", unit, tuple(queries), " ".join(m.help for m in metrics))


def _each_rank(title: str, unit: str, metric: Metric, note: str = "") -> Panel:
    query = _rate(metric, "run, rank") if metric.kind == "counter" else _of(metric)
    text = f"{metric.help} {note}".strip()
    return Panel(title, "lines", unit, ((query, "{{run}} rank {{rank}}"),), text)


def _by_label(title: str, kind: Kind, unit: str, metric: Metric) -> Panel:
    by = ", ".join(("run", *metric.labels))
    query = _rate(metric, by) if metric.kind == "counter" else _of(metric)
    legend = " ".join(f"{{{{{label}}}}}" for label in metric.labels)
    return Panel(title, kind, unit, ((query, legend),), metric.help)


def _now(title: str, unit: str, metric: Metric, note: str = "") -> Panel:
    return _number(title, unit, _on_main(metric), f"{metric.help} {note}".strip())


_TRAINING = (
    _now("Step", "short", names.STEP),
    _now("Clips per second", "short", names.CLIPS_PER_SECOND),
    _now("Epoch", "short", names.EPOCH),
    _now("MFU", "percentunit", names.MFU, GPU_ONLY),
    _main("Loss", "short", names.LOSS, names.HELD_OUT_LOSS),
    _main("Gradient norm", "short", names.GRAD_NORM),
    _main("Learning rate", "sci", names.LEARNING_RATE),
    _each_rank("Clips per second by rank", "short", names.CLIPS),
    _by_label("Phases of a step, seconds per second", "stacked", "s", names.PHASE_SECONDS),
    _each_rank("Operations per second", "flops", names.FLOPS),
    _each_rank("Tokens per second", "short", names.TOKENS),
    _each_rank("GPU memory", "bytes", names.GPU_MEMORY, GPU_ONLY),
    _each_rank("GPU utilization", "percentunit", names.GPU_UTILIZATION, GPU_ONLY),
)

_WAIT = f"{_rate(names.DATA_WAIT_SECONDS, 'run, rank')} / {_rate(names.STEP_SECONDS, 'run, rank')}"
_DATA = (
    _number(
        "Waiting for data",
        "percentunit",
        f'{alerts.DATA_WAIT_SHARE.record}{{run=~"$run"}}',
        "Share of the steps' time over five minutes; SvfapDataBound fires at 10 %.",
    ),
    _number(
        "Bad samples",
        "percentunit",
        f'{alerts.BAD_SHARE.record}{{run=~"$run"}} or on (run) 0 * {_of(names.STEP)}',
        "Share of the samples of the last hour that could not be used.",
    ),
    Panel(
        "Waiting for data by rank",
        "lines",
        "percentunit",
        ((_WAIT, "{{run}} rank {{rank}}"),),
        names.DATA_WAIT_SECONDS.help,
    ),
    _each_rank("Fetching, thread seconds per second", "s", names.FETCH_SECONDS),
    _each_rank("Decoding, thread seconds per second", "s", names.DECODE_SECONDS),
    _each_rank("Bytes fetched per second", "Bps", names.FETCHED_BYTES),
    _each_rank("Batches ready", "short", names.BATCHES_READY),
    _by_label("Bad samples per second by reason", "stacked", "short", names.BAD_SAMPLES),
    _by_label("Storage requests per second", "lines", "reqps", names.STORAGE_REQUESTS),
    _by_label("Storage bytes per second", "lines", "Bps", names.STORAGE_BYTES),
    _by_label("Storage requests sent again, per second", "lines", "reqps", names.STORAGE_RETRIES),
    _each_rank("Clips per second by rank", "short", names.CLIPS),
)

_RELIABILITY = (
    _now("Goodput", "percentunit", names.GOODPUT),
    _now("Restarts", "short", names.RESTARTS),
    _number(
        "Age of the newest checkpoint",
        "s",
        f"time() - {_on_main(names.CHECKPOINT_TIME)}",
        "SvfapCheckpointTooOld fires at two hours.",
    ),
    _number(
        "Since the last logged step",
        "s",
        f"time() - {_on_main(names.LAST_STEP_TIME)}",
        "SvfapNoStep fires at ten minutes.",
    ),
    _by_label("Where the time of the run went", "stacked", "s", names.RUN_SECONDS),
    _main("Goodput over time", "percentunit", names.GOODPUT),
    _each_rank("Standing still for checkpoints, seconds per second", "s", names.CHECKPOINT_SECONDS),
    _main("Newest checkpoint", "short", names.CHECKPOINT_STEP, names.STEP),
    _main("Time to commit a checkpoint", "s", names.CHECKPOINT_COMMIT_SECONDS),
    _main("Size of a checkpoint", "bytes", names.CHECKPOINT_BYTES),
    _each_rank("Failed checkpoints per second", "short", names.CHECKPOINT_FAILURES),
    _each_rank("Non-finite losses and gradients", "short", names.NON_FINITE),
    Panel(
        "Ranks that answer",
        "lines",
        "short",
        (('sum by (run) (up{job="svfap_ranks", run=~"$run"})', "{{run}}"),),
        "Ranks that Prometheus could scrape.",
    ),
)

BOARDS = (
    Board("training", "Training", _TRAINING),
    Board("data-path", "Data path", _DATA),
    Board("reliability", "Reliability and goodput", _RELIABILITY),
)
