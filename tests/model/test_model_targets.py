"""Targets against a slow oracle, the loss, and the way back to pictures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svfap_dist.model import patches
from svfap_dist.model.sizes import resolve

Tubes = Callable[..., tuple[Tensor, Tensor]]
SIZE = resolve("nano", {"num_frames": 4, "frame_size": 64, "stage_depths": (1,)})


@pytest.fixture
def frames() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (2, 4, 64, 64, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def clips(frames: Tensor) -> Tensor:
    return patches.normalize(frames)


def _target_of_one_patch(clip: Tensor, token: int) -> Tensor:
    """Standardized pixels of one patch of a [0, 1] clip [3, 4, 64, 64], number by number."""
    t, patch = divmod(token, 16)
    row, column = divmod(patch, 4)
    values = torch.empty(2, 16, 16, 3)
    for channel in range(3):
        rows = slice(16 * row, 16 * row + 16)
        columns = slice(16 * column, 16 * column + 16)
        pixels = clip[channel, 2 * t : 2 * t + 2, rows, columns].double()
        mean = pixels.sum() / 512
        variance = (pixels - mean).square().sum() / 511
        values[..., channel] = ((pixels - mean) / (variance.sqrt() + 1e-6)).float()
    return values.flatten()


@pytest.mark.parametrize("given", ["clips", "frames"])
def test_targets_equal_the_slow_oracle(
    given: str, clips: Tensor, frames: Tensor, tubes: Tubes
) -> None:
    _, masked = tubes(SIZE, 2, 3)
    target = patches.targets(clips if given == "clips" else frames, masked)
    assert target.shape == (2, 2 * 13, 1536)
    pixels = patches.denormalize(clips)
    for b in range(2):
        for m in range(masked.shape[1]):
            expected = _target_of_one_patch(pixels[b], int(masked[b, m]))
            torch.testing.assert_close(target[b, m], expected, atol=2e-4, rtol=1e-4)


def test_a_flat_patch_has_a_finite_target(tubes: Tubes) -> None:
    _, masked = tubes(SIZE, 1, 3)
    target = patches.targets(torch.zeros(1, 3, 4, 64, 64), masked)
    assert target.isfinite().all()
    assert target.abs().max() < 1  # rounding noise over 1e-6, not a texture


def test_a_flat_patch_of_frames_has_no_texture(tubes: Tubes) -> None:
    _, masked = tubes(SIZE, 1, 3)
    frames = torch.full((1, 4, 64, 64, 3), 77, dtype=torch.uint8)
    assert (patches.targets(frames, masked) == 0).all()


def test_targets_leave_the_frames_as_they_are(frames: Tensor, clips: Tensor, tubes: Tubes) -> None:
    _, masked = tubes(SIZE, 2, 3)
    for given in (frames, clips):
        before = given.clone()
        patches.targets(given, masked)
        assert torch.equal(given, before)


def test_loss_is_the_mean_square_in_float32() -> None:
    prediction, target = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    expected = (prediction - target).square().sum() / 120
    torch.testing.assert_close(patches.masked_patch_loss(prediction, target), expected)
    narrow = prediction.bfloat16(), target.bfloat16()
    each = patches.losses_of_clips(*narrow)
    assert each.dtype == torch.float32
    torch.testing.assert_close(each.mean(), patches.masked_patch_loss(*narrow))
    rough = patches.masked_patch_loss(prediction.bfloat16(), target)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize(
    ("dtype", "target_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_loss_has_the_bits_of_torchs_and_keeps_no_copies(
    dtype: torch.dtype, target_dtype: torch.dtype, scale: float
) -> None:
    prediction = torch.randn(3, 37, 96).to(dtype).requires_grad_()
    target = torch.randn(3, 37, 96).to(target_dtype)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = patches.masked_patch_loss(prediction, target)
    (gradient,) = torch.autograd.grad(scale * found, prediction)
    expected = F.mse_loss(prediction.float(), target.float())
    (expected_gradient,) = torch.autograd.grad(scale * expected, prediction)
    assert torch.equal(found, expected)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient)
    assert {tensor.data_ptr() for tensor in kept} == {prediction.data_ptr(), target.data_ptr()}


def test_perfect_predictions_give_the_original_picture(clips: Tensor, tubes: Tubes) -> None:
    _, masked = tubes(SIZE, 2, 3)
    pixels = patches.to_pixels(patches.targets(clips, masked), clips, masked)
    torch.testing.assert_close(patches.paste(pixels, clips, masked), patches.denormalize(clips))


def test_a_zero_prediction_is_each_patchs_mean_color(clips: Tensor, tubes: Tubes) -> None:
    _, masked = tubes(SIZE, 2, 3)
    pixels = patches.to_pixels(torch.zeros(2, 26, 1536), clips, masked).unflatten(2, (512, 3))
    original = patches.patchify(patches.denormalize(clips))
    for b in range(2):
        means = original[b, masked[b]].unflatten(1, (512, 3)).mean(1, keepdim=True)
        torch.testing.assert_close(pixels[b], means.expand(-1, 512, -1))


def test_pictures_stay_within_black_and_white(clips: Tensor, tubes: Tubes) -> None:
    _, masked = tubes(SIZE, 2, 3)
    pixels = patches.to_pixels(100 * torch.randn(2, 26, 1536), clips, masked)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_paste_touches_masked_places_only(clips: Tensor, tubes: Tubes) -> None:
    visible, masked = tubes(SIZE, 2, 3)
    pasted = patches.paste(torch.full((2, 26, 1536), 0.5), clips, masked)
    assert pasted.shape == clips.shape
    assert (patches._gather_patches(pasted, masked) == 0.5).all()
    original = patches.denormalize(clips)
    assert torch.equal(
        patches._gather_patches(pasted, visible), patches._gather_patches(original, visible)
    )
