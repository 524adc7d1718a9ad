"""Starts real ranks for tests: a process each, connected by gloo, judged by the files they leave.

`start(world_size, tasks, folder)` runs a list of tasks in the same processes, one after the other,
since importing torch and DeepSpeed is what takes long. A task is a function of this module and its
keyword arguments; rank r leaves what it returned, or its error, in `folder/rank-r.json`. Workers
leave by `os._exit`, for gloo now and then aborts at the interpreter's exit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svfap_dist import distributed

if TYPE_CHECKING:
    import torch

    from svfap_dist.config import Config
    from svfap_dist.data.batch import ClipBatch

Task = tuple[str, dict[str, Any]]


def start(
    world_size: int,
    tasks: list[Task],
    folder: Path,
    *,
    last_dies: bool = False,
    seconds: float = 900,
) -> list[list[Any]]:
    """Results of the tasks, [task][rank]; without the last one if that is meant to kill a rank."""
    processes = _started(world_size, tasks, folder)
    try:
        codes = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:  # that are late, or whose test was ended by its own limit
            process.kill()
    logs = "\n".join((folder / f"rank-{r}.log").read_text() for r in range(world_size))
    if last_dies:
        assert codes[-1] == -signal.SIGKILL, logs
    else:
        assert codes == [0] * world_size, logs
    results = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(world_size)]
    return [list(of_ranks) for of_ranks in zip(*results, strict=True)]


def start_failing(world_size: int, task: Task, folder: Path, seconds: float = 240) -> list[int]:
    """Exit codes of the ranks of a task that fails. As a launcher does, this waits for the end of
    the first one that ends, and of those that end soon after, and kills the rest."""
    processes = _started(world_size, [task], folder)
    try:
        deadline = time.monotonic() + seconds
        while all(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(timeout=30)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def _started(world_size: int, tasks: list[Task], folder: Path) -> list[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    orders = {"tasks": tasks, "start": uuid.uuid4().hex}
    (folder / "tasks.json").write_text(json.dumps(orders))
    processes = []
    for rank in range(world_size):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": 1,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        with open(folder / f"rank-{rank}.log", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, str(folder)],
                    env=environment,
                    stdout=log,
                    stderr=log,
                )
            )
    return processes


def recipe_tables(data_url: str, run_url: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe of a twelve-step run that takes seconds; `changes` are merged section by section."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"url": run_url, "ledger": True},
        "data": {
            "url": data_url,
            "num_frames": 8,
            "sampling_rate": 1,
            "frame_size": 32,
            "region": "full",
            "num_lanes": 4,
            "shuffle_block": 3,
            "decode_threads": 1,
        },
        "mask": {"ratio": 0.5},
        "model": {"size": "nano"},
        "optim": {"lr": 0.1, "clip_grad_norm": 1.0},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "max_steps": 12,
            "log_every": 1,
            "checkpoint_every": 4,
            "threads_per_rank": 1,
            "collective_timeout_seconds": 60,
        },
        "profile": {},
        "track": {},
    }
    return {section: values | changes.get(section, {}) for section, values in tables.items()}


def train(tables: dict[str, Any], stop_after: int = 0, die_after: int = 0) -> dict[str, Any]:
    """One attempt at a run: its result or its error.

    stop_after: Steps after which rank 0 requests a stop; 0: never. die_after: Steps after which the
    last rank is killed between backward and update; 0: never.
    """
    from svfap_dist.config import recipe
    from svfap_dist.errors import SvfapError
    from svfap_dist.train import loop

    rank, last_rank = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    steps = 0

    def asked_at_each_step() -> str:
        nonlocal steps
        steps += 1
        if steps == die_after and rank == last_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return "stop requested" if steps >= stop_after > 0 and rank == 0 else ""

    try:
        config = recipe.from_tables(tables, where="test")
        return dataclasses.asdict(loop.run(config, stop_requested=asked_at_each_step))
    except SvfapError as error:
        return {"error": type(error).__name__, "message": str(error)}


def train_and_look_for_listeners(tables: dict[str, Any]) -> list[list[Any]]:
    """Address and port of all that listens in this rank's process and its children in a run."""
    import psutil

    from svfap_dist.config import recipe
    from svfap_dist.train import loop

    found: set[Any] = set()

    def asked_at_each_step() -> str:
        rank = psutil.Process()
        for process in (rank, *rank.children(recursive=True)):
            connections = process.net_connections("tcp")
            found.update(tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN)
        return ""

    loop.run(recipe.from_tables(tables, where="test"), stop_requested=asked_at_each_step)
    return sorted(map(list, found))


