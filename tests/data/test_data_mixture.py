"""Mixtures through the loader: what is read, from which source, and what is refused."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from loaders import NO_VIDEO, bits, cut_clips, kept, shown, world
from mixtures import mixture_of
from numbered_shards import write_data_set

from svfap_dist.config import Config, recipe
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.run_order import RunOrder
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.evaluate import protocol
from svfap_dist.evaluate.task_of_data import complete_config
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.mixture import MixedManifest, open_training_data
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video.info import VideoInfo

SIZES = ([13, 6], [9], [5, 7])
FIRSTS = (0, 19, 28)  # global index of the first sample of each source
WEIGHTS = (3, 1, 2)


@pytest.fixture
def urls(tmp_path, videos) -> list[str]:
    """Three data sets; the videos of each are numbered from 0."""
    return [
        write_data_set(str(tmp_path / f"s{number}"), sizes, videos, {}).url
        for number, sizes in enumerate(SIZES)
    ]


def loader(urls: list[str], rank: int = 0, size: int = 1, **data) -> ClipLoader:
    config = mixture_of(WEIGHTS, urls, **data)
    return ClipLoader(config, "", open_training_data(config), world(rank, size))


def test_clips_are_those_of_the_samples_that_the_order_says(urls):
    config = mixture_of(WEIGHTS, urls)
    order = RunOrder(config, open_training_data(config))
    assert loader(urls).steps_per_epoch == 40 // 8
    counts = collections.Counter()
    for step, batch in enumerate(loader(urls).batches(0, 12)):
        slots = order.slots(step, 0, 1)
        own = [slot.sample - FIRSTS[slot.source] for slot in slots]
        assert batch.slots.samples == [slot.sample for slot in slots]
        assert batch.keys == [f"clip-{sample:03d}" for sample in own]
        assert batch.sources is not None
        assert batch.sources.tolist() == [slot.source for slot in slots]
        assert [{sample for sample, _ in frames} for frames in shown(batch)] == [
            {sample} for sample in own
        ]
        counts.update(batch.sources.tolist())
    assert [counts[n] / 96 for n in range(3)] == [pytest.approx(w / 6, abs=0.01) for w in WEIGHTS]


@pytest.mark.parametrize("start", [1, 5, 7])
def test_a_resume_changes_no_bit(urls, start):
    whole = [bits(batch) for batch in loader(urls).batches(0, 10)]
    assert [bits(batch) for batch in loader(urls).batches(start, 10)] == whole[start:]


@pytest.mark.parametrize("data", [{}, {"feeders": 2, "decode_workers": 2}])
def test_ranks_together_make_the_batch_of_one(urls, data):
    alone = [bits(batch) for batch in loader(urls).batches(0, 6)]
    ranks = [kept(loader(urls, r, 2, **data).batches(0, 6)) for r in range(2)]
    for step, expected in enumerate(alone):
        assert [row for batches in ranks for row in bits(batches[step])] == expected


def test_a_node_may_keep_copies_of_all_sources(urls, tmp_path):
    whole = [bits(batch) for batch in loader(urls).batches(0, 6)]
    cache = {"cache_dir": str(tmp_path / "copies")}
    assert [bits(batch) for batch in loader(urls, **cache).batches(0, 6)] == whole
    assert list((tmp_path / "copies").glob("*.tar*"))


def test_each_source_has_its_region(urls, videos):
    config = mixture_of(WEIGHTS, urls, crop_scales=(0.5,))
    regions = [source.model_copy(update={"region": r}) for source, r in zip(
        config.data.sources, ("center", "full", None), strict=True
    )]  # fmt: skip
    data = config.data.model_copy(update={"sources": tuple(regions), "region": "voxceleb2"})
    config = config.model_copy(update={"data": data})
    manifest = open_training_data(config)
    order = RunOrder(config, manifest)
    info = VideoInfo(30, 25.0, 48, 48, "h264")
    (batch,) = ClipLoader(config, "", manifest, world()).batches(0, 1)
    for slot, frames in zip(order.slots(0, 0, 1), batch.frames, strict=True):
        region = regions[slot.source].region or "voxceleb2"
        cut = data.model_copy(update={"region": region})
        phase = order.of_epoch(slot.source, slot.epoch).window_phase(slot.lane, slot.position, 2)
        keys = (3, "window", slot.epoch, slot.sample), [(3, "crop", slot.epoch, slot.sample)]
        video = videos[slot.sample - FIRSTS[slot.source]]
        (expected,) = cut_clips(video, info, cut, *keys, phase)
        assert (frames == expected).all()


def test_a_bad_sample_is_replaced_by_one_of_its_source(tmp_path, videos):
    bad = {4: NO_VIDEO, 6: NO_VIDEO}
    urls = [str(tmp_path / name) for name in ("good", "bad")]
    write_data_set(urls[0], SIZES[0], videos, {})
    write_data_set(urls[1], SIZES[1], videos, bad)
    config = mixture_of((1, 1), urls)
    config = config.model_copy(update={"run": config.run.model_copy(update={"ledger": True})})
    manifest = open_training_data(config)
    found = set()
    for batch in ClipLoader(config, "", manifest, world()).batches(0, 4):
        lines = [json.loads(line) for line in batch.ledger.splitlines()]
        assert [line["source"] for line in lines] == batch.sources.tolist()
        assert [line["substituted"] for line in lines] == batch.slots.substituted
        for sample in batch.bad:
            found.add(sample.index)
    assert found == {19 + 4, 19 + 6}


def test_a_manifest_is_read_in_another_folder_than_it_was_made_in(urls, tmp_path, monkeypatch):
    """Ray's ranks run in a folder of their own, and receive the driver's manifest."""
    monkeypatch.chdir(Path(urls[0]).parent)
    config = mixture_of((3, 1), [Path(url).name for url in urls[:2]])
    manifest = open_training_data(config)
    assert manifest == open_training_data(mixture_of((3, 1), urls[:2]))
    monkeypatch.chdir(tmp_path)
    assert SampleReader("", manifest).read(0)


def test_the_fingerprint_is_of_the_sources_in_their_order_not_of_their_places(urls, tmp_path):
    moved = shutil.copytree(urls[0], tmp_path / "moved")
    first = open_training_data(mixture_of(WEIGHTS, urls)).fingerprint
    assert open_training_data(mixture_of(WEIGHTS, [str(moved), *urls[1:]])).fingerprint == first
    assert open_training_data(mixture_of(WEIGHTS, urls[::-1])).fingerprint != first


def altered(url: str, **fields) -> None:
    """Write another manifest over that of a data set."""
    where = Path(url, shard_format.MANIFEST_NAME)
    manifest = dataclasses.replace(shard_format.load_manifest(url), **fields)
    where.write_bytes(shard_format.dump(manifest))


TRAIN = {"profile": "train", "options": {"train": {"region": "full", "size": 64}}}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"profile": "source"}, "differ.*profile source, where .* has train.*same --profile"),
        (TRAIN | {"num_parts": 4}, "differ.*parts of a sample 4, where .* has 1"),
        (
            TRAIN | {"options": {"train": {"region": "full", "size": 32}}},
            "differ.*frame size 32, where .* has 64.*same --size",
        ),
        (
            TRAIN | {"options": {"train": {"region": "centre", "size": 64}}},
            'another region.*region full, where the shards have center.*region = "center"',
        ),
        (TRAIN | {"min_frames": 5}, "Window is longer than a clip of the data set.*has 5"),
    ],
)
def test_sources_that_differ_are_refused(urls, second, message):
    altered(urls[0], **TRAIN)
    altered(urls[1], **second)
    with pytest.raises(ConfigError, match=message):
        open_training_data(mixture_of((1, 1), urls[:2]))


def test_one_data_set_is_refused_as_those_of_a_mixture_are(urls, caplog):
    config = mixture_of((1, 1), urls[:2])
    data = {"sources": (), "url": urls[0], "region": "voxceleb2"}
    alone = config.model_copy(update={"data": config.data.model_copy(update=data)})
    open_training_data(alone)
    assert "set data.region=full" in caplog.text  # the whole frames of a folder are there
    altered(urls[0], **TRAIN)
    with pytest.raises(ConfigError, match=r"another region.*set data\.region=full, or shard it"):
        open_training_data(alone)


def test_images_may_be_shorter_than_a_window_and_a_source_may_name_its_kind(urls):
    altered(urls[1], kind="images", min_frames=1)
    config = mixture_of((1, 1), urls[:2])
    assert open_training_data(config).kinds_of_sources == ("videos", "images")
    videos = tuple(s.model_copy(update={"kind": "videos"}) for s in config.data.sources)
    data = config.data.model_copy(update={"sources": videos})
    alone = config.data.model_copy(update={"sources": (), "url": urls[1], "kind": "videos"})
    for wrong in (data, config.data.model_copy(update={"kind": "videos"}), alone):
        with pytest.raises(ConfigError, match=r"another kind.*kind videos, where the shards hav"):
            open_training_data(config.model_copy(update={"data": wrong}))
    right = alone.model_copy(update={"kind": "images"})
    assert open_training_data(config.model_copy(update={"data": right})).kind == "images"


def test_shards_of_every_source_are_checked_unless_they_were_before(urls):
    manifest = open_training_data(mixture_of(WEIGHTS, urls))
    assert isinstance(manifest, MixedManifest)
    Path(urls[1], manifest.shards[2].name.rpartition("/")[2]).unlink()
    with pytest.raises(ShardError, match="Shard is missing"):
        open_training_data(mixture_of(WEIGHTS, urls))
    config: Config = mixture_of(WEIGHTS, urls)
    assert open_training_data(config, {manifest.fingerprint}) == manifest


def labeled_set(url: str, videos: list[bytes], samples: range, name: str = "csv") -> str:
    """A set of two classes; persons are numbered over all sets."""
    info = VideoInfo(30, 25.0, 48, 48, "h264")
    rows = {
        n: {"set": name, "class_name": "sad" if n % 3 else "happy", "subject": f"p{n // 2}"}
        for n in samples
    }
    made = {
        n - samples.start: (videos[n], dataclasses.replace(info, labels=row))
        for n, row in rows.items()
    }
    write_data_set(url, [len(samples)], videos, made)
    return url


def mixed_task(*urls: str) -> Config:
    sources = ", ".join(f'{{url="{url}", weight={2 - number}}}' for number, url in enumerate(urls))
    data = ["num_frames=4", "frame_size=32", "num_lanes=4", "shuffle_block=4", "decode_workers=0"]
    more = ["model.size=nano", "train.global_batch_size=12", "train.micro_batch_size=12"]
    overrides = [f"data.sources=[{sources}]", *(f"data.{text}" for text in data), *more]
    return recipe.load("finetune_custom", overrides)


def test_parts_of_a_labeled_set_are_one_task(tmp_path, videos):
    urls = [
        labeled_set(str(tmp_path / "first"), videos, range(24)),
        labeled_set(str(tmp_path / "second"), videos, range(24, 40)),
    ]
    config = complete_config(mixed_task(*urls))
    assert config.task is not None
    assert (config.task.names, config.task.folds_by) == (("happy", "sad"), "subject")
    manifest = open_training_data(config)
    train, test, _ = protocol.split_samples(config, manifest, fold=1)
    for side in (train, test):
        assert (side.targets == (side.indices % 3 > 0)).all()
        assert side.indices.min() < 24 <= side.indices.max(), "of both parts"
    assert not {*train.indices // 2} & {*test.indices // 2}, "no person is on both sides"
    sources = collections.Counter()
    for batch in ClipLoader(config, "", manifest, world(), train).batches(0, 2):
        assert batch.sources is not None
        assert batch.targets is not None
        assert {*batch.slots.samples} <= {*train.indices.tolist()}
        assert batch.targets.tolist() == [int(n % 3 > 0) for n in batch.slots.samples]
        assert batch.sources.tolist() == [int(n >= 24) for n in batch.slots.samples]
        sources.update(batch.sources.tolist())
    assert sources == {0: 16, 1: 8}


def test_another_labeled_set_must_be_named_as_an_extra_one(tmp_path, videos):
    urls = [
        labeled_set(str(tmp_path / "own"), videos, range(24)),
        labeled_set(str(tmp_path / "other"), videos, range(24, 40), name="toy"),
    ]
    config = complete_config(mixed_task(*urls))
    manifest = open_training_data(config)
    with pytest.raises(ShardError, match=r"another data set.*samples of toy.*task\.extra_sets"):
        protocol.split_samples(config, manifest, fold=1)
