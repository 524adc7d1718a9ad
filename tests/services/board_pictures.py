"""Draw the pictures of docs/monitoring.md: `python tests/services/board_pictures.py docs/pictures`.

A real run of two ranks is watched for some minutes; half way one of them is killed, and the run
started again. Needs what `install.sh` installs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from grafana_boards import dashboard, render
from watched_runs import WatchedRun

from svfap_dist.dashboards.boards import BOARDS

PICTURES = {"training": "training", "data-path": "data", "reliability": "reliability"}
SECONDS = 300
SCRAPE = 5


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        watch(Path(scratch), folder)


def watch(scratch: Path, folder: Path) -> None:
    run = WatchedRun(scratch, clips=64)
    try:
        time.sleep(SECONDS / 2)
        run.kill_a_rank()
        time.sleep(SCRAPE)
        run.start()
        time.sleep(SECONDS / 2)
        for board in BOARDS:
            path = folder / f"board-{PICTURES[board.name]}.png"
            shown = render(dashboard(board.name), run.prometheus.url, run.began, time.time(), path)
            empty = [panel.title for panel in shown if not panel.series]
            print(f"{path}: {path.stat().st_size} bytes; no data: {', '.join(empty) or 'none'}")
    finally:
        run.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
