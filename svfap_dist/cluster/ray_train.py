"""Ranks by Ray Train: start the group, watch it, restart it after a failure, report progress.

Ray Train places one process per worker, sets the torch rendezvous variables, and restarts the whole
group when one dies (`cluster.max_failures` times). Each rank calls `train.loop.run`, as under
torchrun and srun; it resumes from the newest committed checkpoint, so no state passes through Ray.

Driver and ranks share a `Board`, a small actor. Rank 0 posts its log rows; a rank posts an error
that no restart can fix, so that the next attempt ends at once, as it does when a rank has failed
twice in the same way at the same step; the driver posts its reason to stop (Ctrl-C, a signal of
Slurm or of Ray's job agent). When Ray Train announces that a node will be preempted, the ranks save
a checkpoint and continue until the group is restarted. With `cluster.min_workers` they restart at
once without that node; see `elastic`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Set
from typing import Any

from svfap_dist import distributed, logs, storage
from svfap_dist.allocator import ONE_ARENA
from svfap_dist.cluster import standby
from svfap_dist.cluster.board import (
    SECONDS_BETWEEN_POLLS,
    report_failure,
    start_board,
    watched_stop_reason,
)
from svfap_dist.cluster.connection import check_resources, connected, with_device_of_cluster
from svfap_dist.config import ClusterConfig, Config, recipe
from svfap_dist.errors import ClusterError, SvfapError
from svfap_dist.parallel.ray_connection import inherited_variables
from svfap_dist.telemetry import restart
from svfap_dist.telemetry.exporter import Discovery
from svfap_dist.telemetry.goodput import NODES_LEAVING, RESIZE_REASONS
from svfap_dist.train import loop
from svfap_dist.train.attempt import RunResult
from svfap_dist.train.context import RunContext
from svfap_dist.train.signals import catch_stop_signals
from svfap_dist.train.stalls import StallError

log = logging.getLogger(__name__)
_FAILURE = (
    "A rank failed. If cluster.max_failures=%d allows it, the group restarts from the newest "
    "checkpoint. Failed: rank %s"
)
# Of Ray Train's controller, unless the environment has them.
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # between its looks at the ranks
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
}
# Until an elastic group whose nodes are not there after all is begun again with those that are.
_ELASTIC_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}


def train(
    config: Config,
    on_log: Callable[[dict[str, Any]], None],
    on_wait: Callable[[], None] = lambda: None,
    context: RunContext | None = None,
) -> RunResult:
    """Train on `config.cluster.num_workers` ranks and wait for the end.

    Uses the cluster of RAY_ADDRESS, or that of the job this runs in, or starts one on this machine.
    The first Ctrl-C, SIGTERM or SIGUSR1 makes all ranks save a checkpoint and stop; a second one
    ends the process at once.

    Args:
        config: The recipe.
        on_log: Called with rank 0's log rows.
        on_wait: Called twice a second.
        context: Result of `loop.preflight`; None: it is called here.

    Raises:
        SvfapError: The error of a rank.
        ClusterError: If the group keeps failing.
    """
    config = _with_absolute_paths(config)
    context = context or loop.preflight(config)
    # Ray installs its own handler of SIGTERM when it connects: ours must come after.
    with (
        connected(config.cluster),
        catch_stop_signals() as stop_reason,
        Discovery(config.metrics, config.run.name) as discovery,
    ):
        import ray

        config = with_device_of_cluster(config)
        check_resources(config.cluster)
        log.info("Starting %d ranks on Ray ...", config.cluster.num_workers)
        board = start_board(context)
        fit = _Fit(config, board)
        is_running, values, num_failures = True, {}, 0
        while is_running and "fatal" not in values:  # no restart can fix a fatal error
            is_running = fit.wait(SECONDS_BETWEEN_POLLS)
            on_wait()
            rows, values = ray.get(board.read.remote())
            discovery.show(values.get("addresses", []))
            for row in rows:
                on_log(row)
            for failure in values.get("failures", [])[num_failures:]:
                num_failures += 1
                log.warning(_FAILURE, config.cluster.max_failures, failure)
            if stop_reason():
                ray.get(board.put.remote("stop_reason", stop_reason()))
    storage.delete(_ray_folder(config.run.url))
    return _outcome(values, fit.error, config)


def _outcome(values: dict[str, Any], error: BaseException | None, config: Config) -> RunResult:
    """Return the result on the board, or raise what ended the run without one."""
    if "fatal" in values:
        raise values["fatal"]
    if "result" not in values and error is not None:
        raise _explained(error, config, values.get("stall"))
    if error is not None:
        log.warning(
            "A rank failed while it exited, after the run had ended; the result is valid: %s", error
        )
    return values["result"]


def _with_absolute_paths(config: Config) -> Config:
    """Return the recipe with absolute local paths: Ray Train's ranks run in another folder."""
    places = {
        "data": ("url", "eval_url", "cache_dir"),
        "run": ("url",),
        "probe": ("url",),
        "finetune": ("init",),
    }
    sections = {}
    for name, keys in places.items():
        section = getattr(config, name)
        urls = {key: getattr(section, key) for key in keys}
        local = {k: url for k, url in urls.items() if url and not storage.is_remote(url)}
        absolute = {key: storage.local_path(url) for key, url in local.items()}
        sections[name] = section.model_copy(update=absolute)
    sources = tuple(
        source
        if storage.is_remote(source.url)
        else source.model_copy(update={"url": storage.local_path(source.url)})
        for source in config.data.sources
    )
    sections["data"] = sections["data"].model_copy(update={"sources": sources})
    if folder := config.track.mlflow_folder:
        update = {"mlflow": storage.local_path(folder)}
        sections["track"] = config.track.model_copy(update=update)
    return config.model_copy(update=sections)


