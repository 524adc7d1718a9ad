"""The command line as a person meets it: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from clips import make_video
from packaging.version import Version

import svfap_dist
from data_sharding import pipeline
from svfap_dist import cli, demo


def svfap(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "svfap_dist", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_version_is_that_of_the_package():
    assert svfap("--version").stdout == f"svfap {svfap_dist.__version__}\n"
    assert Version(svfap_dist.__version__) >= Version("0.1.0")


def test_help_imports_nothing_heavy():
    """What keeps `svfap --help` fast, tested without a clock."""
    code = "import sys; sys.argv = ['svfap', '--help']\nfrom svfap_dist.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pretrain" in done.stdout
    for heavy in ("torch", "ray", "deepspeed", "numpy", "pydantic", "fsspec", "av", "webdataset"):
        assert f"'{heavy}'" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["pretrain", "tiny_cp"], 2, ["No such recipe", "did you mean tiny_cpu? (or give"]),
        (
            ["pretrain", "tiny_cpu", "train.max_step=3"],
            2,
            ["train.max_step", "did you mean max_steps"],
        ),
        (["pretrain", "tiny_cpu"], 2, ["data.url"]),
        (["pretrain", "tiny_cpu", "--on", "mars"], 2, ["mars", "use local or ray"]),
        (["shard", "folder", "no-such-folder", "out"], None, ["no-such-folder"]),
        (["shard", "betamax", ".", "out"], 2, ["betamax", "folder"]),
        (["shard", "folder", ".", "out", "--crf", "22"], 2, ["profile source", "--profile train"]),
        (["reconstruct", "no-such-run", "a.mp4"], 5, ["no-such-run"]),
        (["reconstruct", "no-such-run", "a.mp4", "--show", "hands"], 2, ["hands", "use frames"]),
        (["import", "no-such.pth", "-o", "out"], 5, ["no-such.pth"]),
        (["import", "a.pth", "-o", "out", "--stage-depths", "2-3"], 2, ["--stage-depths", "2-3"]),
        (["launch", "stop", "4711"], 2, ["4711", "slurm:NAME"]),
        (["launch", "slurm", "tiny_cpu", "--nodes", "2"], 2, ["data.url", "all nodes share"]),
        (["files", "docs", "-o", "out"], 2, ["docs", "launch or monitoring"]),
        (["completion", "tcsh"], 2, ["tcsh", "use one of bash, zsh, fish"]),
        (["report", "no-such-run"], 2, ["no-such-run", "metrics.jsonl"]),
    ],
)
def test_mistakes_are_errors_of_one_paragraph(arguments, code, words, tmp_path):
    done = svfap(*arguments, cwd=tmp_path)
    assert done.returncode == code if code else done.returncode not in (0, 1)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for word in (*words, "Do:"):
        assert word in error
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def commands(group: Any, path: str = "svfap") -> Iterator[tuple[str, Any]]:
    """All verbs, with their full names."""
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_verb_has_an_example_and_every_option_a_help():
    found = dict(commands(typer.main.get_command(cli.app)))
    assert {"svfap pretrain", "svfap launch slurm", "svfap checkpoint reshape"} <= found.keys()
    for name, command in found.items():
        assert f"Example: {name}" in command.help
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"
            assert parameter.help.endswith((".", ").")), f"{name}: {parameter.help}"


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("prometheus_client", "train", ["pretrain", "tiny_cpu"]),
        ("deepspeed", "train", ["demo", "--out", "demo"]),
        ("ray", "ray", ["launch", "status", "ray:a"]),
        ("webdataset", "shard", ["shards", "verify", "shards"]),
        ("cv2", "faces", ["faces", "videos", "out"]),
        ("huggingface_hub", "hub", ["extract", "hf://a/b", "v.mp4", "-o", "x"]),
        ("pyarrow", "parquet", ["extract", "run", "v.mp4", "-o", "x", "--format", "parquet"]),
        ("jinja2", "report", ["report", "run"]),
        ("uvicorn", "serve", ["serve", "run"]),
        ("grafana_foundation_sdk", "dev", ["dashboards", "--check"]),
    ],
)
def test_a_missing_extra_is_named(module, extra, arguments, tmp_path):
    make_video(tmp_path / "videos/a.mp4", 61)
    if module == "webdataset":
        pipeline.shard("folder", str(tmp_path / "videos"), str(tmp_path / "shards"), workers=0)
    code = (
        "import sys; sys.modules[sys.argv.pop(1)] = None\nfrom svfap_dist.cli import main; main()"
    )
    command = [sys.executable, "-c", code, module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert f"pip install 'svfap-dist[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo").exists()


def test_ctrl_c_is_reported(tmp_path):
    code = (
        "from svfap_dist import bundled\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "bundled.copy = interrupted\n"
        "from svfap_dist.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "files", "launch", "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr == ("warning: Interrupted. Partial outputs are ignored; rerun to resume.\n")


@pytest.mark.parametrize(
    ("path", "program", "command"),
    [
        ("bin", "pkg/svfap_dist/__main__.py", "svfap"),
        ("", "pkg/svfap_dist/__main__.py", "python -m svfap_dist"),
        ("", ".venv/bin/svfap", os.path.join(".venv", "bin", "svfap")),
    ],
)
def test_the_demo_shows_commands_that_can_be_called(path, program, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/svfap").touch(0o755)
    monkeypatch.setenv("PATH", path and str(tmp_path / path))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / program), "demo"])
    assert demo._own_command() == command
