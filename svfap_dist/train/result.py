"""How a run ended."""

from __future__ import annotations

import dataclasses

from svfap_dist.train.signals import FINISHED


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended. The losses are those of the whole run, not only of its last attempt, and
    None where none was computed."""

    step: int
    total_steps: int
    stop_reason: str  # "finished", or what asked the run to stop (see `notice`)
    run_url: str
    first_loss: float | None
    loss: float | None
    first_held_out_loss: float | None
    held_out_loss: float | None

    def lines(self) -> list[str]:
        """For people."""
        text = [
            f"Run {self.run_url}: {self.stop_reason} at step {self.step} of {self.total_steps}."
        ]
        if self.stop_reason != FINISHED:
            text.append("A checkpoint is saved: run the same command again to resume.")
        for name, first, last in (
            ("Loss", self.first_loss, self.loss),
            ("Held-out loss", self.first_held_out_loss, self.held_out_loss),
        ):
            if first is not None and last is not None:
                text.append(f"{name} {first:.4f} at first, {last:.4f} now.")
        return text
