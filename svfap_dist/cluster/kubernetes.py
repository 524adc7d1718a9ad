"""Kubernetes' door: a KubeRay RayJob rendered from a recipe, given to kubectl.

The template is launch/kubernetes/rayjob.yaml. The resolved recipe travels in a ConfigMap that the
head pod mounts. A job's state is what the RayJob says of itself; stopping goes through Ray's job
agent in the head pod, because deleting the RayJob would leave the ranks no time to save.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import string
import textwrap
import time
import uuid
from collections.abc import Sequence

from svfap_dist import bundled
from svfap_dist.cluster.ray_jobs import STOP_SECONDS
from svfap_dist.cluster.schedulers import Job, JobStatus, checked, told, verb
from svfap_dist.config import check_world_size, recipe
from svfap_dist.errors import ConfigError

ENTRYPOINT = "python -m svfap_dist {verb} /etc/svfap/recipe.toml --on ray"
_LONGEST_NAME = 40  # KubeRay adds words of its own, and a name may have 63 characters
_ENDED = ("Complete", "Failed")


@dataclasses.dataclass(frozen=True)
class Pods:
    """What is asked of Kubernetes.

    nodes: worker pods. ranks_per_node: of each, with as many GPUs if the recipe uses them. image:
    with svfap_dist in it. memory, shared_memory: of a worker pod. variables_from: a Secret
    whose entries (AWS_...) become variables of the pods.
    """

    image: str
    nodes: int = 1
    ranks_per_node: int = 1
    memory: str = "64Gi"
    shared_memory: str = "16Gi"
    variables_from: str = "svfap-store"


def manifest(name: str, overrides: Sequence[str], pods: Pods) -> tuple[Job, str]:
    """A job and its YAML, ConfigMap and RayJob, for recipe `name`. Raises: ConfigError."""
    ranks = pods.nodes * pods.ranks_per_node
    # The operator's cluster is told to be ready before all of its pods are.
    own = [f"cluster.num_workers={ranks}", "cluster.wait_seconds=900"]
    config = checked(name, [*overrides, *own])
    check_world_size(config, ranks, key="--nodes times ranks per node")
    resources = {"cpu": str(pods.ranks_per_node * config.cluster.cpus_per_worker)}
    resources["memory"] = pods.memory
    if config.cluster.use_gpu:
        resources["nvidia.com/gpu"] = str(pods.ranks_per_node)
    job = Job("kubernetes", _job_name(config.run.name))
    template = (bundled.folder("launch/kubernetes") / "rayjob.yaml").read_text()
    return job, string.Template(template).substitute(
        name=job.name,
        recipe=textwrap.indent(recipe.dumps(config), " " * 4),
        entrypoint=json.dumps(
            ENTRYPOINT.format(verb=verb(config))
        ),  # JSON's strings and tables are YAML's too
        image=json.dumps(pods.image),
        nodes=pods.nodes,
        resources=json.dumps(resources),
        shared_memory=pods.shared_memory,
        variables_from=pods.variables_from,
        stop_seconds=STOP_SECONDS,
        ray_version=importlib.metadata.version("ray"),
    )


def _job_name(run_name: str) -> str:
    """Lower case, digits and hyphens, as Kubernetes wants it, and not used before."""
    word = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return f"{word or 'svfap'}-{uuid.uuid4().hex[:6]}"


def submit(text: str) -> None:
    """Give a manifest to the cluster of kubectl's context. Raises: ClusterError."""
    told(["kubectl", "apply", "--filename", "-"], stdin=text)


def status(job: Job) -> JobStatus:
    """What the RayJob says of itself. Raises: ClusterError."""
    return _read(job, told(["kubectl", "get", "rayjob", job.name, "--output", "json"]))


def _read(job: Job, text: str) -> JobStatus:
    found = json.loads(text).get("status", {})
    deployment = found.get("jobDeploymentStatus") or "Initializing"
    words = [found.get("jobStatus", ""), found.get("message", "")]
    return JobStatus(str(job), deployment, deployment in _ENDED, ", ".join(filter(None, words)))


def stop(job: Job) -> JobStatus:
    """Tell a job to save a checkpoint and end, and wait until it has. Raises: ClusterError."""
    found = json.loads(told(["kubectl", "get", "rayjob", job.name, "--output", "json"]))
    cluster = found.get("status", {}).get("rayClusterName", "")
    if not cluster:
        raise ConfigError(
            "Job has no cluster yet",
            where=str(job),
            found="no rayClusterName in its status",
            do=f"wait, or kubectl delete rayjob {job.name}",
        )
    selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
    head = told(["kubectl", "get", "pods", "--selector", selector, "--output", "name"]).strip()
    ray_job = found["status"].get("jobId", job.name)
    told(["kubectl", "exec", head, "--", "ray", "job", "stop", "--no-wait", ray_job])
    while not (now := status(job)).ended:
        time.sleep(2.0)
    return now
