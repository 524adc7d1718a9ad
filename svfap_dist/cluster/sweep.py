"""Ablations: a recipe trained once for every combination of some values, and one table of results.

In: a recipe, overrides, and axes `key=v1,v2`. Out: a run per combination below `run.url`, each in a
folder named after it, and a `Trial` per combination. Trials are Ray tasks, so Ray decides how many
go on at a time and where; each is a rank of its own in a process of its own, and an ordinary run:
the same sweep started again resumes what was cut short and leaves alone what is finished.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from svfap_dist import logs, storage
from svfap_dist.cluster.connection import check_resources, connected
from svfap_dist.config import Config, recipe, require_urls
from svfap_dist.errors import ConfigError, SvfapError
from svfap_dist.text_table import format_table

_OURS = ("run.url", "cluster.num_workers", "metrics.port")  # what a sweep decides itself
_COLUMNS = ("combination", "parameters", "GFLOP/clip", "clips/s", "loss", "held-out loss")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A combination and what became of it; None where that was not found out.

    gflops: of a training step of one clip, counted on paper. error: why it failed, "" if it did
    not.
    """

    combination: dict[str, str]
    run_url: str
    parameters: int | None = None
    gflops: float | None = None
    clips_per_second: float | None = None
    first_loss: float | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    error: str = ""

    @property
    def name(self) -> str:
        """The combination in a word."""
        return ",".join(f"{key}={value}" for key, value in self.combination.items())


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """All trials, in the order of the axes."""

    trials: list[Trial]

    @property
    def failed(self) -> int:
        """How many trials failed."""
        return sum(bool(trial.error) for trial in self.trials)

    def lines(self) -> list[str]:
        """For people: a table."""
        rows = [_row(trial) for trial in self.trials]
        text = format_table(rows, _COLUMNS, right=range(1, len(_COLUMNS)))
        return [*text, *(f"{t.name} failed: {t.error}" for t in self.trials if t.error)]


def _row(trial: Trial) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    losses = f"{number(trial.first_loss, '.4f')} to {number(trial.loss, '.4f')}"
    return (
        trial.name,
        number(trial.parameters, ",d"),
        number(trial.gflops, ".2f"),
        number(trial.clips_per_second, ".2f"),
        "failed" if trial.error else losses,
        number(trial.held_out_loss, ".4f"),
    )


def run(
    name: str,
    axes: Sequence[str],
    overrides: Sequence[str],
    on_trial: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> SweepResult:
    """Train recipe `name` with `overrides` once for every combination of the axes `key=v1,v2`.

    A trial that fails is told in its row and stops no other. `on_trial` gets how many of how many
    are done, and the name of the latest.

    Raises: ConfigError if the axes cannot be read or no combination is possible; ClusterError if
    Ray cannot be reached or is too small for one trial.
    """
    combinations = _combinations([_axis(axis) for axis in axes])
    base = recipe.load(name, overrides)
    require_urls(base, "run.url", hint="a folder or s3:// prefix; trials get a folder below it")
    # Beside other trials, a rank's fair share is not all of its node.
    threads = base.train.threads_per_rank or base.cluster.cpus_per_worker
    before = [*overrides, f"train.threads_per_rank={threads}"]
    trials: list[Trial] = []
    configs: dict[int, Config] = {}
    refused: ConfigError | None = None
    for index, combination in enumerate(combinations):
        url = storage.join(base.run.url, _folder(combination))
        trials.append(Trial(combination, url))
        values = [f"{key}={value}" for key, value in combination.items()]
        own = [f"run.url={url}", "cluster.num_workers=1", "metrics.port=0"]
        try:
            configs[index] = recipe.load(name, [*before, *values, *own])
        except ConfigError as error:
            refused = error
            trials[index] = dataclasses.replace(trials[index], error=str(error))
    if not configs:
        assert refused is not None
        raise refused
    _check_apart(configs, trials)
    _run_all(configs, trials, on_trial)
    return SweepResult(trials)


def _axis(text: str) -> tuple[str, list[str]]:
    """Key and values of `key=v1,v2`; commas inside brackets belong to a value."""
    key, equals, values = text.partition("=")
    # Commas that no closing bracket follows before an opening one.
    found = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]
    if not equals or "." not in key or not all(found):
        raise ConfigError(
            "Unreadable axis",
            where=text,
            found="not of the form section.key=v1,v2",
            do="write e.g. --axis mask.ratio=0.75,0.9",
        )
    if key in _OURS:
        raise ConfigError(
            "Not for an axis", where=key, found=text, do="leave it to the sweep, or override it"
        )
    return key, found


