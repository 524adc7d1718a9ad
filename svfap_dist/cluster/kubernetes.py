"""Kubernetes: a KubeRay RayJob rendered from a recipe, given to kubectl.

The template is launch/kubernetes/rayjob.yaml. The resolved recipe is in a ConfigMap that the head
pod mounts. A job's state is the status of the RayJob. Stopping goes through Ray's job agent in the
head pod, since deleting the RayJob would leave the ranks no time to save a checkpoint.
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
from svfap_dist.cluster.schedulers import (
    Job,
    JobStatus,
    Submission,
    cli_option,
    load_recipe,
    run_scheduler_command,
    verb,
)
from svfap_dist.config import Config, recipe
from svfap_dist.data.clips import prefetch_bytes
from svfap_dist.data.read_ahead import MEMORY_SHARE
from svfap_dist.errors import ConfigError

_ENTRYPOINT = "python -m svfap_dist {verb} /etc/svfap/recipe.toml --on ray"
_LONGEST_NAME = 40  # KubeRay appends to it, and a name may have 63 characters
_SECONDS_BETWEEN_POLLS = 2.0
_LABELS = {"app.kubernetes.io/name": "svfap"}
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_KUBERNETES_NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_ENDED = ("Complete", "Failed")

# Bytes of a worker pod's processes; the ring of batches and /dev/shm count, too, since their pages
# belong to the pod. Decode workers and feeders: a few times what imports and a decoder take.
_GIB = 1 << 30
_RANK_BYTES = 5 * _GIB  # torch, CUDA's and NCCL's host memory, a copy of the weights: assumed
_WORKER_BYTES, _RGB_WORKER_BYTES = 160 << 20, 512 << 20  # those that make RGB import torch
_OBJECT_STORE_BYTES = _GIB  # Ray's, which holds metrics and the recipe only
_RANK_SHARED_BYTES = _GIB // 2  # of NCCL in /dev/shm
_SPARE = 1.2  # Ray's own processes, fragmentation, pages being written


@dataclasses.dataclass(frozen=True)
class Kubernetes:
    """Submit a recipe as a KubeRay RayJob, by kubectl.

    Example: svfap launch kubernetes svfap_base_voxceleb2 --image registry/svfap:0.1.0 --nodes 2
    --gpus-per-node 8 data.url=s3://bucket/shards run.url=s3://bucket/runs/a --dry-run
    """

    image: str = cli_option("svfap", "Container image with svfap_dist; see launch/docker.")
    nodes: int = cli_option(1, "Number of worker pods.", min=1)
    gpus_per_node: int = cli_option(
        1, "Ranks of a worker pod, each with one GPU if cluster.use_gpu = true.", min=1
    )
    memory: str = cli_option("", "Memory of a worker pod; empty: from the recipe and the ranks.")
    shared_memory: str = cli_option("16Gi", "Size of /dev/shm in a worker pod, for NCCL.")
    variables_from: str = cli_option(
        "svfap-store", "Secret whose entries (AWS_...) become environment variables of the pods."
    )
    rdma: str = cli_option(
        "",
        "Resource of InfiniBand or RoCE devices (rdma/hca_shared_devices_a, nvidia.com/hostdev); "
        "each worker pod requests one, and may lock memory (IPC_LOCK).",
    )
    host_network: bool = cli_option(
        False, "Run worker pods in their node's network, if NCCL needs its interfaces."
    )

    queue: str = cli_option(
        "", "Kueue's LocalQueue of the job, which then waits, suspended, until Kueue admits it."
    )

    def prepare(self, name: str, overrides: Sequence[str]) -> Submission:
        """See `Scheduler.prepare`; the text is YAML, the content the job."""
        ranks = self.nodes * self.gpus_per_node
        # The operator calls a cluster ready before all of its pods are.
        own = [f"cluster.num_workers={ranks}", "cluster.wait_seconds=900"]
        config = load_recipe(name, [*overrides, *own])
        resources = {"cpu": str(self.gpus_per_node * config.cluster.cpus_per_worker)}
        resources["memory"] = self.memory or _in_gib(_pod_bytes(config, self.gpus_per_node))
        if self.rdma:
            resources[self.rdma] = "1"
        if config.cluster.on_gpu:
            resources["nvidia.com/gpu"] = str(self.gpus_per_node)
        job = Job("kubernetes", _unused_name(config.run.name))
        template = (bundled.folder("launch/kubernetes") / "rayjob.yaml").read_text()
        labels = _LABELS | ({_QUEUE_LABEL: self._queue_name()} if self.queue else {})
        # JSON's strings and tables are YAML's too.
        text = string.Template(template).substitute(
            name=job.name,
            labels=json.dumps(labels),
            suspend=json.dumps(bool(self.queue)),
            recipe=textwrap.indent(recipe.dumps(config), " " * 4),
            entrypoint=json.dumps(_ENTRYPOINT.format(verb=verb(config))),
            image=json.dumps(self.image),
            nodes=self.nodes,
            fewest_nodes=-(-config.cluster.fewest_workers // self.gpus_per_node),
            resources=json.dumps(resources),
            shared_memory=self.shared_memory,
            object_store=_OBJECT_STORE_BYTES,
            security=json.dumps({"capabilities": {"add": ["IPC_LOCK"]}} if self.rdma else {}),
            host_network=json.dumps(self.host_network),
            dns_policy="ClusterFirstWithHostNet" if self.host_network else "ClusterFirst",
            variables_from=self.variables_from,
            stop_seconds=STOP_SECONDS,
            ray_version=importlib.metadata.version("ray"),
        )
        return Submission(text.rstrip("\n"), job)

    def _queue_name(self) -> str:
        if re.fullmatch(_KUBERNETES_NAME, self.queue) is None:
            advice = "give the name of a LocalQueue: `kubectl get localqueues`"
            raise ConfigError("Invalid Kubernetes name", "--queue", self.queue, advice)
        return self.queue

    def submit(self, submission: Submission) -> Job:
        """See `Scheduler.submit`."""
        run_scheduler_command(["kubectl", "apply", "--filename", "-"], stdin=submission.text)
        return submission.content

    def status(self, job: Job) -> JobStatus:
        """See `Scheduler.status`."""
        return _read(job, _get(job))

    def stop(self, job: Job) -> JobStatus:
        """See `Scheduler.stop`."""
        found = json.loads(_get(job)).get("status", {})
        cluster = found.get("rayClusterName", "")
        if not cluster:
            advice = f"wait, or kubectl delete rayjob {job.name}"
            raise ConfigError(
                "Job has no cluster yet", str(job), "no rayClusterName in its status", advice
            )
        selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
        command = ["kubectl", "get", "pods", "--selector", selector, "--output", "name"]
        head = run_scheduler_command(command).strip()
        stop = ["ray", "job", "stop", "--no-wait", found.get("jobId", job.name)]
        run_scheduler_command(["kubectl", "exec", head, "--", *stop])
        while not (now := self.status(job)).ended:
            time.sleep(_SECONDS_BETWEEN_POLLS)
        return now


def _pod_bytes(config: Config, ranks: int) -> int:
    """Return the memory that a worker pod of that many ranks needs."""
    # A rank of the smallest group has the most clips.
    data, clips = config.data, config.train.global_batch_size // config.world_sizes[0]
    on_host = config.task is not None and not config.augments_on_device
    makes_rgb = on_host or data.colors == "workers" or not config.cluster.on_gpu
    worker = _RGB_WORKER_BYTES if makes_rgb else _WORKER_BYTES
    rank = _RANK_BYTES + _RANK_SHARED_BYTES + data.decode_workers * worker
    rank += data.feeders * _WORKER_BYTES
    rank += prefetch_bytes(data, clips) + data.read_ahead_bytes
    pod = _SPARE * (ranks * rank + _OBJECT_STORE_BYTES)
    return int(pod if data.read_ahead_bytes else pod / (1 - MEMORY_SHARE))


def _in_gib(num_bytes: int) -> str:
    return f"{-(-num_bytes // _GIB)}Gi"


def _unused_name(run_name: str) -> str:
    """Return a new name of lower case letters, digits and hyphens, as Kubernetes requires."""
    word = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    return f"{word or 'svfap'}-{uuid.uuid4().hex[:6]}"


def _get(job: Job) -> str:
    return run_scheduler_command(["kubectl", "get", "rayjob", job.name, "--output", "json"])


def _read(job: Job, text: str) -> JobStatus:
    """Return the state in a RayJob's JSON."""
    found = json.loads(text).get("status", {})
    deployment = found.get("jobDeploymentStatus") or "Initializing"
    words = [found.get("jobStatus", ""), found.get("message", "")]
    return JobStatus(str(job), deployment, deployment in _ENDED, ", ".join(filter(None, words)))
