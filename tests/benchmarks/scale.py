"""What grows with the number of ranks: requests, collectives and seconds of starts, logs and saves.

    python tests/benchmarks/scale.py                  # this checkout
    python tests/benchmarks/scale.py --before FOLDER  # and another one beside it

The data set has 100,000 shards of 1,000 samples, which all have the same bytes, so they need no
space. Its store counts the requests of every rank. Real ranks, connected by gloo, make loaders,
validation sets, recorders and checkpoints in groups of 2, 4 and 8, two to a "host"; what rank 0
does alone is counted with the files of 8, 64 and 512 ranks.

A count marked `c` is counted; `x` is extrapolated by the parabola through those of 2, 4 and 8
ranks, for hosts of 8 ranks. Seconds of requests are not measured but follow from the counts: 30 ms
for each of the longest chain of requests that one thread makes one after the other (a listing is
one per 1,000 names), and 1/5500 s for each request of all ranks together. Where 16 or 32 threads
share requests that grow with the ranks, the extrapolated chain is as if there were a thread for
each. A log step has its
collectives and the CPU seconds of a rank's process: `m` are measured, `l` on the line through those
of 2, 4 and 8 ranks.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import pickle
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

SHARDS, PER_SHARD = 100_000, 1000
RANKS, MEASURED = (8, 64, 512), (2, 4, 8)
LATENCY, RATE, PAGE = 0.03, 5500, 1000  # seconds, requests per second, names of a listing
PER_HOST, PER_MEASURED_HOST = 8, 2
ATTEMPTS = 20  # earlier ones of the run that is restarted
_ROUNDS = 20
_REPOSITORY = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------- the store
def register_store(folder: Path) -> Any:
    """Register `sim://`: `data` is generated from one shard, the rest is below a local folder."""
    import fsspec

    tar = (folder / "template.tar").read_bytes()
    index = (folder / "template.index.json").read_bytes()
    manifest = (folder / "manifest.json").read_bytes()
    log: list[tuple[int, str]] = []  # thread and kind of each request

    class Store(fsspec.AbstractFileSystem):
        """Counts requests; a listing is one for each page."""

        protocol, cachable = "sim", True

        def _content(self, path: str) -> bytes:
            if path.startswith("data/"):
                names = {"tar": tar, "index.json": index, "done.json": b"{}"}
                stem, _, suffix = path.removeprefix("data/").partition(".")
                if path == "data/manifest.json":
                    return manifest
                if stem.startswith("shard-") and int(stem[6:]) < SHARDS:
                    return names[suffix]
                raise FileNotFoundError(path)
            return (folder / path).read_bytes()

        def _count(self, kind: str, count: int = 1) -> None:
            log.extend([(threading.get_ident(), kind)] * count)
            time.sleep(0.002)  # so that threads share requests, as with a real store

        def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
            self._count("read")
            return self._content(path)[start:end]

        def info(self, path: str, **_: Any) -> dict[str, Any]:
            self._count("look up")
            return {"name": path, "size": len(self._content(path)), "type": "file"}

        def find(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
            if path.startswith("data"):
                sizes = (("tar", len(tar)), ("index.json", len(index)), ("done.json", 2))
                names = {
                    f"data/shard-{n:06d}.{s}": size for n in range(SHARDS) for s, size in sizes
                }
            else:
                top = folder / path
                files = [p for p in top.rglob("*") if p.is_file()] if top.is_dir() else []
                names = {str(p.relative_to(folder)): p.stat().st_size for p in files}
            self._count("list", max(-(-len(names) // PAGE), 1))
            return {
                name: {"name": name, "size": size, "type": "file"} for name, size in names.items()
            }

        def ls(self, path: str, *_: Any, **__: Any) -> list[dict[str, Any]]:
            top = folder / path
            entries = list(top.iterdir()) if top.is_dir() else []
            self._count("list", max(-(-len(entries) // PAGE), 1))
            return [
                {
                    "name": str(p.relative_to(folder)),
                    "size": p.stat().st_size,
                    "type": "directory" if p.is_dir() else "file",
                }
                for p in entries
            ]

        def pipe_file(self, path: str, value: bytes, *_: Any, **__: Any) -> None:
            self._count("write")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}")
            temporary.write_bytes(value)
            temporary.replace(target)

        def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
            self.pipe_file(rpath, Path(lpath).read_bytes())

        def get_file(self, rpath: str, lpath: str, *_: Any, **__: Any) -> None:
            self._count("read")
            Path(lpath).write_bytes(self._content(rpath))

        def rm_file(self, path: str) -> None:
            (folder / path).unlink(missing_ok=True)  # S3 deletes 1,000 with the listing's request

    fsspec.register_implementation("sim", Store, clobber=True)
    return log


def make_template(folder: Path) -> None:
    """Write one shard of 1,000 samples and a manifest of 100,000 like it."""
    from data_sharding.pipeline import shard
    from data_sharding.transcode import TrainProfile
    from svfap_dist.shards import format as shard_format

    url, clips = str(folder / "one"), 50
    train = TrainProfile(region="full", layout="samples")
    shard("synthetic", f"clips={clips},frames=16,size=64", url, profile="train", train=train,
          min_frames=8, workers=0)  # fmt: skip
    made = shard_format.load_manifest(url)
    (entry,) = made.shards
    once, copies = shard_format.load_index(url, entry), PER_SHARD // clips
    samples = Path(url, entry.name).read_bytes()[: once.offsets[-1] + once.sizes[-1]]
    tar = samples * copies
    index = dataclasses.replace(
        once,
        keys=tuple(f"{key}-{n:02d}" for n in range(copies) for key in once.keys),
        offsets=tuple(n * len(samples) + offset for n in range(copies) for offset in once.offsets),
        **{name: getattr(once, name) * copies for name in ("sizes", "digests", "num_frames")},
        labels=once.labels * copies,
    )
    raw = shard_format.dump(index)
    like = shard_format.ShardEntry(
        "", PER_SHARD, len(tar), hashlib.sha256(tar).hexdigest(), hashlib.sha256(raw).hexdigest()
    )
    shards = [dataclasses.replace(like, name=f"shard-{n:06d}.tar") for n in range(SHARDS)]
    (folder / "template.tar").write_bytes(tar)
    (folder / "template.index.json").write_bytes(raw)
    whole = dataclasses.replace(made, shards=tuple(shards), num_groups=SHARDS)
    (folder / "manifest.json").write_bytes(shard_format.dump(whole))


def recipe_of(run: str, **changes: Any) -> Any:
    """A recipe that 512 ranks may train with."""
    from svfap_dist.config import recipe

    data = {
        "url": "sim://data", "num_frames": 8, "sampling_rate": 1, "frame_size": 64,
        "region": "full", "num_lanes": 512, "decode_threads": 2, "colors": "device",
        "crop_scales": [1.0], "decode_workers": 0, "feeders": 0,
    }  # fmt: skip
    tables = {
        "run": {"url": f"sim://{run}"},
        "data": data | changes.pop("data", {}),
        "model": {"size": "nano"},
        "train": {"global_batch_size": 4096, "micro_batch_size": 8, "threads_per_rank": 1},
    }
    return recipe.from_tables(tables, where="scale")


# ------------------------------------------------------------------------------ rank 0 alone
@contextlib.contextmanager
def requests_of(log: list[Any], found: dict[str, Any], what: str) -> Iterator[None]:
    """Add kinds, longest chain, and seconds of the requests made meanwhile."""
    start, began = len(log), time.perf_counter()
    yield
    mine = log[start:]
    found[what] = {
        "requests": len(mine),
        "chain": max(collections.Counter(thread for thread, _ in mine).values(), default=0),
        "kinds": dict(collections.Counter(kind for _, kind in mine)),
        "seconds": time.perf_counter() - began,
    }


def measure_alone(folder: Path) -> dict[str, Any]:
    """Return what rank 0 does alone, by number of ranks."""
    log = register_store(folder)
    from svfap_dist.checkpoint import store
    from svfap_dist.checkpoint.store import TrainState
    from svfap_dist.data.sample_order import EpochOrder
    from svfap_dist.shards import format as shard_format
    from svfap_dist.train.attempt import load_run_context

    rows: dict[str, Any] = {}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    manifest = shard_format.load_manifest("sim://data")
    rows["manifest"] = {
        "seconds": time.perf_counter() - began,
        "bytes": (folder / "manifest.json").stat().st_size,
        "pickled": len(pickle.dumps(manifest)),
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10,
    }
    began = time.perf_counter()
    EpochOrder.of_run(recipe_of("run"), [s.num_samples for s in manifest.shards], 1, None)
    rows["epoch order"] = {"seconds": time.perf_counter() - began}
    for ranks in RANKS:
        run = f"run-{ranks}"
        config = recipe_of(run)
        found = rows[str(ranks)] = {}
        with requests_of(log, found, "start"):
            load_run_context(config)
        for attempt in range(1, ATTEMPTS + 1):
            ledger = folder / run / f"ledger/attempt-{attempt:04d}"
            ledger.mkdir(parents=True)
            for rank in range(ranks):
                (ledger / f"rank-{rank:04d}.jsonl").touch()
            event = {
                "event": "start", "time": time.time(), "attempt": attempt, "step": 0,
                "total_steps": 10**6, "world_size": ranks,
                "manifest_fingerprint": manifest.fingerprint,
                "eval_fingerprint": "", "config_fingerprint": config.fingerprint,
                "versions": store.package_versions(),
                "ranks": [{"host": f"node-{rank // 8:03d}", "pid": 10**5 + rank,
                           "metrics": f"node-{rank // 8:03d}:{9000 + rank % 8}"}
                          for rank in range(ranks)],
            }  # fmt: skip
            line_of_event = json.dumps(event) + "\n"
            found["event"] = len(line_of_event)
            with open(folder / run / "events.jsonl", "a") as events:
                events.write(line_of_event)
        url = store.checkpoint_url(config.run.url, 1000)
        place = folder / run / "checkpoints" / store.checkpoint_tag(1000)
        place.mkdir(parents=True)
        state = TrainState.of_run(config, 1000, 10, manifest.fingerprint, ranks)
        names = [f"{kind}-{rank}" for kind in ("optimizer", "marker") for rank in range(ranks)]
        contents = {store.STATE: state.to_json(), **dict.fromkeys(names, b"x")}
        for name, content in contents.items():
            (place / name).write_bytes(content)
        sizes = {name: len(content) for name, content in contents.items()}
        store.commit(url, [{"name": n, "size": s, "sha256": ""} for n, s in sizes.items()])
        with requests_of(log, found, "restart"):
            assert load_run_context(config).step == 1000
    return rows


# ------------------------------------------------------------------------------- real ranks
class CountedCollectives:
    """Counts the calls of torch's collectives of this process."""

    NAMES = ("all_gather_object", "broadcast_object_list", "all_gather_into_tensor", "barrier")

    def __init__(self) -> None:
        import torch.distributed as dist

        self.counts: collections.Counter[str] = collections.Counter()
        for name in self.NAMES:
            original = getattr(dist, name)

            def counted(*given: Any, _name: str = name, _call: Any = original, **named: Any) -> Any:
                self.counts[_name] += 1
                return _call(*given, **named)

            setattr(dist, name, counted)