def train_planted(
    tables: dict[str, Any], bad_steps: list[int], fault: str, stop_after: int = 0
) -> dict[str, Any]:
    """As `train`, with a fault of the last rank in these steps (from 1): its loss or its gradient
    is not finite or a hundred times as large, or it raises an error."""
    from unittest import mock

    from svfap_dist.train import attempt

    build = attempt.build_objective

    def build_planted(config: Config, split: Any) -> Any:
        return plant(build(config, split), bad_steps, fault)

    with mock.patch.object(attempt, "build_objective", build_planted):
        try:
            return train(tables, stop_after)
        except (ValueError, RuntimeError) as error:  # planted, or of a collective with that rank
            return {"error": type(error).__name__, "message": str(error)}


def plant(objective: Any, bad_steps: list[int], fault: str) -> Any:
    """The objective with a fault in its loss in some steps, on the last rank."""
    import torch

    inputs, loss_of = objective.inputs, objective.loss
    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    now: list[int | None] = [None]

    def noted_inputs(batch: Any, part: slice, context: Any) -> tuple[Any, ...]:
        now[0] = context.step
        return inputs(batch, part, context)

    def planted_loss(network: Any, *given: torch.Tensor) -> torch.Tensor:
        loss = loss_of(network, *given)
        if not is_last or now[0] is None or now[0] + 1 not in bad_steps:
            return loss
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if fault == "error":
            raise ValueError("planted")
        if fault == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
            return loss
        return loss * (100 if fault == "spike" else float("nan"))

    objective.inputs, objective.loss = noted_inputs, planted_loss
    return objective


def train_with_failing_probes(tables: dict[str, Any]) -> dict[str, Any]:
    """As `train`; the first probe fails in the store and the second in the network, each on the
    last rank, and the third on rank 0, which scores."""
    from unittest import mock

    from svfap_dist.errors import StorageError
    from svfap_dist.evaluate import feature_probe as scoring
    from svfap_dist.train.feature_probe import FeatureProbe

    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    away = StorageError("Store is away", "planted", "no answer", "wait")
    plants: list[Any] = [
        mock.patch("svfap_dist.train.feature_probe.SampleReader", side_effect=away),
        mock.patch(
            "svfap_dist.train.feature_probe.clip_features",
            side_effect=RuntimeError("planted in the network"),
        ),
        mock.patch.object(scoring, "score", side_effect=ImportError("planted in the scores")),
    ]
    run = FeatureProbe.run

    def run_planted(probe: FeatureProbe, *given: Any) -> bool:
        plant = plants.pop(0) if plants else contextlib.nullcontext()
        with plant if is_last or len(plants) == 0 else contextlib.nullcontext():
            return run(probe, *given)

    with mock.patch.object(FeatureProbe, "run", run_planted):
        return train(tables)


def train_with_failing_upload(tables: dict[str, Any], uars: list[float]) -> dict[str, Any]:
    """As `train`; probes have the given UAR, and the first checkpoint cannot be committed."""
    from unittest import mock

    from svfap_dist.checkpoint import store
    from svfap_dist.errors import StorageError
    from svfap_dist.evaluate import feature_probe as scoring

    scores = [scoring.ProbeScores(knn=0.0, logistic=uar) for uar in uars]
    away = StorageError("Store is away", "planted", "no answer", "wait")
    commits = [away, *[mock.DEFAULT] * 9]
    with (
        mock.patch.object(scoring, "score", side_effect=scores),
        mock.patch.object(store, "commit", wraps=store.commit, side_effect=commits),
    ):
        return train(tables)


