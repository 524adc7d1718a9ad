"""Weights files: what is saved comes back as a working model; anything else is a clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from svfap_dist.errors import CheckpointError
from svfap_dist.model import autoencoder, weights

BUILD = {"size": "nano", "frame_size": 32, "stage_depths": (2, 1)}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, autoencoder.MaskedAutoencoder]:
    torch.manual_seed(0)
    model = autoencoder.build(**BUILD)
    path = str(tmp_path / "folder" / "model.safetensors")
    weights.save(path, model.state_dict(), BUILD)
    return path, model


def test_a_file_is_enough_to_get_the_model_back(
    saved: tuple[str, autoencoder.MaskedAutoencoder], tubes: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    path, model = saved
    loaded = weights.load_autoencoder(path)
    assert not loaded.training
    assert loaded.size == model.size
    clips, split = torch.randn(2, 3, 16, 32, 32), tubes(model.size, 2, 1)
    assert torch.equal(loaded(clips, *split), model(clips, *split))


def test_any_safetensors_reader_can_open_it(
    saved: tuple[str, autoencoder.MaskedAutoencoder],
) -> None:
    path, model = saved
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        assert '"size": "nano"' in file.metadata()["svfap_dist.build"]


def test_the_header_alone_says_how_to_build_it(
    saved: tuple[str, autoencoder.MaskedAutoencoder],
) -> None:
    path, _ = saved
    assert weights.load_build(path) == weights.load(path)[0]
    with pytest.raises(CheckpointError, match="no such file"):
        weights.load_build(path + ".not")
    Path(path).write_bytes(b"\xff" * 4096)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        weights.load_build(path)


def test_weights_of_half_precision_load_as_float32(tmp_path: Path) -> None:
    model = autoencoder.build(**BUILD).bfloat16()
    path = str(tmp_path / "half.safetensors")
    weights.save(path, model.state_dict(), BUILD)
    loaded = weights.load_autoencoder(path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        weights.load_autoencoder(str(tmp_path / "nothing.safetensors"))


@pytest.mark.parametrize("kept", [0, 4, 200, 5000])
def test_a_torn_file_is_refused(
    kept: int, saved: tuple[str, autoencoder.MaskedAutoencoder], tmp_path: Path
) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(Path(saved[0]).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="damaged"):
        weights.load_autoencoder(str(torn))


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="without a description"):
        weights.load_autoencoder(str(path))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        ({**BUILD, "embed_dim": 64}, "size mismatch"),
        ({**BUILD, "stage_depths": (2, 2)}, "Missing key"),
        ({**BUILD, "size": "gigantic"}, "Unknown model size"),
        ({**BUILD, "wings": 2}, "Unknown key"),
    ],
)
def test_weights_that_do_not_fit_their_description_are_refused(
    build: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "model.safetensors")
    weights.save(path, autoencoder.build(**BUILD).state_dict(), build)
    with pytest.raises(CheckpointError, match=words):
        weights.load_autoencoder(path)


def test_arguments_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="add size"):
        weights.save(str(path), {}, {"frame_size": 32})
    with pytest.raises(CheckpointError, match="cannot be saved"):
        weights.save(str(path), {}, {"size": "nano", "depth": torch.zeros(1)})
    assert not path.exists()
