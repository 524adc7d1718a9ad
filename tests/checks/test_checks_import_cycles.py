"""The check for circular imports, on small trees with and without a circle."""

from __future__ import annotations

from pathlib import Path

import import_cycles
import pytest

_PACKAGE = {"svfap_dist/__init__.py": "", "svfap_dist/room/__init__.py": ""}


def _run(root: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    for name, text in (_PACKAGE | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return import_cycles.main(["--root", str(root)]), capsys.readouterr().out


@pytest.mark.parametrize(
    "back",
    [
        "from svfap_dist.room.a import f\n",
        "from svfap_dist.room import a\n",
        "from . import a\n",
        "from .a import f\n",
        "import svfap_dist.room.a\n",
        'import importlib\na = importlib.import_module("svfap_dist.room.a")\n',
        'def g():\n    return __import__("svfap_dist.room.a")\n',
        "def g():\n    from svfap_dist.room.a import f\n",
        "class C:\n    def g(self):\n        if self:\n            import svfap_dist.room.a as a\n",
    ],
)
def test_a_planted_circle_fails(
    back: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "svfap_dist/room/a.py": "from svfap_dist.room import b\ndef f(): b\n",
        "svfap_dist/room/b.py": back,
    }
    code, out = _run(tmp_path, files, capsys)
    assert code == 1
    assert "svfap_dist.room.a -> svfap_dist.room.b" in out
    assert "svfap_dist.room.b -> svfap_dist.room.a" in out


def test_a_circle_of_three_is_one_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        f"svfap_dist/room/{name}.py": f"from svfap_dist.room import {after}\n"
        for name, after in ("ab", "bc", "ca", "dc")
    }
    code, out = _run(tmp_path, files, capsys)
    assert code == 1
    assert "1 circles" in out
    assert "room.d" not in out


def test_what_is_no_circle_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        # __init__ re-exports a; a imports its neighbor b through the package, no use of __init__.
        "svfap_dist/room/__init__.py": "from svfap_dist.room.a import f\n",
        "svfap_dist/room/a.py": "from svfap_dist.room import b\ndef f(): b.g()\n",
        "svfap_dist/room/b.py": (
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from svfap_dist.room.a import f\n"
            "def g(): pass\n"
        ),
    }
    code, out = _run(tmp_path, files, capsys)
    assert code == 0
    assert "0 circles; 1 with TYPE_CHECKING" in out


@pytest.mark.parametrize(
    "use",
    [
        "from svfap_dist.room import f\n",
        "from svfap_dist import room\ndef g(): room.f()\n",
        "import svfap_dist.room\ndef g(): svfap_dist.room.f()\n",
    ],
)
def test_a_name_of_init_closes_a_circle(
    use: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "svfap_dist/room/__init__.py": "from svfap_dist.room import a\ndef f(): a\n",
        "svfap_dist/room/a.py": use,
    }
    assert _run(tmp_path, files, capsys)[0] == 1
    # Of the package, only a neighbor is used: no circle.
    files["svfap_dist/room/b.py"] = "def f(): pass\n"
    files["svfap_dist/room/a.py"] = use.replace("room.f", "room.b.f").replace(
        "import f", "import b"
    )
    assert _run(tmp_path, files, capsys)[0] == 0