def stall(tables: dict[str, Any], fault: str, rank: int, step: int) -> dict[str, Any]:
    """A run in which something hangs on a rank once it has begun a step; `fault` is a function
    `hang_in_...` of this module. The time of it goes to the file `fault.time` in the run."""
    from svfap_dist.config import recipe
    from svfap_dist.train import loop

    steps = 0

    def asked_at_each_step() -> str:
        nonlocal steps
        steps += 1
        if steps == step and int(os.environ["RANK"]) == rank:
            Path(tables["run"]["url"], "fault.time").write_text(str(time.time()))
            globals()[f"hang_in_{fault}"]()
        return ""

    config = recipe.from_tables(tables, where="test")
    return dataclasses.asdict(loop.run(config, stop_requested=asked_at_each_step))


def train_with_hanging_child(tables: dict[str, Any], worker: str) -> dict[str, Any]:
    """As `train`, with a decode worker or feeder that hangs; `worker` is a class of
    `hanging_children`. The time of it goes to the file `fault.time` in the run."""
    from unittest import mock

    import hanging_children

    from svfap_dist.data import loader

    os.environ[hanging_children.TIME_FILE] = os.path.join(tables["run"]["url"], "fault.time")
    with mock.patch.object(loader, "ClipWorker", getattr(hanging_children, worker)):
        return train(tables)


def hang_in_signal() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_in_storage() -> None:
    """From now on no read of this rank ends."""
    from svfap_dist import storage

    fs, _ = storage.filesystem("/")
    type(fs).cat_file = lambda self, path, start=None, end=None: threading.Event().wait()  # type: ignore[attr-defined]


def hang_in_collective() -> None:
    """The next sum over all ranks never begins on this one."""
    from svfap_dist.train import update

    class Hanging:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.distributed, name)

        def all_reduce(self, *_: Any) -> None:
            threading.Event().wait()

    import torch

    update.dist = Hanging()  # type: ignore[assignment]


def hang_in_interpreter() -> None:
    """A call in C that keeps the interpreter's lock: no other thread of this rank runs."""
    import ctypes

    ctypes.PyDLL(None).sleep(600)


def finetune(
    tables: dict[str, Any], stop_after: int = 0, start_fails: bool = False
) -> dict[str, Any]:
    """One attempt at all folds of a fine-tuning: how it ended, or its error. Rank 0 requests a stop
    after `stop_after` steps, if that is not 0; a start may fail once the recipe is stored."""
    from unittest import mock

    from svfap_dist.config import recipe
    from svfap_dist.errors import SvfapError
    from svfap_dist.telemetry.recorder import Recorder
    from svfap_dist.train import finetune as tuning
    from svfap_dist.train import loop
    from svfap_dist.train.engine import process_group

    world, steps = distributed.world_from_environment(), 0

    def asked_at_each_step() -> str:
        nonlocal steps
        steps += 1
        return "stop requested" if steps >= stop_after > 0 and world.is_main else ""

    def one_fold(config: Config, context: loop.RunContext) -> Any:
        return loop.run(config, stop_requested=asked_at_each_step, context=context)

    planted: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if start_fails:
        error = SvfapError("Planted", "start", "nothing", "nothing")
        planted = mock.patch.object(Recorder, "record_start", side_effect=error)
    try:
        config = recipe.from_tables(tables, where="test")
        with process_group(config, world), planted:
            ended = tuning.run(config, one_fold, writes=world.is_main)
    except SvfapError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"stop_reason": ended.stop_reason, "step": ended.step, "fold": ended.fold}


