"""The faults of the suite, one function each, and the row that each gives.

A fault happens at a step that is drawn from the seed. A run that must reach its end is audited, its
checkpoints are read, and where that is promised its losses are compared bit for bit with those of
an undisturbed run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import re
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

from chaos_cluster import ChaosCluster
from observed_run import CHECKPOINT_EVERY, STEPS, ObservedRun, Recovery

from svfap_dist.telemetry.journal import EVENTS_FILE

_FIRST, _LAST = CHECKPOINT_EVERY + 5, STEPS // 2  # steps at which a fault may happen
NOT_PROMISED = "not promised"
AS_EXPECTED = "as expected"
_STORE_DOWN_SECONDS = 30.0
_CLOCK_JUMP_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    losses: "equal" to the undisturbed run's, or why not. restarts: as `judge_restarts`.
    """

    fault: str
    recovery: Recovery
    samples: int
    lost: int
    duplicated: int
    losses: str
    restarts: str
    note: str = ""

    @property
    def is_good(self) -> bool:
        losses_are_good = self.losses in ("equal", NOT_PROMISED)
        restarts_are_good = self.restarts == AS_EXPECTED
        return not (self.lost or self.duplicated) and losses_are_good and restarts_are_good


class Stage:
    """What the faults have in common: the cluster and the undisturbed run."""

    def __init__(self, cluster: ChaosCluster) -> None:
        self.cluster = cluster

    def random(self, fault: str) -> random.Random:
        """Draws for a fault, the same ones whichever others run."""
        return random.Random(zlib.crc32(f"{self.cluster.seed} {fault}".encode()))

    @functools.cached_property
    def undisturbed_losses(self) -> dict[int, float]:
        with self.running("undisturbed") as run:
            run.finish()
            return run.losses()

    @contextlib.contextmanager
    def running(self, name: str, *overrides: str, data: str = "") -> Iterator[ObservedRun]:
        """A started run, whose driver ends with the block."""
        self.cluster.repair()
        run = ObservedRun(self.cluster, name, *overrides, data=data)
        run.start()
        try:
            yield run
        finally:
            run.end()

    def row(
        self,
        run: ObservedRun,
        fault: str,
        times: Sequence[float],
        *,
        must_restart: bool | None,
        same_losses: bool = True,
        note: str = "",
        steps: int = STEPS,
    ) -> Row:
        """Judge a run that has ended, disturbed at these times."""
        audit = run.audit()
        assert run.check_checkpoints() >= steps
        recoveries = run.recoveries(times)
        return Row(
            fault=fault,
            recovery=worst(recoveries),
            samples=audit.samples,
            lost=audit.lost + audit.misplaced,
            duplicated=audit.duplicated,
            losses=self._compare(run) if same_losses else NOT_PROMISED,
            restarts=judge_restarts(recoveries, must_restart),
            note=note,
        )

    def _compare(self, run: ObservedRun) -> str:
        expected, found = self.undisturbed_losses, run.losses()
        for step in range(1, STEPS + 1):
            if found.get(step) != expected[step]:
                return f"differ at step {step}: {found.get(step)}, not {expected[step]}"
        return "equal"


def _disturbed(
    stage: Stage,
    fault: str,
    act: Callable[[ObservedRun, random.Random], str | None],
    *overrides: str,
    must_restart: bool | None,
) -> Row:
    """Run to the end with a fault at a random step; `act` may return a note."""
    stage.undisturbed_losses  # noqa: B018 - computed while all hosts are up
    draws = stage.random(fault)
    with stage.running(fault, *overrides) as run:
        run.wait_for_step(draws.randrange(_FIRST, _LAST))
        run.wait_for_checkpoint()
        began = time.time()
        note = act(run, draws)
        run.finish()
        return stage.row(run, fault, [began], must_restart=must_restart, note=note or "")


