"""Every error that users can meet: its four parts, and how it is worded."""

from __future__ import annotations

from pathlib import Path

import pytest
import user_errors
from project_files import ROOT

_ERRORS = """
class SvfapError(Exception):
    def __init__(self, what, where="", found="", do=""):
        super().__init__(what)

class ConfigError(SvfapError): pass
class DecodeError(SvfapError): pass
class FrameError(DecodeError):
    def __init__(self, number):
        super().__init__("Unreadable frame", where=f"frame {number}", do="copy it again")
"""


def _problems(root: Path, code: str) -> list[str]:
    for name, text in (("errors", _ERRORS), ("room", code)):
        (root / "svfap_dist").mkdir(exist_ok=True)
        (root / "svfap_dist" / f"{name}.py").write_text(text)
    project = user_errors.Project(root)
    return [text for error in project.errors() for text in project.problems(error)]


def test_errors_of_the_packages_are_complete_and_plain():
    project = user_errors.Project(ROOT)
    errors = list(project.errors())
    assert len(errors) > 300
    broken = [f"{e.path}:{e.line}: {text}" for e in errors for text in project.problems(e)]
    assert broken == []


def test_parts_are_followed_to_where_they_are_written(tmp_path: Path):
    code = """
from svfap_dist.texts import SAVE as ADVICE
TITLE = "Too " + "small"
def check(size):
    found, do = f"{size} pixels", "make it larger"
    if size < 2:
        do += ", or leave it out"
        raise errors.ConfigError(TITLE, "--size", found, do)
    for option, advice in (("--a", "give a"), ("--b", "give b")):
        raise ConfigError("Missing", option, "", advice if size else ADVICE)
    raise FrameError(3)
"""
    (tmp_path / "svfap_dist").mkdir()
    (tmp_path / "svfap_dist/texts.py").write_text("SAVE = 'save it'")
    assert _problems(tmp_path, code) == ["found: missing"]
    frame, small, missing = (error.parts for error in user_errors.Project(tmp_path).errors())
    assert [frame["where"], frame["do"]] == ["frame {number}", "copy it again"]
    assert small == {
        "what": "Too small",
        "where": "--size",
        "found": "{size} pixels",
        "do": "make it larger, or leave it out",
    }
    assert missing["where"] == "--a / --b"
    assert missing["do"] == "give a / give b / save it"


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ('ConfigError("No file", "x", "nothing", "check the path")', None),
        ('DecodeError("No frame", do="leave it out")', None),
        ('DecodeError("No frame")', "found: missing"),
        ('ConfigError("No file.", "x", "nothing", "check the path")', "what: not a short"),
        ('ConfigError("no file", "x", "nothing", "check the path")', "what: not a short"),
        ('ConfigError("No file", "", "nothing", "check the path")', "where: missing"),
        ('ConfigError("No file", "x", "nothing")', "do: missing"),
        ('ConfigError("No file", "x", "nothing", "Check the path")', "do: not advice"),
        ('ConfigError("No file", "x", "None", "check it")', "found: 'None'"),
        ('ConfigError("No file", "x", "a KeyError", "check it")', "found: 'KeyError'"),
        ('ConfigError("No file", "x", "a DecodeError", "check it")', "found: 'DecodeError'"),
        ('ConfigError("No file", "x", "nothing", "mend it")', "do: 'mend'"),
        ('ConfigError("No file", "x", f"{None}", "run `f(None)`")', None),
    ],
)
def test_broken_rules_are_found(call: str, problem: str | None, tmp_path: Path):
    found = _problems(tmp_path, f"def f():\n    raise {call}\n")
    assert [text.startswith(problem or "-") for text in found][:1] == ([True] if problem else [])
