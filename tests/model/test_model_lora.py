"""LoRA: adapters begin without effect, train alone, and merge into the weights."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from svfap_dist.errors import ConfigError
from svfap_dist.model import classifier, lora

BUILD = {"size": "nano", "stage_depths": [1, 2], "num_frames": 4, "frame_size": 64}
LORA = {"rank": 3, "alpha": 6.0}


def adapted(scale: float = 0.0) -> classifier.Classifier:
    """A classifier whose adapters are random numbers of this size."""
    torch.manual_seed(0)
    model = classifier.build(**BUILD, num_outputs=5, head_init_scale=1.0, lora=LORA).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.up"):
                parameter.copy_(scale * torch.randn_like(parameter))
    return model


def clips() -> torch.Tensor:
    return torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("scale", "changes"), [(0.0, False), (0.3, True)])
def test_a_merged_network_computes_what_the_adapted_one_did(scale: float, changes: bool) -> None:
    model = adapted(scale)
    build, state = lora.merged({**BUILD, "num_outputs": 5, "lora": LORA}, model.state_dict())
    assert build == {**BUILD, "num_outputs": 5}
    plain = classifier.build(**build).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        assert_close(plain(clips()), model(clips()), atol=1e-5, rtol=0)
        plain.load_state_dict({n: v for n, v in model.state_dict().items() if "adapter" not in n})
        distance = (plain(clips()) - model(clips())).abs().max().item()
    assert (distance > 1e-3) is changes


def test_every_linear_layer_of_attention_and_mlp_is_adapted() -> None:
    names = {
        name.removesuffix(".adapter.up")
        for name in adapted().state_dict()
        if name.endswith(".adapter.up")
    }
    of_blocks = {
        *(f"attn.{part}" for part in ("qkv", "proj")),
        *(f"mlp.{part}" for part in ("fc1", "fc2")),
    }
    crossed = {f"cross_attn.{part}" for part in ("q", "kv", "proj")}
    expected = {f"encoder.blocks.0.{part}" for part in of_blocks}
    expected |= {f"encoder.blocks.{n}.{part}" for n in (1, 2) for part in of_blocks | crossed}
    expected |= {f"encoder.spatial_downsamples.0.mlp.{part}" for part in ("fc1", "fc2")}
    assert names == expected


def test_weights_without_adapters_begin_with_fresh_ones() -> None:
    plain = classifier.build(**BUILD, num_outputs=5)
    model = adapted(0.3)
    before = {name: v.clone() for name, v in model.state_dict().items() if "adapter" in name}
    model.load_encoder(plain.state_dict())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    name = "encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(after[name], plain.state_dict()[name])


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"finetune.lora_rank. Found: rank 128, .*takes 128"):
        classifier.build(**BUILD, num_outputs=5, lora={"rank": 128, "alpha": 1.0})
