"""Released weights into ours: the fine-tuned SVFAP network, and VideoMAE's plain ViT.

In: a state dict as the authors published it. Out: the arguments that build the same network here,
and its weights under our names. Four layouts are known: a fine-tuned network (its head is there) or
a pre-trained one (its keys begin with "encoder."), each of them TPSBT or plain ViT; what tells
TPSBT is its `temporal_downsamples` and `cross_*` layers. Widths are read from the shapes. What no
shape tells is taken from tables: heads are 64 wide in all released networks, and depths are those
of our named size of that width. Blocks are not counted instead, for then half a file would make
half a network. Every key must find its place, and every place its key.

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
from svfap_dist.model.sizes import SIZES, VIT_SIZES, Size

_NUM_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16}  # by width
_WRAPPERS = ("model", "module", "state_dict")  # keys below which training scripts put the weights
# Our names of a pre-trained network's weights that have others there.
_PRETRAINED_NAMES = {
    "fusion.norm.weight": "encoder.norm.weight",
    "fusion.norm.bias": "encoder.norm.bias",
    "decoder.embed.weight": "encoder_to_decoder.weight",
    "decoder.mask_token": "mask_token",
}
_WHERE = "released weights"


def read(path: str) -> dict[str, Tensor]:
    """The state dict in a `.pth` file (a path or a URL), out of the usual wrappers.

    Nothing in the file is executed. Raises: CheckpointError if it has no state dict; StorageError.
    """
    try:
        content = storage.read_bytes(path)
    except storage.StorageMissingError as error:
        raise CheckpointError(
            "No weights", where=path, found="no such file", do="check the path"
        ) from error
    try:
        found = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    # What the reader stumbles over in bytes that are no checkpoint may be of any kind.
    except Exception as error:
        raise CheckpointError(
            "Weights cannot be read",
            where=path,
            found=_kind(content, error),
            do="give a whole .pth file, as torch.save writes it, of tensors and plain values only",
        ) from error
    while isinstance(found, dict):
        inner = [found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)]
        if not inner:
            break
        found = inner[0]
    if not isinstance(found, dict) or not any(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(
            "No state dict in the file",
            where=path,
            found=f"a {type(found).__name__} without tensors",
            do=f"save the weights themselves, or below one of the keys {', '.join(_WRAPPERS)}",
        )
    return found


def _kind(content: bytes, error: Exception) -> str:
    """What a file is that torch does not read."""
    # The one helpful word of torch's, amid advice to execute what is in the file.
    forbidden = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if forbidden:
        return f"a {forbidden[1]}, which only code in the file could make"
    if not content:
        return "an empty file"
    if content[8:10] == b'{"':
        return "a .safetensors file, as ours are"
    if content.startswith(b"PK"):
        return "an archive that is damaged or no checkpoint"
    return f"no checkpoint: it begins with {content[:16]!r}"


def import_official(
    state_dict: Mapping[str, Tensor], **overrides: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `classifier.build` (or, for a pre-trained network, of `autoencoder.build`) and
    our state of the same network.

    `overrides` are build arguments that win over what is inferred: those of the clips
    (num_frames, frame_size), which leave no trace in the weights, and num_heads, stage_depths or
    decoder_num_heads for networks that the tables do not know.

    Raises: CheckpointError that lists missing, extra and misshaped keys; ConfigError for overrides
    that do not fit.
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
    """All keys are names, all values tensors."""
    wrong = [
        f"{name!r}: {type(value).__name__}"
        for name, value in state_dict.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if wrong:
        raise CheckpointError(
            "Not a state dict",
            where=_WHERE,
            found="; ".join(wrong),
            do="give a dict of names and tensors, and nothing else in it",
        )


def _their_name(ours: str, pretrained: bool) -> str:
    return _PRETRAINED_NAMES.get(ours, ours) if pretrained else ours.removeprefix("encoder.")


def _infer(
    theirs: Mapping[str, Tensor], pretrained: bool, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Build arguments by the shapes of the weights."""
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
        outputs = _told(theirs, "head.weight", 2, 0) or _told(theirs, "head.bias", 1, 0) or 1
        return build | {"num_outputs": outputs}
    decoder = _shape(theirs, "encoder_to_decoder.weight", 2)[0]
    return build | {
        "decoder_embed_dim": decoder,
        "decoder_num_heads": overrides.get("decoder_num_heads")
        or _heads(decoder, "decoder_num_heads"),
        "decoder_depth": overrides.get("decoder_depth") or _decoder_depth(theirs, width, decoder),
    }


