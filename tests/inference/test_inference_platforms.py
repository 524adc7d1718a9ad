"""Extraction and prediction import and run where Linux's own modules do not exist."""

from __future__ import annotations

import subprocess
import sys

from clips import make_video
from made_networks import pretrained, recipe, save_run

_SCRIPT = """
import os, sys

# macOS has no memfd and no sched_getaffinity, Windows neither fcntl nor resource.
for name in ("memfd_create", "sched_getaffinity", "fork"):
    if hasattr(os, name):
        delattr(os, name)
sys.modules.update(dict.fromkeys(("fcntl", "resource")))  # None: importing them fails

import svfap_dist
import svfap_dist.inference.export, svfap_dist.inference.predict

network = svfap_dist.load(sys.argv[1])
print(svfap_dist.extract(network, sys.argv[2]).shape)

from svfap_dist.cli.app import app
from svfap_dist.inference.extract import extract_to
from svfap_dist.inference.videos import list_videos

print(extract_to(network, list_videos([sys.argv[3]]), sys.argv[4]).clips)
"""


def test_extraction_runs_without_fcntl_resource_and_memfd(tmp_path):
    run = save_run(tmp_path / "run", pretrained(), recipe())
    (tmp_path / "videos").mkdir()
    video = tmp_path / "videos" / "a.mp4"
    make_video(video, 20, size=(64, 64))
    arguments = [run, str(video), str(video.parent), str(tmp_path / "features.npz")]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(3,", "32)", "3"]
