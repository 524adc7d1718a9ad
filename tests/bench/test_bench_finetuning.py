"""The costs of the modes of fine-tuning are those of the network that each trains."""

from __future__ import annotations

import pytest

from svfap_dist.bench import finetuning
from svfap_dist.config import recipe
from svfap_dist.errors import ConfigError

NANO = [
    *("model.size=nano", "data.frame_size=32", "data.num_frames=8", "cluster.num_workers=1"),
    *("train.global_batch_size=4", "train.micro_batch_size=2"),
    *("finetune.pool=mean", "finetune.stages=last"),
]


def test_each_mode_is_measured_by_itself() -> None:
    costs = finetuning.run(recipe.load("finetune_synthetic", NANO), steps=1)
    found = {cost.mode: cost for cost in costs.modes}
    assert list(found) == ["full", "linear", "attentive", "lora"]
    assert found["full"].trained == found["full"].parameters
    assert found["linear"].trained == 2 * 32 + 7 * 32 + 7  # norm and head of the nano encoder
    assert found["linear"].trained < found["attentive"].trained < found["full"].trained
    assert found["linear"].trained < found["lora"].trained < found["full"].trained
    assert found["lora"].parameters > found["full"].parameters
    assert all(cost.peak_bytes > 0 and cost.seconds > 0 for cost in costs.modes)
    head, *rows = costs.lines()[1:]
    assert "trained parameters" in head
    assert [row.split()[0] for row in rows] == list(found)


def test_a_task_of_kind_auto_needs_its_data_set() -> None:
    with pytest.raises(ConfigError, match=r"data\.url"):
        finetuning.run(recipe.load("finetune_custom", NANO), steps=1)


def test_a_recipe_of_pre_training_has_no_modes() -> None:
    with pytest.raises(ConfigError, match=r"Missing \[task\]"):
        finetuning.run(recipe.load("tiny_cpu", []), steps=1)
