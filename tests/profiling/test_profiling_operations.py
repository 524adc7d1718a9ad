from __future__ import annotations

import torch

from svfap_dist.profiling.operations import counted

CPU = torch.device("cpu")


def test_operations_of_forward_backward_and_optimizer_are_counted_without_views() -> None:
    layer = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with counted(CPU) as found:
        layer(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    expected = {"ones": 1, "addmm": 1, "sum": 2, "ones_like": 1, "mm": 1, "_foreach_add_": 1}
    assert {name: found.launched[name] for name in expected} == expected
    assert found.launched["_fused_adamw_"] == 1
    assert not {"t", "view", "expand", "detach"} & found.launched.keys()
    assert not found.waits


def test_every_read_of_a_result_is_a_wait() -> None:
    with counted(CPU) as found:
        value = torch.ones(2).sum()
        if value > 1:
            value.item()
        float(value)
        value.tolist()
    assert found.waits["_local_scalar_dense"] == 3
    assert found.waits["tolist"] == 1
    with counted(CPU) as found:
        torch.ones(2).sum()
    assert not found.waits
