"""`edgeprune report`."""

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import ReportConfig


def report(config: ReportConfig) -> None:
    """Summarise all runs below a folder: frontiers, stability over seeds, and specificity."""
    from edgeprune.api.circuits import report
    from edgeprune.evaluation.report import frontier_table

    groups, folder = report(config)
    for group in groups:
        for series in group.series:
            print_table(frontier_table(group, series))
    number = sum(len(point.runs) for group in groups for point in group.points)
    runs = f"{number:,} run{'s' if number > 1 else ''}"
    print_result(f"{runs} -> {folder}/report.html, plots, CSV files, consensus circuits")
