"""Ranks: who am I, and how do all of us agree.

A rank is whatever has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment:
Ray Train and torchrun set them. A process without them is a world of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
from collections.abc import Callable
from typing import Any, TypeVar

from svfap_dist.errors import ClusterError, SvfapError

Result = TypeVar("Result")
_PORTS = range(20_000, 32_000)


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place among all ranks."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def from_environment() -> World:
    """The world this process was started in; sets the variables of a world of one if there are
    none."""
    if "RANK" not in os.environ:
        _refuse_unnumbered_tasks()
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ClusterError(
            "Ranks are not numbered in full",
            where="environment",
            found=f"RANK is set, {' and '.join(missing)} not",
            do="start ranks by torchrun or Ray, or set RANK, LOCAL_RANK, WORLD_SIZE, "
            "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
        )
    world_size = int(os.environ["WORLD_SIZE"])
    return World(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
    )


def _refuse_unnumbered_tasks() -> None:
    """Several tasks of a Slurm step would each take themselves for rank 0 of the same run."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        raise ClusterError(
            "Ranks are not numbered",
            where=f"task {os.environ.get('SLURM_PROCID')} of a Slurm step of {tasks}",
            found="no RANK in the environment",
            do="let srun start one torchrun per node, or export RANK=$SLURM_PROCID, "
            "LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR and MASTER_PORT",
        )


def free_port() -> int:
    """A TCP port of the loopback interface that is free now.

    It lies below those that Linux gives to outgoing connections, one of which could otherwise take
    it before it is listened on.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise ClusterError(
        "No free port",
        where="127.0.0.1",
        found=f"all of {_PORTS.start} to {_PORTS.stop - 1} are in use",
        do="end what listens there, or set MASTER_PORT",
    )


def barrier() -> None:
    """Wait until every rank is here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def from_main(value: Any) -> Any:
    """Rank 0's `value` (any picklable object), on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Every rank's `value` (any picklable object), in rank order, on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], Result]) -> Result:
    """This rank's result of `action`, which must not talk to other ranks.

    Raises: the error of the lowest rank on which it failed, on every rank, so that none goes on
    alone.
    """
    result, error = None, None
    try:
        result = action()
    except SvfapError as failure:
        error = failure
    failures = [failure for failure in gathered(error) if failure is not None]
    if failures:
        raise failures[0] from error
    return result  # type: ignore[return-value] - without a failure there is a result
