"""The size "base" has the parameters and multiply-adds measured on the authors' networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svfap_dist.model import autoencoder, classifier, sizes


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _multiply_adds(model: nn.Module, *inputs: torch.Tensor) -> float:
    # On the meta device attention is counted as its matrix products; the counter does not know the
    # CPU's fused kernel.
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2


def test_classifier_of_seven_classes() -> None:
    with torch.device("meta"):
        model = classifier.build("base", 7)
        clips = torch.empty(1, 3, 16, 160, 160)
    assert _parameters(model) == pytest.approx(77.635e6, rel=1e-5)
    assert _multiply_adds(model, clips) == pytest.approx(43.54e9, rel=0.005)


def test_pre_training() -> None:
    with torch.device("meta"):
        model = autoencoder.build("base")
        clips = torch.empty(1, 3, 16, 160, 160)
        visible = torch.empty(1, 80, dtype=torch.int64)
        masked = torch.empty(1, 720, dtype=torch.int64)
    size = model.size
    assert _parameters(model) == pytest.approx(85.5e6, rel=0.005)
    # The authors embed all patches and throw nine tenths away; here only the visible are embedded.
    thrown_away = masked.shape[1] * size.patch_dim * size.embed_dim
    # They also compute unused outputs for visible tokens in the decoder's last block: queries,
    # projection (1) and MLP (8).
    width = size.decoder_embed_dim
    thrown_away += visible.shape[1] * (2 * size.num_tokens * width + (1 + 8) * width**2)
    ours = _multiply_adds(model, clips, visible, masked)
    assert ours + thrown_away == pytest.approx(12.9e9, rel=0.005)
    assert ours == pytest.approx(12.20e9, rel=0.005)


def test_geometry_of_the_paper() -> None:
    base = sizes.resolve("base", {})
    assert (base.num_tubelets, base.patches_per_frame) == (8, 100)
    assert (base.num_tokens, base.patch_dim) == (800, 1536)


def test_sizes_grow() -> None:
    with torch.device("meta"):
        counts = [_parameters(autoencoder.build(name)) for name in sizes.ENCODERS["tpsbt"].sizes]
    assert counts == sorted(counts)
    encoder = _parameters(autoencoder.build("tiny", frame_size=96).encoder)
    assert 2e6 < encoder < 3e6
