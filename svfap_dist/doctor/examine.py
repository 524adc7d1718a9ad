"""Run all checks of `svfap doctor`.

In: a recipe, or none. Out: an `Examination` with a `Finding` per check. Groups of checks run at the
same time, each in a process of its own with a timeout: a store that never answers or a driver that
hangs costs its own finding, not the others.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from svfap_dist.config import Config, with_device
from svfap_dist.distributed import has_gpu_per_rank
from svfap_dist.doctor import cluster, machine, store
from svfap_dist.doctor.finding import FAIL, OK, WARN, Finding, fail
from svfap_dist.parallel.processes import ChildProcess, CrashedError, HungError
from svfap_dist.text_table import format_table

EXIT_CODE = 9  # of `svfap doctor`, if a check fails
_TIMEOUT_SECONDS = 90.0  # of a group of checks

_Check = Callable[[], list[Finding]]


@dataclasses.dataclass(frozen=True)
class Examination:
    """All findings in the order of the checks, and how many there are of each status."""

    ok: int
    warn: int
    fail: int
    findings: list[Finding]

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        rows = []
        for finding in self.findings:
            rows.append((finding.status, finding.name, finding.found))
            if finding.do:
                rows.append(("", "", f"Do: {finding.do}"))
        return [*format_table(rows), f"{self.ok} ok, {self.warn} warnings, {self.fail} failed."]


def run(
    config: Config | None, on_group: Callable[[int, int], None] = lambda done, total: None
) -> Examination:
    """Check this machine, the recipe's stores and the cluster.

    Args:
        config: the recipe; None: this machine only.
        on_group: called with the number of finished groups of checks and of all groups.
    """
    if config is not None:
        config = with_device(config, has_gpu_per_rank)
    groups: dict[str, _Check] = {
        "this machine": functools.partial(machine.examine, config),
        "GPU": functools.partial(machine.examine_gpus, config),
        "Ray cluster": functools.partial(cluster.examine, config),
    }
    if config is not None:
        groups |= {
            "run.url": functools.partial(store.examine_run, config.run.url),
            "data.url": functools.partial(store.examine_data, config),
            "disk": functools.partial(machine.examine_disks, config),
        }
    return _summarize(_run_groups(groups, _TIMEOUT_SECONDS, on_group))


def _summarize(findings: list[Finding]) -> Examination:
    count = [finding.status for finding in findings].count
    return Examination(ok=count(OK), warn=count(WARN), fail=count(FAIL), findings=findings)


def _run_groups(
    groups: dict[str, _Check],
    seconds: float,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Return the findings of all groups; one that exceeds its timeout fails."""
    with ThreadPoolExecutor(len(groups)) as pool:
        answers = [pool.submit(_run_group, name, groups[name], seconds) for name in groups]
        on_group(0, len(groups))
        for done, _ in enumerate(as_completed(answers), 1):
            on_group(done, len(groups))
        return [finding for answer in answers for finding in answer.result()]


def _run_group(name: str, check: _Check, seconds: float) -> list[Finding]:
    with ChildProcess(_call_check, seconds=seconds, may_have_children=True) as process:
        try:
            return process(check)
        except HungError:
            advice = "see what it waits for: a dead mount, a driver, a network that drops packets"
            return [fail(name, f"timeout after {seconds:g} s", advice)]
        except CrashedError as error:
            return [fail(name, f"the check died: {error}", "see what it wrote to standard error")]
        except Exception as error:  # an unexpected exception is a finding, too
            found = f"{type(error).__name__}: {error}"
            return [fail(name, found, "the check did not expect this: see its message")]


def _call_check(check: _Check) -> list[Finding]:
    os.dup2(2, 1)  # libraries may print, but standard output belongs to the result
    return check()