def random_batch(config: Config, step: int) -> ClipBatch:
    """A batch of noise that is the same in every process, with targets if there is a task."""
    import torch

    from svfap_dist.data.batch import ClipBatch
    from svfap_dist.data.filler import BatchSlots
    from svfap_dist.data.masking import batch_masks
    from svfap_dist.rng import Stream

    count, data = config.train.global_batch_size, config.data
    chance = torch.Generator().manual_seed(step)
    shape = (count, data.num_frames, data.frame_size, data.frame_size, 3)
    streams = [Stream("mask", step, row) for row in range(count)]
    visible, masked = batch_masks(streams, config.mask, config.num_tubelets, config.num_patches)
    zeros = [0] * count
    slots = BatchSlots([""] * count, zeros, zeros, zeros, [False] * count)
    return ClipBatch(
        frames=torch.randint(0, 256, shape, generator=chance, dtype=torch.uint8),
        visible=visible,
        masked=masked,
        packed_slots=[slots.pack()],
        bad=[],
        fetch_seconds=0.0,
        decode_seconds=0.0,
        targets=random_targets(config, chance),
    )


def random_targets(config: Config, chance: torch.Generator) -> torch.Tensor | None:
    """Classes or values of a batch; None if there is no task."""
    import torch

    if config.task is None:
        return None
    count, outputs = config.train.global_batch_size, len(config.task.names)
    if config.task.kind == "classification":
        return torch.randint(0, outputs, (count,), generator=chance)
    return torch.rand(count, outputs, generator=chance)


def _save_on_rank_0(states: dict[str, Any], path: str) -> None:
    """Write `states`, which all ranks hold, to `path` once: two writers would mix their bytes."""
    import torch

    if os.environ["RANK"] == "0":
        torch.save(states, path)


def engine_steps(
    tables: dict[str, Any], rates: list[float], weights: str, cut_at: int = 0
) -> dict[str, list[float]]:
    """Loss and gradient norm of the engine's step at each of the learning rates, on random batches;
    the weights at the end go to a file. After `cut_at` steps (0: never) another engine takes over.
    """
    import tempfile

    import torch

    from svfap_dist.config import recipe
    from svfap_dist.train.engine import Engine, process_group
    from svfap_dist.train.objective import build_objective

    config = recipe.from_tables(tables, where="test")
    world = distributed.world_from_environment()
    seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    linear = torch.nn.functional.linear
    with process_group(config, world) as device, tempfile.TemporaryDirectory() as folder:
        engine = Engine(config, build_objective(config), world, device)
        for step, rate in enumerate(rates):
            if step == cut_at > 0:
                engine.save(folder, "cut")
                engine.close()
                engine = Engine(config, build_objective(config), world, device)
                engine.load(folder, "cut")
            engine.backward(random_batch(config, step), step)
            result = engine.update(rate).read()
            seen["loss"].append(result.loss)
            seen["grad_norm"].append(result.grad_norm)
        _save_on_rank_0(engine.state_dict(), weights)
        engine.close()
    # DeepSpeed's stage 3 would put a function there whose gradients a compiler may lose.
    assert torch.nn.functional.linear is linear
    return seen


def updates(
    tables: dict[str, Any], rates: list[float], weights: str, bad_step: int = -1
) -> dict[str, Any]:
    """What each update says and what it does to the optimizer, each rank on its part of random
    batches; the weights at the end go to a file. At `bad_step` the last rank has a finite loss
    whose gradient is not finite."""
    import dataclasses

    from svfap_dist.config import recipe
    from svfap_dist.profiling.operations import counted
    from svfap_dist.train.engine import Engine, process_group
    from svfap_dist.train.objective import build_objective

    config = recipe.from_tables(tables, where="test")
    world = distributed.world_from_environment()
    objective = build_objective(config)
    step, original = 0, objective.loss

    def loss_of(network: Any, *inputs: torch.Tensor) -> torch.Tensor:
        loss = original(network, *inputs)
        if step == bad_step and world.rank == world.world_size - 1:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    objective.loss = loss_of  # type: ignore[method-assign]
    seen: dict[str, Any] = {"results": [], "optimizer": [], "waits": []}
    with process_group(config, world) as device:
        engine = Engine(config, objective, world, device)
        for step, rate in enumerate(rates):
            whole = random_batch(config, step)
            mine = slice(world.rank, None, world.world_size)
            batch = dataclasses.replace(
                whole,
                frames=whole.frames[mine],
                visible=whole.visible[mine],
                masked=whole.masked[mine],
            )
            with counted(device) as operations:
                engine.backward(batch, step)
                update = engine.update(rate, counts=(1.0, world.rank))
            seen["waits"].append(operations.waits.total())
            seen["results"].append(dataclasses.asdict(update.read()))
            states = engine._engine.basic_optimizer.state.values()
            sums = [float(value.double().sum()) for state in states for value in state.values()]
            total = sum(float(v.double().sum()) for v in engine.state_dict().values())
            seen["optimizer"].append([*sums, total])
        _save_on_rank_0(engine.state_dict(), weights)
        engine.close()
    return seen


