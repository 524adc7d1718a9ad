"""Pipelines of other projects over the same clips, each run in an environment of its own.

Run by `compare.py`: `pipelines.py NAME prepare|start|resume FOLDER`. Each pipeline is written as
its project's documentation has it. All give uint8 clips of the same shape in batches of the same
size by two worker processes, and decode with torchcodec, the fastest decoder that they can use.
A pipeline yields (keys, clips) and returns its state. torch is imported where it is used: processes
that are spawned import this module, and this project's need no torch.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

FRAMES, STRIDE, SIDE = 16, 4, 160  # of a clip
BATCH, WORKERS = 32, 2
WARM_UP, TIMED = 4, 8  # batches
CHECKED = 2  # batches whose keys must be those of the run that was not interrupted


def cut(video: bytes) -> torch.Tensor:
    """Return a random clip of a video: uint8 [F, 3, S, S]."""
    import torch
    from torchcodec.decoders import VideoDecoder

    source = VideoDecoder(video, seek_mode="approximate", num_ffmpeg_threads=1)
    start = random.randrange(max((source.metadata.num_frames or 0) - FRAMES * STRIDE + 1, 1))
    frames = source.get_frames_at(list(range(start, start + FRAMES * STRIDE, STRIDE))).data
    height, width = frames.shape[2:]
    side = int(min(height, width) * random.choice((1.0, 0.875, 0.75, 0.66)))
    top, left = random.randrange(height - side + 1), random.randrange(width - side + 1)
    frames = frames[:, :, top : top + side, left : left + side]
    return torch.nn.functional.interpolate(frames, (SIDE, SIDE), mode="bilinear", antialias=True)


def init_worker(number: int) -> None:
    """Let each worker use one core, as ours do."""
    import torch

    torch.set_num_threads(1)


def collate(samples: list[tuple[str, torch.Tensor]]) -> tuple[list[str], torch.Tensor]:
    """Return keys and clips of a batch."""
    import torch

    return [key for key, _ in samples], torch.stack([clip for _, clip in samples])


def counted(batches: Iterator[Any], taken: int) -> tuple[Iterator[Any], Callable[[], int]]:
    """Return batches and what returns their number, those of earlier processes included."""
    count = [taken]

    def count_batches() -> Iterator[Any]:
        for batch in batches:
            count[0] += 1
            yield batch

    return count_batches(), lambda: count[0]


def videos(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield key and bytes of each video of the set."""
    for path in sorted((folder / "videos").iterdir()):
        yield path.stem, path.read_bytes()


class Streaming:
    """MosaicML Streaming: MDS shards, `StreamingDataset`, `StreamingDataLoader`."""

    def __init__(self, folder: Path) -> None:
        # Its package imports torchvision for these parts, which no pipeline here uses.
        for part in ("vision", "text", "multimodal"):
            sys.modules[f"streaming.{part}"] = types.ModuleType(f"streaming.{part}")
        self.folder = folder

    def prepare(self) -> None:
        """Write the MDS shards."""
        from streaming import MDSWriter

        columns = {"key": "str", "video": "bytes"}
        with MDSWriter(out=str(self.folder / "mds"), columns=columns, size_limit=1 << 26) as out:
            for key, video in videos(self.folder):
                out.write({"key": key, "video": video})

    def batches(self, state: Any, local: str) -> tuple[Iterator[Any], Callable[[], Any]]:
        """Return batches from a state on, and what returns the state."""
        from streaming import StreamingDataLoader, StreamingDataset

        class Clips(StreamingDataset):
            def __getitem__(self, at: Any) -> tuple[str, torch.Tensor]:
                row = super().__getitem__(at)
                return row["key"], cut(row["video"])

        clips = Clips(
            remote=str(self.folder / "mds"),
            local=local,
            shuffle=True,
            shuffle_algo="py1e",
            batch_size=BATCH,
            num_canonical_nodes=1,
        )
        loader = StreamingDataLoader(
            clips, BATCH, num_workers=WORKERS, collate_fn=collate, worker_init_fn=init_worker
        )
        if state:
            loader.load_state_dict(state)
        return iter(loader), loader.state_dict


def _fetch(key_and_path: tuple[str, str]) -> dict[str, Any]:
    key, path = key_and_path
    return {"key": key, "video": Path(path).read_bytes()}


