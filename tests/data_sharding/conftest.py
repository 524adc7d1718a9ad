"""The labeled sets laid out once, and copies of them for tests that damage them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from layouts import LAYOUTS


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, lay_out in LAYOUTS.items():
        made[name] = tmp_path_factory.mktemp(name)
        lay_out(made[name])
    return made


@pytest.fixture
def copy_of(roots: dict[str, Path], tmp_path: Path):
    """A copy of a set's layout, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(roots[name], tmp_path / name))

    return copy
