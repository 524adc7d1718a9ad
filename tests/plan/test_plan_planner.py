"""Plans for GPUs, which need no measurement, recomputed by hand; and one with nothing but a CPU."""

from __future__ import annotations

import json

import pytest
from numbered_shards import write_data_set

from svfap_dist.config import check_world_size, recipe
from svfap_dist.errors import ConfigError
from svfap_dist.plan import devices, planner
from svfap_dist.plan.planner import Input, KnownRates, Plan, plan_run

_SMALL = ("model.size=tiny", "train.micro_batch_size=8", "cluster.use_gpu=true")


_SENT = ("gradients", "weights")


def _plan(*overrides: str, nodes: int = 2, gpu: str = "h100", **known) -> Plan:
    config = recipe.load("svfap_base_voxceleb2", [*_SMALL, *overrides])
    return plan_run(config, nodes, 4, gpu, KnownRates(**{"host_ms": 0.0, **known}))


def _input(found: Plan, name: str) -> Input:
    (given,) = [given for given in found.inputs if given.name == name]
    return given


def test_a_plan_for_gpus_is_its_inputs_multiplied() -> None:
    found = _plan(mfu=0.5, samples=25600, decode_rate=1e6)
    work, peak = _input(found, "work of a clip").value, 989.4e12
    assert work is not None
    computing = 256 / 8 * work * 1e9 / (0.5 * peak)
    sent = [_input(found, f"{what} sent by a rank in a step").value for what in _SENT]
    assert sent[0] is not None
    assert sent[1] is not None
    # Both nodes have a network card of 50 GB/s per GPU, together slower than NVLink's 450. All
    # gradients are in one bucket, which nothing hides.
    sending = sum(sent) * 1e6 / (4 * 50e9)
    assert found.step_seconds == pytest.approx(computing + sending)
    assert found.clips_per_second == pytest.approx(256 / (computing + sending))
    assert found.bound_by == ("network" if sending > computing else "compute")
    assert found.total_steps == 100 * 100
    assert found.hours == pytest.approx(10000 * (computing + sending) / 3600)
    assert _input(found, "share of it that is reached (MFU)").source == "given"
    assert "measured" not in _input(found, "samples").source


def test_assumptions_are_marked() -> None:
    found = _plan()
    assert "assumed" in _input(found, "share of it that is reached (MFU)").source
    assert "docs/benchmarks.md" in _input(found, "clips decoded").source
    assert "unknown" in _input(found, "storage, of a node").source
    assert found.hours is None
    assert any("--samples" in line for line in found.lines())
    assert json.dumps(found.clips_per_second)
    text = "\n".join(found.lines())
    assert "No GPU of this machine was measured" in text
    assert "Assumed: share of it that is reached (MFU), " in text


def test_the_host_of_a_gpu_is_measured_here_and_bounds_small_micro_batches() -> None:
    """The operations of a pass are counted, whatever the width; compiled, they are fewer."""
    found = _plan(host_ms=None)
    operations = _input(found, "operations of a micro batch").value
    assert operations is not None
    assert 500 < operations < 3000
    assert found.bound_by == "host"
    per_clip = _input(found, "host, of a micro batch")
    assert per_clip.source.startswith("measured on this machine")
    assert "Measured on this machine: host, of a micro batch." in "\n".join(found.lines())
    compiled = _plan("train.compile=true", host_ms=None)
    assert compiled.alone["host"] > 2 * found.alone["host"]
    graphs = ("train.compile=true", "train.compile_mode=reduce-overhead")
    replayed = _plan(*graphs, host_ms=None)
    assert replayed.alone["host"] > compiled.alone["host"]
    accumulated = _plan("train.global_batch_size=1024", host_ms=None)
    assert accumulated.step_seconds > 2 * found.step_seconds


@pytest.mark.parametrize(
    ("name", "gpus", "gpu"),
    [
        ("svfap_base_voxceleb2", 8, "h100"),
        ("svfap_base_voxceleb2_1gpu", 1, "h100"),
        ("svfap_base_voxceleb2_large_batch", 8, "a100-40gb"),
    ],
)
def test_bundled_recipes_fit_their_gpus_and_train_on_as_many_clips(
    name: str, gpus: int, gpu: str
) -> None:
    config, samples = recipe.load(name), 1_091_840
    assert config.cluster.num_workers == gpus
    found = plan_run(config, 1, gpus, gpu, KnownRates(samples=samples, host_ms=20.0))
    assert found.notes == []
    assert found.total_steps is not None
    clips = found.total_steps * config.train.global_batch_size
    assert clips == pytest.approx(100 * samples, rel=1e-3)
    assert check_world_size(config, gpus) == 1  # no accumulation
    # Small shares of a step wait for the host, large ones keep the GPU busy.
    per_gpu = config.train.global_batch_size // gpus
    assert found.bound_by == ("host" if per_gpu < 64 else "compute")


