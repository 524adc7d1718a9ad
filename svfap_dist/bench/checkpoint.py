"""`svfap bench checkpoint`: what a checkpoint costs a run, beside plain `torch.save`.

Real ranks train one step, so that there is optimizer state, and then take turns: our checkpoint,
whose upload goes on beside training, and a plain one, each rank writing the same state straight to
its place with `torch.save` while all wait. What counts is the time that training stands still.
Ours writes to the local disk in that time, so a slow store is no longer waited for; where the store
is a local disk itself, there is little to gain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import load, store
from svfap_dist.checkpoint.saver import Checkpointer
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config, recipe
from svfap_dist.data import masking
from svfap_dist.data.clips import ClipBatch
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError
from svfap_dist.progress import say
from svfap_dist.rng import Stream
from svfap_dist.train.engine import Engine, process_group
from svfap_dist.train.objective import build_objective

_PLAIN = "plain"  # folder beside checkpoints/


@dataclasses.dataclass(frozen=True)
class CheckpointBench:
    """What came out; seconds of wall time are medians of the rounds, all ranks together.

    stall_seconds: training stands still. commit_seconds: from the start of saving to COMMIT, most
    of it beside training. bytes: of the checkpoint, the full weights included, which plain_bytes do
    not have. load_seconds: from the store into the engine, digests checked. ratio: plain_seconds to
    stall_seconds.
    """

    size: str
    zero_stage: int
    ranks: int
    device: str
    url: str
    rounds: int
    stall_seconds: float
    commit_seconds: float
    bytes: int
    megabytes_per_second: float
    load_seconds: float
    plain_seconds: float
    plain_bytes: int
    ratio: float

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"Autoencoder {self.size}, ZeRO stage {self.zero_stage}, {self.ranks} ranks on "
            f"{self.device}, to {self.url}:",
            f"Ours        {self.stall_seconds:8.3f} s stood still, committed after "
            f"{self.commit_seconds:.3f} s: {self.bytes / 1e6:.0f} MB, "
            f"{self.megabytes_per_second:.0f} MB/s",
            f"torch.save  {self.plain_seconds:8.3f} s stood still: {self.plain_bytes / 1e6:.0f} MB"
            f"   {self.ratio:.2f} times as long",
            f"Loading     {self.load_seconds:8.3f} s",
        ]


@dataclasses.dataclass
class _Seconds:
    """Of each round; the state of the first save, and what was stored."""

    stalls: list[float] = dataclasses.field(default_factory=list)
    commits: list[float] = dataclasses.field(default_factory=list)
    plain: list[float] = dataclasses.field(default_factory=list)
    loads: list[float] = dataclasses.field(default_factory=list)
    bytes: int = 0
    plain_bytes: int = 0


def run(
    size: str, zero_stage: int = 2, ranks: int = 2, url: str = "", rounds: int = 3
) -> CheckpointBench:
    """Save and load `rounds` times each way, below `url` (empty: a temporary folder).

    Raises: ConfigError for a size, stage or number of ranks that there is not; CheckpointError,
    StorageError.
    """
    with contextlib.ExitStack() as stack:
        root = url or stack.enter_context(tempfile.TemporaryDirectory(prefix="svfap-bench-"))
        place = storage.join(root, f"bench-checkpoint-{uuid.uuid4().hex[:8]}")
        stack.callback(storage.delete, place)
        config = _recipe(size, zero_stage, ranks, place)
        say(f"{ranks} ranks save {rounds} times each way ...")
        port = distributed.free_port()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(ranks, mp_context=context) as pool:
            told = [pool.submit(_rank, config, rank, ranks, port, rounds) for rank in range(ranks)]
            found, *_ = (each.result() for each in told)
    stall, plain = statistics.median(found.stalls), statistics.median(found.plain)
    commit = statistics.median(found.commits)
    return CheckpointBench(
        size=size,
        zero_stage=zero_stage,
        ranks=ranks,
        device="cuda" if config.cluster.use_gpu else "cpu",
        url=url or "a local folder",
        rounds=rounds,
        stall_seconds=stall,
        commit_seconds=commit,
        bytes=found.bytes,
        megabytes_per_second=found.bytes / 1e6 / commit,
        load_seconds=statistics.median(found.loads),
        plain_seconds=plain,
        plain_bytes=found.plain_bytes,
        ratio=plain / stall,
    )


def _recipe(size: str, zero_stage: int, ranks: int, url: str) -> Config:
    tables = {
        "run": {"url": url},
        "data": {"num_lanes": ranks},
        "model": {"size": size},
        "train": {
            "global_batch_size": ranks,
            "micro_batch_size": 1,
            "zero_stage": zero_stage,
            "keep_last": 1,
        },
        "cluster": {"num_workers": ranks, "use_gpu": torch.cuda.device_count() >= ranks},
    }
    return recipe.from_tables(tables, where="bench checkpoint")


def _rank(config: Config, rank: int, ranks: int, port: int, rounds: int) -> _Seconds:
    """What each process does; they are connected and go through it together."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world, seconds = distributed.world_from_environment(), _Seconds()
    with process_group(config, world) as device:
        engine = Engine(config, build_objective(config), world, device)
        engine.backward(_batch(config, rank), step=0)
        engine.update(1e-6)
        with _same_state(engine, device) as parts:
            for number in range(1, rounds + 1):
                _save(config, world, engine, number, seconds)
                seconds.plain.append(_timed(lambda: _save_plainly(config, rank, parts)))
                seconds.loads.append(_timed(lambda: _load(config, engine)))
        distributed.barrier()
        stored = storage.list_files(storage.join(config.run.url, _PLAIN))
        seconds.plain_bytes = sum(stored.values())
        engine.close()
    return seconds


