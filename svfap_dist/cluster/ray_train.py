"""Ranks by Ray Train: start the group, watch it, restart it after a failure, tell the person.

Ray Train places one process per worker, gives each the torch rendezvous variables, and restarts the
whole group when one dies (`cluster.max_failures` times). Each rank calls `train.loop.run`, the
same function that torchrun and srun start; resuming from the newest committed checkpoint is that
function's own affair, so no state passes through Ray.

Driver and ranks meet at a `Board`, a small actor: rank 0 posts what it logs, an error that no
restart can mend is posted so that the next attempt gives up at once, and the driver posts what
asked it to stop (Ctrl-C, a signal of Slurm or of Ray's job agent). When Ray will take a node away,
the ranks learn of it from Ray Train, save a checkpoint and go on until the group is restarted.
"""

from __future__ import annotations

import collections
import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Set
from typing import Any

from svfap_dist import logs, storage
from svfap_dist.allocator import ONE_ARENA
from svfap_dist.cluster.connection import check_resources, connected
from svfap_dist.config import Config, recipe
from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.telemetry.exporter import Discovery
from svfap_dist.train import loop
from svfap_dist.train.attempt import RunContext, RunResult
from svfap_dist.train.signals import catch_stop_signals

_SECONDS_BETWEEN_LOOKS = 0.5


