"""Failures of the system and of stores become errors that say what to do."""

from __future__ import annotations

import errno
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from svfap_dist import storage
from svfap_dist.errors import StorageError
from svfap_dist.shards.format import load_manifest
from svfap_dist.storage import StorageMissingError, StorageUnreachableError


def test_reading_what_is_not_there(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "nothing")
    reads: list[Callable[[], object]] = [
        lambda: storage.read_bytes(url),
        lambda: storage.read_range(url, 0, 5),
        lambda: storage.download_file(url, str(tmp_path / "target")),
    ]
    for read in reads:
        with pytest.raises(StorageMissingError, match=r"Cannot read.*nothing there") as caught:
            read()
        assert caught.value.where == url
        assert not caught.value.retryable
    assert not (tmp_path / "target").exists()
    assert list(tmp_path.glob("target*")) == []


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
        (PermissionError(errno.EACCES, "x"), r"access denied.*check the permissions"),
        (FileNotFoundError(errno.ENOENT, "x"), r"nothing there.*check the path"),
        (OSError(errno.EROFS, "x"), r"access denied.*check the permissions"),
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
        with pytest.raises(
            StorageMissingError, match=r"nobody-made-this.*no such bucket"
        ) as caught:
            calls[name]()
        assert s3_environment in caught.value.do
    for name in ("read", "range", "download"):
        with pytest.raises(StorageError, match=r"no such bucket.*check the bucket") as caught:
            calls[name]()
        assert not isinstance(caught.value, StorageMissingError)  # no missing file
    with pytest.raises(StorageError, match="no such bucket"):
        load_manifest("s3://nobody-made-this")


def test_an_empty_bucket_is_not_a_missing_one(s3_bucket: str) -> None:
    assert storage.list_files(s3_bucket) == {}


@pytest.mark.parametrize("call", ["read", "write", "list", "exists"])
def test_an_endpoint_that_does_not_answer_is_told_within_seconds(
    s3_environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with socket.socket() as unused:  # a port without a listener
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        started = time.monotonic()
        with pytest.raises(StorageUnreachableError, match="no answer from endpoint") as caught:
            all_calls("s3://bucket/x", tmp_path)[call]()
        assert time.monotonic() - started < 20
    assert caught.value.retryable
    assert endpoint in caught.value.found
    assert "AWS_ENDPOINT_URL" in caught.value.do


def test_another_endpoint_is_another_client(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3_bucket}/x", b"x")
    with socket.socket() as unused, monkeypatch.context() as elsewhere:
        unused.bind(("127.0.0.1", 0))
        elsewhere.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(StorageUnreachableError):
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
        """Make the server check credentials after a number of requests."""
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


@pytest.mark.parametrize("error", [PermissionError("x"), FileNotFoundError("x"), TimeoutError("x")])
def test_advice_for_other_stores_does_not_name_the_variables_of_s3(error: Exception) -> None:
    assert "AWS" not in str(storage.explain("list", "gs://bucket/x", error))
    assert "AWS" in str(storage.explain("list", "s3://bucket/x", error))


def test_a_protocol_nobody_knows() -> None:
    with pytest.raises(StorageError, match="Protocol not known: what"):
        storage.read_bytes("what://is/this")


def test_a_folder_given_for_a_file_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Found: a folder\. Do: name a file in it"):
        storage.read_bytes(str(tmp_path))
