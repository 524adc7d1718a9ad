"""Requests are counted by what was asked and how it ended."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from svfap_dist import storage
from svfap_dist.errors import StorageError
from svfap_dist.storage import StorageMissingError


def counted(action: Callable[[], object]) -> storage.RequestCounts:
    """What the action adds to the counts."""
    before = storage.request_counts()
    action()
    after = storage.request_counts()

    def added(name: str) -> dict:
        old, new = getattr(before, name), getattr(after, name)
        return {key: new[key] - old.get(key, 0) for key in new if new[key] != old.get(key, 0)}

    return storage.RequestCounts(added("requests"), added("bytes"), added("retries"))


def test_requests_are_counted_by_operation_and_outcome(root: str, tmp_path: Path) -> None:
    def ask() -> None:
        url, local = storage.join(root, "x"), str(tmp_path / "local")
        storage.write_bytes(url, b"0123456789")
        storage.read_bytes(url)
        storage.read_range(url, 2, 5)
        storage.download_file(url, local)
        storage.upload_file(local, storage.join(root, "y"))
        assert storage.exists(url)
        assert len(storage.list_files(root)) == 2
        storage.delete(url)
        with pytest.raises(StorageMissingError):
            storage.read_bytes(url)

    found = counted(ask)
    assert found.requests == {
        ("write", "ok"): 2,
        ("read", "ok"): 3,
        ("look up", "ok"): 1,
        ("list", "ok"): 1,
        ("delete", "ok"): 1,
        ("read", "missing"): 1,
    }
    assert found.bytes == {"write": 20, "read": 23}
    assert found.retries == {}


def test_other_outcomes_are_counted(tmp_path: Path) -> None:
    def refused() -> None:
        with pytest.raises(StorageError):
            storage.read_bytes(str(tmp_path))

    assert counted(refused) == storage.RequestCounts({("read", "refused"): 1}, {}, {})


class BusyAtFirst(http.server.BaseHTTPRequestHandler):
    """A store that answers the first request with SlowDown."""

    answers = iter([(503, b"<Error><Code>SlowDown</Code></Error>"), (200, b"content")])

    def do_GET(self) -> None:
        code, body = next(self.answers)
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_requests_sent_again_are_counted(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BusyAtFirst) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        found = counted(lambda: storage.read_bytes("s3://bucket/x"))
        server.shutdown()
    assert found == storage.RequestCounts({("read", "ok"): 1}, {"read": 7}, {"read": 1})
