"""Linear layers by convolution compute what linear layers compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from svfap_dist.model import linear


def test_a_convolution_is_a_linear_layer_with_the_same_gradients() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(3, 7), torch.randn(3)
    slope = torch.randn(2, 5, 3)
    for use_bias in (bias, None):
        inputs = [t.requires_grad_() for t in (x, weight, use_bias) if t is not None]
        got, wanted = linear.by_convolution(x, weight, use_bias), F.linear(x, weight, use_bias)
        assert got.is_contiguous()
        assert_close(got, wanted)
        assert_close(
            torch.autograd.grad(got, inputs, slope), torch.autograd.grad(wanted, inputs, slope)
        )


def test_other_types_and_strides_are_taken() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 7), torch.randn(3, 7)
    assert_close(
        linear.linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16())
    )
    assert_close(linear.by_convolution(x[:, 1:], weight), F.linear(x[:, 1:], weight))
    assert linear.by_convolution(x[0, 0], weight).shape == (3,)
