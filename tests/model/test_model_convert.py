"""Released weights: the imported network computes what the released one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released import SMALL, SMALL_CLIP, State, released, released_forward

from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import autoencoder, classifier, convert, weights


def _imported(state: State, **overrides: object) -> classifier.Classifier:
    build, ours = convert.import_official(state, **overrides)
    model = classifier.build(**build)
    model.load_state_dict(ours)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "clip"),
    [
        ({}, {}),
        ({"depths": (1, 2), "tokens": (3,)}, {"stage_depths": (1, 2)}),
        ({"kernel": 4, "depths": (1, 3), "tokens": (5,)}, {"stage_depths": (1, 3)}),
        ({"tokens": (6, 2), "outputs": 1}, {"num_frames": 8}),
    ],
)
@torch.no_grad()
def test_the_imported_network_computes_what_the_released_one_does(
    changes: dict[str, object], clip: dict[str, object]
) -> None:
    layout = SMALL | changes
    state, overrides = released(**layout), SMALL_CLIP | clip
    model = _imported(state, **overrides)
    clips = torch.randn(3, 3, model.size.num_frames, 48, 48)
    expected = released_forward(clips, state, layout["depths"], heads=4)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(clips), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_same_at_the_released_size() -> None:
    depths = (12, 6, 3)
    state = released(width=512, depths=depths, tokens=(8, 8), kernel=2, outputs=7)
    build, _ = convert.import_official(state)
    assert build == {
        "size": "base",
        "embed_dim": 512,
        "num_heads": 8,
        "tubelet_size": 2,
        "patch_size": 16,
        "stage_depths": depths,
        "temporal_kernel_size": 2,
        "num_bottleneck_tokens": 8,
        "num_outputs": 7,
    }
    clips = torch.randn(1, 3, 16, 160, 160)
    expected = released_forward(clips, state, depths, heads=8)
    torch.testing.assert_close(_imported(state)(clips), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_oracle_sees_a_mistake_in_any_weight() -> None:
    """Each weight matters to the comparison: a swap of two would not go unnoticed."""
    state = released(**SMALL)
    clips = torch.randn(1, 3, 16, 48, 48)
    expected = released_forward(clips, state, SMALL["depths"], heads=4)
    unmoved = []
    for name, value in state.items():
        changed = state | {name: value + 0.1 * torch.randn(value.shape)}
        scores = released_forward(clips, changed, SMALL["depths"], heads=4)
        if (scores - expected).abs().max() < 1e-4:
            unmoved.append(name)
    # A constant added to all logits of a softmax changes nothing.
    assert [name for name in unmoved if not name.endswith("mlp.fc2.bias")] == []


def test_depths_are_those_of_a_named_size_or_told() -> None:
    state = released(**SMALL | {"depths": (8, 4, 2), "width": 384, "tokens": (8, 8)})
    build, _ = convert.import_official(state)
    assert (build["stage_depths"], build["num_heads"]) == ((8, 4, 2), 6)
    unknown = released(**SMALL)
    with pytest.raises(CheckpointError, match=r"2 blocks in stage 1 and 5 in 2.*--stage-depths"):
        convert.import_official(unknown, num_heads=4)
    with pytest.raises(CheckpointError, match=r"width 32.*--num-heads"):
        convert.import_official(unknown, stage_depths=(2, 3, 2))
    with pytest.raises(ConfigError, match="not a multiple of num_heads = 5"):
        convert.import_official(unknown, **SMALL_CLIP | {"num_heads": 5})


def test_the_verb_writes_a_file_that_builds_the_classifier(tmp_path: Path) -> None:
    state = released(**SMALL)
    torch.save({"model": state}, tmp_path / "released.pth")
    command = [sys.executable, "-m", "svfap_dist", "import", "released.pth", "-o", "ours"]
    options = ["--num-heads", "4", "--stage-depths", "2,3,2", "--frame-size", "48", "--json"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    printed = json.loads(done.stdout)
    assert printed["build"]["num_outputs"] == 7
    assert printed["parameters"] == sum(value.numel() for value in state.values())
    assert json.loads((tmp_path / "ours/config.json").read_text())["build"] == printed["build"]
    model = weights.load_classifier(str(tmp_path / printed["weights_url"]))
    clips = torch.randn(1, 3, 16, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), _imported(state, **SMALL_CLIP)(clips))
    with pytest.raises(CheckpointError, match="Unknown key"):
        weights.load_autoencoder(str(tmp_path / printed["weights_url"]))


@pytest.mark.parametrize("encoder", ["tpsbt", "vit"])
def test_a_pre_training_state_loads_into_the_classifier_whole(encoder: str) -> None:
    torch.manual_seed(0)
    pretrained = autoencoder.build("nano", encoder=encoder, frame_size=32)
    model = classifier.build("nano", 7, encoder=encoder, frame_size=32)
    result = model.load_state_dict(pretrained.state_dict(), strict=False)
    assert [key for key in result.missing_keys if key.startswith("encoder.")] == []
    assert [key for key in result.unexpected_keys if key.startswith("encoder.")] == []
    for name, value in pretrained.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], value)
