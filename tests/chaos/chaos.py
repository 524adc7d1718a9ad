"""Run faults against training on real services, and write what each cost.

    python tests/chaos/chaos.py [FAULT ...] [--kills N] [--goodput MINUTES] [--out FOLDER]

Needs root and what tests/services/install.sh installs. Without arguments, all faults run. The
results are chaos.md and chaos.json in the folder; the exit code is 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import endurance
from chaos_cluster import REPOSITORY, ChaosCluster
from endurance import Kills, MeasuredGoodput
from faults import AS_EXPECTED, FAULTS, Row, Stage

_COLUMNS = (
    *("fault", "noticed (s)", "restored (s)", "steps redone", "samples", "lost", "duplicated"),
    *("losses", "note"),
)
_TABLE = "chaos.json"


def markdown(rows: list[Row]) -> str:
    """The table of docs/reliability.md."""
    return "\n".join([_joined(_COLUMNS), _joined(["---"] * len(_COLUMNS)), *map(_line, rows), ""])


def _line(row: Row) -> str:
    cost = row.recovery
    # Without a pause where the clock itself was wrong.
    pause = f"; longest pause {cost.pause:.1f}" if cost.pause else ""
    restored = _seconds(cost.restored) or f"no restart{pause}"
    if row.restarts != AS_EXPECTED:
        restored += f"; {row.restarts}"
    counts = (cost.redone, row.samples, row.lost, row.duplicated)
    return _joined(
        [row.fault, _seconds(cost.noticed), restored, *map(str, counts), row.losses, row.note]
    )


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def machine() -> str:
    """Machine, commit and load, for the table's caption."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    commit = found.stdout.strip() or "unknown"
    cores, load = os.cpu_count(), os.getloadavg()[0]
    return f"{cores} cores, {platform.machine()}, load {load:.1f} at the end, commit {commit}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run faults against training.")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--kills", type=int, default=0, help="kill a rank so often in one run")
    parser.add_argument("--goodput", type=float, default=0.0, help="minutes, a kill every five")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("chaos-results"))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.faults if name not in FAULTS]
    if unknown:
        parser.error(f"no fault {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    if arguments.out.exists() and not (arguments.out / _TABLE).exists():
        parser.error(f"{arguments.out} is there, and has no results of this suite")
    shutil.rmtree(arguments.out, ignore_errors=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays behind
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svfap-chaos-")))
        cluster = stack.enter_context(ChaosCluster(folder, arguments.seed))
        results = Results(cluster, arguments.out)
        endures = arguments.kills or arguments.goodput
        for name in arguments.faults or (() if endures else FAULTS):
            results.add(name, FAULTS[name])
        if arguments.kills:
            results.add("kills", lambda stage: endurance.kill_often(stage, arguments.kills))
        if arguments.goodput:
            results.add("goodput", lambda s: endurance.measure_goodput(s, arguments.goodput))
    return int(bool(results.failures) or not all(row.is_good for row in results.rows))


class Results:
    """Rows as they come, written to the folder after each."""

    def __init__(self, cluster: ChaosCluster, out: Path) -> None:
        self.rows: list[Row] = []
        self.failures: dict[str, str] = {}
        self._endured: dict[str, Any] = {}
        self._lines: list[str] = []
        self._cluster, self._stage, self._out = cluster, Stage(cluster), out

    def add(self, name: str, fault: Callable[[Stage], Row | Kills | MeasuredGoodput]) -> None:
        """Run a fault; one that fails is reported, and the next ones run all the same."""
        began = time.monotonic()
        try:
            found = fault(self._stage)
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            text = f"{name}: {self.failures[name]}"
        else:
            self.rows.append(found if isinstance(found, Row) else found.row)
            text = _line(self.rows[-1])
            if not isinstance(found, Row):
                self._endured[name] = dataclasses.asdict(found)
                self._lines += found.lines()
                text = "\n".join([text, *found.lines()])
        print(f"[{time.monotonic() - began:.0f} s] {text}", flush=True)
        self._write()

    def _write(self) -> None:
        shutil.copytree(self._cluster.folder / "logs", self._out / "logs", dirs_exist_ok=True)
        caption = machine()
        failed = [f"{name} failed: {text}" for name, text in self.failures.items()]
        text = "\n\n".join([caption, markdown(self.rows), *self._lines, *failed])
        (self._out / "chaos.md").write_text(f"{text}\n")
        table = {
            "machine": caption,
            "seed": self._cluster.seed,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "failures": self.failures,
            **self._endured,
        }
        (self._out / _TABLE).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
