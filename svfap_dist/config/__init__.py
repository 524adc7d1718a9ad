"""The room of recipes: a frozen, typed, strict description of a run.

Start in `sections` (what a recipe may say, section by section), then `config` (`Config`, the rules
between sections, the fingerprint) and `recipe` (TOML files, `extends`, overrides, old names).
"""

from svfap_dist.config.config import Config, check_window, check_world_size, require_urls
from svfap_dist.config.device import with_device
from svfap_dist.config.sections import (
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    DecodeConfig,
    FinetuneConfig,
    HealthConfig,
    MaskConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    ProfileConfig,
    RunConfig,
    SourceConfig,
    TaskConfig,
    TrackConfig,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DecodeConfig",
    "FinetuneConfig",
    "HealthConfig",
    "MaskConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "ProbeConfig",
    "ProfileConfig",
    "RunConfig",
    "SourceConfig",
    "TaskConfig",
    "TrackConfig",
    "TrainConfig",
    "check_window",
    "check_world_size",
    "require_urls",
    "with_device",
]
