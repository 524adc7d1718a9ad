"""A wheel without extras, and with `hub`, in a fresh environment without a checkout."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
from wheel_environment import ROOT, WheelEnvironment

import svfap_dist
from svfap_dist.inference.export import export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


# What a user of an export runs: OUTPUTS of CLIPS by the network in FOLDER.
_LOAD_EXPORT = """
import importlib.util, sys
import numpy, torch
import svfap_dist
assert not any(map(importlib.util.find_spec, ("deepspeed", "ray")))
folder, clips, outputs = sys.argv[1:]
network = svfap_dist.HubNetwork.from_pretrained(folder)
with torch.no_grad():
    numpy.save(outputs, network(torch.from_numpy(numpy.load(clips))).numpy())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    made = subprocess.run(
        [*build, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_environment(wheel):
    """An environment with the wheel."""
    environment = WheelEnvironment(wheel.parent)
    environment.install(wheel)
    return environment


@pytest.fixture
def svfap(wheel_environment):
    return wheel_environment.svfap


def test_it_names_its_version(svfap):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert svfap("--version").stdout == f"svfap {version}\n"
    assert "pretrain" in svfap("--help").stdout


@pytest.mark.parametrize(
    ("extras", "words"),
    [
        ("train", ["pretrain", "tiny_cpu", "data.url=shards/none", "run.url=never"]),
        ("train,ray,report", ["demo", "--out", "never"]),
    ],
)
def test_it_names_the_extras_of_a_verb_at_once(wheel_environment, extras, words):
    done = wheel_environment.svfap(*words)
    assert done.returncode == 2
    assert f"pip install 'svfap-dist[{extras}]'" in done.stderr
    assert not (wheel_environment.work / "never").exists()


def test_it_copies_recipes_and_cluster_files_out(svfap, tmp_path):
    done = svfap("files", "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for folder in ("launch", "monitoring"):
        copied = {path.relative_to(tmp_path) for path in (tmp_path / folder).rglob("*.*")}
        assert copied == {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.*")}


def test_it_examines_the_machine(svfap):
    done = svfap("doctor", "--json")
    assert done.returncode in (0, 9), done.stderr  # 9: this machine has too few open files, say
    findings = {row["name"]: row["status"] for row in json.loads(done.stdout)["findings"]}
    assert findings["version of torch"] == "ok"
    assert findings["version of ray"] == "warn"  # of an extra


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


@pytest.mark.parametrize("run", ["runs/pretrain", "runs/finetune/fold-1"])
def test_an_export_for_the_hub_gives_the_same_outputs(wheel, wheel_environment, tmp_path, run):
    """Last in this file: it installs the extra `hub`, and needs none of those for training."""
    wheel_environment.install(wheel, "hub")
    url, exported = str(wheel_environment.work / run), str(tmp_path / "exported")
    export(url, exported, "huggingface", overrides={})
    network = svfap_dist.load(url)
    shape = (2, network.info.num_frames, network.info.frame_size, network.info.frame_size, 3)
    clips = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        expected = network(torch.from_numpy(clips)).numpy()
    np.save(tmp_path / "clips.npy", clips)
    arrays = str(tmp_path / "clips.npy"), str(tmp_path / "outputs.npy")
    done = wheel_environment.run_python("-c", _LOAD_EXPORT, exported, *arrays)
    assert done.returncode == 0, done.stderr
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)
