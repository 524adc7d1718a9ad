"""`Config`: all sections of a run, the rules between them, and the run's fingerprint.

Checks that need neither data nor a cluster run when a `Config` is made; `check_world_size` and
`check_window` need the number of ranks or the data set, and run where that is known. A recipe with
a section [task] fine-tunes, any other pre-trains.
"""

from __future__ import annotations

import hashlib
import json
from typing import get_args

from pydantic import BaseModel, model_validator

from svfap_dist.config import changes, sections
from svfap_dist.config.sections import table
from svfap_dist.errors import ConfigError
from svfap_dist.storage import local_path

# Fields that two attempts at one run may set differently: they change neither the order of samples
# nor what is computed from them.
_FREE_TO_CHANGE = {
    "task": ("metrics", "published", "published_source", "reproduced", "reproduced_source"),
    "finetune": ("init", "seeds", "test_segments", "test_crops"),
    "data": (
        *("url", "eval_url", "kind", "max_bad_fraction", "feeders", "decode_workers"),
        *("decode_seconds", "decode_threads", "prefetch_bytes", "read_ahead_bytes"),
        *("cache_dir", "cache_bytes"),
    ),
    "train": (
        *("max_seconds", "micro_batch_size", "zero_stage", "activation_checkpointing"),
        *("compile", "compile_mode"),
        *("log_every", "eval_every", "checkpoint_every", "keep_last", "keep_every"),
        *("threads_per_rank", "collective_timeout_seconds", "stall_seconds"),
    ),
}


# Keys that came later: at the value of the time before them they do not count either.
_CAME_LATER = {
    ("data", "order_version"): 1,
    ("task", "folds_by"): "labels",
    ("data", "still_motion"): 0.0,
    ("task", "extra_sets"): [],
    ("finetune", "lora_rank"): 8,
    ("finetune", "lora_alpha"): 16.0,
    ("finetune", "pool"): "mean",
    ("finetune", "grid"): 3,
    ("finetune", "stages"): "last",
    ("finetune", "ema"): 0.0,
    ("finetune", "class_weights"): "none",
    ("finetune", "sampling"): "all",
    ("finetune", "validation"): 0.0,
    ("finetune", "patience"): 0,
    ("augment", "run_on"): "workers",
}