def test_decoding_and_networks_can_bound() -> None:
    assert _plan(decode_rate=1.0).bound_by == "decode"
    # 14 workers on each of 8 ranks, on 4 x 16 cores of a node, decode a clip per second each.
    assert _plan(decode_rate=1.0).clips_per_second == pytest.approx(2 * 4 * 14)
    slow = {"network_gbps": 0.01, "decode_rate": 1e6}
    assert _plan(**slow).bound_by == "network"
    assert _plan(**slow, nodes=1).bound_by == "compute"


def test_reads_follow_from_the_shards_and_the_memory(tmp_path, make_data_set) -> None:
    """Where read samples cannot be kept until their use, each byte is read several times."""
    data_set = make_data_set([16, 16])
    total = sum(shard.num_bytes for shard in data_set.manifest.shards)
    small = ["num_frames=8", "sampling_rate=1", "frame_size=64", "region=full", "num_lanes=8"]
    overrides = [
        *(f"data.{key}" for key in (f"url={data_set.url}", *small)),
        *("train.global_batch_size=8", "train.micro_batch_size=1", "model.size=nano"),
        *("mask.ratio=0.5", "data.decode_workers=0", "data.decode_threads=1", "data.feeders=0"),
    ]
    found = _plan(*overrides)
    assert _input(found, "samples").value == 32
    assert _input(found, "read for a clip").value == pytest.approx(total / 32)
    assert _input(found, "read ahead, of a rank").value is not None
    assert found.notes == []
    short = _plan(*overrides, "data.read_ahead_bytes=1000")
    twice = _input(short, "read for a clip").value
    assert twice is not None
    assert twice >= 2 * total / 32
    (note,) = short.notes
    assert "times" in note
    assert "data.read_ahead_bytes" in note


def test_a_mixture_is_planned_with_the_epochs_of_each_source(tmp_path, videos) -> None:
    for name, sizes in (("large", [16, 16]), ("small", [8])):
        write_data_set(str(tmp_path / name), sizes, videos, {})
    sources = [f'{{url="{tmp_path}/large", weight=3}}', f'{{url="{tmp_path}/small"}}']
    found = _plan(
        f"data.sources=[{','.join(sources)}]",
        *("data.num_frames=8", "data.sampling_rate=1", "data.frame_size=64", "data.region=full"),
        "data.num_lanes=8",
        *("train.global_batch_size=8", "train.micro_batch_size=1", "model.size=nano"),
        *("mask.ratio=0.5", "data.decode_workers=0", "data.decode_threads=1", "data.feeders=0"),
        "train.epochs=4",
    )
    assert (_input(found, "samples").value, found.total_steps) == (40, 20)
    assert _input(found, "samples").source == "manifest of all data.sources"
    assert _input(found, "epochs of large").value == pytest.approx(160 * 0.75 / 32)
    assert _input(found, "epochs of small").value == pytest.approx(160 * 0.25 / 8)
    assert _input(found, "epochs of small").source == "25 % of all samples, by its weight; it has 8"


def test_the_cores_of_this_machine_are_those_of_its_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("svfap_dist.parallel.cpus.visible_cpus", lambda: 64)
    monkeypatch.setattr("svfap_dist.parallel.cpus.cpu_quota", lambda: 4.0)
    config = recipe.load("tiny_cpu")
    assert planner._Planner(config, 1, 1, devices.CPU, KnownRates())._cores() == 4


def test_a_run_that_does_not_fit_is_noted() -> None:
    assert not _plan().notes
    large = ("model.size=base", "train.micro_batch_size=512", "train.global_batch_size=4096")
    (note,) = _plan(*large, gpu="l4").notes
    assert "does not fit" in note


@pytest.mark.parametrize(
    ("overrides", "gpu", "words"),
    [
        ((), "abacus", "h100"),
        (("train.dtype='float32'", "train.global_batch_size=192"), "b200", "peak rate"),
        (("data.num_lanes=2", "cluster.num_workers=2"), "h100", "Lanes cannot be shared"),
    ],
)
def test_what_cannot_be_planned(overrides: tuple[str, ...], gpu: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _plan(*overrides, gpu=gpu)
