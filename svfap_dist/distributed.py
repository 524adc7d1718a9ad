"""Rank discovery, and collectives of objects and numbers.

A rank is a process that has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
environment, as Ray Train and torchrun set them. A process without them is a world of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from svfap_dist.errors import ClusterError, SvfapError

Result = TypeVar("Result")
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_COLLECTIVES_RECORDED = "2000"  # on a GPU; each is a small record in the host's memory
_PORTS = range(20_000, 32_000)
_ROUND_SECONDS = 10.0  # of a long action; far below train.collective_timeout_seconds
_MAX_ROUNDS = 720  # two hours: each round is progress to the watchdog, also where an action hangs


@dataclasses.dataclass(frozen=True)
class World:
    """This process's place among all ranks."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def world_from_environment() -> World:
    """Return this process's world, after setting the variables of a world of one if it has none.

    Raises:
        ClusterError: The environment has RANK but not the other variables.
    """
    if "RANK" not in os.environ:
        _refuse_unnumbered_tasks()
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        found = f"RANK is set, {' and '.join(missing)} not"
        do = "start ranks with torchrun or Ray, or set RANK, LOCAL_RANK, WORLD_SIZE, "
        do += "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        raise ClusterError("Incomplete rank environment", "environment", found, do)
    world_size = int(os.environ["WORLD_SIZE"])
    return World(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
    )


def has_gpu_per_rank() -> bool:
    """Return whether torch sees a CUDA device for each rank of this machine.

    A scheduler may have given each rank its own, which is then the only one that it sees; ranks of
    one torchrun see the same ones.
    """
    import torch

    if not torch.cuda.is_available():
        return False
    count = torch.cuda.device_count()
    is_own = (
        count == 1
        and "CUDA_VISIBLE_DEVICES" in os.environ
        and "TORCHELASTIC_RUN_ID" not in os.environ
    )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return count >= ranks or is_own


def _refuse_unnumbered_tasks() -> None:
    """Raise if this is one of several Slurm tasks, each of which would act as rank 0 of the run."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        where = f"task {os.environ.get('SLURM_PROCID')} of a Slurm step of {tasks}"
        do = "have srun start one torchrun per node, or export RANK=$SLURM_PROCID, "
        do += "LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR and MASTER_PORT"
        raise ClusterError("Missing rank environment", where, "no RANK in the environment", do)


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now.

    It is below Linux's ephemeral ports: an outgoing connection could take one of those before the
    caller listens on it.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    found = f"all of {_PORTS.start} to {_PORTS.stop - 1} are in use"
    do = "stop a process that listens there, or set MASTER_PORT"
    raise ClusterError("No free port", "127.0.0.1", found, do)


def loopback_store(world: World, timeout: datetime.timedelta) -> Any:
    """Return a store for the process group that listens on loopback only.

    torch's own listens on all interfaces, also where MASTER_ADDR is loopback, and any process
    that connects to it can write into the group's rendezvous.

    Args:
        world: This rank's place among all ranks.
        timeout: Of operations on the store.

    Returns:
        The store; None where MASTER_ADDR is no loopback address, or there is a store already:
        that of torchrun's agent or of an earlier group of this process.
    """
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    host = os.environ.get("MASTER_ADDR", "")
    if not is_loopback(host):
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port, descriptor = int(os.environ["MASTER_PORT"]), None
    if world.is_main:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(address)
            except OSError:  # of an earlier group of this process, which torch finds
                return None
            descriptor = listener.detach()  # the store closes it
    store = TCPStore(
        host,
        port,
        world.world_size,
        is_master=world.is_main,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=descriptor,
    )
    return PrefixStore("default_pg", store)  # as torch itself does


@contextlib.contextmanager
def gloo_on_loopback() -> Iterator[None]:
    """Make gloo's groups of the block listen on loopback, where all ranks are on this machine.

    By default gloo listens on the address of the host's name.
    """
    sizes = [os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE")]
    are_here = is_loopback(os.environ.get("MASTER_ADDR", "")) or (sizes[0] and sizes[0] == sizes[1])
    added = loopback_variables() if are_here else {}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def flight_recorder_variables() -> dict[str, str]:
    """Return the environment in which NCCL records its last collectives, for reports of stalls."""
    names = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"  # the latter is deprecated
    return {} if any(name in os.environ for name in names) else {names[0]: _COLLECTIVES_RECORDED}


def loopback_variables() -> dict[str, str]:
    """Return the environment in which gloo listens on loopback; empty where it has its own."""
    if sys.platform != "linux" or _GLOO_INTERFACE in os.environ:
        return {}
    return {_GLOO_INTERFACE: "lo"}


def is_loopback(host: str) -> bool:
    """Return whether a host is loopback by name: a host's own name may be so on that host only.

    Args:
        host: Name or address.
    """
    return host in ("localhost", "::1") or host.startswith("127.")


def barrier() -> None:
    """Wait until every rank gets here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any, src: int = 0) -> Any:
    """Return one rank's `value` on every rank.

    Args:
        value: Any picklable object; only that rank's is used.
        src: The rank.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=src)
    return box[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank.

    Args:
        value: Any picklable object.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_numbers(values: Sequence[float]) -> list[list[float]]:
    """Return every rank's numbers, in rank order, on every rank: one small tensor, no pickling.

    Args:
        values: Equally many on every rank.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return [[float(value) for value in values]]
    # A host tensor for gloo; NCCL needs one on the device, which also waits for it.
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    own = torch.tensor([values], dtype=torch.float64, device=device)
    gathered = own.new_empty(dist.get_world_size(), len(values))
    dist.all_gather_into_tensor(gathered, own)
    return gathered.tolist()


