"""Start connected ranks on this machine for measurements, as torchrun does, without its agent."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from svfap_dist import distributed
from svfap_dist.distributed import World
from svfap_dist.errors import ClusterError
from svfap_dist.parallel.processes import ChildProcess, CrashedError, HungError

_Result = TypeVar("_Result")


def run_on_local_ranks(
    function: Callable[[World], _Result], ranks: int, seconds: float | None = None
) -> list[_Result]:
    """Call a function on ranks of this machine and return their results in rank order.

    Each rank is a new process with the environment of torchrun. Processes are killed in the end:
    gloo sometimes aborts when an interpreter exits. If one rank fails, all are killed.

    Args:
        function: picklable; called with the rank's place among all.
        ranks: how many.
        seconds: limit of each; None: no limit.

    Raises:
        ClusterError: if a rank dies or exceeds the limit; else what `function` raises.
    """
    call = functools.partial(_call_rank, function, ranks, distributed.free_port())
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(ranks) as pool:
        children = [
            stack.enter_context(ChildProcess(call, seconds=seconds, may_have_children=True))
            for _ in range(ranks)
        ]
        calls = [pool.submit(child, rank) for rank, child in enumerate(children)]
        done, pending = wait(calls, return_when=FIRST_EXCEPTION)
        if pending:  # they would wait for the failed rank
            for child in children:
                child.kill()
        try:
            for call in done:  # the failed ones; the others were killed
                call.result()
            return [call.result() for call in calls]
        except (HungError, CrashedError) as error:
            advice = "try a smaller train.micro_batch_size or fewer ranks: memory may be short"
            where = f"{ranks} ranks on this machine"
            raise ClusterError("A rank failed", where, str(error), advice) from error


def _call_rank(function: Callable[[World], _Result], ranks: int, port: int, rank: int) -> _Result:
    world = World(rank, rank, ranks, ranks)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return function(world)
