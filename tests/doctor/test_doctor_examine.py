"""Checks that hang, die or go wrong cost their own finding only."""

from __future__ import annotations

import os
import time
from functools import partial

import pytest

from svfap_dist.doctor import cluster, examine
from svfap_dist.doctor.finding import Finding, fail, ok, warn


def _fine() -> list[Finding]:
    print("a library says something")  # must not reach standard output
    return [ok("fine", "all is well")]


def _wrong() -> list[Finding]:
    raise KeyError("an unexpected error")


def test_a_failing_check_does_not_affect_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    groups = {
        "hangs": partial(time.sleep, 600),
        "dies": partial(os._exit, 3),
        "goes wrong": _wrong,
        "works": _fine,
    }
    began = time.monotonic()
    findings = examine._run_groups(groups, seconds=3)  # type: ignore[arg-type] - that is the point
    assert time.monotonic() - began < 60
    assert [(found.name, found.status) for found in findings] == [
        ("hangs", "fail"),
        ("dies", "fail"),
        ("goes wrong", "fail"),
        ("fine", "ok"),
    ]
    words = ["timeout after 3 s", "code 3", "an unexpected error", "all is well"]
    for word, found in zip(words, findings, strict=True):
        assert word in found.found
        assert found.do or found.status == "ok"
    assert capfd.readouterr().out == ""


def test_an_examination_counts() -> None:
    found = examine._summarize([ok("a", "x"), warn("b", "y", "mend y"), fail("c", "z", "mend z")])
    assert (found.ok, found.warn, found.fail) == (1, 1, 1)
    assert any("mend z" in line for line in found.lines())


def test_without_an_address_ray_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert [found.status for found in cluster.examine(None)] == ["ok"]
