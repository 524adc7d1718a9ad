"""Every second of a run in one class: hand-made histories with known answers."""

from __future__ import annotations

from typing import Any

import pytest

from svfap_dist.telemetry.goodput import CLASSES, Goodput


def window(time: float, step: int, data: float = 0, saved: float = 0, tested: float = 0) -> Any:
    return {
        "event": "window",
        "time": time,
        "step": step,
        "data_wait_seconds": data,
        "checkpoint_seconds": saved,
        "evaluation_seconds": tested,
    }


def event(kind: str, time: float, step: int = 0) -> dict[str, Any]:
    return {"event": kind, "time": time, "step": step}


def of(**seconds: float) -> dict[str, float]:
    return {name: seconds.get(name, 0.0) for name in CLASSES}


def test_an_undisturbed_run() -> None:
    account = Goodput(
        [
            event("start", 1000),
            event("ready", 1010),
            window(1110, 10, data=5, tested=15),
            window(1210, 20, saved=20),
            event("checkpoint", 1215, 20),
            event("stop", 1220, 20),
        ]
    )
    wanted = of(restart=10, data_wait=5, checkpoint=20, idle=15 + 10, productive=80 + 80)
    assert account.seconds() == wanted
    assert account.ratio() == pytest.approx(160 / 220)


def test_probes_are_a_class_of_their_own() -> None:
    probed = window(111, 10, data=5) | {"probe_seconds": 25}
    account = Goodput([event("start", 0), event("ready", 11), probed, window(121, 20)])
    assert account.seconds() == of(restart=11, data_wait=5, probe=25, productive=70 + 10)


def test_a_killed_attempt_is_redone_from_its_checkpoint() -> None:
    account = Goodput(
        [event("start", 0), event("ready", 1), window(11, 10), window(21, 20, data=4)]
    )
    assert account.seconds() == of(restart=1, productive=16, data_wait=4)
    for happened in (event("resume", 41, 10), event("ready", 44), window(54, 20)):
        account.add(happened)
    # 20 s between the last sign of life and the resume, 3 s to set up.
    assert account.seconds() == of(restart=1 + 20 + 3, productive=10 + 10, redone=10)


def test_an_older_checkpoint_may_be_the_one_to_go_on_from() -> None:
    events = [event("start", 0), event("ready", 0), window(10, 10), window(20, 20)]
    events += [event("resume", 20, 20), event("ready", 20), window(30, 30)]
    events += [event("resume", 30, 10), event("ready", 30)]
    assert Goodput(events).seconds() == of(productive=10, redone=20)


def test_nobody_ran_it_after_a_stop() -> None:
    events = [event("start", 0), event("ready", 0), window(10, 10), event("stop", 11, 10)]
    events += [event("resume", 511, 10), event("ready", 512)]
    assert Goodput(events).seconds() == of(productive=10, idle=1 + 500, restart=1)


@pytest.mark.parametrize("reason", ["nodes joined", "nodes leaving"])
def test_the_ranks_of_another_size_are_a_restart(reason) -> None:
    events = [event("start", 0), event("ready", 0), window(10, 10)]
    events += [event("stop", 11, 10) | {"reason": reason, "message": ""}]
    events += [event("resume", 20, 10), event("ready", 25)]
    assert Goodput(events).seconds() == of(productive=10, restart=1 + 9 + 5)


def test_an_attempt_that_fails_is_down_until_the_next() -> None:
    """As when a rank was killed and the others could not reach it any more."""
    events = [event("start", 0), event("ready", 0), window(10, 10)]
    events += [event("stop", 70, 10) | {"message": "Connection closed by peer"}]
    events += [event("resume", 80, 10), event("ready", 85), window(95, 20)]
    assert Goodput(events).seconds() == of(productive=10 + 10, restart=60 + 10 + 5)


def test_nothing_yet() -> None:
    assert Goodput([event("ready", 5)]).seconds() == of()
    assert Goodput().ratio() == 0
