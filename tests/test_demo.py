"""`svfap demo` to its end, as an installed command: with few steps, in a folder of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from svfap_dist.checkpoint import store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_the_demo_leaves_a_checkpoint_a_picture_and_a_report(tmp_path: Path) -> None:
    svfap = Path(sys.executable).with_name("svfap")
    done = subprocess.run(
        [svfap, "demo", "--out", "out", "train.max_steps=4"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "out/run"
    assert f"Run {run}: finished at step 4 of 4." in done.stderr
    assert store.latest_committed(str(run)) == 4
    with Image.open(run / "pictures/reconstruction.png") as picture:
        assert min(picture.size) > 100
    assert "</html>" in (run / "report.html").read_text()
    assert [path.suffix for path in (tmp_path / "out/faces").iterdir()] == [".mp4"] * 3
