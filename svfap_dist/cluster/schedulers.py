"""Schedulers that run a recipe as a job: their table, and what they have in common.

In: a recipe, overrides and the scheduler's options. Out: a `Job`, written `scheduler:name` (e.g.
`slurm:4711`), which `svfap launch status` and `stop` take. A run that is started again resumes, so
a job carries a recipe and no state. To add a scheduler, write a class as `Scheduler` describes it
and add a row to `SCHEDULERS`; `svfap launch NAME` and its options follow from the class.
"""

from __future__ import annotations

import dataclasses
import os
import pkgutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from svfap_dist.config import Config, recipe, require_urls, with_device
from svfap_dist.errors import ClusterError, ConfigError

# Place of each scheduler's class, by name; imported when it is used.
SCHEDULERS = {
    "ray": "svfap_dist.cluster.ray_jobs:RayJobs",
    "slurm": "svfap_dist.cluster.slurm:Slurm",
    "kubernetes": "svfap_dist.cluster.kubernetes:Kubernetes",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of a scheduler. name: the scheduler's own name for it."""

    scheduler: str
    name: str

    def __str__(self) -> str:
        return f"{self.scheduler}:{self.name}"


@dataclasses.dataclass(frozen=True)
class JobStatus:
    """State of a job. state: in the scheduler's words. ended: whether it will not run any more."""

    job: str
    state: str
    ended: bool
    detail: str = ""

    def lines(self) -> list[str]:
        """Return the status as text."""
        return [f"{self.job} is {self.state}{': ' if self.detail else ''}{self.detail}"]


@dataclasses.dataclass(frozen=True)
class Submission:
    """A checked job. text: for people, e.g. a dry run. content: what the scheduler submits."""

    text: str
    content: Any


class Scheduler(Protocol):
    """A frozen dataclass whose fields, made by `cli_option`, are options of `svfap launch NAME`.

    Its docstring is the verb's help. With a field `follow` it also has `follow_job(job, write)`,
    which passes on the job's output until it ends and returns an exit code.
    """

    def prepare(self, name: str, overrides: Sequence[str]) -> Submission:
        """Return the job of a recipe, checked as far as possible without the cluster.

        Args:
            name: The recipe, a path or a bundled name.
            overrides: Texts `section.key=value`.

        Raises:
            ConfigError: If the recipe or the options are wrong, or do not fit each other.
        """
        ...

    def submit(self, submission: Submission) -> Job:
        """Submit a job.

        Args:
            submission: Result of `prepare`.

        Raises:
            ClusterError: If the scheduler cannot be reached or refuses.
        """
        ...

    def status(self, job: Job) -> JobStatus:
        """Return a job's state.

        Args:
            job: Result of `submit`.

        Raises:
            ClusterError: If the scheduler cannot be reached or does not know the job.
        """
        ...

    def stop(self, job: Job) -> JobStatus:
        """Stop a job: let it save a checkpoint, and wait until it has ended.

        Args:
            job: Result of `submit`.

        Raises:
            ClusterError: If the scheduler cannot be reached or does not know the job.
        """
        ...


def cli_option(default: Any, help: str, **more: Any) -> Any:
    """Return a dataclass field that is an option of the command line.

    Args:
        default: Its default; () for an option that may be repeated.
        help: Its help text, with the unit.
        **more: Further arguments of `typer.Option`: min, metavar, envvar.
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


def scheduler_class(name: str) -> Any:
    """Return the class of a scheduler.

    Args:
        name: Key of `SCHEDULERS`.
    """
    return pkgutil.resolve_name(SCHEDULERS[name])


def parse_job(text: str) -> Job:
    """Return the job that a text names.

    Args:
        text: "scheduler:name", as `svfap launch` prints it.

    Raises:
        ConfigError: If it has another form or an unknown scheduler.
    """
    scheduler, _, name = text.partition(":")
    if scheduler not in SCHEDULERS or not name:
        forms = ", ".join(f"{scheduler}:NAME" for scheduler in SCHEDULERS)
        advice = "give the name that `svfap launch` printed, e.g. slurm:4711"
        raise ConfigError("No such job", text, f"not one of {forms}", advice)
    return Job(scheduler, name)


def load_recipe(name: str, overrides: Sequence[str]) -> Config:
    """Return a resolved recipe that has the URLs to read from and write to.

    A job requests GPUs where the recipe leaves that open.

    Args:
        name: Path or bundled name.
        overrides: Texts `section.key=value`.

    Raises:
        ConfigError: If the recipe is wrong or lacks a URL.
    """
    config = recipe.load(name, overrides)
    require_urls(config, hint="an s3:// prefix, or a folder that all nodes share")
    return with_device(config, lambda: True)


def verb(config: Config) -> str:
    """Return the verb of the command line that runs a recipe.

    Args:
        config: The recipe.
    """
    return "pretrain" if config.task is None else "finetune"


def run_scheduler_command(
    command: Sequence[str], env: Mapping[str, str] | None = None, stdin: str = ""
) -> str:
    """Run a command of a scheduler and return its standard output.

    Args:
        command: The program and its arguments.
        env: Environment variables beside this process's.
        stdin: Text for its standard input.

    Raises:
        ClusterError: If there is no such program, it fails, or it takes more than 120 s.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own words, no shell
            command,
            env=os.environ | dict(env or {}),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        advice = f"run this where {command[0]} is installed and works"
        raise ClusterError("Cannot run the scheduler", command[0], str(error), advice) from error
    if done.returncode:
        found = done.stderr.strip() or f"exit code {done.returncode}"
        advice = "see the scheduler's output above; --dry-run shows the whole command"
        raise ClusterError(f"`{command[0]}` failed", " ".join(command[:6]), found, advice)
    return done.stdout
