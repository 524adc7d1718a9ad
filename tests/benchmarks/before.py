"""`svfap bench step` beside a checkout from before that verb, in turns and by the same method.

    git worktree add --detach /tmp/before COMMIT
    python tests/benchmarks/before.py /tmp/before

The checkout's own engine, loader and conversion run, in a process that imports them from there. The
counter of operations is this repository's, so both sides are counted alike. Names of modules are
those of the commits before the rooms were rearranged.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]
_COUNTER = _REPOSITORY / "svfap_dist/profiling/operations.py"
_FIELDS = (
    *("host_ms", "update_operations", "device_waits"),
    *("loader_us_per_clip", "rank_cpu_us_per_clip", "bytes_per_clip"),
)
_ROUNDS = 2
_NARROW = {"embed_dim": 8, "num_heads": 2, "decoder_embed_dim": 8, "decoder_num_heads": 2}
_TINY_PATCHES = {"patch_size": 4}
_WARM_UP, _STEPS = 3, 10
_SAMPLES, _CLIPS, _BATCHES, _WORKERS = 256, 64, 40, 8
_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def measure_host() -> dict[str, Any]:
    """Return the fields of the host's share of a step, as `bench.engine_step` measures it."""
    import torch
    from svfap_dist.planning import steps as old_steps

    from svfap_dist.distributed import World, free_port
    from svfap_dist.train.engine import Engine, process_group
    from svfap_dist.train.health import Health, Wishes

    torch.backends.mkldnn.enabled = False
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **_RANK}
    model, train = (
        {"size": "base", **_NARROW, **_TINY_PATCHES},
        {"zero_stage": 2, "dtype": "bfloat16"},
    )
    config, world = _recipe(1, model, {"frame_size": 16}, train), World(0, 0, 1, 1)
    with process_group(config, world) as device:
        engine = Engine(config, world, device)
        batch = old_steps._noise(config, 1)
        health = Health(device, config.data.max_bad_fraction)
        numbers = itertools.count(1)

        def update(loss: torch.Tensor) -> None:
            health.agree(next(numbers), batch.keys, 0, loss, Wishes())
            engine.update(1e-6)

        seconds = []
        for _ in range(_WARM_UP + _STEPS):
            began = time.thread_time()
            loss = engine.backward(batch, 0)
            between = time.thread_time()
            update(loss)
            seconds.append((between - began, time.thread_time() - between))
        parts = [statistics.median(column) for column in zip(*seconds[_WARM_UP:], strict=True)]
        counted = _counter().counted
        with counted(device) as of_step:
            loss = engine.backward(batch, 0)
            with counted(device) as of_update:
                update(loss)
    return {
        "host_ms": statistics.median(map(sum, seconds[_WARM_UP:])) * 1e3,
        "host_phases_ms": {"backward": parts[0] * 1e3, "update": parts[1] * 1e3},
        "operations": of_step.launched.total(),
        "update_operations": of_update.launched.total(),
        "device_waits": of_step.waits.total(),
    }


