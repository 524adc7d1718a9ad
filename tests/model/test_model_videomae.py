"""The vanilla ViT is VideoMAE's: equal outputs with Hugging Face's implementation, both ways in.

Its networks get random weights, are written down in the layout that VideoMAE's authors release, and
come back through the import of such weights. Their size is that of ViT-B, counted without running.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)

from svfap_dist.errors import CheckpointError
from svfap_dist.model import autoencoder, classifier, patches
from svfap_dist.model.convert import import_official

Tubes = Callable[..., tuple[Tensor, Tensor]]

# Names of parts in Hugging Face's network, and in the released layout.
_BLOCK = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_OTHERS = {
    "videomae.embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
    "videomae.layernorm": "encoder.norm",
    "decoder.norm": "decoder.norm",
    "decoder.head": "decoder.head",
    "fc_norm": "encoder.fc_norm",
    "classifier": "encoder.head",
}


def _config(**changes: object) -> VideoMAEConfig:
    return VideoMAEConfig(
        **{
            "image_size": 64,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 128,
            "layer_norm_eps": 1e-6,
            **changes,
        }
    )


def _randomised(model: nn.Module) -> nn.Module:
    """Random values everywhere, and the released code's LayerNorm everywhere."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        nn.init.normal_(parameter, std=fan_in**-0.5)
    return model.eval()


def _released_layout(model: nn.Module) -> dict[str, Tensor]:
    """The state of a Hugging Face network as VideoMAE's authors would have released it."""
    theirs, released = dict(model.state_dict()), {}
    for stem, count in (("videomae.encoder.layer", 3), ("decoder.decoder_layers", 2)):
        for number in range(count):
            name = f"{stem}.{number}"
            if f"{name}.layernorm_before.weight" not in theirs:
                continue
            ours = f"{'encoder' if 'videomae' in stem else 'decoder'}.blocks.{number}"
            parts = [f"{name}.attention.attention.{part}" for part in ("query", "key", "value")]
            released[f"{ours}.attn.qkv.weight"] = torch.cat(
                [theirs.pop(f"{part}.weight") for part in parts]
            )
            released[f"{ours}.attn.q_bias"] = theirs.pop(f"{parts[0]}.bias")
            released[f"{ours}.attn.v_bias"] = theirs.pop(f"{parts[2]}.bias")
            for part, our_part in _BLOCK.items():
                for kind in ("weight", "bias"):
                    value = theirs.pop(f"{name}.{part}.{kind}")
                    released[f"{ours}.{our_part}.{kind}"] = value
    for name, value in theirs.items():
        module, _, kind = name.rpartition(".")
        released[f"{_OTHERS[module]}.{kind}" if module in _OTHERS else name] = value
    return released


def _masks(visible: Tensor, num_tokens: int) -> Tensor:
    """Boolean, True where masked, as Hugging Face wants it."""
    return torch.ones(len(visible), num_tokens, dtype=torch.bool).scatter(1, visible, False)


@torch.no_grad()
def test_pre_training_equals_hugging_face(tubes: Tubes) -> None:
    theirs = _randomised(VideoMAEForPreTraining(_config(use_mean_pooling=False)))
    build, state = import_official(
        _released_layout(theirs), num_heads=4, stage_depths=(3,), decoder_num_heads=2, frame_size=64
    )
    ours = autoencoder.build(**build)
    ours.load_state_dict(state)
    clips = torch.randn(2, 3, 16, 64, 64)
    visible, masked = tubes(ours.size, 2, 3)
    expected = theirs(clips.transpose(1, 2), _masks(visible, ours.size.num_tokens))
    prediction = ours(clips, visible, masked)
    torch.testing.assert_close(prediction, expected.logits, atol=1e-5, rtol=1e-5)
    error = patches.masked_patch_loss(prediction, patches.targets(clips, masked))
    torch.testing.assert_close(error, expected.loss, atol=1e-5, rtol=1e-5)
    assert prediction.std() > 0.1


@torch.no_grad()
def test_the_encoder_equals_hugging_face_with_a_mask_and_without(tubes: Tubes) -> None:
    theirs = _randomised(VideoMAEForVideoClassification(_config(num_labels=5)))
    build, state = import_official(
        _released_layout(theirs), num_heads=4, stage_depths=(3,), frame_size=64
    )
    ours = classifier.build(**build)
    ours.load_state_dict(state)
    encoder: VideoMAEModel = theirs.videomae
    clips = torch.randn(2, 3, 16, 64, 64)
    visible, _ = tubes(ours.size, 2, 3)
    masks = _masks(visible, ours.size.num_tokens)
    for tokens, expected in (
        (ours.encoder(clips, visible), encoder(clips.transpose(1, 2), masks)),
        (ours.encoder(clips), encoder(clips.transpose(1, 2))),
    ):
        assert len(tokens) == 1
        torch.testing.assert_close(tokens[0], expected.last_hidden_state, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_classifier_equals_hugging_face() -> None:
    theirs = _randomised(VideoMAEForVideoClassification(_config(num_labels=5)))
    build, state = import_official(
        _released_layout(theirs), num_heads=4, stage_depths=(3,), frame_size=64
    )
    assert (build["encoder"], build["num_outputs"], build["stage_depths"]) == ("vit", 5, (3,))
    ours = classifier.build(**build)
    ours.load_state_dict(state)
    clips = torch.randn(2, 3, 16, 64, 64)
    expected = theirs(clips.transpose(1, 2)).logits
    torch.testing.assert_close(ours(clips), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.1


def test_a_network_without_mean_pooling_is_refused() -> None:
    """It would score clips by their first token, which our networks do not."""
    theirs = VideoMAEForVideoClassification(_config(num_labels=5))
    state = _released_layout(theirs)
    for kind in ("weight", "bias"):
        state[f"encoder.norm.{kind}"] = state.pop(f"encoder.fc_norm.{kind}")
    with pytest.raises(CheckpointError, match=r"missing fc_norm.*extra norm.*without mean pooling"):
        import_official(state, num_heads=4, stage_depths=(3,), frame_size=64)


def test_vit_base_is_as_large_as_the_paper_says() -> None:
    with torch.device("meta"):
        model = classifier.build("base", 7, encoder="vit")
        clips = torch.empty(1, 3, 16, 160, 160)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(clips)
    assert parameters == pytest.approx(86.2e6, rel=0.005)
    assert counter.get_total_flops() / 2 == pytest.approx(80.7e9, rel=0.005)
