"""Extract features on the workers of a Ray cluster: `svfap extract --ray ADDRESS`.

In: a job and its parts. Out: a result per part, in the order of completion. An actor per GPU, or
per few CPUs, loads the network once and extracts one part after the other; when its machine is
lost, Ray restarts it elsewhere and repeats the part. Machines of the cluster need this package,
inputs and output under the same names, and the store's credentials.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.inference.extract_parts import ExtractJob, PartExtractor, PartResult
from svfap_dist.inference.parts import Part
from svfap_dist.parallel.ray_connection import connected_to_ray

_RESTARTS = 3  # of an actor, and attempts at a part that was lost with one


def run_on_ray(
    job: ExtractJob, parts: Sequence[Part], address: str, workers: int | None, cpus: int
) -> Iterator[PartResult]:
    """Yield the results of parts that actors extract.

    Args:
        job: what all parts have in common.
        parts: to extract.
        address: of the cluster; "local" starts one on this machine.
        workers: actors at most; None: as many as the cluster has room for. Each takes job.threads
            CPUs, and a GPU where the cluster has some.
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
        from ray.util import ActorPool

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = job.device != "cpu" and any(node.get("GPU") for node in nodes)
        room = sum(_room(node, job.threads, with_gpu) for node in nodes)
        if not room:
            raise ClusterError(
                "No machine of the cluster has room for a worker",
                where=address,
                found=f"none with {job.threads} CPUs{' and a GPU' if with_gpu else ''}",
                do="lower --threads",
            )
        actor = ray.remote(
            num_cpus=job.threads,
            num_gpus=1 if with_gpu else 0,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )(PartExtractor)
        count = min(workers or room, room, len(parts))  # one more would wait forever
        actors = [actor.remote(job) for _ in range(count)]
        try:
            pool: Any = ActorPool(actors)  # whose annotations are wrong
            yield from pool.map_unordered(lambda worker, part: worker.extract.remote(part), parts)
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


def _room(node: Mapping[str, float], threads: int, with_gpu: bool) -> int:
    """Return how many workers a machine can run."""
    by_cpu = int(node.get("CPU", 0)) // threads
    return min(by_cpu, int(node.get("GPU", 0))) if with_gpu else by_cpu
