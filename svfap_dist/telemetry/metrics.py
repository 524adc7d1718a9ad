"""Every metric, declared once: what the exporter serves, and what dashboards and alerts may name.

Base units; counters end in `_total`. Every series has the labels `run` and `rank`; further labels
are listed with the metric.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

COMMON_LABELS = ("run", "rank")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric: its Prometheus name and type, unit, and a sentence of help."""

    name: str
    kind: Literal["gauge", "counter"]
    unit: str  # "" for plain numbers
    help: str
    labels: tuple[str, ...] = ()


STEP = Metric("svfap_step", "gauge", "", "Optimizer steps completed.")
EPOCH = Metric("svfap_epoch", "gauge", "", "Epoch of the last step, from 0.")
LOSS = Metric("svfap_loss", "gauge", "", "Mean loss of the last logged step, over all ranks.")
HELD_OUT_LOSS = Metric(
    "svfap_held_out_loss", "gauge", "", "Mean loss on the held-out clips, over all ranks."
)
LEARNING_RATE = Metric("svfap_learning_rate", "gauge", "", "Learning rate of the last step.")
GRAD_NORM = Metric(
    "svfap_grad_norm", "gauge", "", "Norm of the last step's gradient before clipping."
)
LAST_STEP_TIME = Metric(
    "svfap_last_step_timestamp_seconds",
    "gauge",
    "seconds",
    "Unix time of the last logged step; alert when it stands still.",
)
CLIPS = Metric("svfap_clips_total", "counter", "", "Clips this rank trained on.")
STEP_SECONDS = Metric(
    "svfap_step_seconds_total",
    "counter",
    "seconds",
    "Wall time of this rank's steps, waits included.",
)
DATA_WAIT_SECONDS = Metric(
    "svfap_data_wait_seconds_total",
    "counter",
    "seconds",
    "Time this rank's steps waited for a batch.",
)
FETCH_SECONDS = Metric(
    "svfap_fetch_seconds_total", "counter", "seconds", "Thread time this rank spent reading shards."
)
DECODE_SECONDS = Metric(
    "svfap_decode_seconds_total",
    "counter",
    "seconds",
    "Time this rank's threads or workers spent decoding videos.",
)
FETCHED_BYTES = Metric(
    "svfap_fetched_bytes_total",
    "counter",
    "bytes",
    "Bytes of shards this rank read from the store.",
)
BATCHES_READY = Metric(
    "svfap_batches_ready",
    "gauge",
    "",
    "Batches that lay ready when one was asked for, mean since the last logged step; 0: starved.",
)
BAD_SAMPLES = Metric(
    "svfap_bad_samples_total",
    "counter",
    "",
    "Samples of this rank that could not be used: damaged, undecodable, hung, crashed, ...",
    ("reason",),
)
CHECKPOINT_STEP = Metric(
    "svfap_checkpoint_step", "gauge", "", "Step of the newest committed checkpoint."
)
CHECKPOINT_SECONDS = Metric(
    "svfap_checkpoint_seconds_total",
    "counter",
    "seconds",
    "Time that training stood still for checkpoints.",
)
CHECKPOINT_FAILURES = Metric(
    "svfap_checkpoint_failures_total", "counter", "", "Checkpoints that could not be uploaded."
)
CHECKPOINT_COMMIT_SECONDS = Metric(
    "svfap_checkpoint_commit_seconds",
    "gauge",
    "seconds",
    "From the start of saving the newest checkpoint to its COMMIT, training beside it.",
)
CHECKPOINT_BYTES = Metric(
    "svfap_checkpoint_bytes", "gauge", "bytes", "Size of the newest checkpoint, all ranks' files."
)
STORAGE_REQUESTS = Metric(
    "svfap_storage_requests_total",
    "counter",
    "",
    "Requests of this rank to stores, local disks included, by what was asked and how it ended.",
    ("operation", "outcome"),
)
STORAGE_BYTES = Metric(
    "svfap_storage_bytes_total",
    "counter",
    "bytes",
    "Bytes of files that this rank read from and wrote to stores.",
    ("operation",),
)
STORAGE_RETRIES = Metric(
    "svfap_storage_retries_total",
    "counter",
    "",
    "Requests that the S3 client of this rank sent again: the store was busy or gave no answer.",
    ("operation",),
)
RUN_SECONDS = Metric(
    "svfap_run_seconds",
    "gauge",
    "seconds",
    "Wall time of the run so far, over all attempts, by what it was spent on.",
    ("class",),
)
GOODPUT = Metric(
    "svfap_goodput_ratio",
    "gauge",
    "",
    "Share of the run's wall time, over all attempts, in which kept steps were computed.",
)
CHECKPOINT_TIME = Metric(
    "svfap_checkpoint_timestamp_seconds",
    "gauge",
    "seconds",
    "Unix time at which the newest checkpoint was committed.",
)
PHASE_SECONDS = Metric(
    "svfap_phase_seconds_total",
    "counter",
    "seconds",
    "Time of this rank's steps by phase: forward, backward, optimizer; by the device's clock.",
    ("phase",),
)
TOKENS = Metric(
    "svfap_tokens_total", "counter", "", "Tokens this rank trained on, seen and predicted."
)
FLOPS = Metric(
    "svfap_flops_total",
    "counter",
    "",
    "Floating-point operations of this rank's training steps, counted on paper.",
)
MFU = Metric(
    "svfap_mfu_ratio",
    "gauge",
    "",
    "Model FLOPs utilization: operations per second over the device's peak; absent if unknown.",
)
NON_FINITE = Metric(
    "svfap_non_finite_total",
    "counter",
    "",
    "Steps whose loss or gradient was not finite; the first one ends the run.",
)
GPU_MEMORY = Metric(
    "svfap_gpu_memory_bytes", "gauge", "bytes", "Memory of this rank's GPU that torch holds."
)
GPU_UTILIZATION = Metric(
    "svfap_gpu_utilization_ratio",
    "gauge",
    "",
    "Share of time in which this rank's GPU ran kernels, as NVML tells.",
)
CLIPS_PER_SECOND = Metric(
    "svfap_clips_per_second", "gauge", "", "Clips of all ranks per second since the last log step."
)
RESTARTS = Metric("svfap_restarts", "gauge", "", "Attempts at the run before this one.")

METRICS = (
    STEP,
    EPOCH,
    LOSS,
    HELD_OUT_LOSS,
    LEARNING_RATE,
    GRAD_NORM,
    LAST_STEP_TIME,
    CLIPS,
    STEP_SECONDS,
    DATA_WAIT_SECONDS,
    FETCH_SECONDS,
    DECODE_SECONDS,
    FETCHED_BYTES,
    BATCHES_READY,
    BAD_SAMPLES,
    CHECKPOINT_STEP,
    CHECKPOINT_SECONDS,
    CHECKPOINT_FAILURES,
    CHECKPOINT_TIME,
    CHECKPOINT_COMMIT_SECONDS,
    CHECKPOINT_BYTES,
    STORAGE_REQUESTS,
    STORAGE_BYTES,
    STORAGE_RETRIES,
    RESTARTS,
    RUN_SECONDS,
    GOODPUT,
    PHASE_SECONDS,
    TOKENS,
    FLOPS,
    MFU,
    NON_FINITE,
    GPU_MEMORY,
    GPU_UTILIZATION,
    CLIPS_PER_SECOND,
)
