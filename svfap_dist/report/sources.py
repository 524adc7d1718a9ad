"""The sources of a mixture in the run report: what each contributed, and how well it is predicted.

In: lines of metrics.jsonl, events.jsonl and quarantine.jsonl, and the recipe. Out: a row of text
for each source; none for a run of one data set, or of a version that did not record them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from svfap_dist.report.series import mean_of_tenth

COLUMNS = ("source", "loss, first → last tenth", "clips/s", "share", "epochs", "bad samples")

Row = Mapping[str, Any]


def source_rows(
    rows: Sequence[Row], events: Sequence[Row], bad: Sequence[Row], recipe: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """Return the cells of `COLUMNS` for each source.

    Args:
        rows: Of metrics.jsonl, in order.
        events: Of events.jsonl, in order.
        bad: Of quarantine.jsonl; each use of a bad sample is one.
        recipe: The run's config.toml.
    """
    mixed = [row for row in rows if row.get("source_clips")]
    clips: Counter[str] = Counter()
    for row in mixed:
        clips.update(row["source_clips"])
    seconds = sum(sum(row["source_clips"].values()) / row["clips_per_second"] for row in mixed)
    num_bad = Counter(row.get("source") for row in bad)
    samples = next((e["sources"] for e in reversed(events) if "sources" in e), {})
    all_samples_used = (
        rows[-1]["step"] * recipe["train"]["global_batch_size"] / _repeats(recipe) if mixed else 0
    )
    found = []
    for name, count in clips.items():
        share = count / clips.total()
        epochs = share * all_samples_used / samples[name] if samples.get(name) else None
        cells = (
            f"{count / seconds:.1f}",
            f"{100 * share:.1f} %",
            "unknown" if epochs is None else f"{epochs:.2f}",
            f"{num_bad[name]}",
        )
        found.append((name, _losses(source_losses(mixed, name)), *cells))
    return found


def source_losses(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    """Return step and mean loss of a source in the log rows that have clips of it.

    Args:
        rows: Of metrics.jsonl, in order.
        name: Of the source.
    """
    losses = [(row["step"], row.get("source_loss", {}).get(name)) for row in rows]
    return [(step, loss) for step, loss in losses if loss is not None]


def _losses(found: Sequence[tuple[int, float]]) -> str:
    losses = [loss for _, loss in found]
    if not losses:
        return "no clips"
    return f"{mean_of_tenth(losses, last=False):.3f} → {mean_of_tenth(losses, last=True):.3f}"


def _repeats(recipe: Mapping[str, Any]) -> int:
    """Return the number of clips that are cut from each sample."""
    return recipe["data"].get("repeated_sampling", 1)
