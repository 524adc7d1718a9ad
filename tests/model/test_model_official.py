"""Released weights: the imported network computes what the released one does, and says what is
wrong with weights that are not whole.

The oracle restates the released fine-tuned network from the paper, einsum by einsum, and reads a
state dict in the released layout directly: none of our modules takes part in it.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import autoencoder, classifier, official, weights

State = dict[str, Tensor]
SMALL = {"width": 32, "depths": (2, 3, 2), "tokens": (4, 4), "kernel": 2, "outputs": 7}
# What the tables cannot tell of networks so small.
SMALL_CLIP = {"num_heads": 4, "stage_depths": (2, 3, 2), "frame_size": 48}


class _Released(dict[str, Tensor]):
    """A random state dict, filled name by name; no value is at a default that hides a mistake."""

    def linear(self, name: str, outputs: int, *inputs: int, bias: bool = True) -> None:
        fan_in = torch.Size(inputs).numel()
        self[f"{name}.weight"] = torch.randn(outputs, *inputs) / fan_in**0.5
        if bias:
            self[f"{name}.bias"] = torch.randn(outputs) * 0.2

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = 1 + torch.randn(width) * 0.2
        self[f"{name}.bias"] = torch.randn(width) * 0.2

    def biases(self, name: str, width: int) -> None:
        self[f"{name}.q_bias"] = torch.randn(width) * 0.2
        self[f"{name}.v_bias"] = torch.randn(width) * 0.2

    def block(self, name: str, width: int, crosses: bool) -> None:
        if crosses:
            self.norm(f"{name}.cross_norm1", width)
            self.norm(f"{name}.cross_norm2", width)
            self.linear(f"{name}.cross_attn.q", width, width, bias=False)
            self.linear(f"{name}.cross_attn.kv", 2 * width, width, bias=False)
            self.biases(f"{name}.cross_attn", width)
            self.linear(f"{name}.cross_attn.proj", width, width)
        self.norm(f"{name}.norm1", width)
        self.linear(f"{name}.attn.qkv", 3 * width, width, bias=False)
        self.biases(f"{name}.attn", width)
        self.linear(f"{name}.attn.proj", width, width)
        self.norm(f"{name}.norm2", width)
        self.linear(f"{name}.mlp.fc1", 4 * width, width)
        self.linear(f"{name}.mlp.fc2", width, 4 * width)


def released(
    width: int, depths: tuple[int, ...], tokens: tuple[int, ...], kernel: int, outputs: int
) -> State:
    """A fine-tuned network in the released layout."""
    torch.manual_seed(0)
    state = _Released()
    state.linear("patch_embed.proj", width, 3, 2, 16, 16)
    for number in range(sum(depths)):
        state.block(f"blocks.{number}", width, crosses=number >= depths[0])
    for stage, count in enumerate(tokens):
        state.linear(f"temporal_downsamples.{stage}", width, width, kernel)
        state.norm(f"spatial_downsamples.{stage}.norm", width)
        state.linear(f"spatial_downsamples.{stage}.mlp.fc1", width // 4, width)
        state.linear(f"spatial_downsamples.{stage}.mlp.fc2", count, width // 4)
    state.norm("fc_norm", width)
    state.linear("head", outputs, width)
    return dict(state)


def _norm(x: Tensor, w: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(x: Tensor, w: State, name: str) -> Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def _mlp(x: Tensor, w: State, name: str) -> Tensor:
    hidden = _linear(x, w, f"{name}.fc1")
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return _linear(gelu, w, f"{name}.fc2")


def _softmax(x: Tensor, dim: int) -> Tensor:
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def _attention(x: Tensor, context: Tensor, weight: Tensor, w: State, name: str, h: int) -> Tensor:
    """Attention with the rows of `weight` making queries of x, keys and values of the context."""
    q, k, v = (part.unflatten(0, (h, -1)) for part in weight.chunk(3))  # [h, d, D]
    bias_q, bias_v = (w[f"{name}.{bias}"].unflatten(0, (h, -1)) for bias in ("q_bias", "v_bias"))
    queries = torch.einsum("bni,hdi->bhnd", x, q) + bias_q[:, None]
    keys = torch.einsum("bki,hdi->bhkd", context, k)
    values = torch.einsum("bki,hdi->bhkd", context, v) + bias_v[:, None]
    scores = torch.einsum("bhnd,bhkd->bhnk", queries, keys) * q.shape[1] ** -0.5
    mixed = torch.einsum("bhnk,bhkd->bnhd", _softmax(scores, -1), values).flatten(2)
    return _linear(mixed, w, f"{name}.proj")


def _block(x: Tensor, w: State, name: str, h: int, context: Tensor | None = None) -> Tensor:
    if context is not None:
        cross = f"{name}.cross_attn"
        weight = torch.cat((w[f"{cross}.q.weight"], w[f"{cross}.kv.weight"]))
        x = x + _attention(
            _norm(x, w, f"{name}.cross_norm1"),
            _norm(context, w, f"{name}.cross_norm2"),
            weight,
            w,
            cross,
            h,
        )
    y = _norm(x, w, f"{name}.norm1")
    x = x + _attention(y, y, w[f"{name}.attn.qkv.weight"], w, f"{name}.attn", h)
    return x + _mlp(_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp")


def _embedded(clips: Tensor, w: State) -> Tensor:
    """Tokens [B, N, D] of clips [B, 3, F, H, W] with their positions."""
    pixels = clips.unfold(2, 2, 2).unfold(3, 16, 16).unfold(4, 16, 16)  # [B, 3, T, y, x, 2, p, p]
    x = torch.einsum("bctyxfuv,dcfuv->btyxd", pixels, w["patch_embed.proj.weight"]).flatten(1, 3)
    width = x.shape[2]
    pairs = torch.arange(width) // 2 * 2 / width
    angles = torch.arange(x.shape[1])[:, None].double() / 10000**pairs
    table = torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos())
    return x + w["patch_embed.proj.bias"] + table.to(x.dtype)


def released_forward(clips: Tensor, w: State, depths: tuple[int, ...], heads: int) -> Tensor:
    """Scores of the released fine-tuned network."""
    x, t = _embedded(clips, w), clips.shape[2] // 2
    numbers = iter(range(sum(depths)))
    for _ in range(depths[0]):
        x = _block(x, w, f"blocks.{next(numbers)}", heads)
    for stage, depth in enumerate(depths[1:]):
        convolution = w[f"temporal_downsamples.{stage}.weight"]  # [D, D, k]
        kernel = convolution.shape[2]
        frames = x.unflatten(1, (t // kernel, kernel, -1))  # [B, t, k, s, D]
        merged = torch.einsum("btksi,oik->btso", frames, convolution)
        merged, t = merged + w[f"temporal_downsamples.{stage}.bias"], t // kernel
        name = f"spatial_downsamples.{stage}"
        shares = _softmax(_mlp(_norm(merged, w, f"{name}.norm"), w, f"{name}.mlp"), dim=2)
        x = merged.flatten(1, 2)
        z = torch.einsum("btsz,btsd->btzd", shares, merged).flatten(1, 2)
        for _ in range(depth - 1):
            z = _block(z, w, f"blocks.{next(numbers)}", heads, context=x)
        x = _block(x, w, f"blocks.{next(numbers)}", heads, context=z)
    return _linear(_norm(x.mean(1), w, "fc_norm"), w, "head")


def _imported(state: State, **overrides: object) -> classifier.Classifier:
    build, ours = official.import_official(state, **overrides)
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
    build, _ = official.import_official(state)
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
    build, _ = official.import_official(state)
    assert (build["stage_depths"], build["num_heads"]) == ((8, 4, 2), 6)
    unknown = released(**SMALL)
    with pytest.raises(CheckpointError, match=r"2 blocks in stage 1 and 5 in 2.*--stage-depths"):
        official.import_official(unknown, num_heads=4)
    with pytest.raises(CheckpointError, match=r"width 32.*--num-heads"):
        official.import_official(unknown, stage_depths=(2, 3, 2))
    with pytest.raises(ConfigError, match="not a multiple of num_heads = 5"):
        official.import_official(unknown, **SMALL_CLIP | {"num_heads": 5})


def test_all_that_is_wrong_with_the_keys_is_in_one_error() -> None:
    state = released(**SMALL)
    del state["blocks.1.norm2.bias"], state["fc_norm.weight"]
    state["pos_embed"] = torch.zeros(1, 72, 32)
    state["blocks.3.cross_attn.q.weight"] = torch.zeros(32, 31)
    with pytest.raises(CheckpointError) as caught:
        official.import_official(state, **SMALL_CLIP)
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
        official.import_official(state, **SMALL_CLIP)
    state[name] = torch.zeros(32)
    with pytest.raises(CheckpointError, match=rf"{name} of shape \[32\]"):
        official.import_official(state, **SMALL_CLIP)


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
        official.import_official(left)
    if gone == "head":  # how many outputs there were is in the missing weights
        assert "instead of" not in caught.value.found
    assert sorted(caught.value.found.split("; ")) == [f"missing {name}" for name in missing]
    assert "--stage-depths" in caught.value.do


def test_a_vit_without_its_last_blocks_is_not_a_smaller_one() -> None:
    with torch.device("meta"):
        fine_tuned = classifier.build("base", 7, encoder="vit").state_dict()
        pretrained = autoencoder.build("base", encoder="vit").state_dict()
    state = {name.removeprefix("encoder."): value for name, value in fine_tuned.items()}
    whole, _ = official.import_official(state)
    assert whole["stage_depths"] == (12,)
    left = {name: value for name, value in state.items() if not name.startswith("blocks.11.")}
    with pytest.raises(CheckpointError, match=r"missing blocks\.11\.norm1\.weight"):
        official.import_official(left)
    assert official.import_official(left, stage_depths=(11,))[0]["stage_depths"] == (11,)

    renamed = {"decoder.embed.weight": "encoder_to_decoder.weight"}
    renamed |= {"decoder.mask_token": "mask_token"}
    theirs = {renamed.get(name, name): value for name, value in pretrained.items()}
    for ours, name in (("fusion.norm", "encoder.norm"),):
        for kind in ("weight", "bias"):
            theirs[f"{name}.{kind}"] = theirs.pop(f"{ours}.{kind}")
    assert official.import_official(theirs)[0]["decoder_depth"] == 4
    cut = {k: value for k, value in theirs.items() if not k.startswith("decoder.blocks.3.")}
    with pytest.raises(CheckpointError, match=r"missing decoder\.blocks\.3\.norm1\.weight"):
        official.import_official(cut)
    with pytest.raises(CheckpointError, match=r"mask_token of shape \[2, 384\] instead of \[384\]"):
        official.import_official(theirs | {"mask_token": torch.zeros(2, 384)})


def test_what_is_no_tensor_is_listed() -> None:
    state = released(**SMALL) | {"epoch": 3, "head.bias": [0.0], 7: torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        official.import_official(state, **SMALL_CLIP)  # type: ignore[arg-type]
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
    build, ours = official.import_official(official.read(path), **SMALL_CLIP)
    expected_build, expected = official.import_official(state, **SMALL_CLIP)
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
        official.read(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "no such file"),
        (b"", "an empty file"),
        (b"no weights\n", "no checkpoint: it begins with b'no weights"),
        (b"<!DOCTYPE html>", "no checkpoint: it begins with b'<!DOCTYPE"),
        (b"\x80\x02.", "no checkpoint"),
        (b"\x80\x02}q\x00(X\x01", "no checkpoint"),
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
        official.read(str(path))
    assert caught.value.found.startswith(found)
    assert "weights_only" not in str(caught.value)  # torch's advice to execute the file


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
    assert json.loads((tmp_path / "ours/config.json").read_text()) == printed["build"]
    model = weights.load_classifier(str(tmp_path / printed["weights_url"]))
    clips = torch.randn(1, 3, 16, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), _imported(state, **SMALL_CLIP)(clips))
    with pytest.raises(CheckpointError, match="Unknown model field"):
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
