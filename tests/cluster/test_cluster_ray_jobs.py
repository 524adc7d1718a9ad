"""A recipe as a Ray job; what a real cluster does with it is in tests/services."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import types
from collections.abc import AsyncIterator

import pytest
from ray.job_submission import JobStatus as JobState

from svfap_dist import progress
from svfap_dist.cluster import ray_jobs
from svfap_dist.cluster.ray_jobs import RayJobs
from svfap_dist.cluster.schedulers import Job, JobStatus
from svfap_dist.config import recipe
from svfap_dist.errors import ClusterError, ConfigError

PLACES = ["data.url=s3://b/shards", "run.url=s3://b/run"]


def test_the_job_carries_the_resolved_recipe_and_time_to_save(tmp_path):
    overrides = [*PLACES, "train.max_steps=7", "run.name=my run"]
    wanted = RayJobs(env=("A=1",), stop_seconds=42).prepare("tiny_cpu", overrides)
    arguments, text = wanted.content
    (tmp_path / "recipe.toml").write_text(text)
    assert text in wanted.text
    assert recipe.load(str(tmp_path / "recipe.toml")) == recipe.load("tiny_cpu", overrides)
    assert arguments["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "42", "A": "1"}
    assert arguments["metadata"] == {"run_url": "s3://b/run"}
    assert arguments["submission_id"].startswith("my-run-")
    again, _ = RayJobs().prepare("tiny_cpu", overrides).content
    assert again["submission_id"] != arguments["submission_id"]
    assert "svfap_dist pretrain recipe.toml --on ray" in again["entrypoint"]
    labeled, _ = RayJobs().prepare("finetune_dfew", PLACES).content
    assert "svfap_dist finetune recipe.toml --on ray" in labeled["entrypoint"]


def test_variables_come_from_a_file_from_here_and_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HERE", "x=y")
    file = tmp_path / "some.env"
    file.write_text("# why\nA=1\n\nB=2\n")
    found = RayJobs(env=("B=3", "HERE", "EMPTY="), env_file=str(file))._variables()
    assert found == {"A": "1", "B": "3", "HERE": "x=y", "EMPTY": ""}
    secret = RayJobs(env=("AWS_SECRET_ACCESS_KEY=hush",)).prepare("tiny_cpu", PLACES)
    assert "hush" not in secret.text
    assert secret.content[0]["runtime_env"]["env_vars"]["AWS_SECRET_ACCESS_KEY"] == "hush"
    with pytest.raises(ConfigError, match="--env NOWHERE"):
        RayJobs(env=("NOWHERE",)).prepare("tiny_cpu", PLACES)
    with pytest.raises(ConfigError, match="no-such"):
        RayJobs(env_file=str(tmp_path / "no-such")).prepare("tiny_cpu", PLACES)
    file.write_bytes("A=é".encode("utf-16"))
    with pytest.raises(ConfigError, match="UTF-16"):
        RayJobs(env_file=str(file)).prepare("tiny_cpu", PLACES)
    file.write_bytes("A=é".encode("utf-8-sig"))
    assert RayJobs(env_file=str(file))._variables() == {"A": "é"}


def test_shipped_code_runs_from_its_folder_alone(tmp_path):
    """In a Python that has no other way to the package, with the recipe's bundled files."""
    ray_jobs._copy_code(str(tmp_path))
    code = "import svfap_dist, data_sharding; from svfap_dist.config import recipe; "
    code += "print(svfap_dist.__file__, recipe.load('tiny_cpu').model.size)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "svfap_dist" / "__init__.py"), "tiny"]
    assert (tmp_path / "launch" / "recipes" / "tiny_cpu.toml").exists()


@pytest.mark.parametrize(
    ("state", "detail", "code"),
    [
        ("SUCCEEDED", "exit code 0, s3://b/run", 0),
        ("FAILED", "exit code 75, s3://b/run", 75),
        ("FAILED", "", ClusterError.exit_code),  # Ray could not start it
        ("STOPPED", "s3://b/run", 143),
    ],
)
def test_a_followed_job_ends_the_command_with_its_own_code(state, detail, code):
    assert ray_jobs._exit_code(JobStatus("ray:a", state, True, detail)) == code


class PendingClient:
    """Ray's client for a job that is pending until two lines say so, or for 1,000 polls."""

    def __init__(self, lines: list[str]) -> None:
        self._lines, self._polls, self._ran = lines, 0, False

    def get_job_info(self, name: str) -> types.SimpleNamespace:
        self._polls += 1
        status = JobState.SUCCEEDED if self._ran else JobState.RUNNING
        if len(self._lines) < 2 and self._polls < 1000:
            status = JobState.PENDING
        code = 0 if self._ran else None
        return types.SimpleNamespace(status=status, metadata={}, driver_exit_code=code)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self._ran = True
        yield "step 1\n"

    def get_job_logs(self, name: str) -> str:
        return "step 1\nstep 2\n"


def test_a_followed_job_is_not_silent_while_it_waits_to_start(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    lines: list[str] = []
    output: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_TICKS", 0.01)
    monkeypatch.setattr(ray_jobs, "_SECONDS_BETWEEN_POLLS", 0.01)
    client = contextlib.nullcontext(PendingClient(lines))
    monkeypatch.setattr(RayJobs, "_client", lambda self: client)
    assert RayJobs().follow_job(Job("ray", "a"), output.append) == 0
    assert lines
    assert all(line.startswith("ray:a is PENDING: ") for line in lines)
    assert [
        record.getMessage() for record in caplog.records if record.name == ray_jobs.__name__
    ] == [
        "ray:a is RUNNING",
        "ray:a is SUCCEEDED: exit code 0",
    ]
    assert "".join(output) == "step 1\nstep 2\n"


def test_a_missing_cluster_is_an_error():
    with pytest.raises(ClusterError, match="--address"):
        RayJobs(address="http://127.0.0.1:9").status(Job("ray", "a"))
