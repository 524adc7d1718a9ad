"""The bytes of a rendered clip: repeatable, decodable, and nowhere flat."""

import hashlib
import io
import os
import subprocess
import sys

import av
import numpy as np
import pytest

from data_sharding.sources.synthetic import SyntheticClip, _encode_h264, samples
from data_sharding.sources.synthetic_face.identity import draw_identity
from data_sharding.sources.synthetic_face.motion import expression_faces
from data_sharding.sources.synthetic_face.render import render_frames

TEXT = "clips=3,seed=5,frames=12,identities=3"


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    return [clip.read() for clip in samples(TEXT)]


def frames_of(video: bytes) -> np.ndarray:
    """Decoded frames, uint8 [F, H, W, 3]."""
    with av.open(io.BytesIO(video), "r") as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_another_process_with_other_threads_makes_the_same_bytes(clips: list[bytes]):
    program = (
        "import hashlib; from data_sharding.sources.synthetic import samples\n"
        f"clip = list(samples({TEXT!r}))[2]\n"  # without the two before it
        "print(hashlib.sha256(clip.read()).hexdigest())"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "3"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == hashlib.sha256(clips[2]).hexdigest()


def test_the_same_frames_encode_to_the_same_bytes_whatever_the_heap_held():
    # With x264's macroblock tree these frames came out in several versions.
    clip = SyntheticClip(seed=1, identity=0, number=4, expression="sad", frames=72, size=224)
    who = draw_identity(clip.seed, clip.identity)
    faces = expression_faces(clip.rng("motion"), clip.expression, clip.intensity, clip.frames)
    frames = list(render_frames(who, faces, clip.size))
    rng = np.random.default_rng(0)
    rubbish, encoded = [], set()
    for _ in range(24):
        rubbish.append(np.full(rng.integers(1, 300_000), rng.integers(256), np.uint8))
        if len(rubbish) > 8:
            rubbish.pop(int(rng.integers(8)))
        encoded.add(_encode_h264(frames, clip.size))
    assert len(encoded) == 1


def test_other_seeds_persons_and_clips_give_other_bytes(clips: list[bytes]):
    other_seed = next(samples(TEXT.replace("seed=5", "seed=6"))).read()
    assert len({*clips, other_seed}) == 4


@pytest.mark.parametrize(("frames", "size"), [(2, 64), (31, 160), (12, 224)])
def test_a_clip_is_h264_of_the_asked_length_and_size(frames: int, size: int):
    video = next(samples(f"clips=1,frames={frames},size={size}")).read()
    with av.open(io.BytesIO(video), "r") as container:
        assert "mp4" in container.format.name
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 25
        decoded = list(container.decode(video=0))
        assert [frame.time for frame in decoded] == pytest.approx([n / 25 for n in range(frames)])
        assert {(frame.width, frame.height) for frame in decoded} == {(size, size)}
        assert [frame.key_frame for frame in decoded] == [True] + [False] * (frames - 1)


def test_no_patch_of_the_training_region_is_flat(clips: list[bytes]):
    # The target divides each patch by its deviation: a flat one would be compression noise.
    for video in clips:
        region = frames_of(video)[:, :160, 32:192].astype(np.float64)  # VoxCeleb2's cut
        patches = region.reshape(6, 2, 10, 16, 10, 16, 3).transpose(0, 2, 4, 6, 1, 3, 5)
        deviation = patches.reshape(6, 10, 10, 3, -1).std(axis=-1)
        assert (deviation > 1.5).mean() > 0.99


def test_frames_follow_each_other_smoothly(clips: list[bytes]):
    steps = np.abs(np.diff(frames_of(clips[0]).astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0.02).all()  # it moves
    assert (steps < 6).all()  # without jumps
