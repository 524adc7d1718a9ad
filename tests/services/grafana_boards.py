"""Boards drawn by Grafana's own components in a headless Chromium, from a real Prometheus.

`grafana/` holds the page; `install.sh` has npm fetch the components and esbuild bundle them. The
page asks Prometheus as Grafana would, draws, and leaves an account of each panel in its DOM.
"""

from __future__ import annotations

import dataclasses
import html.parser
import json
import string
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from svfap_dist import bundled

PAGE = Path(__file__).parent / "grafana"
_BUILD = PAGE / "build"  # by esbuild
_WIDTH = 1500  # of the board, pixels
_EDGE = 8
_HEADER = 56
_CELL = 38  # height of a row of Grafana's grid with its margin, pixels
_CHROMIUM = [
    "chromium",
    "--headless=new",
    "--no-sandbox",  # tests of services run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=20000",
    "--dump-dom",
]


@dataclasses.dataclass(frozen=True)
class Shown:
    """What became of a panel. text: what it reads; drawn: pixels of its charts that have a colour.

    error: what Prometheus, a query's variables, the unit or the component complained of, or "".
    """

    title: str
    type: str
    series: int
    points: int
    error: str
    text: str
    drawn: int


def dashboard(name: str) -> dict[str, Any]:
    """A board of monitoring/, as Grafana would provision it."""
    path = bundled.folder("monitoring") / f"grafana/dashboards/{name}.json"
    return json.loads(path.read_text())


def render(
    board: dict[str, Any], prometheus: str, start: float, end: float, picture: Path
) -> list[Shown]:
    """Draw a board over a span of Unix time; its panels in order, and a PNG of it in `picture`.

    Raises: AssertionError with what the page says, if it broke as a whole.
    """
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    size = f"--window-size={_WIDTH + 2 * _EDGE},{_HEADER + rows * _CELL + _EDGE}"
    asked = {
        "dashboard": board,
        "prometheus": prometheus,
        "from": round(start),
        "to": round(end),
        "scrapeSeconds": _scrape_seconds(),
        "width": _WIDTH,
    }
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        template = string.Template((PAGE / "page.html").read_text())
        text = json.dumps(asked).replace("<", "\\u003c")
        script, style = (_BUILD / name for name in ("boards.js", "boards.css"))
        filled = template.substitute(input=text, script=script.as_uri(), style=style.as_uri())
        page.write_text(filled)
        command = [*_CHROMIUM, size, f"--user-data-dir={folder}/profile"]
        command += [f"--screenshot={picture}", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    result = _Result()
    result.feed(done.stdout)
    assert result.text, f"the page left no account:\n{done.stderr[-2000:]}"
    account = json.loads(result.text)
    assert not account["error"], account["error"]
    return [Shown(**panel) for panel in account["panels"]]


def _scrape_seconds() -> int:
    """What Grafana is told of the scrape interval, for $__rate_interval."""
    path = bundled.folder("monitoring") / "grafana/provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    return int(source["jsonData"]["timeInterval"].removesuffix("s"))


class _Result(html.parser.HTMLParser):
    """Finds the account that the page left in its DOM."""

    text = ""
    _inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script" and ("id", "result") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside and not self.text:
            self.text = data
