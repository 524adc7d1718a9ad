"""The assembled networks: shapes, precisions, decoder, classifier, and no look at the data."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svfap_dist.errors import CheckpointError
from svfap_dist.model import autoencoder, classifier, patches

Tubes = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize(
    ("overrides", "visible_per_frame"),
    [
        ({}, 10),
        ({"frame_size": 96}, 4),
        ({"num_frames": 8, "tubelet_size": 1, "patch_size": 8, "frame_size": 32}, 2),
        ({"stage_depths": [1], "num_frames": 2, "frame_size": 32}, 1),
    ],
)
def test_predictions_are_one_per_masked_patch(
    overrides: dict[str, object], visible_per_frame: int, tubes: Tubes
) -> None:
    model = autoencoder.build("nano", **overrides)
    size = model.size
    visible, masked = tubes(size, 2, visible_per_frame)
    clips = torch.randn(2, 3, size.num_frames, size.frame_size, size.frame_size)
    prediction = model(clips, visible, masked)
    target = patches.targets(clips, masked, size.patch)
    assert prediction.shape == target.shape == (2, masked.shape[1], size.patch_dim)


@pytest.mark.parametrize("with_buffers", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_computes_in_the_type_of_its_weights(
    dtype: torch.dtype, with_buffers: bool, tubes: Tubes
) -> None:
    torch.manual_seed(0)
    single = autoencoder.build("nano", frame_size=32)
    visible, masked = tubes(single.size, 2, 2)
    clips = torch.randn(2, 3, 16, 32, 32)  # float32, whatever the weights
    expected = single(clips, visible, masked)
    model = copy.deepcopy(single).to(dtype) if with_buffers else single
    for parameter in model.parameters():  # DeepSpeed casts these alone
        parameter.data = parameter.data.to(dtype)
    prediction = model(clips, visible, masked)
    assert prediction.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(prediction.float(), expected, atol=tolerance, rtol=tolerance)


def test_no_step_looks_at_the_data() -> None:
    """Meta tensors have no data: a host synchronisation would raise here."""
    with torch.device("meta"):
        model = autoencoder.build("nano")
        frames = torch.empty(2, 16, 160, 160, 3, dtype=torch.uint8)
        visible = torch.empty(2, 80, dtype=torch.int64)
        masked = torch.empty(2, 720, dtype=torch.int64)
        for given in (frames, patches.normalize(frames)):
            target = patches.targets(given, masked)
            patches.masked_patch_loss(model(given, visible, masked), target).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_prediction_depends_on_its_place_and_not_on_its_rank(tubes: Tubes) -> None:
    torch.manual_seed(0)
    model = autoencoder.build("nano", frame_size=64).double()
    visible, masked = tubes(model.size, 1, 4)
    clips = torch.randn(1, 3, 16, 64, 64, dtype=torch.float64)
    reverse = masked.flip(1)
    prediction, reversed_prediction = (model(clips, visible, m) for m in (masked, reverse))
    torch.testing.assert_close(reversed_prediction, prediction.flip(1))
    assert not torch.allclose(prediction[:, 0], prediction[:, 1])


def test_classifier_pools_the_last_stage() -> None:
    torch.manual_seed(0)
    model = classifier.build("nano", 5, frame_size=64).eval()
    clips = torch.randn(3, 3, 16, 64, 64)
    last = model.encoder(clips)[-1]
    assert last.shape == (3, 2 * 16, 32)
    expected = model.head(model.fc_norm(last.mean(1)))
    torch.testing.assert_close(model(clips), expected)
    assert model(clips).shape == (3, 5)


def test_first_scores_are_nearly_equal() -> None:
    torch.manual_seed(0)
    model = classifier.build("nano", 7, frame_size=32)
    assert model(torch.randn(2, 3, 16, 32, 32)).abs().max() < 0.02
    assert not model.head.bias.any()


def test_classifier_takes_the_pre_trained_encoder() -> None:
    torch.manual_seed(0)
    pretrained = autoencoder.build("nano", frame_size=32)
    model = classifier.build("nano", 7, frame_size=32)
    model.load_encoder(pretrained.state_dict())
    clips = torch.randn(1, 3, 16, 32, 32)
    assert torch.equal(model.encoder(clips)[-1], pretrained.encoder(clips)[-1])


def test_classifier_refuses_the_encoder_of_another_size() -> None:
    pretrained = autoencoder.build("nano", frame_size=32, embed_dim=64)
    model = classifier.build("nano", 7, frame_size=32)
    with pytest.raises(CheckpointError, match="size mismatch"):
        model.load_encoder(pretrained.state_dict())
    with pytest.raises(CheckpointError, match="Missing key"):
        model.load_encoder({})
