"""`svfap bench data` from a real S3 store, with more bytes than any cache on the way holds.

    tests/services/install.sh                # once, as root: Ceph's RADOS gateway
    python tests/benchmarks/rgw.py [--before CHECKOUT] [key=value ...]

Starts a gateway on this machine, uploads a set of repeated clips, and runs the command; with
--before, also that of a checkout that `before.py` can measure, on shards that it wrote itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_REPOSITORY = str(_HERE.parents[1])
sys.path.insert(0, str(_HERE.parent / "services"))

from ceph import Ceph  # noqa: E402 - found by the path above

_SAMPLES, _BATCH, _ROUNDS = 4096, 64, 3
_STEPS = _SAMPLES // _BATCH - 10  # of a round: less than a pass, warm-up included
# Few lanes of short blocks, so that what the reader keeps is a small part of the set.
_OVERRIDES = (
    *(f"train.global_batch_size={_BATCH}", f"train.micro_batch_size={_BATCH}"),
    *("data.num_lanes=2", "data.shuffle_block=64", "data.decode_workers=2"),
)
_FIELDS = (
    *("clips_per_second", "clips_per_cpu_second", "decode_only_per_cpu_second", "share"),
    *("bytes", "cache_bytes", "cached_share", "bytes_fetched_per_clip", "bytes_read_again"),
)


def run(checkout: str, script: str | None, *words: str) -> str:
    """Return what a command prints that runs with the modules of a checkout."""
    command = [sys.executable, "-P", *([script] if script else ["-m", "svfap_dist"]), *words]
    environment = os.environ | {"PYTHONPATH": checkout}
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def upload(folder: str, url: str) -> None:
    """Copy the files of a data set to the store."""
    from svfap_dist import storage

    for name in storage.list_files(folder):
        storage.upload_file(os.path.join(folder, name), storage.join(url, name))


def main() -> None:
    """Print the figures of both sides."""
    from svfap_dist.bench import clip_sets

    parser = argparse.ArgumentParser()
    parser.add_argument("--before", default="")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="svfap-rgw-") as folder:
        ceph = Ceph(Path(folder, "ceph"))
        try:
            ceph.start()
            os.environ |= ceph.environment()
            import s3fs

            s3fs.S3FileSystem(endpoint_url=ceph.endpoint).mkdir("bench")
            sets = clip_sets.render(folder, _SAMPLES)
            urls = ["s3://bench/train", "s3://bench/source"]
            for local, url in zip((sets.train, sets.source), urls, strict=True):
                upload(local, url)
            words = ["--json", *_OVERRIDES, *options.overrides]
            if options.before:
                checkout = str(Path(options.before).resolve())
                old = run(checkout, str(_HERE / "before.py"), checkout, "--shards", folder)
                upload(old.splitlines()[-1], "s3://bench/before")
                # One round, since it cannot leave the slow public pipelines out.
                old_words = [word.replace("colors", "colours") for word in words]
                old_words += ["--source", urls[1], "--steps", str(_STEPS), "--rounds", "1"]
                done = run(checkout, None, "bench", "data", "s3://bench/before", *old_words)
                found["before"] = json.loads(done)
            words += ["--no-public", "--steps", str(_STEPS * _ROUNDS), "--rounds", str(_ROUNDS)]
            found["now"] = json.loads(run(_REPOSITORY, None, "bench", "data", urls[0], *words))
        finally:
            ceph.stop()
    for field in _FIELDS:
        values = [
            f"{side} {figures.get(field, float('nan')):,.2f}" for side, figures in found.items()
        ]
        print(f"{field:28} {', '.join(values)}")


if __name__ == "__main__":
    main()