class FakeEngine:
    """Saves a small file for each rank, and loads anything."""

    parameter_names: tuple[str, ...] = ()

    def __init__(self, rank: int, objective: Any) -> None:
        self._rank, self.objective = rank, objective

    def save(self, folder: str, tag: str) -> None:
        import torch

        os.makedirs(os.path.join(folder, tag), exist_ok=True)
        name = f"bf16_zero_pp_rank_{self._rank}_mp_rank_00_optim_states.pt"
        torch.save({"rank": self._rank}, os.path.join(folder, tag, name))
        if self._rank == 0:
            torch.save({}, os.path.join(folder, tag, "mp_rank_00_model_states.pt"))

    def load(self, folder: str, tag: str) -> None:
        pass

    def load_states(self, states: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure_rank(folder: Path) -> dict[str, Any]:
    """Return what this rank, and the others with it, do."""
    log = register_store(folder)
    host = f"host-{int(os.environ['RANK']) // PER_MEASURED_HOST}"
    socket.gethostname = lambda: host
    from svfap_dist import distributed
    from svfap_dist.data.loader import ClipLoader
    from svfap_dist.shards import format as shard_format
    from svfap_dist.train.engine import process_group
    from svfap_dist.train.validation import ValidationSet

    config = recipe_of(f"run-of-{os.environ['WORLD_SIZE']}", data={"eval_url": "sim://data"})
    world, rows = distributed.world_from_environment(), {}
    manifest = shard_format.load_manifest("sim://data")
    with process_group(config, world):
        collectives = CountedCollectives()

        def row(what: str, action: Callable[[], Any]) -> Any:
            distributed.barrier()
            collectives.counts.clear()
            with requests_of(log, rows, what):
                made = action()
            rows[what]["collectives"] = dict(collectives.counts)
            return made

        row("planes", lambda: ClipLoader(config, "sim://data", manifest, world))
        given = (manifest,) if len(inspect.signature(ValidationSet).parameters) == 3 else ()
        row("validation", lambda: ValidationSet(config, world, *given))
        measure_records(config, row, rows)
        measure_checkpoints(config, row)
    return rows


def measure_records(config: Any, row: Callable[..., Any], rows: dict[str, Any]) -> None:
    """Measure a log step, and the exchange of two pickles that the first release made for one."""
    from svfap_dist import distributed
    from svfap_dist.telemetry import metrics
    from svfap_dist.telemetry.recorder import Recorder

    world = distributed.world_from_environment()
    losses = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0}
    numbers = {"step": 1, "total_steps": 10, "epoch": 0, **losses}
    names = ("CLIPS", "FETCH_SECONDS", "DECODE_SECONDS", "FETCHED_BYTES", "BATCHES_READY")
    counted = [getattr(metrics, name) for name in names]
    window = dict.fromkeys(names, 1.0)

    def pickles() -> None:
        distributed.all_gather_object(window)
        distributed.all_gather_object([])

    times = collections.defaultdict(list)
    with Recorder(config, world, 1, 0, lambda row: None, lambda found: None, (1, 1), None) as made:
        made.record_start(0, 10, "", {})
        made.record_ready()
        for _ in range(_ROUNDS):
            made.meter.count_step(dict.fromkeys(counted, 1))
            for what, act in (("log", lambda: made.log_step(numbers, {})), ("pickles", pickles)):
                began = time.process_time()
                row(what, act)
                times[what].append(time.process_time() - began)
    for what, values in times.items():
        rows[what]["cpu"] = statistics.median(values)


