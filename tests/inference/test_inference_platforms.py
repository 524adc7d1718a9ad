"""Extraction and prediction run without Linux's own modules and without any extra."""

from __future__ import annotations

import subprocess
import sys

from clips import make_video
from made_networks import emotions, finetuned, pretrained, recipe, save_run

from svfap_dist.cli.extras import EXTRAS

_SCRIPT = """
import os, sys

# macOS has no memfd and no sched_getaffinity, Windows neither fcntl nor resource.
for name in ("memfd_create", "sched_getaffinity", "fork"):
    if hasattr(os, name):
        delattr(os, name)
pretrained, finetuned, folder, missing = sys.argv[1:]
# None: importing them fails.
sys.modules.update(dict.fromkeys(("fcntl", "resource", *missing.split(","))))

import svfap_dist
import svfap_dist.inference.export

print(svfap_dist.extract(svfap_dist.load(pretrained), f"{folder}/a.mp4").shape)

from svfap_dist.cli import app

for words in (
    ["extract", pretrained, folder, "-o", f"{folder}/features.npz"],
    ["predict", finetuned, folder],
):
    app(words, standalone_mode=False)
"""


def test_inference_runs_without_modules_of_linux_and_of_extras(tmp_path):
    runs = (
        save_run(tmp_path / "pretrained", pretrained(), recipe()),
        save_run(tmp_path / "finetuned", finetuned(3), emotions()),
    )
    folder = tmp_path / "videos"
    folder.mkdir()
    make_video(folder / "a.mp4", 20, size=(64, 64))
    # s3fs needs aiohttp, which is therefore there.
    missing = [name for modules in EXTRAS.values() for name in modules if name != "aiohttp"]
    command = [sys.executable, "-c", _SCRIPT, *runs, str(folder), ",".join(missing)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, features, prediction = done.stdout.splitlines()
    assert shape == "(3, 32)"
    assert features.endswith("features.npz: 3 clips of 1 videos, 32 features each")
    assert prediction.startswith(f"{folder}/a.mp4: ")
