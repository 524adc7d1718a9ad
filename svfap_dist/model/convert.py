"""Convert released weights to ours: the fine-tuned SVFAP network, and VideoMAE's plain ViT.

In: a state dict as the authors published it. Out: the arguments that build the same network here,
and its weights under our names. Four layouts are known: a fine-tuned network (it has a head) or a
pre-trained one (its keys begin with "encoder."), each of them TPSBT or plain ViT; TPSBT is
recognized by its `temporal_downsamples` and `cross_*` layers. Widths are read from the shapes.
What no shape shows comes from tables: heads are 64 wide in all released networks, and depths are
those of our named size of that width. Depths are not counted, because a truncated file would then
be accepted as a smaller network. Every key must have a place, and every place a key.

Source of the layouts: the released code of SVFAP (arXiv 2401.00416) and of VideoMAE
(arXiv 2203.12602).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.errors import CheckpointError
from svfap_dist.model import autoencoder, classifier
from svfap_dist.model.sizes import ENCODERS, resolve

_NUM_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16}  # by width
_WRAPPERS = ("model", "module", "state_dict")  # keys below which training scripts put the weights
# Weights of a pre-trained network that have other names there.
_PRETRAINED_NAMES = {
    "fusion.norm.weight": "encoder.norm.weight",
    "fusion.norm.bias": "encoder.norm.bias",
    "decoder.embed.weight": "encoder_to_decoder.weight",
    "decoder.mask_token": "mask_token",
}
_TPSBT, _VIT = "tpsbt", "vit"  # rows of `ENCODERS` that have released weights
_WHERE = "released weights"


def read_pth(path: str) -> dict[str, Tensor]:
    """Return the state dict in a `.pth` file, without the usual wrappers; execute nothing in it.

    Args:
        path: path or URL.

    Raises:
        CheckpointError: the file has no state dict.
        StorageError: it cannot be read.
    """
    try:
        content = storage.read_bytes(path)
    except storage.StorageMissingError as error:
        raise CheckpointError("No weights", path, "no such file", "check the path") from error
    try:
        found = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint raise errors of any class
        raise CheckpointError(
            "Weights cannot be read",
            where=path,
            found=_describe(content, error),
            do="give a whole .pth file, as torch.save writes it, of tensors and plain values only",
        ) from error
    while isinstance(found, dict):
        inner = [found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)]
        if not inner:
            break
        found = inner[0]
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        kind = f"a {type(found).__name__} without tensors"
        advice = f"save the weights themselves, or under one of the keys {', '.join(_WRAPPERS)}"
        raise CheckpointError("No state dict in the file", path, kind, advice)
    return found


def _describe(content: bytes, error: Exception) -> str:
    """Return what a file is that torch cannot read."""
    # The one useful word of torch's message, which otherwise advises to execute the file's code.
    forbidden = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if forbidden:
        return f"a {forbidden[1]}, which only code in the file could create"
    if not content:
        return "an empty file"
    if content[8:10] == b'{"':
        return "a .safetensors file, as ours are"
    if content.startswith(b"PK"):
        return "an archive that is damaged or not a checkpoint"
    return f"not a checkpoint: it begins with {content[:16]!r}"


def import_official(
    state_dict: Mapping[str, Tensor], **overrides: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the build arguments and our state dict of a released network.

    Args:
        state_dict: released weights, with or without the prefixes of training scripts.
        **overrides: build arguments that replace inferred ones: those of the clips (num_frames,
            frame_size), which no weight shows, and num_heads, stage_depths or decoder_num_heads of
            networks that the tables do not have.

    Returns:
        Arguments of `classifier.build`, or for a pre-trained network of `autoencoder.build`, and
        its weights.

    Raises:
        CheckpointError: lists missing, extra and misshaped keys.
        ConfigError: the overrides do not fit.
    """
    _check_kinds(state_dict)
    theirs = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if "encoder.head.weight" in theirs:  # a fine-tuned network inside another module
        theirs = {name.removeprefix("encoder."): value for name, value in theirs.items()}
    pretrained = any(name.startswith("encoder.") for name in theirs)
    build = _infer(theirs, pretrained, overrides) | overrides
    with torch.device("meta"):
        model = autoencoder.build(**build) if pretrained else classifier.build(**build)
    names = {ours: _their_name(ours, pretrained) for ours in model.state_dict()}
    if "mask_token" in theirs and theirs["mask_token"].shape[:-1] == (1, 1):
        theirs["mask_token"] = theirs["mask_token"].flatten()  # [1, 1, E] -> [E]
    _check_keys(model, theirs, names)
    return build, {ours: theirs[name] for ours, name in names.items()}


