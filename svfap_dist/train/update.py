"""Update weights without making the host wait: norm, vote of all ranks, clipping, AdamW.

One small sum over all ranks carries what each rank reports (see `health`), its loss and its share
of the gradient's norm. From that the device itself decides: it scales the gradient, and it leaves
weights and optimizer states as they are in a step in which the loss of any rank or the gradient is
not finite. The sums are also copied to the host, which may read them later: `Update.read`.

DeepSpeed owns weights, partitions and optimizer states, so its checkpoint files are still used, but
its own step reads results several times and works parameter by parameter. So at stages 0
to 2 only its tensors are used, and none of its code runs between two checkpoints. At stage 3, where
a module's weights come and go with its forward and backward pass, its passes and the parts of its
step that move weights are used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from svfap_dist.telemetry.meter import Phases
from svfap_dist.train.gradients import FlatGroup, GradientReducer

_EPSILON = 1e-6  # of clipping, as in torch's and DeepSpeed's
_SQUARED_TOGETHER = 1 << 20  # numbers whose squares are added in float32


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """Outcome of one optimizer step.

    loss: mean over all ranks.
    grad_norm: global norm before clipping.
    applied: False if the weights were left as they are, since something was not finite.
    losses_are_finite: of all ranks.
    own_loss_is_finite: of this rank.
    counts: sums over all ranks of what they reported.
    by_source: sum of the losses of all ranks' clips of each source of a mixture, and their number.
    """

    loss: float
    grad_norm: float
    applied: bool
    losses_are_finite: bool
    own_loss_is_finite: bool
    counts: tuple[float, ...]
    by_source: tuple[tuple[float, float], ...] = ()


class Update:
    """An optimizer step that is queued on the device.

    Args:
        numbers: Sums over all ranks, and what this rank found, on the device.
        num_sources: Of the mixture; 0: there is none.
    """

    def __init__(self, numbers: Tensor, num_sources: int = 0) -> None:
        self._host, self._copied, self._num_sources = numbers, None, num_sources
        if numbers.is_cuda:
            self._host = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._result: UpdateResult | None = None

    def read(self) -> UpdateResult:
        """Return the outcome; the host waits until the device has taken the step."""
        if self._result is None:
            if self._copied is not None:
                self._copied.synchronize()
            *sums, broken, loss, norm, skipped, own_broken = self._host.tolist()
            counts = sums[: len(sums) - 2 * self._num_sources]
            by_source = sums[len(counts) :]
            self._result = UpdateResult(
                loss=loss,
                grad_norm=norm,
                applied=not skipped,
                losses_are_finite=not broken,
                own_loss_is_finite=not own_broken,
                counts=tuple(counts),
                by_source=tuple(zip(by_source[::2], by_source[1::2], strict=True)),
            )
        return self._result


def sums_by_source(losses: Tensor, sources: Tensor, num_sources: int) -> Tensor:
    """Return the sum of the losses of each source's clips, and their number, float64 [S, 2].

    Args:
        losses: Of B clips, [B].
        sources: The number of each clip's source in the mixture, [B].
        num_sources: Of the mixture, S.
    """
    is_of = sources == torch.arange(num_sources, device=sources.device)[:, None]
    ones = torch.ones_like(losses, dtype=torch.float64)
    return is_of.double() @ torch.stack([losses.double(), ones], dim=1)


class Backend(Protocol):
    """What depends on the ZeRO stage."""

    network: Any  # called by the objective

    def backward(self, loss: Tensor, is_first: bool, is_last: bool) -> None:
        """Add the gradient of a micro batch's mean loss.

        Args:
            loss: Scalar.
            is_first: Whether it is the first micro batch of the step.
            is_last: Whether it is the last one.
        """
        ...

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm of the step's mean gradient.

        Called once per step, before `step`: it takes the gradient out of the reducer.
        """
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights from this step's gradient.

        Args:
            optimizer: With `grad_scale` and `found_inf` for this step.
        """
        ...

    def close(self) -> None:
        """Remove hooks."""
        ...


class Updater:
    """Optimizer steps of one rank.

    Args:
        backend: Of the ZeRO stage.
        optimizer: torch's fused AdamW, which DeepSpeed has given its own parameters.
        clip_norm: Norm to clip the gradient to; 0: do not.
    """

    def __init__(
        self, backend: Backend, optimizer: torch.optim.Optimizer, clip_norm: float
    ) -> None:
        self._backend, self._optimizer, self._clip_norm = backend, optimizer, clip_norm

    @torch.no_grad()
    def update(
        self, loss: Tensor, counts: Sequence[float], source_sums: Tensor | None = None
    ) -> Update:
        """Reduce what the ranks report, and take a step of AdamW unless something is not finite.

        Args:
            loss: This rank's mean loss, a scalar on the device.
            counts: Numbers to add over all ranks.
            source_sums: From `sums_by_source`, of the step's clips, to add over all ranks, too.
        """
        device, world_size = loss.device, dist.get_world_size()
        on_host = torch.tensor(counts, dtype=torch.float64, pin_memory=device.type == "cuda")
        own_broken = loss.isfinite().logical_not_().double()
        own = torch.stack([own_broken, loss.double() / world_size, self._backend.squared_norm()])
        by_source = [] if source_sums is None else [source_sums.flatten()]
        sums = torch.cat([on_host.to(device, non_blocking=True), *by_source, own])
        dist.all_reduce(sums)
        broken, norm = sums[-3], sums[-1].sqrt_()  # a view: `sums` has the norm now
        skips = norm.isfinite().logical_not_().logical_or_(broken).float()
        scale = None
        if self._clip_norm:
            scale = ((norm + _EPSILON) / self._clip_norm).clamp_(min=1).float()
        # torch's fused optimizers divide the gradient by one, and do nothing if the other is 1.
        self._optimizer.grad_scale, self._optimizer.found_inf = scale, skips  # type: ignore[attr-defined]
        self._backend.step(self._optimizer)
        num_sources = 0 if source_sums is None else len(source_sums)
        return Update(torch.cat([sums, torch.stack([skips.double(), own_broken])]), num_sources)


class _Flat:
    """Stages 0 to 2: gradients are reduced into a flat one.

    Args:
        engine: DeepSpeed's.
        groups: Of the optimizer.
        accumulation: Micro batches of a step.
        every_micro_batch: See `GradientReducer`.
        phases: See `GradientReducer`.
    """

    def __init__(
        self,
        engine: Any,
        groups: Sequence[FlatGroup],
        accumulation: int,
        every_micro_batch: bool,
        phases: Phases,
    ) -> None:
        # They do nothing at these stages, and would be compiled with the network.
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        self.network = engine.module
        self._reducer = GradientReducer(groups, every_micro_batch, phases)
        self._gradients: list[Tensor] = []  # of the kept interval of each group
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        # Of a micro batch's loss in the mean over micro batches and ranks.
        device = next(engine.module.parameters()).device
        self._weight = torch.full((), 1 / (accumulation * self._world_size), device=device)

    def backward(self, loss: Tensor, is_first: bool, is_last: bool) -> None:
        """See `Backend.backward`."""
        self._reducer.begin(is_first, is_last)
        loss.backward(self._weight)
        self._reducer.finish()

    def close(self) -> None:
        """See `Backend.close`."""
        self._reducer.close()


class Replicated(_Flat):
    """Stage 0: every rank has all gradients and updates all weights.

    Args:
        engine: DeepSpeed's.
        accumulation: Micro batches of a step.
        phases: Count the time of waiting for other ranks.
    """

    def __init__(self, engine: Any, accumulation: int, phases: Phases) -> None:
        self._groups = [list(group["params"]) for group in engine.optimizer.param_groups]
        self._sizes = [[parameter.numel() for parameter in group] for group in self._groups]
        groups = [
            FlatGroup(group, 0, sum(sizes))
            for group, sizes in zip(self._groups, self._sizes, strict=True)
        ]
        super().__init__(engine, groups, accumulation, False, phases)

    def squared_norm(self) -> Tensor:
        """See `Backend.squared_norm`."""
        self._gradients, squares = self._reducer.take()
        return squares / self._world_size

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Backend.step`."""
        for group, sizes, flat in zip(self._groups, self._sizes, self._gradients, strict=True):
            for parameter, part in zip(group, flat.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
        optimizer.step()
        for parameter in itertools.chain(*self._groups):
            parameter.grad = None
        self._gradients = []


class Partitioned(_Flat):
    """Stages 1 and 2: every rank updates its part of float32 copies of the weights.

    Args:
        engine: DeepSpeed's.
        accumulation: Micro batches of a step.
        stage: 1 or 2.
    """

    def __init__(self, engine: Any, accumulation: int, stage: int, phases: Phases) -> None:
        self._zero, rank = engine.optimizer, dist.get_rank()
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        self._zero._grad_acc_hooks.clear()
        groups = [
            FlatGroup(parameters, rank * size, (rank + 1) * size)
            for parameters, size in zip(
                self._zero.round_robin_bit16_groups, self._zero.partition_size, strict=True
            )
        ]
        super().__init__(engine, groups, accumulation, stage == 2, phases)

    def squared_norm(self) -> Tensor:
        """See `Backend.squared_norm`."""
        self._gradients, squares = self._reducer.take()
        return squares

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Backend.step`."""
        masters, rank = self._zero.single_partition_of_fp32_groups, self._rank
        for master, gradient in zip(masters, self._gradients, strict=True):
            master.grad = gradient
        optimizer.step()
        self._zero._lazy_init_hp_params_optimizer_state()
        for master in masters:
            master.grad = None
        self._gradients = []
        parts = [partitions[rank] for partitions in self._zero.parallel_partitioned_bit16_groups]
        torch._foreach_copy_(parts, [m.detach() for m in masters])  # type: ignore[reportPrivateImportUsage]
        if self._world_size > 1:
            pending = [
                dist.all_gather_into_tensor(whole, part, async_op=True)
                for whole, part in zip(self._zero.bit16_groups_flat, parts, strict=True)
            ]
            for work in pending:
                work.wait()  # type: ignore[union-attr]


class Gathered:
    """Stage 3: weights are gathered when a module runs, by DeepSpeed.

    DeepSpeed 0.19 computes norms parameter by parameter in float64 and reads them whatever its
    settings say, so its step is taken apart here: the same methods, without the checks.

    Args:
        engine: DeepSpeed's.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self.network = engine

    def backward(self, loss: Tensor, is_first: bool, is_last: bool) -> None:
        """See `Backend.backward`."""
        self._engine.backward(loss)
        if not is_last:
            self._engine.step()  # only closes the micro batch

    def squared_norm(self) -> Tensor:
        """See `Backend.squared_norm`."""
        parts = self._zero.grad_partitions_flat_buffer.split(_SQUARED_TOGETHER)
        norms = torch._foreach_norm(parts, dtype=torch.float32)  # type: ignore[reportPrivateImportUsage]
        return torch.stack(norms).double().square_().sum()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Backend.step`; the optimizer is DeepSpeed's as well."""
        zero = self._zero
        zero._pre_step()
        zero._partition_all_parameters()
        zero.zero_grad()
        for number in range(len(zero.fp16_groups)):
            zero._prepare_fp32_grad_for_sub_group(number)
            zero._optimizer_step(number)
            zero._reassign_or_swap_out_partitioned_parameters(number)
            zero._release_sub_group(number, set())
        zero._post_step(set())
        self._engine.micro_steps += 1

    def close(self) -> None:
        """See `Backend.close`."""
