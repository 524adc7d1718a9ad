"""Count the files that three walks through the code open: what a newcomer must read to follow them.

The command line does each walk once, on a few rendered videos and with the smallest model. A
profiler in all of its processes and threads notes every function of the project that is called
between two points, and those that are on the stack at the first:

    clip        the loop requests its first batch      ->  the loss is known (our backward)
    video       the trained network's test begins      ->  the results of the task are written
    checkpoint  the loop begins to save                ->  the checkpoint is committed

The files of these functions are counted, methods that `dataclass` generates included. Not counted
are functions that run while a module is imported, those that `__exit__` or `close` call, and the
rooms that every walk uses without being about them (`_FLOOR`: recipes, errors, output for people,
...); a room that a walk only calls into counts as one file (`Walk.once`), and what the clip's walk
has shown is left out of the video's.

At commit f84d50d this gives 36, 25 and 12 files; a count by reading gave 36, 24 and 12. Reading
opens files that run before a walk begins (`model/sizes`, `train/split`), and skips some that
run on the way (`train/schedule`, `train/engine` in a test).
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from project_files import PACKAGES, arguments

_SETTINGS = "SVFAP_WALK"  # the variable that gives all processes of a walk its folder and points
_BEFORE, _DURING, _AFTER = 0, 1, 2
_LEAVING = ("__exit__", "close")
_CO_OPTIMIZED = 0x1  # functions have it, bodies of classes and modules do not

# Names of both trees, before and after modules were sorted into rooms.
# logs, progress and text_table only format and print.
_FLOOR = r"config|recipe|errors|distributed|logs|progress|text_table|allocator"
_FLOOR += r"|train\.(notice|signals|result)"
_STORAGE = r"storage"
_SHARDS = r"shards|shard_format|data\.(stream|cache)"
_TELEMETRY = r"telemetry|metrics|train\.(recorder|journal|ledger)"


@dataclass(frozen=True)
class Walk:
    """A command, the points between which it is followed, and how its files are counted."""

    name: str
    verb: tuple[str, ...]
    opens: str  # pattern of "module:function"; the first call of such a function begins the walk
    closes: str  # the first call of this one ends it; "": the end of the command
    left_out: tuple[str, ...]
    once: tuple[str, ...]
    limit: int


_SMALL = ("train.max_steps=1", "train.global_batch_size=4", "train.micro_batch_size=4")
_SMALL += ("cluster.num_workers=1", "data.decode_workers=1")
_PRETRAIN = ("pretrain", "tiny_cpu", *_SMALL)
_FINETUNE = ("finetune", "finetune_synthetic", *_SMALL)
WALKS = (
    Walk(
        "clip",
        _PRETRAIN,
        opens=r"svfap_dist\..*:batches",
        closes=r"svfap_dist\.train\.update:backward",
        left_out=(_FLOOR, "cli"),
        once=(_TELEMETRY,),
        limit=32,  # 24 before feeders, reads ahead by the block and the copy stream
    ),
    Walk(
        "video",
        _FINETUNE,
        opens=r"deepspeed\.runtime\.engine:eval",
        closes="",
        left_out=(_FLOOR, _STORAGE, _SHARDS, _TELEMETRY, "model"),
        once=("cli",),
        limit=16,
    ),
    Walk(
        "checkpoint",
        _PRETRAIN,
        opens=r"svfap_dist\.train\..*:save",
        closes="",
        # data, parallel: after it the loop finds that no batch is left
        left_out=(_FLOOR, "cli", "data", "parallel"),
        once=(_STORAGE, _SHARDS, _TELEMETRY),
        limit=8,
    ),
)


class Profiler:
    """Notes functions of the project; one byte of a shared file says where the walk is."""

    def __init__(self, folder: str, opens: str, closes: str) -> None:
        with open(os.path.join(folder, "state"), "r+b") as file:
            self._state = mmap.mmap(file.fileno(), 1)
        flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
        self._log = os.open(os.path.join(folder, f"{os.getpid()}.log"), flags)
        self._opens, self._closes = re.compile(opens), re.compile(closes or "$.")
        # Code objects of equal functions in two modules are equal.
        self._seen: set[tuple[str, CodeType]] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or self._state[0] == _AFTER:
            return
        called = f"{frame.f_globals.get('__name__')}:{frame.f_code.co_name}"
        if self._state[0] == _BEFORE:
            if self._opens.fullmatch(called):
                self._state[0] = _DURING
                for at in _stack(frame):
                    self._note(at)
        elif self._closes.fullmatch(called):
            self._state[0] = _AFTER
        else:
            self._note(frame)

    def _note(self, frame: FrameType) -> None:
        code, module = frame.f_code, str(frame.f_globals.get("__name__"))
        if (module, code) in self._seen or not code.co_flags & _CO_OPTIMIZED:
            return
        if module.partition(".")[0] not in PACKAGES or any(map(_is_aside, _stack(frame))):
            return
        self._seen.add((module, code))
        os.write(self._log, f"{module}:{code.co_qualname}\n".encode())


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_aside(frame: FrameType) -> bool:
    """Whether a frame leaves a context or imports a module."""
    name, module = frame.f_code.co_name, frame.f_globals.get("__name__")
    return name in _LEAVING or (name == "<module>" and module != "__main__")


def install() -> None:
    """Profile this process; `sitecustomize` calls it in every process of a walk."""
    profiler = Profiler(**json.loads(os.environ[_SETTINGS]))
    threading.setprofile(profiler)
    sys.setprofile(profiler)


def follow(walk: Walk, root: Path, command: list[str]) -> dict[str, set[str]]:
    """Run a command and return the functions of its walk by module."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "state").write_bytes(bytes([_BEFORE]))
        here = str(Path(__file__).parent)
        code = f"import sys\nsys.path.append({here!r})\nimport walks\nwalks.install()\n"
        Path(folder, "sitecustomize.py").write_text(code)
        settings = json.dumps({"folder": folder, "opens": walk.opens, "closes": walk.closes})
        _run(command, root, {_SETTINGS: settings, "PYTHONPATH": f"{folder}:{root}"})
        if Path(folder, "state").read_bytes()[0] == _BEFORE:
            sys.exit(f"walks: {walk.name}: no function {walk.opens!r} was called; was it renamed?")
        found: dict[str, set[str]] = defaultdict(set)
        for log in Path(folder).glob("*.log"):
            for line in log.read_text().splitlines():
                module, _, name = line.partition(":")
                found[module].add(name)
        return found


