"""A scheduler is one class and one row: the verbs of `svfap launch` follow from them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from svfap_dist import cli, progress
from svfap_dist.cluster import schedulers
from svfap_dist.cluster.schedulers import Job, JobStatus, Submission, cli_option, load_recipe

PLACES = ["data.url=/shards", "run.url=/run"]
STOPPED: list[str] = []


@dataclasses.dataclass(frozen=True)
class Toy:
    """Submit a recipe to a toy.

    Example: svfap launch toy tiny_cpu
    """

    seats: int = cli_option(1, "Number of seats.", min=1)
    tag: tuple[str, ...] = cli_option((), "Tag; may be repeated.")
    loud: bool = cli_option(False, "Be loud.")
    follow: bool = cli_option(False, "Show its output.")

    def prepare(self, name: str, overrides: Sequence[str]) -> Submission:
        config = load_recipe(name, overrides)
        return Submission(f"{config.run.name} {self.seats} {self.tag} {self.loud}", config)

    def submit(self, submission: Submission) -> Job:
        return Job("toy", submission.content.run.name)

    def status(self, job: Job) -> JobStatus:
        return JobStatus(str(job), "PLAYING", job.name in STOPPED)

    def stop(self, job: Job) -> JobStatus:
        STOPPED.append(job.name)
        return self.status(job)

    def follow_job(self, job: Job, write) -> int:
        write("playing\n")
        return 7


@pytest.fixture(autouse=True)
def _row(monkeypatch):
    monkeypatch.setitem(schedulers.SCHEDULERS, "toy", f"{__name__}:Toy")


def svfap(*words: str):
    return CliRunner().invoke(cli.app, ["launch", *words])


def test_a_new_row_is_a_verb_with_its_options_and_help():
    assert "Submit a recipe to a toy." in svfap("--help").stdout
    shown = svfap("toy", "--help").stdout
    assert "--seats" in shown
    assert "Number of seats." in shown
    assert "--no-loud" not in shown
    words = ["toy", "tiny_cpu", *PLACES, "--seats", "3", "--tag", "a", "--tag", "b"]
    assert svfap(*words, "--dry-run").stdout == "tiny_cpu 3 ('a', 'b') False\n"
    assert svfap("toy", "tiny_cpu", "--seats", "0").exit_code == 2
    assert svfap(*words, "--loud").stdout == "toy:tiny_cpu\n"


def test_a_followed_job_gives_its_output_and_its_code():
    done = svfap("toy", "tiny_cpu", *PLACES, "--follow")
    assert (done.stdout, done.exit_code) == ("toy:tiny_cpu\nplaying\n", 7)


def test_its_jobs_are_looked_at_and_stopped():
    assert svfap("status", "toy:a").stdout == "toy:a is PLAYING\n"
    assert json.loads(svfap("stop", "toy:a", "--json").stdout)["ended"]


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("prepare", ["toy", "tiny_cpu", *PLACES], "Preparing the job: "),
        ("submit", ["toy", "tiny_cpu", *PLACES], "Submitting the job: "),
        ("status", ["status", "toy:a"], "Asking for the state of toy:a: "),
        ("stop", ["stop", "toy:a"], "Waiting for toy:a to save a checkpoint and end: "),
    ],
)
def test_no_wait_for_a_scheduler_is_silent(monkeypatch, method: str, words: list[str], said: str):
    """Schedulers take seconds to answer, and a job minutes to save a checkpoint."""
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_TICKS", 0.01)
    monkeypatch.setattr(Toy, method, slow(getattr(Toy, method), lines))
    done = svfap(*words)
    assert done.exit_code == 0
    assert [line for line in lines if line.startswith(said)]


def slow(method: Callable[..., Any], lines: list[str]) -> Callable[..., Any]:
    """A method that takes until two lines have been shown meanwhile, or 1,000 polls."""

    def call(*arguments: Any) -> Any:
        lines.clear()
        for _ in range(1000):
            if len(lines) >= 2:
                break
            time.sleep(0.01)
        return method(*arguments)

    return call


def test_every_scheduler_is_listed_and_none_imports_torch():
    code = "import sys; from typer.testing import CliRunner; from svfap_dist import cli\n"
    code += "for name in ('ray', 'slurm', 'kubernetes'):\n"
    code += "    done = CliRunner().invoke(cli.app, ['launch', name, 'finetune_dfew', "
    code += "'data.url=s3://b/a', 'run.url=s3://b/r', '--dry-run', '--gpus-per-node', '4'][: "
    code += "6 if name == 'ray' else None])\n"
    code += "    assert done.exit_code == 0, done\n"
    code += "print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert {"ray", "slurm", "kubernetes"} <= set(svfap("--help").stdout.split())
