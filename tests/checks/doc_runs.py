"""Run the documents' commands and examples, those without a mark, on small inputs.

Each document has a folder of its own, with the inputs that its commands name: rendered faces, small
copies of data sets, a run of the demo's recipe, and what README.md's commands made before. All
commands run in this one process, in the order in which they are written. They are run as they are
shown, but for these substitutes:

    s3://bucket/x, /data/x    folders x and data/x
    --on ray, torchrun        one rank, in this process
    --workers 8               no worker processes
    clips=490,identities=70   fewer rendered clips
    pretrain, finetune, ...   overrides for the smallest network, two steps and a small batch,
                              unless the command gives the key
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import doc_commands  # noqa: E402
import face_videos  # noqa: E402
import layouts  # noqa: E402
import numpy as np  # noqa: E402
from doc_commands import Command, Fence  # noqa: E402

from data_sharding.sources.synthetic_face.identity import draw_identity  # noqa: E402
from data_sharding.sources.synthetic_face.motion import Face  # noqa: E402
from data_sharding.sources.synthetic_face.render import render_frames  # noqa: E402
from svfap_dist import cli  # noqa: E402

_SUBSTITUTES = (
    (r"^s3://bucket/|(?<=[=\"])s3://bucket/", ""),
    (r"^/data/|(?<==)/data/", "data/"),
    (r"clips=\d+,identities=\d+", "clips=5,identities=5"),  # one in each fold
)
_SMALL = {
    "model.size": "nano",
    "train.max_steps": "2",
    "train.global_batch_size": "2",
    "train.micro_batch_size": "2",
    "train.dtype": "float32",
    "train.threads_per_rank": "1",
    "data.num_lanes": "1",
    "data.decode_workers": "0",
    "data.decode_threads": "1",
    "data.feeders": "0",
    "cluster.num_workers": "1",
    "cluster.cpus_per_worker": "1",
    "cluster.use_gpu": "false",
}
_TRAINING = ("pretrain", "finetune", "evaluate")
# doctor may find that the machine is too small for the recipe.
_EXIT_CODES = {"svfap doctor": (0, 9)}
_NUM_FRAMES = 61  # the least that `svfap shard` takes by default
# What README.md's commands have made, or this file, where another document names it.
_FROM_README = {"runs/a": "runs/base", "runs/base": "runs/base", "features.npz": "features.npz"}
# What an example takes for granted.
_BEFORE = {
    "docs/use.md": "import numpy as np, torch\n"
    "clips = torch.zeros(1, 16, 160, 160, 3, dtype=torch.uint8)\n"
}
_ARGUMENTS = {"docs/tuning.md": "runs/traced/profile/*.trace.json.gz"}


def _face_video(identity: int, num_frames: int = _NUM_FRAMES, side: int = 224) -> bytes:
    """Return a video of a rendered face that moves a little."""
    face = next(render_frames(draw_identity(0, identity), [Face()], side))
    return face_videos.encode(np.roll(face, n % 5, axis=1) for n in range(num_frames))


def _scene_video(num_frames: int) -> bytes:
    """Return a video of a face that is a part of the picture."""
    ways = face_videos.straight_way(_NUM_FRAMES)[:num_frames]
    return face_videos.encode(face_videos.with_faces(corner) for corner in ways)


def make_inputs(folder: Path) -> None:
    """Make the files that the documents' commands read."""
    long, short = _scene_video(_NUM_FRAMES), _scene_video(8)
    layouts.put(folder / "face.mp4", _face_video(0))
    for number in range(4):
        path = folder / f"data/voxceleb2/dev/mp4/id{number:05d}/clip/00001.mp4"
        layouts.put(path, _face_video(number))
    for number in range(2):
        layouts.put(folder / f"data/videos/{number}.mp4", long)
    rows = ["path,label,subject"]
    for person in ("anna", "ben", "cleo", "dan"):
        for number, label in enumerate(("happy", "sad"), start=1):
            is_long = person == "anna"
            layouts.put(folder / f"my-videos/{person}/{number:02d}.mp4", long if is_long else short)
            rows.append(f"{person}/{number:02d}.mp4,{label},{person}")
    layouts.put(folder / "my-videos/labels.csv", "\n".join(rows) + "\n")
    layouts.dfew(folder / "data/DFEW")
    for number in range(8):
        path = folder / f"data/faces-by-expression/{('happy', 'sad')[number % 2]}/{number}.png"
        layouts.put(path, layouts.picture(number, (96, 96), "PNG"))


