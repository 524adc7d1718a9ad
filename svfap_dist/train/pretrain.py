"""Pre-training, from an empty folder or the newest checkpoint to the last step.

`run` is what every rank executes, whoever started it: Ray Train, srun, torchrun or nobody. Batches
come from `data.loader`, the arithmetic is in `engine`, and what is written goes through `recorder`
and `checkpointer`; here is the order in which things happen. Between backward and update all ranks
agree (`health`), and whatever ends a run early does so at a step edge, on all ranks alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator

import torch

from svfap_dist import distributed
from svfap_dist.config import Config, check_world_size
from svfap_dist.data import decode, masking
from svfap_dist.data.clips import ClipBatch
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.stream import open_data
from svfap_dist.distributed import World
from svfap_dist.errors import ConfigError, HealthError
from svfap_dist.metrics import flops
from svfap_dist.model import sizes
from svfap_dist.rng import Stream
from svfap_dist.shard_format import Manifest
from svfap_dist.train import checkpoint, health, schedule
from svfap_dist.train import state as train_state
from svfap_dist.train.checkpointer import Checkpointer
from svfap_dist.train.engine import Engine, build_arguments, process_group
from svfap_dist.train.heldout import HeldOut
from svfap_dist.train.journal import next_attempt
from svfap_dist.train.notice import FINISHED, NodesLeaving, Notice, heard_signals
from svfap_dist.train.ownership import Ownership
from svfap_dist.train.recorder import Recorder, Row
from svfap_dist.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended. The losses are those of the whole run, not only of its last attempt, and
    None where none was computed."""

    step: int
    total_steps: int
    stop_reason: str  # "finished", or what asked the run to stop (see `notice`)
    run_url: str
    first_loss: float | None
    loss: float | None
    first_held_out_loss: float | None
    held_out_loss: float | None

    def lines(self) -> list[str]:
        """For people."""
        text = [
            f"Run {self.run_url}: {self.stop_reason} at step {self.step} of {self.total_steps}."
        ]
        if self.stop_reason != FINISHED:
            text.append("A checkpoint is saved: run the same command again to resume.")
        for name, first, last in (
            ("Loss", self.first_loss, self.loss),
            ("Held-out loss", self.first_held_out_loss, self.held_out_loss),
        ):
            if first is not None and last is not None:
                text.append(f"{name} {first:.4f} at first, {last:.4f} now.")
        return text


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
        stop_requested: asked at step edges; once it gives a reason on any rank, all save a
            checkpoint and end, as they do at SIGTERM, SIGUSR1, Ctrl-C and `train.max_seconds`.
        nodes_leaving: asked by all ranks together; a new name in it has them save a checkpoint and
            go on.

    Raises: ConfigError, ShardError, ClusterError before the first step; HealthError,
    CheckpointError, StorageError at any step.
    """
    _require_urls(config)
    world = distributed.from_environment()
    check_world_size(config, world.world_size)
    with contextlib.ExitStack() as stack:
        heard = stack.enter_context(heard_signals())
        notice = Notice(heard, stop_requested, nodes_leaving, config.train.max_seconds)
        device = stack.enter_context(process_group(config, world))
        attempt = _Attempt(config, world, device, on_log, on_begin, stack)
        if attempt.step == 0:
            attempt.evaluate()
        for batch in attempt.batches(stack):
            rate = attempt.learning_rate()
            loss = attempt.engine.backward(batch)
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
        return attempt.finish(notice.stop_reason())


class _Attempt:
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
        found = distributed.together(lambda: _look_around(config) if world.is_main else None)
        self._manifest, state, number = distributed.from_main(found)
        config = _with_backend(config, world, self._manifest, state)
        self._config, self._world = config, world
        self._ownership = Ownership(config.run.url, world)
        self._loader = ClipLoader(config, config.data.url, self._manifest, world)
        self.total_steps = schedule.total_steps(config.train, self._loader.steps_per_epoch)
        self.step = state.step if state else 0

        flops_per_clip, peak_rate = _work(config, device)
        recorder = Recorder(
            config, world, number, self.step, on_log, on_begin, flops_per_clip, peak_rate
        )
        self._recorder = stack.enter_context(recorder)
        self._checkpointer = stack.enter_context(Checkpointer(config, world, recorder.sync))
        stack.enter_context(self._failure_told())
        recorder.begin(self.step, self.total_steps, self._manifest.fingerprint)

        reshape = state is not None and checkpoint.needs_reshaping(state, config, world)
        self.engine = Engine(config, world, device, universal=reshape)
        stack.callback(self.engine.close)
        if state is not None:
            checkpoint.load(config.run.url, state, self.engine, reshape)
        self._health = health.Health(device, config.data.max_bad_fraction)
        self._held_out = HeldOut(config, world) if config.data.eval_url else None
        recorder.ready()

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._recorder.ended(self.step, type(error).__name__, str(error))
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
            settle=self._checkpointer.wants_settling,
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

    def save(self) -> None:
        """Begin a checkpoint, when the one before it is settled."""
        self.settle()
        self._ownership.check()
        self._recorder.close_window(self.step)  # the resume that this makes possible keeps it
        began = time.perf_counter()
        state = train_state.after(
            self.step,
            self._config,
            self._loader.steps_per_epoch,
            self._manifest.fingerprint,
            self._world.world_size,
        )
        self._checkpointer.save(self.engine, state)
        self._recorder.stood_still(time.perf_counter() - began)

    def settle(self) -> bool:
        """Wait for the upload in flight, if any, and tell how it ended; False if it failed."""
        began = time.perf_counter()
        outcome = self._checkpointer.settle()
        if outcome is None:
            return True
        self._recorder.stood_still(time.perf_counter() - began)
        self._recorder.checkpointed(outcome)
        return not outcome.error

    def finish(self, stop_reason: str) -> RunResult:
        """See the last checkpoint committed (one more try if that fails) and sum up the run."""
        if not self.settle():
            self.save()
            self.settle()
        self._recorder.close_window(self.step)
        reasons = [reason for reason in distributed.gathered(stop_reason) if reason]
        is_done = self.step == self.total_steps
        reason = FINISHED if is_done else (reasons or ["stop requested"])[0]
        self._recorder.ended(self.step, reason)
        return distributed.from_main(self._result(reason) if self._world.is_main else None)

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


def _work(config: Config, device: torch.device) -> tuple[int, float | None]:
    """Operations of a training step for one clip, and what the device can do in a second."""
    arguments = build_arguments(config)
    size = sizes.resolve(arguments.pop("size"), arguments)
    split = masking.predicted_split(Stream("work"), config)
    parts = flops.autoencoder(size, len(split.visible), len(split.masked))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return flops.training_step(parts), flops.peak_rate(name, config.train.dtype)


def _require_urls(config: Config) -> None:
    for key, url in (("data.url", config.data.url), ("run.url", config.run.url)):
        if not url:
            raise ConfigError(
                "Nothing is said about where to read or write",
                where=key,
                found="it is empty",
                do=f"give {key}=a folder or an s3:// prefix",
            )


def preflight(config: Config) -> int:
    """Check all that can be checked before any rank is started: recipe, data, newest checkpoint.

    Returns the step that the run will go on from.

    Raises: ConfigError, ShardError, CheckpointError, StorageError.
    """
    _require_urls(config)
    geometry = build_arguments(config)
    sizes.resolve(geometry.pop("size"), geometry)
    _, state, _ = _look_around(config)
    return state.step if state else 0


def _with_backend(
    config: Config, world: World, manifest: Manifest, state: TrainState | None
) -> Config:
    """The recipe with a decode backend instead of `auto`: a resumed run's own, or one chosen now.

    All ranks call it together. Raises: ConfigError if a rank cannot have it.
    """
    if state is not None:
        config = decode.as_before(config, state.config)
    name = distributed.together(
        lambda: decode.choose(config, config.data.url, manifest) if world.is_main else None
    )
    config = decode.named(config, distributed.from_main(name))
    distributed.together(lambda: decode.backend(config))
    return config


def _look_around(config: Config) -> tuple[Manifest, TrainState | None, int]:
    """Data, newest checkpoint if any, and number of the attempt: checked before anything starts."""
    manifest = open_data(config, config.data.url)
    decode.check(config, config.data.url, manifest)
    if config.data.eval_url:
        open_data(config, config.data.eval_url)
    run_url, state = config.run.url, None
    step = checkpoint.latest_committed(run_url)
    if step is not None:
        state = checkpoint.read_state(run_url, step)
        where = checkpoint.checkpoint_url(run_url, step)
        train_state.check_resumable(state, config, manifest.fingerprint, where)
    return manifest, state, next_attempt(run_url)
