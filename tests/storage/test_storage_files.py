"""Local files and S3 behave alike, and writes are whole or absent."""

from __future__ import annotations

import http.server
import ipaddress
import os
import pickle
import ssl
import sys
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from svfap_dist import storage
from svfap_dist.errors import StorageError
from svfap_dist.storage import StorageMissingError, listing, s3

PATTERNS = ["a[1]", "a*", "a?", "[ab]?", "**", "{a1,b1}"]


def test_join_and_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.join("s3://b/p/", "x", "y/") == "s3://b/p/x/y/"
    assert storage.join("s3://b/p", "/x") == storage.join("s3://b/p//", "x") == "s3://b/p//x"
    assert storage.join("/a", "b") == "/a/b"
    monkeypatch.chdir(tmp_path)
    assert storage.local_path("x") == storage.local_path(f"file://{tmp_path}/x")
    assert storage.is_remote("s3://b/x")
    assert not storage.is_remote("file:///x")
    assert not storage.is_remote("/x")
    assert not storage.is_remote("clips/s3://x")
    assert storage.local_path("file:///a::b?c") == "/a::b?c"


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
    assert storage.list_folders(root) == ["a"]
    assert storage.list_folders(storage.join(root, "a")) == ["b"]
    assert storage.list_folders(storage.join(root, "none")) == []
    assert storage.file_size(storage.join(root, "a.txt")) == 5
    assert storage.file_size(storage.join(root, "a")) is None
    assert not storage.exists(storage.join(root, "a"))  # a prefix is no file
    assert not storage.exists(storage.join(root, "b/below-a-file"))


@pytest.mark.parametrize(
    "name", ["12::30::05", "s3::a", "b?versionId=abc", "file:x", "#a%20b", "é e+&=;", "*[ab]?"]
)
def test_names_are_literal(root: str, tmp_path: Path, name: str) -> None:
    """No part of a name means a chain of file systems, a version, a pattern or an encoding."""
    decoys = ["b", "a", "12", "s3", "b?", "a b", "x", "abc"]
    for decoy in decoys:
        storage.write_bytes(storage.join(root, decoy), b"decoy")
    url = storage.join(root, name)
    assert not storage.exists(url)
    storage.write_bytes(url, b"0123456789")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_range(url, 2, 5) == b"234"
    storage.download_file(url, str(tmp_path / "down"))
    storage.upload_file(str(tmp_path / "down"), storage.join(url + ".d", name))
    sizes = dict.fromkeys(decoys, 5) | {name: 10, f"{name}.d/{name}": 10}
    assert storage.list_files(root) == sizes
    assert storage.list_files(url + ".d") == {name: 10}
    assert storage.read_bytes(storage.join(url + ".d", name)) == b"0123456789"


def test_deleting(root: str) -> None:
    storage.delete(storage.join(root, "nothing"))
    for name in ("a/1", "a/2", "ab", "b"):
        storage.write_bytes(storage.join(root, name), b"x")
    storage.delete(storage.join(root, "a"))
    assert list(storage.list_files(root)) == ["ab", "b"]
    storage.delete(storage.join(root, "b"))
    assert list(storage.list_files(root)) == ["ab"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_deleting_a_name_spares_those_it_matches_as_a_pattern(root: str, pattern: str) -> None:
    _check_deletion_is_literal(root, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_deleting_is_literal_on_stores_other_than_s3(pattern: str, tmp_path: Path) -> None:
    _check_deletion_is_literal(f"memory:/{tmp_path}", pattern)


def _check_deletion_is_literal(root: str, pattern: str) -> None:
    others = ["a1", "a2/1", "b1/x", "b1/y"]
    for name in [*others, f"f/{pattern}", f"{pattern}/1", f"{pattern}/deep/2", f"{pattern}x/1"]:
        storage.write_bytes(storage.join(root, name), b"x")
    for gone in (f"f/{pattern}", pattern, f"nothing/{pattern}"):
        storage.delete(storage.join(root, gone))
    assert list(storage.list_files(root)) == sorted([*others, f"{pattern}x/1"])


def test_libraries_that_take_our_s3_are_literal_too(s3_bucket: str) -> None:
    """Ray deletes and copies through the file system object, within a wrapper of pyarrow."""
    import pyarrow.fs

    for name in ("a1/x", "a[1]/x", "a[1]/deep/y"):
        storage.write_bytes(storage.join(s3_bucket, name), name.encode())
    fs, bucket = storage.filesystem(s3_bucket)
    assert fs.cat([f"{bucket}/a[1]/x"]) == {f"{bucket}/a[1]/x": b"a[1]/x"}
    assert fs.expand_path(f"{bucket}/a[1]/x") == [f"{bucket}/a[1]/x"]
    wrapped = pickle.loads(pickle.dumps(pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))))
    wrapped.delete_file(f"{bucket}/a[1]/x")
    assert list(storage.list_files(s3_bucket)) == ["a1/x", "a[1]/deep/y"]
    wrapped.delete_dir(f"{bucket}/a[1]")
    assert list(storage.list_files(s3_bucket)) == ["a1/x"]