def kill_rank(stage: Stage) -> Row:
    """A rank dies by SIGKILL."""

    def act(run: ObservedRun, draws: random.Random) -> None:
        run.kill_rank(draws.randrange(2))

    return _disturbed(stage, "rank-killed", act, must_restart=True)


def stop_rank(stage: Stage) -> Row:
    """A rank stops without dying."""

    def act(run: ObservedRun, draws: random.Random) -> None:
        run.signal(run.ranks()[draws.randrange(2)], "STOP")

    return _disturbed(stage, "rank-stopped", act, "train.stall_seconds=15", must_restart=True)


def cut_off_host(stage: Stage) -> Row:
    """The network of a rank's host fails, and comes back after the run."""
    hosts, cut = stage.cluster.hosts, []

    def act(run: ObservedRun, draws: random.Random) -> None:
        cut.append(run.ranks()[draws.randrange(2)]["host"])
        hosts.cut_off(cut[0])

    try:
        return _disturbed(stage, "host-cut-off", act, must_restart=True)
    finally:
        for host in cut:
            stage.cluster.reboot(host)


def cut_power(stage: Stage) -> Row:
    """A rank's host loses power; the group continues on the others."""
    cut = []

    def act(run: ObservedRun, draws: random.Random) -> None:
        cut.append(run.ranks()[draws.randrange(2)]["host"])
        stage.cluster.hosts.power_cut(cut[0])

    try:
        return _disturbed(stage, "host-power-cut", act, must_restart=True)
    finally:
        for host in cut:
            stage.cluster.boot(host)


def kill_head(stage: Stage) -> Row:
    """The head loses power, the driver with it; hosts are restarted, the run is resubmitted."""

    def act(run: ObservedRun, draws: random.Random) -> str:
        cluster = stage.cluster
        run.events()
        cluster.hosts.power_cut(cluster.hosts.head)
        for host in cluster.workers:
            cluster.hosts.power_cut(host)
        for host in cluster.hosts.hosts:
            cluster.boot(host)
        run.wait_for_end()
        run.start()
        return "resubmitted after the hosts' restart"

    return _disturbed(stage, "head-killed", act, must_restart=True)


def kill_driver(stage: Stage) -> Row:
    """The driver dies by SIGKILL; the run is resubmitted."""

    def act(run: ObservedRun, draws: random.Random) -> str:
        run.signal_driver(signal.SIGKILL)
        run.wait_for_end()
        run.start()
        return "resubmitted at once"

    return _disturbed(stage, "driver-killed", act, must_restart=True)


def pause_store(stage: Stage) -> Row:
    """The store does not answer for 30 s."""

    def act(run: ObservedRun, draws: random.Random) -> None:
        with _store_down(stage.cluster):
            run.watch(_STORE_DOWN_SECONDS)

    # Requests may or may not be repeated for as long.
    return _disturbed(stage, "store-down-30s", act, must_restart=None)


def lose_store(stage: Stage) -> Row:
    """The store does not answer until the run has ended; it is resubmitted afterwards."""

    def act(run: ObservedRun, draws: random.Random) -> str:
        began = time.time()
        with _store_down(stage.cluster):
            code = run.wait_for_end()
        after = time.time() - began
        last = run.log.strip().splitlines()[-1]
        assert code > 0, f"exit code {code} without a store: {last}"
        run.check_checkpoints()
        run.start()
        return f"ended after {after:.0f} s with code {code}: {last}"

    failures = "cluster.max_failures=2"
    return _disturbed(stage, "store-down-for-ever", act, failures, must_restart=True)


@contextlib.contextmanager
def _store_down(cluster: ChaosCluster) -> Iterator[None]:
    cluster.ceph.kill_gateway()
    try:
        yield
    finally:
        cluster.ceph.start_gateway()


