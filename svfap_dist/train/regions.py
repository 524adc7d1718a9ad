"""Compile each kind of transformer block once, instead of the network as a whole.

Compiled as a whole, a network becomes one long program with dozens of copied blocks, which takes
minutes to compile at each start, and so after each failure. Here blocks are compiled one by one.
Blocks of the same class, shapes and options share their program, so compiling takes as long for a
deep network as for a shallow one. The small layers between the blocks are not compiled; the loss
is.

Source: "regional compilation" in PyTorch's recipes, and torchtitan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.model.layers import CheckpointedBlock, DropPath

# All kinds of blocks share the code of `CheckpointedBlock.forward`, for which torch keeps at most
# this many programs (8 by default) and compiles no more. A network of three stages needs seven for
# training, seven for evaluation, and seven for its smaller last batch.
_MOST_PROGRAMS = 128


def compile_blocks(model: nn.Module, mode: str) -> None:
    """Compile each block of a network in place; the names of its weights stay.

    Args:
        model: Network on its device. Hooks on its blocks stay outside the programs.
        mode: Of torch.compile.
    """
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, _MOST_PROGRAMS)
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, DropPath):
            # Rates differ by block; each Python number would need a program of its own.
            module.rate = torch.tensor(float(module.rate), device=device)
    for block in _blocks(model):
        # Static shapes: there are few, so compiling a program for each pays off.
        block.forward = torch.compile(block.forward, dynamic=False, mode=mode)


def compiled_loss(loss: Callable[..., Any], network: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a function of the inputs: the loss, compiled but for the network inside.

    Args:
        loss: Of a network and inputs; see `Objective.loss`.
        network: With compiled blocks.
    """

    @torch.compiler.disable
    def call(*inputs: Tensor) -> Tensor:
        return network(*inputs)

    # Never a CUDA graph: it would first copy the prediction to its own input buffer.
    compiled = torch.compile(loss, dynamic=False)
    return lambda *inputs: compiled(call, *inputs)


def eager(network: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same network, computed without the programs of its blocks.

    Args:
        network: With compiled blocks.
    """

    def call(*inputs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return network(*inputs)

    return call


def require_gradients(model: nn.Module) -> None:
    """Make the input of each block require a gradient, even after a frozen embedding.

    At stage 3, where DeepSpeed gathers whole blocks, it takes the gradients of a block's weights as
    soon as that of its input is known; without one it takes them too early, as zeros.

    Args:
        model: Network, before DeepSpeed's engine is built.
    """
    for block in _blocks(model):
        block.register_forward_pre_hook(_require_gradient)


def _blocks(model: nn.Module) -> Iterator[CheckpointedBlock]:
    return (module for module in model.modules() if isinstance(module, CheckpointedBlock))


def _require_gradient(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    tokens, *others = inputs
    if not torch.is_grad_enabled() or tokens.requires_grad:
        return None
    return tokens.detach().requires_grad_(), *others
