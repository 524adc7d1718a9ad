"""Batches decoded by DALI, on its CPU backend: the same clips, however jobs are grouped."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from clips import make_video, read_frame_number
from labeled import CLASSES
from numbered_shards import write_data_set

from svfap_dist.config import AugmentConfig, Config
from svfap_dist.data.loader import ClipLoader
from svfap_dist.distributed import World
from svfap_dist.errors import HealthError
from svfap_dist.video.backends import BACKENDS
from svfap_dist.video.dali import DaliDecoder
from svfap_dist.video.info import VideoInfo

pytestmark = pytest.mark.skipif(not BACKENDS["dali"].is_installed, reason="DALI is not installed")

SAMPLES, FRAMES, SIDE = 10, 24, 48
ALONE = World(0, 0, 1, 1)


def config_of(backend: str, threads: int = 2) -> Config:
    return Config.model_validate(
        {
            "data": {
                "num_frames": 4, "sampling_rate": 2, "frame_size": 32, "num_lanes": 2,
                "region": "full", "repeated_sampling": 2, "decode_threads": threads,
                "crop_scales": (1.0,),
            },
            "decode": {"backend": backend, "pipelines": 2},
            "train": {"global_batch_size": 8, "micro_batch_size": 4},
            "model": {"size": "nano"},
            "mask": {"ratio": 0.5},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Samples of VP9, the fourth of them a file that ends too early."""
    videos = [
        make_video(
            None, FRAMES, size=(SIDE, SIDE), codec="libvpx-vp9", container="webm", seed=sample,
            painted=range(sample * FRAMES, (sample + 1) * FRAMES),
        )
        for sample in range(SAMPLES)
    ]  # fmt: skip
    info = VideoInfo(FRAMES, 25.0, SIDE, SIDE, "vp9")
    samples = {k: (video if k != 3 else video[:400], info) for k, video in enumerate(videos)}
    url = str(tmp_path_factory.mktemp("device") / "shards")
    return write_data_set(url, [6, 4], videos, samples)


def batches(data_set, config: Config) -> list:
    loader = ClipLoader(config, data_set.url, data_set.manifest, ALONE)
    return [
        (
            batch.frames.clone(),
            batch.keys,
            batch.slots.substituted,
            [bad.reason for bad in batch.bad],
        )
        for batch in loader.batches(0, 2 * loader.steps_per_epoch)
    ]


def painted(clips: torch.Tensor) -> list[list[int]]:
    return [[read_frame_number(frame.numpy()) for frame in clip] for clip in clips]


def test_batches_are_those_of_the_other_way(data_set):
    """The same frames of the same samples in the same places, and the same substitutes."""
    ours, others = batches(data_set, config_of("dali")), batches(data_set, config_of("pyav"))
    assert len(ours) == len(others) > 2
    for (frames, *told), (other_frames, *other_told) in zip(ours, others, strict=True):
        assert told == other_told
        assert painted(frames) == painted(other_frames)
        assert (frames.float() - other_frames.float()).abs().mean() < 4
    assert any("undecodable" in told[2] or "too_short" in told[2] for _, *told in ours)


def test_who_comes_together_changes_no_bit(data_set):
    ours, again = batches(data_set, config_of("dali")), batches(data_set, config_of("dali", 16))
    for batch, other in zip(ours, again, strict=True):
        assert torch.equal(batch[0], other[0])
        assert batch[1:] == other[1:]


def test_short_videos_of_a_task_repeat_their_last_frame(tmp_path):
    """Tasks may decode on the device that augments; their clips come without augmentation."""
    videos = [
        make_video(
            None, 5, size=(SIDE, SIDE), codec="libvpx-vp9", container="webm", seed=sample,
            painted=range(5 * sample, 5 * sample + 5),
        )
        for sample in range(4)
    ]  # fmt: skip
    info = VideoInfo(5, 25.0, SIDE, SIDE, "vp9")
    samples = {k: (video, info) for k, video in enumerate(videos)}
    data_set = write_data_set(str(tmp_path / "short"), [4], videos, samples)
    augment = AugmentConfig(run_on="device")
    config = config_of("dali").model_copy(update={"task": CLASSES, "augment": augment})
    loader = ClipLoader(config, data_set.url, data_set.manifest, ALONE)
    (batch,) = loader.batches(0, 1)
    assert batch.bad == []
    first = [5 * sample for sample in batch.slots.samples for _ in range(2)]
    assert painted(batch.frames) == [[k, k + 2, k + 4, k + 4] for k in first]
    assert batch.digests.shape == (8, 2)


def test_few_threads_hand_over_whole_batches(data_set, monkeypatch):
    """Two threads are enough for lots of more clips than there are threads."""
    lots = []
    decode_batch = DaliDecoder.decode_batch

    def counted(self, requests, size):
        lots.append(len(requests))
        return decode_batch(self, requests, size)

    monkeypatch.setattr(DaliDecoder, "decode_batch", counted)
    loader = ClipLoader(config_of("dali"), data_set.url, data_set.manifest, ALONE)
    iterator = loader.batches(0, 20)
    before = threading.active_count()
    for _ in range(20):
        next(iterator)
        assert len([t for t in threading.enumerate() if t.name.startswith("clips")]) <= 2
    assert threading.active_count() <= before + 4
    iterator.close()
    assert max(lots) == 4  # the samples of a batch
    assert len(lots) < 2 * 20 + 10  # a few for substitutes


def test_an_iterator_that_is_left_early_ends_its_threads(data_set):
    before = threading.active_count()
    loader = ClipLoader(config_of("dali"), data_set.url, data_set.manifest, ALONE)
    iterator = loader.batches(0, 50)
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batched-decode"]
    assert threading.active_count() <= before + 1


def test_a_decoder_that_hangs_ends_the_run_and_names_its_samples(data_set, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(DaliDecoder, "decode_batch", lambda *_: released.wait(60))
    config = config_of("dali")
    data = config.data.model_copy(update={"decode_seconds": 0.1})
    loader = ClipLoader(
        config.model_copy(update={"data": data}), data_set.url, data_set.manifest, ALONE
    )
    began = time.monotonic()
    with pytest.raises(HealthError, match=r"does not respond.*0\.4 s.*clip-\d{3}.*backend=pyav"):
        next(loader.batches(0, 5))
    assert time.monotonic() - began < 10
    released.set()
