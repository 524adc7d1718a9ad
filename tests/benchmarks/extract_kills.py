"""Extraction to Parquet killed and resumed, beside one that is not, and its speed.

    python tests/benchmarks/extract_kills.py --clips 2000 --kills 2 --size nano

Face clips are rendered into shards of 256, and an untrained network of the given size extracts
them. Each kill is a SIGKILL once another part is finished, in the middle of the next. The files of
both extractions must be the same bytes. The speed is that of the undisturbed one; with --keep
FOLDER, `svfap bench data FOLDER/train` gives the rate of decoding alone on the same shards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from svfap_dist.bench import clip_sets
from svfap_dist.model import autoencoder, weights
from svfap_dist.model.weights import ModelInfo

_SECONDS_BETWEEN_LOOKS = 0.1
_KILLED = -9


def make_network(folder: Path, size: str) -> None:
    """Write an untrained network as `svfap export` does."""
    build = {"size": size}
    model = autoencoder.build(size)
    info = ModelInfo.of_build(build, model.size)
    weights.save(str(folder / weights.WEIGHTS), model.state_dict(), build, info)
    (folder / weights.BUILD).write_bytes(info.to_json(weights.WEIGHTS))


def parts_of(output: Path) -> dict[str, bytes]:
    """The finished files by name."""
    return {path.name: path.read_bytes() for path in output.glob("*.parquet")}


def kill_after_a_part(command: list[str], output: Path) -> int:
    """Start the extraction, kill it once it has finished another part; how many there are then."""
    before = len(list(output.glob("*.parquet")))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(output.glob("*.parquet"))) == before:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        process.kill()
    if process.returncode != _KILLED:
        sys.exit(f"the extraction ended with {process.returncode} before it could be killed")
    return len(list(output.glob("*.parquet")))


def extract(command: list[str]) -> dict[str, Any]:
    """Run the extraction to its end; its --json."""
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what main prints."""
    make_network(folder / "network", options.size)
    if not (folder / "train").exists():
        clip_sets.render(str(folder), options.clips)

    def command(name: str) -> list[str]:
        inputs = [str(folder / "network"), str(folder / "train")]
        output = ["-o", str(folder / name), "--format", "parquet", "--json"]
        extract = [sys.executable, "-m", "svfap_dist", "extract", *inputs, *output]
        return [*extract, "--region", "voxceleb2", *options.extract]

    killed, undisturbed = folder / "killed", folder / "undisturbed"
    kills = [kill_after_a_part(command("killed"), killed) for _ in range(options.kills)]
    resumed, once = extract(command("killed")), extract(command("undisturbed"))
    return {
        "parts": once["parts"],
        "parts_after_each_kill": kills,
        "videos_of_the_last_attempt": resumed["new_videos"],
        "videos": once["videos"],
        "rows": once["clips"],
        "same_bytes": parts_of(killed) == parts_of(undisturbed),
        "clips_per_second": once["clips_per_second"],
    }


def main() -> None:
    """Print one JSON object; exit with 1 if the rows differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=2000, help="videos")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--size", default="nano", help="of the network")
    parser.add_argument("--keep", default="", help="folder that is kept (default: a temporary one)")
    parser.add_argument("extract", nargs="*", help="further options of svfap extract, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="svfap-extract-") as temporary:
        found = measure(Path(options.keep or temporary), options)
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["same_bytes"] else 1)


if __name__ == "__main__":
    main()
