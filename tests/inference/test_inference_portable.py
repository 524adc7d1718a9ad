"""Extraction on systems that lack what only Linux and some Unixes have (macOS, Windows)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from clips import make_video
from made_networks import pretrained, recipe, save_run

import svfap_dist

# Modules and functions are hidden before this project is imported.
_EXTRACT = """
import importlib, json, os, pkgutil, sys
for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("memfd_create", "posix_fallocate"):
    delattr(os, name)
for room in ("inference", "evaluate", "data", "shards", "storage", "video", "parallel"):
    package = importlib.import_module(f"svfap_dist.{room}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
import svfap_dist
features = svfap_dist.extract(svfap_dist.load(sys.argv[1]), sys.argv[2])
print(json.dumps(features.tolist()))
"""


def test_extraction_needs_no_fcntl_resource_or_memfd(tmp_path):
    run = save_run(tmp_path / "run", pretrained(), recipe())
    video = tmp_path / "video.mp4"
    make_video(video, 20, size=(64, 64))
    root = str(Path(svfap_dist.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _EXTRACT, str(run), str(video)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    expected = svfap_dist.extract(svfap_dist.load(run), video)
    np.testing.assert_array_equal(np.float32(json.loads(done.stdout)), expected)
