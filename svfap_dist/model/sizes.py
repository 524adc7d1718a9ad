"""Named model sizes: the one table of widths and depths, and the geometry of a clip.

First step of the model room: a name such as "base" and a few overrides become a frozen `Size`, from
which every layer takes its dimensions. What cannot fit together is refused here, in the user's
words, so that no layer has to check. "base" is the paper's model; the other sizes are this
project's own and follow its proportions: each stage half as deep as the one before it, a decoder
three quarters as wide as the encoder or less.
"""

from __future__ import annotations

import dataclasses
import difflib
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
    temporal_kernel_size: int = 2  # tubelet frames merged between two stages
    num_bottleneck_tokens: int = 8  # per tubelet frame, in every stage >= 2
    num_frames: int = 16  # F
    frame_size: int = 160  # pixels, H = W
    tubelet_size: int = 2  # frames
    patch_size: int = 16  # pixels

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

_FIELDS = {field.name: field for field in dataclasses.fields(Size)}


def resolve(name: str, overrides: Mapping[str, object]) -> Size:
    """The named size with `overrides` of its fields (a list will do for `stage_depths`).

    Raises: ConfigError for an unknown name or field, a wrong type, or dimensions that do not fit.
    """
    if name not in SIZES:
        raise ConfigError(
            "Unknown model size", where="model.size", found=repr(name), do=_nearest(name, SIZES)
        )
    for field in overrides:
        if field not in _FIELDS:
            raise ConfigError(
                "Unknown model field",
                where=f"model.{field}",
                found=repr(overrides[field]),
                do=_nearest(field, _FIELDS),
            )
    values = {field: _checked(field, value) for field, value in overrides.items()}
    size = dataclasses.replace(SIZES[name], **values)  # type: ignore[arg-type]
    _check_fit(size)
    return size


def _nearest(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(known)}"


def _checked(field: str, value: object) -> int | tuple[int, ...]:
    """`value` if it has the field's type and is positive."""
    numbers = value if field == "stage_depths" and isinstance(value, (list, tuple)) else (value,)
    wanted = "a list of whole numbers" if field == "stage_depths" else "a whole number"
    is_list = isinstance(value, (list, tuple))
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    if not numbers or not whole or is_list != (field == "stage_depths"):
        raise ConfigError(
            "Wrong value",
            where=f"model.{field}",
            found=repr(value),
            do=f"give {wanted} greater than zero",
        )
    return tuple(numbers) if is_list else value  # type: ignore[return-value]


def _check_fit(size: Size) -> None:
    stages = len(size.stage_depths)
    shrinkage = size.temporal_kernel_size ** (stages - 1)
    rules = (
        ("embed_dim", size.embed_dim, "num_heads", size.num_heads),
        ("decoder_embed_dim", size.decoder_embed_dim, "decoder_num_heads", size.decoder_num_heads),
        ("num_frames", size.num_frames, "tubelet_size", size.tubelet_size),
        ("frame_size", size.frame_size, "patch_size", size.patch_size),
    )
    for field, value, divisor_field, divisor in rules:
        if value % divisor:
            raise _misfit(field, value, f"not a multiple of {divisor_field} = {divisor}")
    if size.num_tubelets % shrinkage:
        raise _misfit(
            "temporal_kernel_size",
            size.temporal_kernel_size,
            f"{size.num_tubelets} tubelet frames cannot be merged by {size.temporal_kernel_size} "
            f"between each of {stages} stages",
        )
    for field, width in (
        ("embed_dim", size.embed_dim),
        ("decoder_embed_dim", size.decoder_embed_dim),
    ):
        if width % 4:  # the bottleneck's MLP takes a quarter, the position table sines and cosines
            raise _misfit(field, width, "not a multiple of 4")


def _misfit(field: str, value: object, why: str) -> ConfigError:
    return ConfigError(
        "Impossible combination in the model",
        where=f"model.{field}",
        found=f"{value!r}: {why}",
        do=f"change model.{field} or what it must fit",
    )
