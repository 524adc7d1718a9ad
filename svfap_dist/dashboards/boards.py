"""What the Grafana boards show: Training, Data path, Reliability and goodput, as tables of panels.

Each board begins with numbers that answer its question at a glance, coloured by the thresholds of
the alerts; curves that tell why come below. Queries name metrics through `names`, so that a metric
which is renamed or dropped cannot stay behind on a board. Panels that only GPUs feed say so in
their text.
"""

from __future__ import annotations

import dataclasses

from svfap_dist.dashboards import alerts, panels
from svfap_dist.dashboards.panels import GPU_ONLY, Board, Panel
from svfap_dist.telemetry import goodput, metrics
from svfap_dist.telemetry.metrics import Metric

_LAST_STEP = panels.number(
    "Since the last step",
    "s",
    f"time() - {panels.on_main(metrics.LAST_STEP_TIME)}",
    "Since a step was logged: near zero while the run goes on; SvfapNoStep fires at ten minutes.",
    limits=panels.high_is_bad(alerts.STANDSTILL_SECONDS),
)
_WAITING = panels.number(
    "Waiting for data",
    "percentunit",
    panels.recorded(alerts.DATA_WAIT_SHARE),
    "Share of the steps' time over five minutes; SvfapDataBound fires at 10 %.",
    limits=panels.high_is_bad(alerts.DATA_BOUND),
)
_GOODPUT = panels.now(
    "Goodput",
    "percentunit",
    metrics.GOODPUT,
    "SvfapLowGoodput fires below 80 %.",
    limits=((None, "red"), (alerts.LOW_GOODPUT, "yellow"), (0.9, "green")),
)
_FIRING = 'ALERTS{alertstate="firing", alertname=~"Svfap.*", run=~"$run"}'
_ALARMS = panels.number(
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
    steps = f"({panels.rate(metrics.STEP_SECONDS, 'run')} > 0)"
    phases = f"{panels.rate(metrics.PHASE_SECONDS, 'run, phase')} / on (run) group_left () {steps}"
    waiting = panels.share(metrics.DATA_WAIT_SECONDS, metrics.STEP_SECONDS, "run")
    text = f"{metrics.PHASE_SECONDS.help} As shares of the steps' time; the rest is neither."
    queries = ((phases, "{{phase}}"), (waiting, "waiting for data"))
    colours = (("waiting for data", "red"),)
    return Panel(
        "Where a step's time goes", "stacked", "percentunit", queries, text, top=1, colours=colours
    )


_TRAINING = (
    _narrow(_LAST_STEP),
    _narrow(panels.now("Step", "none", metrics.STEP)),
    _narrow(panels.now("Epoch", "none", metrics.EPOCH)),
    _narrow(panels.now("Clips per second", "none", metrics.CLIPS_PER_SECOND)),
    _narrow(_WAITING),
    _narrow(_GOODPUT),
    _narrow(_ALARMS),
    _narrow(panels.now("MFU", "percentunit", metrics.MFU, GPU_ONLY)),
    panels.main(
        "Loss", "none", (metrics.LOSS, "training"), (metrics.HELD_OUT_LOSS, "held out"), zero=False
    ),
    panels.main("Gradient norm", "none", (metrics.GRAD_NORM, "")),
    panels.each_rank("Clips per second by rank", "none", metrics.CLIPS),
    _phases(),
    panels.main("Learning rate", "sci", (metrics.LEARNING_RATE, ""), decimals=2, width=8),
    panels.each_rank("Operations per second", "flops", metrics.FLOPS, width=8),
    panels.each_rank("Tokens per second", "short", metrics.TOKENS, width=8),
    panels.each_rank("GPU memory", "bytes", metrics.GPU_MEMORY, GPU_ONLY),
    panels.each_rank("GPU utilization", "percentunit", metrics.GPU_UTILIZATION, GPU_ONLY, top=1),
)

_WAIT = panels.share(metrics.DATA_WAIT_SECONDS, metrics.STEP_SECONDS, "run, rank")
_DECODING = panels.share(metrics.DECODE_SECONDS, metrics.CLIPS, "run, rank")
_BAD_NOW = f"60 * {panels.rate(metrics.BAD_SAMPLES, 'run, reason')}"
_FAILED_REQUESTS = panels.of(metrics.STORAGE_REQUESTS, ', outcome=~"unreachable|refused"')
_DATA = (
    _WAITING,
    panels.number(
        "Batches ready, poorest rank",
        "none",
        f"min by (run) ({panels.of(metrics.BATCHES_READY)})",
        metrics.BATCHES_READY.help,
        limits=((None, "red"), (0.5, "yellow"), (1, "green")),
    ),
    panels.number(
        "Clips per second",
        "none",
        panels.recorded(alerts.CLIPS_RATE),
        "Of all ranks, over five minutes.",
    ),
    panels.number(
        "Read from the store",
        "Bps",
        panels.rate(metrics.FETCHED_BYTES, "run"),
        "Bytes of shards per second, of all ranks.",
    ),
    panels.number(
        "Decoding a clip",
        "s",
        panels.share(metrics.DECODE_SECONDS, metrics.CLIPS, "run"),
        "Time of one thread or worker.",
    ),
    panels.number(
        "Bad samples",
        "percentunit",
        f"sum by (run) ({panels.recorded(alerts.BAD_SHARE)}) or 0 * {panels.on_main(metrics.STEP)}",
        "Share of the samples of the last hour that could not be used; SvfapQuarantineGrowing "
        "fires at 0.2 %.",
        limits=panels.high_is_bad(alerts.MANY_BAD),
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
    panels.each_rank("Batches ready", "none", metrics.BATCHES_READY),
    panels.each_rank(
        "Threads that fetch", "none", metrics.FETCH_SECONDS, "Per second: how many at once."
    ),
    panels.each_rank(
        "Threads that decode", "none", metrics.DECODE_SECONDS, "Per second: how many at once."
    ),
    panels.each_rank("Read from the store by rank", "Bps", metrics.FETCHED_BYTES),
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
    panels.by_label("Storage bytes per second", "Bps", metrics.STORAGE_BYTES, "operation"),
    panels.by_label(
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
    panels.by_label(
        "Storage requests sent again, per second",
        "none",
        metrics.STORAGE_RETRIES,
        "operation",
        width=8,
    ),
)


def _in_five_minutes(metric: Metric) -> str:
    return f"sum(increase({panels.of(metric)}[5m]))"


def _spent_on(name: str) -> str:
    matcher = f', class="{name}"'
    return f"max by (run) ({panels.of(metrics.RUN_SECONDS, matcher)})"


_ATTEMPTS = panels.of(metrics.RESTARTS)
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
    panels.now("Restarts", "none", metrics.RESTARTS),
    panels.number(
        "Age of newest checkpoint",
        "s",
        f"time() - {panels.on_main(metrics.CHECKPOINT_TIME)}",
        "SvfapCheckpointTooOld fires at two hours.",
        limits=panels.high_is_bad(alerts.OLD_CHECKPOINT_SECONDS),
    ),
    _LAST_STEP,
    panels.number(
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
            (_in_five_minutes(metrics.NON_FINITE), "non-finite steps"),
            (_in_five_minutes(metrics.BAD_SAMPLES), "bad samples"),
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
        metrics.RUN_SECONDS.help,
        colours=(
            ("productive", "green"),
            ("data_wait", "red"),
            ("checkpoint", "blue"),
            ("restart", "orange"),
            ("redone", "purple"),
            ("idle", "#808080"),
        ),
    ),
    panels.main(
        "Goodput over time",
        "percentunit",
        (metrics.GOODPUT, ""),
        limits=((None, "red"), (alerts.LOW_GOODPUT, "transparent")),
        top=1,
    ),
    panels.main(
        "Step, and step of the newest checkpoint",
        "none",
        (metrics.STEP, "step"),
        (metrics.CHECKPOINT_STEP, "newest checkpoint"),
    ),
    panels.each_rank("Standing still for checkpoints", "percentunit", metrics.CHECKPOINT_SECONDS),
    panels.main("Time to commit a checkpoint", "s", (metrics.CHECKPOINT_COMMIT_SECONDS, "")),
    panels.main("Size of a checkpoint", "bytes", (metrics.CHECKPOINT_BYTES, "")),
)

BOARDS = (
    Board("training", "Training", _TRAINING),
    Board("data-path", "Data path", _DATA),
    Board("reliability", "Reliability and goodput", _RELIABILITY),
)