def measure_checkpoints(config: Any, row: Callable[..., Any]) -> None:
    """Save and restore a checkpoint of a small file for each rank."""
    from svfap_dist import distributed
    from svfap_dist.checkpoint import load, saver
    from svfap_dist.checkpoint.store import TrainState
    from svfap_dist.train.objective import build_objective

    world = distributed.world_from_environment()
    row("owner", lambda: saver.RunOwnership(config.run.url, world))
    engine = FakeEngine(world.rank, build_objective(config))
    state = TrainState.of_run(config, 1, 10, "", world.world_size)
    with saver.Checkpointer(config, world, lambda: None) as checkpointer:

        def save() -> None:
            checkpointer.save(engine, state)
            outcome = checkpointer.finish_upload()
            assert outcome is not None
            assert not outcome.error

        row("save", save)
    row("resume", lambda: load.restore_engine(config.run.url, state, engine, False))


def run_group(folder: Path, ranks: int, checkout: Path) -> list[dict[str, Any]]:
    """Return the rows of each rank of a group."""
    from svfap_dist.distributed import free_port

    processes, port = [], free_port()
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank % PER_MEASURED_HOST, "WORLD_SIZE": ranks,
                 "LOCAL_WORLD_SIZE": min(ranks, PER_MEASURED_HOST), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": 1}  # fmt: skip
        variables = {name: str(value) for name, value in place.items()}
        processes.append(start(folder, "rank", checkout, variables))
    return [finished(process) for process in processes]


