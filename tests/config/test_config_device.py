"""Where a recipe computes that leaves it open."""

from __future__ import annotations

import logging

import pytest

from svfap_dist.config import recipe, with_device
from svfap_dist.errors import ConfigError


@pytest.mark.parametrize("has_gpus", [True, False])
def test_auto_is_decided_once_and_said(has_gpus: bool, caplog: pytest.LogCaptureFixture) -> None:
    config = recipe.load("finetune_dfew")
    assert config.cluster.use_gpu == "auto"
    assert not config.cluster.on_gpu
    with caplog.at_level(logging.INFO):
        decided = with_device(config, lambda: has_gpus)
    assert decided.cluster.use_gpu is has_gpus is decided.cluster.on_gpu
    assert len(caplog.messages) == 1
    assert ("GPUs" if has_gpus else "the CPU: no GPU") in caplog.text
    assert with_device(decided, lambda: not has_gpus) is decided
    assert decided.fingerprint == config.fingerprint
    assert recipe.from_tables(decided.model_dump(mode="json"), "a run") == decided


def test_the_pre_training_of_the_paper_needs_gpus() -> None:
    assert recipe.load("svfap_base_voxceleb2").cluster.use_gpu is True
    assert recipe.load("tiny_cpu").cluster.use_gpu is False
    assert recipe.load("tiny_cpu", ["cluster.use_gpu=auto"]).cluster.use_gpu == "auto"
    with pytest.raises(ConfigError, match=r"cluster\.use_gpu in tiny_cpu.*auto, true or false"):
        recipe.load("tiny_cpu", ["cluster.use_gpu=1"])
