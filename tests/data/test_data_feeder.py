"""Feeder processes: the same batches, however many there are and whatever happens to them."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time

import pytest
from labeled import selection_of, task_config
from loaders import (
    NO_VIDEO,
    SIZES,
    bits,
    children_of,
    config_of,
    kept,
    lives,
    loader_of,
    order_of,
    started,
    world,
)
from numbered_shards import FRAMES, SIDE
from planted_worker import DIES, FeederKiller, QuickWorker

from svfap_dist import storage
from svfap_dist.data.feeder import num_feeders
from svfap_dist.data.filler import DataSource
from svfap_dist.data.loader import ClipLoader
from svfap_dist.errors import ClusterError, ShardError
from svfap_dist.video.info import VideoInfo

CROPS = {"crop_scales": (1.0, 0.875, 0.75, 0.66)}


@pytest.fixture
def quick(monkeypatch) -> None:
    """Workers that need no torch, whose import takes most of the time of these tests."""
    monkeypatch.setattr("svfap_dist.data.loader.ClipWorker", QuickWorker)


def feeders_of_this_process() -> list[int]:
    """Find feeders among the children: only they lead process groups."""
    return [pid for pid in children_of(os.getpid()) if os.getpgid(pid) == pid]


@pytest.mark.parametrize(
    "data", [{"feeders": 1, "decode_workers": 2, "decode_threads": 3}, {"feeders": 2}]
)
def test_feeders_change_no_bit(make_data_set, data):
    """Nor what is said of the clips: of a bad one, and of the ledger."""
    config, order = config_of(**CROPS), order_of(config_of(), SIZES, 0)
    data_set = make_data_set(SIZES, dict.fromkeys([order.sample(1, 5)], NO_VIDEO))

    def found(**data) -> list[tuple]:
        run = config.run.model_copy(update={"ledger": True})
        changed = config_of(**CROPS, **data).model_copy(update={"run": run})
        batches = loader_of(data_set, changed).batches(2, 9)
        return [(bits(b), b.bad, b.ledger, b.num_slots) for b in batches]

    expected = found()
    assert sum(len(bad) for _, bad, _, _ in expected) == 1
    assert all(ledger.count(b"\n") == 8 for _, _, ledger, _ in expected)
    assert found(**data) == expected


def test_feeders_have_repeated_samples_and_targets(make_data_set, quick):
    data_set, selection = make_data_set(SIZES), selection_of(range(0, 51, 2))

    def found(feeders: int) -> list[tuple]:
        config = task_config(repeated_sampling=2, num_lanes=2, feeders=feeders)
        loader = ClipLoader(config, data_set.url, data_set.manifest, world(), selection)
        batches = kept(loader.batches(0, 5))
        return [(b.frames.tolist(), b.targets.tolist(), b.slots) for b in batches]

    expected = found(0)
    assert len(expected[0][1]) == 2 * len(expected[0][2].keys) == 8
    assert found(2) == expected


@pytest.mark.parametrize(
    ("wanted", "lanes", "ranks", "backend", "number"),
    [
        (0, 8, 1, "pyav", 0),
        (1, 8, 1, "pyav", 1),
        (3, 8, 1, "pyav", 2),
        (9, 8, 2, "pyav", 4),
        (2, 8, 8, "pyav", 1),
        (2, 8, 1, "dali", 0),
    ],
)
def test_feeders_share_the_lanes_of_a_rank_equally(
    make_data_set, wanted, lanes, ranks, backend, number
):
    fields = config_of(feeders=wanted, num_lanes=lanes).model_dump()
    config = type(config_of()).model_validate(fields | {"decode": {"backend": backend}})
    data_set = make_data_set(SIZES)
    source = DataSource(config, data_set.url, data_set.manifest, world(0, ranks))
    assert num_feeders(source) == number


def test_a_feeder_that_is_killed_is_replaced_and_changes_no_bit(make_data_set, quick, caplog):
    data_set = make_data_set(SIZES)
    expected = [bits(batch) for batch in loader_of(data_set).batches(0, 12)]
    config = config_of(feeders=1, decode_workers=1, prefetch_bytes=1)
    batches, found = loader_of(data_set, config).batches(0, 12), []
    with caplog.at_level(logging.WARNING):
        for number, batch in enumerate(batches):
            found.append(bits(batch))
            if number in (2, 5, 8):  # not in a row at the same step
                (feeder,) = feeders_of_this_process()
                workers = children_of(feeder)
                os.kill(feeder, signal.SIGKILL)
    assert found == expected
    assert caplog.text.count("a new one refills its batches") == 3
    assert workers
    assert not any(lives(pid) for pid in [feeder, *workers])
    assert feeders_of_this_process() == []


def test_a_feeder_that_dies_at_the_same_step_again_and_again_ends_the_run(
    make_data_set, monkeypatch
):
    monkeypatch.setattr("svfap_dist.data.loader.ClipWorker", FeederKiller)
    info = VideoInfo(FRAMES, 25.0, SIDE, SIDE, "h264")
    data_set = make_data_set(SIZES, {order_of(config_of(), SIZES, 0).sample(1, 5): (DIES, info)})
    batches = loader_of(data_set, config_of(feeders=1, prefetch_bytes=1)).batches(0, 6)
    # It fills step 2 ahead, so it may die before an earlier batch has been delivered.
    with pytest.raises(ClusterError, match=r"keeps failing.*step [0-2]\..*code -9 3 times"):
        list(batches)
    assert feeders_of_this_process() == []


def test_an_error_of_a_feeder_has_its_four_parts_in_the_rank(make_data_set, quick):
    data_set, parts = make_data_set(SIZES), []
    for entry in data_set.manifest.shards:
        os.truncate(os.path.join(data_set.url, entry.name), 5000)
    for feeders in (0, 1):
        with pytest.raises(ShardError, match="cut short") as caught:
            list(loader_of(data_set, config_of(feeders=feeders, decode_threads=1)).batches(0, 6))
        error = caught.value
        parts.append((type(error), error.what, error.where, error.found, error.do))
    assert parts[0] == parts[1]
    assert feeders_of_this_process() == []


def test_signals_that_stop_a_run_do_not_reach_feeders_and_workers(make_data_set, quick):
    """A scheduler sends them to all processes of a job; the rank saves a checkpoint meanwhile."""
    config = config_of(feeders=1, decode_workers=1, prefetch_bytes=1)
    data_set = make_data_set(SIZES)
    batches = loader_of(data_set, config).batches(0, 12)
    next(batches)
    (feeder,) = feeders_of_this_process()
    pids = [feeder, *children_of(feeder)]
    assert len(pids) >= 2
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    assert [bad for batch in itertools.islice(batches, 10) for bad in batch.bad] == []
    assert all(lives(pid) for pid in pids)  # none was replaced
    batches.close()
    assert feeders_of_this_process() == []


def test_a_rank_counts_the_requests_of_its_feeders(make_data_set, quick):
    data_set, before = make_data_set(SIZES), storage.request_counts()
    fetched = [b.bytes_fetched for b in loader_of(data_set, config_of(feeders=1)).batches(0, 6)]
    new = storage.request_counts().since(before)
    assert new is not None
    assert new.bytes[storage.READ] >= sum(fetched) > 0
    assert new.requests[storage.READ, "ok"] > 0


def test_closing_ends_feeders_at_once(make_data_set, quick):
    batches = loader_of(make_data_set(SIZES), config_of(feeders=2)).batches(0, 1000)
    next(batches)
    assert len(feeders_of_this_process()) == 2
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 4  # of 5 s after which they would be killed
    assert feeders_of_this_process() == []


def test_no_more_is_filled_than_the_ring_holds(make_data_set, quick):
    batches = loader_of(make_data_set(SIZES), config_of(feeders=1, prefetch_bytes=1)).batches(0, 20)
    ready = []
    for batch in batches:
        ready.append(batch.batches_ready)
        time.sleep(0.1)  # the feeder gets ahead
    assert max(ready) == 2  # of a ring of 3, one of which is in use


_RANK = """
from svfap_dist.shards.format import load_manifest
from svfap_dist.data.loader import ClipLoader
from loaders import config_of, world
from planted_worker import QuickWorker
from svfap_dist.data import loader as loader_module
if __name__ == "__main__":
    loader_module.ClipWorker = QuickWorker
    config = config_of(decode_workers=1, feeders=1)
    batches = ClipLoader(config, {url!r}, load_manifest({url!r}), world()).batches(0, 100)
    next(batches)
    print("done", flush=True)
"""


def test_a_rank_that_ends_without_closing_its_batches_does_not_wait_for_feeders(
    make_data_set, tmp_path
):
    script = tmp_path / "rank.py"
    script.write_text(_RANK.format(url=make_data_set(SIZES).url))
    with started(script) as rank:
        assert rank.stdout
        assert rank.stdout.readline() == b"done\n"
        assert rank.wait(timeout=100) == 0
