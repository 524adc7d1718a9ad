"""The sbatch line of a recipe; what a real Slurm does with it is in tests/services."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from svfap_dist import bundled
from svfap_dist.cluster import slurm
from svfap_dist.cluster.schedulers import Job, parse_job
from svfap_dist.cluster.slurm import Slurm
from svfap_dist.config import recipe
from svfap_dist.errors import ClusterError, ConfigError
from svfap_dist.train.signals import STOP_SIGNALS, TIME_IS_UP, exit_code


def command(name: str, overrides: list[str], scheduler: Slurm) -> list[str]:
    return scheduler.prepare(name, overrides).content


PLACES = ["data.url=/shards", "run.url=/run"]


def test_a_rank_for_each_gpu_and_the_recipe_that_the_ranks_will_load():
    words = command(
        "svfap_base_voxceleb2", PLACES, Slurm(nodes=2, gpus_per_node=8, time="24:00:00")
    )
    script = next(i for i, word in enumerate(words) if word.endswith("pretrain.sbatch"))
    options = dict(word.partition("=")[::2] for word in words[1:script])
    assert options["--nodes"] == "2"
    assert options["--ntasks-per-node"] == options["--gpus-per-node"] == "8"
    assert options["--cpus-per-task"] == "16"  # cluster.cpus_per_worker of the recipe
    assert options["--time"] == "24:00:00"
    assert options["--signal"] == "B:USR1@300"
    config = recipe.load(words[script + 1], words[script + 2 :])
    assert (config.cluster.num_workers, config.run.url) == (16, "/run")


def test_ray_gets_one_task_per_node_with_the_cpus_of_all_its_ranks():
    scheduler = Slurm(nodes=2, ranks_per_node=2, on="ray", option=("--partition=cpu",))
    words = command("tiny_cpu", [*PLACES, "cluster.cpus_per_worker=3"], scheduler)
    assert {"--ntasks-per-node=1", "--cpus-per-task=6", "--partition=cpu"} <= set(words)
    assert any(word.endswith("ray_cluster.sbatch") for word in words)
    assert "cluster.wait_seconds=300" in words
    assert not any(word.startswith("--gpus") for word in words)


def test_only_an_elastic_run_on_ray_outlives_a_node_that_fails():
    elastic = [*PLACES, "cluster.min_workers=1"]
    for overrides, on, wanted in (
        (elastic, "ray", True),
        (elastic, "srun", False),
        (PLACES, "ray", False),
    ):
        words = command("tiny_cpu", overrides, Slurm(nodes=2, on=on))
        assert ("--no-kill" in words) == wanted


def test_lanes_that_some_nodes_can_share_are_enough_for_an_elastic_run():
    elastic = [*PLACES, "cluster.min_workers=1"]
    assert command("tiny_cpu", elastic, Slurm(nodes=3, on="ray"))
    with pytest.raises(ConfigError, match="Lanes cannot be shared"):
        command("tiny_cpu", elastic, Slurm(nodes=3, on="srun"))


@pytest.mark.parametrize("on", ["srun", "ray"])
def test_a_recipe_with_a_task_is_fine_tuned(on):
    words = command("finetune_dfew", PLACES, Slurm(gpus_per_node=4, on=on))
    assert "--export=ALL,SVFAP_PYTHON,SVFAP_VERB=finetune" in words
    script = next(word for word in words if word.endswith(".sbatch"))
    assert '-m svfap_dist "${SVFAP_VERB:-pretrain}" "$@"' in Path(script).read_text()
    assert not any("SVFAP_VERB" in word for word in command("tiny_cpu", PLACES, Slurm()))


def test_a_recipe_of_ones_own_is_found_from_wherever_the_job_runs(tmp_path, monkeypatch):
    (tmp_path / "own.toml").write_text("[model]\nsize = 'tiny'\n")
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "own.toml") in command("own.toml", PLACES, Slurm())


@pytest.mark.parametrize(
    ("theirs", "whole"),
    [
        ("A=1,HOME", "A=1,HOME,SVFAP_PYTHON,SVFAP_VERB=pretrain"),
        ("NONE", "SVFAP_PYTHON,SVFAP_VERB=pretrain"),
    ],
)
def test_what_a_user_exports_does_not_hide_the_scripts_own_variables(theirs, whole):
    words = command("tiny_cpu", PLACES, Slurm(option=(f"--export={theirs}", "--qos=a")))
    *_, last = (word for word in words if word.startswith("--export="))
    assert last == f"--export={whole}"


def test_the_shown_line_is_the_command_in_a_shells_words():
    submission = Slurm().prepare("tiny_cpu", [*PLACES, "run.name=two words"])
    setting, *rest = shlex.split(submission.text)
    assert setting == f"SVFAP_PYTHON={sys.executable}"
    assert rest == submission.content


@pytest.mark.parametrize(
    ("name", "overrides", "scheduler", "found"),
    [
        ("tiny_cpu", [], Slurm(), "data.url"),
        ("tiny_cpu", PLACES, Slurm(nodes=3), "3 ranks for data.num_lanes = 4"),
        ("tiny_cpu", PLACES, Slurm(on="mpi"), "use srun or ray"),
        ("svfap_base_voxceleb2", PLACES, Slurm(ranks_per_node=8), "--gpus-per-node 8"),
    ],
)
def test_what_cannot_run_is_refused_before_it_queues(name, overrides, scheduler, found):
    with pytest.raises(ConfigError, match=re.escape(found)):
        command(name, overrides, scheduler)


@pytest.mark.parametrize("script", slurm.SCRIPTS.values())
def test_the_scripts_requeue_after_every_stop_that_is_not_the_persons_own(script):
    path = bundled.folder("launch/slurm") / script
    subprocess.run(["bash", "-n", path], check=True)  # its grammar
    (codes,) = re.findall(r"case \$code in (.*)\)", path.read_text())
    wanted = {exit_code(number.name) for number in STOP_SIGNALS if number.name != "SIGINT"}
    assert {int(code) for code in codes.split("|")} == wanted | {exit_code(TIME_IS_UP)}


RUNNING = "JobId=7 JobName=a JobState=RUNNING Reason=None Restarts=2 ExitCode=0:0 NodeList=n[1-2]"
WAITING = (
    "JobId=7 JobName=a JobState=PENDING Reason=Priority Restarts=0 ExitCode=0:0 NodeList=(null)"
)
FAILED = "JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode=7:0 NodeList=n1"


@pytest.mark.parametrize(
    ("line", "ended", "words"),
    [
        (RUNNING, False, "RUNNING: nodes n[1-2], restarts 2"),
        (WAITING, False, "PENDING: waiting for Priority"),
        (FAILED, True, "FAILED: nodes n1, exit code 7"),
    ],
)
def test_what_slurm_says_of_a_job(line, ended, words):
    status = slurm._read(Job("slurm", "7"), line)
    assert status.ended == ended
    assert status.lines() == [f"slurm:7 is {words}"]


def test_names_of_jobs():
    assert parse_job("slurm:4711") == Job("slurm", "4711")
    assert str(parse_job("ray:a-1b")) == "ray:a-1b"
    for text in ("4711", "pbs:1", "slurm:"):
        with pytest.raises(ConfigError, match="slurm:NAME"):
            parse_job(text)


def test_a_machine_without_slurm_is_an_error(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="where scontrol is installed"):
        Slurm().status(Job("slurm", "7"))
