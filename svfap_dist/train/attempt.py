"""One attempt at a run on one rank: its parts, and what the loop does with them.

An attempt begins where the newest committed checkpoint ends, or at nothing, and is over with its
process group. All ranks call all methods together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator

import torch

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import load, store
from svfap_dist.checkpoint.saver import Checkpointer, RunOwnership
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config
from svfap_dist.data.clips import ClipBatch
from svfap_dist.data.loader import ClipLoader
from svfap_dist.distributed import World
from svfap_dist.errors import HealthError
from svfap_dist.model import flops
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import open_data
from svfap_dist.telemetry.journal import next_attempt
from svfap_dist.telemetry.recorder import Recorder, Row
from svfap_dist.train import health, objective, schedule, split, testing
from svfap_dist.train.engine import Engine
from svfap_dist.train.result import RunResult
from svfap_dist.train.signals import FINISHED, Notice
from svfap_dist.train.split import Sides
from svfap_dist.train.testing import PREDICTIONS
from svfap_dist.train.validation import HeldOut
from svfap_dist.video import backends


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an attempt finds before it starts."""

    manifest: Manifest
    sides: Sides | None  # of a task
    state: TrainState | None  # of the newest checkpoint
    attempt: int  # number of the attempt, from 1


def look_around(config: Config) -> Scene:
    """Data, split of the task, newest checkpoint if any: checked before anything starts.

    Raises: ConfigError, ShardError, CheckpointError, StorageError.
    """
    manifest = open_data(config, config.data.url)
    backends.check(config, config.data.url, manifest)
    if config.data.eval_url:
        open_data(config, config.data.eval_url)
    run_url, state = config.run.url, None
    step = store.latest_committed(run_url)
    if step is not None:
        state = store.read_state(run_url, step)
        where = store.checkpoint_url(run_url, step)
        state.check_resumable(config, manifest.fingerprint, where)
    sides = split.sides(config, manifest) if config.task else None
    return Scene(manifest, sides, state, next_attempt(run_url))


