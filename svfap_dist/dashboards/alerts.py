"""Alerts and recording rules of Prometheus, each alert with its cause and remedy.

In: the table of metrics. Out: `monitoring/prometheus/rules.yml`, written by `svfap dashboards`.
Thresholds are defined here, with the reason for each; boards take them from here.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from svfap_dist.telemetry import metrics

_BY_RUN = "by (run)"
NO_STEP_SECONDS = 600  # without a logged step; every few steps are logged, evaluations are short
DATA_BOUND = 0.1  # share of the steps' time: above, too much GPU time is wasted
LOW_GOODPUT = 0.8
OLD_CHECKPOINT_SECONDS = 7200  # the work that a crash would lose
STRAGGLER = 0.1  # share of the steps' time: above, one rank wastes too much of all others'
MANY_BAD = 0.002  # share of the samples; an intact data set has almost none


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recording rule: a query that Prometheus evaluates in advance and stores under a name."""

    record: str
    expr: str


@dataclasses.dataclass(frozen=True)
class Alert:
    """One alert. hold: time that the condition must hold before the alert fires."""

    name: str
    expr: str
    hold: str
    severity: Literal["page", "ticket"]
    summary: str
    cause: str
    remedy: str


def _rate(metric: metrics.Metric, window: str = "5m") -> str:
    return f"sum {_BY_RUN} (rate({metric.name}[{window}]))"


# Only where the denominator is above zero: 0 / 0 = NaN before the first step would break charts.
DATA_WAIT_SHARE = Recording(
    "svfap:data_wait:share5m",
    f"{_rate(metrics.DATA_WAIT_SECONDS)} / ({_rate(metrics.STEP_SECONDS)} > 0)",
)
CLIPS_RATE = Recording("svfap:clips:rate5m", _rate(metrics.CLIPS))
BAD_SHARE = Recording(
    "svfap:bad_samples:share1h",
    f"{_rate(metrics.BAD_SAMPLES, '1h')} / ({_rate(metrics.CLIPS, '1h')} > 0)",
)
_FAILED_REQUESTS = (
    f'sum {_BY_RUN} (rate({metrics.STORAGE_REQUESTS.name}{{outcome=~"unreachable|refused"}}[5m]))'
)
STORAGE_FAILURE_SHARE = Recording(
    "svfap:storage_failures:share5m",
    f"{_FAILED_REQUESTS} / ({_rate(metrics.STORAGE_REQUESTS)} > 0)",
)
RECORDINGS = (DATA_WAIT_SHARE, CLIPS_RATE, BAD_SHARE, STORAGE_FAILURE_SHARE)

