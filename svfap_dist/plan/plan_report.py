"""What a plan says, and how people read it."""

from __future__ import annotations

import dataclasses

from svfap_dist.profiling.memory import RankBytes


@dataclasses.dataclass(frozen=True)
class Input:
    """A number that went into the plan, in `unit`s, and where it comes from."""

    name: str
    value: float | None
    unit: str
    source: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What came out.

    hours: of computing, for the recipe's epochs or max_steps; None where the number of samples is
    not known. alone: clips per second that each part could do if nothing else bounded the run.
    bytes_per_rank: by ZeRO stage. standing_bytes: weights and optimizer as measured at the recipe's
    stage; None where nothing was.
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
        """For people."""
        where = f"{self.nodes} x {self.gpus_per_node} ranks on {self.gpu}"
        text = [
            f"{self.clips_per_second:.1f} clips/s on {where}, bound by {self.bound_by}; a step "
            f"takes {self.step_seconds:.3g} s.",
            "By itself each part could do, in clips/s: "
            + ", ".join(f"{name} {rate:.1f}" for name, rate in self.alone.items())
            + ".",
            "Hours: not known without the number of samples: give data.url or --samples."
            if self.hours is None
            else f"{self.hours:.2f} hours for {self.total_steps} steps, without start-up, "
            "evaluations and checkpoints.",
            "",
            "Memory per rank in GiB, by ZeRO stage (* the recipe's):",
            *self._memory(),
            "",
            "Made from:",
            *(f"  {i.name:38} {_shown(i):>24}  {i.source}" for i in self.inputs),
        ]
        return [*text, *(["", *self.notes] if self.notes else [])]

    def _memory(self) -> list[str]:
        names = [field.name for field in dataclasses.fields(RankBytes)]
        rows = [f"{'':4}" + "".join(f"{name:>13}" for name in names)]
        for stage, found in self.bytes_per_rank.items():
            mark = "*" if stage == self.zero_stage else " "
            values = "".join(f"{getattr(found, name) / 2**30:13.3f}" for name in names)
            rows.append(f"{mark}{stage:<3}{values}")
        return rows


def _shown(given: Input) -> str:
    return "unknown" if given.value is None else f"{given.value:.6g} {given.unit}".strip()
