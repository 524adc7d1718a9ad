"""Decode workers: what hangs or dies costs one sample, and nothing of them is left behind."""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from loaders import (
    NO_VIDEO,
    SIZES,
    bits,
    config_of,
    lives,
    loader_of,
    order_of,
    started,
    world,
)
from numbered_shards import FRAMES, SIDE
from planted_worker import DIES, HANGS, PlantedWorker, QuickWorker, UnstartableWorker

from svfap_dist.config import ClusterConfig
from svfap_dist.data.batch import ring_shapes
from svfap_dist.data.clips import SharedArrays
from svfap_dist.data.filler import DataSource, open_filler
from svfap_dist.errors import ClusterError, ConfigError
from svfap_dist.video.info import VideoInfo

INFO = VideoInfo(FRAMES, 25.0, SIDE, SIDE, "h264")
TWO = {"decode_workers": 2, "decode_threads": 4}


@pytest.fixture
def planted(monkeypatch) -> None:
    monkeypatch.setattr("svfap_dist.data.loader.ClipWorker", PlantedWorker)


def children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


@pytest.mark.parametrize("feeders", [0, 1])
def test_a_decoder_that_hangs_or_dies_costs_one_sample(make_data_set, tmp_path, planted, feeders):
    """The rest of the run has the bits that it has where the same samples cannot be decoded."""
    order = order_of(config_of(), SIZES, 0)
    hanging, dying = order.sample(1, 3), order.sample(2, 1)
    data_set = make_data_set(SIZES, {hanging: (HANGS, INFO), dying: (DIES, INFO)})
    config = config_of(**TWO, decode_seconds=2.0, feeders=feeders)
    found, bad = [], {}
    for batch in loader_of(data_set, config).batches(0, 6):
        found.append(bits(batch))
        bad |= {each.index: (each.reason, each.detail) for each in batch.bad}
    assert bad[hanging] == ("hung", "the decoder gave no answer for 2 s")
    assert bad[dying] == ("crashed", "the decoder died: its process ended with code -11")
    assert set(bad) == {hanging, dying}
    assert children() == []
    os.rename(data_set.url, tmp_path / "planted")
    plain = make_data_set(SIZES, dict.fromkeys((hanging, dying), NO_VIDEO))
    assert found == [bits(batch) for batch in loader_of(plain).batches(0, 6)]


def test_workers_killed_from_outside_are_replaced(make_data_set, planted):
    batches = loader_of(make_data_set(SIZES), config_of(**TWO, prefetch_bytes=1)).batches(0, 30)
    next(batches)
    before = children()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    bad = [each for batch in batches for each in batch.bad]
    assert before
    assert len(bad) <= len(before)
    assert {each.reason for each in bad} <= {"crashed"}


@pytest.mark.parametrize("feeders", [0, 1])
def test_closing_the_batches_does_not_wait_for_a_decoder_that_hangs(
    make_data_set, planted, feeders
):
    config = config_of(**TWO, decode_seconds=600.0, prefetch_bytes=1, feeders=feeders)
    hanging = order_of(config, SIZES, 0).sample(0, 4)  # of the third batch
    data_set = make_data_set(SIZES, {hanging: (HANGS, INFO)})
    batches = loader_of(data_set, config).batches(0, 6)
    next(batches)
    next(batches)
    time.sleep(0.5)  # one of the workers has met it by now
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 10
    assert children() == []
    assert not [t for t in threading.enumerate() if t.name.startswith("clips")]


@pytest.mark.parametrize(("use_gpu", "niceness"), [(True, 5), (False, 0)])
def test_decoding_gives_way_to_the_thread_that_launches_a_gpus_work(
    make_data_set, use_gpu, niceness
):
    config = config_of(**TWO)
    config = config.model_copy(update={"cluster": ClusterConfig(use_gpu=use_gpu)})
    data_set = make_data_set(SIZES)
    source = DataSource(config, data_set.url, data_set.manifest, world())
    shared = SharedArrays(ring_shapes(config, 1, 8))
    filler = open_filler(source, shared, worker=QuickWorker)
    try:
        filler.finish(filler.start(0, 0))
        now = os.getpriority(os.PRIO_PROCESS, 0)
        found = {os.getpriority(os.PRIO_PROCESS, pid) for pid in children()}
        assert found == {now + niceness}
    finally:
        filler.close()
        shared.close()


