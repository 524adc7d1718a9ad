"""Named model sizes: the one table of widths and depths, and the geometry of a clip.

First step of the model room: a name such as "base" and a few overrides become a frozen `Size`, from
which every layer takes its dimensions. What cannot fit together is refused here, in the user's
words, so that no layer has to check. "base" is the paper's model; the other sizes are this
project's own and follow its proportions: each stage half as deep as the one before it, a decoder
three quarters as wide as the encoder or less.

A vanilla ViT is a TPSBT of a single stage, so it has a table here and no class of its own: with
`encoder = "vit"` the same names mean the sizes of VideoMAE.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping

from svfap_dist.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Size:
    """Dimensions of a model and of the clips it takes. Frames and patches are square."""

    embed_dim: int  # encoder width D
    num_heads: int
    stage_depths: tuple[int, ...]  # blocks of each encoder stage; the last of stage >= 2 reverses
    decoder_embed_dim: int
    decoder_num_heads: int
    decoder_depth: int
    encoder: str = "tpsbt"  # or "vit": a single stage; says which table a name is looked up in
    temporal_kernel_size: int = 2  # tubelet frames merged between two stages
    temporal_downsampling: str = "conv"  # how they are merged; "average" and "max" learn nothing
    # Per tubelet frame: the same in every stage >= 2, or one number for each of them.
    num_bottleneck_tokens: int | tuple[int, ...] = 8
    # Ablations. Without the pyramid nothing is merged: every stage has all T tubelet frames.
    # Without the bottleneck the blocks of stages >= 2 are standard ones over all their tokens.
    # Without fusion the decoder gets the last stage alone, repeated in time to T tubelet frames.
    pyramid: bool = True
    bottleneck: bool = True
    fusion: bool = True
    num_frames: int = 16  # F
    frame_size: int = 160  # pixels, H = W
    tubelet_size: int = 2  # frames
    patch_size: int = 16  # pixels
    # Tubelet frames in which a masked clip has visible tokens; None: all T, as tube and random
    # masks leave them. Only masks that hide whole frames make it fewer.
    num_visible_tubelets: int | None = None

    @property
    def num_tubelets(self) -> int:
        """T, tubelet frames of a clip."""
        return self.num_frames // self.tubelet_size

    @property
    def patches_per_frame(self) -> int:
        """S, patches of a tubelet frame."""
        return (self.frame_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """N = T*S."""
        return self.num_tubelets * self.patches_per_frame

    @property
    def merge_factors(self) -> tuple[int, ...]:
        """For each later stage, tubelet frames merged into one when it is entered."""
        return (self.temporal_kernel_size if self.pyramid else 1,) * (len(self.stage_depths) - 1)

    @property
    def bottleneck_tokens(self) -> tuple[int, ...]:
        """For each later stage, bottleneck tokens of a tubelet frame."""
        tokens, later_stages = self.num_bottleneck_tokens, len(self.stage_depths) - 1
        return tokens if isinstance(tokens, tuple) else (tokens,) * later_stages

    @property
    def patch_dim(self) -> int:
        """P, numbers in the pixels of a patch."""
        return self.tubelet_size * self.patch_size**2 * 3


SIZES: Mapping[str, Size] = {
    "nano": Size(32, 2, (2, 2, 2), 16, 2, 1),  # for tests
    "tiny": Size(128, 2, (4, 2, 2), 128, 2, 2),  # the demo: seconds on a CPU
    "small": Size(384, 6, (8, 4, 2), 256, 4, 4),
    "base": Size(512, 8, (12, 6, 3), 384, 6, 4),  # the paper's (arXiv 2401.00416)
    "large": Size(768, 12, (16, 8, 4), 512, 8, 6),
}

# Encoders as in VideoMAE (arXiv 2203.12602, and its released code for "small"); nano and tiny are
# this project's own. All stages' fields but `stage_depths` mean nothing here.
VIT_SIZES: Mapping[str, Size] = {
    "nano": Size(32, 2, (4,), 16, 2, 1, encoder="vit"),
    "tiny": Size(192, 3, (8,), 128, 2, 2, encoder="vit"),
    "small": Size(384, 6, (12,), 192, 3, 4, encoder="vit"),
    "base": Size(768, 12, (12,), 384, 6, 4, encoder="vit"),
    "large": Size(1024, 16, (24,), 512, 8, 4, encoder="vit"),
}

_FIELDS = {field.name: field for field in dataclasses.fields(Size)}
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "encoder": ("tpsbt", "vit"),
    "temporal_downsampling": ("conv", "average", "max"),
    "pyramid": (True, False),
    "bottleneck": (True, False),
    "fusion": (True, False),
}
_LISTS = {"stage_depths"}  # fields that are lists
_NUMBERS_OR_LISTS = {"num_bottleneck_tokens"}


def resolve(name: str, overrides: Mapping[str, object]) -> Size:
    """The named size with `overrides` of its fields (where they are tuples, lists will do).

    Raises: ConfigError for an unknown name or field, a wrong type, or dimensions that do not fit.
    """
    for field in overrides:
        if field not in _FIELDS:
            raise ConfigError(
                "Unknown model field",
                where=f"model.{field}",
                found=repr(overrides[field]),
                do=_nearest(field, _FIELDS),
            )
    values = {field: _checked(field, value) for field, value in overrides.items()}
    table = VIT_SIZES if values.get("encoder") == "vit" else SIZES
    if name not in table:
        raise ConfigError(
            "Unknown model size", where="model.size", found=repr(name), do=_nearest(name, table)
        )
    size = dataclasses.replace(table[name], **values)  # type: ignore[arg-type]
    _check_fit(size)
    _check_stages(size)
    return size


def _nearest(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def _checked(field: str, value: object) -> object:
    """`value` if the field can have it; lists as tuples."""
    if field in _CHOICES:
        if value in _CHOICES[field] and type(value) is type(_CHOICES[field][0]):
            return value
        wanted = " or ".join(str(choice) for choice in _CHOICES[field])
        raise _wrong(field, value, f"use {wanted}")
    is_list = isinstance(value, (list, tuple))
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    right_kind = field in _NUMBERS_OR_LISTS or is_list == (field in _LISTS)
    if not numbers or not whole or not right_kind:
        wanted = "a list of whole numbers" if field in _LISTS else "a whole number"
        wanted += " or a list of them" if field in _NUMBERS_OR_LISTS else ""
        raise _wrong(field, value, f"give {wanted} greater than zero")
    return tuple(numbers) if is_list else value


def _wrong(field: str, value: object, advice: str) -> ConfigError:
    return ConfigError("Wrong value", where=f"model.{field}", found=repr(value), do=advice)


def _check_fit(size: Size) -> None:
    rules = (
        ("embed_dim", size.embed_dim, "num_heads", size.num_heads),
        ("decoder_embed_dim", size.decoder_embed_dim, "decoder_num_heads", size.decoder_num_heads),
        ("num_frames", size.num_frames, "tubelet_size", size.tubelet_size),
        ("frame_size", size.frame_size, "patch_size", size.patch_size),
    )
    for field, value, divisor_field, divisor in rules:
        if value % divisor:
            raise _misfit(field, value, f"not a multiple of {divisor_field} = {divisor}")
    for field, width in (
        ("embed_dim", size.embed_dim),
        ("decoder_embed_dim", size.decoder_embed_dim),
    ):
        if width % 4:  # the bottleneck's MLP takes a quarter, the position table sines and cosines
            raise _misfit(field, width, "not a multiple of 4")


def _check_stages(size: Size) -> None:
    """What the stages need: tubelet frames that can be merged, tokens for each of them."""
    stages, shrinkage = len(size.stage_depths), math.prod(size.merge_factors)
    if size.encoder == "vit" and stages > 1:
        raise _misfit("stage_depths", size.stage_depths, "a ViT (model.encoder) has one stage")
    if size.num_tubelets % shrinkage:
        raise _misfit(
            "temporal_kernel_size",
            size.temporal_kernel_size,
            f"{size.num_tubelets} tubelet frames cannot be merged by {size.temporal_kernel_size} "
            f"between each of {stages} stages",
        )
    if len(size.bottleneck_tokens) != stages - 1:
        raise _misfit(
            "num_bottleneck_tokens",
            size.num_bottleneck_tokens,
            f"one number for each stage but the first, {stages - 1}, is wanted, or one for all",
        )
    seen = size.num_visible_tubelets
    if seen is not None and (seen > size.num_tubelets or seen % shrinkage):
        raise ConfigError(
            "Impossible combination of mask and model",
            where="mask.ratio (with mask.kind = frame)",
            found=f"{seen} of {size.num_tubelets} tubelet frames visible, but the stages merge "
            f"{shrinkage} into one",
            do=f"choose a ratio that leaves a multiple of {shrinkage} visible, another mask.kind, "
            "or model.pyramid = false",
        )


def _misfit(field: str, value: object, why: str) -> ConfigError:
    return ConfigError(
        "Impossible combination in the model",
        where=f"model.{field}",
        found=f"{value!r}: {why}",
        do=f"change model.{field} or what it must fit",
    )
