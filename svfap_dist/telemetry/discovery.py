"""Prometheus HTTP service discovery of the live ranks, served by the driver.

Ranks come and go with every restart and change of world size, and with `metrics.port = 0` they
listen on any free port. So one constant address, `http://HOST:PORT/sd`, lists the live ones:
https://prometheus.io/docs/prometheus/latest/http_sd/
"""

from __future__ import annotations

import http.server
import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

from svfap_dist.config import MetricsConfig
from svfap_dist.errors import ClusterError

PATH = "/sd"

log = logging.getLogger(__name__)


class Discovery:
    """Serves the list of ranks until `close`; a context manager.

    `address` is "host:port", or "" where `metrics.enabled` is off.

    Args:
        metrics: The recipe's section.
        run: Name of the run.

    Raises:
        ClusterError: If the port is in use or the host is not this one.
    """

    def __init__(self, metrics: MetricsConfig, run: str) -> None:
        self._run = run
        self._answer = b"[]"
        self._server: http.server.ThreadingHTTPServer | None = None
        self.address = ""
        if metrics.enabled:
            self._serve(metrics.host, metrics.discovery_port)

    def show(self, addresses: Sequence[str]) -> None:
        """Replace the list of live ranks.

        Args:
            addresses: Their "host:port".
        """
        groups = [{"targets": list(addresses), "labels": {"run": self._run}}] if addresses else []
        self._answer = json.dumps(groups).encode()

    def _serve(self, host: str, port: int) -> None:
        try:
            self._server = http.server.ThreadingHTTPServer((host, port), self._handler())
        except OSError as error:
            raise ClusterError(
                "Cannot serve the list of ranks",
                where=f"{host}:{port}",
                found=error.strerror or str(error),
                do="choose another metrics.discovery_port, or 0 for any free one",
            ) from error
        self.address = f"{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        log.info("Prometheus finds the ranks at http://%s%s", self.address, PATH)

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        discovery = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == PATH
                answer = discovery._answer if found else b""
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                """Log nothing."""

        return Handler

    def __enter__(self) -> Discovery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
