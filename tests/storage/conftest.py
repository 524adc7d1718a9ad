"""Places of each kind to store things."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to store things, of each kind."""
    if request.param == "s3":
        return request.getfixturevalue("s3_bucket") + "/some/prefix"
    return str(tmp_path / "some/prefix") if request.param == "path" else f"file://{tmp_path}/prefix"