def steps_around_save(tables: dict[str, Any], folder: str, tag: str) -> list[float]:
    """Three steps, a checkpoint, a file of what DeepSpeed's own functions read from the engine, and
    the losses of three more steps."""
    import torch

    with _engine(tables) as engine:
        _three_steps(engine, 0)
        engine.save(folder, tag)
        expected = _full_states(engine)
        if os.environ["RANK"] == "0":
            torch.save(expected, os.path.join(folder, f"{tag}.expected.pt"))
        return _three_steps(engine, 3)


def steps_after_load(tables: dict[str, Any], folder: str, tag: str) -> dict[str, Any]:
    """What a new engine gets wrong about that checkpoint, and its next three losses."""
    import torch

    from svfap_dist.checkpoint.parameter_states import read_shards

    with _engine(tables) as engine:
        engine.load_states(read_shards(os.path.join(folder, tag), engine.parameter_names))
        expected = torch.load(os.path.join(folder, f"{tag}.expected.pt"))
        found = _full_states(engine)
        wrong = [
            f"{name} {key}"
            for name in expected.keys() | found.keys()
            for key in ("fp32", "exp_avg", "exp_avg_sq")
            if not torch.equal(found[name][key], expected[name][key])
        ]
        for state in engine._engine.basic_optimizer.state.values():
            places = {key: (value.device.type, value.dtype) for key, value in state.items()}
            wanted = (engine.device.type, torch.float32)
            wrong += [f"{key} {at}" for key, at in places.items() if at != wanted]
            wrong += [] if state["step"].item() == 3 else [f"step {state['step']}"]
        return {"wrong": wrong, "losses": _three_steps(engine, 3)}


@contextlib.contextmanager
def _engine(tables: dict[str, Any]) -> Iterator[Any]:
    """An engine, without the linear layer that stage 3 leaves in the process and whose last bits
    are others."""
    import torch

    from svfap_dist.config import recipe
    from svfap_dist.train.engine import open_engine
    from svfap_dist.train.objective import build_objective

    config, world = recipe.from_tables(tables, where="test"), distributed.world_from_environment()
    linear = torch.nn.functional.linear
    with open_engine(build_objective(config), config, world) as engine:
        yield engine
    torch.nn.functional.linear = linear


def _three_steps(engine: Any, first: int) -> list[float]:
    """The mean losses of all ranks in three steps on random batches."""
    import torch

    world, losses = torch.distributed.get_world_size(), []
    for step in range(first, first + 3):
        loss = engine.backward(_share_of(random_batch(engine._config, step), world), step)
        torch.distributed.all_reduce(loss)
        engine.update(0.05)
        losses.append(loss.item() / world)
    return losses


def losses_by_source(tables: dict[str, Any], sources: list[int]) -> dict[str, Any]:
    """The losses of four clips alone, and the first update from them. sources: theirs, if any."""
    import torch

    with _engine(tables) as engine:
        batch = random_batch(engine._config, 0)
        with engine.evaluating():
            clips = [engine.forward(batch, slice(n, n + 1)).item() for n in range(4)]
        numbers = torch.tensor(sources) if sources else None
        mine = _share_of(dataclasses.replace(batch, sources=numbers), 2)
        engine.backward(mine, 0)
        result = engine.update(0.1, counts=(3.0, 4.0)).read()
    return {**dataclasses.asdict(result), "clips": clips}


