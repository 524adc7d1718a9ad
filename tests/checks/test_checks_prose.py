"""The check of prose, on a file with quaint words and one without."""

from __future__ import annotations

import json
import re
from pathlib import Path

import prose
import pytest

_PLAIN = '"""Return the learning rate of the next optimizer step."""\n' * 3
_QUAINT = '''"""What nobody asks for."""

# Where it goes
# on
TEXT = "error: this goes on by itself"
'''


def _run(root: Path, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    (root / "svfap_dist").mkdir()
    (root / "svfap_dist/module.py").write_text(text)
    (root / "README.md").write_text("One file.\n\nHand it\nover, so many times.\n")
    cells = [{"cell_type": kind, "source": ["Somebody.\n"]} for kind in ("markdown", "code")]
    (root / "docs").mkdir()
    (root / "docs/a.ipynb").write_text(json.dumps({"cells": cells}))
    code = prose.main(["--root", str(root), "-v"])
    return code, re.sub(" +", " ", capsys.readouterr().out)


def test_quaint_words_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _run(tmp_path, _QUAINT, capsys)
    assert code == 1
    assert "svfap_dist/module.py:1: [nobody]" in out
    assert "svfap_dist/module.py:1: [asks for]" in out
    assert "svfap_dist/module.py:3: [goes on]" in out
    # Strings and documents are rows of their own.
    assert "svfap_dist/module.py:5: [goes on]" in out
    assert "README.md:4: [so many]" in out
    assert out.count("docs/a.ipynb:1: [somebody] Somebody.") == 1
    assert "prose: docstrings and comments 3 in 8 words" in out
    assert "prose: strings 2 in 6 words" in out


def test_plain_words_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = _run(tmp_path, _PLAIN + "# The understanding of standards.\n", capsys)
    assert code == 0
    assert "prose: docstrings and comments 0 in" in out


def test_a_few_are_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "# " + "word " * 1999 + "\n"
    assert _run(tmp_path, words + "# nobody\n", capsys)[0] == 0
    (tmp_path / "svfap_dist/other.py").write_text("# nobody\n")
    assert prose.main(["--root", str(tmp_path)]) == 1
