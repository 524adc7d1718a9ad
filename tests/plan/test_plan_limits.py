"""What bounds a run, on paper."""

from __future__ import annotations

import dataclasses

import pytest

from svfap_dist.plan.limits import Costs, bytes_sent, throughput

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


def test_bytes_sent_by_stage() -> None:
    """Of 1000 bf16 weights between 4 ranks, three quarters go round in each pass."""
    sent = [bytes_sent(2000, 4, stage, accumulation=3) for stage in (0, 1, 2, 3)]
    assert sent == [3000, 3000, 1500 * 4, 1500 * 9]
    assert bytes_sent(2000, 1, 2, 1) == 0