def _save(config: Config, world: World, engine: Engine, number: int, seconds: _Seconds) -> None:
    """A checkpoint as a run saves it, with nothing else to do while it is uploaded."""
    state = TrainState.of_run(config, number, 1, "bench", world.world_size)
    with Checkpointer(config, world, before_marker=lambda: None) as checkpointer:
        seconds.stalls.append(_timed(lambda: checkpointer.save(engine, state)))
        outcome = checkpointer.finish_upload()
    assert outcome is not None
    if outcome.error:
        raise CheckpointError("Checkpoint was not stored", found=outcome.error)
    seconds.commits.append(outcome.seconds)
    seconds.bytes = outcome.num_bytes


def _load(config: Config, engine: Engine) -> None:
    step = store.latest_committed(config.run.url)
    assert step is not None
    load.restore_engine(config.run.url, store.read_state(config.run.url, step), engine, False)


@contextlib.contextmanager
def _same_state(engine: Engine, device: torch.device) -> Iterator[dict[str, Any]]:
    """What this rank has to save, by file, as DeepSpeed hands it to `torch.save`."""
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        engine.save(folder, "tag")
        files = os.path.join(folder, "tag")
        yield {
            name: torch.load(os.path.join(files, name), map_location=device, weights_only=False)
            for name in os.listdir(files)
        }


def _save_plainly(config: Config, rank: int, parts: dict[str, Any]) -> None:
    """`torch.save` to where the files are to lie, by way of a local file where that is remote."""
    for name, part in parts.items():
        target = storage.join(config.run.url, _PLAIN, name)
        if storage.is_remote(target):
            with tempfile.NamedTemporaryFile() as file:
                torch.save(part, file)
                file.flush()
                storage.upload_file(file.name, target)
        else:
            path = storage.local_path(target)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.save(part, path)


def _timed(action: Callable[[], object]) -> float:
    """Seconds until the slowest rank has done it."""
    distributed.barrier()
    began = time.perf_counter()
    action()
    distributed.barrier()
    return time.perf_counter() - began


def _batch(config: Config, rank: int) -> ClipBatch:
    """A clip of noise."""
    data = config.data
    shape = (1, data.num_frames, data.frame_size, data.frame_size, 3)
    split = masking.predicted_split(Stream("bench", rank), config)
    return ClipBatch(
        frames=torch.randint(0, 256, shape, dtype=torch.uint8),
        visible=torch.from_numpy(split.visible)[None],
        masked=torch.from_numpy(split.masked)[None],
        keys=[""],
        samples=[0],
        lanes=[rank],
        positions=[0],
        substituted=[False],
        bad=[],
        fetch_seconds=0.0,
        decode_seconds=0.0,
    )
