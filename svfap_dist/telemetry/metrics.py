"""The table of Prometheus metrics: what the exporter serves and what boards and alerts may name.

To add a metric, add a row here and set it in `recorder`. A windowed metric (`over_ranks`) is
observed by `Recorder.count_step` at every step; exporter, metrics.jsonl and windows follow from its
row. Base units; the names of counters end in `_total`. Every series has the labels `run` and
`rank`, and those of its row.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

COMMON_LABELS = ("run", "rank")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A row of the table.

    column: field of metrics.jsonl with its value. over_ranks: how its values in a window (the steps
    between two log steps or checkpoints) are combined over the ranks; "": it is not windowed. A
    counter's window has the sum over the steps, a gauge's the mean.
    """

    name: str
    help: str
    labels: tuple[str, ...] = ()
    column: str = ""
    over_ranks: Literal["", "sum", "max", "min"] = ""

    @property
    def is_counter(self) -> bool:
        """Return whether it is a counter; else it is a gauge."""
        return self.name.endswith("_total")


PROMETHEUS_METRICS: dict[str, Metric] = {}


def declare(
    name: str,
    help: str,
    *labels: str,
    column: str = "",
    over_ranks: Literal["", "sum", "max", "min"] = "",
) -> Metric:
    """Add a row to PROMETHEUS_METRICS and return it.

    Args:
        name: Name of the series; `..._total` makes it a counter, all others are gauges.
        help: One sentence.
        *labels: Labels besides COMMON_LABELS.
        column: See `Metric`.
        over_ranks: See `Metric`.
    """
    PROMETHEUS_METRICS[name] = Metric(name, help, labels, column, over_ranks)
    return PROMETHEUS_METRICS[name]


def windowed_metrics() -> list[Metric]:
    """Return the rows that are observed at every step."""
    return [metric for metric in PROMETHEUS_METRICS.values() if metric.over_ranks]


