"""Runs for the tests of the launchers: small, with a ledger, and their files read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = 400  # enough that a stop comes before the end
SMALL = [
    "model.size=nano",
    "data.num_frames=8",
    "data.sampling_rate=1",
    "data.frame_size=64",
    "train.log_every=1",
    "train.eval_every=0",
    "train.checkpoint_every=100000",
    "train.threads_per_rank=1",
    "run.ledger=true",
    f"train.max_steps={STEPS}",
]


def svfap(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`svfap ...` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "svfap_dist", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines as it is now; none if it is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["event"] in kinds]


def steps_done(run: Path) -> int:
    return max((row["step"] for row in lines(run / "metrics.jsonl")), default=0)


def order(run: Path) -> list[tuple[int, int, int, str]]:
    """(attempt that did it, step, lane, key) of every sample used, in order of step and lane."""
    used = []
    for path in run.glob("ledger/attempt-*/rank-*.jsonl"):
        attempt = int(path.parent.name.removeprefix("attempt-"))
        used += [(attempt, row["step"], row["lane"], row["key"]) for row in lines(path)]
    return sorted(used, key=lambda row: row[1:])