def test_workers_that_cannot_start_are_told(make_data_set, monkeypatch):
    monkeypatch.setattr("svfap_dist.data.loader.ClipWorker", UnstartableWorker)
    with pytest.raises(ClusterError, match=r"Decode workers cannot be started.*code 3"):
        next(loader_of(make_data_set(SIZES), config_of(**TWO)).batches(0, 6))


_RANK = """
import os, sys
from svfap_dist.shards.format import load_manifest
from svfap_dist.data.loader import ClipLoader
from loaders import children_of, config_of, world
from planted_worker import QuickWorker
from svfap_dist.data import loader as loader_module
if __name__ == "__main__":
    loader_module.ClipWorker = QuickWorker
    config = config_of(decode_workers=2, decode_threads=4, feeders={feeders})
    loader = ClipLoader(config, {url!r}, load_manifest({url!r}), world())
    for _ in loader.batches(0, 100000):
        children = children_of(os.getpid())
        pids = children + [pid for child in children for pid in children_of(child)]
        if len(pids) == 3 + {feeders}:  # one of them is of Python itself
            print(*pids, flush=True)
            sys.stdin.read()
"""


@pytest.mark.parametrize("feeders", [0, 1])
def test_a_rank_killed_leaves_neither_processes_nor_shared_memory(make_data_set, tmp_path, feeders):
    data_set, script = make_data_set(SIZES), tmp_path / "rank.py"
    script.write_text(_RANK.format(url=data_set.url, feeders=feeders))
    with started(script) as rank:
        assert rank.stdout
        pids = [int(word) for word in rank.stdout.readline().split()]
        assert len(pids) == 3 + feeders
        mapped = Path(f"/proc/{rank.pid}/maps").read_text()
        assert "/memfd:svfap-clips (deleted)" in mapped  # no name in any folder
        assert "/dev/shm/" not in mapped.replace("/dev/shm/sem.", "")
        rank.kill()
    deadline = time.monotonic() + 20
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("module", ["clips", "feeder"])
def test_workers_and_feeders_need_no_torch(module):
    code = f"import sys, svfap_dist.data.{module}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "av" in loaded
    assert not loaded & {"torch", "deepspeed", "webdataset", "ray", "s3fs"}


def test_memory_that_cannot_be_had_is_told():
    with pytest.raises(ConfigError, match=r"data.prefetch_bytes.*4611686018427387904 bytes"):
        SharedArrays({"rgb": ("uint8", (1 << 62,))})


def test_without_memfd_only_threads_decode(monkeypatch):
    """As on macOS and Windows: the memory has no descriptor that a process could inherit."""
    monkeypatch.delattr(os, "memfd_create")
    shared = SharedArrays({"rgb": ("uint8", (2, 3))})
    shared.arrays["rgb"][:] = 7
    with pytest.raises(ConfigError, match=r"Decode workers are not supported.*decode_workers=0"):
        pickle.dumps(shared)
    shared.close()
    assert shared.arrays["rgb"].sum() == 42


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc")
@pytest.mark.parametrize(("workers", "feeders"), [(0, 0), (1, 0), (0, 1)])
def test_memory_stays_flat(make_data_set, workers, feeders):
    """After 1,000 batches of warming up, in which threads and decoders get their buffers."""
    here = Path(__file__).parent
    done = subprocess.run(
        [
            sys.executable,
            here / "flat_memory.py",
            make_data_set([60]).url,
            f"{workers}",
            f"{feeders}",
        ],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])},
    )
    in_use = collections.defaultdict(list)
    for line in done.stdout.splitlines():
        pid, amount = line.split()
        in_use[pid].append(int(amount))
    assert len(in_use) == 1 + workers + feeders
    for of_process in in_use.values():
        assert len(of_process) >= 20
        # Clips that threads have in hand come and go, so a line is laid through all.
        growth = np.polyfit(np.arange(len(of_process) - 10), of_process[10:], 1)[0] / 100
        assert growth < 4000, of_process  # bytes per batch; a kept clip would be 12,288
