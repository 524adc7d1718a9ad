"""train.compile: which programs there are, and that they compute what the network does without.

torch generates no code for them here, so they take seconds; test_train_options.py lets it.
"""

from __future__ import annotations

from typing import Any

import pytest
from train_ranks import recipe_tables, start

MODEL = {"size": "nano", "stage_depths": [3, 3], "decoder_depth": 3}
TASK = {"kind": "classification", "set": "toy", "label": "class", "names": ["a", "b", "c"]}
TASK |= {"folds": 2, "metrics": ["uar"]}
TUNING = {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "head_init_scale": 1.0, "lora_rank": 4}
DROPPING, LORA = {"drop_path": 0.2}, {"mode": "lora"}
FRUGAL = {"activation_checkpointing": True, "compile_mode": "reduce-overhead"}
# By case: options of [train], and of [finetune] where there is a task. Pre-training has plain,
# bottleneck and reverse blocks in the encoder, plain ones in the decoder, whose last block returns
# fewer tokens, and the loss. The first block of a classifier never drops its branches.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "plain lora": ({}, LORA),
    "stage 1": ({"compile": True, "zero_stage": 1, "micro_batch_size": 2}, {}),
    "stage 3": ({"compile": True, "zero_stage": 3, **FRUGAL}, {}),
    "lora at stage 3": ({"compile": True, "zero_stage": 3}, LORA),
    "dropping": ({"compile": True, "zero_stage": 0}, DROPPING),
    "dropping, recomputed": ({"compile": True, "zero_stage": 2, **FRUGAL}, DROPPING),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `compile_steps` saw, by case; one process runs all."""
    tasks = []
    for name, (train, finetune) in CASES.items():
        tables = recipe_tables("", "", model=MODEL, train={"micro_batch_size": 4, **train})
        if finetune:
            tables |= {"task": TASK, "finetune": TUNING | finetune}
        evaluated = [4, 3] if name in ("plain", "stage 1") else []
        tasks.append(("compile_steps", {"tables": tables, "steps": 3, "evaluated": evaluated}))
    found = start(1, tasks, tmp_path_factory.mktemp("regions"))
    return dict(zip(CASES, (of_ranks[0] for of_ranks in found), strict=True))


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("stage 1", [6, 12, 18, 18]),
        ("stage 3", [6, 6]),
        ("lora at stage 3", [4, 4]),
        ("dropping", [5, 5]),
        ("dropping, recomputed", [5, 5]),
    ],
)
def test_each_kind_of_block_is_compiled_once(
    seen: dict[str, Any], name: str, programs: list[int]
) -> None:
    """An evaluation has its own programs, and so has its smaller last batch. `eager_network`, which
    is called with another batch, and the next fold have none."""
    assert seen[name]["programs"] == programs
    assert seen[name]["interruptions"] == 1  # of the loss, by the network


@pytest.mark.parametrize(
    ("plain", "name"),
    [("plain", "stage 1"), ("plain", "stage 3"), ("plain lora", "lora at stage 3")],
)
def test_programs_compute_what_the_network_does(
    seen: dict[str, Any], plain: str, name: str
) -> None:
    wanted, found = seen[plain], seen[name]
    for figure in ("loss", "grad_norm"):
        assert found[figure] == pytest.approx(wanted[figure], rel=1e-5), figure
    for number, loss in enumerate(found["evaluated"]):
        assert loss == pytest.approx(wanted["evaluated"][number], rel=1e-5)
    assert found["names"] == wanted["names"]  # of the weights


def test_recomputed_programs_drop_the_same_branches(seen: dict[str, Any]) -> None:
    wanted, found = seen["dropping"], seen["dropping, recomputed"]
    for figure in ("loss", "grad_norm"):
        assert found[figure] == pytest.approx(wanted[figure], rel=1e-5), figure


def test_the_mode_is_that_of_the_recipe(seen: dict[str, Any]) -> None:
    """Of the blocks; the loss has the default one."""
    assert seen["stage 1"]["modes"] == ["default"]
    assert seen["stage 3"]["modes"] == ["default", "reduce-overhead"]
