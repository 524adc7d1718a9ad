"""Ray's door: a recipe as a job of a running Ray cluster, through Ray's job agent.

In: a recipe and the address of the cluster's dashboard (http://head:8265). The job's working
folder holds the resolved recipe and, if asked for, the code of this installation; else the nodes
have svfap_dist installed. The job's command is `svfap pretrain
recipe.toml --on ray` (or `finetune`): its driver
runs on the cluster, and survives the connection from here.

Stopping: Ray's job agent sends the driver SIGTERM and kills it a while later, by default after 3
seconds. The job asks for `stop_seconds` instead, in which the ranks save a checkpoint. A cluster
that asks for a token (Ray's default) gets that of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
~/.ray/auth_token.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svfap_dist import bundled
from svfap_dist.cluster.schedulers import Job, JobStatus, checked, verb
from svfap_dist.config import recipe
from svfap_dist.errors import ClusterError, ConfigError

ENTRYPOINT = "exec python -m svfap_dist {verb} recipe.toml --on ray"
STOP_SECONDS = 600
_CODE = ("svfap_dist", "data_sharding")
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_OF_SILENCE = 60.0  # a run says something every ten


@dataclasses.dataclass(frozen=True)
class Submission:
    """What Ray's job agent is told; `recipe` is the text of recipe.toml in the working folder."""

    job_id: str
    entrypoint: str
    env: dict[str, str]
    metadata: dict[str, str]
    recipe: str
    ship_code: bool

    def lines(self) -> list[str]:
        """For people: everything but the code."""
        return [
            f"# job {self.job_id}{', with the code of this installation' * self.ship_code}",
            f"# {self.entrypoint}",
            *(f"# env {name}={value}" for name, value in self.env.items()),
            self.recipe,
        ]


def submission(
    name: str,
    overrides: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    ship_code: bool = False,
    stop_seconds: int = STOP_SECONDS,
) -> Submission:
    """A job that runs recipe `name`, with `env` for driver and ranks. Raises: ConfigError."""
    config = checked(name, overrides)
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", config.run.name)
    return Submission(
        job_id=f"{word}-{uuid.uuid4().hex[:8]}",
        entrypoint=ENTRYPOINT.format(verb=verb(config)),
        env={"RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds), **(env or {})},
        metadata={"run_url": config.run.url},
        recipe=recipe.dumps(config),
        ship_code=ship_code,
    )


def environment(settings: Sequence[str], file: str = "") -> dict[str, str]:
    """Variables from a file of NAME=VALUE lines, then `NAME=VALUE` or `NAME` (this process's own).

    Raises: ConfigError.
    """
    found: dict[str, str] = {}
    lines = []
    if file:
        try:
            lines = Path(file).read_text().splitlines()
        except OSError as error:
            raise ConfigError(
                "Cannot read the environment file",
                where=file,
                found=str(error),
                do="check --env-file",
            ) from error
    words = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    for setting in [*words, *settings]:
        name, equals, value = setting.partition("=")
        if not equals:
            if name not in os.environ:
                raise ConfigError(
                    "No such variable here",
                    where=f"--env {name}",
                    found="it is not set",
                    do=f"set it, or give --env {name}=VALUE",
                )
            value = os.environ[name]
        found[name] = value
    return found


def submit(address: str, wanted: Submission) -> Job:
    """Hand a job to the cluster. Raises: ClusterError if it cannot be reached or refuses."""
    with _client(address) as client, tempfile.TemporaryDirectory() as folder:
        Path(folder, "recipe.toml").write_text(wanted.recipe)
        if wanted.ship_code:
            _copy_code(folder)
        client.submit_job(
            entrypoint=wanted.entrypoint,
            submission_id=wanted.job_id,
            runtime_env={"working_dir": folder, "env_vars": wanted.env},
            metadata=wanted.metadata,
        )
    return Job("ray", wanted.job_id)


def _copy_code(folder: str) -> None:
    """The packages and the files they carry, laid out as in a checkout."""
    package = Path(__file__).resolve().parent.parent
    ignored = shutil.ignore_patterns("__pycache__", "_bundled")
    sources = [package.parent / name for name in _CODE]
    sources += [bundled.folder(name) for name in bundled.FOLDERS]
    for source in sources:
        shutil.copytree(source, Path(folder, source.name), ignore=ignored)


def status(address: str, job: Job) -> JobStatus:
    """What the cluster says of a job. Raises: ClusterError."""
    with _client(address) as client:
        return _status(client, job)


def _status(client: Any, job: Job) -> JobStatus:
    info = client.get_job_info(job.name)
    ended = info.status.is_terminal()
    detail = info.metadata.get("run_url", "") if info.metadata else ""
    code = "" if info.driver_exit_code is None else f"exit code {info.driver_exit_code}"
    words = [code, detail] if ended else [detail]
    return JobStatus(str(job), str(info.status.value), ended, ", ".join(filter(None, words)))


def follow(address: str, job: Job, write: Callable[[str], object]) -> JobStatus:
    """Write a job's output as it comes, from its beginning, until it has ended.

    A connection that breaks is made again. Raises: ClusterError if the cluster is gone.
    """
    import aiohttp

    written = 0
    with _client(address) as client:

        async def copy() -> None:
            nonlocal written
            skip = written  # a new connection tells everything from the beginning
            texts = aiter(client.tail_job_logs(job.name))
            while text := await asyncio.wait_for(anext(texts, ""), _SECONDS_OF_SILENCE):
                written += len(text[skip:])
                write(text[skip:])
                skip = max(0, skip - len(text))

        while not (now := _status(client, job)).ended:
            # The connection broke or is silent; whether the cluster is there, `_status` finds out.
            with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
                asyncio.run(copy())
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        rest = client.get_job_logs(job.name)
        write(rest[written:])
    return now


def exit_code(result: JobStatus) -> int:
    """Of a command that followed a job: the job's own where Ray knows it.

    A job that was stopped has none: it was told to by SIGTERM.
    """
    if result.state == "STOPPED":
        return 128 + signal.SIGTERM
    found = re.match(r"exit code (\d+)", result.detail)
    return int(found[1]) if found else ClusterError.exit_code


def stop(address: str, job: Job) -> JobStatus:
    """Tell a job to save a checkpoint and end, and wait until it has. Raises: ClusterError."""
    with _client(address) as client:
        client.stop_job(job.name)
        while not (now := _status(client, job)).ended:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    return now


@contextlib.contextmanager
def _client(address: str) -> Iterator[Any]:
    """Ray's client, its errors told as ours."""
    names, file = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}, Path.home() / ".ray" / "auth_token"
    if names & os.environ.keys() or file.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # to be there before Ray is imported
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    for chatty in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # each has a level of its own
        logging.getLogger(chatty).setLevel(logging.WARNING)  # else they tell of every upload
    try:
        yield JobSubmissionClient(address)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            "Ray cluster refuses or cannot be reached",
            where=address,
            found=str(error).strip().splitlines()[0],
            do="check --address (the dashboard, e.g. http://head:8265) and RAY_AUTH_TOKEN",
        ) from error
