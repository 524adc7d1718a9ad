"""A wheel without extras, in an environment of its own: it extracts and predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def svfap(tmp_path_factory):
    """Return a function that runs the installed `svfap` in a folder with files of a run."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONPATH"}

    def run(*command: str, cwd: Path = folder) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )

    pip = ["-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    assert (made := run(sys.executable, *pip, *build)).returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    program = folder / "venv" / "bin"
    constraints = ["-c", str(ROOT / "constraints.txt"), "torch==2.13.0"]
    made = run(str(program / "python"), *pip, "install", *constraints, str(wheel))
    assert made.returncode == 0, made.stderr
    with tarfile.open(ROOT / "tests" / "compat" / "data.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return lambda *words: run(str(program / "svfap"), *words)


def test_it_has_none_of_the_extras(svfap, tmp_path):
    done = svfap("pretrain", "tiny_cpu", f"data.url={tmp_path}", f"run.url={tmp_path}/run")
    assert done.returncode == 2
    assert "pip install 'svfap-dist[train]'" in done.stderr


def test_it_extracts(svfap, tmp_path):
    done = svfap("extract", "exports/encoder", "videos", "-o", str(tmp_path / "features.npz"))
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "features.npz") as arrays:
        assert any(np.isfinite(arrays[name]).all() for name in arrays if arrays[name].ndim == 2)


@pytest.mark.parametrize("inputs", ["videos", "shards/labelled"])
def test_it_predicts(svfap, inputs):
    done = svfap("predict", "exports/classifier", inputs, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
