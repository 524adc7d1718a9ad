"""Messages between the driver and the ranks of a group by Ray Train, through a small actor.

The driver makes the actor, and every rank gets its handle. The driver reads log rows and the ends
of attempts from it. Rank 0 reads the driver's reason to stop, and the request of Ray Train's
controller to begin again with more ranks.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from svfap_dist.train import health
from svfap_dist.train.context import RunContext
from svfap_dist.train.stalls import StallError

SECONDS_BETWEEN_POLLS = 0.5


class Board:
    """Mailbox between driver and ranks, in an actor of its own: log rows and named values.

    Args:
        context: The run's, for the first attempt; None: rank 0 reads it.
    """

    def __init__(self, context: RunContext | None) -> None:
        self._rows: list[dict[str, Any]] = []
        self._values: dict[str, Any] = {"context": context}
        self._attempts = 0
        self._resize = ""  # reason for this attempt to end
        self._failures: dict[tuple[int, str], int] = {}  # attempt of the first one
        self._last_row_time = self._failure_time = 0.0  # of the first failure after that row
        self._nodes: set[str] = set()  # whose standby processes are taken care of

    def post(self, row: dict[str, Any]) -> None:
        """Append a log row.

        Args:
            row: Of metrics, from rank 0.
        """
        self._rows.append(row)
        self._last_row_time, self._failure_time = time.time(), 0.0

    def put(self, name: str, value: Any) -> None:
        """Store a value; only addresses and stalls replace an earlier one: the first error counts.

        A stall is of the attempt that runs; `begin` removes it.

        Args:
            name: "addresses", "fatal", "result", "stall" or "stop_reason".
            value: Any that can be pickled.
        """
        if name in ("addresses", "stall") or name not in self._values:
            self._values[name] = value

    def get(self, name: str) -> Any:
        """Return a value, None where there is none.

        Args:
            name: Name of the value, from `put`.
        """
        return self._values.get(name)

    def begin(self) -> RunContext | None:
        """Count an attempt; return the driver's context, which is out of date after the first."""
        self._attempts += 1
        self._resize = ""
        self._values.pop("stall", None)  # of the attempt before
        return self._values.pop("context", None)

    def notice_failure(self, found: str = "") -> None:
        """Store that the controller has noticed that ranks failed, and when.

        Args:
            found: The failure, for the driver's log; "": none that a user needs to know.
        """
        self._failure_time = self._failure_time or time.time()
        if found:
            self._values.setdefault("failures", []).append(found)

    def since_failure(self) -> dict[str, float]:
        """Return the seconds from the last row to the notice, and from there until now."""
        if not (self._failure_time and self._last_row_time):
            return {}
        noticed = self._failure_time - self._last_row_time
        return {"noticed": noticed, "group": time.time() - self._failure_time}

    def claim_nodes(self, nodes: Iterable[str]) -> list[str]:
        """Return those of the nodes that no earlier call named: the caller starts their standbys.

        Args:
            nodes: Ids of nodes.
        """
        new = [node for node in nodes if node not in self._nodes]
        self._nodes.update(new)
        return new

    def request_resize(self, reason: str) -> None:
        """Ask the ranks of this attempt to save and end, so that the group can have another size.

        Args:
            reason: Stop reason of the attempt.
        """
        self._resize = reason

    def stop_reason(self) -> str:
        """Return the driver's reason to stop the run, or one to end this attempt, or ""."""
        return self._values.get("stop_reason") or self._resize

    def fail(self, step: int, found: str) -> None:
        """Store a rank's failure; one that an earlier attempt had at the same step is fatal.

        Args:
            step: Completed optimizer steps.
            found: What `health.failure_of` returned.
        """
        if self._failures.setdefault((step, found), self._attempts) != self._attempts:
            self.put("fatal", health.fails_again(step, found))

    def read(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the new log rows, and all values but the context."""
        rows, self._rows = self._rows, []
        return rows, {name: v for name, v in self._values.items() if name != "context"}


def start_board(context: RunContext | None) -> Any:
    """Start the actor on this node, and return its handle: no other node's loss may end the run.

    Args:
        context: See `Board`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote(context)


def report_failure(board: Any, step: int, error: Exception) -> None:
    """Report a rank's stall, or a failure of its own (`health.failure_of`), to the board.

    Args:
        board: Handle of the actor.
        step: Completed optimizer steps.
        error: The error that ends the rank.
    """
    import ray

    if isinstance(error, StallError):  # names the rank, which Ray's error does not
        ray.get(board.put.remote("stall", error))
    if failure := health.failure_of(error):
        ray.get(board.fail.remote(step, failure))


@contextlib.contextmanager
def watched_stop_reason(board: Any) -> Iterator[Callable[[], str]]:
    """Yield a function that returns the board's reason to stop, "" without one.

    A thread polls the board, so that no step waits for it.

    Args:
        board: Handle of the actor.
    """
    import ray
    from ray.exceptions import RayError

    done = threading.Event()
    found: list[str] = []

    def poll() -> None:
        while not done.wait(SECONDS_BETWEEN_POLLS) and not found:
            with contextlib.suppress(RayError):  # a call may fail, the next succeed
                if reason := str(ray.get(board.stop_reason.remote())):
                    found.append(reason)

    thread = threading.Thread(target=poll, name="watch-for-stop", daemon=True)
    thread.start()
    try:
        yield lambda: found[0] if found else ""
    finally:
        done.set()
        thread.join()
