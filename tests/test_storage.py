"""Local files and S3 behave alike, writes are whole or absent, and refusals say what to do."""

from __future__ import annotations

import errno
import http.server
import os
import socket
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from svfap_dist import storage
from svfap_dist.errors import StorageError
from svfap_dist.storage import StorageMissing, StorageUnreachable


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to store things, of each kind."""
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket") + "/some/prefix"
    return str(tmp_path / "some/prefix") if request.param == "path" else f"file://{tmp_path}/prefix"


def test_join_and_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.join("s3://b/p/", "/x", "y/") == "s3://b/p/x/y"
    assert storage.join("/a", "b") == "/a/b"
    monkeypatch.chdir(tmp_path)
    assert storage.local_path("x") == storage.local_path(f"file://{tmp_path}/x")
    assert storage.is_remote("s3://b/x")
    assert not storage.is_remote("file:///x")
    assert not storage.is_remote("/x")


def test_what_is_written_can_be_read(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "a/b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"0123456789")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"0123456789"
    storage.write_bytes(url, b"other")
    assert storage.read_bytes(url) == b"other"

    (tmp_path / "local").write_bytes(b"from a file" * 1000)
    storage.upload_file(str(tmp_path / "local"), storage.join(root, "up"))
    storage.download_file(storage.join(root, "up"), str(tmp_path / "new/folder/down"))
    assert (tmp_path / "new/folder/down").read_bytes() == b"from a file" * 1000


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (3, 10), (8, 20), (10, 12), (15, 20), (0, 0)])
def test_ranges_are_python_slices(root: str, start: int, stop: int) -> None:
    data = b"0123456789"
    storage.write_bytes(storage.join(root, "x"), data)
    assert storage.read_range(storage.join(root, "x"), start, stop) == data[start:stop]


def test_listing(root: str) -> None:
    assert storage.list_files(root) == {}
    for name in ("b", "a/c", "a/b/d", "a.txt"):
        storage.write_bytes(storage.join(root, name), b"x" * len(name))
    storage.write_bytes(root + "-sibling/x", b"not below")
    assert storage.list_files(root) == {"a.txt": 5, "a/b/d": 5, "a/c": 3, "b": 1}
    assert list(storage.list_files(root)) == sorted(storage.list_files(root))
    assert storage.list_files(storage.join(root, "a")) == {"b/d": 5, "c": 3}
    assert not storage.exists(storage.join(root, "a"))  # a prefix is no file
    assert not storage.exists(storage.join(root, "b/below-a-file"))


def test_deleting(root: str) -> None:
    storage.delete(storage.join(root, "nothing"))
    for name in ("a/1", "a/2", "ab", "b"):
        storage.write_bytes(storage.join(root, name), b"x")
    storage.delete(storage.join(root, "a"))
    assert list(storage.list_files(root)) == ["ab", "b"]
    storage.delete(storage.join(root, "b"))
    assert list(storage.list_files(root)) == ["ab"]


def test_reading_what_is_not_there(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "nothing")
    reads: list[Callable[[], object]] = [
        lambda: storage.read_bytes(url),
        lambda: storage.read_range(url, 0, 5),
        lambda: storage.download_file(url, str(tmp_path / "target")),
    ]
    for read in reads:
        with pytest.raises(StorageMissing, match=r"Cannot read.*nothing there") as caught:
            read()
        assert caught.value.where == url
        assert not caught.value.retryable
    assert not (tmp_path / "target").exists()
    assert list(tmp_path.glob("target*")) == []


def counted(action: Callable[[], object]) -> storage.Counts:
    """What the action adds to the counts."""
    before = storage.counts()
    action()
    after = storage.counts()

    def added(name: str) -> dict:
        old, new = getattr(before, name), getattr(after, name)
        return {key: new[key] - old.get(key, 0) for key in new if new[key] != old.get(key, 0)}

    return storage.Counts(added("requests"), added("bytes"), added("retries"))


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
        with pytest.raises(StorageMissing):
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

    assert counted(refused) == storage.Counts({("read", "refused"): 1}, {}, {})


# ---- local disk ----


def test_an_unfinished_write_is_no_file(tmp_path: Path) -> None:
    """What a process that was killed leaves behind is never listed."""
    storage.write_bytes(str(tmp_path / "done"), b"x")
    (tmp_path / "done.1234abcd.tmp").write_bytes(b"half")
    assert storage.list_files(str(tmp_path)) == {"done": 1}


def test_a_link_to_nowhere_is_listed_and_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert storage.list_files(str(tmp_path)) == {"link": 0}
    with pytest.raises(StorageMissing):
        storage.read_bytes(str(tmp_path / "link"))


def _write(source: str, target: str) -> None:
    storage.write_bytes(target, Path(source).read_bytes())


WRITES = [_write, storage.upload_file]


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[str, str], None]
) -> None:
    """The file being written leads to /dev/full, where the kernel answers ENOSPC."""
    number = uuid.uuid4()
    monkeypatch.setattr(uuid, "uuid4", lambda: number)
    source, target = tmp_path / "source", tmp_path / "out/target"
    source.write_bytes(b"new" * 10_000)
    target.parent.mkdir()
    target.write_bytes(b"old")
    (tmp_path / f"out/target.{number.hex[:8]}.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"Cannot write.*target.*no space left.*free space"):
        write(str(source), str(target))
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("write", WRITES)
def test_content_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[str, str], None]
) -> None:
    (tmp_path / "source").write_bytes(b"new")
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), replace(a, b)))
    write(str(tmp_path / "source"), str(tmp_path / "target"))
    assert steps == ["fsync", "replace"]


def test_local_refusals_are_storage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="Cannot write"):
        storage.write_bytes(str(tmp_path / "file/below"), b"x")
    with pytest.raises(StorageError, match="Cannot read"):
        storage.read_bytes(str(tmp_path))
    storage.delete(str(tmp_path / "file/below"))
    assert storage.list_files(str(tmp_path / "file")) == {}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left"),
        (OSError(errno.EDQUOT, "x"), "no space left"),
        (PermissionError(errno.EACCES, "x"), r"access denied.*rights on the folder"),
        (FileNotFoundError(errno.ENOENT, "x"), r"nothing there.*check the path"),
        (OSError(errno.EROFS, "x"), r"access denied.*rights on the folder"),
        (OSError(errno.ELOOP, "x"), r"nothing there.*check the path"),
        (RuntimeError("odd"), "RuntimeError: odd"),
    ],
)
def test_what_the_system_answers_is_explained(error: Exception, message: str) -> None:
    explained = storage.explain("write", "/some/path", error)
    assert isinstance(explained, StorageError)
    assert explained.where == "/some/path"
    with pytest.raises(StorageError, match=message):
        raise explained


# ---- S3 ----


def all_calls(url: str, tmp_path: Path) -> dict[str, Callable[[], object]]:
    (tmp_path / "local").write_bytes(b"x")
    return {
        "read": lambda: storage.read_bytes(url),
        "range": lambda: storage.read_range(url, 0, 5),
        "write": lambda: storage.write_bytes(url, b"x"),
        "upload": lambda: storage.upload_file(str(tmp_path / "local"), url),
        "download": lambda: storage.download_file(url, str(tmp_path / "target")),
        "list": lambda: storage.list_files(url),
        "exists": lambda: storage.exists(url),
        "delete": lambda: storage.delete(url),
    }


def test_a_missing_bucket_is_named(s3_environment: str, tmp_path: Path) -> None:
    calls = all_calls("s3://nobody-made-this/x", tmp_path)
    for name in ("write", "upload", "list"):
        with pytest.raises(StorageMissing, match=r"nobody-made-this.*no such bucket") as caught:
            calls[name]()
        assert s3_environment in caught.value.do
    for name in ("read", "range", "download"):
        with pytest.raises(StorageMissing, match="check the bucket and prefix"):
            calls[name]()


def test_an_empty_bucket_is_not_a_missing_one(s3_bucket: str) -> None:
    assert storage.list_files(s3_bucket) == {}


@pytest.mark.parametrize("call", ["read", "write", "list", "exists"])
def test_an_endpoint_that_does_not_answer_is_told_within_seconds(
    s3_environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with socket.socket() as unused:  # a port that nobody listens on
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        started = time.monotonic()
        with pytest.raises(StorageUnreachable, match="no answer from endpoint") as caught:
            all_calls("s3://bucket/x", tmp_path)[call]()
        assert time.monotonic() - started < 20
    assert caught.value.retryable
    assert endpoint in caught.value.found
    assert "AWS_ENDPOINT_URL" in caught.value.do


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
    assert found == storage.Counts({("read", "ok"): 1}, {"read": 7}, {"read": 1})


def test_another_endpoint_is_another_client(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3_bucket}/x", b"x")
    with socket.socket() as unused, monkeypatch.context() as elsewhere:
        unused.bind(("127.0.0.1", 0))
        elsewhere.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(StorageUnreachable):
            storage.read_bytes(f"{s3_bucket}/x")
    assert storage.read_bytes(f"{s3_bucket}/x") == b"x"


def test_missing_credentials_are_told(s3_environment: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for call in all_calls("s3://bucket/x", tmp_path).values():
        with pytest.raises(StorageError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
            call()


def test_wrong_credentials_are_told(s3_bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    def after(requests: int) -> None:
        """Let the server check credentials after so many requests."""
        address = f"{s3_endpoint}/moto-api/reset-auth"
        body = str(requests).encode()
        plain = urllib.request.Request(address, body, {"Content-Type": "text/plain"})
        urllib.request.urlopen(plain).close()

    calls = all_calls(f"{s3_bucket}/x", tmp_path)
    after(0)
    try:
        for name, call in calls.items():
            with pytest.raises(StorageError) as caught:
                call()
            assert "access denied" in caught.value.found, name
            assert "AWS_ACCESS_KEY_ID" in caught.value.do
    finally:
        after(10**9)


def test_a_used_up_quota_is_no_space(s3_environment: str) -> None:
    """Ceph answers 403 QuotaExceeded, which is no matter of rights."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answer = ClientError({"Error": {"Code": "QuotaExceeded", "Message": "x"}}, "PutObject")
    error = translate_boto_error(answer)
    assert isinstance(error, OSError)
    assert storage.explain("write", "s3://b/x", error).found == "no space left"


def test_a_protocol_nobody_knows() -> None:
    with pytest.raises(StorageError, match="Protocol not known: what"):
        storage.read_bytes("what://is/this")


def test_a_folder_given_for_a_file_is_called_one(tmp_path):
    with pytest.raises(StorageError, match=r"Found: a folder\. Do: name a file in it"):
        storage.read_bytes(str(tmp_path))