class Config(sections.Section):
    """Everything a run depends on."""

    run: sections.RunConfig = sections.RunConfig()
    data: sections.DataConfig = sections.DataConfig()
    decode: sections.DecodeConfig = sections.DecodeConfig()
    mask: sections.MaskConfig = sections.MaskConfig()
    model: sections.ModelConfig = sections.ModelConfig()
    optim: sections.OptimConfig = sections.OptimConfig()
    train: sections.TrainConfig = sections.TrainConfig()
    health: sections.HealthConfig = sections.HealthConfig()
    probe: sections.ProbeConfig = sections.ProbeConfig()
    cluster: sections.ClusterConfig = sections.ClusterConfig()
    metrics: sections.MetricsConfig = sections.MetricsConfig()
    track: sections.TrackConfig = sections.TrackConfig()
    profile: sections.ProfileConfig = sections.ProfileConfig()
    task: sections.TaskConfig | None = None  # None: pre-training
    finetune: sections.FinetuneConfig = sections.FinetuneConfig()
    augment: sections.AugmentConfig = sections.AugmentConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        data, model = self.data, self.model
        for value, unit, key, divisor in (
            (data.num_frames, model.tubelet_size, "data.num_frames", "model.tubelet_size"),
            (data.frame_size, model.patch_size, "data.frame_size", "model.patch_size"),
        ):
            if value % unit:
                raise _impossible(key, value, f"it is not a multiple of {divisor} = {unit}")
        if self.task is None:
            self._check_mask()
        elif data.eval_url:
            why = "held-out clips are for pre-training; a [task] names its own test samples"
            raise _impossible("data.eval_url", data.eval_url, why)
        elif self.probe.url:
            why = "probes are for pre-training; a [task] tests its own samples"
            raise _impossible("probe.url", self.probe.url, why)
        self._check_balance()
        self._check_batch()
        self._check_sources()
        changes.check_changeable(self.run.allow_change, self.keys())
        return self

    def _check_balance(self) -> None:
        given = {
            name: getattr(self.finetune, name)
            for name, default in (("class_weights", "none"), ("sampling", "all"))
            if getattr(self.finetune, name) != default
        }
        if self.task is not None and self.task.kind == "regression":
            for name, value in given.items():
                raise _impossible(f"finetune.{name}", value, "a regression has no classes")
        if len(given) > 1:
            why = "finetune.class_weights would count rare classes more a second time"
            raise _impossible("finetune.sampling", given["sampling"], why)

    def _check_mask(self) -> None:
        mask, tubelets = self.mask, self.num_tubelets
        kind = table("svfap_dist.data.masking:MASKS")[mask.kind]
        total = tubelets if kind.whole_frames else self.num_patches
        if not 0 < round(total * mask.ratio) < total:
            units = "tubelet frames" if kind.whole_frames else "patches"
            why = f"it must mask some of {total} {units}, and not all"
            raise _impossible("mask.ratio", mask.ratio, why)
        # Over 4 tubelet frames the running cell visits each of its places once, so every masked
        # tube, and with it every clip, has equally many predicted tokens. Only tubes ensure that.
        if mask.decoder_ratio < 1 and (not kind.same_in_all_frames or tubelets % 4):
            why = "below 1 it needs mask.kind = tube and a multiple of 4 tubelet frames, not "
            why += f"{mask.kind} and {tubelets}"
            raise _impossible("mask.decoder_ratio", mask.decoder_ratio, why)

    def _check_batch(self) -> None:
        train, data = self.train, self.data
        if train.global_batch_size % (data.num_lanes * data.repeated_sampling):
            why = f"data.num_lanes = {data.num_lanes} times data.repeated_sampling = "
            why += (
                f"{data.repeated_sampling} must divide it, so that every step takes equally many "
            )
            why += "samples from each lane and equally many clips from each sample"
            raise _impossible("train.global_batch_size", train.global_batch_size, why)
        if train.zero_stage == 0 and train.dtype == "bfloat16":
            why = "DeepSpeed's stage 0 is wrong with train.dtype = bfloat16; use 1, 2 or 3"
            raise _impossible("train.zero_stage", 0, why)
        cluster = self.cluster
        if cluster.min_workers > cluster.num_workers:
            why = f"it is more than cluster.num_workers = {cluster.num_workers}"
            raise _impossible("cluster.min_workers", cluster.min_workers, why)
        if not self.world_sizes:
            # None of these: say why the largest is not.
            check_world_size(self, cluster.num_workers, key="cluster.num_workers")

    def _check_sources(self) -> None:
        sources = self.data.sources
        if sources and self.data.url:
            found = f"data.url = {self.data.url!r} and {len(sources)} entries of data.sources"
            advice = "give data.url for one data set, or [[data.sources]] for a mixture"
            raise ConfigError("Both data.url and data.sources are set", "data.url", found, advice)
        for what, values, advice in (
            ("URL", [_place_of(source.url) for source in sources], "give each data set once"),
            ("name", [source.label for source in sources], "give each [[data.sources]] a `name`"),
        ):
            for number, value in enumerate(values):
                if value in values[:number]:
                    first = values.index(value)
                    title, found = f"Two sources have the same {what}", f"{value!r}, twice"
                    where = f"data.sources, entries {first + 1} and {number + 1}"
                    raise ConfigError(title, where, found, advice)
        for number, source in enumerate(sources, start=1):
            if self.task is not None and source.region not in (None, self.data.region):
                found = f"{source.region}, where data.region = {self.data.region}"
                what, where = (
                    "Source has another region than the task",
                    f"data.sources, entry {number}",
                )
                raise ConfigError(what, where, found, "leave out `region` of the source")
        total = sum(source.weight for source in sources)
        for number, source in enumerate(sources, start=1):
            if source.weight < total * sections.SMALLEST_SHARE:
                title, where = "Weight of a source is too small", f"data.sources, entry {number}"
                found = f"{source.weight:g}, where all weights together are {total:g}"
                advice = f"give it at least {total * sections.SMALLEST_SHARE:g}, or leave it out"
                raise ConfigError(title, where, found, advice)

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Numbers of ranks that a group by Ray Train may have, ascending."""
        cluster = self.cluster
        sizes = range(cluster.fewest_workers, cluster.num_workers + 1)
        return tuple(size for size in sizes if _is_possible(self, size))

    @classmethod
    def keys(cls) -> list[str]:
        """Return all keys of a recipe, section.name."""
        found = []
        for section, field in cls.model_fields.items():
            models = [field.annotation, *get_args(field.annotation)]  # a section may be `X | None`
            (model,) = (m for m in models if isinstance(m, type) and issubclass(m, BaseModel))
            found += [f"{section}.{name}" for name in model.model_fields]
        return found

    @property
    def window(self) -> int:
        """Source frames that a clip spans."""
        return self.data.window

    @property
    def augments_on_device(self) -> bool:
        """Whether the device that trains augments clips, not the decode workers."""
        return self.task is not None and self.augment.run_on == "device"

    @property
    def probe_every(self) -> int:
        """Steps between probes; 0: there are none."""
        return (self.probe.every or self.train.checkpoint_every) if self.probe.url else 0

    @property
    def samples_per_step(self) -> int:
        """Samples read for one optimizer step, over all ranks."""
        return self.train.global_batch_size // self.data.repeated_sampling

    @property
    def num_tubelets(self) -> int:
        """Tubelet frames of a clip."""
        return self.data.num_frames // self.model.tubelet_size

    @property
    def num_patches(self) -> int:
        """Patches of a tubelet frame."""
        return (self.data.frame_size // self.model.patch_size) ** 2

    @property
    def num_visible_tubelets(self) -> int:
        """Tubelet frames of a clip that have visible tokens."""
        kind = table("svfap_dist.data.masking:MASKS")[self.mask.kind]
        return self.num_tubelets - round(self.num_tubelets * self.mask.ratio * kind.whole_frames)

    @property
    def fingerprint(self) -> str:
        """Digest of all fields that decide the numbers of a run.

        Storage, place and the frequency of logs and checkpoints do not count. Renamed keys and
        values count under their first names, and later keys are left out where they have the value
        of the time before them, so that old checkpoints' fingerprints stay valid.
        """
        fields = self.model_dump(mode="json", include={"data", "mask", "model", "optim", "train"})
        fields["run"] = {"seed": self.run.seed}
        if self.task is not None:
            fields |= self.model_dump(mode="json", include={"task", "finetune", "augment"})
        for section, names in _FREE_TO_CHANGE.items():
            for name in names if section in fields else ():
                fields[section].pop(name)
        data = fields["data"]
        sources = data.pop("sources")
        if sources:
            data["sources"] = [
                [source["weight"], source["region"] or data["region"]] for source in sources
            ]
        data["colours"] = data.pop("colors")
        data["region"] = {"center": "centre"}.get(data["region"], data["region"])
        for (section, name), before in _CAME_LATER.items():
            if section in fields and fields[section][name] == before:
                fields[section].pop(name)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _impossible(key: str, value: object, why: str) -> ConfigError:
    found, advice = f"{value!r}: {why}", f"change {key} or the setting it conflicts with"
    return ConfigError("Impossible combination in the recipe", key, found, advice)


def _place_of(url: str) -> str:
    """Return a URL in the form that two spellings of a place have in common."""
    place = url.removeprefix("file://").rstrip("/")
    return place if "://" in place else local_path(place)


def _is_possible(config: Config, world_size: int) -> bool:
    try:
        check_world_size(config, world_size)
    except ConfigError:
        return False
    return True


def check_world_size(config: Config, world_size: int, key: str = "world size") -> int:
    """Return the gradient accumulation steps for a number of ranks.

    Args:
        config: The recipe, for its lanes and its batch sizes.
        world_size: Number of ranks.
        key: Place of that number, for an error.

    Raises:
        ConfigError: If lanes or global batch cannot be shared equally among the ranks.
    """
    lanes, batch = config.data.num_lanes, config.train.global_batch_size
    possible = [size for size in range(1, lanes + 1) if lanes % size == 0]
    if world_size not in possible:
        found = f"{world_size} ranks for data.num_lanes = {lanes}"
        which = "one of " if len(possible) > 1 else ""
        advice = f"set the number of ranks to {which}{', '.join(map(str, possible))}, or "
        advice += f"data.num_lanes to a multiple of {world_size}"
        raise ConfigError("Lanes cannot be shared equally", key, found, advice)
    per_rank = batch // world_size
    micro = min(config.train.micro_batch_size, per_rank)
    if per_rank % micro:
        found = f"{micro}, for {batch} / {world_size} = {per_rank} clips of each rank"
        advice = f"choose a train.micro_batch_size that divides {per_rank}"
        raise ConfigError("Global batch cannot be divided", "train.micro_batch_size", found, advice)
    return per_rank // micro


def check_window(data: sections.DataConfig, min_frames: int, where: str) -> None:
    """Check that the shortest video of a data set is long enough for a clip.

    Args:
        data: The recipe's section, for the window of its clips.
        min_frames: Frames of the shortest video.
        where: The data set, for the error.

    Raises:
        ConfigError: If a clip's window is longer.
    """
    if data.window > min_frames:
        found = f"data.num_frames = {data.num_frames} at data.sampling_rate = {data.sampling_rate} "
        found += f"spans {data.window} frames, the shortest video has {min_frames}"
        advice = "lower data.num_frames or data.sampling_rate, or shard again with "
        advice += f"--min-frames {data.window}"
        raise ConfigError("Window is longer than a clip of the data set", where, found, advice)


def require_urls(config: Config, *keys: str, hint: str = "an s3:// prefix or a folder") -> None:
    """Check that a recipe has the URLs to read from and write to.

    Args:
        config: The recipe.
        *keys: "data.url", "run.url", ...; none: these two.
        hint: Form of the value, for the error.

    Raises:
        ConfigError: If one of them is empty.
    """
    for key in keys or ("data.url", "run.url"):
        section, _, name = key.partition(".")
        if key == "data.url" and config.data.sources:
            continue
        if not getattr(getattr(config, section), name):
            title = f"Missing required setting: {key}"
            raise ConfigError(title, key, "it is empty", f"give {key}={hint}")
