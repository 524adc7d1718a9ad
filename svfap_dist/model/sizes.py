"""Encoders, their named sizes, and the dimensions of a network.

`ENCODERS` is the one table of encoders: everything outside their own files (networks, FLOP counts,
recipes, layer decay, token maps, imports) looks here for what an encoder is and can do. A name such
as "base" and a few overrides become a frozen `Size`, from which every layer takes its dimensions.
Values that cannot fit together are refused here, by the names of the recipe, so that no layer has
to check. Importing this module does not import torch. docs/extending.md shows how to add a row.

A vanilla ViT is a TPSBT of a single stage, so it has a row and no class of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, model_validator

from svfap_dist.config.recipe import explain
from svfap_dist.config.sections import BottleneckTokens, ModelOptions, Positive
from svfap_dist.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass(frozen=True)
class EncoderSpec:
    """What the program knows about an encoder: a row of `ENCODERS`.

    `network`, `flops` and `attention_maps` are "module:function", imported when they are called.

    Attributes:
        network: (size, drop_path) -> module. The module maps clips (floats [B, 3, F, H, W], or
            frames uint8 [B, F, H, W, 3]) and the sorted indices of the visible tokens ([B, V];
            None: all) to the tokens of each stage, [B, t*s, D], finest in time first. It must not
            read masked pixels.
        flops: (size, visible, tubelets) -> operations of its forward pass over one clip, by part.
        sizes: fields of `Size`, by the name of the size.
        options: fields of `Size`, besides its dimensions, that decide which weights there are.
        max_stages: most stages that it can have; None: any number.
        embedding: pattern of the names of its embedding's parameters, for layer decay.
        block: pattern of the names of its blocks' parameters; group 1 is the number of the block.
        attention_maps: (encoder, clips) -> list of `encoder.AttentionMap`; "": it has none.
    """

    network: str
    flops: str
    sizes: Mapping[str, Mapping[str, Any]]
    options: tuple[str, ...] = ()
    max_stages: int | None = None
    embedding: str = r"patch_embed\."
    block: str = r"blocks\.(\d+)\."
    attention_maps: str = ""

    def build(self, size: Size, drop_path: float = 0.0) -> nn.Module:
        """Return a freshly initialized encoder.

        Args:
            size: dimensions.
            drop_path: rate at which the last block's branches are dropped in training.
        """
        return pkgutil.resolve_name(self.network)(size, drop_path)


def _dimensions(
    embed_dim: int, num_heads: int, stage_depths: tuple[int, ...], *decoder: int
) -> dict[str, Any]:
    names = ("decoder_embed_dim", "decoder_num_heads", "decoder_depth")
    encoder = {"embed_dim": embed_dim, "num_heads": num_heads, "stage_depths": stage_depths}
    return encoder | dict(zip(names, decoder, strict=True))


_TPSBT = EncoderSpec(
    network="svfap_dist.model.encoder:Encoder",
    flops="svfap_dist.model.flops:tpsbt",
    # "base" is the paper's (arXiv 2401.00416). The others are this project's and follow its
    # proportions: each stage half as deep as the one before, a decoder at most 3/4 as wide.
    sizes={
        "nano": _dimensions(32, 2, (2, 2, 2), 16, 2, 1),  # for tests
        "tiny": _dimensions(128, 2, (4, 2, 2), 128, 2, 2),  # the demo: seconds on a CPU
        "small": _dimensions(384, 6, (8, 4, 2), 256, 4, 4),
        "base": _dimensions(512, 8, (12, 6, 3), 384, 6, 4),
        "large": _dimensions(768, 12, (16, 8, 4), 512, 8, 6),
    },
    options=(
        *("temporal_kernel_size", "temporal_downsampling", "num_bottleneck_tokens"),
        *("pyramid", "bottleneck"),
    ),
    attention_maps="svfap_dist.model.encoder:attention_maps",
)

ENCODERS: dict[str, EncoderSpec] = {
    "tpsbt": _TPSBT,
    "vit": dataclasses.replace(
        _TPSBT,
        # As in VideoMAE (arXiv 2203.12602, and its released code for "small"); nano and tiny are
        # this project's.
        sizes={
            "nano": _dimensions(32, 2, (4,), 16, 2, 1),
            "tiny": _dimensions(192, 3, (8,), 128, 2, 2),
            "small": _dimensions(384, 6, (12,), 192, 3, 4),
            "base": _dimensions(768, 12, (12,), 384, 6, 4),
            "large": _dimensions(1024, 16, (24,), 512, 8, 4),
        },
        options=(),
        max_stages=1,
    ),
}


class Size(ModelOptions):
    """Dimensions of a model and of the clips it takes. Frames and patches are square."""

    embed_dim: Positive  # encoder width D
    num_heads: Positive
    # Blocks of each encoder stage; the last block of a stage >= 2 of TPSBT is the reverse one.
    stage_depths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    decoder_embed_dim: Positive
    decoder_num_heads: Positive
    decoder_depth: Positive
    temporal_kernel_size: Positive = 2  # tubelet frames merged between two stages
    # Per tubelet frame: the same in every stage >= 2, or one number for each of them.
    num_bottleneck_tokens: BottleneckTokens = 8
    num_frames: Positive = 16  # F
    frame_size: Positive = 160  # pixels, H = W
    # Tubelet frames in which a masked clip has visible tokens; None: all T, as tube and random
    # masks leave them. Only masks that hide whole frames make it fewer.
    num_visible_tubelets: Positive | None = None

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
        """P, values per patch."""
        return self.tubelet_size * self.patch_size**2 * 3

    @property
    def encoder_fields(self) -> tuple[str, ...]:
        """Names of the fields in which two sizes with the same encoder weights agree."""
        dimensions = ("embed_dim", "num_heads", "stage_depths", "tubelet_size", "patch_size")
        return ("encoder", *dimensions, *ENCODERS[self.encoder].options)

    @model_validator(mode="after")
    def _check(self) -> Size:
        for field, divisor in (
            ("embed_dim", "num_heads"),
            ("decoder_embed_dim", "decoder_num_heads"),
            ("num_frames", "tubelet_size"),
            ("frame_size", "patch_size"),
        ):
            if getattr(self, field) % getattr(self, divisor):
                raise self._misfit(field, f"not a multiple of {divisor} = {getattr(self, divisor)}")
        # The bottleneck's MLP takes a quarter of the width, the position table sines and cosines.
        for field in ("embed_dim", "decoder_embed_dim"):
            if getattr(self, field) % 4:
                raise self._misfit(field, "not a multiple of 4")
        self._check_stages()
        return self

    def _check_stages(self) -> None:
        """Check that there are tubelet frames to merge and tokens for each stage."""
        stages, shrinkage = len(self.stage_depths), math.prod(self.merge_factors)
        most = ENCODERS[self.encoder].max_stages
        if most is not None and stages > most:
            why = f"model.encoder = {self.encoder} has at most {most} stage"
            raise self._misfit("stage_depths", why)
        if self.num_tubelets % shrinkage:
            raise self._misfit(
                "temporal_kernel_size",
                f"{self.num_tubelets} tubelet frames cannot be merged by "
                f"{self.temporal_kernel_size} between each of {stages} stages",
            )
        if len(self.bottleneck_tokens) != stages - 1:
            raise self._misfit(
                "num_bottleneck_tokens",
                f"needs one number for each stage but the first, {stages - 1}, or one for all",
            )
        visible = self.num_visible_tubelets
        if visible is not None and (visible > self.num_tubelets or visible % shrinkage):
            raise ConfigError(
                "Impossible combination of mask and model",
                where="mask.ratio",
                found=f"{visible} of {self.num_tubelets} tubelet frames visible, but the stages "
                f"merge {shrinkage} into one",
                do=f"choose a ratio that leaves a multiple of {shrinkage} visible, another "
                "mask.kind, or model.pyramid = false",
            )

    def _misfit(self, field: str, why: str) -> ConfigError:
        return ConfigError(
            "Impossible combination in the model",
            where=f"model.{field}",
            found=f"{getattr(self, field)!r}: {why}",
            do=f"change model.{field} or the setting it conflicts with",
        )


def resolve(name: str, overrides: Mapping[str, object]) -> Size:
    """Return a named size with some fields replaced.

    Args:
        name: size of `overrides["encoder"]`, or of the default encoder.
        overrides: fields of `Size`. Lists are accepted for tuples.

    Raises:
        ConfigError: an unknown name or field, a wrong type, or dimensions that do not fit.
    """
    encoder = overrides.get("encoder", ModelOptions.model_fields["encoder"].default)
    values = {"encoder": encoder, **overrides}
    if isinstance(encoder, str) and encoder in ENCODERS:
        sizes = ENCODERS[encoder].sizes
        if name not in sizes:
            raise ConfigError("Unknown model size", "model.size", repr(name), nearest(name, sizes))
        values = {**sizes[name], **values}
    try:
        # Through JSON: strict mode then takes arrays for tuples, still no number for a string.
        return Size.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise explain(error, f"the model of size {name}", Size, "model.") from error


def size_of_build(build: Mapping[str, Any]) -> Size:
    """Return the dimensions of a network.

    Args:
        build: arguments of its `build`: size, overrides, and what only a classifier has.

    Raises:
        ConfigError: see `resolve`.
    """
    of_classifier = ("size", "num_outputs", "pool", "lora")
    overrides = {name: v for name, v in build.items() if name not in of_classifier}
    return resolve(build["size"], overrides)
