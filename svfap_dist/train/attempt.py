"""One attempt at a run on one rank: its parts, and the operations that the loop calls.

An attempt starts from the newest committed checkpoint, or from scratch, and ends with its process
group. All methods are collectives: every rank calls them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import torch

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import load, store
from svfap_dist.checkpoint.saver import Checkpointer, RunOwnership
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config
from svfap_dist.data import decoding
from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.loader import ClipLoader
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError, HealthError
from svfap_dist.evaluate import protocol, runner
from svfap_dist.evaluate.results import summarize
from svfap_dist.model import flops
from svfap_dist.profiling.decoder import choose_backend
from svfap_dist.shards.format import Manifest
from svfap_dist.telemetry import activity, restart
from svfap_dist.telemetry.events import Row
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.telemetry.tracking import chosen_trackers
from svfap_dist.train import health
from svfap_dist.train.context import RunContext, load_run_context
from svfap_dist.train.early_stop import EarlyStop
from svfap_dist.train.engine import Engine
from svfap_dist.train.feature_probe import FeatureProbe
from svfap_dist.train.learning_rate import learning_rate_at
from svfap_dist.train.objective import build_objective
from svfap_dist.train.signals import FINISHED, Notice
from svfap_dist.train.tracing import StepTracing
from svfap_dist.train.validation import ValidationSet
from svfap_dist.train.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """End of a run. Losses are of the whole run, not only its last attempt; None: not computed."""

    step: int
    total_steps: int
    stop_reason: str  # "finished", or the reason to stop early (see `signals`)
    run_url: str
    first_loss: float | None
    loss: float | None
    first_held_out_loss: float | None
    held_out_loss: float | None

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        at = f"step {self.step} of {self.total_steps}"
        text = [f"Run {self.run_url}: {self.stop_reason} at {at}."]
        if self.stop_reason != FINISHED:
            text.append("A checkpoint is saved: run the same command again to resume.")
        for name, first, last in (
            ("Loss", self.first_loss, self.loss),
            ("Held-out loss", self.first_held_out_loss, self.held_out_loss),
        ):
            if first is not None and last is not None:
                text.append(f"{name} {first:.4f} at first, {last:.4f} now.")
        return text


class Attempt:
    """The parts of one attempt at a run on one rank. step: completed optimizer steps.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.
        device: Device of this rank, from `engine.process_group`.
        on_log: Called with each row of metrics, on rank 0.
        on_begin: Called with all ranks' metrics addresses, on rank 0.
        stack: Closes the parts.
        context: On rank 0, the result of `load_run_context`; None: read here.
        on_failure: Called with the completed steps and the error that ends the attempt.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        on_log: Callable[[Row], None],
        on_begin: Callable[[list[str]], None],
        stack: contextlib.ExitStack,
        context: RunContext | None = None,
        on_failure: Callable[[int, Exception], None] = lambda step, error: None,
    ) -> None:
        self._on_failure = on_failure
        watchdog = stack.enter_context(Watchdog(config, world, on_failure))

        def read() -> RunContext | None:
            return (context or load_run_context(config)) if world.is_main else None

        found: RunContext = distributed.broadcast_object(distributed.run_long_on_all_ranks(read))
        self._manifest, self._history, state = found.manifest, found.history, found.state
        config = state.with_order(config) if state else config
        config = _with_backend(config, self._manifest, state)
        self._config, self._world = config, world
        self._ownership = RunOwnership(config.run.url, world)
        train_on = found.split.train if found.split else None
        self._test_on = found.split.test if found.split else None
        self._loader = ClipLoader(config, config.data.url, self._manifest, world, train_on)
        self.total_steps = config.train.total_steps(self._loader.steps_per_epoch)
        self.step = found.step
        if self.step > self.total_steps:
            raise _already_longer(self.step, self.total_steps)
        self._drop_old_predictions()  # before the recorder stores the recipe they do not belong to

        objective = build_objective(_with_own_init(config, state), found.split)
        costs = (objective.flops_per_clip, objective.tokens_per_clip)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        peak_rate = flops.peak_rate(name, config.train.dtype)
        recorder = Recorder(
            config, world, found.attempt, self.step, on_log, on_begin, costs, peak_rate
        )
        self._recorder = stack.enter_context(recorder)
        recorder.samples_of_sources = self._manifest.samples_of_sources
        watchdog.record = recorder.record_stall
        self._checkpointer = stack.enter_context(self._open_checkpointer(state))
        stack.enter_context(self._errors_recorded())
        self._fingerprint, versions = self._manifest.fingerprint, store.package_versions()
        eval_fingerprint = found.eval_manifest.fingerprint if found.eval_manifest else ""
        recorder.record_start(
            self.step,
            self.total_steps,
            self._fingerprint,
            versions,
            eval_fingerprint,
            self._loader.samples_of_sources,
        )
        watchdog.attempt = found.attempt  # now that the next attempt will have another number
        for change in state.changes(config) if state else ():
            recorder.record_change(self.step, change.key, change.before, change.now)
        restart.CLOCK.lap("context")

        activity.begin("building the network")
        self.engine = Engine(config, objective, world, device)
        stack.callback(self.engine.close)
        restart.CLOCK.lap("engine")
        if state is not None:
            activity.begin("restoring the checkpoint", is_slow=True)
            reshard = load.needs_resharding(state, config, world)
            load.restore_engine(config.run.url, state, self.engine, reshard)
            restart.CLOCK.lap("checkpoint")
        self._health = health.Health(
            config.health, config.data.max_bad_fraction, self.step, self._history.rollbacks
        )
        activity.begin("reading the held-out clips")
        self._validation = self._open_validation(found)
        self._probe = self._open_probe(found)
        self._early_stop = self._open_early_stop(found)
        tracing = StepTracing(
            config, world, self.engine, recorder, range(self.step, self.total_steps)
        )
        self._tracing = stack.enter_context(contextlib.closing(tracing))
        recorder.record_ready()

    def _open_checkpointer(self, state: TrainState | None) -> Checkpointer:
        config = self._config
        license = distributed.run_on_main(lambda: load.load_license_of_run(config, state))
        return Checkpointer(config, self._world, self._recorder.sync, license)

    def _open_validation(self, found: RunContext) -> ValidationSet | None:
        if found.eval_manifest is None:
            return None
        return ValidationSet(self._config, self._world, found.eval_manifest)

    def _open_probe(self, found: RunContext) -> FeatureProbe | None:
        if found.probe_error:
            self._recorder.record_probe_failure(self.step, found.probe_error)
        if found.probe_set is None:
            return None
        return FeatureProbe(self._config, self._world, found.probe_set, self._recorder)

    def _open_early_stop(self, found: RunContext) -> EarlyStop | None:
        if found.split is None or found.split.validation is None:
            return None
        data, recorder = (found.manifest, found.split.validation), self._recorder
        steps = self._loader.steps_per_epoch, self.total_steps
        return EarlyStop(self._config, self._world, data, steps, recorder)

    def _drop_old_predictions(self) -> None:
        """Delete the predictions of a task that was finished and is trained further."""
        if self._test_on is not None and self.step < self.total_steps:
            where = storage.join(self._config.run.url, runner.PREDICTIONS)
            distributed.run_on_main(lambda: storage.delete(where))

    @contextlib.contextmanager
    def _errors_recorded(self) -> Iterator[None]:
        try:
            yield
        except health.RollbackError as rollback:
            self._recorder.record_stop(self.step, "rollback", str(rollback))
            raise
        except Exception as cause:
            error = self._explained(cause)
            self._record_error(error)
            if error is cause:
                raise
            raise error from cause
        except BaseException as error:
            self._record_error(error)
            raise

    def _explained(self, cause: Exception) -> Exception:
        """Return the error, with advice if no restart can fix it."""
        if health.is_out_of_memory(cause):
            train, rank = self._config.train, self._world.rank
            return health.out_of_memory(train, rank, self.step + 1, cause)
        failure = health.failure_of(cause)
        if (self.step, failure) in self._history.failures:
            return health.fails_again(self.step, failure)
        return cause

    def _record_error(self, error: BaseException) -> None:
        self._recorder.record_stop(self.step, type(error).__name__, str(error) or repr(error))
        if isinstance(error, health.NotFiniteError):
            self._recorder.expose_end_not_finite()
        if isinstance(error, Exception):
            self._on_failure(self.step, error)
            if failure := health.failure_of(error):
                self._recorder.record_failure(self.step, failure)

    def batches(self, stack: contextlib.ExitStack) -> Iterator[ClipBatch]:
        """Return this rank's batches of all remaining steps; waiting for them is measured.

        Args:
            stack: Closes the loader.
        """
        restart.CLOCK.lap("prepare")
        batches = self._loader.batches(self.step, self.step if self.is_over else self.total_steps)
        stack.callback(batches.close)
        waiting = self._recorder.meter.waiting(batches)
        while True:
            self._tracing.begin_step(self.step + 1)
            activity.begin("waiting for the batch", self.step + 1)
            with self.engine.phases.range("load"):
                batch = next(waiting, None)
            if batch is None:
                return
            yield batch

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of the optimizer step after `step` completed ones."""
        batch_size = self._config.train.global_batch_size
        return learning_rate_at(self._config.optim, batch_size, self.total_steps, step)

    def is_due(self, period: int) -> bool:
        """Return whether an action is due after this step.

        Args:
            period: Steps between two such actions; 0: never.
        """
        return period > 0 and self.step % period == 0

    def take_step(self, batch: ClipBatch, notice: Notice) -> bool:
        """Record the next step and queue it on the device; return False if it is passed over.

        Args:
            batch: This rank's clips.
            notice: This rank's reasons to stop or save.
        """
        next_step = self.step + 1
        if next_step in self._history.passed_over:
            self.step = next_step
            return False
        if is_first := restart.CLOCK.is_running:
            restart.CLOCK.lap("data")
        activity.begin("forward and backward", next_step)
        self.engine.backward(batch, self.step)
        self._recorder.count_step(next_step, batch)
        vote = health.StepVote(
            stop=bool(notice.stop_reason()),
            finish_upload=self._checkpointer.upload_ended,
            save=notice.new_nodes_leaving(),
        )
        counts = vote.counts(batch.num_slots, len(batch.bad))
        activity.begin("updating the weights", next_step)
        update = self.engine.update(self._learning_rate(self.step), counts)
        self._health.add(next_step, lambda: batch.keys, update)
        self.step = next_step
        if is_first:
            restart.CLOCK.lap("step")
            self._recorder.record_first_step(next_step, restart.CLOCK.finish())
        return True

    def decide(
        self, up_to_now: bool, before: health.StepDecision = health.NOTHING
    ) -> health.StepDecision:
        """Return the decision of all ranks after the earlier steps, or also after this one.

        Bad samples are written to the quarantine list before they end the run.

        Args:
            up_to_now: Whether to wait for this step.
            before: A decision to add to.
        """
        activity.begin("waiting for the sums of all ranks", self.step)
        try:
            decision = self._health.decide(up_to_now, before)
        except (HealthError, health.RollbackError) as error:
            self.step = self._health.completed
            self._record_health()
            self._recorder.write_quarantine()
            if isinstance(error, health.RollbackError):
                self._record_rollback(error)
            raise
        self._record_health()
        return decision

    def _record_health(self) -> None:
        """Record what was found in the steps decided."""
        for event in self._health.take_events():
            fields = dataclasses.asdict(event)
            if isinstance(event, health.Skip):
                self._recorder.record_skip(**fields)
            else:
                self._recorder.record_spike(**fields)

    def _record_rollback(self, rollback: health.RollbackError) -> None:
        """Record that the run returns to its newest checkpoint, and store that."""
        self.finish_upload()
        run_url = self._config.run.url
        to = distributed.run_on_main(lambda: store.latest_committed(run_url))
        reason = str(rollback)
        self._recorder.record_rollback(rollback.step, to or 0, rollback.passed_over, reason)

    @property
    def is_skipping(self) -> bool:
        """Return whether the last update known of was left out.

        Its weights may be what is wrong, so they are not saved before a step succeeds with them.
        """
        return bool(self._health.skipped)

    def log(self, loss: float, grad_norm: float) -> None:
        """Write and show the metrics of this step.

        Args:
            loss: Mean over all ranks.
            grad_norm: Global norm before clipping.
        """
        activity.begin("logging", self.step)
        lr = self._learning_rate(self.step - 1)
        epoch = (self.step - 1) // self._loader.steps_per_epoch
        row = {"step": self.step, "total_steps": self.total_steps, "epoch": epoch}
        numbers = {**row, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        if by_source := self._health.take_by_source():
            named = dict(zip(self._config.data.labels, by_source, strict=True))
            numbers["source_clips"] = {name: int(clips) for name, (_, clips) in named.items()}
            numbers["source_loss"] = {
                name: total / clips for name, (total, clips) in named.items() if clips
            }
        self._recorder.log_step(numbers, self.engine.phases.take_seconds())

    def evaluate(self) -> None:
        """Compute and record the validation loss, if there are validation clips."""
        if self._validation is not None:
            began = time.perf_counter()
            activity.begin("evaluating", self.step, is_slow=True)
            loss = self._validation.loss(self.engine)
            if chosen_trackers(self._config.track):  # by all ranks
                picture = self._validation.picture(self.engine)
                if picture is not None:
                    self._recorder.track_picture("reconstruction", self.step, picture)
            self._recorder.record_evaluation(self.step, loss, time.perf_counter() - began)

    def probe(self, notice: Notice) -> bool:
        """Probe the frozen features, if there is a probe; return whether to save them as the best.

        Args:
            notice: This rank's reasons to stop, which end the probe.
        """
        if self._probe is None:
            return False
        return self._probe.run(self.engine, self.step, lambda: bool(notice.external_stop_reason()))

    @property
    def validates(self) -> bool:
        """Return whether the validation samples are scored after this step."""
        return self._early_stop is not None and self._early_stop.is_due(self.step)

    @property
    def is_over(self) -> bool:
        """Return whether the run is at its last step, or ends early."""
        is_early = self._early_stop is not None and self._early_stop.is_over(self.step)
        return is_early or self.step == self.total_steps

    def validate(self, notice: Notice) -> bool:
        """Score the validation samples; return whether this is the best epoch so far.

        Args:
            notice: This rank's reasons to stop, which end the validation.
        """
        if self._early_stop is None or self.is_skipping:  # these weights are not saved
            return False
        external = notice.external_stop_reason
        return self._early_stop.run(self.engine, self.step, lambda: bool(external()))

    def validate_restored(self, notice: Notice) -> None:
        """Validate a restored epoch that may not have been before.

        Args:
            notice: This rank's reasons to stop, which end the validation.
        """
        early_stop = self._early_stop
        if (
            early_stop is not None
            and early_stop.may_be_unscored(self.step)
            and self.validate(notice)
        ):
            early_stop.mark()

    def _test(self, notice: Notice) -> bool:
        """Write predictions.jsonl of a task unless it exists; return False if stopped before."""
        if self._test_on is None:
            return True
        run_url = self._config.run.url
        where = storage.join(run_url, runner.PREDICTIONS)
        if distributed.run_on_main(lambda: storage.exists(where)):
            return True
        began = time.perf_counter()

        def stops() -> bool:  # between two batches
            activity.begin("testing", self.step, is_slow=True)
            return bool(notice.external_stop_reason())

        network = self.engine.network
        if self._early_stop is not None:
            network = self._early_stop.network_to_test(self.engine)
        try:
            with self.engine.evaluating():
                tested = runner.score_selection(
                    self._config,
                    self._manifest,
                    self._world,
                    self._test_on,
                    network,
                    self.engine.device,
                    stops=stops,
                )
        except runner.StoppedError:
            return False
        finally:
            self._recorder.add_test_seconds(time.perf_counter() - began)
        distributed.run_on_main(lambda: self._record_test(tested))
        return True

    def _record_test(self, tested: runner.TestedSelection) -> None:
        """Write predictions.jsonl, and record their scores."""
        tested.write(self._config.run.url)
        task = protocol.require_task(self._config)
        found = summarize(task, {task.fold: tested.predictions})
        self._recorder.record_test(self.step, found.pooled.num_samples, found.pooled.values)
        if self._recorder.is_tracked and found.confusion is not None:
            self._recorder.track_picture("confusion", self.step, found.picture())

    def save(self) -> None:
        """Wait for the previous checkpoint's upload, then start to save another."""
        self.finish_upload()
        activity.begin("saving a checkpoint", self.step, is_slow=True)
        self._ownership.check()
        self._recorder.close_window(self.step)  # recorded before the checkpoint that keeps it
        began = time.perf_counter()
        epoch_steps, ranks = self._loader.steps_per_epoch, self._world.world_size
        state = TrainState.of_run(self._config, self.step, epoch_steps, self._fingerprint, ranks)
        judge = self._early_stop or self._probe  # a task has no probe
        best = judge.candidate(self.step) if judge is not None else None
        self._checkpointer.save(self.engine, state, best)
        self._recorder.add_checkpoint_seconds(time.perf_counter() - began)

    def finish_upload(self) -> bool:
        """Wait for the upload in progress, if any, and record it; return False if it failed."""
        activity.begin("waiting for the upload of a checkpoint", self.step, is_slow=True)
        began = time.perf_counter()
        outcome = self._checkpointer.finish_upload()
        if outcome is None:
            return True
        self._recorder.add_checkpoint_seconds(time.perf_counter() - began)
        if self._probe is not None and outcome.is_marked:
            self._probe.confirm(outcome.step)
        # The last step's checkpoint is saved a second time.
        if self._early_stop is not None and not outcome.is_marked and outcome.step < self.step:
            self._early_stop.lose(outcome.step)
        self._recorder.record_checkpoint(
            outcome.step, outcome.num_bytes, outcome.seconds, outcome.error
        )
        if outcome.error and self._world.is_main:
            lost = "The checkpoint of step %d was not stored (a second in a row ends the run): %s"
            log.warning(lost, outcome.step, outcome.error)
        return not outcome.error

    def finish(self, notice: Notice) -> RunResult:
        """Commit the last checkpoint (with one retry), test a finished network, and sum up.

        Args:
            notice: This rank's reasons to stop or save.
        """
        self._tracing.finish()
        self._recorder.write_quarantine()  # what was found since the last log line
        if not self.finish_upload():
            self.save()
            self.finish_upload()
        activity.begin("ending", self.step, is_slow=True)
        is_done = self.is_over and self._test(notice)
        self._recorder.close_window(self.step)
        reasons = [r for r in distributed.all_gather_object(notice.stop_reason()) if r]
        reason = FINISHED if is_done else (reasons or ["stop requested"])[0]
        self._recorder.record_stop(self.step, reason)
        return distributed.broadcast_object(self._result(reason) if self._world.is_main else None)

    def _result(self, reason: str) -> RunResult:
        losses, held_out = self._recorder.losses()
        return RunResult(
            step=self.step,
            total_steps=self.total_steps,
            stop_reason=reason,
            run_url=self._config.run.url,
            first_loss=losses[0] if losses else None,
            loss=losses[-1] if losses else None,
            first_held_out_loss=held_out[0] if held_out else None,
            held_out_loss=held_out[-1] if held_out else None,
        )


