"""What single trackers do with accounts, names and runs that a server does not accept."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)

OPENED = """
import logging, sys
from svfap_dist.config import recipe
from svfap_dist.telemetry import tracking

logging.basicConfig(format="%(message)s")
config = recipe.load("tiny_cpu", sys.argv[1:])
tracking._CLOSE_SECONDS = 400.0
tracking.check_installed(config.track)
print("now open")
with tracking.Tracking(config, 0):
    pass
"""


def test_wandb_asks_for_no_key_in_a_terminal(tmp_path: Path) -> None:
    """It would ask in the thread that opens it, across the progress bar, and wait."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "TERM": "xterm"}  # no key in ~/.netrc
    command = [sys.executable, "-c", OPENED, f"run.url={tmp_path}", "track.wandb=svfap"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs
    ) as child:
        os.close(theirs)
        shown = ""
        with contextlib.suppress(OSError):  # the terminal's end
            while "Enter your choice" not in shown:
                shown += os.read(ours, 4096).decode()
        if "Enter your choice" in shown:
            child.kill()
    os.close(ours)
    assert "Enter your choice" not in shown
    before, _, after = shown.partition("now open")
    advice = "set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline"
    assert advice in before  # in the check before the run
    assert advice in after
    assert "wandb is off until the run is started again" in after
    assert child.returncode == 0
