"""The result of planning, and its text."""

from __future__ import annotations

import dataclasses

from svfap_dist.plan.memory import RankBytes
from svfap_dist.text_table import format_table


@dataclasses.dataclass(frozen=True)
class Input:
    """A number that the plan is computed from, in `unit`s, and its source; None: unknown."""

    name: str
    value: float | None
    unit: str
    source: str

    @property
    def text(self) -> str:
        """The value with its unit."""
        return "unknown" if self.value is None else f"{self.value:.6g} {self.unit}".strip()


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predictions for a run.

    Args:
        hours: of training, for the recipe's epochs or max_steps; None where the number of samples
            is unknown.
        alone: clips per second of each part if nothing else bounded the run.
        bytes_per_rank: by ZeRO stage.
        standing_bytes: weights and optimizer as measured at the recipe's stage; None where nothing
            was measured.
        device_bytes: memory of a rank's GPU.
    """

    gpu: str
    nodes: int
    gpus_per_node: int
    world_size: int
    clips_per_second: float
    bound_by: str
    step_seconds: float
    total_steps: int | None
    hours: float | None
    alone: dict[str, float]
    zero_stage: int
    bytes_per_rank: dict[int, RankBytes]
    standing_bytes: int | None
    device_bytes: float | None
    inputs: list[Input]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return the text for people."""
        machines = f"{self.nodes} x {self.gpus_per_node} ranks on {self.gpu}"
        alone = ", ".join(f"{name} {rate:.1f}" for name, rate in self.alone.items())
        hours = "Hours: unknown without the number of samples: give data.url or --samples."
        if self.hours is not None:
            hours = f"{self.hours:.2f} hours for {self.total_steps} steps, without start-up, "
            hours += "evaluations and checkpoints."
        names = [field.name for field in dataclasses.fields(RankBytes)]
        memory = [
            ["*" if stage == self.zero_stage else "", str(stage)]
            + [f"{getattr(found, name) / 2**30:.3f}" for name in names]
            for stage, found in self.bytes_per_rank.items()
        ]
        inputs = [("", given.name, given.text, given.source) for given in self.inputs]
        return [
            f"{self.clips_per_second:.1f} clips/s on {machines}, bound by {self.bound_by}; a step "
            f"takes {self.step_seconds:.3g} s.",
            f"Each part alone, in clips/s: {alone}.",
            hours,
            "",
            "Memory per rank in GiB, by ZeRO stage (* the recipe's):",
            *format_table(memory, ("", "", *names), right=range(2, len(names) + 2)),
            "",
            "Computed from:",
            *format_table(inputs, right=(2,)),
            *(["", *self.notes] if self.notes else []),
        ]
