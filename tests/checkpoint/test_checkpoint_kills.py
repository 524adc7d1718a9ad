"""Killed at any of its writes, a run leaves a whole checkpoint and exact records."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_kill_leaves_anything_half_written(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    phases = [line.split("  ")[0] for line in done.stdout.splitlines()]
    for phase in ("commit marker", "markers of ranks", "folders removed", "ledger", "journal"):
        assert phase in phases