class _Fit:
    """`TorchTrainer.fit` in a thread: in the main thread it would handle Ctrl-C itself."""

    def __init__(self, config: Config, board: Any) -> None:
        self.error: BaseException | None = None
        self._trainer = _trainer(config, board)
        self._thread = threading.Thread(target=self._run, name="ray-train-fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.error = self._trainer.fit().error
        except (Exception, SystemExit) as error:
            # For the main thread. Ray ends the fit of a cluster that shuts down by SystemExit.
            self.error = error

    def wait(self, seconds: float) -> bool:
        """Wait for the end, and return whether training still runs."""
        self._thread.join(seconds)
        return self._thread.is_alive()


def _trainer(config: Config, board: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from svfap_dist.cluster.elastic import ElasticTrainer

    cluster, sizes = config.cluster, config.world_sizes
    least, most = sizes[0], sizes[-1]
    is_elastic = least < most
    for name, value in (_SETTINGS | (_ELASTIC_SETTINGS if is_elastic else {})).items():
        os.environ.setdefault(name, value)
    kind = functools.partial(ElasticTrainer, sizes, board) if is_elastic else TorchTrainer
    return kind(
        _rank,
        train_loop_config={"config": config.model_dump(mode="json"), "board": board},
        torch_config=TorchConfig(
            backend="nccl" if cluster.on_gpu else "gloo",
            timeout_s=config.train.collective_timeout_seconds,
        ),
        scaling_config=ScalingConfig(
            num_workers=(least, most) if is_elastic else most,
            elastic_resize_monitor_interval_s=cluster.resize_seconds,
            use_gpu=cluster.on_gpu,
            resources_per_worker=_rank_resources(cluster),
        ),
        run_config=RunConfig(
            # A new name each time: with an old one Ray Train would restore that run's state.
            name=f"{config.run.name}-{uuid.uuid4().hex[:8]}",
            worker_runtime_env={"env_vars": _variables(config)},
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[_failure_notice(board)],
            **_state_storage(config.run.url),
        ),
    )


def _failure_notice(board: Any) -> Any:
    """Return a callback of Ray Train's controller, which reports failures to the board."""
    from ray.train import UserCallback

    from svfap_dist.cluster.elastic import ResizeError

    class FailureNotice(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            is_resize = any(isinstance(e, ResizeError) for e in worker_exceptions.values())
            ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
            error = next(iter(worker_exceptions.values()), "")
            found = f"{ranks}: {str(error).strip().partition(chr(10))[0]}"
            board.notice_failure.remote("" if is_resize else found)

    return FailureNotice()


def _variables(config: Config) -> dict[str, str]:
    """Return the environment of ranks: the driver's settings, and how a CPU rank allocates.

    A GPU rank allocates little in the host's memory, but its threads would share one arena's lock.
    """
    import ray

    inherited = inherited_variables()
    if distributed.is_loopback(ray.util.get_node_ip_address()):  # no other node can reach this one
        inherited |= distributed.loopback_variables()
    if config.cluster.standby:
        inherited |= standby.environment(config.cluster.on_gpu)
    if config.cluster.on_gpu:  # Ray Train creates the group of NCCL
        return inherited | distributed.flight_recorder_variables()
    return inherited | ONE_ARENA


def _state_storage(run_url: str) -> dict[str, Any]:
    """Return where Ray Train keeps its own small state: below the run, which all nodes reach."""
    fs, path = storage.filesystem(_ray_folder(run_url))
    if not storage.is_remote(run_url):
        return {"storage_path": path}
    import pyarrow.fs

    wrapped = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    return {"storage_path": path, "storage_filesystem": wrapped}


def _ray_folder(run_url: str) -> str:
    return storage.join(run_url, "ray")


def _rank(spec: dict[str, Any]) -> None:
    """Run one rank, in a worker of Ray Train."""
    import ray

    from svfap_dist.cluster.elastic import ResizeError

    logs.set_up()
    board = spec["board"]
    if ray.get(board.get.remote("fatal")) is not None:
        return  # an earlier attempt has failed in a way that no restart can fix
    if ray.get(board.get.remote("result")) is not None:
        return  # an earlier attempt has ended; one of its ranks failed while it exited
    config = recipe.from_tables(spec["config"], where="the driver's recipe")
    is_main, sizes = os.environ["RANK"] == "0", config.world_sizes
    _measure_start(board, config)
    watched = watched_stop_reason(board) if is_main else contextlib.nullcontext(lambda: "")
    try:
        with watched as stop_reason:
            result = loop.run(
                config,
                on_log=board.post.remote,
                on_begin=functools.partial(board.put.remote, "addresses"),
                stop_requested=lambda: stop_reason() or _reason_to_shrink(sizes),
                nodes_leaving=_nodes_leaving,
                context=ray.get(board.begin.remote()) if is_main else None,
                on_failure=lambda step, error: report_failure(board, step, error),
            )
    except SvfapError as error:
        if not error.retryable:
            ray.get(board.put.remote("fatal", error))
        raise
    if result.stop_reason in RESIZE_REASONS:
        if is_main:  # all others have ended well, and do not hide its reason
            raise ResizeError(result.stop_reason)
    elif is_main:
        ray.get(board.put.remote("result", result))


def _measure_start(board: Any, config: Config) -> None:
    """Begin to measure this attempt; after its first step, all nodes get standby processes.

    Args:
        board: The board.
        config: The run's.
    """
    import ray

    is_main, cluster = os.environ["RANK"] == "0", config.cluster
    found: Any = ray.get(board.since_failure.remote()) if is_main else {}
    seconds: dict[str, float] = found
    if seconds:
        imports = standby.import_seconds(since=time.time() - seconds["group"])
        seconds |= {"group": seconds["group"] - imports, "imports": imports}
    if not cluster.standby or os.environ["LOCAL_RANK"] != "0":
        restart.CLOCK.begin(seconds)
        return

    def start_standbys() -> None:
        standby.start_standbys(count)
        if is_main:  # every node of the group is claimed: all ranks have made the first step
            rooms = standby.nodes_with_room(_rank_resources(cluster))
            spare: Any = ray.get(board.claim_nodes.remote(rooms))
            standby.start_on_spare_nodes(spare, count)

    count = int(os.environ["LOCAL_WORLD_SIZE"])
    ray.get(board.claim_nodes.remote([ray.get_runtime_context().get_node_id()]))
    restart.CLOCK.begin(
        seconds, lambda: threading.Thread(target=start_standbys, daemon=True).start()
    )


def _rank_resources(cluster: ClusterConfig) -> dict[str, Any]:
    """Return what Ray reserves for a rank."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.on_gpu else {})


def _preemption() -> Any:
    """Return Ray Train's notice that nodes of the group will be preempted, None without one.

    Ray Train stores it in the memory of every rank. `ray.train.get_preemption_info` reads it there,
    too, but then makes all ranks wait for each other in an actor.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def _nodes_leaving() -> Set[str]:
    """Return the ids of the group's nodes that will be preempted."""
    info = _preemption()
    return frozenset(info.preempted_node_ids) if info is not None else frozenset()


def _reason_to_shrink(sizes: tuple[int, ...]) -> str:
    """Return NODES_LEAVING if the ranks that stay are enough for a smaller group, else ""."""
    from svfap_dist.cluster.elastic import largest_size

    info = _preemption() if len(sizes) > 1 else None
    if info is None:
        return ""
    staying = int(os.environ["WORLD_SIZE"]) - len(info.preempted_ranks)
    return NODES_LEAVING if largest_size(sizes, staying) else ""


def _explained(error: BaseException, config: Config, stall: StallError | None = None) -> SvfapError:
    """Return the error of the rank that failed first, the last stall, or one with Ray's message."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, SvfapError):
            return cause
        error = failure if rank == min(failures) else error
    if stall is not None:
        return stall
    title = f"Training group failed {config.cluster.max_failures + 1} times"
    advice = "see events.jsonl of the run and Ray's logs; run the same command again to resume"
    return ClusterError(title, config.run.url, str(error).strip().splitlines()[-1], advice)