def _run(command: list[str], root: Path, variables: dict[str, str]) -> None:
    python, env = [sys.executable, *command], os.environ | variables
    done = subprocess.run(python, cwd=root, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"walks: {' '.join(command)} failed:\n{done.stderr}")


def count(walk: Walk, modules: set[str]) -> list[str]:
    """Return the files of a walk: modules, or rooms that count once."""
    found: set[str] = set()
    for module in modules:
        within = module.partition(".")[2]
        if any(re.match(rf"(?:{room})(?:\.|$)", within) for room in walk.left_out):
            continue
        rooms = [room for room in walk.once if re.match(rf"(?:{room})(?:\.|$)", within)]
        found.add(f"({rooms[0].split('|')[0]})" if rooms else within.replace(".", "/"))
    return sorted(found)


@contextlib.contextmanager
def _on_s3(shards: Path) -> Iterator[str]:
    """URL of a copy of the shards on an S3 server of this process."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ.update(
        keys, AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_DEFAULT_REGION="us-east-1"
    )
    s3 = fsspec.filesystem("s3")
    s3.mkdir("walks")
    s3.put(str(shards), "walks/shards", recursive=True)
    yield "s3://walks/shards"
    server.stop()


def main(argv: list[str] | None = None) -> int:
    """Print the files of the walks and return the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("--walk", choices=[walk.name for walk in WALKS], help="only this one")
    parser.add_argument("-v", "--verbose", action="store_true", help="print functions as well")
    options = parser.parse_args(argv)
    failed = False
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="svfap-walks-")))
        shards = work / "shards"
        root = options.root.resolve()
        shard = ["shard", "synthetic", "clips=14,identities=10", str(shards)]
        _run(["-m", "svfap_dist", *shard], root, {"PYTHONPATH": str(root)})
        for walk in WALKS:
            if options.walk not in (None, walk.name):
                continue
            url = str(shards)
            if walk.name == "clip":
                url = stack.enter_context(_on_s3(shards))
            places = [f"data.url={url}", f"data.cache_dir={work / 'cache'}"]
            places += [f"run.url={work / walk.name}"]
            found = follow(walk, root, ["-m", "svfap_dist", *walk.verb, *places])
            files = count(walk, set(found))
            failed |= len(files) > walk.limit
            if options.verbose:
                for module in sorted(found):
                    print(f"  {module}: {', '.join(sorted(found[module]))}")
            print(
                f"walks: {walk.name}: {len(files)} files (at most {walk.limit}): {' '.join(files)}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
