"""A run's writes, killed at every one of them: `python tests/checkpoint/killed_runs.py FOLDER`.

A run of one rank writes its journal, its ledger and its checkpoints into a folder, without
training. It is killed (SIGKILL, its own process) just before each operation on files in turn:
opening for writing, renaming, removing. After each kill everything that a reader would believe is
checked, and the run is resumed to its end and checked again. Then one run is killed at random
moments, from a seed. A table says how many kills hit which phase.

Processes are forked from this one, which starts no thread, so that each has its imports already.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from svfap_dist import text_table
from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.saver import Checkpointer, RunOwnership
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config, recipe
from svfap_dist.distributed import World
from svfap_dist.model import weights
from svfap_dist.telemetry import journal
from svfap_dist.train.objective import build_objective

ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1)
STEPS, SAVE_EVERY, LANES = 6, 2, 2
RANDOM_KILLS, LONGEST_SECONDS = 30, 0.4
_WRITES = os.O_WRONLY | os.O_RDWR
_PHASES = (  # the first that matches the kind of an operation and its path
    ("folders removed", r"os\.(remove|rmdir) "),
    ("commit marker", r".*/checkpoints/[^/]*/\.?COMMIT"),
    ("list of files", r".*/checkpoints/[^/]*/\.?files\.json"),
    ("markers of ranks", r".*/checkpoints/[^/]*/ranks"),
    ("files of a checkpoint", r".*/checkpoints/"),
    ("ledger", r".*/ledger/"),
    ("journal", r".*/\.?(events|metrics|quarantine|config)\."),
    ("owner", r".*/\.?OWNER"),
    ("local copy", r".*/local"),
)


class Engine:
    """Writes a shard and returns weights that are the number of the step."""

    parameter_names = ("weight",)

    def __init__(self, config: Config, step: int) -> None:
        self.objective, self._step = build_objective(config), step

    def save(self, folder: str, tag: str) -> None:
        """Write this rank's shard."""
        path = Path(folder, tag)
        path.mkdir()
        (path / "shard-of-rank-0.pt").write_bytes(b"state of step %d" % self._step)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return {"weight": torch.full((4,), float(self._step))}


def a_config(run: Path) -> Config:
    """Return the recipe of the run."""
    tables = {"run": {"url": str(run), "ledger": True}, "train": {"keep_last": 2}}
    return recipe.from_tables(tables, where="test")


def write(folder: Path) -> None:
    """Resume the run and write until its last step, as `train.loop` does."""
    run = folder / "run"
    config = a_config(run)
    step = store.latest_committed(str(run)) or 0
    RunOwnership(str(run), ALONE)
    attempt = journal.read_history(str(run)).attempts + 1
    with (
        journal.Journal(config, 0, attempt, step) as files,
        Checkpointer(config, ALONE, files.sync) as checkpointer,
    ):
        begins = {"step": step, "manifest_fingerprint": "m"}
        files.write_event("resume" if step else "start", attempt=attempt, **begins)
        while step < STEPS:
            step += 1
            samples = [
                {"epoch": 0, "lane": lane, "key": key_of(step, lane)} for lane in range(LANES)
            ]
            files.write_ledger(journal.encode_lines({"step": step, **each} for each in samples))
            files.write_line(journal.METRICS_FILE, {"step": step, "loss": float(step)})
            if step % SAVE_EVERY == 0:
                engine: Any = Engine(config, step)
                checkpointer.save(engine, TrainState.of_run(config, step, STEPS, "m", 1))
                outcome = checkpointer.finish_upload()
                assert outcome is not None
                assert not outcome.error, outcome
                files.write_event("checkpoint", step=step)
                (folder / "acknowledged").write_text(str(step))  # after all that the run writes
        files.write_event("stop", step=step, reason="finished")


def key_of(step: int, lane: int) -> str:
    """Return the key of the sample of a step."""
    return f"{step}-{lane}"


def check(folder: Path, is_finished: bool) -> None:
    """Check what readers believe of the run; raise where it is half-written or lost."""
    url = str(folder / "run")
    acknowledged = folder / "acknowledged"
    safe = int(acknowledged.read_text() or 0) if acknowledged.exists() else 0
    newest = store.latest_committed(url) or 0
    assert newest >= safe, f"checkpoint {safe} was acknowledged, {newest} is the newest"
    for step in store.committed_steps(url):
        store.verify(url, step)
        assert store.read_state(url, step).step == step
        _, found = weights.load(f"{store.checkpoint_url(url, step)}/{store.WEIGHTS}")
        assert torch.equal(found["weight"], torch.full((4,), float(step)))
    events = list(journal.read_events(url))
    attempts = [event["attempt"] for event in events if "attempt" in event]
    assert attempts == sorted(set(attempts)), attempts
    if is_finished:
        check_finished(folder, newest)