ALERTS = (
    Alert(
        "SvfapNoStep",
        f"time() - max {_BY_RUN} ({metrics.LAST_STEP_TIME.name}) > {NO_STEP_SECONDS}",
        "1m",
        "page",
        "Run {{ $labels.run }} has logged no step for ten minutes.",
        "A rank hangs in a collective, the store does not answer, or a checkpoint is very slow.",
        "Look at the last lines of events.jsonl and at the data-path board. Stop the run (it "
        "saves a checkpoint; the watchdog ends hung ranks after train.stall_seconds, unless that "
        "is 0), start it again.",
    ),
    Alert(
        "SvfapStalled",
        f"max {_BY_RUN} (max_over_time({metrics.STALLS.name}[30m])) - "
        f"min {_BY_RUN} (min_over_time({metrics.STALLS.name}[30m])) > 0",
        "0m",
        "ticket",
        "Run {{ $labels.run }} made no progress, and its ranks were restarted.",
        "A rank was stopped, or hung in the store, a decoder, a collective or the device.",
        "The stall event of events.jsonl names the rank and the place, stalls/ in the run's folder "
        "has the stacks of all ranks. If it is always the same host, remove it.",
    ),
    Alert(
        "SvfapStraggler",
        f"max by (run, rank) ({metrics.STRAGGLER_COST.name}) > {STRAGGLER}",
        "10m",
        "ticket",
        "Rank {{ $labels.rank }} of run {{ $labels.run }} costs {{ $value | humanizePercentage }} "
        "of the time of all ranks.",
        "Its node is slower: a hot or shared GPU or CPU, other processes, slow reads.",
        "Compare *Waiting for data by rank* and *Own time by rank*: if only the latter is higher, "
        "look at clocks, temperature and other processes of its node, or replace it.",
    ),
    Alert(
        "SvfapRankGone",
        'up{job="svfap_ranks"} == 0',
        "2m",
        "page",
        "Rank at {{ $labels.instance }} of run {{ $labels.run }} does not answer.",
        "Its process died or its node is gone; Ray Train restarts the group.",
        "If SvfapRestartLoop follows or the run stays down, look at the node and at Ray's logs.",
    ),
    Alert(
        "SvfapDataBound",
        f"{DATA_WAIT_SHARE.record} > {DATA_BOUND}",
        "10m",
        "ticket",
        "Run {{ $labels.run }} waits for data {{ $value | humanizePercentage }} of its time.",
        "Decoding or the store is slower than the model.",
        "If decode time grows, shard with --profile train or raise data.decode_workers; if fetch "
        "time grows, set data.cache_dir or look at the store. `svfap bench data` measures both.",
    ),
    Alert(
        "SvfapNonFinite",
        f"{metrics.ENDED_NOT_FINITE.name} > 0",
        "0m",
        "page",
        "Run {{ $labels.run }} ended because losses or gradients were not finite.",
        "A learning rate that is too high, or broken clips.",
        "The error names steps and clips; weights are untouched. Look at the clips, lower optim.lr "
        "or set optim.clip_grad_norm, and run the same command again.",
    ),
    Alert(
        "SvfapUpdatesSkipped",
        f"sum {_BY_RUN} (increase({metrics.NON_FINITE.name}[30m])) > 0",
        "0m",
        "ticket",
        "Run {{ $labels.run }} skipped updates whose loss or gradient is not finite.",
        "A broken clip, a learning rate that is too high, or a faulty device.",
        "The skip events of events.jsonl name steps and clips. The run continues; "
        "health.max_skipped in a row are allowed.",
    ),
    Alert(
        "SvfapRolledBack",
        f"max {_BY_RUN} (max_over_time({metrics.ROLLBACKS.name}[30m])) - "
        f"min {_BY_RUN} (min_over_time({metrics.ROLLBACKS.name}[30m])) > 0",
        "0m",
        "page",
        "Run {{ $labels.run }} returned to a checkpoint and passes over the steps after it.",
        "More than health.max_skipped losses or gradients in a row were not finite, or the loss "
        "spiked.",
        "The rollback event of events.jsonl names the steps, the skip events the clips. After "
        "health.max_rollbacks without progress the run ends: lower optim.lr or set "
        "optim.clip_grad_norm.",
    ),
    Alert(
        "SvfapLossSpike",
        f"sum {_BY_RUN} (increase({metrics.LOSS_SPIKES.name}[30m])) > 0",
        "0m",
        "ticket",
        "The loss of run {{ $labels.run }} spiked.",
        "Unusual clips, or a learning rate that is too high.",
        "Look at the loss and at the spike events of events.jsonl. With health.spike_action = "
        '"roll back" the run passes over such steps.',
    ),
    Alert(
        "SvfapRestartLoop",
        # Over all series of a run: a restarted rank may listen on another port.
        f"max {_BY_RUN} (max_over_time({metrics.RESTARTS.name}[30m])) - "
        f"min {_BY_RUN} (min_over_time({metrics.RESTARTS.name}[30m])) >= 3",
        "0m",
        "page",
        "Run {{ $labels.run }} was restarted three times within half an hour.",
        "A node that keeps failing, memory that runs out, or a shard that crashes a decoder.",
        "Read the stop events of events.jsonl and Ray's logs; remove the node.",
    ),
    Alert(
        "SvfapCheckpointTooOld",
        f"time() - max {_BY_RUN} ({metrics.CHECKPOINT_TIME.name}) > {OLD_CHECKPOINT_SECONDS}",
        "5m",
        "page",
        "The newest checkpoint of run {{ $labels.run }} is over two hours old.",
        "Uploads fail or hang, or train.checkpoint_every is too long for this speed.",
        "Look for checkpoint_failed in events.jsonl; check the store's free space and permissions; "
        "lower train.checkpoint_every.",
    ),
    Alert(
        "SvfapCheckpointFailed",
        f"increase({metrics.CHECKPOINT_FAILURES.name}[30m]) > 0",
        "0m",
        "ticket",
        "A checkpoint of run {{ $labels.run }} was not stored; a second in a row ends the run.",
        "The store refused or lost an upload.",
        "See checkpoint_failed in events.jsonl; check free space, permissions and quota.",
    ),
    Alert(
        "SvfapStorageFailing",
        f"{STORAGE_FAILURE_SHARE.record} > 0.05",
        "5m",
        "ticket",
        "{{ $value | humanizePercentage }} of the storage requests of run {{ $labels.run }} fail.",
        "The store is down, overloaded or full, or credentials have expired.",
        "The run's log names the request and the store's answer; `svfap_storage_retries_total` "
        "shows whether it was busy before. Uploads are tried again at the next checkpoint; a "
        "second failure in a row ends the run.",
    ),
    Alert(
        "SvfapQuarantineGrowing",
        f"{BAD_SHARE.record} > {MANY_BAD}",
        "10m",
        "ticket",
        "{{ $value | humanizePercentage }} of the samples of run {{ $labels.run }} are bad.",
        "Shards are damaged, or contain videos that cannot be decoded.",
        "See quarantine.jsonl for keys and reasons; `svfap shards verify` on data.url. The run "
        "ends at data.max_bad_fraction.",
    ),
    Alert(
        "SvfapLowGoodput",
        f"{metrics.GOODPUT.name} < {LOW_GOODPUT}",
        "30m",
        "ticket",
        "Less than 80 % of the time of run {{ $labels.run }} went into steps that count.",
        "Restarts, redone work, waiting for data or for checkpoints.",
        "The board `Reliability and goodput` shows which class grows.",
    ),
)


def rules() -> dict[str, Any]:
    """Return the content of Prometheus' rule file."""
    return {
        "groups": [
            {"name": "svfap_recordings", "rules": [dataclasses.asdict(r) for r in RECORDINGS]},
            {"name": "svfap_alerts", "rules": [_rule(alert) for alert in ALERTS]},
        ]
    }


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.hold,
        "labels": {"severity": alert.severity},
        "annotations": {key: getattr(alert, key) for key in ("summary", "cause", "remedy")},
    }
