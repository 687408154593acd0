"""`edgeprune report`."""

from __future__ import annotations

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import ReportConfig


def report(config: ReportConfig) -> None:
    """Summarise all runs below a folder: frontiers, and stability over seeds."""
    from edgeprune.api.circuits import report
    from edgeprune.evaluation.report import frontier_table

    done = report(config)
    for group in done.groups:
        for series in group.series:
            print_table(frontier_table(group, series))
    print_result(f"{done.num_runs} runs -> {done.folder}/report.html, plots, CSV files, consensus")
