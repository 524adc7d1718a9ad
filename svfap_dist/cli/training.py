"""`svfap demo`, `svfap pretrain`, `svfap sweep`: pre-training."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer

from svfap_dist.cli.app import AsJson, On, Overrides, Recipe, app, print_result
from svfap_dist.cli.extras import check_extras
from svfap_dist.progress import Progress, say, waiting

log = logging.getLogger(__name__)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for all files of the demo.")] = "svfap-demo",
    videos: Annotated[
        str, typer.Option(help="Folder of face videos to train on (default: rendered faces).")
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Run the whole pipeline at small size on this machine.

    Clips, shards, pre-training on two Ray workers, picture, report. Takes minutes on a CPU.

    Example: svfap demo --out /tmp/demo
    """
    check_extras("train", "ray", "report")
    from svfap_dist import demo as the_demo

    the_demo.run(out, videos, overrides or [])


@app.command()
def pretrain(
    name: Recipe, overrides: Overrides = None, on: On = "local", as_json: AsJson = False
) -> None:
    """Pre-train the masked autoencoder.

    Run the same command again to resume; Ctrl-C saves a checkpoint first.

    Example: svfap pretrain tiny_cpu data.url=shards run.url=runs/a --on ray
    """
    from svfap_dist.config import recipe
    from svfap_dist.errors import ConfigError

    config = recipe.load(name, overrides or [])
    if config.task is not None:
        do = f"use `svfap finetune {name}`"
        raise ConfigError("Recipe is for fine-tuning", name, "it has a [task]", do)
    check_place(on)
    with waiting("Checking data and checkpoints", silent=not is_main_process()):
        from svfap_dist.train import loop

        config = decide_device(config, on)
        context = loop.preflight(config)
    if context.step and is_main_process():
        say(f"Resuming from step {context.step}, the newest checkpoint of {config.run.url}.")
    with Progress("Pre-training", silent=not is_main_process()) as progress:
        result = launch_training(config, context, on, progress)
    if is_main_process():
        print_result(result, as_json)
    from svfap_dist.train.signals import exit_code

    sys.exit(exit_code(result.stop_reason))


def is_main_process() -> bool:
    """Return whether this process prints: of torchrun's ranks, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def check_place(on: str) -> None:
    """Check the value of --on.

    Args:
        on: Value of the option.

    Raises:
        ConfigError: If it is neither local nor ray.
    """
    from svfap_dist.errors import ConfigError

    if on not in ("local", "ray"):
        raise ConfigError("Unknown place to train", "--on", on, "use local or ray")


def decide_device(config: Any, on: str) -> Any:
    """Return the recipe with cluster.use_gpu decided, by the Ray cluster or by this machine.

    Args:
        config: The run's recipe.
        on: local or ray.
    """
    from svfap_dist.config import with_device

    if config.cluster.use_gpu != "auto":
        return config
    if on == "ray":
        from svfap_dist.cluster.connection import connected, with_device_of_cluster

        with connected(config.cluster):
            return with_device_of_cluster(config)
    from svfap_dist.distributed import has_gpu_per_rank

    return with_device(config, has_gpu_per_rank)


def launch_training(config: Any, context: Any, on: str, progress: Progress) -> Any:
    """Train on Ray, or as one rank in this process, and return the `RunResult`.

    Args:
        config: The run's recipe.
        context: Result of `loop.preflight`.
        on: local or ray.
        progress: Shows the steps.
    """

    def show(row: dict[str, Any]) -> None:
        note = f"loss {row['loss']:.4f}  {row['clips_per_second']:.1f} clips/s"
        progress.update(row["step"], row["total_steps"], note)

    if on == "ray":
        from svfap_dist.cluster import ray_train

        return ray_train.train(config, on_log=show, on_wait=progress.tick, context=context)
    from svfap_dist.telemetry.exporter import Discovery
    from svfap_dist.train import loop

    if not is_main_process():
        return loop.run(config, on_log=show, context=context)
    with Discovery(config.metrics, config.run.name) as discovery:
        return loop.run(config, on_log=show, on_begin=discovery.show, context=context)


@app.command()
def sweep(
    name: Recipe,
    overrides: Overrides = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Recipe key and its values; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pre-train once for every combination of values, and print a table.

    Trials are Ray tasks of one rank each.

    Example: svfap sweep tiny_cpu --axis mask.ratio=0.75,0.9 --axis model.pyramid=true,false
    data.url=shards run.url=runs/sweep
    """
    from svfap_dist.cluster import sweep as sweeping

    with Progress("Trials") as progress:
        result = sweeping.run(name, axis or [], overrides or [], on_trial=progress.update)
    print_result(result, as_json)
    if result.failed:
        log.error("%d of %d trials failed.", result.failed, len(result.trials))
        raise typer.Exit(1)
