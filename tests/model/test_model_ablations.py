"""Every ablation of the paper is one override of a recipe, and the guards hold for each of them."""

from __future__ import annotations

import pytest
import torch
from model_guards import Batch, leaks, misplaced, without_gradient

from svfap_dist.config import Config, recipe
from svfap_dist.data import masking
from svfap_dist.errors import ConfigError
from svfap_dist.model import autoencoder, classifier, patches
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.model.encoder import Encoder, TemporalPool
from svfap_dist.model.layers import Block
from svfap_dist.model.sizes import resolve
from svfap_dist.rng import Stream
from svfap_dist.train.objective import build_arguments

NANO = ("model.size=nano", "model.patch_size=16", "data.num_frames=16")
NANO += ("data.frame_size=64", "mask.ratio=0.75")
ABLATIONS = [
    "model.num_bottleneck_tokens=1",
    "model.num_bottleneck_tokens=[4,2]",
    "model.temporal_downsampling=average",
    "model.temporal_downsampling=max",
    "model.temporal_kernel_size=1",
    "model.stage_depths=[3,1]",
    "model.stage_depths=[1,1,1,1]",
    "model.stage_depths=[2]",
    "model.pyramid=false",
    "model.bottleneck=false",
    "model.fusion=false",
    "model.embed_dim=48",
    "model.num_heads=4",
    "model.decoder_depth=2",
    "model.decoder_embed_dim=32",
    "model.encoder=vit",
    "model.tubelet_size=1",
    "model.tubelet_size=4",
    "model.patch_size=8",
    "mask.ratio=0.5",
    "mask.kind=random",
    "mask.decoder_ratio=0.5",
    "data.num_frames=8",
    "data.num_frames=32",
    "data.frame_size=112",
    "data.frame_size=160",
    "data.frame_size=224",
]
COMBINATIONS = [
    "model.stage_depths=[2,2] model.temporal_kernel_size=4",
    "model.pyramid=false model.bottleneck=false",
    "model.pyramid=false model.fusion=false model.temporal_downsampling=max",
    "model.bottleneck=false model.fusion=false",
    "model.encoder=vit mask.kind=random",
    "model.encoder=vit mask.kind=frame",
    "model.pyramid=false mask.kind=frame",
    "mask.kind=frame mask.ratio=0.5",
    "mask.kind=frame mask.ratio=0.25 data.num_frames=32",
    "model.fusion=false mask.kind=random",
    "mask.decoder_ratio=0.25 data.frame_size=112",
]


def _model_and_batch(config: Config) -> tuple[MaskedAutoencoder, Batch]:
    """The recipe's model, and two clips of noise masked as the recipe says."""
    torch.manual_seed(0)
    model = autoencoder.build(**build_arguments(config))
    side = config.data.frame_size
    clips = torch.randn(2, 3, config.data.num_frames, side, side)
    splits = [
        masking.split_tokens(
            Stream("mask", clip), config.mask, config.num_tubelets, config.num_patches
        )
        for clip in range(2)
    ]
    return model, (
        clips,
        torch.stack([torch.from_numpy(split.visible) for split in splits]),
        torch.stack([torch.from_numpy(split.masked) for split in splits]),
    )


@pytest.fixture(scope="module")
def unchanged() -> tuple[dict[str, torch.Size], torch.Tensor]:
    """Shapes of the state and the prediction of the recipe without an override."""
    model, batch = _model_and_batch(recipe.load("tiny_cpu", NANO))
    return {name: value.shape for name, value in model.state_dict().items()}, model(*batch)


@pytest.mark.parametrize("overrides", [*ABLATIONS, *COMBINATIONS])
def test_an_ablation_trains_and_keeps_the_guards(overrides: str, unchanged) -> None:
    config = recipe.load("tiny_cpu", [*NANO, *overrides.split()])
    model, batch = _model_and_batch(config)
    clips, _, masked = batch
    prediction = model(*batch)
    size = model.size
    target = patches.targets(clips, masked, size.patch)
    assert prediction.shape == target.shape
    assert prediction.isfinite().all()
    # The override is not ignored: another network, another mask or another result.
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    same_prediction = prediction.shape == unchanged[1].shape and prediction.equal(unchanged[1])
    assert shapes != unchanged[0] or not same_prediction
    assert not leaks(model, batch)
    assert without_gradient(model, batch) == []
    assert misplaced(model, batch) == set()


@pytest.mark.parametrize(
    "overrides", [a for a in ABLATIONS if a.startswith("model.") and "decoder" not in a]
)
def test_a_classifier_takes_the_encoder_of_each(overrides: str) -> None:
    config = recipe.load("tiny_cpu", [*NANO, *overrides.split()])
    arguments = build_arguments(config)
    pretrained = autoencoder.build(**arguments)
    model = classifier.build(num_outputs=3, **arguments)
    model.load_encoder(pretrained.state_dict())
    clips = torch.randn(1, 3, 16, 64, 64)
    assert torch.equal(model.encoder(clips)[-1], pretrained.encoder(clips)[-1])
    assert model(clips).shape == (1, 3)


