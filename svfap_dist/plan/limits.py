"""Throughput of a run and bytes of a rank, from what a step costs and machines have: arithmetic.

In: `Costs`, of one optimizer step of a rank or of one clip. Out: `Throughput`. On GPUs the parts
are stages of a pipeline whose slowest one sets the pace: decoding and reading beside the step, and
in a step the GPU and the host that launches its work. Only the network adds to a step, as far as no
backward pass hides it (`exposed_seconds`). On CPUs, training and decoding share the cores: together
they cannot take more CPU seconds per second than there are cores.

In: what `profiling.memory` counted. Out: `RankBytes` by ZeRO stage, from what DeepSpeed partitions
at each (tests compare with a running engine). Batches prepared ahead are the loader's ring, which
is in the host's memory where there is a GPU. Not counted: torch's own context (about a gigabyte on
a GPU), fragmentation, temporary copies, DeepSpeed's and the reader's caches.
"""

from __future__ import annotations

import dataclasses

from svfap_dist.profiling.memory import ADAM_MOMENTS, FLOAT_BYTES, ModelBytes
from svfap_dist.train.gradients import BUCKETS_IN_FLIGHT, REDUCE_BUCKET

COMPUTE, HOST, NETWORK, DECODE, STORAGE = "compute", "host", "network", "decode", "storage"
_BACKWARD_SHARE = 2 / 3  # of a step's operations


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a step and what the nodes have; None: unknown, so no bound."""

    nodes: int  # number of machines
    clips: int  # of a step, over all ranks of all nodes
    step_seconds: float  # computing time of a rank with nothing beside it
    network_seconds: float  # time of sending between ranks, where nothing hides it
    compute_cpu_seconds: float  # CPU time of training on a clip, on the cores that decode, too
    decode_cpu_seconds: float | None  # CPU time of fetching, decoding and cropping a clip
    decoders: int  # processes and threads of a node that decode at a time
    cores: int  # of a node
    host_seconds: float = 0.0  # in which the host launches a step, where a GPU computes it
    slowdown: float | None = None  # of a step while the same cores decode, as a factor
    clip_bytes: float | None = None  # fetched for a clip
    storage_rate: float | None = None  # bytes per second that a node reads


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Clips per second of the job; `alone`: of each part if nothing else bounded the run."""

    clips_per_second: float
    bound_by: str
    alone: dict[str, float]


def throughput(costs: Costs) -> Throughput:
    """Return the rate of the job and what bounds it.

    Args:
        costs: measured, counted or assumed.
    """
    alone = {COMPUTE: costs.clips / costs.step_seconds}
    if costs.host_seconds:
        alone[HOST] = costs.clips / costs.host_seconds
    if costs.network_seconds:
        alone[NETWORK] = costs.clips / costs.network_seconds
    if costs.decode_cpu_seconds is not None:
        at_a_time = min(costs.decoders, costs.cores)
        alone[DECODE] = costs.nodes * at_a_time / costs.decode_cpu_seconds
    if costs.clip_bytes and costs.storage_rate:
        alone[STORAGE] = costs.nodes * costs.storage_rate / costs.clip_bytes
    launched = max(costs.step_seconds, costs.host_seconds)
    name = HOST if costs.host_seconds > costs.step_seconds else COMPUTE
    steps = costs.clips / (launched + costs.network_seconds)
    candidates = {NETWORK if costs.network_seconds > launched else name: steps}
    candidates |= {name: rate for name, rate in alone.items() if name in (DECODE, STORAGE)}
    bound_by = min(candidates, key=lambda name: candidates[name])
    rate = candidates[bound_by]
    shared = _shared_rate(costs)
    if shared is not None and shared < rate:
        # The part that takes more of the cores is the one to lower.
        if bound_by not in (STORAGE, NETWORK):
            decoding = costs.decode_cpu_seconds or 0.0
            bound_by = DECODE if decoding > costs.compute_cpu_seconds else COMPUTE
        rate = shared
    return Throughput(rate, bound_by, alone)


