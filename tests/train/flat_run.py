"""Memory, threads and descriptors of a run of many steps, printed as it goes.

    PYTHONPATH=.:tests:tests/data python tests/train/flat_run.py [STEPS]     # else 10,000

The loop that trains, with a network so small that its steps take milliseconds: a feeder process
with two decode workers, the ledger, a log line every 10 steps, a checkpoint every 500. At each of
20 equally spaced steps, a line of JSON: the step; of the training process its resident memory, what
malloc and Python have in use (see data/flat_memory.py), threads and open descriptors; of all its
child processes together their resident memory, threads and descriptors, and how many they are.

During the first 1,000 steps or so torch's flight recorder of collectives fills its 2,000 entries,
about 550 bytes a step (TORCH_FR_BUFFER_SIZE=1 takes them away).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from flat_memory import in_use
from numbered_shards import video_of, write_data_set
from train_ranks import recipe_tables

LINES = 20


def counts_of(pid: int) -> dict[str, int]:
    """Resident bytes, threads and descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }


def descendants_of(pid: int) -> list[int]:
    """Processes that a process, or one of these, has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants_of(child)]
    return found


def show(step: int) -> None:
    gc.collect()
    sums = {"resident": 0, "threads": 0, "descriptors": 0}
    children = descendants_of(os.getpid())
    for child in children:
        with contextlib.suppress(OSError):  # it has just ended
            for name, value in counts_of(child).items():
                sums[name] += value
    row = {"step": step, **counts_of(os.getpid()), "in_use": in_use()}
    row |= {f"children_{name}": value for name, value in sums.items()}
    print(json.dumps(row | {"children": len(children)}), flush=True)


def main(steps: int) -> None:
    from svfap_dist.config import recipe
    from svfap_dist.train import loop

    with tempfile.TemporaryDirectory(prefix="svfap-flat-") as folder:
        videos = [video_of(i) for i in range(16)]
        write_data_set(f"{folder}/shards", [8, 8], videos, {})
        changes: dict[str, dict[str, Any]] = {
            "data": {
                "num_lanes": 2, "num_frames": 8, "feeders": 1, "decode_workers": 2,
                "decode_threads": 4, "frame_size": 16,
            },
            "model": {
                "embed_dim": 8, "num_heads": 2, "decoder_embed_dim": 8, "decoder_num_heads": 2,
                "patch_size": 8,
            },
            "optim": {"lr": 1e-3},
            "train": {
                "global_batch_size": 2, "micro_batch_size": 2, "epochs": steps, "max_steps": steps,
                "log_every": 10, "checkpoint_every": 500, "keep_last": 2,
            },
        }  # fmt: skip
        tables = recipe_tables(f"{folder}/shards", f"{folder}/run", **changes)
        config = recipe.from_tables(tables, where="flat_run")

        def on_log(row: dict[str, Any]) -> None:
            if row["step"] % max(steps // LINES // 10 * 10, 10) == 0:
                show(row["step"])

        result = loop.run(config, on_log=on_log)
        assert result.step == steps, result.stop_reason


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    os._exit(0)  # gloo now and then aborts at the interpreter's exit
