"""Completion in shells: the script loads, and Tab completes verbs, recipes and words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svfap_dist import cli


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables with a command `svfap` on the path, as an installation has it."""
    command = tmp_path / "bin/svfap"
    command.parent.mkdir()
    code = "import sys; sys.argv[0] = 'svfap'; from svfap_dist.cli import main; main()"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


def in_bash(environment: dict[str, str], line: str, cwd: Path) -> list[str]:
    """Words that Tab offers at the end of a line."""
    words = line.split(" ")
    script = 'source <(svfap completion bash); complete -p svfap >&2; COMP_WORDS=("$@"); '
    script += f"COMP_CWORD={len(words) - 1}; _svfap_completion svfap; "
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "--norc", "-c", script, "bash", *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=cwd
    )
    assert done.stderr == "complete -o default -F _svfap_completion svfap\n"
    return done.stdout.split()


def test_bash_completes_verbs_recipes_sources_and_words(environment, tmp_path):
    assert in_bash(environment, "svfap pre", tmp_path) == ["pretrain", "predict"]
    assert in_bash(environment, "svfap checkpoint v", tmp_path) == ["verify"]
    assert in_bash(environment, "svfap pretrain tiny", tmp_path) == ["tiny_cpu"]
    assert in_bash(environment, "svfap pretrain tiny_cpu --on r", tmp_path) == ["ray"]
    assert in_bash(environment, "svfap shard vox", tmp_path) == ["voxceleb2"]
    assert in_bash(environment, "svfap pretrain folder/of/recipes/", tmp_path) == []  # bash: files


def test_zsh_gets_the_verbs(environment, tmp_path):
    asked = {"_SVFAP_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "svfap pre"}
    done = subprocess.run(
        ["svfap"], env=environment | asked, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert '"pretrain"' in done.stdout
    script = CliRunner().invoke(cli.app, ["completion", "zsh"])
    assert script.stdout.startswith("#compdef svfap\n")
    assert "compdef _svfap_completion svfap" in script.stdout
