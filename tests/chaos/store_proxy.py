"""An HTTP proxy in front of an S3 store, which can fail requests and report each one.

It passes signed requests on unchanged, so clients use its address as their endpoint. Which requests
fail follows from the seed, method, path and how often that pair has come before, not from the order
in which threads send them.
"""

from __future__ import annotations

import collections
import http.client
import http.server
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

FAULTS = ("503", "500", "reset", "cut body", "stall")
_STALL_SECONDS = 3.0
_CODES = {"503": "SlowDown", "500": "InternalError"}
_NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "expect"}


class StoreProxy:
    """Serves `endpoint` on an address of this machine until `stop`.

    `fault_share` of the requests fail. `on_request` is called with "before" or "after", the method
    and the path, before a request is passed on and before its answer is returned; where it returns
    True, the client's connection is reset instead. `injected` counts the faults by kind.
    """

    def __init__(self, host: str, store_port: int, seed: int) -> None:
        self.fault_share = 0.0
        self.on_request: Callable[[str, str, str], bool] = lambda when, method, path: False
        self.injected: collections.Counter[str] = collections.Counter()
        self._store_port, self._seed = store_port, seed
        self._seen: collections.Counter[tuple[str, str]] = collections.Counter()
        self._lock = threading.Lock()
        self._server = _Server((host, 0), self._handler())
        self.endpoint = f"http://{host}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, method: str, path: str) -> str:
        """The fault of the next request, "" for none."""
        if not self.fault_share:
            return ""
        with self._lock:
            self._seen[method, path] += 1
            drawn = zlib.crc32(f"{self._seed} {method} {path} {self._seen[method, path]}".encode())
            if drawn % 1000 >= self.fault_share * 1000:
                return ""
            kind = FAULTS[drawn // 1000 % len(FAULTS)]
            self.injected[kind] += 1
            return kind

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:  # the client has gone
                    self.close_connection = True

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy._fault(self.command, self.path)
                if proxy.on_request("before", self.command, self.path) or fault == "reset":
                    return self._reset()
                if fault in _CODES:
                    return self._refuse(int(fault), _CODES[fault])
                if fault == "stall":
                    time.sleep(_STALL_SECONDS)
                try:
                    status, headers, data = self._ask_store(body)
                except (OSError, http.client.HTTPException):  # the store is down
                    return self._reset()
                if proxy.on_request("after", self.command, self.path):
                    return self._reset()
                return self._answer(status, headers, data, cut=fault == "cut body")

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 - http.server's names

            def _ask_store(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                store = http.client.HTTPConnection("127.0.0.1", proxy._store_port, timeout=60)
                try:
                    store.putrequest(self.command, self.path, True, True)
                    for name, value in self.headers.items():
                        if name.lower() not in _NOT_PASSED_ON:
                            store.putheader(name, value)
                    store.endheaders(body)
                    answer = store.getresponse()
                    return answer.status, answer.getheaders(), answer.read()
                finally:
                    store.close()

            def _answer(
                self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool
            ) -> None:
                self.send_response_only(status)
                left_out = _NOT_PASSED_ON if self.command == "HEAD" else _LEFT_OUT
                for name, value in headers:
                    if name.lower() not in left_out:
                        self.send_header(name, value)
                if self.command != "HEAD" and status != HTTPStatus.NO_CONTENT:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if cut and data:
                    self.wfile.write(data[: len(data) // 2])
                    return self._reset()
                self.wfile.write(data)
                return None

            def _refuse(self, status: int, code: str) -> None:
                text = f"<Error><Code>{code}</Code><Message>planted</Message></Error>"
                data = b"" if self.command == "HEAD" else text.encode()
                self.send_response_only(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _reset(self) -> None:
                """Close the connection, with a TCP reset instead of an orderly end."""
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        return Handler


_LEFT_OUT = _NOT_PASSED_ON | {"content-length"}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        """Close a connection without the FIN that socketserver sends first."""
        self.close_request(request)