def _already_longer(step: int, total: int) -> ConfigError:
    found = f"{step} completed steps, but the recipe ends at step {total}"
    advice = f"set train.max_steps and train.epochs so that there are at least {step}, or give "
    advice += "another run.url for a new run"
    return ConfigError("Run is longer than its recipe", "train.max_steps", found, advice)


def _with_own_init(config: Config, state: TrainState | None) -> Config:
    """Replace finetune.init of a resumed run by its own checkpoint.

    `load_states` restores no frozen parameters (the encoder of a linear probe), so `build` loads
    them; the original finetune.init may have changed or been deleted since.
    """
    if state is None or config.task is None:
        return config
    init = store.checkpoint_url(config.run.url, state.step)
    finetune = config.finetune.model_copy(update={"init": init})
    return config.model_copy(update={"finetune": finetune})


def _with_backend(config: Config, manifest: Manifest, state: TrainState | None) -> Config:
    """Replace decode backend `auto` by a resumed run's own, or by one chosen now; a collective."""
    if state is not None:
        config = decoding.pin_backend(config, state.config)
    name = distributed.run_on_main(lambda: choose_backend(config, config.data.url, manifest))
    config = decoding.with_backend(config, name)
    distributed.run_on_all_ranks(lambda: decoding.decoder_of(config))
    return config
