"""`edgeprune tokens`."""

from edgeprune.commands.console import print_paths, print_result, print_shaded, print_table
from edgeprune.commands.run import start_processes
from edgeprune.config import TokensConfig

SHOWN = 3
"""Number of prompts that are shown as shaded text."""


def tokens(config: TokensConfig) -> None:
    """Attribute answers to the tokens of their prompts."""
    if start_processes("tokens", config.launcher):
        return
    from edgeprune.api.tokens import find_tokens
    from edgeprune.drawing.tokens import mixed, scores_text, shaded_tokens
    from edgeprune.evaluation.token_tables import in_words, token_tables

    done = find_tokens(config)
    if done is None:  # rank 0 reports
        return
    data = done.result.to_dict()
    for answer in data["answers"][:SHOWN]:
        distractor = f", not {answer['distractor']!r}" if answer["distractor"] else ""
        print_result(f"Answer {answer['answer']!r}{distractor}")
        for model in answer["through"]:
            print_result(f"  {model}: {scores_text(answer, model, data['target'])}")
            print_shaded([
                (token.text, mixed(token.share), token.value)
                for token in shaded_tokens(answer, model)
            ])  # fmt: skip
    for table in token_tables(done.result, f"{done.title}: {data['target']}"):
        print_table(table)
    print_result(in_words(done.result))
    print_paths(done.paths)
