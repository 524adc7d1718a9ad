"""Still images as clips: a repeated frame, or a pan over it, from any number of workers."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from labeled import task_config
from loaders import bits, config_of, kept, world
from PIL import Image

from data_sharding import pipeline
from svfap_dist.config import AugmentConfig, Config, DataConfig
from svfap_dist.data import decoding
from svfap_dist.data.clips import (
    ClipRequest,
    ClipWorker,
    DecodeJob,
    SharedArrays,
    array_shapes,
)
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.selection import Selection
from svfap_dist.data.still_images import moved_plane, pan_moves
from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import PackedSample
from svfap_dist.shards.reader import SampleReader, open_data
from svfap_dist.video.info import Crop

SIDE = 64
SHIFTED = {"crop_scales": (0.75,), "still_motion": 0.3}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Shards of forty textured images, by profile."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "in").mkdir()
    for number in range(40):
        blocks = np.random.default_rng(number).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        image = Image.fromarray(blocks).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"in/{number}.jpg")
    full = pipeline.train_profile(region="full", size=SIDE, crf=20)
    for profile in ("source", "train"):
        train = full if profile == "train" else None
        out = str(folder / profile)
        pipeline.shard("images", str(folder / "in"), out, profile=profile, train=train, workers=0)
    return {profile: str(folder / profile) for profile in ("source", "train")}


def batches(url: str, config: Config, selection: Selection | None = None) -> list:
    manifest = open_data(config, url)
    return kept(ClipLoader(config, url, manifest, world(), selection).batches(0, 3))


@pytest.mark.parametrize("profile", ["source", "train"])
@pytest.mark.parametrize("data", [{}, SHIFTED], ids=["repeated", "panned"])
def test_batches_are_the_same_for_any_workers_and_wherever_colors_are_converted(
    urls: dict[str, str], profile: str, data: dict
) -> None:
    found = batches(urls[profile], config_of(**data))
    ways = [{"decode_threads": 3}, {"decode_workers": 2, "feeders": 1}]
    ways = ways if data else ways[:1]  # starting processes takes seconds
    for way in ways:
        again = batches(urls[profile], config_of(**data, **way))
        assert [bits(batch) for batch in found] == [bits(batch) for batch in again], way
    clips = np.concatenate([batch.frames.numpy() for batch in found])
    is_moving = [len({frame.tobytes() for frame in clip}) > 1 for clip in clips]
    assert np.mean(is_moving) > 0.5 if data else not any(is_moving)
    if profile == "train":
        config = config_of(**data, colors="device")
        manifest = open_data(config, urls[profile])
        loader = ClipLoader(config, urls[profile], manifest, world())
        planes = [
            batch.frames_on(torch.device("cpu"), slice(None)).numpy()
            for batch in loader.batches(0, 3)
        ]
        assert (np.concatenate(planes) == clips).all()


def test_images_of_a_block_are_read_together_though_windows_are_in_any_phase(
    urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their only frame is in the first of the parts that a sample of the profile `train` has."""
    alone: list[str] = []
    one_by_one = SampleReader._bytes_of
    monkeypatch.setattr(
        SampleReader, "_bytes_of", lambda *at: (alone.append(at[1].name), one_by_one(*at))[1]
    )
    config = config_of(shuffle_block=4, sampling_rate=4)
    assert open_data(config, urls["train"]).num_parts == 4
    assert len(batches(urls["train"], config)) == 3
    assert not alone