def _share_of(batch: ClipBatch, ranks: int) -> ClipBatch:
    """This rank's clips of a batch."""
    size = len(batch.frames) // ranks
    part = slice(size * int(os.environ["RANK"]), size * (int(os.environ["RANK"]) + 1))
    names = ["frames", "visible", "masked", *(["sources"] if batch.sources is not None else [])]
    mine = {name: getattr(batch, name)[part] for name in names}
    return dataclasses.replace(batch, **mine)


def _full_states(engine: Any) -> dict[str, dict[str, Any]]:
    """Master weight and moments of each parameter as DeepSpeed's debugging functions put them
    together, on the CPU."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    def state_of(parameter: Any) -> dict[str, Any]:
        if engine._stage == 0:
            state = engine._engine.optimizer.state[parameter]
            return {"fp32": parameter.data, **{key: state[key] for key in moments}}
        full = {key: safe_get_full_optimizer_state(parameter, key) for key in moments}
        return {"fp32": safe_get_full_fp32_param(parameter), **full}

    moments = ("exp_avg", "exp_avg_sq")
    if engine._stage in (1, 2):  # it links moments once, before all groups have some
        engine._engine.optimizer._hp_optimizer_states_linked = False
        engine._engine.optimizer._lazy_init_hp_params_optimizer_state()
    named = engine._engine.module.named_parameters()
    states = {name: state_of(parameter) for name, parameter in named}
    return {
        name: {key: value.detach().cpu().clone().flatten() for key, value in state.items()}
        for name, state in states.items()
    }


def requests_at_start(tables: dict[str, Any]) -> dict[str, Any]:
    """Storage requests of this rank for its loader and for its validation clips."""
    from svfap_dist import storage
    from svfap_dist.config import recipe
    from svfap_dist.data.loader import ClipLoader
    from svfap_dist.shards.format import load_manifest
    from svfap_dist.train.engine import process_group
    from svfap_dist.train.validation import ValidationSet

    def counted(make: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        before = storage.request_counts()
        made = make()
        added = storage.request_counts().since(before)
        return made, {what: n for (what, _), n in added.requests.items()} if added else {}

    config, world = recipe.from_tables(tables, where="test"), distributed.world_from_environment()
    url, manifest = config.data.url, load_manifest(config.data.url)
    with process_group(config, world):
        loader, for_loader = counted(lambda: ClipLoader(config, url, manifest, world))
        _, for_validation = counted(lambda: ValidationSet(config, world, manifest))
    return {"planes": loader._planes, "loader": for_loader, "validation": for_validation}


def explode(tables: dict[str, Any]) -> dict[str, list[bool]]:
    """What the engine does with two steps at an absurd learning rate: the first one's weights are
    finite but huge, the second one's loss is not finite."""
    import torch

    from svfap_dist.config import recipe
    from svfap_dist.data.loader import ClipLoader
    from svfap_dist.shards import format as shard_format
    from svfap_dist.train.engine import Engine, process_group
    from svfap_dist.train.objective import build_objective

    config = recipe.from_tables(tables, where="test")
    manifest = shard_format.load_manifest(config.data.url)
    world = distributed.world_from_environment()
    seen: dict[str, list[bool]] = {"applied": [], "loss_is_finite": [], "weights_changed": []}
    with process_group(config, world) as device:
        engine = Engine(config, build_objective(config), world, device)
        loader = ClipLoader(config, config.data.url, manifest, world)
        for batch in loader.batches(0, 2):
            before = {name: value.clone() for name, value in engine.state_dict().items()}
            loss = engine.backward(batch, 0)
            update = engine.update(learning_rate=1e30)
            after = engine.state_dict()
            seen["applied"].append(update.read().applied)
            seen["loss_is_finite"].append(bool(torch.isfinite(loss)))
            seen["weights_changed"].append(
                any(not torch.equal(before[name], after[name]) for name in before)
            )
        engine.close()
    return seen


