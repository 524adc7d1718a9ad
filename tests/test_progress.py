"""What logs and terminals show of long work: a line every ten seconds, or a bar."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from svfap_dist import progress
from svfap_dist.progress import Progress, waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets; the thread that looks at it does not wake up."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_TICKS", 3600.0)
    return now


def test_a_line_every_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("Training") as shown:
        for seconds, done in ((9, 0), (11, 0), (12, 20), (16, 40), (22, 60), (23, 80), (33, 90)):
            clock[0] = 100.0 + seconds
            if done:
                shown.update(done, 100, f"loss {done}")
            else:
                shown.tick()
    assert capsys.readouterr().err.splitlines() == [
        "Training ...",
        "Training: nothing done yet after 11 s",
        "Training: 60 of 100  0:00:10 left  loss 60",
        "Training: 90 of 100  0:00:03 left  loss 90",
    ]


def test_a_line_says_that_nothing_is_new(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("Sharding") as shown:
        shown.update(3, 8)
        clock[0] += 9
        shown.update(3, 8)  # nothing new
        clock[0] += 16
        shown.tick()
    assert capsys.readouterr().err.splitlines()[1:] == ["Sharding: 3 of 8  nothing new for 25 s"]


def test_a_line_after_the_last_unit_says_that_it_is_finishing(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("Fine-tuning") as shown:
        shown.update(8, 8)
        clock[0] += 25
        shown.tick()
    assert capsys.readouterr().err.splitlines()[1:] == ["Fine-tuning: 8 of 8  finishing for 25 s"]


def test_short_waits_are_silent_and_inner_tasks_are_shown_alone(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting("Loading runs/a") as outer:
        clock[0] += 12
        outer.tick()
        with Progress("Rounds", 2) as inner:
            clock[0] += 12
            outer.tick()
            inner.update(1)
        outer.tick()
    with waiting("Loading runs/b"):
        clock[0] += 9
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Loading runs/a: 12 s", "Rounds ...", "Rounds: 1 of 2"]


def test_a_line_comes_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = threading.Event()
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_TICKS", 0.001)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.001)
    monkeypatch.setattr(progress, "say", lambda line: said.set() if ":" in line else None)
    with Progress("Listing"):
        assert said.wait(60)


BAR = """
from svfap_dist import logs
from svfap_dist.progress import Progress, waiting
logs.set_up()
with waiting("Loading"):
    with Progress("Rounds", 2) as shown:
        shown.update(1)
        print("result")
"""


def on_terminal(tmp_path: Path, **environment: str) -> tuple[str, str]:
    """Return what a program with a bar writes to a terminal, and to a file of its output."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "SVFAP_LOG", "FORCE_COLOR")}
    with open(tmp_path / "out", "w+") as out:
        command = [sys.executable, "-c", BAR]
        process = subprocess.Popen(command, stdout=out, stderr=theirs, env=env | environment)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(ours, 4096):
                shown += data
        assert process.wait(timeout=120) == 0
        os.close(ours)
        out.seek(0)
        return shown.decode(), out.read()


def test_a_terminal_shows_a_bar_in_color_unless_no_color_is_set(tmp_path: Path) -> None:
    color = re.compile(r"\x1b\[[0-9;]*(3[0-9]|38;[25])[0-9;]*m")
    shown, printed = on_terminal(tmp_path, TERM="xterm-256color")
    assert "Rounds" in shown
    assert color.search(shown)
    assert printed == "result\n"
    plain, printed = on_terminal(tmp_path, TERM="xterm-256color", NO_COLOR="1")
    assert "Rounds" in plain
    assert not color.search(plain)
    assert printed == "result\n"
    dumb, _ = on_terminal(tmp_path, TERM="dumb")
    assert "\x1b" not in dumb
    assert dumb.splitlines() == ["Rounds ..."]


def test_work_that_nobody_watches_is_silent(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("Training", silent=True) as shown:
        clock[0] += 60
        shown.tick()
        shown.update(1, 2)
    assert capsys.readouterr().err == ""