def test_videos_must_be_long_enough_but_images_need_not(urls: dict[str, str], tmp_path: Path):
    config = config_of()
    manifest = open_data(config, urls["source"])
    assert manifest.min_frames < config.data.window
    for file in Path(urls["source"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    videos = shard_format.dump(shard_format.Manifest(**{**vars_of(manifest), "kind": "videos"}))
    (tmp_path / "manifest.json").write_bytes(videos)
    with pytest.raises(ConfigError, match="the shortest video has 1"):
        open_data(config, str(tmp_path))


def vars_of(manifest: shard_format.Manifest) -> dict:
    names = shard_format.Manifest.__dataclass_fields__
    return {name: getattr(manifest, name) for name in names}


def test_a_task_augments_all_frames_of_an_image_alike_but_for_the_noise(urls: dict[str, str]):
    """As it does with a video that repeats its last frame."""
    indices = np.arange(40)
    selection = Selection(indices, indices)
    mirrored = AugmentConfig(flip=1.0, rand_augment_ops=2, erasing=0.0)
    erased = AugmentConfig(flip=0.0, rand_augment_ops=0, erasing=1.0)
    for augment, is_same in ((mirrored, True), (erased, False)):
        for batch in batches(urls["source"], task_config(augment), selection):
            clips = batch.frames.numpy()
            assert clips.shape[1] == 4
            assert bool((clips == clips[:, :1]).all()) == is_same


@pytest.mark.parametrize("key", range(20))
def test_a_pan_is_straight_small_and_inside_the_picture(key: int) -> None:
    data = DataConfig(num_frames=9, still_motion=0.25)
    size, crop = (100, 120), Crop(20, 8, 64, 80)
    moves = pan_moves(size, crop, Stream(key), data)
    assert moves == pan_moves(size, crop, Stream(key), data)
    down, right = (np.array(distances) for distances in zip(*moves, strict=True))
    for distances, place, room in ((down, crop.top, 36), (right, crop.left, 40)):
        assert len(distances) == 9
        assert (distances % 2 == 0).all()
        assert np.abs(np.diff(distances, n=2)).max() <= 2, "at a constant speed, but for rounding"
        assert np.ptp(distances) <= 0.25 * 64
        assert 0 <= (place + distances).min() <= (place + distances).max() <= room


@pytest.mark.parametrize("scale", [1, 2], ids=["luma", "chroma"])
def test_a_moved_plane_shows_in_the_crop_what_the_camera_sees(scale: int) -> None:
    crop = Crop(20, 8, 64, 80)
    plane = np.arange(100 * 120 // scale**2).reshape(100 // scale, 120 // scale)

    def seen(of: np.ndarray, top: int, left: int) -> np.ndarray:
        rows = slice(top // scale, (top + crop.height) // scale)
        return of[rows, left // scale : (left + crop.width) // scale]

    for move in ((0, 0), (16, -8), (-20, 32)):
        moved = moved_plane(plane, move, scale)
        wanted = seen(plane, crop.top + move[0], crop.left + move[1])
        assert (seen(moved, crop.top, crop.left) == wanted).all()


def test_pans_differ_and_a_crop_of_everything_stays() -> None:
    data = DataConfig(num_frames=5, still_motion=0.5)
    clips = [pan_moves((64, 64), Crop(16, 16, 32, 32), Stream(key), data) for key in range(10)]
    assert len({tuple(moves) for moves in clips}) > 5
    assert pan_moves((64, 64), Crop(0, 0, 64, 64), Stream(0), data) == [(0, 0)] * 5


@pytest.mark.parametrize("profile", ["source", "train"])
def test_a_pan_over_a_large_photo_does_not_copy_it_for_each_frame(
    tmp_path: Path, profile: str
) -> None:
    """A photo of the profile source becomes RGB, one of the profile train planes in the ring."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(noise).resize((800, 600)).save(tmp_path / "in/0.jpg")
    train = pipeline.train_profile(region="full", size=None, crf=20) if profile == "train" else None
    folders = str(tmp_path / "in"), str(tmp_path / "out")
    pipeline.shard("images", *folders, profile=profile, train=train, workers=0)
    config = config_of(num_frames=16, crop_scales=(0.5,), still_motion=0.5)
    manifest = shard_format.load_manifest(folders[1])
    packed = SampleReader(folders[1], manifest).fetch(0)
    assert isinstance(packed, PackedSample)
    planes = (600, 800) if profile == "train" else None
    arrays = SharedArrays(array_shapes(config.data, 1, 1, planes))
    request = ClipRequest(window=(0,), crops=((0,),), batch=0, row=0)
    peaks = []
    for motion in (0.0, 0.5, 0.0, 0.5):  # the first pair imports what it needs
        data = config.data.model_copy(update={"still_motion": motion})
        worker = ClipWorker(data, "pyav", arrays)
        tracemalloc.start()
        (result,) = worker([DecodeJob(packed, request)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert result.bad is None
    name = "y" if planes else "rgb"
    assert len({frame.tobytes() for frame in arrays.arrays[name][0, 0]}) > 2, "it moved"
    photo = 600 * 800 * (1 if planes else 3)
    assert peaks[3] - peaks[2] < 2 * photo, "not 16 copies"


def test_motion_where_clips_are_made_on_the_device_is_refused(urls: dict[str, str]) -> None:
    config = decoding.with_backend(config_of(still_motion=0.1), "dali")
    manifest = open_data(config, urls["source"])
    with pytest.raises(ConfigError, match=r"does not support data\.still_motion"):
        decoding.check_backend(config, urls["source"], manifest)
