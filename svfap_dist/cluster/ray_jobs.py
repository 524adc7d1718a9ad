"""Ray Jobs: a recipe as a job of a running Ray cluster, through Ray's job agent.

In: a recipe and the address of the cluster's dashboard (http://head:8265). The job's working folder
holds the resolved recipe and, with --ship-code, the code of this installation; otherwise the nodes
have svfap_dist installed. The job runs `svfap pretrain recipe.toml --on ray` (or `finetune`): the
driver is on the cluster and survives a lost connection from here.

Stopping: Ray's job agent sends the driver SIGTERM and kills it 3 seconds later by default. The job
requests `--stop-seconds` instead, in which the ranks save a checkpoint. A cluster with token
authentication (Ray's default) gets the token of RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from svfap_dist import bundled
from svfap_dist.cluster.schedulers import Job, JobStatus, Submission, cli_option, load_recipe, verb
from svfap_dist.config import recipe
from svfap_dist.errors import ClusterError, ConfigError
from svfap_dist.progress import waiting
from svfap_dist.text_file import SAVE_AS_UTF8, decode_text

log = logging.getLogger(__name__)

STOP_SECONDS = 600

_ENTRYPOINT = "exec python -m svfap_dist {verb} recipe.toml --on ray"
_CODE = ("svfap_dist", "data_sharding")
_PENDING = "PENDING"  # Ray's word for a job whose driver has not started
_SECONDS_BETWEEN_POLLS = 1.0
_SECONDS_OF_SILENCE = 60.0  # a run writes a line every ten


@dataclasses.dataclass(frozen=True)
class RayJobs:
    """Submit a recipe as a job of a running Ray cluster (token: RAY_AUTH_TOKEN).

    Example: svfap launch ray svfap_base_voxceleb2 --address http://head:8265
    data.url=s3://bucket/shards run.url=s3://bucket/runs/a --env-file launch/ray/nccl.env --follow
    """

    address: str = cli_option(
        "http://127.0.0.1:8265",
        "Address of Ray's dashboard, http://head:8265.",
        envvar="RAY_API_SERVER_ADDRESS",
    )
    env: tuple[str, ...] = cli_option(
        (),
        "Environment variable of driver and ranks; without a value, as it is here. Repeatable.",
        metavar="NAME[=VALUE]",
    )
    env_file: str = cli_option("", "File of such variables, one NAME=VALUE per line.")
    ship_code: bool = cli_option(False, "Send this installation's code with the job.")
    stop_seconds: int = cli_option(
        STOP_SECONDS, "Seconds that a stopped job has to save a checkpoint.", min=1
    )
    follow: bool = cli_option(False, "Show the job's output until it ends.")

    def prepare(self, name: str, overrides: Sequence[str]) -> Submission:
        """See `Scheduler.prepare`; the content is arguments of `submit_job`, and recipe.toml."""
        config = load_recipe(name, overrides)
        word = re.sub(r"[^A-Za-z0-9_-]+", "-", config.run.name)
        env = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_seconds), **self._variables()}
        arguments = {
            "entrypoint": _ENTRYPOINT.format(verb=verb(config)),
            "submission_id": f"{word}-{uuid.uuid4().hex[:8]}",
            "runtime_env": {"env_vars": env},
            "metadata": {"run_url": config.run.url},
        }
        code = ", with the code of this installation" * self.ship_code
        lines = [
            f"# job {arguments['submission_id']}{code}",
            f"# {arguments['entrypoint']}",
            *(f"# env {name}={_shown(name, value)}" for name, value in env.items()),
            recipe.dumps(config),
        ]
        return Submission("\n".join(lines), (arguments, recipe.dumps(config)))

    def submit(self, submission: Submission) -> Job:
        """See `Scheduler.submit`."""
        arguments, recipe_text = submission.content
        with self._client() as client, tempfile.TemporaryDirectory() as folder:
            Path(folder, "recipe.toml").write_text(recipe_text)
            if self.ship_code:
                _copy_code(folder)
            environment = {**arguments["runtime_env"], "working_dir": folder}
            client.submit_job(**{**arguments, "runtime_env": environment})
        return Job("ray", arguments["submission_id"])

    def status(self, job: Job) -> JobStatus:
        """See `Scheduler.status`."""
        with self._client() as client:
            return _status(client, job)

    def stop(self, job: Job) -> JobStatus:
        """See `Scheduler.stop`."""
        with self._client() as client:
            client.stop_job(job.name)
            while not (now := _status(client, job)).ended:
                time.sleep(_SECONDS_BETWEEN_POLLS)
        return now

    def follow_job(self, job: Job, write: Callable[[str], object]) -> int:
        """Pass on a job's output from its beginning until it ends; reconnect where needed.

        Args:
            job: Result of `submit`.
            write: Called with pieces of the output.

        Returns:
            The job's exit code where Ray knows it, 143 for a stopped job.

        Raises:
            ClusterError: If the cluster cannot be reached any more.
        """
        import aiohttp

        written = 0
        with self._client() as client:

            async def copy() -> None:
                nonlocal written
                skip = written  # a new connection sends everything from the beginning
                texts = aiter(client.tail_job_logs(job.name))
                while text := await asyncio.wait_for(anext(texts, ""), _SECONDS_OF_SILENCE):
                    written += len(text[skip:])
                    write(text[skip:])
                    skip = max(0, skip - len(text))

            if not (now := _wait_for_start(client, job)).ended:
                log.info("%s", "\n".join(now.lines()))
            while not now.ended:
                # A broken or silent connection: `_status` raises if the cluster is gone.
                with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
                    asyncio.run(copy())
                time.sleep(_SECONDS_BETWEEN_POLLS)
                now = _status(client, job)
            write(client.get_job_logs(job.name)[written:])
        log.info("%s", "\n".join(now.lines()))
        return _exit_code(now)

    def _variables(self) -> dict[str, str]:
        """Return the variables of --env-file, then those of --env."""
        lines: list[str] = []
        if self.env_file:
            try:
                lines = decode_text(Path(self.env_file).read_bytes()).splitlines()
            except (OSError, ValueError) as error:
                do = "check --env-file" if isinstance(error, OSError) else SAVE_AS_UTF8
                title = "Cannot read the environment file"
                raise ConfigError(title, self.env_file, str(error), do) from error
        words = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
        found: dict[str, str] = {}
        for setting in [*words, *self.env]:
            name, equals, value = setting.partition("=")
            if not equals and name not in os.environ:
                advice = f"set it, or give --env {name}=VALUE"
                raise ConfigError("Unset variable", f"--env {name}", "it is not set here", advice)
            found[name] = value if equals else os.environ[name]
        return found

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        """Yield Ray's client, whose errors become ours."""
        names, file = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}, Path.home() / ".ray" / "auth_token"
        if names & os.environ.keys() or file.exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        for chatty in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # a line per upload otherwise
            logging.getLogger(chatty).setLevel(logging.WARNING)
        try:
            yield JobSubmissionClient(self.address)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            title, found = "Ray cluster refused or unreachable", str(error).strip().splitlines()[0]
            advice = "check --address (the dashboard, e.g. http://head:8265) and RAY_AUTH_TOKEN"
            raise ClusterError(title, self.address, found, advice) from error


