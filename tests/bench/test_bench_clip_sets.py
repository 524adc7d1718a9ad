"""Repeated data sets: readable, with the bytes of the first."""

from __future__ import annotations

from clips import make_video

from data_sharding import pipeline as sharding
from svfap_dist.bench import clip_sets
from svfap_dist.shards.format import load_manifest
from svfap_dist.shards.reader import Sample, SampleReader


def test_repeated_samples_are_those_of_the_set_under_new_keys(tmp_path, monkeypatch) -> None:
    for name in "abc":
        make_video(tmp_path / f"in/{name}.mp4", 61, size=(64, 64), seed=ord(name))
    once, target = str(tmp_path / "once"), str(tmp_path / "repeated")
    sharding.shard("folder", str(tmp_path / "in"), once, profile="train", workers=0)
    monkeypatch.setattr(clip_sets, "_SHARD_SAMPLES", 4)
    clip_sets.repeat(once, target, 10)
    manifest = load_manifest(target)
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 2]
    reader = SampleReader(target, manifest)
    samples = [reader.read(index) for index in range(10)]
    originals = list(clip_sets._samples(once))
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [sample.video for sample in samples] == [originals[i % 3].video for i in range(10)]
    assert manifest.num_parts == load_manifest(once).num_parts == 4
    assert len({sample.key for sample in samples}) == 10
