"""Ablations: train a recipe once for every combination of values; one table of results.

In: a recipe, overrides, and axes `key=v1,v2`. Out: per combination, a run in a folder of that name
below `run.url`, and a `Trial`. Trials are Ray tasks; each is an ordinary run of one rank in its own
process. A sweep that is started again resumes interrupted trials and skips
finished ones.
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
from svfap_dist.cluster.connection import check_resources, connected, with_device_of_cluster
from svfap_dist.config import Config, recipe, require_urls
from svfap_dist.errors import ConfigError, SvfapError
from svfap_dist.text_table import format_table

# Set by the sweep.
_OWN_KEYS = ("run.url", "cluster.num_workers", "cluster.min_workers", "metrics.port")
_COLUMNS = ("combination", "parameters", "GFLOP/clip", "clips/s", "loss", "validation loss")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A combination of values and its results, None where unknown.

    gflops: GFLOP of a training step for one clip, counted, not measured. error: why it failed, or
    "".
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
        """Return the combination as one word."""
        return ",".join(f"{key}={value}" for key, value in self.combination.items())

    def row(self) -> tuple[str, ...]:
        """Return the trial's cells of the table."""

        def number(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        losses = f"{number(self.first_loss, '.4f')} to {number(self.loss, '.4f')}"
        return (
            self.name,
            number(self.parameters, ",d"),
            number(self.gflops, ".2f"),
            number(self.clips_per_second, ".2f"),
            "failed" if self.error else losses,
            number(self.held_out_loss, ".4f"),
        )


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """All trials, in the order of the axes."""

    trials: list[Trial]

    @property
    def failed(self) -> int:
        """Return the number of failed trials."""
        return sum(bool(trial.error) for trial in self.trials)

    def lines(self) -> list[str]:
        """Return a table, and the reason of each failure."""
        columns = range(1, len(_COLUMNS))
        table = format_table([trial.row() for trial in self.trials], _COLUMNS, right=columns)
        return [*table, *(f"{t.name} failed: {t.error}" for t in self.trials if t.error)]


def run(
    name: str,
    axes: Sequence[str],
    overrides: Sequence[str],
    on_trial: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> SweepResult:
    """Train a recipe once for every combination of the axes' values.

    A failed trial is a row of the table and stops no other.

    Args:
        name: The recipe, a path or a bundled name.
        axes: Texts `key=v1,v2`.
        overrides: Texts `key=value`, for all trials.
        on_trial: Called with the number of finished trials, of all trials, and the latest's name.

    Raises:
        ConfigError: If an axis cannot be read, or no combination is possible.
        ClusterError: If Ray cannot be reached or is too small for one trial.
    """
    combinations = _combinations([_axis(axis) for axis in axes])
    base = recipe.load(name, overrides)
    require_urls(base, "run.url", hint="a folder or s3:// prefix; trials get a folder below it")
    # Trials share a node, so a rank's default share of the CPU threads would be too large.
    threads = base.train.threads_per_rank or base.cluster.cpus_per_worker
    before = [*overrides, f"train.threads_per_rank={threads}"]
    trials: list[Trial] = []
    configs: dict[int, Config] = {}
    refused: ConfigError | None = None
    for index, combination in enumerate(combinations):
        url = storage.join(base.run.url, _folder(combination))
        values = [f"{key}={value}" for key, value in combination.items()]
        own = [f"run.url={url}", "cluster.num_workers=1", "cluster.min_workers=0"]
        own += ["metrics.port=0"]
        try:
            configs[index] = recipe.load(name, [*before, *values, *own])
            trials.append(Trial(combination, url))
        except ConfigError as error:
            refused = error
            trials.append(Trial(combination, url, error=str(error)))
    if not configs:
        assert refused is not None
        raise refused
    _check_distinct(configs, trials)
    _run_all(configs, trials, on_trial)
    return SweepResult(trials)


def _axis(text: str) -> tuple[str, list[str]]:
    """Return key and values of `key=v1,v2`; commas inside brackets belong to a value."""
    key, equals, values = text.partition("=")
    # Commas that no closing bracket follows before an opening one.
    found = [value.strip() for value in re.split(r",(?![^\[]*\])", values)]
    if not equals or "." not in key or not all(found):
        advice = "write e.g. --axis mask.ratio=0.75,0.9"
        raise ConfigError("Unreadable axis", text, "not of the form section.key=v1,v2", advice)
    if key in _OWN_KEYS:
        do = "name another key: `svfap sweep` sets this one"
        raise ConfigError("Key cannot be swept", key, text, do)
    return key, found


def _combinations(axes: Sequence[tuple[str, list[str]]]) -> list[dict[str, str]]:
    keys = [key for key, _ in axes]
    combinations = [
        dict(zip(keys, values, strict=True))
        for values in itertools.product(*(values for _, values in axes))
    ]
    folders = {_folder(combination) for combination in combinations}
    if not keys or len(set(keys)) < len(keys) or len(folders) < len(combinations):
        found = ", ".join(f"{key}={','.join(values)}" for key, values in axes) or "none"
        advice = "give each key once, and each of its values once"
        raise ConfigError("Duplicate sweep key or value", "--axis", found, advice)
    return combinations


def _check_distinct(configs: dict[int, Config], trials: Sequence[Trial]) -> None:
    """Check that no two recipes differ in their run.url only, as those of 0.9 and 0.90 do."""
    seen: dict[str, int] = {}
    for index, config in configs.items():
        recipe_text = config.model_dump_json(exclude={"run": {"url"}})
        twin = seen.setdefault(recipe_text, index)
        if twin != index:
            found = f"{trials[twin].name} and {trials[index].name} are the same recipe"
            advice = "give each value once, in one notation"
            raise ConfigError("Duplicate sweep key or value", "--axis", found, advice)


def _folder(combination: dict[str, str]) -> str:
    """Return a combination as a folder's name: `mask.ratio=0.75,model.stage_depths=12-6-3`."""
    return ",".join(
        f"{key}={re.sub(r'[^A-Za-z0-9._-]+', '-', value).strip('-')}"
        for key, value in combination.items()
    )


def _run_all(
    configs: dict[int, Config], trials: list[Trial], on_trial: Callable[[int, int, str], None]
) -> None:
    """Run the trials of `configs` (by index) as Ray tasks, and replace them by their results."""
    import ray
    from ray.exceptions import RayError

    some = next(iter(configs.values()))
    with connected(some.cluster):
        check_resources(with_device_of_cluster(some).cluster)
        pending: dict[Any, int] = {}
        for index, found in configs.items():
            config = with_device_of_cluster(found)
            task = ray.remote(
                num_cpus=config.cluster.cpus_per_worker,
                num_gpus=1 if config.cluster.on_gpu else 0,
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
            except RayError as error:  # its process died or raised another error than SvfapError
                reason = str(error).strip().splitlines()[-1]
                trials[index] = dataclasses.replace(trials[index], error=reason)
            on_trial(len(configs) - len(pending), len(configs), trials[index].name)


def _trial(tables: dict[str, Any], trial: Trial) -> Trial:
    """Run a whole pre-training as the only rank, in a Ray task."""
    import torch

    from svfap_dist.telemetry.journal import METRICS_FILE
    from svfap_dist.train import loop
    from svfap_dist.train.objective import build_objective

    logs.set_up()
    config = recipe.from_tables(tables, where=trial.name)
    try:
        objective = build_objective(config)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in objective.build().parameters())
        gflops = objective.flops_per_clip / 1e9
        trial = dataclasses.replace(trial, parameters=parameters, gflops=gflops)
        result = loop.run(config)
    except SvfapError as error:
        return dataclasses.replace(trial, error=str(error))
    metrics = storage.read_bytes(storage.join(config.run.url, METRICS_FILE)).splitlines()
    rates = [json.loads(line)["clips_per_second"] for line in metrics]
    return dataclasses.replace(
        trial,
        clips_per_second=statistics.median(rates[1:] or rates),  # the first includes the start
        first_loss=result.first_loss,
        loss=result.loss,
        held_out_loss=result.held_out_loss,
    )
