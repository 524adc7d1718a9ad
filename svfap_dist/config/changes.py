"""Which keys a begun run may continue with other values of, where `run.allow_change` names them.

A key may change if it decides only about steps to come: how many there are, and how they learn. The
order of samples and the network are fixed, since completed steps and checkpoints rest on them.
"""

from __future__ import annotations

from collections.abc import Collection

from svfap_dist.errors import ConfigError, nearest

CHANGEABLE = {
    *("train.max_steps", "train.epochs"),
    *("optim.lr", "optim.min_lr", "optim.warmup_lr", "optim.warmup_fraction", "optim.betas"),
    *("optim.weight_decay", "optim.clip_grad_norm"),
    *("data.crop_scales", "data.colors", "data.still_motion"),
    *("augment.flip", "augment.erasing", "augment.rand_augment_ops", "augment.run_on"),
    *("augment.rand_augment_magnitude", "augment.rand_augment_std"),
    *("finetune.label_smoothing", "finetune.mixup", "finetune.cutmix", "finetune.mix_probability"),
    *("finetune.cutmix_probability", "finetune.patience"),
}

_ORDER = "it decides the order of samples, which completed steps and the audit depend on"
_NETWORK = "it decides the network or its optimizer's state, which the checkpoints hold"
_TASK = "it decides what the network learns, so that losses before and after could not be compared"
# By key or section; keys of the fingerprint that are neither here nor changeable do not exist.
_FIXED = {
    "run.seed": _ORDER,
    **dict.fromkeys(
        (
            *("data.num_lanes", "data.shuffle_block", "data.order_version"),
            *("data.repeated_sampling", "data.sources"),
        ),
        _ORDER,
    ),
    "train.global_batch_size": _ORDER,
    "model": _NETWORK,
    "train.dtype": _NETWORK,
    **dict.fromkeys(
        (
            *("finetune.mode", "finetune.layer_decay", "finetune.drop_path"),
            *("finetune.head_init_scale", "finetune.output", "finetune.lora_rank"),
            *("finetune.lora_alpha", "finetune.pool", "finetune.grid", "finetune.stages"),
            "finetune.ema",
        ),
        _NETWORK,
    ),
    "finetune.class_weights": _TASK,
    **dict.fromkeys(("finetune.sampling", "finetune.validation"), _ORDER),
    "mask": _TASK,
    "task": _TASK,
    **dict.fromkeys(
        ("data.num_frames", "data.sampling_rate", "data.frame_size", "data.region"), _TASK
    ),
}


def why_fixed(key: str) -> str:
    """Return why a run keeps its value of a key, "" if it does not have to.

    Args:
        key: section.name.
    """
    return _FIXED.get(key) or _FIXED.get(key.partition(".")[0], "")


def check_changeable(keys: Collection[str], known: Collection[str]) -> None:
    """Check the keys that a recipe names as changeable.

    Args:
        keys: Value of run.allow_change.
        known: All keys of a recipe.

    Raises:
        ConfigError: If there is no such key, or every run keeps its value of it.
    """
    where = "run.allow_change"
    for key in keys:
        if key not in known:
            raise ConfigError("Unknown key", where, repr(key), nearest(key, sorted(known)))
        if why := why_fixed(key):
            advice = f"remove {key} from {where}, and give another run.url for a new run"
            raise ConfigError(
                "Key cannot change after a run has started", where, f"{key}: {why}", advice
            )
