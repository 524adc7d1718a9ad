"""Linear layers by convolution compute what linear layers compute, and by the right library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from svfap_dist.model import layers


@pytest.mark.parametrize("images", [1, 5])
def test_a_convolution_is_a_linear_layer_with_the_same_gradients(images: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(3, 7), torch.randn(3)
    slope = torch.randn(2, 5, 3)

    def same(x: Tensor, *others: Tensor) -> None:
        inputs = [t.requires_grad_() for t in (x, *others)]
        got = layers._linear_by_convolution(x, weight, bias if len(inputs) > 2 else None, images)
        wanted = F.linear(*inputs)
        assert got.is_contiguous()
        assert_close(got, wanted)
        assert_close(
            torch.autograd.grad(got, inputs, slope), torch.autograd.grad(wanted, inputs, slope)
        )

    same(x, weight, bias)
    same(x, weight)


@pytest.fixture
def convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_CONVOLUTIONS", True)


@pytest.mark.usefixtures("convolutions")
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (255,), (256,), (2, 157), (313,), (4, 65)])
def test_any_number_of_rows_is_taken(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*shape, 9), torch.randn(5, 9), torch.randn(5)
    assert_close(layers.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.usefixtures("convolutions")
def test_other_types_and_strides_are_taken() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 5, 7), torch.randn(3, 7)
    half = x.bfloat16(), weight.bfloat16()
    assert torch.equal(layers.linear(*half), F.linear(*half))
    assert_close(layers.linear(x[:, 1:], weight), F.linear(x[:, 1:], weight))


@pytest.mark.parametrize(
    ("rows", "images"), [(0, 0), (255, 0), (256, 16), (312, 24), (313, 1), (12544, 16), (589, 19)]
)
def test_rows_are_laid_into_sixteen_images_or_more(rows: int, images: int) -> None:
    assert layers._num_images(rows) == images


@pytest.mark.skipif(not layers._prefers_convolutions(), reason="a CPU whose MKL is quick")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_quick_library_does_it(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = torch.randn(4, 80, 32, requires_grad=True), torch.randn(64, 32)
        weight.requires_grad_()
        with torch.profiler.profile() as profile:
            layers.linear(x, weight).sum().backward()
    finally:
        torch.set_num_threads(before)
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names, names
    assert not names & {"aten::_slow_conv2d_forward", "aten::addmm", "aten::mm"}, names


@pytest.mark.parametrize(
    ("capability", "onednn", "cpuinfo", "wanted"),
    [
        ("AVX512", True, "vendor_id : AuthenticAMD", True),
        ("AVX512_VNNI", True, "vendor_id : AuthenticAMD", True),
        ("AVX512", True, "vendor_id : GenuineIntel", False),
        ("AVX512", False, "vendor_id : AuthenticAMD", False),
        ("AVX2", True, "vendor_id : AuthenticAMD", False),
        ("DEFAULT", True, "vendor_id : AuthenticAMD", False),
        ("AVX512", True, None, False),  # a system without /proc
    ],
)
def test_which_cpus_prefer_convolutions(
    capability: str,
    onednn: bool,
    cpuinfo: str | None,
    wanted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(path: Path) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(Path, "read_text", read)
    assert layers._prefers_convolutions() is wanted


def test_convolutions_can_be_switched_off() -> None:
    layers.use_convolutions(False)
    try:
        assert not layers.uses_convolutions()
    finally:
        layers.use_convolutions(True)
    assert layers.uses_convolutions() is layers._prefers_convolutions()


@pytest.mark.usefixtures("convolutions")
def test_compiled_programs_have_no_convolutions() -> None:
    called: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, weight = torch.randn(320, 8), torch.randn(4, 8)
    torch.compile(layers.linear, backend=compiler, dynamic=False)(x, weight)
    assert any("linear" in name for name in called), called
    assert not any("conv" in name for name in called), called
