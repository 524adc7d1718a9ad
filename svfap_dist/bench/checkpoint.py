"""`svfap bench checkpoint`: what a checkpoint costs a run, compared with plain `torch.save`.

Real ranks train one step, so that there is optimizer state, and then take turns: our checkpoint,
whose upload runs beside training, and a plain one, for which each rank writes the same state
directly to its destination with `torch.save` while all wait. The time that training is blocked
counts. Ours writes to the local disk in that time, so that no rank waits for a slow store; where
the store is a local disk itself, there is little to gain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import statistics
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from svfap_dist import distributed, storage
from svfap_dist.bench.steps import bench_recipe
from svfap_dist.checkpoint import load, store
from svfap_dist.checkpoint.saver import Checkpointer, SaveOutcome
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError
from svfap_dist.profiling.ranks import run_on_local_ranks
from svfap_dist.profiling.step import noise_batch
from svfap_dist.profiling.timing import seconds_of, take_turns
from svfap_dist.text_table import format_table
from svfap_dist.train.engine import Engine, open_engine
from svfap_dist.train.objective import build_objective

log = logging.getLogger(__name__)

_PLAIN = "plain"  # folder beside checkpoints/


@dataclasses.dataclass(frozen=True)
class CheckpointBench:
    """Figures of both ways; seconds of wall time are medians of the rounds, of the slowest rank."""

    size: str
    dtype: str
    zero_stage: int
    ranks: int
    device: str
    url: str
    rounds: int
    stall_seconds: float  # while training is blocked
    commit_seconds: float  # from the start of saving to COMMIT, most of it beside training
    bytes: int  # of the checkpoint, with the full weights, which `plain_bytes` lacks
    megabytes_per_second: float
    load_seconds: float  # from the store into the engine, digests checked
    plain_seconds: float
    plain_bytes: int
    ratio: float  # plain_seconds to stall_seconds

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        ours = f"blocked, committed after {self.commit_seconds:.3f} s: {self.bytes / 1e6:.0f} MB, "
        ours += f"{self.megabytes_per_second:.0f} MB/s"
        plain = f"blocked: {self.plain_bytes / 1e6:.0f} MB, {self.ratio:.2f} times as long"
        rows = [
            ("Ours", f"{self.stall_seconds:.3f} s", ours),
            ("torch.save", f"{self.plain_seconds:.3f} s", plain),
            ("Loading", f"{self.load_seconds:.3f} s", ""),
        ]
        return [
            f"Autoencoder {self.size}, {self.dtype}, ZeRO stage {self.zero_stage}, "
            f"{self.ranks} ranks on {self.device}, to {self.url}:",
            *format_table(rows, right=(1,)),
        ]


def run(
    size: str,
    zero_stage: int = 2,
    ranks: int = 2,
    url: str = "",
    rounds: int = 3,
    dtype: str = "float32",
) -> CheckpointBench:
    """Save and load `rounds` times each way.

    Args:
        size: of the model.
        zero_stage: of DeepSpeed.
        ranks: processes on this machine.
        url: prefix to save below; empty: a temporary folder.
        rounds: that are timed.
        dtype: of the weights, "float32" or "bfloat16"; the optimizer's numbers are float32.

    Raises:
        ConfigError: for an unknown size, type, stage or number of ranks.
        CheckpointError, StorageError: from saving.
    """
    with contextlib.ExitStack() as stack:
        root = url or stack.enter_context(tempfile.TemporaryDirectory(prefix="svfap-bench-"))
        place = storage.join(root, f"bench-checkpoint-{uuid.uuid4().hex[:8]}")
        stack.callback(storage.delete, place)
        use_gpu = torch.cuda.device_count() >= ranks
        config = bench_recipe(
            size,
            ranks,
            run={"url": place},
            data={"num_lanes": ranks},
            train={
                "micro_batch_size": 1,
                "zero_stage": zero_stage,
                "keep_last": 1,
                "dtype": dtype,
            },
            cluster={"num_workers": ranks, "use_gpu": use_gpu},
        )
        log.info("%d ranks save %d times each way ...", ranks, rounds)
        figures, *_ = run_on_local_ranks(functools.partial(_measure_rank, config, rounds), ranks)
    return CheckpointBench(
        size=size,
        dtype=dtype,
        zero_stage=zero_stage,
        ranks=ranks,
        device="cuda" if use_gpu else "cpu",
        url=url or "a local folder",
        rounds=rounds,
        **figures,
        megabytes_per_second=figures["bytes"] / 1e6 / figures["commit_seconds"],
        ratio=figures["plain_seconds"] / figures["stall_seconds"],
    )


def _measure_rank(config: Config, rounds: int, world: World) -> dict[str, Any]:
    """Return measured fields of `CheckpointBench`: medians of the rounds, bytes in the store."""
    outcomes: list[SaveOutcome] = []
    url = config.run.url

    def save(number: int) -> float:
        """Save as a run does, with nothing else to do during the upload."""
        state = TrainState.of_run(config, number + 1, 1, "bench", world.world_size)
        with Checkpointer(config, world, before_marker=lambda: None) as checkpointer:
            stall = _timed(lambda: checkpointer.save(engine, state))
            outcome = checkpointer.finish_upload()
        assert outcome is not None
        if outcome.error:
            do = "check that --url is writable"
            raise CheckpointError("Checkpoint was not stored", url, outcome.error, do)
        outcomes.append(outcome)
        return stall

    def restore() -> None:
        step = store.latest_committed(url)
        assert step is not None
        load.restore_engine(url, store.read_state(url, step), engine, False)

    plain = storage.join(url, _PLAIN)
    with open_engine(build_objective(config), config, world) as engine:
        engine.backward(noise_batch(config, 1), step=0)
        engine.update(1e-6)
        with _saved_state(engine) as parts:
            found = take_turns(
                {
                    "stall_seconds": save,
                    "plain_seconds": lambda _: _timed(lambda: _save_plainly(plain, parts)),
                    "load_seconds": lambda _: _timed(restore),
                },
                rounds,
                title="",
            )
        distributed.barrier()
        plain_bytes = sum(storage.list_files(plain).values())
    found["commit_seconds"] = [outcome.seconds for outcome in outcomes]
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "bytes": outcomes[-1].num_bytes, "plain_bytes": plain_bytes}


@contextlib.contextmanager
def _saved_state(engine: Engine) -> Iterator[dict[str, Any]]:
    """Yield this rank's state by file, as DeepSpeed passes it to `torch.save`."""
    with tempfile.TemporaryDirectory(prefix="svfap-bench-") as folder:
        engine.save(folder, "tag")
        load_part = functools.partial(torch.load, map_location=engine.device, weights_only=False)
        yield {path.name: load_part(path) for path in Path(folder, "tag").iterdir()}


def _save_plainly(url: str, parts: dict[str, Any]) -> None:
    """Write by `torch.save` to the destination, through a local file where that is remote."""
    for name, part in parts.items():
        target = storage.join(url, name)
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
    """Return the seconds until the slowest rank has done it."""
    distributed.barrier()

    def on_all_ranks() -> None:
        action()
        distributed.barrier()

    return seconds_of(on_all_ranks)
