"""What bounds a run, on paper."""

from __future__ import annotations

import dataclasses

import pytest

from svfap_dist.plan.limits import Costs, Traffic, bytes_sent, exposed_seconds, throughput
from svfap_dist.profiling.memory import ModelBytes

# Two nodes of 4 GPUs: steps of 64 clips in 0.4 s, 160 clips/s. 2 x 4 decoders at 100 per second
# each do 800; 2 x 100 MB/s of 0.2 MB each, 1000.
_GPUS = Costs(
    nodes=2,
    clips=64,
    step_seconds=0.4,
    network_seconds=0.0,
    compute_cpu_seconds=0.0,
    decode_cpu_seconds=0.01,
    decoders=4,
    cores=16,
    clip_bytes=2e5,
    storage_rate=1e8,
)
# A node with 2 cores: steps of 8 clips in 0.1 s on one of them; a clip costs 0.0125 CPU-seconds.
_CPU = Costs(
    nodes=1,
    clips=8,
    step_seconds=0.1,
    network_seconds=0.0,
    compute_cpu_seconds=0.0125,
    decode_cpu_seconds=0.002,
    decoders=2,
    cores=2,
)


@pytest.mark.parametrize(
    ("change", "bound_by", "rate"),
    [
        ({}, "compute", 160),
        ({"network_seconds": 0.1}, "compute", 128),
        ({"network_seconds": 0.6}, "network", 64),
        ({"decode_cpu_seconds": 0.1}, "decode", 80),
        ({"decode_cpu_seconds": 0.1, "decoders": 64}, "compute", 160),
        ({"decode_cpu_seconds": 0.25, "decoders": 64}, "decode", 128),  # 16 cores of each node
        ({"storage_rate": 1e6}, "storage", 10),
        ({"storage_rate": None, "clip_bytes": None}, "compute", 160),
    ],
)
def test_the_slowest_stage_bounds_a_pipeline(change, bound_by, rate) -> None:
    found = throughput(dataclasses.replace(_GPUS, **change))
    assert found.bound_by == bound_by
    assert found.clips_per_second == pytest.approx(rate)


@pytest.mark.parametrize(
    ("change", "bound_by", "rate"),
    [
        ({}, "compute", 80),  # the other core has time enough to decode
        ({"decode_cpu_seconds": 0.02}, "decode", 2 / 0.0325),  # both are busy
        ({"compute_cpu_seconds": 0.025, "decode_cpu_seconds": 0.02}, "compute", 2 / 0.045),
        ({"decode_cpu_seconds": 0.1, "decoders": 1}, "decode", 10),
        ({"decode_cpu_seconds": None}, "compute", 80),
        ({"slowdown": 1.5}, "compute", 80 / 1.5),  # what was tried wins
        ({"slowdown": 0.9}, "compute", 80),
    ],
)
def test_computing_and_decoding_share_cores(change, bound_by, rate) -> None:
    found = throughput(dataclasses.replace(_CPU, **change))
    assert found.bound_by == bound_by
    assert found.clips_per_second == pytest.approx(rate)


def test_two_nodes_of_cpus_do_twice_as_much() -> None:
    both = dataclasses.replace(_CPU, nodes=2, clips=16, decode_cpu_seconds=0.02)
    assert throughput(both).clips_per_second == pytest.approx(2 * 2 / 0.0325)


def test_a_step_takes_as_long_as_its_host_takes_to_launch_it() -> None:
    """32 clips are a few milliseconds of an H100's work, and tens of its host's."""
    found = throughput(dataclasses.replace(_GPUS, host_seconds=0.8))
    assert (found.bound_by, found.clips_per_second) == ("host", pytest.approx(80))
    assert found.alone["host"] == pytest.approx(80)
    assert found.alone["compute"] == pytest.approx(160)
    assert throughput(dataclasses.replace(_GPUS, host_seconds=0.3)).bound_by == "compute"


_MODEL = ModelBytes(parameters=1000, number_bytes=2, buffers=0, kept_per_clip=0)


def test_bytes_sent_by_stage() -> None:
    """Of 1000 bf16 weights between 4 ranks, three quarters go round in each pass; an all-reduce of
    gradients is two, of a step's sum (0, 1) or of each micro batch (2)."""
    sent = [bytes_sent(_MODEL, 4, stage, accumulation=3, bucket=250) for stage in range(4)]
    assert [found.reduced for found in sent] == [3000, 3000, 9000, 4500]
    assert [found.gathered for found in sent] == [0, 1500, 1500, 9000]
    assert [found.last for found in sent] == [750, 750, 750, 0]
    assert bytes_sent(_MODEL, 1, 2, 1) == Traffic(0, 0, 0)


@pytest.mark.parametrize(
    ("stage", "step", "seconds"),
    [
        (1, 9.0, 1.0 + 1.5),  # of 3 s, the last backward pass hides 2
        (1, 4.5, 2.0 + 1.5),
        (2, 9.0, 3.0 + 1.5),  # 6 of 9 s
        (2, 90.0, 3 * 0.75 + 1.5),  # the last bucket of each micro batch
        (3, 90.0, 13.5),
    ],
)
def test_backward_passes_hide_the_reduction_of_all_but_the_last_bucket(
    stage: int, step: float, seconds: float
) -> None:
    sent = bytes_sent(_MODEL, 4, stage, accumulation=3, bucket=250)
    assert exposed_seconds(sent, 1000.0, step, stage, 3) == pytest.approx(seconds)
