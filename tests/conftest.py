"""Fixtures that more than one room uses. Being here also puts tests/ on the import path, for the
test helpers (`from clips import make_video`)."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from numbered_shards import DataSet, video_of, write_data_set

from svfap_dist.video.info import VideoInfo

with contextlib.suppress(ModuleNotFoundError):  # a bare GPU machine has no hypothesis
    from hypothesis import settings

    # How long an example takes is the machine's business: a busy one must not fail a test.
    settings.register_profile("svfap", deadline=None)
    settings.load_profile("svfap")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, import only files that have such tests: a bare GPU machine lacks what others
    import (Ray, moto, Grafana's SDK, ...)."""
    if config.option.markexpr != "gpu":
        return None
    files = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    return not any("mark.gpu" in file.read_text() for file in files) or None


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    """Undo a test's changes of torch's number of threads, which rounding depends on: a test that
    compares with another process would otherwise depend on the tests before it."""
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server of this process, on a free port of 127.0.0.1."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_environment(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The variables of a user of `s3_endpoint`; nothing of the machine's own AWS settings."""
    from svfap_dist.storage.s3 import LiteralS3

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    # storage sets these two for stores other than AWS; setting them here undoes that after a test.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    # fsspec keeps file system objects, and with them the credentials they were made with.
    LiteralS3.clear_instance_cache()
    yield s3_endpoint
    LiteralS3.clear_instance_cache()


@pytest.fixture
def s3_bucket(s3_environment: str) -> str:
    """URL of an empty bucket, `s3://...`, that the environment's variables give access to."""
    from svfap_dist import storage

    fs, bucket = storage.filesystem(f"s3://bucket-{uuid.uuid4().hex[:12]}")
    fs.mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def videos() -> list[bytes]:
    """Videos of 60 samples, in which every frame names its sample."""
    return [video_of(sample) for sample in range(60)]


@pytest.fixture
def make_data_set(tmp_path, videos) -> Callable[..., DataSet]:
    """make_data_set([7, 5]) writes two shards; see write_data_set."""

    def make(
        sizes: list[int], replace: dict[int, tuple[bytes, VideoInfo]] | None = None
    ) -> DataSet:
        return write_data_set(str(tmp_path / "shards"), sizes, videos, replace or {})

    return make
