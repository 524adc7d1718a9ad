"""Make data.tar.xz and expected.json with the version of svfap_dist on the import path.

README.md has the command. The files must come from the old version: run this only with the code of
that commit, never with a newer one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import compat_cases

HERE = Path(__file__).parent
PROGRAM = [sys.executable, "-m", "svfap_dist"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
THIS = [sys.executable, __file__]

# Commands in order; the working directory becomes data.tar.xz. "stop" is `svfap pretrain` or
# `svfap finetune` stopped after an exact number of steps of the last fold, which no signal can do.
STEPS: list[list[str]] = [
    [*THIS, "videos"],
    [*PROGRAM, *compat_cases.SHARD_VIDEOS],
    [*PROGRAM, *compat_cases.SHARD_TRAIN],
    [*PROGRAM, *compat_cases.SHARD_LABELLED],
    [*THIS, "stop", "5", "recipes/pretrain.toml"],
    [*TORCHRUN, __file__, "stop", "3", "recipes/pretrain.toml", *compat_cases.TWO_RANKS],
    [*PROGRAM, "finetune", "recipes/finetune.toml"],
    [*THIS, "stop", "2", "recipes/finetune.toml", *compat_cases.STOPPED],
    [*THIS, "released"],
    [*PROGRAM, "import", "../released.pth", "-o", "imported", *compat_cases.IMPORT],
    [*PROGRAM, "export", "runs/pretrain", "-o", "exports/encoder"],
    [*PROGRAM, "export", "runs/finetune/fold-1", "-o", "exports/classifier", "--licence", "MIT"],
    [*PROGRAM, "export", "runs/finetune/fold-1", "-o", "exports/onnx", "--format", "onnx"],
    [*THIS, "strip", "exports/onnx/model.onnx"],
    [*PROGRAM, "extract", "runs/pretrain", "videos", "-o", "features.npz", "--step", "4"],
    [*PROGRAM, "checkpoint", "reshape", "runs/two-ranks", "-o", "runs/reshaped"],
]


def make() -> None:
    """Run all steps, pack their files, and record the old version's results on them."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        shutil.copytree(HERE / "recipes", data / "recipes")
        for step in STEPS:
            print("+", " ".join(step), flush=True)
            subprocess.run(step, cwd=data, check=True)
        with tarfile.open(HERE / "data.tar.xz", "w:xz", preset=9) as tar:
            for name in sorted(os.listdir(data)):
                if name != "recipes":  # kept as plain files
                    tar.add(data / name, name, filter=_anonymous)
        expected = compat_cases.observe(data)
        del expected["stderr"]
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime, member.uid, member.gid, member.uname, member.gname = 0, 0, 0, "", ""
    return member


def _videos() -> None:
    """Write small videos of several kinds to videos/, one of them truncated."""
    sys.path.insert(0, str(HERE.parent))
    from clips import make_video

    for number in range(6):
        make_video(f"videos/clip{number}.mp4", 12 + number, seed=number)
    make_video("videos/variable.mkv", 10, seed=7, container="mkv", pts=[0, 1, 2, 4, *range(7, 13)])
    make_video("videos/jpeg.avi", 10, seed=8, codec="mjpeg", container="avi")
    whole = make_video(None, 12, seed=9)
    Path("videos/broken.mp4").write_bytes(whole[: len(whole) // 2])


def _released() -> None:
    """Save random weights in the layout of the released ones."""
    sys.path.insert(0, str(HERE.parent / "model"))
    import torch
    from released import released

    state = released(width=8, depths=(1, 2), tokens=(3,), kernel=2, outputs=3)
    torch.save({"module": state}, "../released.pth")


def _strip(path: str) -> None:
    """Remove stack traces from an ONNX file: they name folders of this machine."""
    import onnx

    model = onnx.load(path)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, model.graph):
        del part.metadata_props[:]
    onnx.save(model, path)


def _stop(after: int, name: str, overrides: list[str]) -> None:
    """Train until the last fold has completed `after` steps, by internals of f84d50d."""
    from svfap_dist import recipe
    from svfap_dist.train import finetune, loop

    config, steps = recipe.load(name, overrides), 0

    def stop() -> str:
        nonlocal steps
        steps += 1
        return "SIGTERM" if steps >= after else ""

    *whole, last = finetune.runs_of(config).values() if config.task else [config]
    for one in whole:
        loop.run(one)
    loop.run(last, stop_requested=stop)


def main(arguments: list[str]) -> None:
    """Make everything, or run the step named by the arguments."""
    match arguments:
        case []:
            make()
        case ["videos"]:
            _videos()
        case ["released"]:
            _released()
        case ["strip", path]:
            _strip(path)
        case ["stop", after, name, *overrides]:
            _stop(int(after), name, overrides)


if __name__ == "__main__":
    main(sys.argv[1:])
