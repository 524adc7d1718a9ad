"""Imported by every Python process of the hosts: plants faults that only a rank itself can have.

The file SVFAP_CHAOS_PLAN is read when a rank imports the engine. Its key `not_finite` lists the
steps, from 1, whose loss is NaN on rank 0, each the first time it is computed in the run. From step
`not_finite_from` on every loss of rank 0 is NaN; from step `out_of_memory_from` on its memory is
exhausted. The file beside the plan that ends in .clock names a host, and the seconds by which
`time.time` is wrong there.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import math
import os
import socket
import sys
import time

_ENGINE = "svfap_dist.train.engine"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Patches a module when it has been imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _ENGINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _plant(module.Engine)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _plant(engine) -> None:
    with open(os.environ["SVFAP_CHAOS_PLAN"]) as file:
        plan = json.load(file)
    if not plan:
        return
    steps = set(plan.get("not_finite", ()))
    not_finite_from = plan.get("not_finite_from", math.inf)
    out_of_memory_from = plan.get("out_of_memory_from", math.inf)
    original = engine.backward

    def backward(self, batch, step):
        original(self, batch, step)
        if self._rank != 0:
            return self._step_loss
        if step + 1 >= out_of_memory_from:
            raise MemoryError
        if step + 1 in steps:
            steps.remove(step + 1)
            with open(os.environ["SVFAP_CHAOS_PLAN"], "w") as file:  # for the next attempt
                json.dump({**plan, "not_finite": sorted(steps)}, file)
            self._step_loss = self._step_loss * float("nan")
        elif step + 1 >= not_finite_from:
            self._step_loss = self._step_loss * float("nan")
        return self._step_loss

    engine.backward = backward


def _offset() -> float:
    """Seconds by which this host's clock is wrong now."""
    try:
        with open(os.environ["SVFAP_CHAOS_PLAN"] + ".clock") as file:
            host, seconds = file.read().split()
    except (OSError, ValueError):
        return 0.0
    return float(seconds) if host == socket.gethostname() else 0.0


def _patch_clock() -> None:
    right, known = time.time, [0.0, 0.0]  # when the offset was read, and it

    def now() -> float:
        if time.monotonic() > known[0] + 0.2:
            known[:] = [time.monotonic(), _offset()]
        return right() + known[1]

    now.__module__, now.__qualname__ = "time", "time"  # so that it can be pickled, by its name
    time.time = now


if "SVFAP_CHAOS_PLAN" in os.environ:
    _patch_clock()
    sys.meta_path.insert(0, _AfterImport())
