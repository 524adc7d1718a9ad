"""Time training steps of a node's ranks on this machine's CPUs.

In: a recipe, a number of ranks, and what opens an engine. Out: `StepCost`. The engine is the one
that trains, in as many connected processes as there will be ranks, so that ranks which share cores
slow each other down here as they will there. Clips are noise: their content does not change the
cost of a step, and nothing has to be decoded. A micro batch is as large as the recipe's, but a step
has two of them at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from svfap_dist import distributed
from svfap_dist.config import Config, check_world_size
from svfap_dist.data import masking
from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.clips import ring_length
from svfap_dist.data.filler import BatchSlots
from svfap_dist.data.loader import ClipLoader
from svfap_dist.distributed import World
from svfap_dist.profiling.ranks import run_on_local_ranks
from svfap_dist.profiling.timing import seconds_of
from svfap_dist.rng import Stream
from svfap_dist.shards.mixture import load_training_manifest
from svfap_dist.video.frames import YuvClips

_SECONDS = 6.0  # of timed steps, if that many fit
_MIN_STEPS, _MAX_STEPS = 2, 20
_WARM_UP = 2
_RANK_SECONDS = 600.0  # limit of a rank for everything
_MAX_MICRO_BATCHES = 2
_LEARNING_RATE = 1e-6


class _Engine(Protocol):
    """The part of `train.engine.Engine` that is timed; rooms below `train` cannot import it."""

    def backward(self, batch: ClipBatch, step: int) -> torch.Tensor: ...

    def update(self, learning_rate: float) -> object: ...


OpenEngine = Callable[[Config, World], AbstractContextManager[_Engine]]


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Cost of a step for a rank; times are medians over steps, of the slowest rank."""

    clips: int  # of a micro batch
    micro_seconds: float  # forward and backward pass of a micro batch, gradient reduction included
    update_seconds: float  # of the optimizer
    cpu_seconds: float  # CPU seconds per second of a step, of one rank
    slowdown: float | None  # of a step beside the loader, as a factor; None: not measured
    standing_bytes: int  # of a rank's tensors between two steps
    threads: int  # of torch in a rank

    def step_seconds(self, micro_batches: int) -> float:
        """Return the seconds of a step.

        Args:
            micro_batches: of the step.
        """
        return micro_batches * self.micro_seconds + self.update_seconds


def noise_batch(config: Config, clips: int, planes: bool = False) -> ClipBatch:
    """Return a batch of clips that show noise, with masks as the recipe has them.

    Args:
        config: says the clips' shape and masks.
        clips: of the batch.
        planes: whether frames are YUV planes, of the clips' size, instead of RGB.
    """
    size = config.data.frame_size
    shape = clips, config.data.num_frames, size, size, 3
    streams = [Stream("noise", i) for i in range(clips)]
    visible, masked = masking.batch_masks(
        streams, config.mask, config.num_tubelets, config.num_patches
    )
    slots = BatchSlots(
        keys=[f"id{number:05d}/clip{number:05d}" for number in range(clips)],
        samples=list(range(clips)),
        lanes=[0] * clips,
        positions=list(range(clips)),
        substituted=[False] * clips,
    )
    return ClipBatch(
        frames=_noise_planes(shape) if planes else torch.randint(0, 256, shape, dtype=torch.uint8),
        visible=visible,
        masked=masked,
        packed_slots=[slots.pack()],
        bad=[],
        fetch_seconds=0.0,
        decode_seconds=0.0,
    )


def _noise_planes(shape: tuple[int, ...]) -> YuvClips:
    clips, frames, size, *_ = shape
    half = clips, frames, (size + 1) // 2, (size + 1) // 2
    return YuvClips(
        y=torch.randint(0, 256, shape[:-1], dtype=torch.uint8),
        u=torch.randint(0, 256, half, dtype=torch.uint8),
        v=torch.randint(0, 256, half, dtype=torch.uint8),
        crops=torch.tensor([[0, 0, size, size]] * clips),
        kinds=torch.zeros(clips, dtype=torch.int64),
        size=size,
    )