def test_deleting_more_than_fits_one_request(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_KEYS_PER_DELETION", 2)
    call = s3.LiteralS3._call_s3

    async def in_small_pages(self, method, *args, **request):
        pages = {"MaxKeys": 2} if method == "list_objects_v2" else {}
        return await call(self, method, *args, **(pages | request))

    for name in ("a/1", "a/2", "a/3", "a/4/5", "a/6", "ab"):
        storage.write_bytes(storage.join(s3_bucket, name), b"x")
    with monkeypatch.context() as patch:
        patch.setattr(s3.LiteralS3, "_call_s3", in_small_pages)
        fs, path = storage.filesystem(storage.join(s3_bucket, "a"))
        fs.rm(path, recursive=True)
    assert list(storage.list_files(s3_bucket)) == ["ab"]


def test_a_deletion_that_is_refused_is_told(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers 200 to a request of several deletions, and names those that it refuses within."""
    call = s3.LiteralS3._call_s3

    async def refusing(self, method, *args, **request):
        if method == "delete_objects":
            return {"Errors": [{"Key": "x", "Code": "AccessDenied"}]}
        return await call(self, method, *args, **request)

    storage.write_bytes(storage.join(s3_bucket, "x"), b"x")
    monkeypatch.setattr(s3.LiteralS3, "_call_s3", refusing)
    with pytest.raises(StorageError, match=r"Cannot delete.*access denied"):
        storage.delete(storage.join(s3_bucket, "x"))


def test_empty_parts_of_a_key_are_kept(s3_bucket: str) -> None:
    names = ["//x", "/x", "a//x", "a/x", "x"]
    for name in names:
        storage.write_bytes(storage.join(s3_bucket, "dd", name), name.encode())
    listed = storage.list_files(f"{s3_bucket}/dd")
    assert listed == {name: len(name) for name in names}
    for name in listed:
        assert storage.read_bytes(storage.join(s3_bucket, "dd", name)) == name.encode()
    assert storage.list_files(f"{s3_bucket}/dd/") == listed
    assert storage.list_files(f"{s3_bucket}/dd//") == {"/x": 3, "x": 2}
    storage.delete(f"{s3_bucket}/dd//")
    assert list(storage.list_files(f"{s3_bucket}/dd")) == ["a//x", "a/x", "x"]
    storage.delete(f"{s3_bucket}/dd/a")
    storage.write_bytes(f"{s3_bucket}//lead/x", b"x")
    assert storage.list_files(s3_bucket) == {"/lead/x": 1, "dd/x": 1}
    storage.delete(f"{s3_bucket}/lead")
    assert storage.exists(f"{s3_bucket}//lead/x")
    storage.delete(f"{s3_bucket}//lead")
    assert list(storage.list_files(s3_bucket)) == ["dd/x"]


def test_an_unfinished_write_is_no_file(tmp_path: Path) -> None:
    """What a process that was killed leaves behind is never listed."""
    storage.write_bytes(str(tmp_path / "done"), b"x")
    (tmp_path / "done.1234abcd.tmp").write_bytes(b"half")
    assert storage.list_files(str(tmp_path)) == {"done": 1}


def test_writability_is_checked_without_a_trace(root: str, tmp_path: Path) -> None:
    storage.check_writable(storage.join(root, "new/folder/x.npz"))
    assert storage.list_files(root) == {}
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_bytes(b"")
    for url in (str(tmp_path / "file/x.npz"), "s3://no-such-bucket/x.npz", "/proc/x.npz"):
        if root.startswith("s3://") == url.startswith("s3://"):
            with pytest.raises(StorageError) as refused:
                storage.check_writable(url)
            assert refused.value.where == url


def test_a_link_to_nowhere_is_listed_and_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert storage.list_files(str(tmp_path)) == {"link": 0}
    with pytest.raises(StorageMissingError):
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


def test_ranged_reads_of_s3_take_the_direct_way(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_bucket}/some/x"
    storage.write_bytes(url, bytes(range(200)))
    with monkeypatch.context() as without:
        without.setattr(s3.LiteralS3, "cat_file", pytest.fail)
        assert storage.read_buffer(url, 3, 9) == bytes(range(3, 9))
        assert storage.read_range(url, 190, 300) == bytes(range(190, 200))
    assert storage.read_range(url, 200, 300) == b""


@pytest.mark.parametrize("name", ["/x", "x/", "a//x", "a/../x", "a/./x"])
def test_keys_that_the_direct_way_would_change_are_read_by_s3fs(s3_bucket: str, name: str) -> None:
    storage.write_bytes(f"{s3_bucket}/x", b"another")
    fs, bucket = storage.filesystem(s3_bucket)
    fs.call_s3("put_object", Bucket=bucket, Key=name, Body=b"0123")
    assert storage.read_range(f"{s3_bucket}/{name}", 1, 3) == b"12"


def test_what_fails_directly_is_read_by_s3fs_for_a_while(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, calls = f"{s3_bucket}/x", []
    storage.write_bytes(url, b"0123")

    class Refusing:
        def get_range(self, key: str, start: int, end: int) -> bytes:
            calls.append(key)
            raise RuntimeError("GET /b/x in 1.416ms - Server returned non-2xx status code: 503")

    with monkeypatch.context() as refused:
        refused.setattr("svfap_dist.storage.s3._open_store", lambda *_: Refusing())
        before = storage.request_counts().retries.get("read", 0)
        assert storage.read_range(url, 1, 3) == b"12"
        assert storage.read_range(url, 1, 3) == b"12"
        assert len(calls) == 1
        assert storage.request_counts().retries["read"] == before + 1
        refused.setattr("svfap_dist.storage.s3._PAUSE_SECONDS", 0.0)
        (store,) = storage.filesystem(url)[0]._range_stores.values()
        store._paused_until = 0.0
        assert storage.read_range(url, 1, 3) == b"12"
        assert len(calls) == 2


def test_obstore_is_not_needed(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    storage.write_bytes(f"{s3_bucket}/x", b"0123")
    assert storage.read_range(f"{s3_bucket}/x", 1, 3) == b"12"


class Encrypted(http.server.BaseHTTPRequestHandler):
    """Answers any ranged read."""

    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 1-2/4")
        self.send_header("Content-Length", "2")
        self.send_header("ETag", '"x"')
        self.send_header("Last-Modified", "Thu, 26 Nov 2026 12:00:00 GMT")
        self.end_headers()
        self.wfile.write(b"12")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def certificate_of(address: str) -> bytes:
    """A private key and a certificate that it has signed itself (PEM)."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    kind = serialization.PrivateFormat.PKCS8
    return key.private_bytes(pem, kind, plain) + made.public_bytes(pem)


def test_the_direct_way_trusts_the_certificates_of_the_environment(
    s3_environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = str(tmp_path / "certificate.pem")
    Path(certificate).write_bytes(certificate_of("127.0.0.1"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Encrypted) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
        monkeypatch.setattr(s3.LiteralS3, "cat_file", pytest.fail)
        assert storage.read_range("s3://bucket/x", 1, 3) == b"12"
        server.shutdown()


def test_links_to_folders_that_are_listed_anyway_are_not_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With two links to a folder above them, the paths would be 2^40."""
    root = tmp_path / "root"
    for name in ("root/a/x", "root/b/y", "outside/z", "outside/deep/w", "other/v"):
        storage.write_bytes(str(tmp_path / name), b"x")
    loops = {"a/up": "..", "b/up": "..", "a/b": "../b", "self": "self", "top": "/"}
    for name, target in loops.items():
        (root / name).symlink_to(target)
    assert storage.list_files(str(root)) == {"a/x": 1, "b/y": 1, "self": 0}
    assert "are not followed: 4, such as" in caplog.text
    assert f"{root}/a/b to {root}/b" in caplog.text


def test_links_to_folders_elsewhere_are_followed_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("root/x", "outside/z", "outside/deep/w", "another/v"):
        storage.write_bytes(str(tmp_path / name), b"x")
    for name, target in {"1": "outside/deep", "2": "outside/deep", "3": "another"}.items():
        (root / name).symlink_to(tmp_path / target)
    (tmp_path / "another/back").symlink_to(root)
    (tmp_path / "another/on").symlink_to(tmp_path / "outside")
    expected = {"x": 1, "1/w": 1, "3/v": 1, "3/on/z": 1}
    assert storage.list_files(str(root)) == expected
    (tmp_path / "link").symlink_to(root)
    assert storage.list_files(str(tmp_path / "link")) == expected


def test_the_work_per_link_does_not_grow_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, calls = 200, []
    for n in range(number):
        storage.write_bytes(str(tmp_path / f"outside/{n}/x"), b"x")
        storage.write_bytes(str(tmp_path / f"root/{n}"), b"x")
        (tmp_path / f"root/to-{n}").symlink_to(tmp_path / f"outside/{n}")
    is_below = listing._is_below
    monkeypatch.setattr(listing, "_is_below", lambda *paths: calls.append(1) or is_below(*paths))
    assert len(storage.list_files(str(tmp_path / "root"))) == 2 * number
    assert len(calls) <= 2 * number