def _stages(
    theirs: Mapping[str, Tensor], encoder: str, width: int, known: tuple[int, ...] | None
) -> dict[str, Any]:
    """Build arguments of the encoder's stages; `known` are their depths if the user told them."""
    prefix = re.escape(encoder)
    depth = len(_numbers(theirs, rf"{prefix}blocks\.(\d+)\."))
    crossing = len(_numbers(theirs, rf"{prefix}blocks\.(\d+)\.cross_"))
    later = _later_stages(theirs, prefix)
    if not later and not crossing and _may_be_vit(width, known):
        # As the ViT of VideoMAE trains on 16 frames of 224 pixels and SVFAP on 160.
        depths = known or _named(VIT_SIZES, width, f"{depth} blocks").stage_depths
        return {"encoder": "vit", "stage_depths": depths, "frame_size": 224}
    found = f"{depth - crossing} blocks in stage 1 and {crossing} in {later} later stages"
    depths = known or _named(SIZES, width, found).stage_depths
    usual = SIZES["base"]  # where the weight that tells is missing, which will be said
    kernel = _told(theirs, f"{encoder}temporal_downsamples.0.weight", 3, 2)
    tokens = tuple(
        _told(theirs, f"{encoder}spatial_downsamples.{stage}.mlp.fc2.weight", 2, 0)
        or usual.bottleneck_tokens[0]
        for stage in range(len(depths) - 1)
    )
    return {
        "stage_depths": depths,
        "temporal_kernel_size": kernel or usual.temporal_kernel_size,
        "num_bottleneck_tokens": tokens[0] if len(set(tokens)) == 1 else tokens,
    }


def _may_be_vit(width: int, known: tuple[int, ...] | None) -> bool:
    """Whether weights without a trace of later stages may be whole: not at a width that only
    TPSBT has."""
    if known:
        return len(known) == 1
    tpsbt, vit = ({size.embed_dim for size in table.values()} for table in (SIZES, VIT_SIZES))
    return width not in _NUM_HEADS or width not in tpsbt - vit


def _later_stages(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """Stages after the first, by whichever of their layers are there."""
    found = _numbers(theirs, rf"{prefix}(?:temporal|spatial)_downsamples\.(\d+)\.")
    return max(found, default=-1) + 1


def _named(table: Mapping[str, Size], width: int, found: str) -> Size:
    """Our size of that width, if networks of that width were released."""
    for size in table.values():
        if size.embed_dim == width and width in _NUM_HEADS:
            return size
    raise CheckpointError(
        "Depths of the stages cannot be told from the weights",
        where=_WHERE,
        found=f"{found}, width {width}: no named size",
        do="give the depths: --stage-depths 12,6,3",
    )


def _decoder_depth(theirs: Mapping[str, Tensor], width: int, decoder: int) -> int:
    """Blocks of the decoder: as in the named size of its widths, else as many as there are."""
    for size in (*SIZES.values(), *VIT_SIZES.values()):
        if (size.embed_dim, size.decoder_embed_dim) == (width, decoder):
            return size.decoder_depth
    return max(_numbers(theirs, r"decoder\.blocks\.(\d+)\."), default=-1) + 1


def _heads(width: int, field: str) -> int:
    if width in _NUM_HEADS:
        return _NUM_HEADS[width]
    raise CheckpointError(
        "Number of attention heads cannot be told from the weights",
        where=_WHERE,
        found=f"width {width}; known are {', '.join(map(str, _NUM_HEADS))}",
        do=f"give it: --{field.replace('_', '-')} N",
    )


def _shape(theirs: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a weight that sizes are read from."""
    shape = tuple(theirs[name].shape) if name in theirs else ()
    if len(shape) == dimensions:
        return shape
    raise CheckpointError(
        "Not the weights of a known network",
        where=_WHERE,
        found=f"{name} of shape {list(shape)}" if name in theirs else f"no {name}",
        do=f"give a state dict of SVFAP or VideoMAE, in which {name} has {dimensions} dimensions",
    )


def _told(theirs: Mapping[str, Tensor], name: str, dimensions: int, axis: int) -> int | None:
    """A dimension of a weight, if the weight is there and has so many of them."""
    shape = theirs[name].shape if name in theirs else ()
    return shape[axis] if len(shape) == dimensions else None


def _numbers(theirs: Mapping[str, Tensor], pattern: str) -> set[int]:
    """The numbers in keys that match."""
    return {int(match[1]) for name in theirs if (match := re.match(pattern, name))}


def _check_keys(model: nn.Module, theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Every weight of the model is there in its shape, and nothing else; `names` are by ours."""
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
            do="give the whole state dict of one network; where it is whole but deeper or less "
            "deep than our size of that width, give --stage-depths; one that was fine-tuned "
            "without mean pooling (norm instead of fc_norm) or with learned positions has no "
            "counterpart here",
        )
