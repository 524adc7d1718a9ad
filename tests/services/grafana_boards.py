"""Boards drawn by Grafana's own components in a headless Chromium, from a real Prometheus.

`grafana/` holds the page; `install.sh` has npm fetch the components and esbuild bundle them. The
page asks Prometheus as Grafana would, draws, and leaves an account of each panel in its DOM.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import string
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy
import yaml
from PIL import Image

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
    "--remote-debugging-port=0",  # any free one, written to a file of the profile
]
_PATIENCE = 90  # seconds until a page that left no account has failed


@dataclasses.dataclass(frozen=True)
class Shown:
    """What became of a panel. text: what it reads.

    drawn: pixels of its chart in the picture that have a colour, as curves have, and grid, axes
    and text have not.

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
    size = (_WIDTH + 2 * _EDGE, _HEADER + rows * _CELL + _EDGE)
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
        account = json.loads(asyncio.run(_photograph(page.as_uri(), size, Path(folder), picture)))
    assert not account["error"], account["error"]
    with Image.open(picture) as image:
        pixels = numpy.asarray(image.convert("RGB"), dtype=int)
    for panel in account["panels"]:
        panel["drawn"] = _coloured(pixels, *panel.pop("chart"))
    return [Shown(**panel) for panel in account["panels"]]


async def _photograph(page: str, size: tuple[int, int], folder: Path, picture: Path) -> str:
    """Have Chromium show a page; the account it leaves, and a picture of it as it is then.

    By its debugging protocol: `--screenshot` winds time on in leaps, and charts would be missing.
    """
    profile = folder / "profile"
    with open(folder / "chromium.log", "w") as log:
        command = [*_CHROMIUM, f"--user-data-dir={profile}", "about:blank"]
        chromium = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = await _soon(lambda: _first_line(profile / "DevToolsActivePort"))
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as tab:
                width, height = size
                metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
                await _call(tab, "Emulation.setDeviceMetricsOverride", **metrics, mobile=False)
                await _call(tab, "Page.navigate", url=page)
                account = await _soon(lambda: _account(tab))
                shot = await _call(tab, "Page.captureScreenshot", format="png")
                picture.write_bytes(base64.b64decode(shot["data"]))
                return account
    finally:
        chromium.terminate()
        chromium.wait(timeout=30)


async def _soon(look: Callable[[], Awaitable[str]]) -> str:
    until = time.monotonic() + _PATIENCE
    while not (found := await look()):
        assert time.monotonic() < until, f"nothing from Chromium in {_PATIENCE} s"
        await asyncio.sleep(0.1)
    return found


async def _first_line(path: Path) -> str:
    return path.read_text().split("\n")[0] if path.exists() else ""


async def _account(tab: Any) -> str:
    look = "document.getElementById('result')?.textContent ?? ''"
    return (await _call(tab, "Runtime.evaluate", expression=look))["result"]["value"]


async def _call(tab: Any, method: str, **parameters: Any) -> dict[str, Any]:
    """The result of one call of the debugging protocol; events in between are passed over."""
    await tab.send_json({"id": 1, "method": method, "params": parameters})
    while (answer := await tab.receive_json()).get("id") != 1:
        pass
    assert "result" in answer, answer
    return answer["result"]


def _coloured(pixels: Any, left: int, top: int, right: int, bottom: int) -> int:
    part = pixels[top:bottom, left:right]
    return 0 if not part.size else int((part.max(axis=2) - part.min(axis=2) > 30).sum())


def _scrape_seconds() -> int:
    """The scrape interval in Grafana's settings, for $__rate_interval."""
    path = bundled.folder("monitoring") / "grafana/provisioning/datasources/prometheus.yaml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    return int(source["jsonData"]["timeInterval"].removesuffix("s"))