def _combinations(axes: Sequence[tuple[str, list[str]]]) -> list[dict[str, str]]:
    keys = [key for key, _ in axes]
    combinations = [
        dict(zip(keys, values, strict=True))
        for values in itertools.product(*(values for _, values in axes))
    ]
    folders = {_folder(combination) for combination in combinations}
    if not keys or len(set(keys)) < len(keys) or len(folders) < len(combinations):
        raise ConfigError(
            "Axes do not tell the trials apart",
            where="--axis",
            found=", ".join(f"{key}={','.join(values)}" for key, values in axes) or "none",
            do="give each key once, and each of its values once",
        )
    return combinations


def _check_apart(configs: dict[int, Config], trials: Sequence[Trial]) -> None:
    """No two recipes are the same but for where they write: 0.9 is 0.90."""
    seen: dict[str, int] = {}
    for index, config in configs.items():
        recipe_text = config.model_dump_json(exclude={"run": {"url"}})
        twin = seen.setdefault(recipe_text, index)
        if twin != index:
            raise ConfigError(
                "Axes do not tell the trials apart",
                where="--axis",
                found=f"{trials[twin].name} and {trials[index].name} are one recipe",
                do="give each value once, however it is written",
            )


def _folder(combination: dict[str, str]) -> str:
    """A combination as the name of a folder: `mask.ratio=0.75,model.stage_depths=12-6-3`."""
    return ",".join(
        f"{key}={re.sub(r'[^A-Za-z0-9._-]+', '-', value).strip('-')}"
        for key, value in combination.items()
    )


def _run_all(
    configs: dict[int, Config], trials: list[Trial], on_trial: Callable[[int, int, str], None]
) -> None:
    """Run the trials of `configs` (by their index) as Ray tasks, and put in what they give."""
    import ray
    from ray.exceptions import RayError

    some = next(iter(configs.values()))
    with connected(some.cluster):
        check_resources(some.cluster)
        pending: dict[Any, int] = {}
        for index, config in configs.items():
            task = ray.remote(
                num_cpus=config.cluster.cpus_per_worker,
                num_gpus=1 if config.cluster.use_gpu else 0,
                max_calls=1,  # a process for each trial
                max_retries=0,
            )(_trial)
            reference = task.remote(config.model_dump(mode="json"), trials[index])
            pending[reference] = index
        on_trial(0, len(configs), "")
        while pending:
            (reference, *_), _ = ray.wait(list(pending), num_returns=1)
            index = pending.pop(reference)
            try:
                trials[index] = ray.get(reference)
            except RayError as error:  # its process died, or an error that is no SvfapError
                reason = str(error).strip().splitlines()[-1]
                trials[index] = dataclasses.replace(trials[index], error=reason)
            on_trial(len(configs) - len(pending), len(configs), trials[index].name)


def _trial(tables: dict[str, Any], trial: Trial) -> Trial:
    """What a task runs: a whole pre-training as the only rank."""
    from svfap_dist.telemetry.journal import METRICS_FILE
    from svfap_dist.train import loop

    logs.set_up()
    config = recipe.from_tables(tables, where=trial.name)
    try:
        trial = dataclasses.replace(trial, **_size(config))
        result = loop.run(config)
    except SvfapError as error:
        return dataclasses.replace(trial, error=str(error))
    metrics = storage.read_bytes(storage.join(config.run.url, METRICS_FILE)).splitlines()
    rates = [json.loads(line)["clips_per_second"] for line in metrics]
    return dataclasses.replace(
        trial,
        clips_per_second=statistics.median(rates[1:] or rates),  # the first has the start in it
        first_loss=result.first_loss,
        loss=result.loss,
        held_out_loss=result.held_out_loss,
    )


def _size(config: Config) -> dict[str, Any]:
    """Parameters of the recipe's model, and its operations for a training step of one clip."""
    import torch

    from svfap_dist.train.objective import build_objective

    learned = build_objective(config)
    with torch.device("meta"):
        model = learned.build()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflops": learned.flops_per_clip / 1e9,
    }
