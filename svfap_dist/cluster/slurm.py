"""Slurm's door: the sbatch line of a recipe, and a job's state and end.

The scripts are launch/slurm/*.sbatch, plain files that read nothing but the allocation and their
arguments. What is decided here becomes options of sbatch, which win over those in the file; so a
dry run prints one line that does the same when pasted.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from svfap_dist import bundled
from svfap_dist.cluster.schedulers import Job, JobStatus, checked, told, verb
from svfap_dist.config import check_world_size
from svfap_dist.errors import ConfigError

SCRIPTS = {"srun": "pretrain.sbatch", "ray": "ray_cluster.sbatch"}
_SECONDS_TO_JOIN = 300  # for Ray's nodes
_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What is asked of Slurm.

    on: srun (a task per rank) or ray (a Ray cluster across the nodes). ranks_per_node: 0: one for
    each GPU. time: of one attempt, as Slurm writes it, e.g. 24:00:00. notice_seconds: how long
    before its end the ranks are told to save. options: further words for sbatch.
    """

    nodes: int = 1
    gpus_per_node: int = 0
    ranks_per_node: int = 0
    time: str = ""
    notice_seconds: int = 300
    on: str = "srun"
    script: str = ""  # instead of the bundled one
    options: tuple[str, ...] = ()

    @property
    def ranks_of_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1


def command(name: str, overrides: Sequence[str], allocation: Allocation) -> list[str]:
    """The words of sbatch that run recipe `name`.

    Raises: ConfigError if the recipe does not fit the allocation.
    """
    if allocation.on not in SCRIPTS:
        raise ConfigError(
            "No such way to start ranks",
            where="--on",
            found=allocation.on,
            do=f"use {' or '.join(SCRIPTS)}",
        )
    ranks = allocation.ranks_of_node
    own = [f"cluster.num_workers={allocation.nodes * ranks}"]
    if allocation.on == "ray":
        own.append(f"cluster.wait_seconds={_SECONDS_TO_JOIN}")
    config = checked(name, [*overrides, *own])
    check_world_size(config, allocation.nodes * ranks, key="--nodes times ranks per node")
    if config.cluster.use_gpu and allocation.gpus_per_node < ranks:
        raise ConfigError(
            "Too few GPUs for the ranks",
            where="--gpus-per-node",
            found=f"{allocation.gpus_per_node} for {ranks} ranks, and cluster.use_gpu = true",
            do=f"give --gpus-per-node {ranks}, or cluster.use_gpu=false",
        )
    # A task is a rank, or a node's Ray.
    tasks, cpus = (1, ranks) if allocation.on == "ray" else (ranks, 1)
    script = allocation.script or bundled.folder("launch/slurm") / SCRIPTS[allocation.on]
    return [
        "sbatch",
        "--parsable",
        f"--job-name={config.run.name}",
        f"--nodes={allocation.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus * config.cluster.cpus_per_worker}",
        *([f"--gpus-per-node={allocation.gpus_per_node}"] if allocation.gpus_per_node else []),
        *([f"--time={allocation.time}"] if allocation.time else []),
        f"--signal=B:USR1@{allocation.notice_seconds}",
        *allocation.options,
        *_export(allocation.options, verb(config)),
        str(script),
        os.path.abspath(name) if name.endswith(".toml") else name,
        *overrides,
        *own,
    ]


def _export(options: Sequence[str], verb: str) -> list[str]:
    """What adds the script's own variables to those that the user has exported to the job."""
    wanted = [option.partition("=")[2] for option in options if option.startswith("--export=")]
    if not wanted and verb == "pretrain":
        return []  # everything is exported, and the script needs no more
    theirs = (wanted or ["ALL"])[-1]
    names = [] if theirs in ("NONE", "NIL") else [theirs]
    return [f"--export={','.join([*names, 'SVFAP_PYTHON', f'SVFAP_VERB={verb}'])}"]


def environment() -> dict[str, str]:
    """What the script finds in its environment: this Python, which all nodes must have."""
    return {"SVFAP_PYTHON": sys.executable}


def shown(words: Sequence[str]) -> str:
    """The command with its environment, to be pasted into a shell."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment().items()]
    return " ".join([*settings, shlex.join(words)])


def submit(words: Sequence[str]) -> Job:
    """Hand `command`'s words to Slurm. Raises: ClusterError with what Slurm said."""
    return Job("slurm", told(words, environment()).strip().partition(";")[0])


def status(job: Job) -> JobStatus:
    """What Slurm says of a job. Raises: ClusterError if it does not know it (any more)."""
    return _read(job, told(["scontrol", "show", "job", "--oneliner", job.name]))


def _read(job: Job, line: str) -> JobStatus:
    found = dict(re.findall(r"(\w+)=(\S*)", line))
    state = found["JobState"]
    words = [
        f"nodes {found['NodeList']}" if found.get("NodeList", "(null)") != "(null)" else "",
        f"waiting for {found['Reason']}" if state == "PENDING" else "",
        f"restarts {found['Restarts']}" if found.get("Restarts", "0") != "0" else "",
        f"exit code {found['ExitCode'].partition(':')[0]}" if state not in _ALIVE else "",
    ]
    return JobStatus(str(job), state, state not in _ALIVE, ", ".join(filter(None, words)))


def stop(job: Job, sleep: Callable[[float], None] = time.sleep) -> JobStatus:
    """Tell a job to save a checkpoint and end for good, and wait until it has.

    Raises: ClusterError if Slurm does not know it.
    """
    now = status(job)
    if now.ended:
        return now
    # What the script would do after a notice, Slurm then refuses.
    told(["scontrol", "update", f"JobId={job.name}", "Requeue=0"])
    if now.state == "PENDING":
        told(["scancel", job.name])
    else:
        told(["scancel", "--batch", "--signal=USR1", job.name])
    while not (now := status(job)).ended:
        sleep(1.0)
    return now
