from __future__ import annotations

import time
from typing import Any

import pytest

from svfap_dist.bench import metrics
from svfap_dist.telemetry.recorder import Recorder

BUSY_SECONDS = 0.005


def test_the_recorders_time_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    (usual,) = metrics.run(("nano",), batch_size=2, rounds=1).costs
    per_step = usual.recorder_seconds / usual.step_seconds
    assert usual.share == pytest.approx(per_step + usual.scrape_seconds / 5)
    assert 0 < per_step < usual.share
    assert usual.recorder_seconds < BUSY_SECONDS
    count = Recorder.count_step

    def busy_count(recorder: Recorder, *arguments: Any) -> None:
        until = time.process_time() + BUSY_SECONDS
        while time.process_time() < until:
            pass
        count(recorder, *arguments)

    monkeypatch.setattr(Recorder, "count_step", busy_count)
    slowed = metrics.run(("nano",), batch_size=2, rounds=1)
    assert slowed.costs[0].recorder_seconds > BUSY_SECONDS
    assert "nano" in slowed.lines()[0]