def measure_loader(folder: str) -> dict[str, float]:
    """Return what the loader costs its rank, over clips that are rendered in a folder."""
    from svfap_dist import shard_format
    from svfap_dist.data.loader import ClipLoader
    from svfap_dist.distributed import World

    url = write_shards(folder, _SAMPLES)
    data = {"decode_workers": _WORKERS, "decode_threads": 2 * _WORKERS, "colours": "device"}
    config = _recipe(_CLIPS, {"size": "base"}, data, {})
    loader = ClipLoader(config, url, shard_format.load_manifest(url), World(0, 0, 1, 1))
    batches = loader.batches(0, _BATCHES + _BATCHES // 4)
    for _ in range(_BATCHES // 4):
        next(batches)
    thread, process = time.thread_time(), time.process_time()
    for _ in range(_BATCHES):
        next(batches)
    thread, process = time.thread_time() - thread, time.process_time() - process
    batches.close()
    clips = _BATCHES * _CLIPS
    return {
        "loader_us_per_clip": thread / clips * 1e6,
        "rank_cpu_us_per_clip": process / clips * 1e6,
    }


def write_shards(folder: str, samples: int) -> str:
    """Write a shard of the profile `train` whose samples repeat a few rendered clips."""
    import dataclasses

    from svfap_dist.data.stream import SampleReader

    from data_sharding import cli, examine, pack
    from svfap_dist import shard_format

    once, url = os.path.join(folder, "once"), os.path.join(folder, "before")
    cli.shard("synthetic", "clips=4,frames=200,size=224", once, profile="train")
    manifest = shard_format.load_manifest(once)
    reader = SampleReader(once, manifest)
    clips = itertools.cycle([reader.read(index) for index in range(manifest.num_samples)])
    copies = (
        examine.Sample(f"{number:07d}", "mp4", clip.video, clip.info)
        for number, clip in enumerate(itertools.islice(clips, samples))
    )
    entry = pack.pack(copies, url, "shard-000000")
    manifest = dataclasses.replace(manifest, shards=(entry,), num_groups=1)
    Path(url, "manifest.json").write_bytes(shard_format.dump(manifest))
    return url


def measure_bytes() -> dict[str, float]:
    """Return bytes read and written per clip from planes to visible patches and targets.

    They are those of each operation's arguments and results, as a GPU would run them.
    """
    import torch
    from svfap_dist.data.convert import YuvClips, convert_batch
    from svfap_dist.planning import steps as old_steps
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from svfap_dist.model import loss, patches

    clips, total = 2, 0
    y, half = torch.zeros(2, clips, 16, 160, 160, dtype=torch.uint8), (clips, 16, 80, 80)
    u, v = (torch.zeros(half, dtype=torch.uint8) for _ in range(2))
    crops, kinds = torch.tensor([[0, 0, 160, 160]] * clips), torch.zeros(clips, dtype=torch.int64)
    planes = YuvClips(y[0], u, v, crops, kinds, 160)
    batch = old_steps._noise(_recipe(clips, {"size": "base"}, {}, {}), clips)
    skipped = _counter()._ALLOCATIONS

    class Bytes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal total
            result = func(*args, **(kwargs or {}))
            if not func.is_view and func.__name__.partition(".")[0] not in skipped:
                leaves = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result))}.values()
                tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
                total += sum(
                    min(t.numel() * t.itemsize, t.untyped_storage().nbytes()) for t in tensors
                )
            return result

    with Bytes():
        frames = convert_batch(planes, torch.float16)
        loss.targets(frames, batch.masked)
        patches.gather_rows(frames, batch.visible)
    return {"bytes_per_clip": total / clips}


def _recipe(batch: int, model: Any, data: Any, train: Any) -> Any:
    from svfap_dist import recipe

    tables = {
        "model": model,
        "data": {"num_lanes": 1} | data,
        "train": {"global_batch_size": batch, "micro_batch_size": batch, "threads_per_rank": 1}
        | train,
        "cluster": {"use_gpu": False, "num_workers": 1},
    }
    return recipe.from_tables(tables, where="before")


def _counter() -> Any:
    """Return this repository's counter, which needs nothing but torch."""
    spec = importlib.util.spec_from_file_location("operations", _COUNTER)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(checkout: str, rounds: int) -> dict[str, list[float]]:
    """Measure both sides in turns; return before and now of each field, medians of the rounds."""
    here = str(_REPOSITORY)
    commands = {
        checkout: [sys.executable, "-P", __file__, checkout, "--measure"],
        here: [sys.executable, "-P", "-m", "svfap_dist", "bench", "step", "--json"],
    }
    found: dict[str, list[Any]] = {side: [] for side in commands}
    for _, (side, command) in itertools.product(range(rounds), commands.items()):
        environment = os.environ | {"PYTHONPATH": side}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
        found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        field: [statistics.median(row[field] for row in found[side]) for side in commands]
        for field in _FIELDS
    }


def main() -> None:
    """Print both sides; with --measure or --shards, do the part of one side."""
    if "--shards" in sys.argv:
        print(write_shards(sys.argv[-1], 4096))
        return
    if "--measure" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_loader(folder) | measure_host() | measure_bytes()
        print(json.dumps(measured), flush=True)
        os._exit(0)  # gloo sometimes aborts when an interpreter ends
    found = compare(str(Path(sys.argv[1]).resolve()), _ROUNDS)
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    print(f"{'':24} {'before':>14} {'now':>14} {'ratio':>8}")
    for field, (before, now) in found.items():
        print(f"{field:24} {before:14,.1f} {now:14,.1f} {before / now if now else 0:8.1f}")


if __name__ == "__main__":
    main()
