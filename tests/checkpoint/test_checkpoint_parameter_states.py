"""Parts of parameters out of pieces; what DeepSpeed's files hold, test_train_elastic.py tests."""

from __future__ import annotations

import pytest
import torch

from svfap_dist.checkpoint.parameter_states import ParameterState


@pytest.mark.parametrize("cuts", [[10], [4, 6], [0, 3, 0, 3, 4, 0]])
@pytest.mark.parametrize(("start", "count"), [(0, 10), (0, 4), (3, 5), (9, 1), (4, 0), (10, 0)])
def test_a_part_may_span_pieces(cuts: list[int], start: int, count: int) -> None:
    state = ParameterState({"fp32": list(torch.arange(10.0).split(cuts))}, step=1)
    target = torch.full((count,), -1.0)
    state.copy_part("fp32", start, target)
    assert target.tolist() == list(range(start, start + count))


def test_a_part_beyond_the_parameter_is_refused() -> None:
    state = ParameterState({"fp32": [torch.zeros(4), torch.zeros(4)]}, step=1)
    with pytest.raises(AssertionError, match="8 elements of fp32, 9 wanted"):
        state.copy_part("fp32", 6, torch.zeros(3))
