"""Completion in shells: the script loads, and Tab completes verbs, recipes and words."""

from __future__ import annotations

import contextlib
import os
import pty
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


def in_zsh(environment: dict[str, str], line: str, cwd: Path) -> str:
    """What a line becomes in an interactive zsh, on a terminal, when Tab is pressed at its end."""
    (cwd / "set-up.zsh").write_text(
        "autoload -U compinit; compinit -u -D; source <(svfap completion zsh) || exit\n"
        'save-line() { print -r -- "$BUFFER" > line.txt; exit }\n'
        "zle -N save-line; bindkey '^X' save-line\n"
    )
    answer = cwd / "line.txt"
    answer.write_text("")
    terminal, shells_end = pty.openpty()
    with open(terminal, "r+b", buffering=0) as screen:
        shell = subprocess.Popen(
            ["zsh", "-f", "-i"],
            env=environment | {"TERM": "xterm", "HOME": str(cwd)},
            stdin=shells_end,
            stdout=shells_end,
            stderr=shells_end,
            cwd=cwd,
            start_new_session=True,
        )
        os.close(shells_end)
        screen.write(f"source ./set-up.zsh\n{line}\t\x18".encode())
        shown = b""
        with contextlib.suppress(OSError):  # the shell has ended
            while piece := screen.read(4096):
                shown += piece
        shell.wait()
    assert answer.read_text(), shown.decode()
    return answer.read_text().rstrip("\n")


@pytest.mark.services
@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("svfap pretr", "svfap pretrain "),
        ("svfap checkpoint v", "svfap checkpoint verify "),
        ("svfap pretrain tiny", "svfap pretrain tiny_cpu "),
        ("svfap pretrain tiny_cpu --on r", "svfap pretrain tiny_cpu --on ray "),
    ],
)
def test_zsh_completes_verbs_recipes_and_words(environment, tmp_path, line, completed):
    assert in_zsh(environment, line, tmp_path) == completed


def test_zsh_gets_the_verbs(environment, tmp_path):
    asked = {"_SVFAP_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "svfap pre"}
    done = subprocess.run(
        ["svfap"], env=environment | asked, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert '"pretrain"' in done.stdout
    script = CliRunner().invoke(cli.app, ["completion", "zsh"])
    assert script.stdout.startswith("#compdef svfap\n")
    assert "compdef _svfap_completion svfap" in script.stdout
