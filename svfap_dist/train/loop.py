"""Training, from an empty folder or the newest checkpoint to the last step.

`run` is what every rank executes, started by Ray Train, srun, torchrun or a plain process; the
recipe says whether it pre-trains or fine-tunes. Batches come from `data.loader`, the arithmetic is
in `engine`, and files are written by `telemetry.recorder` and `checkpoint.saver`; this file is the
order of events. What all ranks decide together (`health`) is known one step late, unless the run
logs, evaluates, saves or ends. All ranks stop early together, after a step or, while a task is
tested, between two batches.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable

import torch

from svfap_dist import distributed
from svfap_dist.config import Config, check_world_size, require_urls, with_device
from svfap_dist.distributed import World
from svfap_dist.telemetry import restart
from svfap_dist.telemetry.events import Row
from svfap_dist.telemetry.tracking import check_installed
from svfap_dist.train import health
from svfap_dist.train.attempt import Attempt, RunResult
from svfap_dist.train.context import RunContext, load_run_context
from svfap_dist.train.engine import process_group
from svfap_dist.train.objective import build_objective
from svfap_dist.train.signals import NodesLeaving, Notice, catch_stop_signals

log = logging.getLogger(__name__)


def run(
    config: Config,
    *,
    on_log: Callable[[Row], None] = lambda row: None,
    on_begin: Callable[[list[str]], None] = lambda addresses: None,
    stop_requested: Callable[[], str] = lambda: "",
    nodes_leaving: NodesLeaving | None = None,
    context: RunContext | None = None,
    on_failure: Callable[[int, Exception], None] = lambda step, error: None,
) -> RunResult:
    """Train one rank of a run to its end, resuming from the newest committed checkpoint.

    After a rollback (`health`) another attempt begins in the same process.

    Args:
        config: The run's recipe.
        on_log: Called with a row of metrics at each log step, on rank 0.
        on_begin: Called before the first step with all ranks' metrics addresses, on rank 0.
        stop_requested: Returns a reason to stop, or "". Once it returns one on any rank, all save a
            checkpoint and stop, as they do at SIGTERM, SIGUSR1, Ctrl-C and `train.max_seconds`.
        nodes_leaving: Returns the nodes that will be preempted, without waiting; called on rank 0.
            At a new one all ranks save a checkpoint and continue.
        context: On rank 0, the result of `preflight`; None: read again.
        on_failure: Called with the completed steps and the error that ends this rank.

    Raises:
        ConfigError: If recipe, data and checkpoint do not fit each other.
        ShardError: If the data cannot be used.
        ClusterError: If the ranks cannot connect.
        HealthError: If losses stay not finite, too many samples are bad, or memory runs out.
        CheckpointError: If checkpoints cannot be read or written.
    """
    if not restart.CLOCK.is_running:  # the second run of this process
        restart.CLOCK.begin()
    require_urls(config)
    config = with_device(config, distributed.has_gpu_per_rank)
    world = distributed.world_from_environment()
    check_world_size(config, world.world_size)
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(catch_stop_signals())
        leaving = nodes_leaving if world.is_main else None
        notice = Notice(caught, stop_requested, leaving, config.train.max_seconds)
        device = stack.enter_context(process_group(config, world))
        restart.CLOCK.lap("connect")
        while True:
            try:
                parts = on_log, on_begin, context, on_failure
                return _run_attempt(config, world, device, notice, *parts)
            except health.RollbackError as rollback:
                if world.is_main:
                    log.warning("%s: back to the newest checkpoint.", rollback)
            context = None  # out of date
            restart.CLOCK.begin()
            gc.collect()  # frees the attempt's engine before the next one is built


def _run_attempt(
    config: Config,
    world: World,
    device: torch.device,
    notice: Notice,
    on_log: Callable[[Row], None],
    on_begin: Callable[[list[str]], None],
    context: RunContext | None,
    on_failure: Callable[[int, Exception], None],
) -> RunResult:
    """Train from the newest checkpoint until the end, an error or a rollback."""
    train = config.train
    with contextlib.ExitStack() as stack:
        attempt = Attempt(config, world, device, on_log, on_begin, stack, context, on_failure)
        if attempt.step == 0:
            attempt.evaluate()
            attempt.probe(notice)
        else:
            attempt.validate_restored(notice)
        save_is_due = False  # since a step at which it could not be saved
        for batch in attempt.batches(stack):
            is_taken = attempt.take_step(batch, notice)
            periods = train.log_every, train.eval_every, config.probe_every, train.checkpoint_every
            logs, evaluates, probes, saves = (
                attempt.step == attempt.total_steps or attempt.is_due(period) for period in periods
            )
            saves |= save_is_due
            validates = attempt.validates
            is_known = logs or evaluates or probes or validates or saves
            decision = attempt.decide(up_to_now=is_known)
            saves |= decision.save
            if decision.stop or saves:  # neither follows a step whose outcome is not known
                decision = attempt.decide(up_to_now=True, before=decision)
            ends = decision.stop or attempt.step == attempt.total_steps
            if (ends or logs) and is_taken and not attempt.is_skipping:
                attempt.log(loss=decision.loss, grad_norm=decision.grad_norm)
            if ends or evaluates:
                attempt.evaluate()
            if probes and not decision.stop:
                saves |= attempt.probe(notice)
            if validates and not decision.stop:
                saves |= attempt.validate(notice)
                ends |= attempt.is_over
            if decision.finish_upload:
                attempt.finish_upload()
            save_is_due = saves and attempt.is_skipping
            if ends or (saves and not save_is_due):
                attempt.save()
            if ends and attempt.step < attempt.total_steps:
                break
        return attempt.finish(notice)


def preflight(config: Config, known: RunContext | None = None) -> RunContext:
    """Check recipe, data and newest checkpoint before any rank is started.

    Args:
        config: The run's recipe.
        known: An earlier context of the same recipe, whose manifest and split are reused.

    Returns:
        The context for `run`.

    Raises:
        ConfigError: If recipe, data and checkpoint do not fit each other.
        ShardError: If the manifest cannot be used.
        CheckpointError: If the newest checkpoint or the initial weights cannot be read.
    """
    require_urls(config)
    check_installed(config.track)
    objective = build_objective(config)
    context = load_run_context(config, known)
    if context.state is None:
        objective.check_initial_weights()
    return context
