"""A real Prometheus on loopback, with the repository's own configuration and rules."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svfap_dist import bundled
from svfap_dist.distributed import free_port


class Prometheus:
    """Scrapes what the service discovery at `discovery_port` lists, twice a second.

    Alerts do not wait: their `for` is cut out, or a test would take as long as an on-call may wait.
    """

    def __init__(self, folder: Path, discovery_port: int) -> None:
        files = bundled.folder("monitoring") / "prometheus"
        rules = (files / "rules.yml").read_text()
        lines = [line for line in rules.splitlines() if not line.strip().startswith("for:")]
        (folder / "rules.yml").write_text("\n".join(lines))
        config = (files / "prometheus.yml").read_text().replace(":9390", f":{discovery_port}")
        config = config.replace("5s", "500ms")
        config = config.replace("global:", "global:\n  evaluation_interval: 500ms")
        (folder / "prometheus.yml").write_text(config)
        self._port = free_port()
        with open(folder / "prometheus.log", "w") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdout=log,
                stderr=log,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def get(self, path: str, **arguments: str) -> Any:
        """The data of an API call; an answer that is an error raises."""
        query = urllib.parse.urlencode(arguments)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, text: str) -> list[Any]:
        """Series that a query gives now."""
        return self.get("query", query=text)["result"]

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        found = self.get("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What `condition` gives once it is true."""
    until = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except OSError:  # not listening yet
            found = None
        if found or time.monotonic() > until:
            assert found, f"not within {seconds} s"
            return found
        time.sleep(0.25)
