"""What a run on one machine listens on can be reached from that machine only."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from numbered_shards import video_of, write_data_set
from train_ranks import recipe_tables, start


def test_a_run_on_one_machine_listens_on_loopback_only(tmp_path: Path) -> None:
    """The group's store, gloo, the metrics of each rank and the list of their addresses."""
    data = str(tmp_path / "shards")
    write_data_set(data, [8], [video_of(number) for number in range(8)], {})
    tables = recipe_tables(
        data,
        str(tmp_path / "run"),
        data={"feeders": 1, "decode_workers": 1},
        train={"max_steps": 2},
    )
    task = ("train_and_look_for_listeners", {"tables": tables})
    (ranks,) = start(2, [task], tmp_path / "ranks")
    for listeners in ranks:
        assert len(listeners) >= 2, listeners  # gloo, and metrics
        assert all(ipaddress.ip_address(host).is_loopback for host, _ in listeners), listeners
    assert len(ranks[0]) > len(ranks[1])  # the group's store