def _make_demo(folder: Path) -> None:
    """Leave what `make demo` would, with the smallest network."""
    layouts.put(folder / "svfap-demo/faces/1.mp4", _face_video(1, side=96))
    with contextlib.chdir(folder):
        _must(["svfap", "shard", "synthetic", "clips=5,identities=5", "svfap-demo/shards"])
        urls = ["data.url=svfap-demo/shards", "run.url=svfap-demo/run", "data.region=full"]
        _must(["svfap", "pretrain", "tiny_cpu", *urls])


def _must(words: list[str]) -> None:
    if problem := run_command(Command("", 0, tuple(words), "")):
        raise RuntimeError(problem)


def substitute(words: tuple[str, ...]) -> list[str]:
    """Return the words to run for those that are shown.

    Args:
        words: Words of a command.
    """
    if words[0] == "OMP_NUM_THREADS=1":
        words = words[1:]
    if words[0] == "torchrun":
        words = ("svfap", *doc_commands.torchrun_call(list(words[1:])))
    found = list(words)
    for pattern, replacement in _SUBSTITUTES:
        found = [re.sub(pattern, replacement, word) for word in found]
    for option, value in (("--on", "local"), ("--workers", "1")):
        if option in found:
            found[found.index(option) + 1] = value
    if found[0] == "svfap":
        verb, _ = doc_commands.parse_call(found[1:])
        if verb.removeprefix("svfap ") in _TRAINING:
            given = {word.partition("=")[0] for word in found}
            found += [f"{key}={value}" for key, value in _SMALL.items() if key not in given]
    return found


def run_command(command: Command) -> str:
    """Run a command in the working folder and return what went wrong, empty if nothing did."""
    words = substitute(command.words)
    if words[0] != "svfap":
        done = subprocess.run(
            ["bash", "-c", shlex.join(words)], capture_output=True, text=True, check=False
        )
        return "" if done.returncode == 0 else done.stderr
    output = io.StringIO()
    arguments, sys.argv = sys.argv, words
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        return f"{output.getvalue()}\n{traceback.format_exc()}"
    finally:
        sys.argv = arguments
    allowed = _EXIT_CODES.get(" ".join(words[:2]), (0, None))
    return "" if code in allowed else f"{output.getvalue()}\nexit code {code}"


def run_example(fence: Fence) -> str:
    """Run a Python example in the working folder; return what went wrong, empty if nothing did."""
    arguments = sys.argv
    sys.argv = ["example", *map(str, sorted(Path().glob(_ARGUMENTS.get(fence.path, "none"))))]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = _BEFORE.get(fence.path, "") + fence.text
            exec(compile(code, fence.path, "exec"), {"__name__": "example"})
    except Exception:
        return traceback.format_exc()
    finally:
        sys.argv = arguments
    return ""


def _folder_of(document: str, root: Path) -> Path:
    """Return the working folder of a document, with its inputs."""
    folder = root / document.replace("/", "-").removesuffix(".md")
    if folder.exists():
        return folder
    (folder / "runs").mkdir(parents=True)
    for name in ("face.mp4", "my-videos", "svfap-demo"):
        (folder / name).symlink_to(root / "inputs" / name)
    shutil.copytree(root / "inputs/data", folder / "data")  # commands write into it
    for name, made in _FROM_README.items():
        if (source := root / "README" / made).exists():
            (folder / name).symlink_to(source)
    return folder


def to_run() -> Iterator[tuple[str, int, str, Callable[[], str]]]:
    """Yield what is run: document, line, text, and a function that runs it."""
    for fence in doc_commands.fences():
        if fence.language == "python" and not fence.needs():
            if fence.path not in doc_commands.OTHER_TESTS:
                yield fence.path, fence.line, "python", lambda fence=fence: run_example(fence)
        elif fence.language in ("", "sh"):
            for command in doc_commands.commands(fence):
                if not command.needs:
                    run = lambda command=command: run_command(command)  # noqa: E731
                    yield fence.path, command.line, command.text, run


def main() -> int:
    """Run all in the folder that is given, and return the exit code."""
    root = Path(sys.argv[1]).resolve()
    os.environ["SVFAP_LOG"] = "warning"
    make_inputs(root / "inputs")
    _make_demo(root / "inputs")
    failed = count = 0
    for document, line, text, run in to_run():
        began = sum(os.times()[:4])
        with contextlib.chdir(_folder_of(document, root)):
            problem = run()
        count += 1
        failed += bool(problem)
        seconds = sum(os.times()[:4]) - began  # of CPUs, in this process and its children
        print(f"{seconds:5.1f} s  {document}:{line}: {text}", flush=True)
        if problem:
            print(f"failed:\n{problem}", flush=True)
    print(f"doc_runs: {count} run, {failed} failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