def measure_steps(config: Config, ranks: int, world_size: int, open_engine: OpenEngine) -> StepCost:
    """Time steps of a node's ranks on this machine.

    Args:
        config: recipe of a pre-training.
        ranks: of a node; started here.
        world_size: ranks of the run, which share the global batch.
        open_engine: picklable; opens the engine of a rank, with its process group.

    Raises:
        ClusterError: if a rank dies or hangs.
        ConfigError: if the ranks cannot share the batch.
    """
    accumulation = check_world_size(config, world_size)
    micro = config.train.global_batch_size // world_size // accumulation
    batch = micro * ranks * min(accumulation, _MAX_MICRO_BATCHES)
    small = {"global_batch_size": batch, "micro_batch_size": micro}
    train, repeats = config.train.model_copy(update=small), config.data.repeated_sampling
    repeats = 1 if batch % (ranks * repeats) else repeats
    # The order of samples does not matter here, but must fit a batch this small.
    data = config.data.model_copy(update={"num_lanes": ranks, "repeated_sampling": repeats})
    config = config.model_copy(update={"train": train, "data": data})
    measure = functools.partial(_measure_rank, config, open_engine)
    costs = run_on_local_ranks(measure, ranks, _RANK_SECONDS)
    return dataclasses.replace(
        max(costs, key=lambda cost: cost.step_seconds(1)),
        slowdown=costs[0].slowdown,
        cpu_seconds=statistics.mean(cost.cpu_seconds for cost in costs),
        standing_bytes=max(cost.standing_bytes for cost in costs),
    )


def _measure_rank(config: Config, open_engine: OpenEngine, world: World) -> StepCost:
    batch = noise_batch(config, config.train.global_batch_size // world.world_size)
    micro_batches = check_world_size(config, world.world_size)
    with open_engine(config, world) as engine:
        warm = [sum(_take_step(engine, batch)) for _ in range(_WARM_UP)]
        count = _num_steps(warm[-1])
        began, cpu_began = time.perf_counter(), time.process_time()
        steps = [_take_step(engine, batch) for _ in range(count)]
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        micro, update = (statistics.median(column) for column in zip(*steps, strict=True))
        slowdown = None
        if any(config.data.urls):
            slowdown = _seconds_beside_loader(config, engine, world) * count / seconds
        return StepCost(
            clips=config.train.micro_batch_size,
            micro_seconds=micro / micro_batches,
            update_seconds=update,
            cpu_seconds=cpu_seconds / seconds,
            slowdown=slowdown,
            standing_bytes=_standing_bytes(batch),
            threads=torch.get_num_threads(),
        )


def _num_steps(step_seconds: float) -> int:
    """Return the number of steps to time, which rank 0 decides for all."""
    fitting = int(_SECONDS / step_seconds)
    return distributed.broadcast_object(max(_MIN_STEPS, min(fitting, _MAX_STEPS)))


def _take_step(engine: _Engine, batch: ClipBatch) -> tuple[float, float]:
    """Return seconds until the gradient is complete, and of the update."""
    return (
        seconds_of(lambda: float(engine.backward(batch, step=0))),
        seconds_of(lambda: engine.update(_LEARNING_RATE)),
    )


def _seconds_beside_loader(config: Config, engine: _Engine, world: World) -> float:
    """Return seconds of a step on the recipe's clips, waiting included, with a full ring."""
    manifest = load_training_manifest(config, config.data.url)
    loader = ClipLoader(config, config.data.url, manifest, world)
    full = ring_length(config.data, config.train.global_batch_size // world.world_size) - 1
    with contextlib.closing(loader.batches(0, 1 << 40)) as batches:

        def step_finds_full_ring() -> bool:
            batch = next(batches)
            _take_step(engine, batch)
            return batch.batches_ready >= full

        began, warm = time.perf_counter(), 0
        while not distributed.broadcast_object(
            step_finds_full_ring() or time.perf_counter() - began > 2 * _SECONDS
        ):
            warm += 1
        count = _num_steps((time.perf_counter() - began) / (warm + 1))
        began = time.perf_counter()
        for _ in range(count):
            step_finds_full_ring()
        return (time.perf_counter() - began) / count


def _standing_bytes(batch: ClipBatch) -> int:
    """Return bytes of all tensors of this process except the batch's."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and not found.is_meta:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    for tensor in (batch.frames, batch.visible, batch.masked):
        assert isinstance(tensor, torch.Tensor)
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
