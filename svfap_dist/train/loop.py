"""Training, from an empty folder or the newest checkpoint to the last step.

`run` is what every rank executes, whoever started it: Ray Train, srun, torchrun or nobody; the
recipe says whether it pre-trains or fine-tunes. Batches come from `data.loader`, the arithmetic is
in `engine`, and what is written goes through `recorder` and `checkpointer`; here is the order in
which things happen. Between backward and update all ranks agree (`health`), and whatever ends a run
early does so at a step edge, on all ranks alike, or while a task is tested, between two batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from svfap_dist import distributed
from svfap_dist.config import Config, check_world_size, require_urls
from svfap_dist.telemetry.recorder import Row
from svfap_dist.train import health, objective
from svfap_dist.train.attempt import Attempt, look_around
from svfap_dist.train.engine import process_group
from svfap_dist.train.result import RunResult
from svfap_dist.train.signals import NodesLeaving, Notice, heard_signals


def run(
    config: Config,
    *,
    on_log: Callable[[Row], None] = lambda row: None,
    on_begin: Callable[[list[str]], None] = lambda addresses: None,
    stop_requested: Callable[[], str] = lambda: "",
    nodes_leaving: NodesLeaving | None = None,
) -> RunResult:
    """Train one rank of a run to its end, resuming from the newest committed checkpoint.

    Args:
        on_log: gets a row of numbers at each log step, on rank 0.
        on_begin: gets the "host:port" of all ranks' metrics before the first step, on rank 0.
        stop_requested: asked at step edges, and in a test; once it gives a reason on any rank, all
            save a checkpoint and end, as they do at SIGTERM, SIGUSR1, Ctrl-C and
            `train.max_seconds`.
        nodes_leaving: asked by all ranks together; a new name in it has them save a checkpoint and
            go on.

    Raises: ConfigError, ShardError, ClusterError before the first step; HealthError,
    CheckpointError, StorageError at any step.
    """
    require_urls(config)
    world = distributed.world_from_environment()
    check_world_size(config, world.world_size)
    with contextlib.ExitStack() as stack:
        heard = stack.enter_context(heard_signals())
        notice = Notice(heard, stop_requested, nodes_leaving, config.train.max_seconds)
        device = stack.enter_context(process_group(config, world))
        attempt = Attempt(config, world, device, on_log, on_begin, stack)
        if attempt.step == 0:
            attempt.evaluate()
        for batch in attempt.batches(stack):
            rate = attempt.learning_rate()
            loss = attempt.engine.backward(batch, attempt.step)
            verdict = attempt.agree(batch, loss, notice)
            update = attempt.engine.update(rate)
            if not update.applied:
                raise health.gradient_not_finite(attempt.step + 1)
            attempt.step += 1
            ends = verdict.stop or attempt.step == attempt.total_steps
            if ends or attempt.is_at(config.train.log_every):
                attempt.log(loss=verdict.loss, lr=rate, grad_norm=float(update.grad_norm))
            if ends or attempt.is_at(config.train.eval_every):
                attempt.evaluate()
            if verdict.settle:
                attempt.settle()
            due = attempt.is_at(config.train.checkpoint_every)
            if (verdict.look and notice.nodes_leave()) or ends or due:
                attempt.save()
            if verdict.stop:
                break
        return attempt.finish(notice)


def preflight(config: Config) -> int:
    """Check all that can be checked before any rank is started: recipe, data, newest checkpoint.

    Returns the step that the run will go on from.

    Raises: ConfigError, ShardError, CheckpointError, StorageError.
    """
    require_urls(config)
    learned = objective.of(config)  # refuses dimensions that do not fit
    state = look_around(config).state
    if state is None:
        learned.check_start()
    return state.step if state else 0