class LitData:
    """LitData: `optimize`, `StreamingDataset`, `StreamingDataLoader`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Write the chunks."""
        import litdata

        paths = sorted((self.folder / "videos").iterdir())
        rows = [(path.stem, str(path)) for path in paths]
        out = str(self.folder / "litdata")
        litdata.optimize(_fetch, rows, out, num_workers=WORKERS, chunk_bytes="64MB")

    def batches(self, state: Any, local: str) -> tuple[Iterator[Any], Callable[[], Any]]:
        """Return batches from a state on, and what returns the state."""
        import litdata

        class Clips(litdata.StreamingDataset):
            def __getitem__(self, at: Any) -> tuple[str, torch.Tensor]:
                row = super().__getitem__(at)
                return row["key"], cut(row["video"])

        clips = Clips(f"local:{self.folder / 'litdata'}", cache_dir=local, shuffle=True, seed=0)
        loader = litdata.StreamingDataLoader(
            clips,
            batch_size=BATCH,
            num_workers=WORKERS,
            collate_fn=collate,
            worker_init_fn=init_worker,
        )
        if state:
            loader.load_state_dict(state)
        return iter(loader), loader.state_dict


class Energon:
    """Megatron-Energon: `prepare_dataset` over the tars, crude samples, savable loader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Index the tars."""
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

        path = self.folder / "energon"
        path.mkdir()
        for tar in sorted((self.folder / "tars").iterdir()):
            os.link(tar, path / tar.name)
        names = [tar.name for tar in sorted(path.glob("*.tar"))]
        WebdatasetPreparator.prepare_dataset(
            path, names, split_parts_ratio=[("train", 1.0)], workers=1, fix_duplicates=False
        )
        kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (path / ".nv-meta" / "dataset.yaml").write_text(kind)

    def batches(self, state: Any, local: str) -> tuple[Iterator[Any], Callable[[], Any]]:
        """Return batches from a state on, and what returns the state."""
        from megatron.energon import (
            Cooker,
            DefaultTaskEncoder,
            WorkerConfig,
            get_savable_loader,
            get_train_dataset,
            stateless,
        )

        @stateless
        def cook(sample: dict[str, Any]) -> dict[str, Any]:
            kept = ("__key__", "__restore_key__", "__subflavors__")
            return {**{n: sample[n] for n in kept if n in sample}, "clip": cut(sample["mp4"])}

        class Encoder(DefaultTaskEncoder):
            cookers = (Cooker(cook),)
            decoder = None

            def __init__(self) -> None:
                super().__init__(raw_batch_type=dict, batch_type=dict)

            def batch(self, samples: list[Any]) -> dict[str, Any]:
                import torch

                clips = torch.stack([sample["clip"] for sample in samples])
                keys = [sample["__key__"] for sample in samples]
                return {"__key__": keys, "__restore_key__": (), "clips": clips}

        worker = WorkerConfig(rank=0, world_size=1, num_workers=WORKERS)
        data = get_train_dataset(
            str(self.folder / "energon"),
            worker_config=worker,
            batch_size=BATCH,
            shuffle_buffer_size=100,
            max_samples_per_sequence=100,
            task_encoder=Encoder(),
        )
        loader = get_savable_loader(data)
        if state:
            loader.restore_state_rank(state)
        return ((b["__key__"], b["clips"]) for b in loader), loader.save_state_rank


class WebDataset:
    """Plain webdataset: no state; a run resumes by skipping what it has seen, undecoded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Use the tars as they are."""

    def batches(self, state: Any, local: str) -> tuple[Iterator[Any], Callable[[], Any]]:
        """Return batches from a state on, and what returns the state."""
        import torch.utils.data
        import webdataset as wds

        tars = [f"file:{path}" for path in sorted((self.folder / "tars").iterdir())]
        taken = state or 0  # batches of the run so far
        skip = taken * BATCH // WORKERS  # samples of each worker
        data = (
            wds.WebDataset(tars, shardshuffle=100, seed=1, empty_check=False)
            .shuffle(100, rng=random.Random(0))
            .slice(skip, None)
            .map(lambda sample: (sample["__key__"], cut(sample["mp4"])))
        )
        loader = torch.utils.data.DataLoader(
            data, BATCH, num_workers=WORKERS, collate_fn=collate, worker_init_fn=init_worker
        )
        return counted(iter(loader), taken)