STEP = declare("svfap_step", "Optimizer steps completed.", column="step")
EPOCH = declare("svfap_epoch", "Epoch of the last step, from 0.", column="epoch")
LOSS = declare("svfap_loss", "Mean loss of the last logged step, over all ranks.", column="loss")
HELD_OUT_LOSS = declare("svfap_held_out_loss", "Mean loss on the held-out clips, over all ranks.")
VALIDATION_SCORE = declare(
    "svfap_validation_score",
    "Score of a fine-tuning's validation samples (UAR or CCC); absent without finetune.validation.",
    "score",
)
PROBE_UAR = declare(
    "svfap_probe_uar_ratio",
    "Unweighted average recall of simple classifiers on frozen features; absent without probe.url.",
    "classifier",
)
PROBE_SECONDS = declare("svfap_probe_seconds", "Time that training waited for the last probe.")
PROBE_FAILURES = declare("svfap_probe_failures_total", "Probes of this attempt that failed.")
LEARNING_RATE = declare("svfap_learning_rate", "Learning rate of the last step.", column="lr")
GRAD_NORM = declare(
    "svfap_grad_norm", "Norm of the last step's gradient before clipping.", column="grad_norm"
)
LAST_STEP_TIME = declare(
    "svfap_last_step_timestamp_seconds",
    "Unix time of the last logged step; alert when it stops advancing.",
    column="time",
)
CLIPS = declare("svfap_clips_total", "Clips this rank trained on.", over_ranks="sum")
STEP_SECONDS = declare(
    "svfap_step_seconds_total", "Wall time of this rank's steps, waits included.", over_ranks="max"
)
DATA_WAIT_SECONDS = declare(
    "svfap_data_wait_seconds_total",
    "Time this rank's steps waited for a batch.",
    column="data_wait_seconds",
    over_ranks="max",
)
OWN_SECONDS = declare(
    "svfap_own_seconds_total",
    "Time of this rank's own work in its steps: waiting for a batch, forward, backward; not the "
    "waiting for other ranks.",
    column="own_seconds",
    over_ranks="max",
)
STRAGGLER_COST = declare(
    "svfap_straggler_cost_ratio",
    "Share of the steps' time that this rank costs: by how much its own time is above the median "
    "of all ranks.",
)
FETCH_SECONDS = declare(
    "svfap_fetch_seconds_total",
    "Thread time this rank spent reading shards.",
    column="fetch_seconds",
    over_ranks="sum",
)
DECODE_SECONDS = declare(
    "svfap_decode_seconds_total",
    "Time this rank's threads or workers spent decoding videos.",
    column="decode_seconds",
    over_ranks="sum",
)
FETCHED_BYTES = declare(
    "svfap_fetched_bytes_total",
    "Bytes of shards this rank read from the store.",
    column="bytes_fetched",
    over_ranks="sum",
)
BATCHES_READY = declare(
    "svfap_batches_ready",
    "Batches ready when one was requested, mean since the last logged step; 0: starved.",
    column="batches_ready",
    over_ranks="min",
)
BAD_SAMPLES = declare(
    "svfap_bad_samples_total",
    "Samples of this rank that could not be used: damaged, undecodable, hung, crashed, ...",
    "reason",
)
SOURCE_CLIPS = declare(
    "svfap_source_clips_total", "Clips of each source that this rank trained on.", "source"
)
SOURCE_LOSS = declare(
    "svfap_source_loss",
    "Mean loss of each source's clips since the last log step, over all ranks; absent without a "
    "mixture.",
    "source",
)
SOURCE_BAD_SAMPLES = declare(
    "svfap_source_bad_samples_total",
    "Samples of each source that could not be used on this rank.",
    "source",
)
CHECKPOINT_STEP = declare("svfap_checkpoint_step", "Step of the newest committed checkpoint.")
CHECKPOINT_SECONDS = declare(
    "svfap_checkpoint_seconds_total", "Time that training was blocked by checkpoints."
)
CHECKPOINT_FAILURES = declare(
    "svfap_checkpoint_failures_total", "Checkpoints that could not be uploaded."
)
CHECKPOINT_COMMIT_SECONDS = declare(
    "svfap_checkpoint_commit_seconds",
    "Time from the start of saving the newest checkpoint to its COMMIT, while training continues.",
)
CHECKPOINT_BYTES = declare(
    "svfap_checkpoint_bytes", "Size of the newest checkpoint, files of all ranks."
)
STORAGE_REQUESTS = declare(
    "svfap_storage_requests_total",
    "Requests of this rank to stores, local disks included, by operation and outcome.",
    "operation",
    "outcome",
)
STORAGE_BYTES = declare(
    "svfap_storage_bytes_total",
    "Bytes of files that this rank read from and wrote to stores.",
    "operation",
)
STORAGE_RETRIES = declare(
    "svfap_storage_retries_total",
    "Requests that the S3 client of this rank retried: the store was busy or did not answer.",
    "operation",
)
RUN_SECONDS = declare(
    "svfap_run_seconds", "Wall time of the run so far, over all attempts, by class of use.", "class"
)
GOODPUT = declare(
    "svfap_goodput_ratio",
    "Share of the run's wall time, over all attempts, in which kept steps were computed.",
)
CHECKPOINT_TIME = declare(
    "svfap_checkpoint_timestamp_seconds", "Unix time at which the newest checkpoint was committed."
)
PHASE_SECONDS = declare(
    "svfap_phase_seconds_total",
    "Time of this rank's steps by phase (forward, backward, exchange of gradients, optimizer), by "
    "the device's clock.",
    "phase",
)
TOKENS = declare("svfap_tokens_total", "Tokens this rank trained on, seen and predicted.")
FLOPS = declare(
    "svfap_flops_total",
    "Floating-point operations of this rank's training steps, computed from the architecture.",
)
MFU = declare(
    "svfap_mfu_ratio",
    "Model FLOPs utilization: operations per second over the device's peak; absent if unknown.",
)
NON_FINITE = declare(
    "svfap_non_finite_total",
    "Updates that this attempt left out, since a loss or gradient was not finite.",
)
ENDED_NOT_FINITE = declare(
    "svfap_ended_not_finite", "1 once losses or gradients that are not finite have ended the run."
)
LOSS_SPIKES = declare(
    "svfap_loss_spikes_total", "Spikes of the loss in this attempt; see health.spike_zscore."
)
ROLLBACKS = declare(
    "svfap_rollbacks", "Times the run returned to a checkpoint and passed over steps after it."
)
GPU_MEMORY = declare("svfap_gpu_memory_bytes", "Memory of this rank's GPU that torch holds.")
GPU_UTILIZATION = declare(
    "svfap_gpu_utilization_ratio", "Share of time in which this rank's GPU ran kernels, by NVML."
)
CLIPS_PER_SECOND = declare(
    "svfap_clips_per_second",
    "Clips of all ranks per second since the last log step.",
    column="clips_per_second",
)
STALLS = declare("svfap_stalls", "Attempts before this one that ended because a rank had stalled.")
RESTARTS = declare("svfap_restarts", "Attempts at the run before this one.")
WORLD_SIZE = declare("svfap_world_size", "Ranks of the run now.")
RESIZES = declare("svfap_resizes", "Times that the run has continued with another number of ranks.")
START_SECONDS = declare(
    "svfap_start_seconds",
    "Time of the attempt's start by phase; of a restart, from the last log row to the first step.",
    "phase",
)