def check_finished(folder: Path, newest: int) -> None:
    """Check that each sample of each step counts once, and that metrics have each step once."""
    url = str(folder / "run")
    assert newest == STEPS
    attempts = journal.read_attempts(url)
    root = folder / "run/ledger"
    sizes = {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*.jsonl")}
    used: collections.Counter[tuple[int, str]] = collections.Counter()
    for number, attempt in enumerate(attempts):
        last = min([later.step for later in attempts[number + 1 :]], default=STEPS)
        for ledger in journal.read_ledgers(url, attempt.number, sizes):
            used.update((line["step"], line["key"]) for line in ledger.take(last))
    wanted = [(step, key_of(step, lane)) for step in range(1, STEPS + 1) for lane in range(LANES)]
    assert used == collections.Counter(wanted), used - collections.Counter(wanted)
    metrics = (folder / "run" / journal.METRICS_FILE).read_text()
    steps = [json.loads(line)["step"] for line in metrics.splitlines()]
    assert steps == list(range(1, STEPS + 1)), steps


def in_this_process(action: Callable[[], None]) -> int:
    """Run an action, and return the exit code of the process."""
    try:
        action()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a forked process and return how it ended, as `os.waitstatus_to_exitcode`."""
    child = os.fork()
    if child == 0:
        os._exit(in_this_process(action))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(folder: Path, number: int) -> None:
    """Kill this process just before its operation of that number on files of the folder."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        path = str(arguments[1] if event == "os.rename" else arguments[0])
        if path.startswith("/") and not path.startswith(str(folder)):
            return
        left[0] -= 1
        if left[0] == 0:
            os.write(_REPORT[0], f"{event} {path}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


_REPORT = [2]  # descriptor that a killed process writes its last operation to


def phase_of(operation: str) -> str:
    """Return the phase of an operation: its kind and path."""
    return next((name for name, pattern in _PHASES if re.match(pattern, operation)), "other")


def kill_everywhere(root: Path) -> collections.Counter[str]:
    """Kill a run before each of its operations; return the kills by phase."""
    kills: collections.Counter[str] = collections.Counter()
    number = 0
    while True:
        number += 1
        folder = new_folder(root, f"kill-{number}")
        with tempfile.TemporaryFile() as report:
            _REPORT[0] = report.fileno()

            def attempt(folder: Path = folder, number: int = number) -> None:
                kill_at(folder, number)
                write(folder)

            code = in_child(attempt)
            report.seek(0)
            operation = report.read().decode().strip()
        if code == 0:  # the run has fewer operations
            return kills
        assert code == -signal.SIGKILL, f"kill {number}: the run ended with {code}"
        kills[phase_of(operation)] += 1
        for is_finished in (False, True):
            if is_finished:
                assert in_child(functools.partial(write, folder)) == 0, operation
            try:
                check(folder, is_finished)
            except Exception as error:
                raise AssertionError(f"killed before: {operation}") from error
        shutil.rmtree(folder)


def kill_at_random(root: Path, seed: int) -> int:
    """Kill runs at random moments, each until it has ended; return the number of kills."""
    chance, kills, number = random.Random(seed), 0, 0
    folder = new_folder(root, "random-0")
    while kills < RANDOM_KILLS:
        child = os.fork()
        if child == 0:
            os._exit(in_this_process(functools.partial(write, folder)))
        time.sleep(chance.random() * LONGEST_SECONDS)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
        check(folder, is_finished=code == 0)
        if code == 0:
            number += 1
            folder = new_folder(root, f"random-{number}")
    return kills


def new_folder(root: Path, name: str) -> Path:
    """Return a new folder for a run and its local copies."""
    folder = root / name
    (folder / "local").mkdir(parents=True)
    tempfile.tempdir = str(folder / "local")
    return folder


def main(root: Path) -> None:
    """Kill, check, and print how many kills hit which phase."""
    torch.set_num_threads(1)
    kills = kill_everywhere(root)
    kills["at random moments"] = kill_at_random(root, seed=1)
    rows = [(name, str(count)) for name, count in kills.most_common()]
    table = text_table.format_table([*rows, ("all", str(kills.total()))], ("killed in", "kills"))
    print(*table, sep="\n")
    assert kills.total() >= 100


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