def mlp_calls(tables: dict[str, Any]) -> int:
    """How often the encoder's first MLP ran in one step of the engine."""
    from svfap_dist.config import recipe
    from svfap_dist.train.engine import Engine, process_group
    from svfap_dist.train.objective import build_objective

    config = recipe.from_tables(tables, where="test")
    world, calls = distributed.world_from_environment(), []
    with process_group(config, world) as device:
        engine = Engine(config, build_objective(config), world, device)
        mlp = engine._engine.module.encoder.blocks[0].mlp
        mlp.register_forward_pre_hook(lambda *given: calls.append(None))
        engine.backward(random_batch(config, 0), 0)
        engine.close()
    return len(calls)


def compile_steps(tables: dict[str, Any], steps: int, evaluated: list[int]) -> dict[str, Any]:
    """What torch.compile does with some steps and evaluations of some clips, with a backend that
    generates no code: the modes, the number of programs after the steps, after each evaluation, and
    after a call without them and a step of another engine; losses and norms of the gradient."""
    from unittest import mock

    import torch
    from torch._dynamo.utils import counters

    from svfap_dist.config import recipe
    from svfap_dist.train.engine import Engine, StepContext, process_group
    from svfap_dist.train.objective import build_objective

    config = recipe.from_tables(tables, where="test")
    world, modes = distributed.world_from_environment(), set()
    objective, original = build_objective(config), torch.compile

    def traced(function: Any = None, *, mode: str = "default", **options: Any) -> Any:
        modes.add(mode)
        options["backend"] = "aot_eager"
        return original(function, **options)

    torch.compiler.reset()
    counters.clear()
    programs = []
    seen: dict[str, list[float]] = {"loss": [], "grad_norm": [], "evaluated": []}
    with process_group(config, world) as device, mock.patch.object(torch, "compile", traced):
        engine = Engine(config, objective, world, device)
        names = list(engine.state_dict())
        for step in range(steps):
            engine.backward(random_batch(config, step), step)
            result = engine.update(0.01).read()
            seen["loss"].append(result.loss)
            seen["grad_norm"].append(result.grad_norm)
        programs.append(counters["stats"]["unique_graphs"])
        with engine.evaluating():
            for count in evaluated:
                loss = engine.forward(random_batch(config, 0), slice(0, count))
                seen["evaluated"].append(loss.item())
                programs.append(counters["stats"]["unique_graphs"])
            inputs = objective.inputs(random_batch(config, 0), slice(0, 2), StepContext(device, 0))
            objective.loss(engine.eager_network, *inputs)
        engine.close()
        engine = Engine(config, objective, world, device)  # as of the next fold
        engine.backward(random_batch(config, 0), 0)
        engine.close()
    programs.append(counters["stats"]["unique_graphs"])
    interruptions = len(counters["graph_break"])
    compiled = {"modes": sorted(modes), "programs": programs, "interruptions": interruptions}
    return seen | compiled | {"names": names}


def enums_of_debian_12() -> AbstractContextManager[Any]:
    """Pickle members of enums as Python 3.11.2 does, by `getattr`."""
    from unittest import mock

    def reduce(member: enum.Enum, _protocol: int) -> tuple[Any, ...]:
        return getattr, (type(member), member.name)

    return mock.patch.object(enum.Enum, "__reduce_ex__", reduce)


def _shared_port(path: Path) -> str:
    """A port that rank 0 chooses when it needs it: of many chosen ahead, another process would take
    one now and then before its group begins."""
    if os.environ["RANK"] == "0":
        path.with_suffix(".tmp").write_text(str(distributed.free_port()))
        path.with_suffix(".tmp").rename(path)
    while not path.exists():
        time.sleep(0.01)
    return path.read_text()


def main(folder: Path) -> None:
    enums_of_debian_12().__enter__()
    rank = os.environ["RANK"]
    orders = json.loads((folder / "tasks.json").read_text())
    results = []
    for number, (name, arguments) in enumerate(orders["tasks"]):
        os.environ["MASTER_PORT"] = _shared_port(folder / f"port-{orders['start']}-{number}")
        task: Callable[..., Any] = globals()[name]
        results.append(task(**arguments))
        (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
