"""The notebooks of docs/tutorials: what is stored in them, and that they run."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import typer
from nbclient import NotebookClient

from svfap_dist import cli

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs/tutorials").glob("*.ipynb"))
LARGEST = 100_000  # bytes of a notebook with its pictures
_PRIVATE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|var|opt)/\w[^\s'\"]*")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def text_of(output: Any) -> str:
    """All that an output shows as text; of a picture, nothing."""
    shown = output.get("data", {})
    texts = (text for kind, text in shown.items() if kind.startswith("text/"))
    return "".join([output.get("text", ""), *texts])


def commands_of(source: str) -> list[list[str]]:
    """The words of each `svfap` command in a cell: of the shell, or in a string of Python."""
    if source.startswith("%%bash"):
        lines = source.replace("\\\n", " ").splitlines()
    else:
        lines = re.findall(r'"""\n(svfap .*?)"""', source, re.DOTALL)
    return [shlex.split(line, comments=True) for line in lines if line.startswith("svfap ")]


def parse(words: list[str]) -> None:
    """Parse a command as the command line does, without running it."""
    group: Any = typer.main.get_command(cli.app)
    _, name, *rest = words
    while hasattr(group.commands[name], "commands"):
        group, (name, *rest) = group.commands[name], rest
    group.commands[name].make_context(name, rest)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["features", "resume", "shards"]


@each_notebook
def test_what_is_stored_is_a_whole_run_without_errors(path):
    assert path.stat().st_size < LARGEST
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert [output for output in outputs if output.output_type == "error"] == []
    shown = "\n".join([text_of(output) for output in outputs] + [cell.source for cell in cells])
    assert _PRIVATE.findall(shown) == []
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("text", "found"),
    [("in /home/ann/run x", ["/home/ann/run"]), ("s3://bucket/tmp/x a/tmp/b /data/x", [])],
)
def test_private_paths_are_found(text, found):
    assert _PRIVATE.findall(text) == found


@each_notebook
def test_commands_parse(path):
    commands = [words for cell in code_cells(path) for words in commands_of(cell.source)]
    assert len(commands) >= 3
    for words in commands:
        parse(words)


def test_a_wrong_command_does_not_parse():
    with pytest.raises(typer.BadParameter, match="integer"):
        parse(["svfap", "shard", "synthetic", "2", "faces", "--samples-per-shard", "many"])
    with pytest.raises(KeyError, match="shreds"):
        parse(["svfap", "shreds", "show", "faces"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@each_notebook
def test_it_runs(path, tmp_path, monkeypatch):
    bin_folder = os.path.dirname(sys.executable)  # of the command `svfap`
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    notebook = nbformat.read(path, 4)
    stored = [len(cell.outputs) > 0 for cell in notebook.cells if cell.cell_type == "code"]
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": tmp_path}})
    client.execute()  # an error in a cell is an error here
    found = [len(cell.outputs) > 0 for cell in notebook.cells if cell.cell_type == "code"]
    assert found == stored
