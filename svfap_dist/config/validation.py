"""Whether the fields of a recipe fit each other, the world and the data.

Each check names the key to change. They take the finished `Config`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from svfap_dist.errors import ConfigError

if TYPE_CHECKING:
    from svfap_dist.config import Config


def check_clip(config: Config) -> None:
    data, model = config.data, config.model
    if data.num_frames % model.tubelet_size:
        raise _impossible(
            "data.num_frames",
            data.num_frames,
            f"it is not a multiple of model.tubelet_size = {model.tubelet_size}",
        )
    if data.frame_size % model.patch_size:
        raise _impossible(
            "data.frame_size",
            data.frame_size,
            f"it is not a multiple of model.patch_size = {model.patch_size}",
        )


def check_mask(config: Config) -> None:
    mask, tubelets = config.mask, config.num_tubelets
    patches = (config.data.frame_size // config.model.patch_size) ** 2
    choice = tubelets if mask.kind == "frame" else patches
    if not 0 < round(choice * mask.ratio) < choice:
        things = "tubelet frames" if mask.kind == "frame" else "patches"
        raise _impossible(
            "mask.ratio", mask.ratio, f"of {choice} {things} it must mask some and leave some"
        )
    # Over 4 tubelet frames the cell has run through all its places, so that each masked tube, and
    # thereby every clip, has as many predicted tokens. No other mask gives every clip equally many.
    if mask.decoder_ratio < 1 and (mask.kind != "tube" or tubelets % 4):
        raise _impossible(
            "mask.decoder_ratio",
            mask.decoder_ratio,
            "below 1 it wants mask.kind = tube and a multiple of 4 tubelet frames, not "
            f"{mask.kind} and {tubelets}",
        )


def check_batch(config: Config) -> None:
    train, data = config.train, config.data
    if train.global_batch_size % (data.num_lanes * data.repeated_sampling):
        raise _impossible(
            "train.global_batch_size",
            train.global_batch_size,
            "every step takes equally many samples from each lane, and cuts as many clips from "
            f"each sample: data.num_lanes = {data.num_lanes} times data.repeated_sampling = "
            f"{data.repeated_sampling} does not divide it",
        )
    if train.zero_stage == 0 and train.dtype == "bfloat16":
        raise _impossible(
            "train.zero_stage",
            0,
            "with train.dtype = bfloat16 DeepSpeed's stage 0 goes wrong; use 1, 2 or 3",
        )
    check_world_size(config, config.cluster.num_workers, key="cluster.num_workers")


def check_task(config: Config) -> None:
    if config.task is not None and config.data.eval_url:
        raise _impossible(
            "data.eval_url",
            config.data.eval_url,
            "clips are held out from pre-training; a [task] says itself what it is tested on",
        )


def _impossible(key: str, value: object, why: str) -> ConfigError:
    return ConfigError(
        "Impossible combination in the recipe",
        where=key,
        found=f"{value!r}: {why}",
        do=f"change {key} or what it must fit",
    )


def check_world_size(config: Config, world_size: int, key: str = "world size") -> int:
    """Gradient accumulation steps for `world_size` ranks.

    Raises: ConfigError if the lanes or the global batch cannot be shared equally among the ranks.
    """
    lanes, batch = config.data.num_lanes, config.train.global_batch_size
    possible = [size for size in range(1, lanes + 1) if lanes % size == 0]
    if world_size not in possible:
        raise ConfigError(
            "Lanes cannot be shared equally",
            where=key,
            found=f"{world_size} ranks for data.num_lanes = {lanes}",
            do=f"use one of {', '.join(map(str, possible))} ranks, or a data.num_lanes that is "
            f"a multiple of {world_size}",
        )
    per_rank = batch // world_size
    micro = config.train.micro_batch_size
    if per_rank % min(micro, per_rank):
        raise ConfigError(
            "Global batch cannot be divided",
            where="train.micro_batch_size",
            found=f"{micro} clips at a time of the {per_rank} that each of {world_size} ranks "
            f"takes of train.global_batch_size = {batch}",
            do=f"choose a train.micro_batch_size that divides {per_rank}",
        )
    return per_rank // min(micro, per_rank)


def check_window(config: Config, min_frames: int, where: str) -> None:
    """Check that the shortest video of a data set has room for a clip.

    Raises: ConfigError if a clip's window is longer.
    """
    if config.window > min_frames:
        raise ConfigError(
            "Window is longer than a clip of the data set",
            where=where,
            found=(
                f"data.num_frames = {config.data.num_frames} at data.sampling_rate = "
                f"{config.data.sampling_rate} spans {config.window} frames, the shortest video "
                f"has {min_frames}"
            ),
            do="lower data.num_frames or data.sampling_rate, or shard again with "
            f"--min-frames {config.window}",
        )