def start(folder: Path, what: str, checkout: Path, more: dict[str, str]) -> subprocess.Popen[str]:
    """Start a measuring process that imports from a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout)} | more
    arguments = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a measuring process printed last."""
    text, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"a process ended with code {process.returncode}")
    return json.loads(text.splitlines()[-1])


# -------------------------------------------------------------------------------- the table
def extrapolate_by_parabola(values: Mapping[int, float], ranks: int) -> float:
    """Return the extrapolated value for a number of ranks, on hosts with more ranks than measured.

    The quadratic part is that of what every host does for every rank.
    """
    import numpy as np

    square, line, constant = np.polyfit(list(values), list(values.values()), 2)
    square *= PER_MEASURED_HOST / PER_HOST
    return float(square * ranks**2 + line * ranks + constant)


def seconds_of(requests: float, chain: float) -> float:
    """Return the modeled seconds of requests."""
    return chain * LATENCY + requests / RATE


def measure(checkout: Path) -> dict[str, Any]:
    """Return requests and seconds of a checkout, by row and number of ranks."""
    with tempfile.TemporaryDirectory(prefix="svfap-scale-") as name:
        folder = Path(name)
        finished(start(folder, "template", checkout, {}))
        alone = finished(start(folder, "alone", checkout, {}))
        groups = {ranks: run_group(folder, ranks, checkout) for ranks in MEASURED}
    table: dict[str, Any] = {"fixed": {k: alone[k] for k in ("manifest", "epoch order")}}
    for what in ("start", "restart"):
        cells = {}
        for ranks in RANKS:
            row = alone[str(ranks)][what]
            cells[ranks] = (row["requests"], seconds_of(row["requests"], row["chain"]), "c")
        table[f"{what}: what rank 0 reads"] = cells
    table["start event, bytes"] = {
        ranks: (alone[str(ranks)]["event"], None, "c") for ranks in RANKS
    }
    for what, name in (
        ("planes", "size of planes"),
        ("validation", "validation set"),
        ("owner", "owner of the run"),
        ("save", "checkpoint, until committed"),
        ("resume", "checkpoint, restored"),
    ):
        # How often rank 0 looks for the markers depends on how long the others take here.
        without = "list" if what == "save" else ""
        totals = {
            ranks: sum(
                n for row in group for kind, n in row[what]["kinds"].items() if kind != without
            )
            for ranks, group in groups.items()
        }
        chains = {n: max(r[what]["chain"] for r in g) for n, g in groups.items()}
        table[name] = {
            ranks: (
                round(extrapolate_by_parabola(totals, ranks)),
                seconds_of(
                    extrapolate_by_parabola(totals, ranks),
                    max(extrapolate_by_parabola(chains, ranks), 1),
                ),
                "c" if ranks in totals else "x",
            )
            for ranks in RANKS
        }
    for what, name in (("log", "log step"), ("pickles", "log step of the first release")):
        cpu = {n: statistics.median(r[what]["cpu"] for r in g) for n, g in groups.items()}
        count = sum(groups[8][0][what]["collectives"].values())
        table[name] = {
            ranks: (
                count,
                cpu.get(ranks, extrapolate_by_line(cpu, ranks)),
                "m" if ranks in cpu else "l",
            )
            for ranks in RANKS
        }
    return table


