"""Render clips of talking faces, to try the whole flow without data.

In: a text such as "64" or "clips=64,seed=1,identities=16". Out: one `SourceVideo` per clip, whose
`read` renders it and returns an H.264 mp4 like those of VoxCeleb2: 224×224, 25 frames per second,
about three seconds, a face in the middle; with "crop=104" it fills the frame. Nothing is stored; a
clip is a pure function of the text, and rendering it twice on one machine gives the same bytes.

`synthetic_face` draws the people and their motion; the list of clips and their encoding are here.
What a model learns from it shows that the code works, and nothing about people.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import av
import av.video.stream
import numpy as np

from data_sharding.sources import Labels, SourceVideo
from data_sharding.sources.synthetic_face.identity import UNITS, draw_identity
from data_sharding.sources.synthetic_face.motion import EXPRESSIONS, FPS, expression_faces
from data_sharding.sources.synthetic_face.render import render_frames
from svfap_dist.errors import ConfigError

FOLDS = 5  # person p is tested in fold p % FOLDS + 1 and trained on in the others
_RENDERER = 1  # increment when the same clip comes out as other bytes
_BOUNDS = {
    "clips": (1, 100_000),
    "seed": (0, 2**31),
    "frames": (2, 10_000),
    "size": (64, 512),
    "crop": (64, UNITS),
    "identities": (1, 10_000),
    "first_identity": (0, 9_999),
}


@dataclasses.dataclass(frozen=True)
class SyntheticSet:
    """A set of clips, as INPUT describes it."""

    clips: int = 64
    seed: int = 0  # of the population and of everything that happens in the clips
    frames: int = 72  # of each clip
    size: int = 224  # pixels, height and width; a multiple of 4
    crop: int = UNITS  # side of the square around the face that is shown, in 1/224 of the frame
    identities: int = 16  # people, in turn
    first_identity: int = 0  # number of the first; disjoint ranges share no person


@dataclasses.dataclass(frozen=True)
class SyntheticClip:
    """All parameters of one clip."""

    seed: int
    identity: int
    number: int
    expression: str
    frames: int
    size: int
    crop: int = UNITS

    @property
    def intensity(self) -> float:
        """Height of the expression's apex: 0.75 to 1; 0 for a neutral face."""
        if self.expression == "neutral":
            return 0.0
        return round(0.75 + 0.25 * float(self.rng("intensity").random()), 3)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return this clip's random generator for one purpose.

        Args:
            purpose: Name of the stream.
        """
        return np.random.default_rng([self.seed, self.identity, self.number, *purpose.encode()])


def samples(text: str) -> Iterator[SourceVideo]:
    """See `Source.samples`; people and expressions take turns.

    INPUT is a number of clips, or `key=value` pairs, separated by commas, of `SyntheticSet`.
    """
    return _clips(parse(text))


def parse(text: str) -> SyntheticSet:
    """Return the set that INPUT describes.

    Args:
        text: INPUT.

    Raises:
        ConfigError: A key is unknown, not a number or out of its bounds.
    """
    values: dict[str, int] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:  # a bare number: how many clips
            key, value = "clips", key
        if key not in _BOUNDS:
            raise _invalid(text, f"unknown key {key!r}", f"use {', '.join(_BOUNDS)}")
        if key in values:
            raise _invalid(text, f"{key} given twice", "give each key once")
        low, high = _BOUNDS[key]
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            raise _invalid(text, f"{key}={value}", f"give {key} as a number from {low} to {high}")
        values[key] = int(value)
    found = SyntheticSet(**values)
    if found.size % 4:
        raise _invalid(text, f"size={found.size}", "give a size that is a multiple of 4")
    if found.first_identity + found.identities > 10_000:
        last = found.first_identity + found.identities - 1
        raise _invalid(text, f"identities up to {last}", "let first_identity + identities be 10000")
    return found


def _invalid(text: str, found: str, do: str) -> ConfigError:
    example = 'for example "64" or "clips=64,seed=1,identities=16"'
    return ConfigError("Invalid synthetic set", f"synthetic:{text}", found, f"{do}, {example}")


def _clips(wanted: SyntheticSet) -> Iterator[SourceVideo]:
    names = list(EXPRESSIONS)
    for number in range(wanted.clips):
        turn, person = divmod(number, wanted.identities)
        # Each person goes through the expressions; in a turn, people show different ones.
        expression = names[(turn + person) % len(names)]
        identity = wanted.first_identity + person
        look = (wanted.frames, wanted.size, wanted.crop)
        clip = SyntheticClip(wanted.seed, identity, number, expression, *look)
        key = f"synthetic/id{identity:04d}/clip{number:05d}"
        read, where = partial(render_clip, clip), f"{key} of seed {clip.seed}"
        stamp = f"{_RENDERER}:{_stamped(clip)}"
        yield SourceVideo(key, read, _labels(clip), where, "mp4", stamp)


def _stamped(clip: SyntheticClip) -> tuple[Any, ...]:
    """Return what a clip is made from; of uncropped ones what it was before there were crops."""
    values = dataclasses.astuple(clip)
    return values if clip.crop < UNITS else values[:-1]


def _labels(clip: SyntheticClip) -> dict[str, Any]:
    expression = EXPRESSIONS[clip.expression]
    who, number = f"id{clip.identity:04d}", list(EXPRESSIONS).index(clip.expression)
    affect = {
        "valence": round(clip.intensity * expression.valence, 3),
        "arousal": round(clip.intensity * expression.arousal, 3),
    }
    labels = Labels(
        set="synthetic",
        subject=who,
        class_index=number,
        class_name=clip.expression,
        values=affect,
        fold=clip.identity % FOLDS + 1,
    )
    return labels.as_dict() | {
        "identity": who,
        "expression": clip.expression,
        "expression_index": number,
        "intensity": clip.intensity,
        **affect,
    }


def render_clip(clip: SyntheticClip) -> bytes:
    """Return the mp4 of a clip.

    Args:
        clip: What to render.
    """
    who = draw_identity(clip.seed, clip.identity)
    faces = expression_faces(clip.rng("motion"), clip.expression, clip.intensity, clip.frames)
    return _encode_h264(render_frames(who, faces, clip.size, clip.crop), clip.size)


def _encode_h264(frames: Iterable[np.ndarray], size: int) -> bytes:
    """Return an mp4 with H.264, the same bytes for the same frames."""
    # x264's bytes depend on the number of threads, and with mbtree on the heap.
    options = {"preset": "veryfast", "crf": "23", "g": "250", "threads": "1"}
    options["x264-params"] = "mbtree=0"
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = cast(
            av.video.stream.VideoStream, container.add_stream("libx264", rate=FPS, options=options)
        )
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
