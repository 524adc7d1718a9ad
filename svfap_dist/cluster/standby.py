"""Standby processes: Ray workers that have made a rank's imports before a rank needs them.

Importing Ray Train, torch and DeepSpeed is most of the CPU time of a restart. While the ranks
train, each node therefore has as many idle worker processes as ranks, with the ranks' environment,
so that Ray uses them for the next attempt's actors. Ray matches an idle process to an actor by the
hash of its environment; `PrestartWorkers`, a request to the node's raylet, starts processes that
have not run a task yet and may become either kind of worker. It is no public interface of Ray: if
it fails, restarts only take longer. Ray ends the processes with the driver.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

_KEPT_SECONDS = 10 * 365 * 86_400  # Ray would end idle processes beyond a node's number of CPUs
_TIMEOUT_SECONDS = 30.0
_DEEPSPEED = "deepspeed"
_PACKAGES = (
    "ray.train.torch",
    "svfap_dist.train.loop",
    "svfap_dist.cluster.ray_train",
    "torch._dynamo",  # which the first optimizer imports
    _DEEPSPEED,
)
_IDLE = b"ray::IDLE"  # title of a worker process without task or actor

log = logging.getLogger(__name__)
_imports: list[tuple[float, float]] = []  # when they began and ended, in this process


def environment(use_gpu: bool) -> dict[str, str]:
    """Return the variables with which Ray's workers call `import_packages` when they start.

    Args:
        use_gpu: Whether they are for GPU ranks.
    """
    from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

    if WORKER_PROCESS_SETUP_HOOK_ENV_VAR in os.environ:  # the job has its own
        return {}
    # DeepSpeed would search for a GPU otherwise.
    accelerator = {} if use_gpu else {"DS_ACCELERATOR": "cpu"}
    return {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.import_packages", **accelerator}


def import_packages() -> None:
    """Import what a rank needs; called by Ray in a new worker process.

    A process that becomes a GPU rank must not have used CUDA before Ray chooses its GPU, so it
    imports DeepSpeed later.
    """
    began = time.time()
    # An error here would end the process silently; the rank raises it again.
    with contextlib.suppress(Exception):
        for name in _PACKAGES:
            if name != _DEEPSPEED or os.environ.get("DS_ACCELERATOR") == "cpu":
                importlib.import_module(name)
    _imports.append((began, time.time()))


def import_seconds(since: float) -> float:
    """Return how long this process imported packages after a point in time.

    Args:
        since: Seconds since the epoch.
    """
    return sum(max(ended - max(began, since), 0.0) for began, ended in _imports)


def start_standbys(count: int) -> None:
    """Start worker processes like this one on this node, until it has that many idle ones.

    Args:
        count: Number of this node's ranks.
    """
    import ray

    if (missing := count - _count_idle()) > 0:
        here = ray.get_runtime_context().get_node_id()
        _prestart([node for node in ray.nodes() if node["NodeID"] == here], missing)


def start_on_spare_nodes(spare: Iterable[str], count: int) -> None:
    """Start worker processes like this one on nodes without ranks, which ranks may move to.

    Args:
        spare: Ids of the nodes, which have no standby processes yet.
        count: Number of processes on each.
    """
    import ray

    ids = frozenset(spare)
    _prestart([node for node in ray.nodes() if node["NodeID"] in ids], count)


def nodes_with_room(resources: Mapping[str, float]) -> list[str]:
    """Return the ids of all nodes that can have a rank.

    Args:
        resources: What a rank needs, by Ray's name.
    """
    import ray

    return [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"]
        and all(node["Resources"].get(name, 0) >= least for name, least in resources.items())
    ]


def _count_idle(raylet: int = 0) -> int:
    """Return how many idle worker processes of a raylet, by default ours, have our imports."""
    raylet = raylet or os.getppid()
    hook = f"{__name__}.import_packages".encode()
    count = 0
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if name.isdigit() and _parent(name) == raylet:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    is_idle = file.read().startswith(_IDLE)
                with open(f"/proc/{name}/environ", "rb") as file:
                    count += is_idle and hook in file.read()
    return count


def _parent(pid: str) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def _prestart(nodes: Iterable[Mapping[str, Any]], count: int) -> None:
    """Ask the raylets of nodes, from `ray.nodes`, for worker processes like this one."""
    for node in nodes:
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        try:
            _request_workers(address, count)
        except Exception as error:  # of any kind: another version of Ray may have none of it
            log.warning("No standby processes at %s, so restarts take longer: %r", address, error)


def _request_workers(address: str, count: int) -> None:
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

    context = ray.get_runtime_context()
    environment_info: Any = get_runtime_env_info(context.runtime_env)
    # The very bytes of this process's environment: their hash is what processes are matched by.
    environment_info.serialized_runtime_env = context.get_runtime_env_string()
    messages: Any = node_manager_pb2
    request = messages.PrestartWorkersRequest(
        language=cast(Any, common_pb2).PYTHON,
        job_id=bytes.fromhex(context.get_job_id()),
        runtime_env_info=environment_info,
        keep_alive_duration_secs=_KEPT_SECONDS,
        num_workers=count,
    )
    channel: Any = init_grpc_channel(address)
    with channel:
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        stub.PrestartWorkers(request, timeout=_TIMEOUT_SECONDS)
