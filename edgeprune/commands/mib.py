"""`edgeprune mib`."""

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import MibConfig


def mib(config: MibConfig) -> None:
    """Measure scores as the MIB benchmark does: CPR, CMD and ten faithfulness values."""
    from edgeprune.api.mib import benchmark
    from edgeprune.evaluation.mib import mib_table

    done = benchmark(config)
    print_table(mib_table(done.areas, done.recovered, done.title))
    if done.areas:
        print_result(
            "Nearly all of each area lies above 5 % of the edges, where most rankings do well, "
            "and a circuit that overshoots the full model raises CPR; the curve of KL says more "
            "about small circuits."
        )
    for path in done.outputs:
        print_result(f"-> {path}")