def fail_requests(stage: Stage) -> Row:
    """A fifth of all requests to the store fail: 503, 500, resets, cut bodies, stalls."""
    proxy, fault = stage.cluster.proxy, "storage-faults"
    stage.undisturbed_losses  # noqa: B018 - computed without faults
    proxy.injected.clear()
    proxy.fault_share = 0.2
    try:
        with stage.running(fault) as run:
            _wait_for_first_step(run)
            began = time.time()
            run.finish()
    finally:
        proxy.fault_share = 0.0
    injected = ", ".join(f"{count} {kind}" for kind, count in sorted(proxy.injected.items()))
    # A request may fail more often than it is repeated.
    return stage.row(run, fault, [began], must_restart=None, note=injected)


def _wait_for_first_step(run: ObservedRun, starts: int = 3) -> None:
    """Wait for step 1; a request that failed too often before it ends a run, which is run again."""
    for more in reversed(range(starts)):
        try:
            run.wait_for_step(1)
            return
        except AssertionError:
            if not more or "run the same command again" not in run.log:
                raise
            run.start()


def spoil_samples(stage: Stage) -> Row:
    """5 % of the videos are broken."""
    fault = "bad-samples"
    with stage.running(fault, "data.max_bad_fraction=0.1", data=stage.cluster.spoilt_shards) as run:
        run.wait_for_step(1)
        began = time.time()
        run.finish()
        bad = len({line["key"] for line in run.stored_lines("quarantine.jsonl")})
        note = f"{bad} videos in quarantine, {run.audit().substituted} uses substituted"
        return stage.row(run, fault, [began], must_restart=False, same_losses=False, note=note)


def fill_disk(stage: Stage) -> Row:
    """The disk for temporary files of a rank's host is full; it is freed after the run's end."""

    def act(run: ObservedRun, draws: random.Random) -> str:
        host = run.ranks()[draws.randrange(2)]["host"]
        filler = stage.cluster.disk(host) / "filler"
        # Unbuffered: closing the file would write what is left, and fail.
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        code = run.wait_for_end()
        filler.unlink()
        if code == 0:  # restarted, and not on this host again
            return "continued on other hosts"
        run.check_checkpoints()
        last = run.log.strip().splitlines()[-1]
        run.start()
        return f"ended with code {code}: {last}"

    return _disturbed(stage, "disk-full", act, must_restart=True)


def jump_clock(stage: Stage) -> Row:
    """Python's clock on rank 0's host jumps ten minutes ahead, and back after some steps."""
    fault = "clock-jump"
    clock = stage.cluster.plan.with_suffix(".json.clock")
    with stage.running(fault) as run:
        run.wait_for_step(stage.random(fault).randrange(_FIRST, _LAST))
        host, began = run.ranks()[0]["host"], run.step()
        clock.write_text(f"{host} {_CLOCK_JUMP_SECONDS}")
        try:
            run.wait_until(lambda: run.step() >= began + CHECKPOINT_EVERY, "further steps")
        finally:
            clock.unlink()
        run.finish()
        ahead = max(line["time"] for line in run.events()) - time.time()
        assert ahead > _CLOCK_JUMP_SECONDS / 2, "no event has a time of the wrong clock"
        note = f"{_CLOCK_JUMP_SECONDS} s ahead for {CHECKPOINT_EVERY} steps, and back"
        # Times of events are wrong, so a restart is looked for among all of them.
        assert not [line for line in run.stored_lines(EVENTS_FILE) if line["event"] == "resume"]
        times = [time.time() + _CLOCK_JUMP_SECONDS]
        return stage.row(run, fault, times, must_restart=False, note=note)


def skip_update(stage: Stage) -> Row:
    """The loss of one step is NaN: its update is left out."""
    return _not_finite(stage, "not-finite-once", 1, "skip")


def roll_back(stage: Stage) -> Row:
    """The losses of three steps in a row are NaN: the run passes over them from a checkpoint."""
    return _not_finite(stage, "not-finite-thrice", 3, "rollback")