class Files:
    """A folder of videos."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted((folder / "videos").iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        return self.paths[index].stem, cut(self.paths[index].read_bytes())


class TorchCodec:
    """torchcodec over a folder of files by torch's DataLoader, whose sampler is cut to resume."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self) -> None:
        """Use the files as they are."""

    def batches(self, state: Any, local: str) -> tuple[Iterator[Any], Callable[[], Any]]:
        """Return batches from a state on, and what returns the state."""
        import torch.utils.data

        data, taken = Files(self.folder), state or 0
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
        loader = torch.utils.data.DataLoader(
            data,
            BATCH,
            sampler=order[taken * BATCH :],
            num_workers=WORKERS,
            collate_fn=collate,
            worker_init_fn=init_worker,
        )
        return counted(iter(loader), taken)


class Ours:
    """The loader of a rank, over shards of either profile."""

    profile = "train"
    fetched = 0  # bytes

    def __init__(self, folder: Path) -> None:
        self.url = str(folder / self.profile)

    def prepare(self) -> None:
        """Use the shards as they are."""

    def batches(self, state: Any, local: str) -> tuple[Iterator[Any], Callable[[], Any]]:
        """Return batches from a state on, and what returns the state."""
        from svfap_dist.config import recipe
        from svfap_dist.data.loader import ClipLoader
        from svfap_dist.distributed import World
        from svfap_dist.shards.reader import open_data

        config = recipe.load(
            "svfap_base_voxceleb2",
            [
                *("cluster.use_gpu=false", "cluster.num_workers=1", "data.num_lanes=8"),
                *(f"data.decode_workers={WORKERS}", "data.decode_threads=4"),
                *("data.region=center", "data.shuffle_block=64"),
                *(f"train.global_batch_size={BATCH}", f"train.micro_batch_size={BATCH}"),
                f"data.colors={'device' if self.profile == 'train' else 'workers'}",
            ],
        )
        loader = ClipLoader(config, self.url, open_data(config, self.url), World(0, 0, 1, 1))
        taken = state or 0

        def keys_and_frames() -> Iterator[Any]:
            for batch in loader.batches(taken, 1 << 30):
                self.fetched += batch.bytes_fetched
                yield list(batch.keys), batch.frames

        return counted(keys_and_frames(), taken)


class OursSource(Ours):
    """The same, over shards that keep the videos as they came."""

    profile = "source"


PIPELINES: dict[str, Any] = {
    "ours": Ours,
    "ours_source": OursSource,
    "streaming": Streaming,
    "litdata": LitData,
    "energon": Energon,
    "webdataset": WebDataset,
    "torchcodec": TorchCodec,
}


def bytes_read(baseline: int = 0) -> int:
    """Return the bytes that this process and its workers have read, less a baseline."""
    own = psutil.Process()
    tree = [own, *own.children(recursive=True)]
    return sum(process.io_counters().read_chars for process in tree) - baseline


def main(name: str, action: str, folder: Path) -> None:
    """Print a JSON object of measurements."""
    from svfap_dist.profiling.timing import time_batches

    began = float(os.environ["BENCH_BEGAN"])  # when the process was started
    random.seed(0)
    pipeline = PIPELINES[name](folder)
    states, local = folder / f"{name}.state", str(folder / f"{name}-cache")
    if action == "prepare":
        pipeline.prepare()
        print(json.dumps({"seconds": time.time() - began}))
        return
    state = pickle.loads(states.read_bytes()) if action == "resume" else None
    baseline = bytes_read()
    batches, state_of = pipeline.batches(state, local)
    keys = [next(batches)[0]]
    result: dict[str, Any] = {"first_batch_seconds": time.time() - began}
    read = getattr(pipeline, "fetched", 0) or bytes_read(baseline)
    result["first_batch_bytes"] = read
    if action == "start":
        rate = time_batches(batches, TIMED, BATCH, WARM_UP)
        result |= {"per_second": rate.per_second, "per_cpu_second": rate.per_cpu_second}
        # The middle of the epoch, at which a run is interrupted.
        for _ in range(int(os.environ["BENCH_MIDDLE"]) - 1 - TIMED - WARM_UP):
            next(batches)
        states.write_bytes(pickle.dumps(state_of()))
        keys = [next(batches)[0]]
    keys += [next(batches)[0] for _ in range(CHECKED - 1)]
    print(json.dumps({**result, "keys": keys}), flush=True)
    os._exit(0)  # some loaders leave threads or workers behind


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
