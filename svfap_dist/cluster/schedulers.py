"""Jobs: what the doors to a cluster (Ray, Slurm, Kubernetes) have in common.

A job is named `door:name`, e.g. `slurm:4711`; `svfap launch status` and `stop` take that name.
Whatever the door, the same run started again resumes, so a job carries nothing but a recipe.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Mapping, Sequence

from svfap_dist.config import Config, recipe, require_urls
from svfap_dist.errors import ClusterError, ConfigError

DOORS = ("ray", "slurm", "kubernetes")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job behind one of the doors."""

    door: str
    name: str  # what the scheduler calls it

    def __str__(self) -> str:
        return f"{self.door}:{self.name}"


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """What the scheduler says of a job. ended: it will not run any more."""

    job: str
    state: str  # in the scheduler's word
    ended: bool
    detail: str = ""

    def lines(self) -> list[str]:
        """For people."""
        return [f"{self.job} is {self.state}{': ' if self.detail else ''}{self.detail}"]


def parse(text: str) -> Job:
    """The job that `text` names. Raises: ConfigError."""
    door, _, name = text.partition(":")
    if door not in DOORS or not name:
        raise ConfigError(
            "No such job",
            where=text,
            found=f"not one of {', '.join(f'{door}:NAME' for door in DOORS)}",
            do="give the name that `svfap launch` printed, e.g. slurm:4711",
        )
    return Job(door, name)


def checked(name: str, overrides: Sequence[str]) -> Config:
    """The resolved recipe, as far as it can be checked without the cluster.

    Raises: ConfigError.
    """
    config = recipe.load(name, overrides)
    require_urls(config, hint="an s3:// prefix, or a folder that all nodes share")
    return config


def verb(config: Config) -> str:
    """The verb of the command line that runs a recipe."""
    return "pretrain" if config.task is None else "finetune"


def told(command: Sequence[str], env: Mapping[str, str] | None = None, stdin: str = "") -> str:
    """Standard output of a scheduler's command; `env` comes on top of this process's.

    Raises: ClusterError if there is no such command or it fails.
    """
    try:
        done = subprocess.run(  # noqa: S603 - words of ours, no shell
            command,
            env=os.environ | dict(env or {}),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            "Scheduler cannot be asked",
            where=command[0],
            found=str(error),
            do=f"run this where {command[0]} is installed and works",
        ) from error
    if done.returncode:
        raise ClusterError(
            "Scheduler refuses",
            where=" ".join(command[:6]),
            found=done.stderr.strip() or f"exit code {done.returncode}",
            do="see its words; --dry-run shows the whole command",
        )
    return done.stdout
