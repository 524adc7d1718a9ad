"""What a log file gets to see of long work: a line every ten seconds."""

from __future__ import annotations

import pytest

from svfap_dist import progress
from svfap_dist.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
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


def test_work_that_nobody_watches_is_silent(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("Training", silent=True) as shown:
        clock[0] += 60
        shown.tick()
        shown.update(1, 2)
    assert capsys.readouterr().err == ""
