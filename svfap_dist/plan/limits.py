"""How fast a run can go, from what a step costs and what there is: pure arithmetic.

In: `Costs`, told for one optimizer step of a rank or for one clip. Out: a `Verdict`, clips per
second of the whole job and what bounds them. On GPUs the parts of the way are stages of a pipeline
whose slowest sets the pace; only the network adds to the computation, since gradients are reduced
while nothing else is computed (ZeRO as it is set here). On CPUs, computing and decoding live off
the same cores: together they cannot take more CPU-seconds per second than there are cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

COMPUTE, NETWORK, DECODE, STORAGE = "compute", "network", "decode", "storage"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a step of `clips` clips, over all ranks of all nodes, takes and finds.

    step_seconds: of computing on a rank, with nothing beside it. network_seconds: of sending
    between ranks, where not in step_seconds. slowdown: how many times as long a step takes while
    clips are decoded beside it on the same cores; None: to be calculated. compute_cpu_seconds: of
    CPU that a clip's computing takes on the cores that decode, too. decode_cpu_seconds: of CPU that
    fetching, decoding and cutting a clip take. decoders: processes and threads of a node that
    decode at a time. cores: of a node. clip_bytes: fetched for a clip. storage_rate: bytes per
    second that a node reads; None: unknown, and bounds nothing (so too for clip_bytes and
    decode_cpu_seconds).
    """

    nodes: int
    clips: int
    step_seconds: float
    network_seconds: float
    compute_cpu_seconds: float
    decode_cpu_seconds: float | None
    decoders: int
    cores: int
    slowdown: float | None = None
    clip_bytes: float | None = None
    storage_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """clips_per_second of the job; alone: what each part could do if it alone bounded the run."""

    clips_per_second: float
    bound_by: str
    alone: dict[str, float]


def verdict(costs: Costs) -> Verdict:
    """The rate of the job, and what bounds it."""
    alone = {COMPUTE: costs.clips / costs.step_seconds}
    if costs.network_seconds:
        alone[NETWORK] = costs.clips / costs.network_seconds
    if costs.decode_cpu_seconds is not None:
        at_a_time = min(costs.decoders, costs.cores)
        alone[DECODE] = costs.nodes * at_a_time / costs.decode_cpu_seconds
    if costs.clip_bytes and costs.storage_rate:
        alone[STORAGE] = costs.nodes * costs.storage_rate / costs.clip_bytes
    steps = costs.clips / (costs.step_seconds + costs.network_seconds)
    is_sending = costs.network_seconds > costs.step_seconds
    candidates = {
        NETWORK if is_sending else COMPUTE: steps,
        **{name: rate for name, rate in alone.items() if name in (DECODE, STORAGE)},
    }
    bound_by = min(candidates, key=lambda name: candidates[name])
    rate = candidates[bound_by]
    shared = _shared_rate(costs)
    if shared is not None and shared < rate:
        # What takes the larger part of the cores is what to lower.
        if bound_by not in (STORAGE, NETWORK):
            decoding = costs.decode_cpu_seconds or 0.0
            bound_by = DECODE if decoding > costs.compute_cpu_seconds else COMPUTE
        rate = shared
    return Verdict(rate, bound_by, alone)


def _shared_rate(costs: Costs) -> float | None:
    """Clips per second where computing and decoding share cores, as measured, or else if nothing
    of the cores is lost; None if not known."""
    if costs.slowdown is not None:
        return costs.clips / (costs.step_seconds * costs.slowdown + costs.network_seconds)
    if costs.decode_cpu_seconds is None:
        return None
    per_clip = costs.compute_cpu_seconds + costs.decode_cpu_seconds
    return costs.nodes * costs.cores / per_clip


def bytes_sent(
    parameters: int, number_bytes: int, world_size: int, stage: int, accumulation: int
) -> float:
    """Bytes that a rank sends for one optimizer step of a ZeRO stage.

    A ring of W ranks passes on (W - 1) / W of a tensor to scatter its sum, and as much to gather
    it. Stages 0 and 1 reduce once a step, 2 and 3 with every micro batch; stage 3 gathers the
    weights before each forward and backward pass, too.
    """
    share = parameters * number_bytes * (world_size - 1) / world_size
    passes: Mapping[int, int] = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}
    return share * passes[stage]
