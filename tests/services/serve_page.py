"""The page of `svfap serve` in a headless Chromium: send it a video, read what it says.

`python tests/services/serve_page.py URL VIDEO PICTURE` draws the pictures of docs/use.md from a
server that is running.
"""

from __future__ import annotations

import asyncio
import base64
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
from grafana_boards import _CHROMIUM, _call, _first_line, _soon
from PIL import Image

from svfap_dist.video import image_grid

_WIDTH, _HEIGHT = 1040, 1000
_ABOUT = "document.getElementById('about')?.textContent ?? ''"
_ANSWER = """
(!document.getElementById('result').hidden || document.getElementById('state').className)
  ? document.getElementById('state').innerText : ''
"""
_SHOW_A_FRAME = """
Promise.all(Array.from(document.querySelectorAll('video[src]'), video => new Promise(done => {
  video.onseeked = done;
  video.currentTime = 1;
})))
"""


_CENTER_OF_DROP = """
(box => [box.left + box.width / 2, box.top + box.height / 2])(
  document.getElementById('drop').getBoundingClientRect())
"""


def send_video(url: str, video: Path, picture: Path | None = None, by: str = "choose") -> str:
    """What the page says after it got a video; a PNG of the whole page in `picture`.

    Args:
        by: "choose" a file, "drop" it, or "record" the camera, which shows an uncompressed `video`.
    """
    # Chromium's processes may still write as it is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return asyncio.run(_send(url, video, picture, by, Path(folder)))


async def _send(url: str, video: Path, picture: Path | None, by: str, folder: Path) -> str:
    profile = folder / "profile"
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    camera += [f"--use-file-for-fake-video-capture={video}"] if by == "record" else []
    with open(folder / "chromium.log", "w") as log:
        command = [*_CHROMIUM, *camera, f"--user-data-dir={profile}", "about:blank"]
        chromium = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = await _soon(lambda: _first_line(profile / "DevToolsActivePort"))
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/json/list") as answer:
                tabs = [tab for tab in await answer.json() if tab["type"] == "page"]
            async with session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0) as tab:
                await _resize(tab, _HEIGHT)
                await _call(tab, "Page.navigate", url=url)
                await _soon(lambda: _value(tab, _ABOUT))
                await _WAYS[by](tab, video)
                said = await _soon(lambda: _value(tab, _ANSWER))
                if picture is not None:
                    await _value(tab, _SHOW_A_FRAME)
                    await _resize(tab, await _value(tab, "document.documentElement.scrollHeight"))
                    shot = await _call(tab, "Page.captureScreenshot", format="png")
                    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
                    picture.write_bytes(image_grid.png_of(image, palette=True))
                return said
    finally:
        chromium.terminate()
        chromium.wait(timeout=30)


async def _choose(tab: Any, video: Path) -> None:
    root = (await _call(tab, "DOM.getDocument"))["root"]["nodeId"]
    file = await _call(tab, "DOM.querySelector", nodeId=root, selector="#file")
    await _call(tab, "DOM.setFileInputFiles", files=[str(video)], **file)


async def _drop(tab: Any, video: Path) -> None:
    x, y = await _value(tab, _CENTER_OF_DROP)
    data = {"items": [], "files": [str(video)], "dragOperationsMask": 1}  # 1: copy
    for kind in ("dragEnter", "dragOver", "drop"):
        await _call(tab, "Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)


async def _record(tab: Any, video: Path) -> None:
    await _value(tab, "document.getElementById('record').click()")


_WAYS = {"choose": _choose, "drop": _drop, "record": _record}


async def _resize(tab: Any, height: int) -> None:
    size = {"width": _WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    await _call(tab, "Emulation.setDeviceMetricsOverride", **size)


async def _value(tab: Any, expression: str) -> Any:
    options = {"returnByValue": True, "awaitPromise": True}
    found = await _call(tab, "Runtime.evaluate", expression=expression, **options)
    return found["result"].get("value")


if __name__ == "__main__":
    print(send_video(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
