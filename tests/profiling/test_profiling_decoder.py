"""Which backend a run gets: the one that is named, its own of old, or the fastest that can."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from clips import make_video
from numbered_shards import write_data_set

from svfap_dist.config import ClusterConfig, Config, DataConfig, DecodeConfig, ModelConfig
from svfap_dist.data import decoding
from svfap_dist.errors import ConfigError
from svfap_dist.profiling import decoder
from svfap_dist.profiling.timing import Rate
from svfap_dist.train import loop
from svfap_dist.video.backends import BACKENDS, open_decoder
from svfap_dist.video.info import VideoInfo

needs_dali = pytest.mark.skipif(not BACKENDS["dali"].is_installed, reason="DALI is not installed")


def config_of(backend: str = "auto", use_gpu: bool = False, **data) -> Config:
    return Config.model_validate(
        {
            "data": DataConfig(
                num_frames=16, sampling_rate=1, frame_size=32, num_lanes=1, region="full", **data
            ),
            "decode": DecodeConfig.model_validate({"backend": backend, "pipelines": 2}),
            "cluster": ClusterConfig(use_gpu=use_gpu),
            "model": ModelConfig(size="nano"),
            "mask": {"ratio": 0.5},
        }
    )


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    folder, sets = tmp_path_factory.mktemp("backends"), {}
    for codec, name, container in (("libx264", "h264", "mp4"), ("libvpx-vp9", "vp9", "mp4")):
        video = make_video(None, 20, size=(48, 48), codec=codec, container=container)
        sample = video, VideoInfo(20, 25.0, 48, 48, name)
        sets[name] = write_data_set(
            str(folder / name), [3], [video] * 3, dict.fromkeys(range(3), sample)
        )
    return sets


def choose(config: Config, data_set) -> str:
    return decoder.choose_backend(config, data_set.url, data_set.manifest)


def no_measuring(monkeypatch) -> None:
    def measure(*_: object) -> dict[str, float]:
        raise AssertionError("nothing is to be measured here")

    monkeypatch.setattr(decoder, "_measure_backends", measure)


def test_h264_on_a_cpu_is_decoded_by_pyav_without_a_measurement(data_sets, monkeypatch):
    no_measuring(monkeypatch)
    assert choose(config_of(), data_sets["h264"]) == "pyav"


@needs_dali
def test_the_faster_of_two_backends_is_chosen_and_logged(data_sets, monkeypatch, caplog):
    monkeypatch.setattr(decoder, "_SECONDS", 0.05)
    caplog.set_level("INFO")
    samples = decoding.first_samples(data_sets["vp9"].url, data_sets["vp9"].manifest)
    rates = decoder._measure_backends(config_of(), samples, ["pyav", "dali"])
    assert all(rate > 0 for rate in rates.values())
    for faster, slower in (("pyav", "dali"), ("dali", "pyav")):
        monkeypatch.setattr(decoder, "_measure_backends", lambda *_: {slower: 90.0, faster: 400.0})  # noqa: B023
        assert choose(config_of(), data_sets["vp9"]) == faster
        said = caplog.messages[-1]
        assert f"Decoding with {faster}" in said
        assert f"{faster} 400" in said
        assert f"{slower} 90" in said


@pytest.mark.parametrize(
    ("workers", "cores", "decoders"), [(3, 64, 3), (0, 64, 28), (14, 8, 8), (0, 2, 2)]
)
def test_threads_that_only_fetch_and_missing_cores_do_not_count(
    data_sets, monkeypatch, workers, cores, decoders
):
    """The default backend's rate is that of the workers, or of threads, that decode at a time."""
    monkeypatch.setattr(decoder, "time_decoder", lambda *_: Rate(10, 1.0, 1.0))
    monkeypatch.setattr(decoder, "usable_cpus", lambda: cores)
    samples = decoding.first_samples(data_sets["h264"].url, data_sets["h264"].manifest)
    config = config_of(decode_workers=workers, decode_threads=28)
    assert decoder._measure_backends(config, samples, ["pyav"]) == {"pyav": 10.0 * decoders}


def test_naming_one_always_wins(data_sets, monkeypatch):
    no_measuring(monkeypatch)
    assert choose(config_of("pyav"), data_sets["vp9"]) == "pyav"
    assert choose(config_of("dali"), data_sets["vp9"]) == "dali"
    assert choose(config_of("dali", use_gpu=True), data_sets["h264"]) == "dali"


def test_a_missing_backend_is_no_candidate_and_naming_it_is_an_error(data_sets, monkeypatch):
    no_measuring(monkeypatch)
    missing = dataclasses.replace(BACKENDS["dali"], module="nvidia.no_such_module")
    monkeypatch.setitem(BACKENDS, "dali", missing)
    assert choose(config_of(), data_sets["vp9"]) == "pyav"
    open_decoder.cache_clear()
    with pytest.raises(ConfigError, match=r"svfap-dist\[gpu\]"):
        decoding.decoder_of(config_of("dali"))


def test_dali_for_h264_on_a_cpu_is_refused_before_anything_starts(data_sets, tmp_path):
    tables = config_of("dali", url=data_sets["h264"].url).model_dump()
    config = Config.model_validate({**tables, "run": {"url": str(tmp_path / "run")}})
    with pytest.raises(ConfigError, match="does not decode h264") as caught:
        loop.preflight(config)
    assert "decode.backend=pyav" in caught.value.do


@pytest.mark.parametrize(
    ("asked", "before", "expected"),
    [
        ("auto", "dali", "dali"),
        ("auto", "pyav", "pyav"),
        ("auto", "auto", "pyav"),
        ("pyav", "dali", "pyav"),
    ],
)
def test_a_resumed_run_keeps_its_backend(asked, before, expected):
    tables = config_of(before).model_dump(mode="json")
    assert decoding.pin_backend(config_of(asked), tables).decode.backend == expected


def test_there_are_as_many_pipelines_as_the_card_has_decoding_units(monkeypatch):
    """Unless the recipe says how many; on a CPU, and before there is a device, one."""
    by_card = config_of("dali", use_gpu=True)
    by_card = by_card.model_copy(update={"decode": DecodeConfig(backend="dali")})
    assert decoding.pipelines_of(by_card) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert decoding.pipelines_of(by_card) == 7
    assert decoding.pipelines_of(config_of("dali", use_gpu=True)) == 2
    assert decoding.pipelines_of(Config()) == 1