class Attempt:
    """The parts of one attempt at a run on one rank, and what the loop does with them.

    step: optimizer steps completed. All ranks call all methods together.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        on_log: Callable[[Row], None],
        on_begin: Callable[[list[str]], None],
        stack: contextlib.ExitStack,
    ) -> None:
        found = distributed.run_on_all_ranks(lambda: look_around(config) if world.is_main else None)
        scene = distributed.broadcast_object(found)
        self._manifest, state = scene.manifest, scene.state
        config = _with_backend(config, world, self._manifest, state)
        self._config, self._world = config, world
        self._ownership = RunOwnership(config.run.url, world)
        train_on = scene.sides.train if scene.sides else None
        self._test_on = scene.sides.test if scene.sides else None
        self._loader = ClipLoader(config, config.data.url, self._manifest, world, train_on)
        self.total_steps = schedule.total_steps(config.train, self._loader.steps_per_epoch)
        self.step = state.step if state else 0

        learned = objective.of(config)
        work = (learned.flops_per_clip, learned.tokens_per_clip)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        peak_rate = flops.peak_rate(name, config.train.dtype)
        recorder = Recorder(
            config, world, scene.attempt, self.step, on_log, on_begin, work, peak_rate
        )
        self._recorder = stack.enter_context(recorder)
        self._checkpointer = stack.enter_context(Checkpointer(config, world, recorder.sync))
        stack.enter_context(self._failure_told())
        recorder.begin(
            self.step, self.total_steps, self._manifest.fingerprint, store.package_versions()
        )

        reshard = state is not None and load.needs_resharding(state, config, world)
        self.engine = Engine(_own_init(config, state), world, device, universal=reshard)
        stack.callback(self.engine.close)
        if state is not None:
            load.restore_engine(config.run.url, state, self.engine, reshard)
        self._health = health.Health(device, config.data.max_bad_fraction)
        self._held_out = HeldOut(config, world) if config.data.eval_url else None
        recorder.ready()

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._recorder.ended(self.step, type(error).__name__, str(error) or repr(error))
            if isinstance(error, health.NotFiniteError):
                self._recorder.not_finite()
            raise

    def batches(self, stack: contextlib.ExitStack) -> Iterator[ClipBatch]:
        """This rank's batches of all steps that are left; waiting for them is measured."""
        batches = self._loader.batches(self.step, self.total_steps)
        assert isinstance(batches, Generator)
        stack.callback(batches.close)
        return self._recorder.meter.waiting(batches)

    def learning_rate(self) -> float:
        """Of the next update."""
        batch_size = self._config.train.global_batch_size
        return schedule.learning_rate(self._config.optim, batch_size, self.total_steps, self.step)

    def is_at(self, period: int) -> bool:
        """Whether something that is due every `period` steps (0: never) is due now."""
        return period > 0 and self.step % period == 0

    def agree(self, batch: ClipBatch, loss: torch.Tensor, notice: Notice) -> health.Verdict:
        """Book the next step, whose gradient is ready, and vote on it.

        Bad samples are written down before they end the run.
        """
        next_step, epoch = self.step + 1, self.step // self._loader.steps_per_epoch
        self._recorder.count(next_step, epoch, batch)
        wishes = health.Wishes(
            stop=bool(notice.stop_reason()),
            settle=self._checkpointer.upload_ended,
            look=notice.wants_look,
        )
        try:
            return self._health.agree(next_step, batch.keys, len(batch.bad), loss, wishes)
        except HealthError:
            self._recorder.write_quarantine()
            raise

    def log(self, loss: float, lr: float, grad_norm: float) -> None:
        """Write and show the numbers of this step."""
        epoch = (self.step - 1) // self._loader.steps_per_epoch
        row = {"step": self.step, "total_steps": self.total_steps, "epoch": epoch}
        numbers = {**row, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        self._recorder.log(numbers, self.engine.phases.taken())

    def evaluate(self) -> None:
        """The loss on the held-out clips, if there are any."""
        if self._held_out is not None:
            began = time.perf_counter()
            loss = self._held_out.loss(self.engine)
            self._recorder.evaluated(self.step, loss, time.perf_counter() - began)

    def _test(self, notice: Notice) -> bool:
        """Have predictions.jsonl say what the trained network makes of the task's test samples, if
        there is a task and no such file; False if a rank was asked to stop first."""
        if self._test_on is None:
            return True
        where = storage.join(self._config.run.url, PREDICTIONS)
        is_main, run_url = self._world.is_main, self._config.run.url
        there = distributed.run_on_all_ranks(lambda: storage.exists(where) if is_main else None)
        if distributed.broadcast_object(there):
            return True
        began = time.perf_counter()
        try:
            with self.engine.evaluating():
                tested = testing.predict(
                    self._config,
                    self._manifest,
                    self._world,
                    self._test_on,
                    self.engine.network,
                    self.engine.device,
                    stops=lambda: bool(notice.asked_to_stop()),
                )
        except testing.StoppedError:
            return False
        finally:
            self._recorder.tested(time.perf_counter() - began)
        distributed.run_on_all_ranks(lambda: tested.write(run_url) if is_main else None)
        return True

    def save(self) -> None:
        """Begin a checkpoint, when the one before it is settled."""
        self.settle()
        self._ownership.check()
        self._recorder.close_window(self.step)  # the resume that this makes possible keeps it
        began = time.perf_counter()
        state = TrainState.of_run(
            self._config,
            self.step,
            self._loader.steps_per_epoch,
            self._manifest.fingerprint,
            self._world.world_size,
        )
        self._checkpointer.save(self.engine, state)
        self._recorder.stood_still(time.perf_counter() - began)

    def settle(self) -> bool:
        """Wait for the upload in flight, if any, and tell how it ended; False if it failed."""
        began = time.perf_counter()
        outcome = self._checkpointer.finish_upload()
        if outcome is None:
            return True
        self._recorder.stood_still(time.perf_counter() - began)
        self._recorder.checkpointed(**dataclasses.asdict(outcome))
        return not outcome.error

    def finish(self, notice: Notice) -> RunResult:
        """See the last checkpoint committed (one more try if that fails), test what was trained to
        its end, and sum up the run."""
        if not self.settle():
            self.save()
            self.settle()
        is_done = self.step == self.total_steps and self._test(notice)
        self._recorder.close_window(self.step)
        reasons = [
            reason for reason in distributed.all_gather_object(notice.stop_reason()) if reason
        ]
        reason = FINISHED if is_done else (reasons or ["stop requested"])[0]
        self._recorder.ended(self.step, reason)
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


def _own_init(config: Config, state: TrainState | None) -> Config:
    """The recipe with a resumed run's own checkpoint for finetune.init.

    What is frozen (the encoder of a linear probe) DeepSpeed's universal form leaves as it was
    built, and finetune.init may have gone on by now, or away.
    """
    if state is None or config.task is None:
        return config
    init = store.checkpoint_url(config.run.url, state.step)
    finetune = config.finetune.model_copy(update={"init": init})
    return config.model_copy(update={"finetune": finetune})


def _with_backend(
    config: Config, world: World, manifest: Manifest, state: TrainState | None
) -> Config:
    """The recipe with a decode backend instead of `auto`: a resumed run's own, or one chosen now.

    All ranks call it together. Raises: ConfigError if a rank cannot have it.
    """
    if state is not None:
        config = backends.as_before(config, state.config)
    name = distributed.run_on_all_ranks(
        lambda: backends.choose(config, config.data.url, manifest) if world.is_main else None
    )
    config = backends.named(config, distributed.broadcast_object(name))
    distributed.run_on_all_ranks(lambda: backends.backend(config))
    return config
