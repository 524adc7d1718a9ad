"""The configuration of a run: frozen, typed, strict.

Nothing here reads files; `recipe` does. What can be checked without data or a cluster is checked
when a `Config` is made; the two checks that need to know the world size or the manifest are in
`fit`. A recipe with a section [task] is one of fine-tuning, else it is one of pre-training.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import model_validator

from svfap_dist.config.downstream import AugmentConfig, FinetuneConfig, TaskConfig
from svfap_dist.config.sections import (
    ClusterConfig,
    DataConfig,
    DecodeConfig,
    MaskConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Section,
    TrainConfig,
)
from svfap_dist.config.validation import (
    check_batch,
    check_clip,
    check_mask,
    check_task,
    check_window,
    check_world_size,
)

__all__ = [
    "AugmentConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DecodeConfig",
    "FinetuneConfig",
    "MaskConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "check_window",
    "check_world_size",
]


class Config(Section):
    """Everything a run depends on."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    decode: DecodeConfig = DecodeConfig()
    mask: MaskConfig = MaskConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    metrics: MetricsConfig = MetricsConfig()
    task: TaskConfig | None = None  # None: pre-training
    finetune: FinetuneConfig = FinetuneConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_clip(self)
        if self.task is None:
            check_mask(self)
        check_batch(self)
        check_task(self)
        return self

    @property
    def window(self) -> int:
        """Source frames that a clip spans (16 frames at stride 4: 61)."""
        return (self.data.num_frames - 1) * self.data.sampling_rate + 1

    @property
    def samples_per_step(self) -> int:
        """Samples read for one optimizer step, over all ranks."""
        return self.train.global_batch_size // self.data.repeated_sampling

    @property
    def num_tubelets(self) -> int:
        """Tubelet frames of a clip."""
        return self.data.num_frames // self.model.tubelet_size

    @property
    def num_visible_tubelets(self) -> int:
        """Tubelet frames of a clip that have visible tokens."""
        masked = round(self.num_tubelets * self.mask.ratio) if self.mask.kind == "frame" else 0
        return self.num_tubelets - masked

    @property
    def fingerprint(self) -> str:
        """Digest of what decides the numbers of a run: not where it lives or runs, how often it
        logs or saves."""
        fields = self.model_dump(mode="json", include={"data", "mask", "model", "optim", "train"})
        fields["run"] = {"seed": self.run.seed}
        if self.task is not None:
            fields |= self.model_dump(mode="json", include={"task", "finetune", "augment"})
        for section, names in _FREE_TO_CHANGE.items():
            for name in names if section in fields else ():
                fields[section].pop(name)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


# May differ between two attempts at the same run: they change neither the order of samples nor
# what is computed from them.
_FREE_TO_CHANGE = {
    "task": ("metrics", "published", "published_source"),
    "finetune": ("init", "test_segments", "test_crops"),
    "data": (
        "url",
        "eval_url",
        "max_bad_fraction",
        "decode_workers",
        "decode_seconds",
        "decode_threads",
        "prefetch_bytes",
        "cache_dir",
        "cache_bytes",
    ),
    "train": (
        "max_seconds",
        "micro_batch_size",
        "zero_stage",
        "compile",
        "activation_checkpointing",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "threads_per_rank",
        "collective_timeout_seconds",
    ),
}
