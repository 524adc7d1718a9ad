"""Real servers for the tests below, started once per session, ended by their pids."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ceph import Ceph


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ceph]:
    store = Ceph(Path(tmp_path_factory.mktemp("ceph")))
    try:
        store.start()
        yield store
    finally:
        store.stop()


@pytest.fixture
def ceph_bucket(ceph: Ceph, request, monkeypatch) -> str:
    """A fresh bucket of the real store, with the client's environment set for it."""
    import fsspec

    for name, value in ceph.environment().items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = request.node.name.lower().replace("_", "-").replace("[", "-").replace("]", "")[:60]
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"
