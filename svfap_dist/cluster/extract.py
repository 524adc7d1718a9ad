"""Extract features on the workers of a Ray cluster: `svfap extract --ray ADDRESS`.

In: a job and its parts. Out: a result per part, in the order of completion. An actor per GPU, or
per few CPUs, loads the network once and extracts one part after the other; when its machine is
lost, Ray restarts it elsewhere and repeats the part. An actor gets parts only after it has started:
on a cluster that is partly in use, the others do all the work. Machines of the cluster need this
package, and inputs and output under the same names; actors get this process's credentials.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.inference.extract_parts import ExtractJob, PartExtractor, PartResult
from svfap_dist.inference.parts import Part
from svfap_dist.parallel.ray_connection import connected_to_ray, inherited_variables

log = logging.getLogger(__name__)
_RESTARTS = 3  # of an actor, and attempts at a part that was lost with one
_SECONDS_TO_START = 10.0  # of an actor, before a line says that it has not; also between such lines


def run_on_ray(
    job: ExtractJob, parts: Sequence[Part], address: str, workers: int | None, cpus: int
) -> Iterator[PartResult]:
    """Yield the results of parts that actors extract.

    Args:
        job: what all parts have in common.
        parts: to extract.
        address: of the cluster; "local" starts one on this machine.
        workers: actors at most; None: as many as the cluster has room for if nothing else runs
            there. Each takes job.threads CPUs, and a GPU where the cluster has some or job.device
            is cuda. A number is requested even without room, for machines that join on demand.
        cpus: of this machine, for a cluster that is started.

    Raises:
        ClusterError: There is no cluster, or actors were lost again and again.
        SvfapError: What `PartExtractor` raises.
    """
    if not parts:
        return
    fix = "check --ray and the cluster's token, or leave it out"
    num_cpus = max(cpus, (workers or 1) * job.threads)
    with connected_to_ray(address, num_cpus=num_cpus, fix=fix):
        import ray
        from ray.exceptions import RayError

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = job.device.startswith("cuda") or (
            job.device != "cpu" and any(node.get("GPU") for node in nodes)
        )
        needs = f"{job.threads} CPUs{' and a GPU' if with_gpu else ''}"
        wanted = workers or sum(_room(node, job.threads, with_gpu) for node in nodes)
        if not wanted:
            raise ClusterError(
                "No machine of the cluster has room for a worker",
                where=address,
                found=f"none with {needs}",
                do="lower --threads, or give --workers if machines join on demand",
            )
        actor = ray.remote(
            num_cpus=job.threads,
            num_gpus=1 if with_gpu else 0,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
            runtime_env={"env_vars": inherited_variables()},
        )(_Worker)
        try:
            yield from _results(
                lambda: actor.remote(job), min(wanted, len(parts)), parts, needs=needs
            )
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, SvfapError):
                raise cause from error
            raise ClusterError(
                "A worker of the extraction was lost",
                where=address,
                found=str(error).strip().splitlines()[-1],
                do="run the same command again: finished parts are kept",
            ) from error


class _Worker(PartExtractor):
    def has_started(self) -> None:
        """Return once the actor runs."""


def _results(
    start: Callable[[], Any], count: int, parts: Sequence[Part], needs: str
) -> Iterator[PartResult]:
    """Yield the results of parts, each given to the next actor that is free.

    Args:
        start: starts an actor.
        count: how many to start.
        parts: to extract.
        needs: what an actor needs on one machine, for a log line.
    """
    import ray

    actors = [start() for _ in range(count)]
    waiting = {actor.has_started.remote(): actor for actor in actors}
    del actors  # an actor ends with the last reference to it
    busy: dict[Any, Any] = {}
    left = deque(parts)
    next_line, shown = time.monotonic() + _SECONDS_TO_START, 0
    while left or busy:
        done, _ = ray.wait([*waiting, *busy], timeout=_SECONDS_TO_START)
        for ref in done:
            result = ray.get(ref)
            if ref in waiting:
                actor = waiting.pop(ref)
            else:
                actor = busy.pop(ref)
                yield result
            if left:
                busy[actor.extract.remote(left.popleft())] = actor
        if not left:
            waiting.clear()
        if waiting and len(waiting) != shown and time.monotonic() >= next_line:
            next_line, shown = time.monotonic() + _SECONDS_TO_START, len(waiting)
            text = "%d of %d workers have not started yet; each needs %s free on one machine"
            log.info(text, shown, count, needs)


def _room(node: Mapping[str, float], threads: int, with_gpu: bool) -> int:
    """Return how many workers a machine can run."""
    by_cpu = int(node.get("CPU", 0)) // threads
    return min(by_cpu, int(node.get("GPU", 0))) if with_gpu else by_cpu
