"""Weights that are incomplete or not weights are refused, with everything that is wrong."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from released import SMALL, SMALL_CLIP, State, released

from svfap_dist.errors import CheckpointError
from svfap_dist.model import autoencoder, classifier, convert


def test_all_that_is_wrong_with_the_keys_is_in_one_error() -> None:
    state = released(**SMALL)
    del state["blocks.1.norm2.bias"], state["fc_norm.weight"]
    state["pos_embed"] = torch.zeros(1, 72, 32)
    state["blocks.3.cross_attn.q.weight"] = torch.zeros(32, 31)
    with pytest.raises(CheckpointError) as caught:
        convert.import_official(state, **SMALL_CLIP)
    for words in (
        "missing blocks.1.norm2.bias",
        "missing fc_norm.weight",
        "extra pos_embed",
        "blocks.3.cross_attn.q.weight of shape [32, 31] instead of [32, 32]",
    ):
        assert words in caught.value.found
    assert caught.value.found.count(";") == 3


@pytest.mark.parametrize(
    ("name", "said"), [("patch_embed.proj.weight", "no"), ("head.weight", "missing")]
)
def test_other_weights_are_refused(name: str, said: str) -> None:
    state = released(**SMALL)
    del state[name]
    with pytest.raises(CheckpointError, match=f"{said} {name}"):
        convert.import_official(state, **SMALL_CLIP)
    state[name] = torch.zeros(32)
    with pytest.raises(CheckpointError, match=rf"{name} of shape \[32\]"):
        convert.import_official(state, **SMALL_CLIP)


def _base() -> State:
    """The paper's network; zeros that take no memory."""
    with torch.device("meta"):
        state = classifier.build("base", 7).state_dict()
    return {name.removeprefix("encoder."): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("gone", "example"),
    [
        (r"blocks\.20\.", "blocks.20.mlp.fc2.bias"),  # the end of the file
        (r"blocks\.(9|1\d|20)\.|temporal|spatial|head|fc_norm", "temporal_downsamples.1.bias"),
        (r"blocks\.4\.", "blocks.4.norm1.weight"),
        (r"temporal_downsamples", "temporal_downsamples.0.weight"),
        (r"spatial_downsamples\.1|temporal_downsamples\.1", "spatial_downsamples.1.norm.bias"),
        (r".*cross_attn\.q\.weight", "blocks.12.cross_attn.q.weight"),
        (r"head", "head.bias"),
    ],
)
def test_each_missing_key_is_listed(gone: str, example: str) -> None:
    state = _base()
    missing = sorted(name for name in state if re.match(gone, name))
    assert example in missing
    left = {name: value for name, value in state.items() if name not in missing}
    with pytest.raises(CheckpointError) as caught:
        convert.import_official(left)
    if gone == "head":  # how many outputs there were is in the missing weights
        assert "instead of" not in caught.value.found
    assert sorted(caught.value.found.split("; ")) == [f"missing {name}" for name in missing]
    assert "--stage-depths" in caught.value.do


def test_a_vit_without_its_last_blocks_is_not_a_smaller_one() -> None:
    with torch.device("meta"):
        fine_tuned = classifier.build("base", 7, encoder="vit").state_dict()
        pretrained = autoencoder.build("base", encoder="vit").state_dict()
    state = {name.removeprefix("encoder."): value for name, value in fine_tuned.items()}
    whole, _ = convert.import_official(state)
    assert whole["stage_depths"] == (12,)
    left = {name: value for name, value in state.items() if not name.startswith("blocks.11.")}
    with pytest.raises(CheckpointError, match=r"missing blocks\.11\.norm1\.weight"):
        convert.import_official(left)
    assert convert.import_official(left, stage_depths=(11,))[0]["stage_depths"] == (11,)

    renamed = {"decoder.embed.weight": "encoder_to_decoder.weight"}
    renamed |= {"decoder.mask_token": "mask_token"}
    theirs = {renamed.get(name, name): value for name, value in pretrained.items()}
    for ours, name in (("fusion.norm", "encoder.norm"),):
        for kind in ("weight", "bias"):
            theirs[f"{name}.{kind}"] = theirs.pop(f"{ours}.{kind}")
    assert convert.import_official(theirs)[0]["decoder_depth"] == 4
    cut = {k: value for k, value in theirs.items() if not k.startswith("decoder.blocks.3.")}
    with pytest.raises(CheckpointError, match=r"missing decoder\.blocks\.3\.norm1\.weight"):
        convert.import_official(cut)
    with pytest.raises(CheckpointError, match=r"mask_token of shape \[2, 384\] instead of \[384\]"):
        convert.import_official(theirs | {"mask_token": torch.zeros(2, 384)})


def test_what_is_no_tensor_is_listed() -> None:
    state = released(**SMALL) | {"epoch": 3, "head.bias": [0.0], 7: torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        convert.import_official(state, **SMALL_CLIP)  # type: ignore[arg-type]
    assert caught.value.found == "'head.bias': list; 'epoch': int; 7: Tensor"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 99, "optimizer": {"state": {}}},
        lambda state: {"module": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"encoder.{name}": value for name, value in state.items()},
    ],
    ids=["bare", "model", "module", "encoder"],
)
def test_wrappers_of_training_scripts_come_off(wrap, tmp_path: Path) -> None:
    state = released(**SMALL)
    path = str(tmp_path / "released.pth")
    torch.save(wrap(state), path)
    build, ours = convert.import_official(convert.read_pth(path), **SMALL_CLIP)
    expected_build, expected = convert.import_official(state, **SMALL_CLIP)
    assert build == expected_build
    assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert ours.keys() == expected.keys()


class _Malicious:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_Malicious(), "cannot be read"),
        ({"epoch": 3}, "No state dict"),
        ([torch.zeros(2)], "No state dict"),
        (None, "No state dict"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content, words, tmp_path, capsys) -> None:
    path = str(tmp_path / "other.pth")
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        convert.read_pth(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        (b"", "an empty file"),
        (b"no weights\n", "not a checkpoint: it begins with b'no weights"),
        (b"<!DOCTYPE html>", "not a checkpoint: it begins with b'<!DOCTYPE"),
        (b"\x80\x02.", "not a checkpoint"),
        (b"\x80\x02}q\x00(X\x01", "not a checkpoint"),
        (b"PK\x03\x04 cut short", "an archive that is damaged"),
        (safetensors.torch.save({"head.bias": torch.zeros(7)}), "a .safetensors file, as ours are"),
        (pickle.dumps(Path("x"), protocol=2), "a pathlib.PosixPath, which only code"),
    ],
)
def test_a_file_that_is_none_is_refused(content, found, tmp_path) -> None:
    path = tmp_path / "other.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.pth") as caught:
        convert.read_pth(str(path))
    assert caught.value.found.startswith(found)
    assert "weights_only" not in str(caught.value)  # torch's advice to execute the file