def _not_finite(stage: Stage, fault: str, count: int, event: str) -> Row:
    first = stage.random(fault).randrange(_FIRST, _LAST)
    steps = [*range(first, first + count)]
    stage.cluster.plant({"not_finite": steps})
    try:
        with stage.running(fault, "health.max_skipped=2") as run:
            run.wait_for_step(first - 1)
            began = time.time()
            run.finish()
            found = [line for line in run.stored_lines(EVENTS_FILE) if line["event"] == event]
            assert found, f"no event {event}"
            note = f"steps {steps}, {len(found)} event {event}"
            must = event == "rollback"
            return stage.row(run, fault, [began], must_restart=must, same_losses=False, note=note)
    finally:
        stage.cluster.plant({})


def never_finite(stage: Stage) -> Row:
    """All losses are NaN from a step on: the run ends, and is resubmitted without them."""
    first = stage.random("not-finite-always").randrange(_FIRST, _LAST)
    return _ended(stage, "not-finite-always", {"not_finite_from": first}, same_losses=False)


def exhaust_memory(stage: Stage) -> Row:
    """A rank's memory is exhausted at every try of a step: the run ends at once."""
    first = stage.random("out-of-memory").randrange(_FIRST, _LAST)
    return _ended(stage, "out-of-memory", {"out_of_memory_from": first}, most_attempts=1)


def _ended(
    stage: Stage,
    fault: str,
    plan: dict[str, object],
    same_losses: bool = True,
    most_attempts: int = STEPS,
) -> Row:
    """A fault that ends the run with advice; the same command continues without it."""
    stage.cluster.plant(plan)
    try:
        with stage.running(fault) as run:
            code = run.wait_for_end()
            attempts = sum(line["event"] in ("start", "resume") for line in run.events())
            last = run.log.strip().splitlines()[-1]
            assert code > 0, f"exit code {code}: {last}"
            assert attempts <= most_attempts, f"ended in attempt {attempts}: {last}"
            began = time.time()
            stage.cluster.plant({})
            run.start()
            run.finish()
            note = f"ended in attempt {attempts} with code {code}: {last}"
            return stage.row(
                run, fault, [began], must_restart=True, same_losses=same_losses, note=note
            )
    finally:
        stage.cluster.plant({})


def resize(stage: Stage) -> Row:
    """One of three hosts loses power, and comes back: the group shrinks, and grows again."""
    cluster, fault = stage.cluster, "three-two-three"
    draws = stage.random(fault)
    sizes = ("cluster.num_workers=3", "cluster.min_workers=2", "data.num_lanes=6")
    batch = ("train.global_batch_size=12", "train.micro_batch_size=2", "train.max_steps=100000")
    with stage.running(fault, *sizes, *batch) as run:
        run.wait_for_step(draws.randrange(_FIRST, _LAST))
        host = run.ranks()[draws.randrange(3)]["host"]
        times = [time.time()]
        cluster.hosts.power_cut(host)
        run.wait_until(lambda: len(run.ranks()) == 2, "a group of two")
        run.wait_until(lambda: run.recoveries(times)[-1].restored, "recovery")
        times.append(time.time())
        cluster.boot(host)
        run.wait_until(lambda: len(run.ranks()) == 3, "a group of three")
        run.wait_until(lambda: run.recoveries(times)[-1].restored, "recovery")
        run.stop()
        cost = ", ".join(f"{each.restored:.1f}" for each in run.recoveries(times))
        note = f"restored after {cost} s"
        return stage.row(
            run, fault, times, must_restart=True, same_losses=False, note=note, steps=1
        )


# Requests of a checkpoint, in order, at which a rank is killed: rank, when, method, path.
_SAVE_PHASES = (
    (0, "before", "GET", r"list-type=2.*checkpoints%2Fstep-"),
    (1, "after", "PUT", r"zero_pp_rank_1_.*optim_states.pt"),
    (0, "before", "PUT", r"model.safetensors"),
    (0, "after", "PUT", r"state.json"),
    (1, "before", "PUT", r"ledger/.*rank-0001.jsonl"),
    (0, "before", "PUT", r"events.jsonl"),
    (1, "before", "PUT", r"ranks/rank-00001.*json"),
    (0, "before", "PUT", r"files.json"),
    (0, "before", "PUT", r"COMMIT"),
    (0, "after", "PUT", r"COMMIT"),
    (0, "before", "POST", r"\?delete"),  # of an old one's marker
    (0, "after", "POST", r"\?delete"),
)