def _shared_rate(costs: Costs) -> float | None:
    """Return clips per second of shared cores: as measured, or as if none were ever idle."""
    if costs.slowdown is not None:
        return costs.clips / (costs.step_seconds * costs.slowdown + costs.network_seconds)
    if costs.decode_cpu_seconds is None:
        return None
    per_clip = costs.compute_cpu_seconds + costs.decode_cpu_seconds
    return costs.nodes * costs.cores / per_clip


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one optimizer step: gradients to reduce, weights to gather."""

    reduced: float
    gathered: float
    last: float  # of `reduced`: what is sent after the last backward pass at the earliest


def bytes_sent(
    model: ModelBytes, world_size: int, stage: int, accumulation: int, bucket: int = REDUCE_BUCKET
) -> Traffic:
    """Return the bytes that a rank sends for one optimizer step.

    A ring of W ranks sends (W - 1) / W of a tensor to reduce-scatter it, and as much to all-gather
    it; an all-reduce is both. Stages 0 to 2 all-reduce gradients by the bucket: 0 and 1 the sum of
    a step, 2 those of each micro batch. Stages 1 and 2 then gather the updated weights. Stage 3
    reduce-scatters each micro batch and gathers the weights before each forward and backward pass.

    Args:
        model: counted by `profiling.memory.count_model`.
        world_size: number of ranks.
        stage: of ZeRO.
        accumulation: micro batches of a step.
        bucket: weights whose gradients are reduced together.
    """
    one = model.parameters * model.number_bytes * (world_size - 1) / world_size
    reductions, gathers = {
        0: (2, 0),
        1: (2, 1),
        2: (2 * accumulation, 1),
        3: (accumulation, 2 * accumulation),
    }[stage]
    last = 2 * one * min(bucket / model.parameters, 1.0) if stage < 3 else 0.0
    return Traffic(reductions * one, gathers * one, last)


def exposed_seconds(
    sent: Traffic, rate: float, step_seconds: float, stage: int, accumulation: int
) -> float:
    """Return the seconds of a GPU's step in which it only waits for the network.

    Buckets of stages 0 to 2 are reduced while the backward pass computes the next ones, so their
    time shows only as far as it is longer, and that of the last bucket always. Stage 2 hides each
    micro batch's behind its own backward pass. The gathers of stage 3 are not hidden here.

    Args:
        sent: from `bytes_sent`.
        rate: bytes per second of the slowest link.
        step_seconds: of the step, without the network.
        stage: of ZeRO.
        accumulation: micro batches of the step.
    """
    if stage == 3:
        return (sent.reduced + sent.gathered) / rate
    backward = _BACKWARD_SHARE * step_seconds / (1 if stage == 2 else accumulation)
    reductions = accumulation if stage == 2 else 1
    hidden = sent.reduced / rate - backward
    return max(hidden, reductions * sent.last / rate) + sent.gathered / rate


@dataclasses.dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank; `total` is that of its device, which holds the prefetch on CPUs only."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    prefetch: int
    total: int


def rank_bytes_by_stage(
    model: ModelBytes, world_size: int, clips: int, prefetch: int, on_gpu: bool
) -> dict[int, RankBytes]:
    """Return the bytes of a rank for each ZeRO stage that the model's type can have.

    Args:
        model: counted by `profiling.memory.count_model`.
        world_size: ranks that share what a stage partitions.
        clips: of a micro batch.
        prefetch: bytes of the ring of batches.
        on_gpu: whether the ring is outside of the device's memory.
    """
    activations = clips * model.kept_per_clip
    found = {}
    for stage in (0, 1, 2, 3) if model.number_bytes == FLOAT_BYTES else (1, 2, 3):
        weights, gradients, optimizer = _states(model, world_size, stage)
        device = weights + gradients + optimizer + activations
        total = device if on_gpu else device + prefetch
        found[stage] = RankBytes(weights, gradients, optimizer, activations, prefetch, total)
    return found


def _states(model: ModelBytes, world_size: int, stage: int) -> tuple[int, int, int]:
    """Return bytes of weights, gradients and optimizer, as DeepSpeed 0.19 holds them.

    Stage 0 updates the weights in place; the others update a rank's share of float32 copies, in
    float32 runs, too. Stage 3 partitions the weights, but keeps gathered ones below 1e9 weights,
    and all models here are smaller. Stages 0 and 1 hold a step's sum of all gradients in float32;
    stages 2 and 3 reduce gradients by the bucket, and stage 2 keeps its share in float32.
    """
    numbers, weights = model.parameters, model.parameters * model.number_bytes
    share = -(-numbers // world_size)
    bucket = min(numbers, REDUCE_BUCKET) * model.number_bytes
    if stage == 0:
        return weights + model.buffers, weights, ADAM_MOMENTS * FLOAT_BYTES * numbers
    optimizer = (1 + ADAM_MOMENTS) * FLOAT_BYTES * share
    if stage == 1:
        return weights + model.buffers, FLOAT_BYTES * numbers, optimizer
    if stage == 2:
        gradients = FLOAT_BYTES * share + (1 + BUCKETS_IN_FLIGHT) * bucket
        return weights + model.buffers, gradients, optimizer
    gradients = share * model.number_bytes + bucket
    return share * model.number_bytes + weights + model.buffers, gradients, optimizer
