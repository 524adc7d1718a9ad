"""Print one table of `svfap bench transfer` runs over different folds of one data set.

    python tests/benchmarks/transfer/pool_folds.py runs/fold1 runs/fold2

The confusion matrices of a cell are added over the runs, and UAR is computed from the sums, so that
each test sample counts once.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from svfap_dist.bench.transfer import METHODS
from svfap_dist.bench.transfer_table import Cell, CellResult, TransferTable, compute_power


def pool(runs: list[Path]) -> TransferTable:
    """Return the table of the cells that all runs have.

    Args:
        runs: folders of the tables.
    """
    tables = [json.loads((run / "transfer.json").read_text()) for run in runs]
    cells = [
        {path.name: json.loads(path.read_text()) for path in (run / "cells").glob("*.json")}
        for run in runs
    ]
    results, counts = [], np.zeros(0)
    for name in sorted(set.intersection(*map(set, cells))):
        of_runs = [of_run[name] for of_run in cells]
        confusion = np.sum([cell["confusion"] for cell in of_runs], axis=0, dtype=np.float64)
        counts = confusion.sum(axis=1)
        uar = 100 * float(np.mean(np.diag(confusion) / counts))
        first = of_runs[0]
        cell = Cell(first["method"], first["labels"], first["seed"])
        seconds = sum(one["seconds"] for one in of_runs)
        results.append(CellResult(cell, {"uar": uar}, int(counts.sum()), seconds))
    there = [result.cell for result in results]
    seeds = 1 + max((cell.seed for cell in there), default=0)
    return TransferTable(
        set=tables[0]["set"],
        label=tables[0]["label"],
        metric="uar",
        methods=tuple(name for name in METHODS if name in {cell.method for cell in there}),
        labels=tuple(sorted({cell.labels for cell in there}, key=lambda n: n or math.inf)),
        seeds=seeds,
        results=tuple(results),
        power=compute_power("uar", [int(n) for n in counts], seeds),
        stop_reason="",
    )


def main() -> None:
    """Read the arguments and print the pooled table."""
    parser = argparse.ArgumentParser(description="Pool svfap bench transfer runs over folds.")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    table = pool(arguments.runs)
    print(table.to_markdown() if arguments.markdown else "\n".join(table.lines()))


if __name__ == "__main__":
    main()
