"""Tests marked gpu run on a bare GPU machine, which lacks most of what the other tests import."""

from __future__ import annotations

import os
import subprocess
import sys

# Packages of constraints.txt that such a machine may lack; `pytest-timeout` and `-xdist` as well.
MISSING = "ray moto boto3 hypothesis pyarrow pandas aiohttp_cors opencensus prometheus_client "
MISSING += "matplotlib jinja2 cv2 sklearn scipy transformers onnx onnxruntime onnxscript psutil "
MISSING += "kubernetes_validate grafana_foundation_sdk xdist pytest_timeout"
BARE = f"""
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_what_is_there(cls, name, path=None, target=None):
    missing = name.partition(".")[0] in {MISSING.split()!r}
    return None if missing else find_spec(name, path, target)

PathFinder.find_spec = classmethod(find_what_is_there)
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


def test_tests_for_gpus_need_no_more_than_a_bare_machine_has() -> None:
    options = ["-m", "gpu", "--collect-only", "-q", "-o", "addopts=--strict-markers", "tests"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", BARE, *options]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("test_video_golden", "test_train_devices", "test_data_ring", "test_model_planes"):
        assert kind in done.stdout