def _copy_code(folder: str) -> None:
    """Copy the packages and the files they carry, laid out as in a checkout."""
    package = Path(__file__).resolve().parent.parent
    ignored = shutil.ignore_patterns("__pycache__", "_bundled")
    sources = [package.parent / name for name in _CODE]
    sources += [bundled.folder(name) for name in bundled.FOLDERS]
    for source in sources:
        shutil.copytree(source, Path(folder, source.name), ignore=ignored)


def _shown(name: str, value: str) -> str:
    """Return the value of a variable for people, hidden if its name says that it is a secret."""
    return "(hidden)" if re.search("KEY|SECRET|TOKEN|PASSW|CREDENTIAL", name.upper()) else value


def _status(client: Any, job: Job) -> JobStatus:
    info = client.get_job_info(job.name)
    ended = info.status.is_terminal()
    detail = info.metadata.get("run_url", "") if info.metadata else ""
    code = "" if info.driver_exit_code is None else f"exit code {info.driver_exit_code}"
    words = [code, detail] if ended else [detail]
    return JobStatus(str(job), str(info.status.value), ended, ", ".join(filter(None, words)))


def _wait_for_start(client: Any, job: Job) -> JobStatus:
    """Return a job's state once it has started or ended; until then show that it is pending."""
    with waiting(f"{job} is {_PENDING}"):
        while (now := _status(client, job)).state == _PENDING:
            time.sleep(_SECONDS_BETWEEN_POLLS)
    return now


def _exit_code(result: JobStatus) -> int:
    """Return the exit code for a command that followed a job."""
    if result.state == "STOPPED":
        return 128 + signal.SIGTERM  # Ray knows none
    found = re.match(r"exit code (\d+)", result.detail)
    return int(found[1]) if found else ClusterError.exit_code