class Board:
    """Mailbox between driver and ranks; runs in an actor of its own.

    Args:
        context: What the driver's preflight read.
    """

    def __init__(self, context: RunContext) -> None:
        self._context: RunContext | None = context
        self._rows: list[dict[str, Any]] = []
        self._fatal: SvfapError | None = None
        self._result: RunResult | None = None
        self._stop_reason = ""
        self._addresses: list[str] = []

    def take_context(self) -> RunContext | None:
        """Return the driver's context once; None after a restart, when it is out of date."""
        context, self._context = self._context, None
        return context

    def begin(self, addresses: list[str]) -> None:
        self._addresses = addresses

    def addresses(self) -> list[str]:
        return self._addresses

    def post(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def take_rows(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, []
        return rows

    def set_fatal(self, error: SvfapError) -> None:
        self._fatal = self._fatal or error

    def fatal(self) -> SvfapError | None:
        return self._fatal

    def set_result(self, result: RunResult) -> None:
        self._result = result

    def result(self) -> RunResult | None:
        return self._result

    def request_stop(self, reason: str) -> None:
        self._stop_reason = reason

    def stop_reason(self) -> str:
        return self._stop_reason


def train(
    config: Config,
    on_log: Callable[[dict[str, Any]], None],
    on_wait: Callable[[], None] = lambda: None,
    context: RunContext | None = None,
) -> RunResult:
    """Train on `config.cluster.num_workers` ranks and wait for the end.

    Uses the cluster of RAY_ADDRESS, or of the job this runs in, or else starts one on this machine.
    `on_log` gets rank 0's log rows; `on_wait` is called twice a second. The first Ctrl-C, SIGTERM
    or SIGUSR1 asks all ranks to save a checkpoint and stop, a second one leaves at once.
    `context` is what `loop.preflight` returned; None: it is called here.

    Raises: the rank's own SvfapError; ClusterError if the group could not be kept alive.
    """
    context = context or loop.preflight(config)
    # Ray has its own idea of SIGTERM, which it puts in place when it connects: ours comes after.
    with (
        connected(config.cluster),
        catch_stop_signals() as heard,
        Discovery(config.metrics, config.run.name) as discovery,
    ):
        import ray

        check_resources(config.cluster)
        board: Any = ray.remote(num_cpus=0)(Board).remote(context)
        outcome = _Fit(config, board)
        rows: collections.deque[dict[str, Any]] = collections.deque()  # not yet shown
        is_told = False
        while outcome.is_running():
            outcome.wait(_SECONDS_BETWEEN_LOOKS)
            on_wait()
            discovery.show(ray.get(board.addresses.remote()))
            rows.extend(ray.get(board.take_rows.remote()))
            while rows:
                on_log(rows.popleft())
            if ray.get(board.fatal.remote()) is not None:
                break  # no restart can help: leave, and let the restarted group end itself
            if heard() and not is_told:
                ray.get(board.request_stop.remote(heard()))
                is_told = True
        for row in [*rows, *ray.get(board.take_rows.remote())]:
            on_log(row)
        fatal: SvfapError | None = ray.get(board.fatal.remote())
        result: RunResult | None = ray.get(board.result.remote())
    storage.delete(_ray_folder(config.run.url))
    if fatal is not None:
        raise fatal
    if outcome.error is not None:
        raise _explained(outcome.error, config)
    assert result is not None, "all ranks returned but rank 0 posted no result"
    return result


class _Fit:
    """`TorchTrainer.fit` in a thread: in the main thread it would take Ctrl-C for itself."""

    def __init__(self, config: Config, board: Any) -> None:
        self.error: BaseException | None = None
        self._trainer = _trainer(config, board)
        self._thread = threading.Thread(target=self._run, name="ray-train-fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.error = self._trainer.fit().error
        except (Exception, SystemExit) as error:
            # Handed to the main thread, which explains it; Ray ends a fit whose cluster is shut
            # down by SystemExit.
            self.error = error

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)


def _trainer(config: Config, board: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.use_gpu else {})
    return TorchTrainer(
        _rank,
        train_loop_config={"config": config.model_dump(mode="json"), "board": board},
        torch_config=TorchConfig(
            backend="nccl" if cluster.use_gpu else "gloo",
            timeout_s=config.train.collective_timeout_seconds,
        ),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            # A name used before would make Ray Train take up that run's state.
            name=f"{config.run.name}-{uuid.uuid4().hex[:8]}",
            # Ranks on other nodes need the driver's way to the store; all train in a thread.
            worker_runtime_env={
                "env_vars": {
                    k: v for k, v in os.environ.items() if k.startswith(("AWS_", logs.VARIABLE))
                }
                | ONE_ARENA
            },
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            **_state_storage(config.run.url),
        ),
    )


def _state_storage(run_url: str) -> dict[str, Any]:
    """Where Ray Train keeps its own small state: below the run, which every node can reach."""
    fs, path = storage.filesystem(_ray_folder(run_url))
    if not storage.is_remote(run_url):
        return {"storage_path": path}
    import pyarrow.fs

    wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    return {"storage_path": path, "storage_filesystem": wrapped}


def _ray_folder(run_url: str) -> str:
    return storage.join(run_url, "ray")


def _rank(spec: dict[str, Any]) -> None:
    """What each worker runs."""
    import ray

    logs.set_up()

    board = spec["board"]
    fatal: SvfapError | None = ray.get(board.fatal.remote())
    if fatal is not None:  # an earlier attempt found out that no attempt can succeed
        return
    config = recipe.from_tables(spec["config"], where="the driver's recipe")
    is_main = os.environ["RANK"] == "0"
    watched = _stop_reason(board) if is_main else contextlib.nullcontext(lambda: "")
    try:
        with watched as stop_reason:
            result = loop.run(
                config,
                on_log=board.post.remote,
                on_begin=board.begin.remote,
                stop_requested=stop_reason,
                nodes_leaving=_nodes_leaving,
                context=ray.get(board.take_context.remote()) if is_main else None,
            )
    except SvfapError as error:
        if not error.retryable:
            ray.get(board.set_fatal.remote(error))
        raise
    if is_main:
        ray.get(board.set_result.remote(result))


def _nodes_leaving() -> Set[str]:
    """Ids of the group's nodes that Ray will take away; a barrier of all ranks."""
    from ray.train import get_preemption_info

    info = get_preemption_info()
    return frozenset(info.preempted_node_ids) if info is not None else frozenset()


@contextlib.contextmanager
def _stop_reason(board: Any) -> Iterator[Callable[[], str]]:
    """What asked the driver to stop, "" so far: a thread looks, so that no step waits for the
    answer."""
    import ray

    done = threading.Event()
    found: list[str] = []

    def look() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS) and not found:
            reason: str = ray.get(board.stop_reason.remote())
            if reason:
                found.append(reason)

    thread = threading.Thread(target=look, name="watch-for-stop", daemon=True)
    thread.start()
    try:
        yield lambda: found[0] if found else ""
    finally:
        done.set()
        thread.join()


def _explained(error: BaseException, config: Config) -> SvfapError:
    """The error of the rank that failed first, or one that says what Ray said."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, SvfapError):
            return cause
        error = failure if rank == min(failures) else error
    return ClusterError(
        f"Training group failed {config.cluster.max_failures + 1} times",
        where=config.run.url,
        found=str(error).strip().splitlines()[-1],
        do="look at events.jsonl of the run and Ray's logs, then run the same command again to "
        "resume from the newest checkpoint",
    )