def test_a_classifier_sees_all_frames_after_pre_training_on_some() -> None:
    config = recipe.load("tiny_cpu", [*NANO, "mask.kind=frame", "mask.ratio=0.5"])
    model = classifier.build(num_outputs=3, **build_arguments(config))
    stages = model.encoder(torch.randn(1, 3, 16, 64, 64))
    assert [stage.shape[1] for stage in stages] == [8 * 16, 4 * 16, 2 * 16]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("mask.kind=frame", r"mask.ratio.*2 of 8 tubelet frames visible.*merge 4"),
        ("mask.kind=frame mask.ratio=0.95", r"must mask some of 8 tubelet frames"),
        ("model.encoder=vit model.stage_depths=[2,2]", "vit has at most 1 stage"),
        ("model.num_bottleneck_tokens=[4,2,1]", "one number for each stage but the first, 2"),
        ("model.num_bottleneck_tokens=[]", "model.num_bottleneck_tokens.*per stage"),
        ("model.num_bottleneck_tokens=0", "model.num_bottleneck_tokens in.*greater than 0"),
        ("model.temporal_downsampling=mean", "'conv', 'average' or 'max'"),
        ("model.data.num_frames=8 model.tubelet_size=4 data.num_frames=8", "model.data"),
        ("model.tubelet_size=4 data.num_frames=8", "2 tubelet frames cannot be merged by 2"),
        ("mask.decoder_ratio=0.3", "mask.decoder_ratio.*multiple of 0.25"),
        ("mask.decoder_ratio=0.5 mask.kind=random", "mask.decoder_ratio.*not random and 8"),
        ("mask.decoder_ratio=0.5 model.tubelet_size=8", "mask.decoder_ratio.*not tube and 2"),
        ("data.repeated_sampling=3", "data.repeated_sampling = 3 must divide"),
    ],
)
def test_what_does_not_fit_is_refused(overrides: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _model_and_batch(recipe.load("tiny_cpu", [*NANO, *overrides.split()]))


@pytest.mark.parametrize("kind", ["average", "max"])
def test_pooling_over_time_is_what_its_name_says(kind: str) -> None:
    x = torch.randn(2, 6, 5, 4)
    pooled = TemporalPool(kind, 3)(x)
    for t in range(2):
        group = torch.stack([x[:, 3 * t + k] for k in range(3)])
        expected = group.mean(0) if kind == "average" else group.max(0).values
        torch.testing.assert_close(pooled[:, t], expected)


def test_without_pyramid_every_stage_has_all_tubelet_frames() -> None:
    encoder = Encoder(resolve("nano", {"frame_size": 32, "pyramid": False}))
    stages = encoder(torch.randn(1, 3, 16, 32, 32))
    assert [stage.shape[1] for stage in stages] == [8 * 4] * 3
    assert not any("temporal" in name for name in encoder.state_dict())


def test_without_bottleneck_all_blocks_are_standard_ones() -> None:
    encoder = Encoder(resolve("nano", {"frame_size": 32, "bottleneck": False}))
    assert all(type(block) is Block for block in encoder.blocks)
    assert not any("spatial" in name or "cross" in name for name in encoder.state_dict())
    clips = torch.randn(1, 3, 16, 32, 32)
    first, second, _ = encoder(clips)
    x = encoder.temporal_downsamples[0](first.unflatten(1, (8, 4))).flatten(1, 2)
    torch.testing.assert_close(second, encoder.blocks[3](encoder.blocks[2](x)))


def test_without_pyramid_and_bottleneck_it_is_a_vit() -> None:
    """The same blocks in one stage or in three are the same network."""
    torch.manual_seed(0)
    ablated = Encoder(resolve("nano", {"frame_size": 32, "pyramid": False, "bottleneck": False}))
    vit = Encoder(resolve("nano", {"frame_size": 32, "encoder": "vit", "stage_depths": (6,)}))
    vit.load_state_dict(ablated.state_dict())
    clips = torch.randn(1, 3, 16, 32, 32)
    assert torch.equal(vit(clips)[-1], ablated(clips)[-1])


def test_without_fusion_the_decoder_gets_the_last_stage_alone() -> None:
    torch.manual_seed(0)
    model = autoencoder.build("nano", frame_size=32, fusion=False)
    stages = [torch.randn(1, frames * 3, 32) for frames in (8, 4, 2)]
    fused = model.fusion(stages)
    last = model.fusion.norm(stages[-1])
    for t in range(8):
        expected = last[:, t // 4 * 3 : t // 4 * 3 + 3]
        torch.testing.assert_close(fused[:, 3 * t : 3 * t + 3], expected)


def test_bottleneck_tokens_may_differ_between_stages() -> None:
    encoder = Encoder(resolve("nano", {"frame_size": 32, "num_bottleneck_tokens": [5, 3]}))
    assert [part.mlp.fc2.out_features for part in encoder.spatial_downsamples] == [5, 3]
