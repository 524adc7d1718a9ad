"""Training steps of a node's ranks on this machine's CPUs, timed for a plan.

In: a recipe and how many ranks. Out: `StepCost`, by the engine that trains, in as many processes as
there will be ranks, connected as they will be: so ranks that share cores hold each other up here as
they will there. Clips are noise, since it does not matter to a step what they show; nothing is
decoded. A micro batch is as large as the recipe's, but a step has two of them at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from svfap_dist import distributed
from svfap_dist.config import Config, check_world_size
from svfap_dist.data import masking
from svfap_dist.data.clips import ClipBatch
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.ring import ring_length
from svfap_dist.distributed import World
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.child import ChildProcess, CrashedError, HungError
from svfap_dist.rng import Stream
from svfap_dist.shards import format as shard_format
from svfap_dist.train.engine import Engine, process_group
from svfap_dist.train.objective import build_objective

_SECONDS = 6.0  # of steps that are timed, if so many fit
_FEWEST, _MOST = 2, 20  # steps that are timed
_WARM_UP = 2
_LIMIT = 600.0  # seconds that a rank may take for all
_MOST_MICRO_BATCHES = 2
_LEARNING_RATE = 1e-6


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a step costs a rank; times are medians over steps, of the slowest rank.

    micro_seconds: of forward and backward pass of a micro batch of `clips`, gradients sent
    included. update_seconds: of the optimizer. cpu_seconds: of CPU per second of a step, of one
    rank. slowdown: how many times as long a step takes beside the loader, waiting for it included;
    None where that was not tried. standing_bytes: of a rank's tensors between two steps; threads:
    of torch in a rank.
    """

    clips: int
    micro_seconds: float
    update_seconds: float
    cpu_seconds: float
    slowdown: float | None
    standing_bytes: int
    threads: int

    def step_seconds(self, micro_batches: int) -> float:
        """Of a step with so many micro batches."""
        return micro_batches * self.micro_seconds + self.update_seconds


def measure(config: Config, ranks: int, world_size: int) -> StepCost:
    """Time steps of a node's `ranks` of `world_size`.

    Raises: ClusterError if a rank dies or hangs; ConfigError if they cannot share the batch.
    """
    accumulation = check_world_size(config, world_size)
    micro = config.train.global_batch_size // world_size // accumulation
    batch = micro * ranks * min(accumulation, _MOST_MICRO_BATCHES)
    small = {"global_batch_size": batch, "micro_batch_size": micro}
    train = config.train.model_copy(update=small)
    repeats = config.data.repeated_sampling
    order = {  # which does not matter, but must fit so small a batch
        "num_lanes": ranks,
        "repeated_sampling": 1 if batch % (ranks * repeats) else repeats,
    }
    data = config.data.model_copy(update=order)
    config = config.model_copy(update={"train": train, "data": data})
    port = distributed.free_port()
    with ThreadPoolExecutor(ranks) as pool:
        costs = list(pool.map(lambda rank: _isolated(config, rank, ranks, port), range(ranks)))
    return dataclasses.replace(
        max(costs, key=lambda cost: cost.step_seconds(1)),
        slowdown=costs[0].slowdown,
        cpu_seconds=statistics.mean(cost.cpu_seconds for cost in costs),
        standing_bytes=max(cost.standing_bytes for cost in costs),
    )


def _isolated(config: Config, rank: int, ranks: int, port: int) -> StepCost:
    """What a rank tells, out of a process of its own that is killed in the end: gloo now and then
    aborts when an interpreter ends by itself."""
    with ChildProcess(functools.partial(_rank, config, ranks, port), seconds=_LIMIT) as process:
        try:
            return process(rank)
        except (HungError, CrashedError) as error:
            raise ClusterError(
                "Steps could not be measured",
                where=f"rank {rank} of {ranks} on this machine",
                found=str(error),
                do="try a smaller train.micro_batch_size or fewer ranks: memory may be short",
            ) from error


def _rank(config: Config, ranks: int, port: int, rank: int) -> StepCost:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    world = World(rank, rank, ranks, ranks)
    with process_group(config, world) as device:
        return _timed(config, Engine(config, build_objective(config), world, device), world)


def _timed(config: Config, engine: Engine, world: World) -> StepCost:
    batch = _noise(config, config.train.global_batch_size // world.world_size)
    micro_batches = check_world_size(config, world.world_size)
    warm = [sum(_step(engine, batch)) for _ in range(_WARM_UP)]
    count = _count(warm[-1])
    began, cpu_began = time.perf_counter(), time.process_time()
    steps = [_step(engine, batch) for _ in range(count)]
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    computing, update = (statistics.median(column) for column in zip(*steps, strict=True))
    return StepCost(
        clips=config.train.micro_batch_size,
        micro_seconds=computing / micro_batches,
        update_seconds=update,
        cpu_seconds=cpu_seconds / seconds,
        slowdown=_beside_loader(config, engine, world) * count / seconds
        if config.data.url
        else None,
        standing_bytes=_standing_bytes(batch),
        threads=torch.get_num_threads(),
    )


def _count(step_seconds: float) -> int:
    """How many steps are timed, on all ranks alike."""
    return distributed.broadcast_object(max(_FEWEST, min(int(_SECONDS / step_seconds), _MOST)))


def _step(engine: Engine, batch: ClipBatch) -> tuple[float, float]:
    """Take a step: seconds until the gradient is there, and of the update."""
    began = time.perf_counter()
    float(engine.backward(batch, step=0))
    computed = time.perf_counter()
    engine.update(_LEARNING_RATE)
    return computed - began, time.perf_counter() - computed


def _beside_loader(config: Config, engine: Engine, world: World) -> float:
    """Seconds of a step on the recipe's clips, waiting for them included, once as much is prepared
    ahead as ever is."""
    loader = ClipLoader(config, config.data.url, shard_format.load_manifest(config.data.url), world)
    clips = config.train.global_batch_size // world.world_size
    full = ring_length(config, clips) - 1
    with contextlib.closing(loader.batches(0, 1 << 40)) as batches:

        def taken() -> bool:
            batch = next(batches)
            _step(engine, batch)
            return batch.batches_ready >= full

        began, warm = time.perf_counter(), 0
        while not distributed.broadcast_object(
            taken() or time.perf_counter() - began > 2 * _SECONDS
        ):
            warm += 1
        count = _count((time.perf_counter() - began) / (warm + 1))
        began = time.perf_counter()
        for _ in range(count):
            taken()
        return (time.perf_counter() - began) / count


def _noise(config: Config, clips: int) -> ClipBatch:
    data, size = config.data, config.data.frame_size
    splits = [masking.predicted_split(Stream("plan", i), config) for i in range(clips)]
    return ClipBatch(
        frames=torch.randint(0, 256, (clips, data.num_frames, size, size, 3), dtype=torch.uint8),
        visible=torch.stack([torch.from_numpy(split.visible) for split in splits]),
        masked=torch.stack([torch.from_numpy(split.masked) for split in splits]),
        keys=[],
        samples=[],
        lanes=[],
        positions=[],
        substituted=[],
        bad=[],
        fetch_seconds=0.0,
        decode_seconds=0.0,
    )


def _standing_bytes(batch: ClipBatch) -> int:
    """Bytes of all tensors of this process but the batch's."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and not found.is_meta:
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    for tensor in (batch.frames, batch.visible, batch.masked):
        assert isinstance(tensor, torch.Tensor)
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
