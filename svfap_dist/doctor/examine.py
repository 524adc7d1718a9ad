"""`svfap doctor`: will a run start here, and if not, what is to be done.

In: a recipe, or none. Out: an `Examination`, a `Finding` for everything looked at. Each group of
checks runs in a process of its own with a limit of time, all at once: a store that never answers or
a driver that hangs costs its own finding, not the others. Nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from svfap_dist.config import Config
from svfap_dist.doctor import cluster, disk, gpu, machine, store
from svfap_dist.doctor.finding import FAIL, OK, WARN, Finding, fail
from svfap_dist.parallel.child import ChildProcess, CrashedError, HungError

EXIT_CODE = 9  # of `svfap doctor`, if something fails
SECONDS = 90.0  # that a group of checks may take

Check = Callable[[], list[Finding]]


@dataclasses.dataclass(frozen=True)
class Examination:
    """All findings, in the order of the checks."""

    ok: int
    warn: int
    fail: int
    findings: list[Finding]

    def lines(self) -> list[str]:
        """For people."""
        width = max(len(finding.name) for finding in self.findings)
        text = []
        for finding in self.findings:
            text.append(f"{finding.status:4}  {finding.name:{width}}  {finding.found}")
            if finding.do:
                text.append(f"{'':4}  {'':{width}}  Do: {finding.do}")
        return [*text, f"{self.ok} ok, {self.warn} to look at, {self.fail} failed."]


def run(
    config: Config | None, on_group: Callable[[int, int], None] = lambda done, total: None
) -> Examination:
    """Look at this machine, the recipe's stores and the cluster.

    Args:
        on_group: told how many groups of checks are done, of how many.
    """
    groups: dict[str, Check] = {
        "this machine": functools.partial(machine.examine, config),
        "GPU": functools.partial(gpu.examine, config),
        "Ray cluster": functools.partial(cluster.examine, config),
    }
    if config is not None:
        groups |= {
            "run.url": functools.partial(store.examine_run, config),
            "data.url": functools.partial(store.examine_data, config),
            "disk": functools.partial(disk.examine, config),
        }
    return summed_up(look(groups, SECONDS, on_group))


def look(
    groups: dict[str, Check],
    seconds: float,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """The findings of all groups; one that gives no answer in so many seconds fails."""
    with ThreadPoolExecutor(len(groups)) as pool:
        answers = [pool.submit(_isolated, name, groups[name], seconds) for name in groups]
        on_group(0, len(groups))
        for done, _ in enumerate(as_completed(answers), 1):
            on_group(done, len(groups))
        return [finding for answer in answers for finding in answer.result()]


def _isolated(name: str, check: Check, seconds: float) -> list[Finding]:
    with ChildProcess(_call, seconds=seconds, may_have_children=True) as process:
        try:
            return process(check)
        except HungError:
            advice = "see what it waits for: a dead mount, a driver, a network that drops packets"
            return [fail(name, f"no answer after {seconds:g} s", advice)]
        except CrashedError as error:
            return [fail(name, f"the check died: {error}", "see what it wrote to standard error")]
        except Exception as error:  # whatever a check did not expect is a finding, too
            found = f"{type(error).__name__}: {error}"
            return [fail(name, found, "the check did not expect this: see its message")]


def _call(check: Check) -> list[Finding]:
    os.dup2(2, 1)  # libraries may print, but standard output belongs to the result
    return check()


def summed_up(findings: list[Finding]) -> Examination:
    """The findings, counted."""
    count = [finding.status for finding in findings].count
    return Examination(ok=count(OK), warn=count(WARN), fail=count(FAIL), findings=findings)