def _check_kinds(state_dict: Mapping[Any, Any]) -> None:
    """Check that keys are names and values tensors."""
    wrong = [
        f"{name!r}: {type(value).__name__}"
        for name, value in state_dict.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if wrong:
        advice = "give a dict of names and tensors only"
        raise CheckpointError("Not a state dict", _WHERE, "; ".join(wrong), advice)


def _their_name(ours: str, pretrained: bool) -> str:
    return _PRETRAINED_NAMES.get(ours, ours) if pretrained else ours.removeprefix("encoder.")


def _infer(
    theirs: Mapping[str, Tensor], pretrained: bool, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return build arguments by the shapes of the weights."""
    encoder = "encoder." if pretrained else ""
    kernel = _shape(theirs, f"{encoder}patch_embed.proj.weight", 5)  # [D, 3, pt, p, p]
    width = kernel[0]
    build = {
        "size": "base",
        "embed_dim": width,
        "num_heads": overrides.get("num_heads") or _heads(width, "num_heads"),
        "tubelet_size": kernel[2],
        "patch_size": kernel[3],
        **_stages(theirs, encoder, width, overrides.get("stage_depths")),
    }
    if not pretrained:
        outputs = _dim(theirs, "head.weight", 2, 0) or _dim(theirs, "head.bias", 1, 0) or 1
        return build | {"num_outputs": outputs}
    decoder = _shape(theirs, "encoder_to_decoder.weight", 2)[0]
    heads = overrides.get("decoder_num_heads") or _heads(decoder, "decoder_num_heads")
    depth = overrides.get("decoder_depth") or _decoder_depth(theirs, width, decoder)
    return build | {
        "decoder_embed_dim": decoder,
        "decoder_num_heads": heads,
        "decoder_depth": depth,
    }


def _stages(
    theirs: Mapping[str, Tensor], encoder: str, width: int, known: tuple[int, ...] | None
) -> dict[str, Any]:
    """Return build arguments of the encoder's stages; `known` are their depths where given."""
    prefix = re.escape(encoder)
    depth = len(_numbers(theirs, rf"{prefix}blocks\.(\d+)\."))
    crossing = len(_numbers(theirs, rf"{prefix}blocks\.(\d+)\.cross_"))
    between = _numbers(theirs, rf"{prefix}(?:temporal|spatial)_downsamples\.(\d+)\.")
    if not between and not crossing and _may_be_vit(width, known):
        # VideoMAE's ViT trains on 16 frames of 224 pixels, SVFAP on 160.
        depths = known or _depths(_VIT, width, f"{depth} blocks")
        return {"encoder": _VIT, "stage_depths": depths, "frame_size": 224}
    later = max(between, default=-1) + 1
    found = f"{depth - crossing} blocks in stage 1 and {crossing} in {later} later stages"
    depths = known or _depths(_TPSBT, width, found)
    usual = resolve("base", {"encoder": _TPSBT})  # for missing weights, which are reported later
    kernel = _dim(theirs, f"{encoder}temporal_downsamples.0.weight", 3, 2)
    tokens = tuple(
        _dim(theirs, f"{encoder}spatial_downsamples.{stage}.mlp.fc2.weight", 2, 0)
        or usual.bottleneck_tokens[0]
        for stage in range(len(depths) - 1)
    )
    return {
        "stage_depths": depths,
        "temporal_kernel_size": kernel or usual.temporal_kernel_size,
        "num_bottleneck_tokens": tokens[0] if len(set(tokens)) == 1 else tokens,
    }


def _sizes(encoder: str, **fields: int) -> list[Mapping[str, Any]]:
    """Return our sizes of an encoder that have these fields."""
    sizes = ENCODERS[encoder].sizes.values()
    return [size for size in sizes if all(size[name] == n for name, n in fields.items())]


def _may_be_vit(width: int, known: tuple[int, ...] | None) -> bool:
    """Return whether weights without later stages may be whole: not at a width of TPSBT only."""
    if known:
        return len(known) == 1
    only_tpsbt = _sizes(_TPSBT, embed_dim=width) and not _sizes(_VIT, embed_dim=width)
    return width not in _NUM_HEADS or not only_tpsbt


def _depths(encoder: str, width: int, found: str) -> tuple[int, ...]:
    """Return the stage depths of our size of that width, if such networks were released."""
    sizes = _sizes(encoder, embed_dim=width)
    if sizes and width in _NUM_HEADS:
        return sizes[0]["stage_depths"]
    found = f"{found}, width {width}: no named size"
    advice = "give the depths: --stage-depths 12,6,3"
    raise CheckpointError("Unknown stage depths of released weights", _WHERE, found, advice)


def _decoder_depth(theirs: Mapping[str, Tensor], width: int, decoder: int) -> int:
    """Return the blocks of the decoder: as in the named size of its widths, else counted."""
    widths = {"embed_dim": width, "decoder_embed_dim": decoder}
    for size in (*_sizes(_TPSBT, **widths), *_sizes(_VIT, **widths)):
        return size["decoder_depth"]
    return max(_numbers(theirs, r"decoder\.blocks\.(\d+)\."), default=-1) + 1


def _heads(width: int, field: str) -> int:
    if width in _NUM_HEADS:
        return _NUM_HEADS[width]
    found = f"width {width}; known are {', '.join(map(str, _NUM_HEADS))}"
    advice = f"give it: --{field.replace('_', '-')} N"
    raise CheckpointError("Unknown number of attention heads", _WHERE, found, advice)


def _shape(theirs: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a weight that sizes are read from."""
    shape = tuple(theirs[name].shape) if name in theirs else ()
    if len(shape) == dimensions:
        return shape
    raise CheckpointError(
        "Not the weights of a known network",
        where=_WHERE,
        found=f"{name} of shape {list(shape)}" if name in theirs else f"no {name}",
        do=f"give a state dict of SVFAP or VideoMAE, in which {name} has {dimensions} dimensions",
    )


def _dim(theirs: Mapping[str, Tensor], name: str, dimensions: int, axis: int) -> int | None:
    """Return the length of an axis of a weight; None if it is missing or of another rank."""
    shape = theirs[name].shape if name in theirs else ()
    return shape[axis] if len(shape) == dimensions else None


def _numbers(theirs: Mapping[str, Tensor], pattern: str) -> set[int]:
    """Return the numbers in the keys that match."""
    return {int(match[1]) for name in theirs if (match := re.match(pattern, name))}


def _check_keys(model: nn.Module, theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Check that each weight of the model is there in its shape, and no other; keys are ours."""
    shapes = {names[ours]: list(value.shape) for ours, value in model.state_dict().items()}
    wrong = [f"missing {name}" for name in shapes if name not in theirs]
    wrong += [f"extra {name}" for name in theirs if name not in shapes]
    wrong += [
        f"{name} of shape {list(theirs[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in theirs and list(theirs[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            "Released weights do not fit",
            where=_WHERE,
            found="; ".join(wrong),
            do="give the whole state dict of one network, and --stage-depths if its depths are not "
            "those of our size of that width; networks with learned positions or fine-tuned "
            "without mean pooling (norm instead of fc_norm) are not supported",
        )
