"""The check of docstrings, on functions with and without documented parameters."""

from __future__ import annotations

from pathlib import Path

import docstrings
import pytest

_BAD = '''
class Reader:
    """Reads."""

    def read(self, url, *, limit=None):
        """Return the bytes.

        Args:
            url: Where to read.
        """

if True:
    async def fetch(url): ...

def write(path, data, *rest):
    """Write a file.

    Args:
        path: Where to write,
            size: not an entry.
        data (bytes): What to write.
        rest:
        mode: Gone.

    Returns:
        other: not an entry either.
    """

class Base:
    @staticmethod
    def build(name): ...
    @classmethod
    def load(cls, name): ...
'''

_GOOD = '''
from typing import overload

@app.command("run")
def run(recipe): ...

@checkpoint_app.callback()
def callback(recipe): ...

@overload
def read(url: int): ...

def read(url, *parts, **options):
    """Return the bytes.

    Args:
        url: Where to read: a path
            or a URL.
        *parts: Below it.
        **options: As of fsspec.

    Raises:
        StorageError: If it is missing.
    """
    def nested(value): ...

def _private(value): ...

def no_parameters():
    """Do it."""

class _Private:
    def read(self, url): ...

class Local:
    @property
    def url(self): ...
    @url.setter
    def url(self, value): ...
    def __call__(self, value): ...
    def read(self, url, _unused):
        """See `Reader.read`."""
'''


def _run(
    root: Path, text: str, init: str, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str]:
    (root / "svfap_dist/room").mkdir(parents=True)
    (root / "svfap_dist/room/module.py").write_text(text)
    (root / "svfap_dist/room/__init__.py").write_text(init)
    return docstrings.main(["--root", str(root), *options]), capsys.readouterr().out


def test_missing_entries_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _run(tmp_path, _BAD, "", capsys)
    assert code == 1
    assert [line.partition(": ")[2] for line in out.splitlines()] == [
        "package without a docstring",
        "Reader.read: no entry for limit",
        "fetch: no docstring",
        "write: no entry for rest; entry for unknown mode",
        "Base.build: no docstring",
        "Base.load: no docstring",
        "6 findings in 5 public functions with parameters",
    ]


def test_documented_and_exempt_functions_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = _run(tmp_path, _GOOD, '"""A room."""\n', capsys)
    assert code == 0
    assert out == "docstrings: 0 findings in 1 public functions with parameters\n"


def test_counts_by_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _run(tmp_path, _BAD, '"""A room."""\n', capsys, "--by-room")
    assert code == 1
    room, _, counts = out.splitlines()[0].strip().partition(" ")
    assert (room, counts.split()) == ("svfap_dist/room", ["5", "findings,", "5", "functions"])
