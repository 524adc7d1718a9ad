"""Slurm: the sbatch command of a recipe, and a job's state and end.

The scripts are launch/slurm/*.sbatch, plain files that read nothing but the allocation and their
arguments. What is decided here becomes options of sbatch, which win over those in the file, so a
dry run prints one line that does the same when pasted into a shell.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence

from svfap_dist import bundled
from svfap_dist.cluster.schedulers import (
    Job,
    JobStatus,
    Submission,
    cli_option,
    load_recipe,
    run_scheduler_command,
    verb,
)
from svfap_dist.config import check_world_size
from svfap_dist.errors import ConfigError

SCRIPTS = {"srun": "pretrain.sbatch", "ray": "ray_cluster.sbatch"}

_SECONDS_TO_JOIN = 300  # for Ray's nodes
_SECONDS_BETWEEN_POLLS = 1.0
_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Submit a recipe to Slurm.

    Example: svfap launch slurm svfap_base_voxceleb2 --nodes 2 --gpus-per-node 8 --time 24:00:00
    data.url=/shared/shards run.url=/shared/runs/a
    """

    nodes: int = cli_option(1, "Number of nodes.", min=1)
    gpus_per_node: int = cli_option(0, "GPUs of a node, each with one rank.", min=0)
    ranks_per_node: int = cli_option(
        0, "Ranks per node for CPU runs (default 0: one per GPU, at least one).", min=0
    )
    time: str = cli_option("", "Time limit of one attempt, e.g. 24:00:00; then it is requeued.")
    notice_seconds: int = cli_option(
        300, "Seconds before the time limit at which the ranks save a checkpoint.", min=1
    )
    on: str = cli_option("srun", "srun: one task per rank; ray: a Ray cluster across the nodes.")
    script: str = cli_option("", "An sbatch script to use instead of the bundled one.")
    option: tuple[str, ...] = cli_option(
        (),
        "Further option for sbatch, e.g. --option=--partition=gpu; repeatable.",
        metavar="--NAME=VALUE",
    )

    def prepare(self, name: str, overrides: Sequence[str]) -> Submission:
        """See `Scheduler.prepare`; the content is the words of the sbatch command."""
        if self.on not in SCRIPTS:
            advice = f"use {' or '.join(SCRIPTS)}"
            raise ConfigError("Unknown way to start ranks", "--on", self.on, advice)
        ranks = self.ranks_per_node or self.gpus_per_node or 1
        own = [f"cluster.num_workers={self.nodes * ranks}"]
        if self.on == "ray":
            own.append(f"cluster.wait_seconds={_SECONDS_TO_JOIN}")
        config = load_recipe(name, [*overrides, *own])
        elastic = self.on == "ray" and config.cluster.min_workers > 0
        if not elastic:
            check_world_size(config, self.nodes * ranks, key="--nodes times ranks per node")
        if config.cluster.on_gpu and self.gpus_per_node < ranks:
            found = f"{self.gpus_per_node} for {ranks} ranks, and cluster.use_gpu = true"
            advice = f"give --gpus-per-node {ranks}, or cluster.use_gpu=false"
            raise ConfigError("Too few GPUs for the ranks", "--gpus-per-node", found, advice)
        # A Slurm task is a rank, or the Ray process of a node.
        tasks, cpus = (1, ranks) if self.on == "ray" else (ranks, 1)
        script = self.script or bundled.folder("launch/slurm") / SCRIPTS[self.on]
        words = [
            "sbatch",
            "--parsable",
            f"--job-name={config.run.name}",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={tasks}",
            f"--cpus-per-task={cpus * config.cluster.cpus_per_worker}",
            *([f"--gpus-per-node={self.gpus_per_node}"] if self.gpus_per_node else []),
            *([f"--time={self.time}"] if self.time else []),
            f"--signal=B:USR1@{self.notice_seconds}",
            *(["--no-kill"] if elastic else []),  # the job outlives a node that fails
            *self.option,
            *_export(self.option, verb(config)),
            str(script),
            os.path.abspath(name) if name.endswith(".toml") else name,
            *overrides,
            *own,
        ]
        settings = [f"{key}={shlex.quote(value)}" for key, value in _environment().items()]
        return Submission(" ".join([*settings, shlex.join(words)]), words)

    def submit(self, submission: Submission) -> Job:
        """See `Scheduler.submit`."""
        printed = run_scheduler_command(submission.content, _environment())
        return Job("slurm", printed.strip().partition(";")[0])

    def status(self, job: Job) -> JobStatus:
        """See `Scheduler.status`."""
        command = ["scontrol", "show", "job", "--oneliner", job.name]
        return _read(job, run_scheduler_command(command))

    def stop(self, job: Job) -> JobStatus:
        """See `Scheduler.stop`."""
        now = self.status(job)
        if now.ended:
            return now
        # The script requeues the job after a notice; Slurm refuses that from here on.
        run_scheduler_command(["scontrol", "update", f"JobId={job.name}", "Requeue=0"])
        notice = [] if now.state == "PENDING" else ["--batch", "--signal=USR1"]
        run_scheduler_command(["scancel", *notice, job.name])
        while not (now := self.status(job)).ended:
            time.sleep(_SECONDS_BETWEEN_POLLS)
        return now


def _export(options: Sequence[str], verb: str) -> list[str]:
    """Return the option that adds the script's own variables to those the user exports."""
    wanted = [option.partition("=")[2] for option in options if option.startswith("--export=")]
    if not wanted and verb == "pretrain":
        return []  # sbatch exports everything, and the script's defaults suffice
    theirs = (wanted or ["ALL"])[-1]
    names = [] if theirs in ("NONE", "NIL") else [theirs]
    return [f"--export={','.join([*names, 'SVFAP_PYTHON', f'SVFAP_VERB={verb}'])}"]


def _environment() -> dict[str, str]:
    """Return the variables of the script: this Python, which all nodes must have."""
    return {"SVFAP_PYTHON": sys.executable}


def _read(job: Job, line: str) -> JobStatus:
    """Return the state in a line of `scontrol show job`."""
    found = dict(re.findall(r"(\w+)=(\S*)", line))
    state = found["JobState"]
    words = [
        f"nodes {found['NodeList']}" if found.get("NodeList", "(null)") != "(null)" else "",
        f"waiting for {found['Reason']}" if state == "PENDING" else "",
        f"restarts {found['Restarts']}" if found.get("Restarts", "0") != "0" else "",
        f"exit code {found['ExitCode'].partition(':')[0]}" if state not in _ALIVE else "",
    ]
    return JobStatus(str(job), state, state not in _ALIVE, ", ".join(filter(None, words)))
