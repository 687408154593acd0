"""`edgeprune report`."""

from __future__ import annotations

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import ReportConfig


def report(config: ReportConfig) -> None:
    """Summarise all runs below a folder: frontiers, and stability over seeds."""
    from edgeprune.api.circuits import report
    from edgeprune.evaluation.report import report_tables

    done = report(config)
    for table in report_tables(done.groups):
        print_table(*table)
    print_result(f"{done.num_runs} runs -> {done.folder}/report.html, plots, CSV files, consensus")