def run_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Return this rank's result of `action`, or raise on all ranks if it failed on one.

    Args:
        action: Called once on every rank; must not contain collectives of its own.

    Raises:
        SvfapError: That of the lowest rank on which `action` failed.
    """
    result, error = None, None
    try:
        result = action()
    except SvfapError as failure:
        error = failure
    failures = [failure for failure in all_gather_object(error) if failure is not None]
    if failures:
        raise failures[0] from error
    return result  # type: ignore[return-value] - without a failure there is a result


def run_on_main(action: Callable[[], Result]) -> Result:
    """Return rank 0's result of `action` on every rank, or raise its error there: one broadcast.

    Without a process group each caller is its own rank 0.

    Args:
        action: Called on rank 0 only.

    Raises:
        SvfapError: That of rank 0.
    """
    import torch.distributed as dist

    found: tuple[Any, SvfapError | None] = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = action(), None
        except SvfapError as error:
            found = None, error
    result, failure = broadcast_object(found)
    if failure is not None:
        raise failure
    return result


def run_long_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Do what `run_on_all_ranks` does, for an action that may take longer than a collective may.

    The action runs in a thread. Meanwhile all ranks exchange who has finished, so that no rank
    waits in a collective for longer than a round.

    Args:
        action: Called once on every rank; must not contain collectives of its own.

    Raises:
        SvfapError: That of the lowest rank on which `action` failed.
        ClusterError: On every rank, if it has not ended after two hours on some.
    """
    running: Future[Result] = Future()
    device = _cuda_device()

    def run() -> None:
        try:
            if device is not None:
                device()
            running.set_result(action())
        except BaseException as error:
            running.set_exception(error)

    threading.Thread(target=run, name="long-action", daemon=True).start()
    ended: list[bool] = []
    for _ in range(_MAX_ROUNDS):
        wait([running], timeout=_ROUND_SECONDS)
        finished = running.done()
        if finished and not isinstance(running.exception(), (SvfapError, type(None))):
            running.result()
        ended = all_gather_object(finished)
        if all(ended):
            return run_on_all_ranks(running.result)
    where = f"rank {', '.join(str(rank) for rank, done in enumerate(ended) if not done)}"
    found = f"not ended after {_MAX_ROUNDS * _ROUND_SECONDS:.0f} s"
    advice = "look for a store or a disk that hangs; run the same command again to resume"
    raise ClusterError("Start-up hangs", where, found, advice)


def _cuda_device() -> Callable[[], None] | None:
    """Return a function that selects this thread's CUDA device in another, None without one."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    number = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(number)
