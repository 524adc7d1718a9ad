"""Operations counted on paper against torch's own counter, and the peak rates of devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from svfap_dist.model import autoencoder, classifier, flops, patches, sizes


def _counted(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    # On the meta device attention is counted as its matrix products; the counter does not know the
    # CPU's fused kernel.
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def _inputs(size: sizes.Size, visible: int, masked: int) -> tuple[torch.Tensor, ...]:
    frames = (1, 3, size.num_frames, size.frame_size, size.frame_size)
    return (
        torch.empty(frames),
        torch.empty(1, visible, dtype=torch.int64),
        torch.empty(1, masked, dtype=torch.int64),
    )


NAMES = ["nano", "tiny", "small", "base", "large"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("encoder", ["tpsbt", "vit"])
def test_pre_training_of_all_sizes(name: str, encoder: str) -> None:
    with torch.device("meta"):
        model = autoencoder.build(name, encoder=encoder)
        inputs = _inputs(model.size, 80, 720)
    counted = sum(flops.autoencoder(model.size, 80, 720).values())
    assert counted == _counted(model, *inputs)


@pytest.mark.parametrize(
    ("overrides", "visible", "masked"),
    [
        ({"num_bottleneck_tokens": (4, 16)}, 80, 720),
        ({"temporal_downsampling": "average"}, 80, 720),
        ({"pyramid": False}, 80, 720),
        ({"bottleneck": False}, 80, 720),
        ({"fusion": False}, 160, 640),
        ({"stage_depths": (3, 2), "temporal_kernel_size": 4}, 80, 720),
        ({"decoder_depth": 3, "decoder_embed_dim": 32}, 80, 360),
        ({"num_visible_tubelets": 4}, 400, 400),
    ],
)
def test_pre_training_of_ablations(overrides: dict[str, Any], visible: int, masked: int) -> None:
    with torch.device("meta"):
        model = autoencoder.build("nano", **overrides)
        inputs = _inputs(model.size, visible, masked)
    counted = sum(flops.autoencoder(model.size, visible, masked).values())
    assert counted == _counted(model, *inputs)


@pytest.mark.parametrize("name", NAMES)
def test_classifier_of_all_sizes(name: str) -> None:
    with torch.device("meta"):
        model = classifier.build(name, 7)
        clips = _inputs(model.size, 0, 0)[0]
    counted = sum(flops.classifier(model.size, 7).values())
    assert counted == _counted(model, clips)


def test_a_training_step() -> None:
    with torch.device("meta"):
        model = autoencoder.build("tiny")
        inputs = _inputs(model.size, 80, 720)
        target = torch.empty(1, 720, model.size.patch_dim)
    with FlopCounterMode(display=False) as counter:
        patches.masked_patch_loss(model(*inputs), target).backward()
    counted = flops.training_step(flops.autoencoder(model.size, 80, 720))
    assert counted == counter.get_total_flops()


def test_parts_say_where_the_work_is() -> None:
    parts = flops.autoencoder(sizes.resolve("base", {}), 80, 720)
    assert list(parts) == [
        *("patch embedding", "stage 1", "downsampling", "bottleneck", "stage 2", "stage 3"),
        *("decoder", "head"),
    ]
    assert all(parts.values())
    assert parts["patch embedding"] == 2 * 80 * 1536 * 512
    assert parts["downsampling"] == 2 * (40 + 20) * 2 * 512 * 512
    assert parts["head"] == 2 * 720 * 384 * 1536


def test_the_dense_count_is_the_papers() -> None:
    """12.9 G multiply-adds, measured on the authors' network without its leak."""
    dense = flops.dense_autoencoder(sizes.resolve("base", {}), 80, 720)
    assert sum(dense.values()) / 2 == pytest.approx(12.9e9, rel=0.005)
    lean = flops.autoencoder(sizes.resolve("base", {}), 80, 720)
    assert sum(lean.values()) < sum(dense.values())


def test_peak_rates_are_known_or_unknown() -> None:
    assert flops.peak_rate("NVIDIA H200", "bfloat16") == pytest.approx(989.4e12)
    assert flops.peak_rate("NVIDIA H200", "int4") is None
    assert flops.peak_rate("NVIDIA A10G", "bfloat16") is None  # not an A10
    assert flops.peak_rate("cpu", "float32") is None


@pytest.mark.parametrize(
    ("name", "dtype", "published"),
    [
        # NVIDIA's data sheets, TFLOP/s; halved where they give the rate with sparsity.
        ("NVIDIA B200", "bfloat16", 4500 / 2),
        ("NVIDIA H200", "bfloat16", 1979 / 2),
        ("NVIDIA H200", "tfloat32", 989 / 2),
        ("NVIDIA H200", "float32", 67),
        ("NVIDIA H200 NVL", "bfloat16", 1671 / 2),
        ("NVIDIA H200 NVL", "tfloat32", 835 / 2),
        ("NVIDIA H200 NVL", "float32", 60),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 1979 / 2),
        ("NVIDIA H100 80GB HBM3", "tfloat32", 989 / 2),
        ("NVIDIA H100 80GB HBM3", "float32", 67),
        ("NVIDIA H100 NVL", "bfloat16", 1671 / 2),
        ("NVIDIA H100 PCIe", "bfloat16", 1513 / 2),
        ("NVIDIA H100 PCIe", "tfloat32", 756 / 2),
        ("NVIDIA H100 PCIe", "float32", 51),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "tfloat32", 156),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA L40S", "tfloat32", 183),
        ("NVIDIA L40S", "float32", 91.6),
        ("NVIDIA L4", "bfloat16", 242 / 2),
        ("NVIDIA L4", "tfloat32", 120 / 2),
        ("NVIDIA L4", "float32", 30.3),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10", "tfloat32", 62.5),
        ("NVIDIA A10", "float32", 31.2),
    ],
)
def test_peak_rates_are_the_published_ones(name: str, dtype: str, published: float) -> None:
    assert flops.peak_rate(name, dtype) == pytest.approx(published * 1e12, rel=0.002)
