"""Compare our loader with those of other projects on the same clips: `make bench-peers`.

Each pipeline (`pipelines.py`) has an environment of its own, which sees this project's packages (so
there is one torch) and adds the project without its dependencies. Measured in rounds, in which the
pipelines take turns: clips per second of CPU time, seconds from the start of the process to the
first batch, and the same for a process that resumes in the middle of an epoch, with the bytes that
it reads until then, and whether its next batches are those of the run that was not interrupted.
Data are local and in the page cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from data_sharding import pipeline as sharding
from data_sharding.transcode import TrainProfile
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.reader import Sample, SampleReader
from svfap_dist.text_table import format_table

HERE = Path(__file__).parent
CODEC = ("torchcodec==0.12.0",)  # newer wheels need CUDA's libraries; wants FFmpeg's, 4 to 8
# Installed beside this project's packages, without dependencies: some pull another torch.
PACKAGES: dict[str, tuple[str, ...]] = {
    "ours": (),
    "ours_source": (),
    "streaming": (
        *CODEC,
        *("mosaicml-streaming==0.13.0", "xxhash", "zstd", "brotli", "python-snappy", "cramjam"),
        "catalogue",
    ),
    "litdata": (*CODEC, "litdata==0.2.76", "lightning-utilities", "tifffile"),
    "energon": (
        *CODEC,
        *("megatron-energon==7.4.1", "mfusepy", "multi-storage-client", "rapidyaml", "filetype"),
        *("xattr", "lark", "wcmatch", "bracex", "deprecation"),
    ),
    "webdataset": CODEC,
    "torchcodec": CODEC,
}
RENDERED, SHARD = 64, 16  # videos that are rendered; samples of a shard
TRAIN = TrainProfile(region="center", size=160)
SECONDS = 600  # limit of a process


def make_environment(name: str, folder: Path) -> Path:
    """Return the Python of a pipeline's environment, which is made if there is none."""
    if not PACKAGES[name]:
        return Path(sys.executable)
    python = folder / name / "bin" / "python"
    if (folder / name / "complete").exists():
        return python
    run = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder / name)]
    subprocess.run(run, check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = next(path for path in sys.path if path.endswith("site-packages"))
    (folder / name / "lib" / version / "site-packages" / "ours.pth").write_text(f"{site}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *PACKAGES[name]], check=True)
    (folder / name / "complete").touch()
    return python


def make_data(folder: Path, copies: int) -> None:
    """Render videos and write them as files, tars, and shards of both profiles, with copies."""
    for profile in ("source", "train"):
        url = str(folder / profile)
        settings = f"clips={RENDERED},frames=200,size=224"
        sharding.shard(
            "synthetic",
            settings,
            url,
            profile=profile,
            train=TRAIN if profile == "train" else None,
            max_samples_per_shard=SHARD,
        )
        if profile == "source":
            write_files(url, folder, copies)
        copy_shards(Path(url), copies)


def write_files(url: str, folder: Path, copies: int) -> None:
    """Write the videos of a data set as files and as tars, both with copies under other names."""
    reader = SampleReader(url, shard_format.load_manifest(url))
    samples = [sample for i in range(RENDERED) if isinstance(sample := reader.read(i), Sample)]
    for name in ("videos", "tars"):
        (folder / name).mkdir()
    paths = []
    for copy in range(copies):
        for sample in samples:
            path = folder / "videos" / f"{copy:03d}-{sample.key.replace('/', '-')}.mp4"
            path.write_bytes(sample.video)
            paths.append(path)
    for number in range(0, len(paths), SHARD):
        with tarfile.open(folder / "tars" / f"shard-{number // SHARD:06d}.tar", "w") as tar:
            for path in paths[number : number + SHARD]:
                tar.add(path, path.name)


def copy_shards(folder: Path, copies: int) -> None:
    """Add copies of all shards of a data set to it, as links."""
    manifest = shard_format.load_manifest(str(folder))
    shards, count = list(manifest.shards), len(manifest.shards)
    for number in range(count, count * copies):
        entry = manifest.shards[number % count]
        new = dataclasses.replace(entry, name=f"shard-{number:06d}.tar")
        os.link(folder / entry.name, folder / new.name)
        os.link(folder / entry.index_name, folder / new.index_name)
        shards.append(new)
    whole = dataclasses.replace(manifest, shards=tuple(shards), num_groups=len(shards))
    (folder / shard_format.MANIFEST_NAME).write_bytes(shard_format.dump(whole))


def run(python: Path, name: str, action: str, folder: Path, middle: int) -> dict[str, Any]:
    """Run one process of a pipeline and return what it printed; {"error": ...} if it failed."""
    root = HERE.parents[2]
    for cache in folder.glob(f"{name}-cache"):
        shutil.rmtree(cache)
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "BENCH_BEGAN": str(time.time()),
        "BENCH_MIDDLE": str(middle),
    }
    command = [str(python), str(HERE / "pipelines.py"), name, action, str(folder)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {SECONDS} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def compare(names: list[str], folder: Path, environments: Path, rounds: int, copies: int) -> Any:
    """Return the rows of the table, by pipeline."""
    if not (folder / "complete").exists():
        make_data(folder, copies)
        (folder / "complete").touch()
    middle = RENDERED * copies // 32 // 2
    rows: dict[str, dict[str, Any]] = {}
    pythons: dict[str, Path] = {}
    for name in names:
        try:
            pythons[name] = make_environment(name, environments)
        except subprocess.CalledProcessError as error:
            rows[name] = {"error": f"cannot be installed: {error}"}
            continue
        rows[name] = run(pythons[name], name, "prepare", folder, middle)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if "error" in rows[name]:
                continue
            result = run(pythons[name], name, "start", folder, middle)
            if "error" not in result:
                resumed = run(pythons[name], name, "resume", folder, middle)
                result = {**resumed, **{f"start_{key}": value for key, value in result.items()}}
            if "error" in result:
                rows[name] = result
            found[name].append(result)
            print(name, {k: v for k, v in result.items() if "keys" not in k}, file=sys.stderr)
    for name, results in found.items():
        if "error" not in rows[name]:
            rows[name] |= summarize(results)
    return rows


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the rounds."""
    named = {
        "clips_per_second": "start_per_second",
        "clips_per_cpu_second": "start_per_cpu_second",
        "first_batch_seconds": "start_first_batch_seconds",
        "resume_seconds": "first_batch_seconds",
        "resume_bytes": "first_batch_bytes",
    }
    medians = {
        name: statistics.median(result[field] for result in results)
        for name, field in named.items()
    }
    return {**medians, "resumes_exactly": all(r["keys"] == r["start_keys"] for r in results)}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=32, help=f"of {RENDERED} rendered videos")
    parser.add_argument("--environments", type=Path, default=Path(".venv-peers"))
    parser.add_argument("--data", type=Path, help="keep the data here (default: temporary)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="svfap-peers-") as folder:
        if options.data:
            options.data.mkdir(parents=True, exist_ok=True)
        rows = compare(
            options.only,
            options.data or Path(folder),
            options.environments.absolute(),
            options.rounds,
            options.copies,
        )
    if options.json:
        print(json.dumps(rows))
        return
    header = ("", "clips/s", "per CPU-s", "first batch", "resume", "read by then", "exact")
    table = [
        (name, row["error"], "", "", "", "", "")
        if "error" in row
        else (
            name,
            f"{row['clips_per_second']:.0f}",
            f"{row['clips_per_cpu_second']:.0f}",
            f"{row['first_batch_seconds']:.1f} s",
            f"{row['resume_seconds']:.1f} s",
            f"{row['resume_bytes'] / 1e6:.0f} MB",
            "yes" if row["resumes_exactly"] else "no",
        )
        for name, row in rows.items()
    ]
    print("\n".join(format_table(table, header, right=(1, 2, 3, 4, 5))))


if __name__ == "__main__":
    main()
