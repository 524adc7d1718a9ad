"""docs/commands.md says what the code does: exit codes and the fields of --json."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from data_sharding.faces.folder import FacesSummary
from data_sharding.pipeline import ShardSummary
from data_sharding.show import Statistics
from data_sharding.verify import Verified
from svfap_dist import cli, errors
from svfap_dist.checkpoint.gc import GcPlan
from svfap_dist.checkpoint.reshard import ReshardResult
from svfap_dist.cli import checkpoints
from svfap_dist.cluster.schedulers import JobStatus
from svfap_dist.cluster.sweep import SweepResult, Trial
from svfap_dist.doctor import examine
from svfap_dist.doctor.finding import Finding
from svfap_dist.evaluate.results import Results
from svfap_dist.evaluate.spread import SeededResults
from svfap_dist.inference.export import ExportResult
from svfap_dist.inference.extract import ExtractResult
from svfap_dist.inference.extract_parts import ExtractPartsResult
from svfap_dist.inference.predict import Prediction, PredictResult
from svfap_dist.model.weights import Imported
from svfap_dist.plan.planner import Plan
from svfap_dist.train.attempt import RunResult
from svfap_dist.train.audit import Audit
from svfap_dist.train.finetune import FinetuneResult
from svfap_dist.train.signals import EX_TEMPFAIL

PAGE = (Path(__file__).parents[1] / "docs/commands.md").read_text()
# Results by verb: dataclasses, or functions that write the fields' names.
RESULTS: dict[str, tuple[Any, ...]] = {
    "doctor": (examine.Examination, Finding),
    "plan": (Plan,),
    "faces": (FacesSummary,),
    "shard": (ShardSummary,),
    "shards verify": (Verified,),
    "shards show": (Statistics,),
    "pretrain": (RunResult,),
    "sweep": (SweepResult, Trial),
    "audit": (Audit,),
    "checkpoint ls": (checkpoints.checkpoint_ls,),
    "checkpoint verify": (checkpoints.checkpoint_verify,),
    "checkpoint gc": (GcPlan,),
    "checkpoint reshape": (ReshardResult,),
    "finetune": (Results.to_json, SeededResults.to_json, FinetuneResult),
    "evaluate": (Results.to_json,),
    "extract": (ExtractResult, ExtractPartsResult),
    "predict": (PredictResult, Prediction),
    "import": (Imported,),
    "export": (ExportResult,),
    "launch status": (JobStatus,),
    "launch stop": (JobStatus,),
}


def rows(title: str) -> list[list[str]]:
    """The cells of a section's table."""
    section = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_exit_codes_are_those_of_the_code():
    assert {code: meaning for code, meaning in rows("Exit codes")} == {  # noqa: C416 - two cells each
        **{str(code): meaning for code, meaning in errors.EXIT_CODES.items()},
        errors.SIGNAL_EXIT_CODE: errors.SIGNAL_EXIT_MEANING,
    }
    of_errors = {kind.exit_code for kind in subclasses(errors.SvfapError)}
    assert of_errors | {0, examine.EXIT_CODE, EX_TEMPFAIL} == errors.EXIT_CODES.keys() - {1}


def subclasses(kind: type) -> Iterator[Any]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def test_help_lists_the_exit_codes():
    command = [sys.executable, "-m", "svfap_dist", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for code, meaning in errors.EXIT_CODES.items():
        assert re.search(rf"^ +{code} +{re.escape(meaning)}$", shown, re.MULTILINE), shown
    assert f"{errors.SIGNAL_EXIT_CODE}  " in shown


def fields_of(result: Any) -> set[str]:
    if dataclasses.is_dataclass(result):
        return {field.name for field in dataclasses.fields(result)}
    return set(re.findall(r'"(\w+)"', inspect.getsource(result)))


def test_fields_of_json_exist():
    shown = {}
    for verbs, fields in rows("JSON"):
        for verb in re.findall(r"`svfap ([^`]+)`", verbs):
            shown[verb] = re.findall(r"`(\w+)`", fields)
    assert shown.pop("bench …") == []
    assert shown.keys() == RESULTS.keys()
    for verb, names in shown.items():
        assert set(names) <= set().union(*map(fields_of, RESULTS[verb])), verb


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


def test_every_verb_with_json_has_a_row():
    found = {
        name
        for name, command in commands(typer.main.get_command(cli.app))
        if any("--json" in parameter.opts for parameter in command.params)
        and not name.startswith("bench ")
    }
    assert found == RESULTS.keys()