def kill_while_saving(stage: Stage) -> Row:
    """A rank dies in every phase of a checkpoint, one after another in one run."""
    proxy, fault, times = stage.cluster.proxy, "killed-while-saving", []
    before = proxy.on_request
    overrides = ("cluster.max_failures=-1", f"train.checkpoint_every={CHECKPOINT_EVERY // 2}")
    with stage.running(fault, *overrides) as run, contextlib.ExitStack() as stack:
        stack.callback(lambda: setattr(proxy, "on_request", before))
        for rank, when, method, path in _SAVE_PHASES:
            run.wait_for_step(1)
            trap = _Trap(when, method, path, functools.partial(run.signal, run.ranks()[rank]))
            proxy.on_request = trap.sees
            run.wait_until(trap.sprung.is_set, f"{when} {method} {path}")
            times.append(trap.time)
            run.wait_until(lambda: run.recoveries(times)[-1].restored, "recovery")
        run.finish()
        note = f"{len(times)} kills in one run; the worst, and all redone steps"
        return stage.row(run, fault, times, must_restart=True, note=note)


class _Trap:
    """Kills a process at the first request of a kind; `time` is when."""

    def __init__(self, when: str, method: str, path: str, kill: Callable[[], None]) -> None:
        self._expected, self._path, self._kill = (when, method), re.compile(path), kill
        self._lock, self.sprung = threading.Lock(), threading.Event()
        self.time = 0.0

    def sees(self, when: str, method: str, path: str) -> bool:
        """See `StoreProxy.on_request`."""
        if (when, method) != self._expected or not self._path.search(path):
            return False
        with self._lock:
            if self.sprung.is_set():
                return False
            self.time = time.time()
            self._kill()
            self.sprung.set()
        return True


def judge_restarts(recoveries: Sequence[Recovery], must_restart: bool | None) -> str:
    """Compare the restarts after each fault of a run with what must have happened.

    Args:
        recoveries: What each fault cost.
        must_restart: True: the group restarted after each; False: after none; None: either.
    """
    restarted = sum(each.restored is not None for each in recoveries)
    expected = {True: len(recoveries), False: 0, None: restarted}[must_restart]
    return AS_EXPECTED if restarted == expected else f"{restarted} restarts, not {expected}"


def worst(recoveries: Sequence[Recovery]) -> Recovery:
    """The worst of each, and the sum of steps redone."""
    noticed = [each.noticed for each in recoveries if each.noticed is not None]
    restored = [each.restored for each in recoveries if each.restored is not None]
    return Recovery(
        max(noticed, default=None),
        max(restored, default=None),
        sum(each.redone for each in recoveries),
        max(each.pause for each in recoveries),
    )


FAULTS: dict[str, Callable[[Stage], Row]] = {
    "rank-killed": kill_rank,
    "host-cut-off": cut_off_host,
    "host-power-cut": cut_power,
    "head-killed": kill_head,
    "driver-killed": kill_driver,
    "rank-stopped": stop_rank,
    "store-down-30s": pause_store,
    "store-down-for-ever": lose_store,
    "storage-faults": fail_requests,
    "bad-samples": spoil_samples,
    "disk-full": fill_disk,
    "clock-jump": jump_clock,
    "not-finite-once": skip_update,
    "not-finite-thrice": roll_back,
    "not-finite-always": never_finite,
    "out-of-memory": exhaust_memory,
    "three-two-three": resize,
    "killed-while-saving": kill_while_saving,
}
