"""Fixtures: the old files, and the results of the old and the current version on them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import compat_cases
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def then() -> dict[str, Any]:
    """Results of the old version."""
    return json.loads((HERE / "expected.json").read_text())


@pytest.fixture(scope="session")
def old_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old version's files; tests must not change them."""
    return _unpacked(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="session")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of the current version in `folder`, computed once for all xdist workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, observed = root / "compat", root / "compat.json"
    with open(root / "compat.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not observed.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            # New runs have another order of samples today; resumed ones keep theirs.
            found = compat_cases.observe(_unpacked(folder), ("data.order_version=1",))
            observed.write_text(json.dumps(found))
    return json.loads(observed.read_text()) | {"folder": folder}


def _unpacked(folder: Path) -> Path:
    with tarfile.open(HERE / "data.tar.xz") as tar:
        tar.extractall(folder)  # no filter: Debian 12's Python has none
    shutil.copytree(HERE / "recipes", folder / "recipes")
    return folder