def extrapolate_by_line(values: Mapping[int, float], ranks: int) -> float:
    """Return the value for a number of ranks on the line fitted to the measured ones."""
    import numpy as np

    slope, constant = np.polyfit(list(values), list(values.values()), 1)
    return float(slope * ranks + constant)


def show(tables: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table."""
    for name, table in tables.items():
        manifest, order = table["fixed"]["manifest"], table["fixed"]["epoch order"]
        yield (
            f"{name}: the manifest has {manifest['bytes'] / 1e6:.1f} MB, is read in "
            f"{manifest['seconds']:.2f} s (m), sent as {manifest['pickled'] / 1e6:.1f} MB and "
            f"takes {manifest['memory'] / 1e6:.0f} MB of memory; the order of an epoch takes "
            f"{order['seconds'] * 1e3:.0f} ms (m)"
        )
    head = [f"{name}, {ranks} ranks" for ranks in RANKS for name in tables]
    yield "| | " + " | ".join(head) + " |"
    yield "|" + "---|" * (len(head) + 1)
    rows = [row for row in next(iter(tables.values())) if row != "fixed"]
    for row in rows:
        cells = [cell(*table[row][ranks]) for ranks in RANKS for table in tables.values()]
        yield f"| {row} | " + " | ".join(cells) + " |"


def cell(count: int, seconds: float | None, mark: str) -> str:
    """Return the text of a count and seconds."""
    if seconds is None:
        return f"{count:,} ({mark})"
    return (
        f"{count:,}, {seconds:.2f} s ({mark})"
        if seconds >= 0.1
        else f"{count:,}, {seconds * 1e3:.1f} ms ({mark})"
    )


def main() -> None:
    """Measure this checkout, and another one beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measures = {"alone": measure_alone, "rank": measure_rank, "template": make_template}
        print(json.dumps(measures[options.measure](options.folder)), flush=True)
        os._exit(0)  # gloo now and then aborts at the interpreter's exit
    tables = {"before": measure(options.before.resolve())} if options.before else {}
    tables["now"] = measure(_REPOSITORY)
    print("\n".join(show(tables)))


if __name__ == "__main__":
    main()
