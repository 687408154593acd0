"""`edgeprune ablate`."""

from edgeprune.commands.console import print_result, print_table
from edgeprune.config import AblateConfig


def ablate(config: AblateConfig) -> None:
    """Ablate heads or other nodes of a model, and measure whether they matter more than others."""
    from edgeprune.api.ablate import ablate_nodes
    from edgeprune.evaluation.ablate import ablation_tables, in_words

    done = ablate_nodes(config)
    for table in ablation_tables(done.result, done.title):
        print_table(table)
    print_result(f"Ablated: {', '.join(done.result.ablated.nodes)}.")
    print_result(in_words(done.result))
    if config.output:
        print_result(f"-> {config.output}")
